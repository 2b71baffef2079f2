"""A playground for guided sampling, in Jupyter: `playground.show()` in notebook 03.

Every change draws the same noise without guidance and with it; a slider walks through what the sampler saw on the way.
"""

import asyncio
import functools
import html
import random
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import figures
from ddpm import SAMPLERS
from ddpm_conditional import guided
from image_data import DATASETS
from weights import image_shape, load_checkpoint

SCALES = [("none", 0.0), *((f"{scale:g}", scale) for scale in (1.5, 2.0, 3.0, 5.0, 7.5))]
NAMES_WIDTH, HEIGHT = 150, 540  # pixels: of the rows' names, of the picture whichever model is drawn


def choices():
    """{name: (title, {"raw": path, "ema": path}, class names)} of the conditional models that are there."""
    found = {}
    for name in ("fashion_mnist", "cifar10"):
        for path in figures.CHECKPOINTS.glob(f"{name}_conditional.safetensors"):
            found[name] = DATASETS[name].title, {"raw": path, "ema": path}, load(path, "ema")[2]["data"]["classes"]
    raw, ema = (figures.CHECKPOINTS / f"{name}.pt" for name in ("conditional_ckpt", "conditional_ema_ckpt"))
    if raw.is_file() and ema.is_file():
        classes = found["cifar10"][2] if "cifar10" in found else list(map(str, range(10)))
        found["course"] = "the course's", {"raw": raw, "ema": ema}, classes
    return found


@functools.cache
def load(path, weights):
    return load_checkpoint(path, None if path.suffix == ".pt" else weights)


def draw(model, diffusion, shape, label, cfg_scale, cfg_interval=None, n=6, **options):
    """n samples of a class without guidance, then every x_t with it and the x0 predicted there, all N x C x H x W."""
    labels, x0s = torch.full((n,), label), []
    eps_model = guided(model, labels, cfg_scale, cfg_interval)

    def watched(x, t):
        eps = eps_model(x, t)
        x0s.append(diffusion.predict_x0(x, t, eps.float()).clamp(-1, 1))
        return eps

    unguided = diffusion.sample(guided(model, labels), n, shape, **options)
    x_ts = list(diffusion.trajectory(watched, shape, range(n), **options))
    return unguided, x_ts, [*x0s, x_ts[-1]]


def picture(drawing, step):
    """The samples and what the sampler saw at a step, with the rows' names, as a PNG of one size for all models."""
    unguided, x_ts, x0s = drawing
    rows = {
        "without guidance": unguided,
        "with guidance": x_ts[-1],
        f"on the way:\nstep {step} of {len(x_ts) - 1}": x_ts[step],
        "the clean image\nit predicts there": x0s[step],
    }
    columns, side = len(unguided), unguided.shape[-1]
    scale = (figures.PAGE_WIDTH - NAMES_WIDTH) // (columns * (side + 1) + 1)
    grid = figures.pixels(torch.cat(list(rows.values())), columns, scale)
    canvas = Image.new("RGB", (figures.PAGE_WIDTH, HEIGHT), "white")
    canvas.paste(Image.fromarray(grid), (NAMES_WIDTH, 0))
    for row, name in enumerate(rows):
        place = (NAMES_WIDTH - 8, (row + 0.5) * len(grid) / len(rows))
        ImageDraw.Draw(canvas).text(place, name, "black", ImageFont.load_default(15), anchor="rm", align="right")
    return figures.png(np.asarray(canvas))
