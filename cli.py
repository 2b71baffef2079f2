"""The command line that ddpm_unconditional.py, ddpm.py and ddpm_conditional.py share: train, sample, publish."""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

import training
import utils
import weights
from ddpm import LOSSES, OBJECTIVES, SAMPLERS, SCHEDULES, noise_level
from ddpm_conditional import predictor
from image_data import DATASETS, decode_image, describe, describe_folder, load_data, save_samples, with_channels
from modules import BLOCKS
from utils import UserError, natural, number, positive, say
from weights import find_checkpoint

SHAPE_FLAGS = ["width", "mults", "depth", "patch", "block", "attention"]  # PatchUNet's
EPOCHS, BATCH_SIZE = 5, training.DEFAULTS["batch_size"]
STRENGTH = 0.6  # of --start-from
# One's own images may be few, so the default length is a number of steps: six minutes of two cores at 64 x 64.
# OWN_SHAPE is for sides of 48 or more that 16 divides.
OWN_STEPS, OWN_BATCH_SIZE = 2000, 32
OWN_SHAPE = {"patch": 2, "width": 24, "mults": [1, 2, 4, 8], "attention": False}


def make_parser(description, data, shape, conditional=False):
    """The parser and its subcommands; `train` by default trains a PatchUNet of the given shape on `data`."""
    parser = utils.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a model")
    add_train_flags(train, conditional, shape)
    train.add_argument("--out", type=Path, required=True, help="the run's folder, such as runs/NAME")
    train.set_defaults(run=run_train, data=data)

    sample = commands.add_parser("sample", help="sample a trained model")
    add_sample_flags(sample, conditional)
    sample.set_defaults(run=run_sample)

    publish = commands.add_parser("publish", help="make a small checkpoint of a run")
    publish.add_argument("--run", type=find_checkpoint, required=True, dest="checkpoint", help="a run's folder")
    publish.add_argument("--weights", nargs="+", default=["ema"], help="raw, ema, or ema_BETA")
    publish.add_argument("--out", type=Path, required=True, help="the checkpoint to write, half precision")
    publish.set_defaults(run=run_publish)
    return parser, commands


def add_train_flags(parser, conditional, shape):
    add = parser.add_argument
    own = ", ".join(f"{name} {value}" for name, value in shape.items()) or "of its own shape"
    parser.set_defaults(conditional=conditional, shape=shape)
    flags = ["loss", "timestep_sampling", "lr", "cooldown", "optimizer", "seed"]
    flags += ["p_uncond", "label_dropout"] if conditional else []
    parser.set_defaults(**{flag: training.DEFAULTS[flag] for flag in flags})
    add("--data", default="fashion_mnist", help=f"{', '.join(DATASETS)}, or a folder of images")
    add("--image-size", type=number(int, 1, 4096), help="side of the training images (default: the data's own)")
    add("--channels", type=int, choices=[1, 3], help="grey or RGB (default: the data's own)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random horizontal flips (default: as suits the data)")
    add("--schedule", choices=list(SCHEDULES), help="the beta schedule (default: linear, or that of --init)")
    add("--timesteps", type=positive, metavar="T", help="steps of the process (default: 1000, or those of --init)")
    add("--loss", choices=list(LOSSES), help="between true and predicted noise")
    add("--objective", choices=list(OBJECTIVES), help="default: simple or --init's; vlb: the bound's weights (l2 only)")
    sampling = "how t is drawn; vlb: in proportion to the bound's weights"
    add("--timestep-sampling", choices=list(training.TIMESTEP_SAMPLING), help=sampling)
    length = parser.add_mutually_exclusive_group()
    passes = f"passes over the data (default: {EPOCHS}, of your own images enough for {OWN_STEPS} steps)"
    length.add_argument("--epochs", type=number(float, 0, 1e5, above=True), help=passes)
    length.add_argument("--minutes", type=number(float, 0, 1e6, above=True), help="train this long instead of --epochs")
    batch = f"images per step, over all processes (default: {BATCH_SIZE}, of your own {OWN_BATCH_SIZE})"
    add("--batch-size", type=number(int, 1, 10**6), help=batch)
    add("--lr", type=number(float, 0, above=True), help="learning rate")
    add("--cooldown", type=number(float, 0, 1), metavar="F", help="lower it to 0 over this last share")
    add("--optimizer", choices=list(training.OPTIMIZERS), help="optimizer")
    add("--seed", type=natural, help="of the weights and of every random draw")
    add("--model", choices=["patch", "course"], default="patch", help=f"this project's ({own}), or the course's")
    add("--width", type=number(int, 1, 4096), help="feature maps at the first level")
    add("--mults", type=number(int, 1, 64), nargs="+", help="width of each level, in multiples of --width (patch)")
    add("--depth", type=number(int, 1, 64), nargs="+", help="blocks per level, one number or one each (patch)")
    add("--patch", type=number(int, 1, 64), help="side of the pixel blocks that the network works on (patch)")
    add("--block", choices=list(BLOCKS), help="kind of block (patch)")
    add("--attention", action=argparse.BooleanOptionalAction, help="linear attention at the outer levels (patch)")
    beta = number(float, 0, 0.999999)
    add("--ema-beta", dest="ema_betas", type=beta, nargs="+", default=[0.995], help="one or more averages to keep")
    add("--ema-start", type=natural, help="the average is a plain copy until this step (default: 500; --init: 0)")
    if conditional:
        add("--p-uncond", type=number(float, 0, 1), help="how often the label is dropped")
        add("--label-dropout", choices=["example", "batch"], help="one coin per image, or per batch")
    add("--precision", choices=list(utils.PRECISIONS), help="default: the fastest the device really has")
    add("--compile", dest="compiled", action="store_true", help="torch.compile the network")
    add("--accumulate", type=positive, default=1, help="passes per optimizer step: same batch, less memory")
    add("--sample-every", type=natural, default=500, help="steps between sample grids; 0: none")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--resume", action="store_true", help="go on with an interrupted run; starts one where there is none")
    init = "start from its weights, averages, network and process"
    add("--init", type=find_checkpoint, metavar="CHECKPOINT", help=init)


def add_sample_flags(parser, conditional):
    add = parser.add_argument
    checkpoint = "a .safetensors, a run's folder or state, the course's .pt"
    add("--checkpoint", type=find_checkpoint, required=True, help=checkpoint)
    add("--n", type=number(int, 1, 10**7), default=64, help="how many images, in all")
    add("--image-size", type=number(int, 1, 4096), help="side of the images (default: as trained; the course's: 64)")
    add("--sampler", choices=list(SAMPLERS), default="ddim", help="ddpm: ancestral; ddim; dpm: second order")
    steps = ", ".join(f"{name} {sampler.steps or 'all T'}" for name, sampler in SAMPLERS.items())
    add("--steps", type=positive, help=f"network evaluations per image (default: {steps})")
    etas = ", ".join(f"{name} {row.eta:g}" for name, row in SAMPLERS.items() if row.eta is not None)
    add("--eta", type=number(float, 0, 1), help=f"noise: 0 none, 1 as much as DDPM (default: {etas})")
    add("--variance", choices=["posterior", "beta"], help="DDPM's noise (default: posterior)")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="keep the predicted x0 within [-1, 1]")
    add("--ema", action=argparse.BooleanOptionalAction, help="averaged or raw weights (default: averaged if there are)")
    if conditional:
        add("--labels", default="all", help="all, none, or classes by name or number, such as cat,dog or 0,1, in turn")
        add("--cfg-scale", type=number(float, 0), default=0.0, help="guidance: 0 (or 1) none")
        add("--cfg-interval", type=natural, nargs=2, metavar=("LOW", "HIGH"), help="guide where LOW <= t <= HIGH only")
    add("--start-from", type=Path, metavar="IMAGE", help="begin with this image, noised, instead of with noise alone")
    strength = f"how far it is noised; 1: to t = T-1 (default: {STRENGTH})"
    add("--strength", type=number(float, 0, 1, above=True), help=strength)
    add("--batch-size", type=positive, default=250, help="images denoised at once (a .gif: all)")
    add("--seed", type=natural, default=0, help="image i depends on (seed, i) only")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, required=True, help="what to write: .png (grid), .gif (denoising) or .npz (all samples)")


# --- train -----------------------------------------------------------------------------------------------------------


def make_model(args, data, start):
    """The network's configuration: that of `start`, or the script's own, but for the flags that are given."""
    given = {flag: value for flag in SHAPE_FLAGS if (value := getattr(args, flag)) is not None}
    if len(given.get("depth", [])) == 1:
        given["depth"] = given["depth"][0]
    if args.model == "course":
        base = {"name": "UNet"}
    elif start:
        base = dict(start["model"])
    else:
        large = args.data not in DATASETS and data.image_size >= 48 and data.image_size % 16 == 0
        base = {"name": "PatchUNet"} | (OWN_SHAPE if large else args.shape)
    if base["name"] != "PatchUNet":
        base["name"] = "UNet_conditional" if args.conditional else "UNet"
    base.pop("num_classes", None)
    classes = {"num_classes": len(data.classes)} if args.conditional else {}
    return base | given | classes | {"channels": data.images.shape[1]}


def make_config(args, data):
    """The run's configuration, from the flags and the data; with --init, the checkpoint's network and process."""
    start = weights.read_checkpoint(args.init)[1] if args.init else None
    diffusion = {"timesteps": 1000, "schedule": "linear", "objective": "simple"} | (start["diffusion"] if start else {})
    diffusion |= {name: value for name in diffusion if (value := getattr(args, name, None)) is not None}
    if diffusion["objective"] == "vlb" and (args.loss, args.timestep_sampling) != ("l2", "uniform"):
        raise UserError("--objective vlb goes with --loss l2 and --timestep-sampling uniform only")
    own = args.data not in DATASETS
    batch_size = args.batch_size or (OWN_BATCH_SIZE if own else BATCH_SIZE)
    least = OWN_STEPS if own and not args.epochs else 1
    steps = max(least, round((args.epochs or EPOCHS) * len(data) / batch_size))
    # what the run remembers of it, with the number of images that it had seen
    init = weights.describe_checkpoint(args.init) | {"images": weights.images_seen(start["train"])} if start else None
    return {
        "model": make_model(args, data, start),
        "diffusion": diffusion,
        "data": {
            **{name: getattr(data, name) for name in ("name", "image_size", "flip", "classes")},
            "images": len(data),
            "folder": describe_folder(args.data),
        },
        "train": {
            **{name: getattr(args, name, None) for name in training.DEFAULTS},
            "steps": None if args.minutes else steps,
            "batch_size": batch_size,
            "ema_start": (0 if start else training.DEFAULTS["ema_start"]) if args.ema_start is None else args.ema_start,
            "init": init,
        },
    }


def say_what_to_expect(args, data, config):
    """What was read, how long the run is where nobody said, and whether its process ends in noise."""
    try:
        test = load_data(args.data, "test", args.image_size, args.channels, labels=args.conditional)
    except UserError:  # too few images to hold some out
        test = None
    say(describe(data, test, labels=args.conditional))
    steps, batch_size = config["train"]["steps"], config["train"]["batch_size"]
    own = args.data not in DATASETS
    if own and not (args.epochs or args.minutes):
        length = f"{steps:,} steps of {batch_size} images, {steps * batch_size / len(data):,.0f} passes over yours"
        say(f"{length}: fewer show little (--epochs or --minutes decide otherwise)")
    if own and args.model == "patch" and not args.init and data.images.shape[1] == 3 and data.image_size % 8 == 0:
        shipped = "cifar10_conditional" if args.conditional and data.image_size < 48 else "landscapes"
        say(f"a network that knows other photographs learns yours sooner: --init checkpoints/{shipped}.safetensors")
    diffusion = weights.build_diffusion(config["diffusion"])  # refuses what is out of range
    if (left := diffusion.alphas_cumprod[-1].item()) > 0.01:
        process = f"at T = {diffusion.timesteps} the {diffusion.schedule} schedule"
        remedy = "samples start from pure noise: take --schedule cosine, or more --timesteps"
        say(f"{process} leaves {left:.1%} of the image's variance, but {remedy}")


def run_train(args):
    data = load_data(args.data, "train", args.image_size, args.channels, labels=args.conditional)
    if args.flip is not None:
        data.flip = args.flip
    config = make_config(args, data)
    if utils.is_main():
        say_what_to_expect(args, data, config)
    options = ("resume", "device", "minutes", "sample_every", "init", "accumulate", "compiled")
    path = training.train(config, data, args.out, **{name: getattr(args, name) for name in options})
    if utils.is_main():
        print(f"wrote {path}")


# --- sample ----------------------------------------------------------------------------------------------------------


def parse_labels(text, n, num_classes, classes):
    """n labels for --labels: the classes asked for in turn, so that image i's label does not depend on n."""
    if text == "none" or not num_classes:
        if text not in ("none", "all"):
            raise UserError("this checkpoint has no classes: leave --labels out")
        return None
    numbers = {str(i): i for i in range(num_classes)}
    names = dict(zip(classes or numbers, range(num_classes)))
    known = numbers | {name.casefold(): i for name, i in names.items()} | names
    words = [text] if text in names else [word.strip() for word in text.split(",")]  # a name may have commas
    chosen = list(numbers.values()) if text == "all" else [known.get(w, known.get(w.casefold())) for w in words]
    for word, label in zip(words, chosen):
        if label is None:
            wanted = f"all, none, or some of the classes {', '.join(names)}, by name or number (0 to {num_classes - 1})"
            raise UserError(f"--labels is {wanted}, not {word!r}")
        if label != numbers.get(word, label):
            say(f"--labels {word} is the class called {word}, which is number {label}")
    return torch.tensor([chosen[i % len(chosen)] for i in range(n)])


def run_sample(args):
    suffix, sampler = args.out.suffix, SAMPLERS[args.sampler]
    if suffix not in (".png", ".gif", ".npz"):
        raise UserError(f"--out must end in .png, .gif or .npz, not {args.out.name!r}")
    useless, useful = ("eta", "variance") if sampler.eta is None else ("variance", "eta")
    if getattr(args, useless) is not None:
        raise UserError(f"--{useless} has no effect on --sampler {args.sampler}, whose noise is --{useful}")
    if args.strength and not args.start_from:
        raise UserError("--strength goes with --start-from IMAGE")
    utils.check_writable(args.out)
    device, strength = utils.pick_device(args.device), args.strength or STRENGTH
    kind = {None: None, True: "ema", False: "raw"}[args.ema]
    model, diffusion, config = weights.load_checkpoint(args.checkpoint, kind, device, args.image_size)
    shape, x_T = weights.image_shape(model, config), None
    if args.start_from:
        diffusion, x_T = begin_at(args.start_from, strength, diffusion, args.n, shape, args.seed)
    labels, guidance = choose_guidance(args, model, config)
    options = {name: getattr(args, name) for name in ("seed", "sampler", "clip")}
    options |= {"steps": diffusion.step_count(args.sampler, args.steps), "eta": noise_level(args.sampler, args.eta)}
    options["variance"] = args.variance or ("posterior" if sampler.eta is None else None)
    source = {
        **options,
        **weights.describe_checkpoint(args.checkpoint),
        "weights": config["weights"],
        "start_from": args.start_from and [args.start_from.name, strength],
        "dtype": utils.pick_precision(device),
        **guidance,
    }
    columns = math.ceil(args.n**0.5)
    eps_models = predictor(model, labels, **guidance)
    with utils.autocast(device):
        if suffix == ".gif":
            x_ts = diffusion.trajectory(eps_models(slice(None)), shape, range(args.n), x_T=x_T, **options)
            count = options["steps"] + 1  # with the noise that it starts from
            bar = utils.progress(x_ts, total=count, unit="step", desc="sampling")
            save_denoising_gif((utils.to_uint8(x).cpu() for x in bar), count, args.out, columns)
        else:
            options |= {"batch_size": args.batch_size, "x_T": x_T}
            batches = diffusion.sample_batches(eps_models, args.n, shape, desc="sampling", **options)
            images = torch.cat([utils.to_uint8(x) for x in batches])
            if suffix == ".png":
                utils.save_grid(images, args.out, columns)
            else:
                save_samples(args.out, images, labels, source)
    print(f"wrote {args.out}")


def choose_guidance(args, model, config):
    """The labels, and the options of `guided`, that the flags ask for. Raises UserError."""
    labels = parse_labels(getattr(args, "labels", "all"), args.n, model.num_classes, config["data"].get("classes"))
    scale, interval = getattr(args, "cfg_scale", 0.0), getattr(args, "cfg_interval", None)
    if labels is None and scale not in (0, 1):
        raise UserError("--cfg-scale needs labels: leave --labels none out, or take a checkpoint that has classes")
    if interval and (scale in (0, 1) or interval[0] > min(interval[1], config["diffusion"]["timesteps"] - 1)):
        raise UserError("--cfg-interval LOW HIGH goes with a --cfg-scale above 1; LOW is at most HIGH and below T")
    if scale not in (0, 1) and config["train"].get("p_uncond") == 0:
        say("guidance compares with the prediction without a label, which this network never learnt (--p-uncond 0)")
    return labels, {"cfg_scale": scale, "cfg_interval": interval}


def begin_at(path, strength, diffusion, n, shape, seed):
    """The process up to t = strength T - 1 only, and an image noised to there, n times (SDEdit, arXiv 2108.01073)."""
    image = decode_image(path, shape[-1])
    if isinstance(image, str):
        raise UserError(f"--start-from {path} is no readable image: {image}")
    images = with_channels(torch.from_numpy(image.copy()).permute(2, 0, 1)[None], shape[0])
    x0 = utils.to_model(images).to(diffusion.betas.device).expand(n, *shape)
    noise = torch.stack([torch.randn(shape, generator=utils.generator(seed, i, 1)) for i in range(n)]).to(x0.device)
    first = diffusion.shortened(max(1, round(strength * diffusion.timesteps)))
    return first, first.q_sample(x0, torch.full((n,), first.timesteps - 1, device=x0.device), noise)


# Homework TODO 876: a GIF of the denoising
def save_denoising_gif(frames, count, path, columns, scale=2, longest=60):
    """A GIF of at most `longest` of the `count` x_t that `frames` yields, evenly spaced; the sample stays for a second.

    frames: uint8 N x C x H x W each; the others are never kept, since all of them may be gigabytes.
    """
    shown = np.linspace(0, count - 1, min(longest, count)).round()
    pictures = [utils.image_grid(x, columns, scale=scale) for i, x in enumerate(frames) if i in shown]
    utils.save_gif(pictures, path)


# --- publish ---------------------------------------------------------------------------------------------------------


def run_publish(args):
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, not {args.out.name!r}")
    tensors, config = weights.read_checkpoint(args.checkpoint)
    states = {kind: weights.select_weights(tensors, kind, config, args.checkpoint)[1] for kind in args.weights}
    weights.save_checkpoint(args.out, states, config, tensors.get("losses"), half=True)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
