"""Point 2: a conditional DDPM with classifier-free guidance and EMA.

    python ddpm_conditional.py train --data cifar10 --out runs/cifar10
    python ddpm_conditional.py sample --checkpoint runs/cifar10/model.safetensors --labels 0,1,2 --cfg-scale 3 --out x.png
    python ddpm_conditional.py sweep --checkpoint checkpoints/fashion_mnist_conditional.safetensors --out sweep.json

Training drops some labels (`training.draw_batch`), so that one network learns the conditional and the unconditional
prediction; sampling combines the two (`ddpm.guided`).
"""

import functools
import json
from pathlib import Path

import torch

import cli
import evaluate
from ddpm import SAMPLERS, noise_level
from features import check_shape, load_features
from utils import (
    UserError,
    autocast,
    check_writable,
    command_line,
    natural,
    number,
    pick_device,
    positive,
    progress,
    say,
    to_uint8,
    write_json,
)
from weights import image_shape, load_checkpoint

# What `train` trains unless told otherwise: the published CIFAR-10 model's.
SHAPE = {"patch": 1, "width": 24, "mults": [1, 4, 8], "attention": False}
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 7.5)


def earlier_rows(path, settings):
    """The rows that an earlier sweep with the same settings wrote to `path`; [] where there is none. Raises UserError."""
    if not path.exists():
        return []
    try:
        previous = json.loads(path.read_text())
        same, rows = all(previous[name] == value for name, value in settings.items()), previous["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of this command: use another --out") from error
    if not same:
        raise UserError(f"{path} was measured with other settings or weights: delete it, or use another --out")
    return rows


def sweep_command(args, rows):
    """The command that measures all rows, however many commands they came from."""
    weights, scales = (dict.fromkeys(row[key] for row in rows) for key in ("weights", "cfg_scale"))
    return " ".join(
        [
            f"python ddpm_conditional.py sweep --checkpoint {args.checkpoint}",
            *([f"--data {args.data}"] if args.data else []),
            f"--weights {' '.join(weights)} --scales {' '.join(f'{s:g}' for s in sorted(scales))}",
            f"--n {args.n} --sampler {args.sampler} --steps {args.steps} --seed {args.seed} --out {args.out}",
        ]
    )


def run_sweep(args):
    """Measure the samples of each kind of weights at each guidance scale; what --out already holds is not done again."""
    check_writable(args.out)
    device = pick_device(args.device)
    # all of them before the work: one that is not there is refused at once
    models = {weights: load_checkpoint(args.checkpoint, weights, device) for weights in args.weights}
    sha256 = evaluate.sha256(args.checkpoint)
    sampler = {"sampler": args.sampler, "steps": args.steps, "eta": noise_level(args.sampler)}
    settings = {
        "checkpoint": args.checkpoint.name,
        "sha256": sha256,
        "sampler": sampler,
        "n": args.n,
        "seed": args.seed,
        "data": args.data,
    }
    rows = earlier_rows(args.out, settings)
    for weights, (model, diffusion, config) in models.items():
        if model.num_classes is None:
            raise UserError(f"{args.checkpoint} has no classes, so there is nothing to guide")
        if args.steps > diffusion.timesteps:
            raise UserError(f"--steps {args.steps} is more than the model's {diffusion.timesteps} timesteps")
        shape = image_shape(model, config)
        data_name = args.data or config["data"].get("name")
        if data_name is None:
            raise UserError(f"{args.checkpoint} does not say what it was trained on: add --data")
        net = load_features(data_name)
        check_shape(net, torch.empty(0, *shape))  # before the work, not after it
        evaluate.check_count(args.n, net.head.in_features)
        labels = cli.parse_labels("all", args.n, model.num_classes)
        kind = config.pop("weights")  # the rest is the run's, the same for all
        facts = {"config": config, "parameters": sum(p.numel() for p in model.parameters())}
        for scale in args.scales:
            if any(row["weights"] == weights and row["cfg_scale"] == scale for row in rows):
                continue
            bar = functools.partial(progress, unit="step", desc=f"{weights}, cfg_scale {scale:g}")
            with autocast(device):
                images = diffusion.sample(
                    model,
                    args.n,
                    shape,
                    labels=labels,
                    cfg_scale=scale,
                    seed=args.seed,
                    progress=bar,
                    **settings["sampler"],
                )
            quality = evaluate.evaluate_samples(
                to_uint8(images).permute(0, 2, 3, 1).numpy(), labels.numpy(), data_name, need_labels=True
            )
            rows.append({"weights": weights, "kind": kind, "cfg_scale": scale, "quality": quality})
            say(
                f"{weights}, cfg_scale {scale:g}: Frechet distance {quality['frechet_distance']:.2f}, "
                f"label agreement {quality['labels']['agreement']:.1%}"
            )
            write_json(args.out, {"command": sweep_command(args, rows), **facts, **settings, "rows": rows})
    write_json(args.out, {"command": sweep_command(args, rows), **facts, **settings, "rows": rows})
    print(f"wrote {args.out}: {len(rows)} settings")


def main(argv=None):
    parser, commands = cli.make_parser(__doc__.splitlines()[0], "cifar10", SHAPE, conditional=True)
    help = "measure quality against the guidance scale, with raw and averaged weights"
    sweep = commands.add_parser("sweep", help=help)
    sweep.add_argument("--checkpoint", type=Path, required=True, help="a conditional checkpoint")
    sweep.add_argument("--data", help="the data set to compare with (default: the one the model was trained on)")
    sweep.add_argument("--weights", nargs="+", default=["raw", "ema"], help="raw, ema, or ema_BETA")
    sweep.add_argument("--scales", nargs="+", type=number(float, 0), default=SCALES, help="guidance scales")
    sweep.add_argument("--n", type=positive, default=2000, help="samples per setting, spread over the classes")
    sweep.add_argument("--sampler", choices=SAMPLERS, default="dpm", help="as for `sample`")
    sweep.add_argument("--steps", type=positive, default=20, help="network evaluations per image")
    sweep.add_argument("--seed", type=natural, default=0, help="image i depends on (seed, i) only")
    sweep.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    sweep.add_argument("--out", type=Path, required=True, help="the .json to write, or to go on with")
    sweep.set_defaults(run=run_sweep)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command_line(main)
