"""A playground for guided sampling, in Jupyter: `playground.show()` in notebook 03.

Every change of a control draws the same noise twice, without guidance and with it, and a slider walks through what the
sampler saw on the way.
"""

import asyncio
import functools
import io
import random
import time

import numpy as np
import torch
from PIL import Image

import figures
from ddpm import SAMPLERS
from ddpm_conditional import guided
from image_data import DATASETS
from utils import to_uint8
from weights import image_shape, load_checkpoint

ROWS = ("without guidance", "with guidance", "on the way: x_t", "on the way: the x0 it predicts")
SCALES = {"none": 0.0, "1.5": 1.5, "2": 2.0, "3": 3.0, "5": 5.0, "7.5": 7.5}
WIDTH = 960  # of the picture, in pixels: as wide as a notebook's page


def choices():
    """{name: (title, {"raw": path, "ema": path}, class names)} of the conditional models that are there."""
    found = {}
    for name in ("fashion_mnist", "cifar10"):
        path = figures.CHECKPOINTS / f"{name}_conditional.safetensors"
        if path.is_file():
            found[name] = DATASETS[name].title, {"raw": path, "ema": path}, load(path, "ema")[2]["data"]["classes"]
    course = [figures.CHECKPOINTS / f"{name}.pt" for name in ("conditional_ckpt", "conditional_ema_ckpt")]
    if all(path.is_file() for path in course):
        classes = found["cifar10"][2] if "cifar10" in found else list(map(str, range(10)))
        found["course"] = "the course's", {"raw": course[0], "ema": course[1]}, classes
    return found


@functools.cache
def load(path, weights):
    return load_checkpoint(path, None if path.suffix == ".pt" else weights)


def draw(model, diffusion, shape, label, cfg_scale, cfg_interval=None, n=8, **options):
    """n samples of a class without guidance, the same with it, and every x_t and predicted x0 of the latter.

    Returns (unguided, guided, [x_t], [x0]), all N x C x H x W; options as for `Diffusion.trajectory`.
    """
    labels, x0s = torch.full((n,), label), []
    eps_model = guided(model, labels, cfg_scale, cfg_interval)

    def watched(x, t):
        eps = eps_model(x, t)
        x0s.append(diffusion.predict_x0(x, t, eps.float()).clamp(-1, 1))
        return eps

    unguided = diffusion.sample(guided(model, labels), n, shape, **options)
    x_ts = list(diffusion.trajectory(watched, shape, range(n), **options))
    return unguided, x_ts[-1], x_ts, [*x0s, x_ts[-1]]


def picture(drawing, step):
    """The four `ROWS` as one PNG of fixed width, every pixel enlarged to a square."""
    unguided, sample, x_ts, x0s = drawing
    images = torch.cat([unguided, sample, x_ts[step], x0s[step]])
    scale = max(1, WIDTH // (len(unguided) * (images.shape[-1] + 2)))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(figures.pixels(to_uint8(images), len(unguided), scale))).save(buffer, "PNG")
    return buffer.getvalue()


def show():
    """The controls and the picture, as one widget."""
    import ipywidgets as widgets

    models = choices()
    wide = {"style": {"description_width": "90px"}, "layout": {"width": "460px"}}
    lazy = wide | {"continuous_update": False}
    data = widgets.ToggleButtons(options=[(title, name) for name, (title, *_) in models.items()], description="model")
    label = widgets.ToggleButtons(options=[("", 0)], description="class", style={"button_width": "auto"})
    scale = widgets.SelectionSlider(options=list(SCALES), value="3", description="guidance", **lazy)
    interval = widgets.IntRangeSlider(value=(0, 999), min=0, max=999, description="guided for t", **lazy)
    sampler = widgets.ToggleButtons(options=list(SAMPLERS), value="dpm", description="sampler")
    steps = widgets.IntSlider(value=20, min=2, max=100, description="steps", **lazy)
    ema = widgets.Checkbox(value=True, description="averaged weights (EMA)")
    seed = widgets.BoundedIntText(value=0, max=9999, description="seed")
    surprise = widgets.Button(description="surprise me", icon="random")
    walk = widgets.IntSlider(value=20, max=20, description="on the way", **wide)
    status, image = widgets.HTML(), widgets.Image(format="png", layout={"width": "100%", "max_width": f"{WIDTH}px"})
    latest, waiting = {}, []

    def name_classes(_=None):
        label.options = [(name, i) for i, name in enumerate(models[data.value][2])]

    def redraw():
        _, files, _ = models[data.value]
        model, diffusion, config = load(files["ema" if ema.value else "raw"], "ema" if ema.value else "raw")
        options = {"sampler": sampler.value, "steps": steps.value, "seed": seed.value}
        start = time.perf_counter()
        where = (label.value, SCALES[scale.value], interval.value)
        latest["drawing"] = draw(model, diffusion, image_shape(model, config), *where, **options)
        walk.max = walk.value = steps.value
        image.value = picture(latest["drawing"], steps.value)
        status.value = f"{', '.join(ROWS)} &nbsp;·&nbsp; drawn in {time.perf_counter() - start:.1f} s"

    def ask(_=None):
        """Draw soon: of several quick changes only the last one is drawn."""
        status.value = "<b>drawing ...</b>"
        for timer in waiting:
            timer.cancel()
        waiting[:] = [asyncio.get_event_loop().call_later(0.05, redraw)]

    def surprise_me(_):
        label.value, seed.value = random.randrange(len(label.options)), random.randrange(10_000)

    def scrub(change):
        if "drawing" in latest and change["new"] < len(latest["drawing"][2]):
            image.value = picture(latest["drawing"], change["new"])

    name_classes()
    data.observe(name_classes, "value")
    for control in (data, label, scale, interval, sampler, steps, ema, seed):
        control.observe(ask, "value")
    surprise.on_click(surprise_me)
    walk.observe(scrub, "value")
    redraw()
    if figures.PUBLISHING:
        return figures.still(image.value, f"{', '.join(ROWS)}")
    rows = [data, label, (scale, interval), (sampler, steps), (ema, seed, surprise), status, image, walk]
    return widgets.VBox([widgets.HBox(row) if isinstance(row, tuple) else row for row in rows])
