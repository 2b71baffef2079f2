"""Point 1: an unconditional DDPM on Fashion-MNIST, and the grid of 4 beta schedules x 3 losses.

python ddpm_unconditional.py train --schedule cosine --loss huber --epochs 5 --out runs/cosine_huber
python ddpm_unconditional.py grid --out runs/grid
python ddpm_unconditional.py sample --checkpoint runs/cosine_huber/model.safetensors --out samples.png
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

import cli
import evaluate
import utils
from ddpm import LOSSES, SCHEDULES
from features import check_shape, load_features, load_splits
from image_data import load_data
from utils import UserError, say
from weights import image_shape, load_checkpoint, read_checkpoint, save_checkpoint, select_weights

# The best of a dozen shapes after two minutes of training each.
SHAPE = {"patch": 1, "width": 16, "mults": [1, 4, 4], "attention": False}

# Every experiment is named after the flags in which it differs from `grid`'s defaults.
GRID = {f"{schedule}_{loss}": {"schedule": schedule, "loss": loss} for loss in LOSSES for schedule in SCHEDULES}
# How large are differences that mean nothing? The same experiments with other seeds.
SEEDS = {f"{name}_seed{seed}": cell | {"seed": seed} for seed in (1, 2) for name, cell in GRID.items()}
CHANGES: dict = {"T200": {"timesteps": 200}, "flip": {"flip": True}, "9_epochs": {"epochs": 9.0}}
ABLATIONS = {
    f"{name}_{change}": GRID[name] | CHANGES[change] for change in CHANGES for name in ("linear_l2", "cosine_l2")
}
# The bonus: the true bound's weights, in the loss or in how often each t is drawn. They are compared with linear_l2
# of the same seed, which has no weights.
WEIGHTS: dict = {"vlb": {"objective": "vlb"}, "vlb_sampled": {"timestep_sampling": "vlb"}}
BONUS = {
    f"{name}_seed{seed}": GRID["linear_l2"] | {"seed": seed} | WEIGHTS[name] for name in WEIGHTS for seed in (0, 1, 2)
}
# Do they only need a longer training, or another learning rate?
LONGER = {
    f"{name}_20_epochs_seed{seed}": GRID["linear_l2"] | WEIGHTS.get(name, {}) | {"epochs": 20.0, "seed": seed}
    for name in ("linear_l2", *WEIGHTS)
    for seed in (0, 1, 2)
}
RATES = {
    f"{name}_lr_{lr}": GRID["linear_l2"] | WEIGHTS.get(name, {}) | {"lr": lr}
    for name in ("linear_l2", *WEIGHTS)
    for lr in (0.0003, 0.003)
}
EXPERIMENTS = GRID | SEEDS | ABLATIONS | BONUS | LONGER | RATES
# The weights of these are submitted: pictures are drawn with them. Of the others there are numbers only.
SHIPPED = [*GRID, *ABLATIONS, *(f"{name}_seed0" for name in WEIGHTS)]
# One sampler measures them all. Ancestral steps correct a short-trained network's errors, which DDIM's keep.
SAMPLER = {"sampler": "ddpm", "steps": 100, "seed": 0}


def run_grid(args):
    """Train, measure and publish the experiments one by one; what was interrupted or is longer now goes on."""
    names = args.only or list(GRID)
    check_free(args, names)
    check_measurable(args, names)
    for i, name in enumerate(names):
        folder = args.out / name
        say(f"{name} ({i + 1} of {len(names)})")
        cli.run_train(argparse.Namespace(**vars(args) | EXPERIMENTS[name] | {"out": folder}))
        if utils.is_main() and not is_measured(folder, args.n):
            measure(name, folder, args.data, args.n, args.device)
    if utils.is_main():
        finished = [args.out / name / "result.json" for name in EXPERIMENTS]
        results = [json.loads(path.read_text()) for path in finished if path.exists()]
        utils.write_json(args.out / "grid.json", results)
        if args.publish:
            publish(args.out, results)
        print(f"wrote {args.out / 'grid.json'}: {len(results)} experiments")


def publish(out, results):
    """Copy the SHIPPED weights to checkpoints/, and all results to report/results/grid.json beside other machines'."""
    for result in results:
        if result["name"] not in SHIPPED:
            result["sha256_not_shipped"] = result.pop("sha256")
            continue
        with utils.atomic_path(utils.ROOT / f"checkpoints/grid_{result['name']}.safetensors") as temporary:
            shutil.copyfile(out / result["name"] / "ema.safetensors", temporary)
    path = utils.ROOT / "report/results/grid.json"
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    rows = {row["name"]: row for row in rows + results}
    runs = [rows[name] for name in EXPERIMENTS if name in rows]
    chosen: dict = {}
    for run in runs:
        chosen.setdefault(run["config"]["train"]["precision"], []).append(run["name"])
    grid = "python ddpm_unconditional.py grid --publish"
    commands = [f"{grid} --precision {precision} --only {' '.join(names)}" for precision, names in chosen.items()]
    utils.write_json(path, {"command": " && ".join(commands), "runs": runs})


def check_free(args, names):
    """Raise UserError for a flag that an experiment would override: what sets it apart from the others is its own."""
    for name in names:
        for flag, value in EXPERIMENTS[name].items():
            if getattr(args, flag) not in (value, args.defaults[flag]) or (flag == "epochs" and args.minutes):
                raise UserError(f"{name} has its own --{flag}, {value}: leave that out, or choose others with --only")


def check_measurable(args, names):
    """Raise UserError where `measure` would: better before the training than after it."""
    net, test = load_features(args.data), load_data(args.data, "test", args.image_size, args.channels)
    configs = [cli.make_config(argparse.Namespace(**vars(args) | EXPERIMENTS[name]), test) for name in names]
    if min(config["diffusion"]["timesteps"] for config in configs) < SAMPLER["steps"]:
        raise UserError(f"the experiments are sampled in {SAMPLER['steps']} steps: --timesteps must be at least that")
    check_shape(net, test.images[:1])
    evaluate.check_count(args.n, net.head.in_features)


def is_measured(folder, n):
    """Whether the run's result is of its weights as they are now, and of n samples."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {"config": None}
    return result["config"] == read_checkpoint(folder / "model.safetensors")[1] and result["sampler"]["n"] == n


def first_images(data, n):
    """The first n images; where they come class by class, as from class folders, n that are spread over all."""
    index = torch.arange(n)
    if data.labels is not None and (data.labels.diff() >= 0).all():
        index = index * len(data) // n
    return data.images[index % len(data)]


def measure(name, folder, data, n, device):
    """Publish a finished run as half-precision EMA weights, and measure exactly those: folder/result.json."""
    tensors, config = read_checkpoint(folder / "model.safetensors")
    path, losses = folder / "ema.safetensors", tensors["losses"]
    save_checkpoint(path, {"ema": select_weights(tensors, "ema", config)[1]}, config, losses, half=True)
    device = utils.pick_device(device)
    model, diffusion, _ = load_checkpoint(path, device=device)
    shape = image_shape(model, config)

    def sample_and_measure(picture, x_T=None):
        with utils.autocast(device):
            images = utils.to_uint8(diffusion.sample(model, n, shape, **SAMPLER, desc=f"sampling {name}", x_T=x_T))
        utils.save_grid(images[:64], folder / picture, columns=8)
        return evaluate.evaluate_samples(images, data_name=data)

    test = load_data(data, "test", shape[-1])
    test = utils.to_model(first_images(test, min(1000, len(test))))
    result = {
        "name": name,
        "sha256": evaluate.sha256(path),
        "config": config,
        "final_loss": losses[-200:].mean().item(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sampler": SAMPLER | {"n": n},
        "quality": sample_and_measure("samples.png"),
        "noise_error": evaluate.noise_error(model, diffusion, test),
        "likelihood": evaluate.variational_bound(model, diffusion, test),
    }
    if diffusion.alphas_cumprod[-1] > 0.01 and config["train"]["seed"] == 0:
        # The forward process stops short of noise: is the network to blame, or the N(0, I) that sampling starts from?
        x0 = utils.to_model(first_images(load_splits(data, shape[-1])[0], n)).to(device)
        noise = torch.randn(x0.shape, generator=utils.generator(0, 2)).to(device)
        x_T = diffusion.q_sample(x0, torch.full((n,), diffusion.timesteps - 1, device=device), noise)
        result["quality_from_true_x_T"] = sample_and_measure("samples_from_true_x_T.png", x_T)
    utils.write_json(folder / "result.json", result)


def main(argv=None):
    parser, commands = cli.make_parser(__doc__.splitlines()[0], "fashion_mnist", SHAPE)
    grid = commands.add_parser("grid", help="the experiments: 4 schedules x 3 losses, trained and measured")
    cli.add_train_flags(grid, conditional=False, shape=SHAPE)
    grid.add_argument("--out", type=Path, default=Path("runs/grid"), help="folder of the runs")
    names = list(EXPERIMENTS)
    grid.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {', '.join(names)}")
    grid.add_argument("--n", type=utils.positive, default=2000, help="samples to measure")
    grid.add_argument("--publish", action="store_true", help="also fill checkpoints/ and report/results/grid.json")
    # 3 epochs of 60,000 images; the average begins after the first
    grid.set_defaults(run=run_grid, epochs=3, cooldown=0.25, ema_start=469, sample_every=0, resume=True)
    grid.set_defaults(schedule=None, loss=None)
    flags = {flag for experiment in EXPERIMENTS.values() for flag in experiment}
    grid.set_defaults(defaults={flag: grid.get_default(flag) for flag in flags})
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    utils.command_line(main)
