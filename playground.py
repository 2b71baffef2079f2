"""A playground for guided sampling, in Jupyter: `playground.show()` in notebook 03.

Every change draws the same noise without guidance and with it; a slider walks through what the sampler saw on the way.
"""

import asyncio
import functools
import random
import time

import ipywidgets as widgets
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

# name: its title, its checkpoint, and the kinds of weights that this holds
PUBLISHED = {
    "fashion_mnist": (DATASETS["fashion_mnist"].title, "fashion_mnist_conditional", ("raw", "ema")),
    "cifar10": (DATASETS["cifar10"].title, "cifar10_conditional", ("raw", "ema")),
    "cifar10_long": (f"{DATASETS['cifar10'].title}, trained longer", "cifar10_conditional_long", ("ema",)),
    "cifar10_course": (f"{DATASETS['cifar10'].title}, the course's network", "cifar10_course", ("raw", "ema")),
}


def choices():
    """{name: (title, {"raw": path, "ema": path}, class names)} of the conditional models that are there."""
    found = {}
    for name, (title, stem, kinds) in PUBLISHED.items():
        for path in figures.shipped(stem):
            found[name] = title, dict.fromkeys(kinds, path), load(path, "ema")[2]["data"]["classes"]
    raw, ema = (figures.CHECKPOINTS / f"{name}.pt" for name in ("conditional_ckpt", "conditional_ema_ckpt"))
    if raw.is_file() and ema.is_file():
        classes = found["cifar10"][2] if "cifar10" in found else list(map(str, range(10)))
        found["course"] = "the course's checkpoints", {"raw": raw, "ema": ema}, classes
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
    """The samples and what the sampler saw at a step, with the rows' names: uint8, of one size for all models."""
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
    return np.asarray(canvas)


def show():
    """The controls and the picture, as one widget."""
    models = choices()
    wide = {"style": {"description_width": "90px"}, "layout": {"width": "460px"}}
    lazy = wide | {"continuous_update": False}
    narrow = {"style": {"button_width": "auto"}}
    titles = [(title, name) for name, (title, *_) in models.items()]
    data = widgets.ToggleButtons(options=titles, description="model", **narrow)
    label = widgets.ToggleButtons(options=[("", 0)], description="class", **narrow)
    scale = widgets.SelectionSlider(options=SCALES, value=3.0, description="guidance", **lazy)
    interval = widgets.IntRangeSlider(value=(0, 999), min=0, max=999, description="guided for t", **lazy)
    sampler = widgets.ToggleButtons(options=list(SAMPLERS), value="dpm", description="sampler")
    steps = widgets.IntSlider(value=10, min=2, max=100, description="steps", **lazy)
    ema = widgets.Checkbox(value=True, description="averaged weights (EMA)")
    seed = widgets.BoundedIntText(value=0, max=9999, description="seed")
    surprise = widgets.Button(description="surprise me", icon="random")
    walk = widgets.IntSlider(description="on the way", **wide)
    status, image = widgets.Label(), widgets.Image(format="png", width=figures.PAGE_WIDTH, height=HEIGHT)
    latest, waiting = {}, []

    def use_model(_=None):
        _, files, classes = models[data.value]
        label.options = [(name, i) for i, name in enumerate(classes)]
        ema.disabled = "raw" not in files

    def redraw():
        try:
            files = models[data.value][1]
            weights = "ema" if ema.value or ema.disabled else "raw"
            model, diffusion, config = load(files[weights], weights)
            guidance, start = (label.value, scale.value, interval.value), time.perf_counter()
            options = {"sampler": sampler.value, "steps": steps.value, "seed": seed.value}
            latest["drawing"] = draw(model, diffusion, image_shape(model, config), *guidance, **options)
            walk.max = len(latest["drawing"][1]) - 1
            walk.value = walk.max // 2
            scrub()
            status.value = f"drawn in {time.perf_counter() - start:.1f} s"
        except Exception as error:  # nobody sees what is raised in a timer
            status.value = f"{type(error).__name__}: {error}"

    def ask(_=None):
        """Draw soon: of several quick changes only the last one is drawn."""
        status.value = "drawing ..."
        if waiting:
            waiting.pop().cancel()
        waiting.append(asyncio.get_event_loop().call_later(0.05, redraw))

    def scrub(_=None):
        image.value = figures.png(picture(latest["drawing"], walk.value))

    use_model()
    data.observe(use_model, "value")
    for control in data, label, scale, interval, sampler, steps, ema, seed:
        control.observe(ask, "value")
    surprise.on_click(lambda _: label.set_trait("index", random.randrange(len(label.options))))
    surprise.on_click(lambda _: seed.set_trait("value", random.randrange(10_000)))
    walk.observe(scrub, "value")
    redraw()
    if figures.PUBLISHING:
        return figures.still(picture(latest["drawing"], walk.value), "The playground")
    pairs = [widgets.HBox(row) for row in ((scale, interval), (sampler, steps), (ema, seed, surprise))]
    return widgets.VBox([data, label, *pairs, status, image, walk])
