"""Point 2: a conditional DDPM with classifier-free guidance and EMA.

    python ddpm_conditional.py train --data cifar10 --out runs/cifar10
    python ddpm_conditional.py sample --checkpoint runs/cifar10 --labels cat,dog --cfg-scale 3 --out cats_and_dogs.png
    python ddpm_conditional.py sweep --checkpoint checkpoints/fashion_mnist_conditional.safetensors --out sweep.json

Guidance adds two ideas to a DDPM (Ho & Salimans 2022, arXiv 2207.12598). Training drops some of the labels, so that one
network learns the conditional and the unconditional prediction; sampling combines the two. The training loop around
them is `training.steps`, the samplers are in ddpm.py, and EMA is in modules.py.
"""

import shlex
import sys

import torch

from utils import command_line

# What `train` trains unless told otherwise: the published CIFAR-10 model's.
SHAPE = {"patch": 1, "width": 24, "mults": [1, 4, 8], "attention": False}


# Homework TODO 89-94: in training, some labels are dropped
def drop_labels(labels, p_uncond, generator, per="example"):
    """labels (int64, N) with -1, "no label", where a coin of probability p_uncond says so (Ho & Salimans, algorithm 1).

    per "example" throws a coin for each image, as in the paper; "batch" one for the whole batch, as in the course.
    """
    coins = torch.rand(len(labels) if per == "example" else 1, generator=generator)
    return torch.where(coins < p_uncond, -1, labels)


def with_labels(model, labels):
    """The noise predictor eps_model(x, t) of a conditional network for images with these labels (int64, N; or None)."""
    return lambda x, t: model(x, t, None if labels is None else labels.to(x.device))


# Homework TODO 51: in sampling, classifier-free guidance
def guided(model, labels=None, cfg_scale=0.0, cfg_interval=None):
    """The noise predictor eps_model(x, t) with guidance towards labels (int64, N; None: no labels, no guidance).

    The paper's eq. 6 is (1 + w) eps_cond - w eps_uncond. As in the course, cfg_scale is 1 + w:
        eps = eps_uncond + cfg_scale (eps_cond - eps_uncond)
    and 0, which would be the unconditional prediction, means no guidance, as 1 does: the conditional prediction alone.
    cfg_interval (low, high): guide only where low <= t <= high (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    Both predictions come from one pass over a batch of twice the size.
    """
    conditional = with_labels(model, labels)
    if labels is None or cfg_scale in (0, 1):
        return conditional

    def eps_model(x, t):
        # A sampler's images are all at the same t. Reading it makes a GPU wait, so only where there is an interval.
        if cfg_interval is not None and not cfg_interval[0] <= t[0] <= cfg_interval[1]:
            return conditional(x, t)
        both_labels = torch.cat([labels, torch.full_like(labels, -1)])
        both = with_labels(model, both_labels)(torch.cat([x, x]), torch.cat([t, t]))
        eps_cond, eps_uncond = both.float().chunk(2)
        return torch.lerp(eps_uncond, eps_cond, cfg_scale)

    return eps_model


def predictor(model, labels=None, cfg_scale=0.0, cfg_interval=None):
    """`guided` for `Diffusion.sample_batches`: predictor(part) is the eps_model for the images of a slice."""
    return lambda part: guided(model, None if labels is None else labels[part], cfg_scale, cfg_interval)


def main(argv=None):
    import cli  # late, as in ddpm.py: training and sampling import the functions above
    import evaluate

    parser, commands = cli.make_parser(__doc__.splitlines()[0], "cifar10", SHAPE, conditional=True)
    evaluate.add_sweep_flags(commands.add_parser("sweep", help="measure quality against the guidance scale"))
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.typed = shlex.join(["python", "ddpm_conditional.py", *argv])
    args.run(args)


if __name__ == "__main__":
    command_line(main)
