"""How much faster this project trains and samples than a plain implementation, on this machine.

    python benchmark.py                            every comparison of speed
    python benchmark.py --only guided sample       some of them; what else the file holds stays in it
    python benchmark.py --only minutes samplers    what training and sampling reach: these take hours

The plain side: float32, images one at a time through PIL, attention that stores its matrices, Adam and EMA tensor by
tensor, hundreds of sampling steps (the rows say how many), two passes of the network for a guided step. Ours: as the
scripts do it.

Both are generators whose items are units of work. They take turns, each in a new process, since ours changes settings
of its process. A gain is formed within a turn: a machine that slows down slows both.
"""

import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import re
import signal
import timeit
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torchvision import transforms

import evaluate
import training
import utils
from ddpm import beta_schedule
from ddpm_conditional import guided
from ddpm_unconditional import SHAPE
from image_data import load_data
from utils import ROOT, UserError, pick_device
from weights import build_model, describe_checkpoint, load_checkpoint

DEFAULT = {"name": "PatchUNet", "channels": 1} | SHAPE
ANNOTATED = DEFAULT | {"width": 28, "mults": [1, 2, 4], "depth": 2, "block": "convnext", "attention": True}
COURSE = {"name": "UNet_conditional", "channels": 1, "num_classes": 10}
TIMESTEPS, EMA_BETA, P_UNCOND = 1000, 0.995, 0.1
TURNS, AT_LEAST = 3, 2.0  # a turn repeats its work for so many seconds
SAMPLES, IMAGE = 2000, (1, 28, 28)  # how many for a distance, and of which shape
BEST, GUIDED = "fashion_mnist", "fashion_mnist_conditional_20_epochs"  # published checkpoints


def load_images(size):
    return dataclasses.replace(load_data("fashion_mnist"), image_size=size)  # resized batch by batch


def load_model(checkpoint, n):
    """A published network of Fashion-MNIST, its process, and the labels of n images (or None)."""
    model, diffusion, _ = load_checkpoint(ROOT / f"checkpoints/{checkpoint}.safetensors", device=pick_device())
    labels = torch.arange(n, device=pick_device()) % model.num_classes if model.num_classes else None
    return model, diffusion, labels


def plain_batches(data, batch_size, shuffle=True):
    """Batches (x0, labels); every image becomes PIL's first, as in torchvision's own data sets."""
    transform = transforms.Compose([transforms.ToPILImage(), transforms.Resize(data.image_size), transforms.ToTensor()])

    def collate(indices):
        return torch.stack([2 * transform(data.images[i]) - 1 for i in indices]), data.labels[indices]

    loader = DataLoader(range(len(data)), batch_size, shuffle=shuffle, drop_last=True, collate_fn=collate)
    while True:
        yield from loader


def plain_step(model, ema_model, optimizer, alphas_cumprod, x0, t, noise, labels):
    """Huber loss between the noise and its prediction at x_t (Ho et al. 2020, eqs. 4 and 14); Adam; EMA."""
    a = alphas_cumprod.gather(0, t).view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    with sdpa_kernel(SDPBackend.MATH):  # keeps the (H W) x (H W) matrices of attention for the backward pass
        loss = F.smooth_l1_loss(model(x_t, t, labels), noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for average, weights in zip(ema_model.parameters(), model.parameters(), strict=True):
        average.data = average.data * EMA_BETA + (1 - EMA_BETA) * weights.data
    return loss.detach()


def plain_training(model_config, image_size, batch_size):
    data, device = load_images(image_size), pick_device()
    model = build_model(model_config).to(device)
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)  # one tensor after the other
    alphas_cumprod = (1 - beta_schedule("linear", TIMESTEPS)).cumprod(0).float().to(device)
    for x0, labels in plain_batches(data, batch_size):
        x0, t = x0.to(device), torch.randint(TIMESTEPS, (batch_size,), device=device)
        labels = labels.to(device) if model.num_classes and torch.rand(()) >= P_UNCOND else None
        yield plain_step(model, ema_model, optimizer, alphas_cumprod, x0, t, torch.randn_like(x0), labels)


@torch.no_grad()
def plain_sampler(model, x, betas, labels=None, cfg_scale=0.0, draw=torch.randn_like):
    """From x = x_{T-1} every x_t that follows, the last one the image (Ho et al. 2020, algorithm 2)."""
    alphas_cumprod = (1 - betas).cumprod(0)
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    for step in reversed(range(len(betas))):
        t = torch.full((len(x),), step, device=x.device)
        with sdpa_kernel(SDPBackend.MATH):
            eps = model(x, t, labels)
            if cfg_scale > 0:
                eps_uncond = model(x, t, None)
                eps = eps_uncond + cfg_scale * (eps - eps_uncond)
        beta, a, a_prev = (c.gather(0, t).view(-1, 1, 1, 1) for c in (betas, alphas_cumprod, alphas_cumprod_prev))
        x = (x - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()
        if step > 0:
            x = x + (beta * (1 - a_prev) / (1 - a)).sqrt() * draw(x)
        yield x


def plain_sampling(checkpoint, n, cfg_scale):
    """Single steps of the sampler: all of them cost the same."""
    model, diffusion, labels = load_model(checkpoint, n)
    model = model.to(memory_format=torch.contiguous_format)
    while True:
        yield from plain_sampler(model, torch.randn(n, *IMAGE).to(pick_device()), diffusion.betas, labels, cfg_scale)


def our_run(model, data, batch_size, schedule="linear", **settings):
    diffusion = {"timesteps": TIMESTEPS, "schedule": schedule, "objective": "simple"}
    train = {"loss": "huber", "batch_size": batch_size, "ema_betas": [EMA_BETA], "ema_start": 0} | settings
    config = {"model": model, "diffusion": diffusion, "data": {"image_size": data.image_size}, "train": train}
    return training.Run(config, data, pick_device())


def our_training(model, image_size, batch_size):
    yield from training.steps(our_run(model, load_images(image_size), batch_size))


def our_sampling(checkpoint, n, cfg_scale):
    model, diffusion, labels = load_model(checkpoint, n)
    while True:
        with utils.autocast(pick_device()):
            yield diffusion.sample(guided(model, labels, cfg_scale), n, IMAGE, sampler="dpm", steps=10)


def measure(make, settings):
    """Seconds for one item of the generator make(*settings)."""
    timer = timeit.Timer("next(work).cpu()", globals={"work": make(*settings)})  # a GPU works behind: .cpu() waits
    timer.timeit(1)  # warms up
    count = max(1, round(AT_LEAST / timer.timeit(1)))
    return timer.timeit(count) / count


def measure_alone(make, settings):
    """`measure` in a new process, which inherits that Ctrl-C is ignored: it is ended from here, without a word."""
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(measure, make, settings)
        signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            return future.result()
        except BrokenExecutor:
            raise UserError("a measuring process has died, most likely of too little memory: leave it out") from None
        except KeyboardInterrupt:
            multiprocessing.active_children()[0].terminate()
            raise


def machine():
    """What times depend on, in a line."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next(iter(re.findall(r"model name\s*: (.*)", about)), platform.processor() or platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    units = f"{device}, {utils.pick_precision(pick_device())}"
    return f"{cpu}, {torch.get_num_threads()} cores, {units}, torch {torch.__version__}"


def compare(name, what, unit, sides, settings, amounts=(1, 1)):
    """A row of the result, in a list. amounts: how many steps, or how much time, an item of each side stands for."""
    seconds = [[measure_alone(make, settings) for make in sides] for _ in range(TURNS)]
    plain, ours = np.transpose(seconds * np.array(amounts))
    values = {"plain": plain, "ours": ours, "gain": plain / ours}
    if unit == "steps/s":
        values |= {"plain": 1 / plain, "ours": 1 / ours}
    about = {"name": name, "what": what, "unit": unit, "machine": machine(), "turns": TURNS}
    return [about | {key: {"median": np.median(v), "min": v.min(), "max": v.max()} for key, v in values.items()}]


def distance(model, diffusion, **options):
    """Frechet distance of the model's samples from the test images of Fashion-MNIST."""
    with utils.autocast(pick_device()):
        images = diffusion.sample(model, SAMPLES, IMAGE, desc="sampling", **options)
    return evaluate.evaluate_samples(utils.to_uint8(images), data_name="fashion_mnist")["frechet_distance"]


def minutes_to_equal_quality(name, every=200):
    """How long our default network trains until its samples are as good as the plain network's after 5 epochs.

    Minutes are steps x the seconds of a step, measured in turns. The plain network's weights come from our loop in
    float32, whose steps are the same (tests/test_benchmark.py) but faster: it is charged for the plain ones.
    """
    data, batch_size = load_images(28), 128
    if len(data) < 60_000:
        raise UserError(f"{name} needs all 60,000 images: run `python download_datasets.py fashion_mnist` first")
    plain_steps = 5 * len(data) // batch_size
    plain = our_run(ANNOTATED, data, batch_size, steps=plain_steps, precision="float32")
    for _ in utils.progress(training.steps(plain), total=plain_steps, desc="plain"):
        pass
    aim = distance(plain.model.eval(), plain.diffusion, sampler="dpm", steps=20)
    ours = our_run(DEFAULT, data, batch_size, "cosine", loss="l2", ema_start=every)
    for _ in utils.progress(training.steps(ours), desc="ours"):
        if ours.step % every == 0:
            reached = distance(ours.ema_models[f"ema_{EMA_BETA:g}"], ours.diffusion, sampler="dpm", steps=20)
            utils.say(f"Frechet distance after {ours.step} steps: {reached:.2f}; the aim is {aim:.2f}")
            if reached <= aim:
                break
    sides = functools.partial(plain_training, ANNOTATED), functools.partial(our_training, DEFAULT)
    what = f"training to a Frechet distance of {aim:.2f} ({plain_steps:,} steps, ours {ours.step:,})"
    return compare(name, what, "min", sides, (28, batch_size), (plain_steps / 60, ours.step / 60))


def compare_samplers(name):
    """Frechet distance against sampler and steps, of the best network."""
    model, diffusion, _ = load_model(BEST, SAMPLES)
    points = {}
    for sampler, eta in (("ddpm", None), ("ddim", 0.0), ("dpm", 0.0), ("dpm", 1.0)):
        curve = points[sampler if eta is None else f"{sampler}, eta = {eta:g}"] = {}
        for steps in (5, 10, 20, 50, 100):
            reached = distance(model, diffusion, sampler=sampler, steps=steps, eta=eta)
            curve[str(steps)] = {"frechet_distance": reached, "samples": SAMPLES}
    about = {"name": f"{name}_{BEST}", "what": f"Frechet distance of {SAMPLES:,} samples"}
    yield about | describe_checkpoint(ROOT / f"checkpoints/{BEST}.safetensors") | {"samplers": points}


TRAIN, SAMPLE = (plain_training, our_training), (plain_sampling, our_sampling)
SPEED = {
    "train_default": ("training the default network, 28x28, batch 128", "steps/s", TRAIN, (DEFAULT, 28, 128)),
    "train_course_32": ("training the course's network, 32x32, batch 32", "steps/s", TRAIN, (COURSE, 32, 32)),
    "train_course_64": ("training the course's network, 64x64, batch 8", "steps/s", TRAIN, (COURSE, 64, 8)),
    "sample": ("sampling 64 images, 28x28: 200 steps, ours 10", "s", SAMPLE, (BEST, 64, 0.0), (200, 1)),
    "guided": ("sampling 10 guided images, 28x28: 999 steps, ours 10", "s", SAMPLE, (GUIDED, 10, 3.0), (999, 1)),
}
QUALITY = {"minutes": minutes_to_equal_quality, "samplers": compare_samplers}


def main(argv=None):
    parser = utils.ArgumentParser(description=__doc__.splitlines()[0])
    names, default = [*SPEED, *QUALITY], ROOT / "report/results/benchmark.json"
    parser.add_argument("--only", nargs="+", choices=names, default=list(SPEED), metavar="NAME", help=", ".join(names))
    parser.add_argument("--json-out", type=Path, default=default, help="where to write; its other rows stay")
    args = parser.parse_args(argv)
    utils.check_writable(out := args.json_out)
    try:
        rows = {(r["name"], r.get("machine")): r for r in json.loads(out.read_text())["rows"]} if out.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} is not a result of this benchmark: delete it, or use another --json-out") from error
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        utils.say(f"other processes keep {load:.1f} cores busy: on a busy machine these numbers mean little")
    for name in args.only:
        for new in QUALITY[name](name) if name in QUALITY else compare(name, *SPEED[name]):
            for side in ("plain", "ours", "gain") if "gain" in new else ():
                print(f"{new['what']}, {side}:", "{median:.3g} ({min:.3g} to {max:.3g})".format(**new[side]))
            about = {"command": f"python benchmark.py --only {name}", "load_before": load}
            rows[new["name"], new.get("machine")] = new | about
            utils.write_json(out, {"rows": list(rows.values())})
    print(f"wrote {out}")


if __name__ == "__main__":
    utils.command_line(main)
