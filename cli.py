"""The command line that ddpm_unconditional.py, ddpm.py and ddpm_conditional.py share: train, sample, publish."""

import argparse
import functools
import math
from pathlib import Path

import torch

import training
from ddpm import LOSSES, OBJECTIVES, SAMPLERS, SCHEDULES, noise_level
from ddpm_conditional import guided, predictor
from image_data import DATASETS, describe_folder, load_data
from modules import BLOCKS
from utils import (
    PRECISIONS,
    ArgumentParser,
    UserError,
    autocast,
    check_writable,
    image_grid,
    natural,
    number,
    pick_device,
    pick_precision,
    positive,
    progress,
    save_gif,
    save_grid,
    sha256,
    stream_samples,
    to_uint8,
)
from weights import image_shape, images_seen, load_checkpoint, read_checkpoint, save_checkpoint, select_weights

MODELS = {"patch": "PatchUNet", "course": "UNet"}
SHAPE_FLAGS = ["width", "mults", "depth", "patch", "block", "attention"]  # PatchUNet's


def make_parser(description, data, shape, conditional=False):
    """The parser and its subcommands; `train` by default trains a PatchUNet of the given shape on `data`."""
    parser = ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a model")
    add_train_flags(train, conditional, shape)
    train.add_argument("--out", type=Path, required=True, help="the run's folder, such as runs/NAME")
    train.set_defaults(run=run_train, data=data)

    sample = commands.add_parser("sample", help="sample a trained model")
    add_sample_flags(sample, conditional)
    sample.set_defaults(run=run_sample)

    publish = commands.add_parser("publish", help="make a small checkpoint of a finished run")
    publish.add_argument("--run", type=Path, required=True, dest="folder", help="a finished run's folder")
    publish.add_argument("--weights", nargs="+", default=["ema"], help="raw, ema, or ema_BETA")
    publish.add_argument("--out", type=Path, required=True, help="the checkpoint to write, half precision")
    publish.set_defaults(run=run_publish)
    return parser, commands


def to_flag(name, value):
    """As it would be typed: --mults 1 2 4, --no-attention."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def add_train_flags(parser, conditional, shape):
    add, network = parser.add_argument, "this project's network"
    if shape:
        network += f" (here with {' '.join(to_flag(name, value) for name, value in shape.items())})"
    parser.set_defaults(conditional=conditional, shape=shape)
    add("--data", default="fashion_mnist", help=f"{', '.join(DATASETS)}, or a folder of images")
    add("--image-size", type=number(int, 1, 4096), help="side of the training images (default: the data's own)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random horizontal flips (default: as suits the data)")
    add("--schedule", choices=SCHEDULES, default="linear", help="the beta schedule")
    add("--timesteps", type=positive, default=1000, metavar="T", help="steps of the diffusion process")
    add("--loss", choices=list(LOSSES), default="l2", help="between true and predicted noise")
    add("--objective", choices=OBJECTIVES, default="simple", help="vlb: the bound's true weights (l2 only)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=number(float, 0, 1e9, above=True), default=5, help="passes over the data")
    length.add_argument("--minutes", type=number(float, 0, 1e9, above=True), help="train this long instead of --epochs")
    add("--batch-size", type=number(int, 1, 10**6), default=128, help="images per step, over all processes")
    add("--lr", type=number(float, 0, above=True), default=1e-3, help="learning rate, constant")
    add("--optimizer", choices=list(training.OPTIMIZERS), default="adam", help="optimizer")
    add("--seed", type=natural, default=0, help="of the weights and of every random draw")
    add("--model", choices=list(MODELS), default="patch", help=f"patch: {network}; course: the course's")
    add("--width", type=number(int, 1, 4096), help="feature maps at the first level")
    add("--mults", type=number(int, 1, 64), nargs="+", help="width of each level, in multiples of --width (patch)")
    add("--depth", type=number(int, 1, 64), help="blocks per level (patch)")
    add("--patch", type=number(int, 1, 64), help="side of the pixel blocks that the network works on (patch)")
    add("--block", choices=list(BLOCKS), help="kind of block (patch)")
    add("--attention", action=argparse.BooleanOptionalAction, help="linear attention at the outer levels (patch)")
    add("--ema-beta", type=number(float, 0, 0.999999), nargs="+", default=[0.995], help="one or more averages to keep")
    add("--ema-start", type=number(int, 0), default=500, help="the average is a plain copy until this step")
    if conditional:
        add("--p-uncond", type=number(float, 0, 1), default=0.1, help="how often the label is dropped")
        add("--label-dropout", choices=["example", "batch"], default="example", help="one coin per image, or per batch")
    add("--precision", choices=list(PRECISIONS), help="default: the fastest the device really has")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--accumulate", type=positive, default=1, help="passes per optimizer step: same batch, less memory")
    add("--sample-every", type=number(int, 0), default=500, help="steps between sample grids; 0: none")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--resume", action="store_true", help="go on with an interrupted run; starts one where there is none")
    add(
        "--init",
        type=Path,
        metavar="CHECKPOINT",
        help="start from a published run's raw weights (use --ema-start 0 to keep its average)",
    )


def add_sample_flags(parser, conditional):
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help=".safetensors of this project or .pt of the course")
    add("--n", type=number(int, 1, 10**7), default=64, help="how many images, in all")
    add("--sampler", choices=SAMPLERS, default="ddim", help="ddpm: ancestral; ddim; dpm: second order")
    add("--steps", type=positive, help="network evaluations per image (default: ddpm all T, ddim 50, dpm 20)")
    add("--eta", type=number(float, 0, 1), help="noise: 0 none, 1 as much as DDPM (default: ddim 0, dpm 1)")
    add("--variance", choices=["posterior", "beta"], help="DDPM's noise (default: posterior)")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="keep the predicted x0 within [-1, 1]")
    add("--ema", action=argparse.BooleanOptionalAction, help="averaged or raw weights (default: averaged if there are)")
    if conditional:
        add("--labels", default="all", help="all, none, or class indices such as 0,1,2; --n is spread over them")
        add("--cfg-scale", type=number(float, 0), default=0.0, help="guidance: 0 (or 1) none")
    add("--batch-size", type=positive, default=250, help="images denoised at once (a .gif: all)")
    add("--seed", type=natural, default=0, help="image i depends on (seed, i) only")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, required=True, help="what to write: .png (grid), .gif (denoising) or .npz (all samples)")


# --- train -----------------------------------------------------------------------------------------------------------


def make_config(args, data):
    """The run's configuration, from the flags and the data; PatchUNet's shape is the script's but for the flags given."""
    channels = data.images.shape[1]
    given = {flag: value for flag in SHAPE_FLAGS if (value := getattr(args, flag)) is not None}
    if args.model == "course" and (useless := [flag for flag in given if flag != "width"]):
        raise UserError(f"--model course has a shape of its own: leave {to_flag(useless[0], given[useless[0]])} out")
    shape = (args.shape if args.model == "patch" else {}) | given
    model = {"name": MODELS[args.model], "channels": channels} | shape
    if args.conditional:
        if data.labels is None:
            raise UserError(f"{args.data} has no labels, which a conditional model needs: use class folders")
        model["num_classes"] = len(data.classes)
        if args.model == "course":
            model["name"] = "UNet_conditional"
    if args.objective == "vlb" and args.loss != "l2":
        raise UserError(f"--objective vlb is defined for --loss l2 only, not {args.loss}")
    steps = None if args.minutes else max(1, round(args.epochs * len(data) / args.batch_size))
    if steps and steps > training.MAX_STEPS:
        raise UserError(f"--epochs {args.epochs:g} would be {steps:,} steps: that is a mistake")
    return {
        "model": model,
        "diffusion": {"timesteps": args.timesteps, "schedule": args.schedule, "objective": args.objective},
        "data": {
            "name": data.name,
            "image_size": data.image_size,
            "flip": data.flip,
            "images": len(data),
            "classes": data.classes,
            "folder": describe_folder(args.data),
        },
        "train": {
            "loss": args.loss,
            "steps": steps,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "optimizer": args.optimizer,
            "seed": args.seed,
            "precision": args.precision,
            "ema_betas": args.ema_beta,
            "ema_start": args.ema_start,
            "p_uncond": getattr(args, "p_uncond", None),
            "label_dropout": getattr(args, "label_dropout", None),
            "init": describe_init(args.init) if args.init else None,
        },
    }


def describe_init(path):
    """What a run remembers of the checkpoint that it starts from; "images": how many that one had seen."""
    _, config = read_checkpoint(path)
    return {"checkpoint": path.name, "sha256": sha256(path), "images": images_seen(config["train"])}


def load_training(args):
    """The training data that the flags ask for, and the run's configuration."""
    data = load_data(args.data, "train", args.image_size)
    if args.flip is not None:
        data.flip = args.flip
    return data, make_config(args, data)


def run_train(args):
    data, config = load_training(args)
    path = training.train(
        config,
        data,
        args.out,
        args.resume,
        args.device,
        args.minutes,
        args.sample_every,
        args.compile,
        args.accumulate,
        args.init,
    )
    if training.is_main():
        print(f"wrote {path}")


# --- sample ----------------------------------------------------------------------------------------------------------


def parse_labels(text, n, num_classes):
    """n labels for --labels: the classes asked for in turn, so that image i's label does not depend on n."""
    if text == "none" or not num_classes:
        if text not in ("none", "all"):
            raise UserError("this checkpoint has no classes: leave --labels out")
        return None
    try:
        chosen = list(range(num_classes)) if text == "all" else [int(label) for label in text.split(",")]
    except ValueError:
        raise UserError(f"--labels is all, none, or class indices such as 0,1,2, not {text!r}") from None
    if wrong := [label for label in chosen if not 0 <= label < num_classes]:
        raise UserError(f"label {wrong[0]} is out of range: this checkpoint has the classes 0 to {num_classes - 1}")
    return torch.tensor([chosen[i % len(chosen)] for i in range(n)])


def run_sample(args):
    suffix = args.out.suffix
    if suffix not in (".png", ".gif", ".npz"):
        raise UserError(f"--out must end in .png, .gif or .npz, not {args.out.name!r}")
    if args.sampler == "ddpm" and args.eta is not None:
        raise UserError("--eta is for --sampler ddim or dpm: DDPM's noise is --variance posterior or beta")
    if args.sampler != "ddpm" and args.variance:
        raise UserError(f"--variance is for --sampler ddpm: {args.sampler}'s noise is --eta")
    variance = args.variance or "posterior"
    weights = {None: None, True: "ema", False: "raw"}[args.ema]
    check_writable(args.out)
    device = pick_device(args.device)
    model, diffusion, config = load_checkpoint(args.checkpoint, weights, device)
    if args.steps and args.steps > diffusion.timesteps:
        raise UserError(f"--steps {args.steps} is more than the model's {diffusion.timesteps} timesteps")
    labels = parse_labels(getattr(args, "labels", "all"), args.n, model.num_classes)
    cfg_scale = getattr(args, "cfg_scale", 0.0)
    if labels is None and cfg_scale not in (0, 1):
        raise UserError(
            f"--cfg-scale {cfg_scale:g} needs labels to guide towards: "
            f"{'leave --labels none out' if model.num_classes else 'this checkpoint has no classes'}"
        )
    shape = image_shape(model, config)
    options = {
        "seed": args.seed,
        "sampler": args.sampler,
        "steps": args.steps,
        "eta": args.eta,
        "variance": variance,
        "clip": args.clip,
    }
    source = {
        "checkpoint": args.checkpoint.name,
        "sha256": sha256(args.checkpoint),
        "weights": config["weights"],
        "seed": args.seed,
        "cfg_scale": cfg_scale,
        "sampler": args.sampler,
        "eta": noise_level(args.sampler, args.eta),
        "steps": diffusion.step_count(args.sampler, args.steps),
        "clip": args.clip,
        "variance": variance if args.sampler == "ddpm" else None,
        "dtype": pick_precision(device),
    }
    columns = math.ceil(args.n**0.5)
    with autocast(device):
        if suffix == ".gif":
            steps = diffusion.trajectory(guided(model, labels, cfg_scale), shape, range(args.n), **options)
            bar = progress(steps, total=source["steps"] + 1, unit="step", desc="sampling")
            shown = frames_shown(source["steps"] + 1)  # all of them would be gigabytes
            frames = [to_uint8(x).cpu() for i, x in enumerate(bar) if i in shown]
            save_denoising_gif(frames, args.out, columns)
        else:
            bar = functools.partial(progress, unit="step", desc="sampling")
            samples = diffusion.sample_batches(
                predictor(model, labels, cfg_scale), args.n, shape, batch_size=args.batch_size, progress=bar, **options
            )
            batches = map(to_uint8, samples)
            if suffix == ".png":
                save_grid(torch.cat(list(batches)), args.out, columns)
            else:
                stream_samples(args.out, batches, (args.n, *shape[1:], shape[0]), labels, source)
    print(f"wrote {args.out}")


def frames_shown(count, longest=60):
    """The indices of at most `longest` of `count` frames, evenly spaced from the first to the last."""
    shown = min(longest, count)
    return [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]


def save_denoising_gif(frames, path, columns, scale=2, longest=60):
    """A GIF of the denoising: at most `longest` of the x_t, evenly spaced, the sample held for a second at the end."""
    pictures = [image_grid(frames[i], columns, scale=scale) for i in frames_shown(len(frames), longest)]
    save_gif(pictures + 20 * pictures[-1:], path, fps=20)


# --- publish ---------------------------------------------------------------------------------------------------------


def run_publish(args):
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out must end in .safetensors, not {args.out.name!r}")
    source = args.folder / "model.safetensors"
    if not source.is_file():
        raise UserError(f"{args.folder} has no finished run: train it (or go on with --resume) first")
    tensors, config = read_checkpoint(source)
    weights = {}
    for kind in args.weights:
        weights[kind] = select_weights(tensors, kind, config, source)
    save_checkpoint(args.out, weights, config, tensors.get("losses"), half=True)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")
