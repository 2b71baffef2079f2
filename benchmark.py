"""How much faster this project is than the plain way, on this machine, in one run.

    python benchmark.py                       all comparisons, under 10 minutes on two cores
    python benchmark.py --only train_28       some of them; rows measured before on this machine stay in the file
    python benchmark.py --quality             also what takes hours of training and sampling; goes on where it stopped
    python benchmark.py --quick               tiny sizes: only shows that everything runs

The plain way is written out below as a textbook would: float32, contiguous tensors, stored attention matrices, Adam and
EMA in Python loops, PIL transforms image by image, every step of the diffusion process, two passes per guided step.
Ours is what the scripts really call. Each side has a process of its own, so that its peak memory is its own; the two
take turns (A B A B ...), and a ratio is formed within each turn, so that a machine that slows down slows both.
"""

import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import evaluate
import image_data
import modules
import training
import utils
from ddpm import Diffusion, beta_schedule
from ddpm_unconditional import SHAPE
from image_data import augment, load_data
from modules import Attention, SelfAttention
from utils import (
    PRECISIONS,
    ROOT,
    ArgumentParser,
    UserError,
    autocast,
    check_writable,
    generator,
    pick_device,
    pick_precision,
    say,
    write_json,
)
from weights import build_model, image_shape, load_checkpoint, read_checkpoint

TIMESTEPS = 1000  # of the models that are trained and sampled here; the plain unconditional sampler has 200
FAST_STEPS, GUIDED_STEPS = 10, 10  # our second-order sampler's
CFG_SCALE = 3.0
EMA_BETA = 0.995
P_UNCOND = 0.1

POINT_1 = {"name": "PatchUNet", "channels": 1}  # of the experiments
DEFAULT = POINT_1 | SHAPE
CONDITIONAL = POINT_1 | {"patch": 1, "width": 20, "mults": [1, 2, 4], "num_classes": 10}  # fashion_mnist_conditional's
COURSE = {"name": "UNet_conditional", "channels": 3, "num_classes": 10}
# a ConvNeXt network of the size of The Annotated Diffusion Model's
CONVNEXT = {
    "name": "PatchUNet",
    "channels": 1,
    "width": 28,
    "mults": [1, 2, 4],
    "depth": 2,
    "patch": 1,
    "block": "convnext",
}

# The experiments' network, and what it could have been: 28x28 images leave room for two levels on blocks of 2x2 pixels, for
# three on single ones
SHAPES = {
    "width 32 (the experiments')": {},
    "width 24": {"width": 24},
    "width 48": {"width": 48},
    "width 24, two blocks a level": {"width": 24, "depth": 2},
    "without linear attention": {"attention": False},
    "ConvNeXt blocks": {"block": "convnext"},
    "single pixels, width 16, three levels": {"patch": 1, "width": 16, "mults": [1, 2, 4]},
    "single pixels, width 20, three levels": {"patch": 1, "width": 20, "mults": [1, 2, 4]},
    "single pixels, width 24, three levels": {"patch": 1, "width": 24, "mults": [1, 2, 4]},
    "single pixels, width 20, without linear attention": {
        "patch": 1,
        "width": 20,
        "mults": [1, 2, 4],
        "attention": False,
    },
    "single pixels, width 32, without linear attention": {
        "patch": 1,
        "width": 32,
        "mults": [1, 2, 4],
        "attention": False,
    },
    "single pixels, widths 16, 64, 64, without linear attention (the default)": SHAPE,
}
SHAPE_MINUTES = 2


# --- the plain way: networks and training ----------------------------------------------------------------------------


def stored_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1), the (H W) x (H W) matrix kept for the backward pass."""
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def course_attention(layer, x):
    """SelfAttention.forward through nn.MultiheadAttention, which stores its attention matrix unless told otherwise."""
    tokens = x.flatten(2).transpose(1, 2)
    normed = layer.ln(tokens)
    tokens = tokens + layer.mha(normed, normed, normed)[0]
    tokens = tokens + layer.ff_self(tokens)
    return tokens.transpose(1, 2).reshape(x.shape)


def plain_network(config):
    """The same network, parameters and mathematics, with every attention matrix stored."""
    model = build_model(config)
    for layer in model.modules():
        if type(layer) is Attention:
            layer.attend = stored_attention
        if type(layer) is SelfAttention:
            layer.forward = functools.partial(course_attention, layer)
    return model


def plain_loss(model, alphas_cumprod, x0, t, noise, labels):
    """Huber loss between the noise and its prediction at x_t (Ho et al. 2020, eqs. 4 and 14)."""
    a = alphas_cumprod.gather(0, t).view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    return F.smooth_l1_loss(model(x_t, t, labels), noise)


@torch.no_grad()
def plain_ema(ema_model, model, beta=EMA_BETA):
    for average, weights in zip(ema_model.parameters(), model.parameters(), strict=True):
        average.data = average.data * beta + (1 - beta) * weights.data


def plain_step(model, ema_model, optimizer, alphas_cumprod, x0, t, noise, labels):
    loss = plain_loss(model, alphas_cumprod, x0, t, noise, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    plain_ema(ema_model, model)
    return loss.detach()


def plain_state(config, device):
    """Network, average and optimizer; the seed is the one of `our_run`, so both start from the same weights."""
    torch.manual_seed(0)
    model = plain_network(config).to(device)
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    # foreach=False is PyTorch's own default on a CPU: one tensor after the other
    return model, ema_model, torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)


# --- the plain way: data ---------------------------------------------------------------------------------------------


class PilImages:
    """uint8 images in memory, handed out as torchvision's own data sets do: PIL image, then transforms."""

    def __init__(self, data, transform):
        self.data, self.transform = data, transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.data.images[i, 0].numpy())), int(self.data.labels[i])


def plain_loader(source, image_size, batch_size, shuffle=True):
    """Batches (x0, labels) of Fashion-MNIST, or of random-resized crops from a folder of photographs."""
    to_model = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    if source == "fashion_mnist":
        dataset = PilImages(load_data(source), transforms.Compose(to_model))
    else:
        crop = [
            transforms.Resize(round(1.25 * image_size)),
            transforms.RandomResizedCrop(image_size, scale=(0.8, 1.0)),
            transforms.RandomHorizontalFlip(),
        ]
        dataset = torchvision.datasets.ImageFolder(source, transforms.Compose(crop + to_model))
    return DataLoader(dataset, batch_size, shuffle=shuffle, drop_last=True)


def endless(loader):
    while True:
        yield from loader


def make_photographs(folder, count):
    """JPEGs of about 100 x 100 in 10 class folders: smooth shapes and grain, to compress as photographs do."""
    rng = np.random.default_rng(0)
    for i in range(count):
        size = tuple(int(s) for s in rng.integers(96, 112, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + rng.normal(0, 8, (size[1], size[0], 3))
        path = Path(folder) / f"class_{i % 10}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


# --- the plain way: sampling -----------------------------------------------------------------------------------------


@torch.no_grad()
def plain_sample(model, x, betas, timesteps, labels=None, cfg_scale=0.0, variance="posterior", draw=torch.randn_like):
    """Ancestral sampling from x over the given timesteps (Ho et al. 2020, algorithm 2); two passes a step if guided."""
    alphas_cumprod = (1 - betas).cumprod(0)
    alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    for step in timesteps:
        t = torch.full((len(x),), step, device=x.device)
        eps = model(x, t, labels)
        if cfg_scale > 0:
            eps_uncond = model(x, t, None)
            eps = eps_uncond + cfg_scale * (eps - eps_uncond)
        beta, a, a_prev = (c.gather(0, t).view(-1, 1, 1, 1) for c in (betas, alphas_cumprod, alphas_cumprod_prev))
        x = (x - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()
        if step > 0:
            sigma2 = beta * (1 - a_prev) / (1 - a) if variance == "posterior" else beta
            x = x + sigma2.sqrt() * draw(x)
    return x


# --- the works: what is timed. Each function prepares one side and returns a function that does one unit -------------


def plain_training(model, source, image_size, batch_size):
    device = pick_device()
    state = plain_state(model, device)
    alphas_cumprod = (1 - beta_schedule("linear", TIMESTEPS)).cumprod(0).float().to(device)
    batches = endless(plain_loader(source, image_size, batch_size))

    def step():
        x0, labels = (b.to(device) for b in next(batches))
        t = torch.randint(TIMESTEPS, (len(x0),), device=device)
        drop = not model.get("num_classes") or torch.rand(()) < P_UNCOND
        return plain_step(*state, alphas_cumprod, x0, t, torch.randn_like(x0), None if drop else labels)

    return step


def our_config(model, image_size, batch_size):
    return {
        "model": dict(model),
        "diffusion": {"timesteps": TIMESTEPS, "schedule": "linear", "objective": "simple"},
        "data": {"image_size": image_size},
        "train": {
            "loss": "huber",
            "steps": None,
            "batch_size": batch_size,
            "lr": 1e-3,
            "optimizer": "adam",
            "seed": 0,
            "precision": None,
            "ema_betas": [EMA_BETA],
            "ema_start": 0,
            "p_uncond": P_UNCOND,
            "label_dropout": "example",
        },
    }


def our_data(source, image_size):
    """As the scripts load it; photographs are decoded into a temporary cache."""
    if source != "fashion_mnist":
        image_data.CACHE = Path(source).parent / "cache"
        return load_data(source, image_size=image_size)
    data = load_data(source)
    if image_size != 28:  # for the growth with the image's size alone
        data.images = F.interpolate(data.images[:1000], (image_size, image_size))
        data.labels, data.image_size = data.labels[:1000], image_size
    return data


def our_run(model, source, image_size, batch_size, folder, rank=0, world=1):
    data = our_data(source, image_size)
    run = training.Run(our_config(model, image_size, batch_size), data, Path(folder), pick_device(), rank, world, False)
    run.prepare()
    return run


def steps_of(run, model):
    """A function that makes the run's next training step."""

    def step():
        loss = run.train_step(model, accumulate=1)
        run.step += 1
        return loss

    return step


def our_training(model, source, image_size, batch_size):
    return our_training_without(None, model, source, image_size, batch_size)


def our_training_without(choice, model, source, image_size, batch_size):
    """Our training, but with one of its choices undone (or torch.compile, which it leaves to the user)."""
    if choice == "freed memory kept":
        training.keep_freed_memory = lambda: None
    elif choice == "channels_last":
        torch.channels_last = torch.contiguous_format  # what the network and its batches are told to be
    elif choice == "norm's groups of 32 channels":
        modules.norm = lambda dim, affine=True: torch.nn.GroupNorm(math.gcd(8, dim), dim, affine=affine)
    elif choice == "float32 in attention":
        modules.Attention.attend = lambda layer, q, k, v: F.scaled_dot_product_attention(q, k, v)
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(model, source, image_size, batch_size, folder)
    net = run.model
    if choice == "fused Adam":
        run.optimizer = torch.optim.Adam(run.model.parameters(), lr=1e-3, foreach=False)
    elif choice == "fused EMA":
        for ema in run.emas.values():
            ema.step_ema = plain_ema
    elif choice == "torch.compile":
        net = torch.compile(run.model)
    return steps_of(run, net)


def matrix_product(size):
    """The machine's peak, in the precision that training uses here."""
    device = pick_device()
    dtype = PRECISIONS[pick_precision(device)]
    a, b = torch.randn(2, size, size).to(device, dtype)
    return lambda: a @ b


def plain_sampling(model, image_size, n, timesteps, total, cfg_scale=0.0):
    """The first `timesteps` of `total` steps: all of them cost the same."""
    device = pick_device()
    net = plain_network(model).to(device).eval()
    labels = torch.arange(n, device=device) % model["num_classes"] if cfg_scale else None
    betas = beta_schedule("linear", total).float().to(device)
    x = torch.randn(n, model["channels"], image_size, image_size, device=device)
    return lambda: plain_sample(net, x, betas, range(total - 1, total - 1 - timesteps, -1), labels, cfg_scale)


def our_sampling(model, image_size, n, steps, cfg_scale=0.0):
    device = pick_device()
    net = build_model(model).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    diffusion = Diffusion(TIMESTEPS, "cosine").to(device)
    labels = torch.arange(n) % model["num_classes"] if cfg_scale else None
    shape = (model["channels"], image_size, image_size)

    def sample():
        with autocast(device):
            return diffusion.sample(net, n, shape, labels=labels, cfg_scale=cfg_scale, sampler="dpm", steps=steps)

    return sample


def plain_data(source, image_size, batch_size):
    batches = endless(plain_loader(source, image_size, batch_size))
    return lambda: next(batches)[0]


def our_batches(source, image_size, batch_size):
    data, steps = our_data(source, image_size), itertools.count()

    def batch():
        step = next(steps)
        index = training.draw_indices(0, step, batch_size, len(data))
        return augment(data, index, generator(0, 1, step))

    return batch


# --- measuring -------------------------------------------------------------------------------------------------------

SPAWN = multiprocessing.get_context("spawn")  # a fresh interpreter: a fork would inherit this process's memory


def timed(work, count):
    """Seconds per unit of work; on a GPU the result's way to the CPU waits until it is there."""
    start = time.perf_counter()
    for _ in range(count):
        result = work()
    result.cpu()
    return (time.perf_counter() - start) / count


def peak_memory():
    """Bytes: the most that this process has held so far, on the GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(pipe, prepare, settings, at_least):
    """A side's process: prepare, warm up, then measure whenever asked; at the end tell the memory it took."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair, which ends this process
    libraries = peak_memory()
    try:
        work = prepare(**settings)
        seconds = timed(work, 1)
        if seconds < at_least:
            seconds = timed(work, 1)
        pipe.send("ready")
        count = max(1, round(at_least / seconds))
        while pipe.recv() == "measure":
            pipe.send(timed(work, count))
        pipe.send({"work": max(1, peak_memory() - libraries), "process": peak_memory()})
    except UserError as error:
        pipe.send(error)


class Side:
    """One side of a comparison in a process of its own; each turn times units of its work for `at_least` seconds."""

    def __init__(self, prepare, settings, at_least):
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs, prepare, settings, at_least), daemon=True)
        self.process.start()
        theirs.close()
        self.receive()

    def receive(self):
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise UserError(
                "a measuring process has died, most likely of too little memory: leave that row out with --only"
            ) from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def measure(self):
        self.pipe.send("measure")
        return self.receive()

    def finish(self):
        self.pipe.send("finish")
        memory = self.receive()
        self.process.join()
        return memory


def take_turns(works, effort, repeats=None):
    """works: {name: (prepare, settings)} -> {name: seconds per unit, one value a turn}, {name: peak memory}."""
    sides = {name: Side(prepare, settings, effort["seconds"]) for name, (prepare, settings) in works.items()}
    seconds = {name: [] for name in sides}
    for _ in range(repeats or effort["repeats"]):
        for name, side in sides.items():
            seconds[name].append(side.measure())
    return seconds, {name: side.finish() for name, side in sides.items()}


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table_row(name, what, unit, plain, ours, lower_is_better=False, note=None):
    """One line of the table. plain, ours: one value a turn; the gain is formed turn by turn."""
    gains = [p / o if lower_is_better else o / p for p, o in zip(plain, ours, strict=True)]
    values = {"plain": spread(plain), "ours": spread(ours), "gain": spread(gains), "turns": len(gains)}
    return {"name": name, "what": what, "unit": unit, **values} | ({"note": note} if note else {})


# --- the comparisons: each returns rows of the table -----------------------------------------------------------------


def training_flops(model, image_size, batch_size):
    """Floating-point operations of a training step: convolutions and matrix products, forward and backward."""
    with torch.device("meta"):  # shapes only, nothing is computed
        net = plain_network(model)
        x, t = torch.zeros(batch_size, model["channels"], image_size, image_size), torch.zeros(batch_size).long()
    with FlopCounterMode(display=False) as counter:
        net(x, t, t if model.get("num_classes") else None).square().mean().backward()
    return counter.get_total_flops()


def compare_training(name, effort, folder, what, model, image_size, batch_size, repeats=None):
    if effort["quick"]:
        model, image_size, batch_size = model | {"width": 8}, min(image_size, 32), 4
    source = "fashion_mnist" if model["channels"] == 1 else str(folder / "photographs")
    settings = {"model": model, "source": source, "image_size": image_size, "batch_size": batch_size}
    size = effort["matrix"]
    works = {
        "plain": (plain_training, settings),
        "ours": (our_training, settings),
        "peak": (matrix_product, {"size": size}),
    }
    seconds, memory = take_turns(works, effort, repeats)
    plain, ours = ({kind: count / 1e9 for kind, count in memory[side].items()} for side in ("plain", "ours"))
    what = f"training {what}, {image_size}x{image_size}, batch {batch_size}"
    flops = training_flops(model, image_size, batch_size)

    def share(side):
        return [100 * flops / s / (2 * size**3 / peak) for s, peak in zip(seconds[side], seconds["peak"], strict=True)]

    return [
        table_row(name, what, "steps/s", *([1 / s for s in seconds[side]] for side in ("plain", "ours"))),
        table_row(
            f"{name}_memory",
            "  peak memory",
            "GB",
            [plain["work"]],
            [ours["work"]],
            True,
            note="beyond the interpreter and its libraries; "
            f"with them {plain['process']:.2f} and {ours['process']:.2f} GB",
        ),
        table_row(
            f"{name}_share",
            "  share of the matrix-product peak",
            "%",
            share("plain"),
            share("ours"),
            note=f"peak: {2e-9 * size**3 / statistics.median(seconds['peak']):.0f} GFLOP/s in the same run, by a "
            f"{size}^3 product in {pick_precision(pick_device())}",
        ),
    ]


def compare_sampling(name, effort, folder):
    n, total = (64, 200) if not effort["quick"] else (2, 4)
    works = {
        "plain": (plain_sampling, {"model": POINT_1, "image_size": 28, "n": n, "timesteps": total, "total": total}),
        "ours": (our_sampling, {"model": POINT_1, "image_size": 28, "n": n, "steps": FAST_STEPS}),
    }
    seconds, _ = take_turns(works, effort)
    note = f"plain: DDPM, all {total} steps; ours: DPM-Solver++(2M), {FAST_STEPS} steps"
    return [table_row(name, f"sampling {n} images, 28x28", "s", seconds["plain"], seconds["ours"], True, note)]


def compare_guided(name, effort, folder):
    n, measured, total = (10, 50, TIMESTEPS - 1) if not effort["quick"] else (2, 1, 4)
    shared = {"model": CONDITIONAL, "image_size": 28, "n": n, "cfg_scale": CFG_SCALE}
    works = {
        "plain": (plain_sampling, shared | {"timesteps": measured, "total": total}),
        "ours": (our_sampling, shared | {"steps": GUIDED_STEPS}),
    }
    seconds, _ = take_turns(works, effort)
    plain = [s * total / measured for s in seconds["plain"]]
    note = (
        f"plain: {total} steps of two passes, extrapolated from {measured} measured ones; "
        f"ours: {GUIDED_STEPS} steps of one pass, all measured"
    )
    return [table_row(name, f"sampling {n} guided images, 28x28", "s", plain, seconds["ours"], True, note)]


def compare_data(name, effort, folder, what, source, image_size, batch_size=128):
    if effort["quick"]:
        batch_size = 8
    source = source or str(folder / "photographs")
    settings = {"source": source, "image_size": image_size, "batch_size": batch_size}
    seconds, _ = take_turns({"plain": (plain_data, settings), "ours": (our_batches, settings)}, effort)
    return [table_row(name, what, "images/s", *([batch_size / s for s in seconds[side]] for side in ("plain", "ours")))]


# --- growth: ours alone ----------------------------------------------------------------------------------------------


def growth_row(name, what, unit, points):
    return {"name": name, "what": what, "unit": unit, "points": {str(x): spread(v) for x, v in points.items()}}


def measure_growth(name, effort, folder):
    """Seconds against batch size, image size, sampling steps and number of processes."""
    model = POINT_1 | ({"width": 8} if effort["quick"] else {})
    train = {"model": model, "source": "fashion_mnist", "image_size": 28, "batch_size": 32}
    sample = {"model": model, "image_size": 28, "n": 4 if effort["quick"] else 64}
    batches, sizes, steps = ((32, 64, 128, 256), (28, 56, 112), (5, 10, 20, 40))
    if effort["quick"]:
        batches, sizes, steps = (4, 8), (28, 56), (1, 2)
    by_batch, _ = take_turns({b: (our_training, train | {"batch_size": b}) for b in batches}, effort)
    by_size, _ = take_turns({s: (our_training, train | {"image_size": s}) for s in sizes}, effort)
    by_steps, _ = take_turns({s: (our_sampling, sample | {"steps": s}) for s in steps}, effort)
    by_processes = time_processes(folder, effort, train | {"batch_size": batches[-2]})
    step = "a training step of"
    return [
        growth_row("growth_batch", "a training step against the batch", "s", by_batch),
        growth_row("growth_size", f"{step} {train['batch_size']} images against their side", "s", by_size),
        growth_row("growth_steps", f"sampling {sample['n']} images against the steps", "s", by_steps),
        growth_row("growth_processes", f"{step} {batches[-2]} images against the processes", "s", by_processes),
    ]


def time_processes(folder, effort, settings):
    """Seconds per step under torchrun with 1 and with 2 processes, which share the same batch and the same cores."""
    turns = {1: [], 2: []} if pick_device().type != "cuda" or torch.cuda.device_count() > 1 else {1: []}
    for turn in range(min(3, effort["repeats"])):
        for processes, seconds in turns.items():
            out = folder / f"processes_{processes}_{turn}"
            call = f"import benchmark; benchmark.time_one_process({settings!r}, {str(out)!r}, {effort['steps']})"
            threads = max(1, torch.get_num_threads() // processes)
            result = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={processes}",
                    "--no-python",
                    sys.executable,
                    "-c",
                    call,
                ],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                text=True,
            )
            if result.returncode:
                reason = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise UserError(f"torchrun with {processes} processes failed: {reason}")
            seconds.append(json.loads((out / "seconds.json").read_text()))
    return turns


def time_one_process(settings, out, steps):
    """What torchrun starts: training as `training.Run.loop` does it, `steps` of them timed after two to warm up."""
    out = Path(out)
    with training.process_group() as (rank, world):
        run = our_run(**settings, folder=out, rank=rank, world=world)
        step = steps_of(run, torch.nn.parallel.DistributedDataParallel(run.model) if world > 1 else run.model)
        timed(step, 2)
        seconds = timed(step, steps)
        if rank == 0:
            (out / "seconds.json").write_text(json.dumps(seconds))


# --- quality: what needs training or thousands of samples ------------------------------------------------------------

QUALITY_RUNS = ROOT / "runs/benchmark"
SAMPLES, SHAPE_SAMPLES = 5000, 2000
GUIDED_SAMPLES = 1000  # a guided one of the plain way costs ten unguided ones at T = 200


def cached_samples(name, n, sample_batch, batch_size=500):
    """n samples (uint8), made in batches that are kept in runs/benchmark/NAME: an interrupted run goes on."""
    batches = []
    for first in range(0, n, batch_size):
        path = QUALITY_RUNS / name / f"{first:06d}.npz"
        if not path.exists():
            start = time.perf_counter()
            images = sample_batch(range(first, min(n, first + batch_size)))
            utils.save_samples(path, utils.to_uint8(images))
            say(f"{name}: {first + len(images)} of {n} samples, {time.perf_counter() - start:.0f} s for the last batch")
        batches.append(utils.load_samples(path)[0])
    return np.concatenate(batches)


def distance(images):
    result = evaluate.evaluate_samples(images, data_name="fashion_mnist")
    return {
        "frechet_distance": result["frechet_distance"],
        "interval_95": result["frechet_bootstrap"]["interval_95"],
        "samples": len(images),
    }


def labels_of(indices, net):
    """The classes in turn, as `sample` and `sweep` draw them."""
    return torch.tensor([i % net.num_classes for i in indices]) if net.num_classes else None


def sample_ours(name, path, n, weights=None, precision=None, **options):
    """n samples of a checkpoint by `Diffusion.sample`, cached under `name`."""
    device = pick_device()
    net, diffusion, config = load_checkpoint(path, weights, device)
    shape = image_shape(net, config)

    def sample_batch(indices):
        with autocast(device, precision):
            return diffusion.sample(
                net, len(indices), shape, labels=labels_of(indices, net), seed=indices[0], **options
            )

    return cached_samples(name, n, sample_batch)


def sample_plain(name, path, n, cfg_scale, first):
    """n samples of a checkpoint in the plain way, by the steps T - 1 to first + 1, cached under `name`."""
    device = pick_device()
    net, diffusion, config = load_checkpoint(path, device=device)
    plain = plain_network(config["model"])
    plain.load_state_dict(net.state_dict())
    plain = plain.to(device).eval()

    def sample_batch(indices):
        torch.manual_seed(indices[0])
        x = torch.randn(len(indices), *image_shape(net, config)).to(device)
        labels = labels_of(indices, net)
        labels = None if labels is None else labels.to(device)
        return plain_sample(
            plain, x, diffusion.betas, range(diffusion.timesteps - 1, first, -1), labels, cfg_scale
        ).cpu()

    return cached_samples(name, n, sample_batch)


def sample_checkpoint(kind, name, n, steps=None, cfg_scale=0.0, first=-1):
    """Frechet distance of n samples of checkpoints/NAME; "plain" takes the steps T-1 to first + 1, "ours" `steps`."""
    path = ROOT / f"checkpoints/{name}.safetensors"
    sha256 = evaluate.sha256(path)
    steps = steps or read_checkpoint(path)[1]["diffusion"]["timesteps"] - 1 - first
    cache = f"{name}_{kind}_{steps}_{cfg_scale:g}_{sha256[:8]}"
    if kind == "plain":
        images = sample_plain(cache, path, n, cfg_scale, first)
    else:
        images = sample_ours(cache, path, n, sampler="dpm", steps=steps, cfg_scale=cfg_scale)
    return {"checkpoint": path.name, "sha256": sha256, "cfg_scale": cfg_scale, "steps": steps} | distance(images)


def quality_row(name, what, plain, ours):
    row = table_row(name, what, "FD", [plain["frechet_distance"]], [ours["frechet_distance"]], True)
    note = f"plain: {plain['checkpoint']}, {plain['steps']} steps; ours: {ours['checkpoint']}, {ours['steps']} steps"
    return row | {"note": note, "details": {"plain": plain, "ours": ours}}


def have(*names):
    """True if all these checkpoints are there; otherwise says which are not."""
    missing = [name for name in names if not (ROOT / f"checkpoints/{name}.safetensors").exists()]
    if missing:
        say(f"left out: checkpoints/{missing[0]}.safetensors is not there")
    return not missing


def quality_sampling(name, effort, folder):
    """Is the fast sampler no worse than plain DDPM at T = 200? Against models of both schedules."""
    n, ours, rows = SAMPLES, None, []
    for plain_name in ("grid_linear_l2_T200", "grid_cosine_l2_T200"):
        if have("grid_cosine_l2", plain_name):
            ours = ours or sample_checkpoint("ours", "grid_cosine_l2", n, FAST_STEPS)
            plain = sample_checkpoint("plain", plain_name, n)
            what = f"Frechet distance of {n:,} samples, {plain['steps']} steps of {plain_name} against {FAST_STEPS} of ours"
            rows.append(quality_row(f"{name}_{plain_name}", what, plain, ours))
    return rows


def quality_samplers(name, effort, folder):
    """The samplers on a quickly trained network and on the best one."""
    return [
        compare_samplers(name, checkpoint) for checkpoint in ("grid_cosine_l2", "fashion_mnist") if have(checkpoint)
    ]


def compare_samplers(name, checkpoint):
    """Frechet distance of one network's samples against the number of steps, by sampler."""
    path, n, points = ROOT / f"checkpoints/{checkpoint}.safetensors", SHAPE_SAMPLES, {}
    sha256 = evaluate.sha256(path)
    for sampler, eta in (("ddpm", None), ("ddim", 0.0), ("dpm", 0.0), ("dpm", 1.0)):
        for steps in (5, 10, 20, 50, 100) if sampler == "ddpm" else (5, 10, 20, 50):
            cache = f"{checkpoint}_{sampler}_{eta}_{steps}_{sha256[:8]}"
            images = sample_ours(cache, path, n, sampler=sampler, steps=steps, eta=eta)
            kind = sampler if eta is None else f"{sampler}, eta = {eta:g}"
            points.setdefault(kind, {})[steps] = distance(images)
    return {
        "name": f"{name}_{checkpoint}",
        "what": f"Frechet distance of {n:,} samples against the steps",
        "checkpoint": path.name,
        "sha256": sha256,
        "samplers": points,
    }


def quality_guided(name, effort, folder):
    n, checkpoint = GUIDED_SAMPLES, "fashion_mnist_conditional_20_epochs"
    if not have(checkpoint):
        return []
    ours = sample_checkpoint("ours", checkpoint, n, GUIDED_STEPS, CFG_SCALE)
    plain = sample_checkpoint("plain", checkpoint, n, cfg_scale=CFG_SCALE, first=0)
    return [quality_row(name, f"Frechet distance of {n:,} guided samples", plain, ours)]


def train_and_measure(name, config, data, kind):
    """Train (or go on training) runs/benchmark/NAME; Frechet distance of its samples in 20 dpm steps."""
    steps = config["train"]["steps"]
    result = QUALITY_RUNS / name / f"quality_{steps}.json"
    if result.exists():
        return json.loads(result.read_text())
    path = training.train(copy.deepcopy(config), data, QUALITY_RUNS / name, resume=True)
    images = sample_ours(
        f"{name}/samples_{steps}", path, SHAPE_SAMPLES, kind, config["train"]["precision"], sampler="dpm", steps=20
    )
    write_json(result, distance(images))
    return json.loads(result.read_text())


def quality_minutes(name, effort, folder):
    """Minutes of training to the distance that the ConvNeXt baseline reaches in 5 epochs at T = 1000.

    Minutes are steps x the seconds that a step takes in turns on this machine, since a training that takes hours does
    not have the machine to itself. The baseline's weights are trained by our loop in float32, whose steps equal the
    plain ones (tests/test_benchmark.py) and cost less; it is charged for the plain ones.
    """
    data = load_data("fashion_mnist")
    if len(data) < 60_000:
        raise UserError(f"{name} trains on all 60,000 images: run `python download_datasets.py fashion_mnist` first")
    batch_size, every = 128, 200
    baseline = our_config(CONVNEXT, 28, batch_size)
    baseline["train"] |= {"steps": 5 * len(data) // batch_size, "precision": "float32"}
    target = train_and_measure("convnext", baseline, data, "raw")
    say(f"the baseline's Frechet distance: {target['frechet_distance']:.2f}")

    config = our_config(DEFAULT, 28, batch_size)
    config["diffusion"]["schedule"] = "cosine"
    config["train"] |= {"loss": "l2", "ema_start": every}
    for steps in range(every, 100 * every, every):
        config["train"]["steps"] = steps
        reached = train_and_measure("ours", config, data, "ema")
        say(f"ours after {steps} steps: {reached['frechet_distance']:.2f}")
        if reached["frechet_distance"] <= target["frechet_distance"]:
            break
    else:
        raise UserError(f"{name}: {steps} steps do not reach the baseline's Frechet distance")
    settings = {"source": "fashion_mnist", "image_size": 28, "batch_size": batch_size}
    works = {
        "plain": (plain_training, settings | {"model": CONVNEXT}),
        "ours": (our_training, settings | {"model": DEFAULT}),
    }
    seconds, _ = take_turns(works, effort, repeats=3)
    plain = [s * baseline["train"]["steps"] / 60 for s in seconds["plain"]]
    ours = [s * steps / 60 for s in seconds["ours"]]
    what = f"minutes of training to a Frechet distance of {target['frechet_distance']:.2f}"
    note = (
        f"plain: {baseline['train']['steps']} steps; ours: {steps} steps to {reached['frechet_distance']:.2f}; "
        "both sampled with 20 dpm steps"
    )
    details = {"plain": target | {"steps": baseline["train"]["steps"]}, "ours": reached | {"steps": steps}}
    return [table_row(name, what, "min", plain, ours, True, note) | {"details": details}]


def quality_shapes(name, effort, folder):
    """Networks of other shapes: their speed, taken in turns, and what they reach in equal minutes at that speed."""
    data, batch_size, seconds_path = load_data("fashion_mnist"), 128, QUALITY_RUNS / "shapes_seconds.json"
    settings = {"source": "fashion_mnist", "image_size": 28, "batch_size": batch_size}
    if not seconds_path.exists():
        works = {shape: (our_training, settings | {"model": POINT_1 | model}) for shape, model in SHAPES.items()}
        write_json(seconds_path, take_turns(works, effort, repeats=3)[0])
    seconds, shapes = json.loads(seconds_path.read_text()), []
    for i, (shape, model) in enumerate(SHAPES.items()):
        config = our_config(POINT_1 | model, 28, batch_size)
        config["diffusion"]["schedule"] = "cosine"
        step_seconds = statistics.median(seconds[shape])
        config["train"] |= {"loss": "l2", "steps": round(60 * SHAPE_MINUTES / step_seconds), "ema_start": 100}
        reached = train_and_measure(f"shape_{i}", config, data, "ema")
        parameters = sum(p.numel() for p in build_model(POINT_1 | model).parameters())
        shapes.append(
            {
                "shape": shape,
                "parameters": parameters,
                "images_per_second": batch_size / step_seconds,
                "steps": config["train"]["steps"],
                **reached,
            }
        )
    return [{"name": name, "what": f"Point 1's network: {SHAPE_MINUTES} minutes of each shape", "shapes": shapes}]


def tried(name, effort, folder):
    """Training steps of Point 1's network with one of our choices undone at a time."""
    settings = {"model": POINT_1, "source": "fashion_mnist", "image_size": 28, "batch_size": 128}
    without = (
        "channels_last",
        "norm's groups of 32 channels",
        "float32 in attention",
        "freed memory kept",
        "fused Adam",
        "fused EMA",
    )
    works = {"as it is": (our_training, settings)}
    works |= {f"without {c}": (our_training_without, settings | {"choice": c}) for c in without}
    works["with torch.compile"] = (our_training_without, settings | {"choice": "torch.compile"})
    seconds, _ = take_turns(works, effort)
    return [growth_row(name, "a training step of Point 1's network", "s", seconds)]


# --- the command -----------------------------------------------------------------------------------------------------

BENCHMARKS = {
    "train_28": functools.partial(
        compare_training, what="Point 1's U-Net", model=POINT_1, image_size=28, batch_size=128
    ),
    "train_default": functools.partial(
        compare_training, what="the default network", model=DEFAULT, image_size=28, batch_size=128, repeats=3
    ),
    "train_course_32": functools.partial(
        compare_training, what="the course's network", model=COURSE, image_size=32, batch_size=32, repeats=3
    ),
    "train_course_64": functools.partial(
        compare_training, what="the course's network", model=COURSE, image_size=64, batch_size=8, repeats=2
    ),
    "sample": compare_sampling,
    "guided": compare_guided,
    "data_fashion_mnist": functools.partial(
        compare_data, what="data: batches of Fashion-MNIST", source="fashion_mnist", image_size=28
    ),
    "data_crops": functools.partial(
        compare_data, what="data: random crops of 100x100 JPEGs to 64x64", source=None, image_size=64
    ),
    "growth": measure_growth,
}
QUALITY = {
    "tried": tried,
    "shapes": quality_shapes,
    "samplers": quality_samplers,
    "quality_sample": quality_sampling,
    "quality_guided": quality_guided,
    "quality_minutes": quality_minutes,
}
TIMELESS = ("samplers", "quality_sample", "quality_guided")  # distances only, which no machine changes
EFFORT = {"quick": False, "repeats": 5, "seconds": 2.0, "matrix": 2048, "steps": 10}
QUICK = {"quick": True, "repeats": 2, "seconds": 0.0, "matrix": 64, "steps": 1}


def machine_facts():
    device, cpu = pick_device(), platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "device": str(device),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "precision": pick_precision(device),
        "bfloat16": pick_precision(device) == "bfloat16",
    }


def format_value(value, unit):
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def print_row(row):
    if "points" in row:
        points = ", ".join(f"{x}: {format_value(p['median'], row['unit'])}" for x, p in row["points"].items())
        print(f"{row['what']}: {points}")
        return
    if "samplers" in row:
        print(f"{row['what']}:")
        for sampler, points in row["samplers"].items():
            print(
                f"    {sampler:<40} "
                + ", ".join(f"{steps}: {p['frechet_distance']:.2f}" for steps, p in points.items())
            )
        return
    if "shapes" in row:
        print(f"{row['what']}:")
        for shape in row["shapes"]:
            print(
                f"    {shape['shape']:<40} {shape['parameters']:>10,} parameters {shape['images_per_second']:>6.0f} images/s"
                f" {shape['steps']:>6} steps, Frechet distance {shape['frechet_distance']:.2f}"
            )
        return
    plain, ours = (format_value(row[side]["median"], row["unit"]) for side in ("plain", "ours"))
    gain, turns = row["gain"], row["turns"]
    between = f"({gain['min']:.2f} - {gain['max']:.2f})" if turns > 1 else ""
    print(f"{row['what']:<58} {plain:>18} {ours:>18} {gain['median']:>8.2f}x {between}")
    if "note" in row:
        print(f"    {row['note']}")


def belongs(row, names):
    """True if a row of this name comes from one of the named benchmarks."""
    return any(row == name or row.startswith(f"{name}_") for name in names)


def earlier_rows(path, machine, names):
    """The machine and the rows (by their names) of an earlier result, to which the named benchmarks are about to add.

    Times of another machine, or of another PyTorch, are dropped; where no time is added, all stays as it is.
    """
    try:
        before = json.loads(path.read_text())
        if set(names) <= set(TIMELESS):
            machine = before["machine"]
        kept = {
            row["name"]: row for row in before["rows"] if before["machine"] == machine or belongs(row["name"], TIMELESS)
        }
        if dropped := [row["name"] for row in before["rows"] if row["name"] not in kept]:
            differs = ", ".join(key for key in machine if machine[key] != before["machine"].get(key))
            say(
                f"{path} was measured with other {differs}: its rows {', '.join(dropped)} will go "
                "(another --json-out keeps them)"
            )
        return machine, kept
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of this benchmark: delete it, or use another --json-out") from error


def in_order(rows):
    """Rows in the order of the benchmarks that they come from, whenever they were measured."""
    names = list(BENCHMARKS | QUALITY)
    return sorted(rows, key=lambda row: next((i for i, name in enumerate(names) if belongs(row["name"], [name])), -1))


def command_for(rows):
    """The command that measures rows of these names."""
    names = [name for name in BENCHMARKS | QUALITY if any(belongs(row, [name]) for row in rows)]
    return "python benchmark.py" + ("" if names == list(BENCHMARKS) else f" --only {' '.join(names)}")


def main(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quality", action="store_true", help="also what needs training or thousands of samples")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(BENCHMARKS | QUALITY)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument(
        "--json-out", type=Path, help="where to write (default: report/results/benchmark.json, or nowhere with --quick)"
    )
    args = parser.parse_args(argv)
    if unknown := [name for name in args.only or [] if name not in BENCHMARKS | QUALITY]:
        raise UserError(f"nothing is called {unknown[0]!r}: choose from {', '.join(BENCHMARKS | QUALITY)}")
    out = args.json_out or (None if args.quick else ROOT / "report/results/benchmark.json")
    if out:
        check_writable(out)

    machine, load = machine_facts(), os.getloadavg()[0]
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['instructions']}, "
        f"torch {machine['torch']}, bfloat16 {'yes' if machine['bfloat16'] else 'no'}"
    )
    if load > 0.5:
        say(f"other processes keep {load:.1f} cores busy: on a busy machine these numbers mean little")
    print(f"{'median of the turns':<58} {'plain':>18} {'ours':>18} {'gain':>9} (min - max)")
    effort, names = QUICK if args.quick else EFFORT, args.only or [*BENCHMARKS, *(QUALITY if args.quality else [])]
    recorded, rows = earlier_rows(out, machine, names) if out and out.exists() else (machine, {})
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder) / "photographs", 20 if args.quick else 1000)
        for name in names:
            for row in (BENCHMARKS | QUALITY)[name](name, effort, Path(folder)):
                print_row(row)
                rows[row["name"]] = row | {"load_before": load}
            if out:
                write_json(out, {"command": command_for(rows), "machine": recorded, "rows": in_order(rows.values())})
    if out:
        print(f"wrote {out}")


if __name__ == "__main__":
    utils.command_line(main)
