"""One look for the figures of the notebooks and the report: colours, line styles, grids of images, where they go.

The colours are Okabe & Ito's, which colour-blind readers can tell apart. Each schedule has its colour and line style in
every figure, and so has each kind of guidance, so that a print in grey can be read too.
"""

import inspect
import io
import json
import os
from pathlib import Path

import imageio.v3 as imageio
import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import Image, Markdown, display
from matplotlib import pyplot as plt

from ddpm import SCHEDULES, Diffusion
from image_data import DATASETS
from utils import ROOT, atomic_path, generator, image_grid, progress, sha256, to_uint8, write_json

FIGURES = ROOT / "report/figures"
PICTURES = ROOT / "report/pictures"
RESULTS = ROOT / "report/results"
CHECKPOINTS = ROOT / "checkpoints"
PUBLISHING = bool(os.environ.get("DDPM_PUBLISHING"))  # by report/build.py: results are written, widgets are pictures

ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
SCHEDULE_STYLE = {
    "linear": {"color": BLUE, "linestyle": "-"},
    "cosine": {"color": VERMILLION, "linestyle": "--"},
    "quadratic": {"color": GREEN, "linestyle": "-."},
    "sigmoid": {"color": PURPLE, "linestyle": ":"},
}
GUIDANCE_STYLE = {
    "raw": {"color": "0.55", "linestyle": "-", "marker": "o"},
    "ema": {"color": "black", "linestyle": "--", "marker": "s"},
    "ema, trained longer": {"color": BLUE, "linestyle": "-.", "marker": "^"},
    "ema, middle levels only": {"color": VERMILLION, "linestyle": ":", "marker": "D"},
}

TEXT_WIDTH = 6.7  # inches, on A4
PAGE_WIDTH = 960  # pixels, of a notebook in a browser


def use_style():
    """Set the style for every figure made from here on."""
    plt.rc("figure", dpi=PAGE_WIDTH / TEXT_WIDTH)
    plt.rc("font", size=9.5)
    plt.rc("axes", titlesize=9.5, grid=True)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="0.9")
    plt.rc("legend", fontsize=8.5, frameon=False)
    plt.rc("lines", linewidth=1.6, markersize=4)
    plt.rc("svg", hashsalt="ddpm")  # outlines of letters have no random numbers: the same figure is the same bytes


def subplots(rows=1, columns=1, height=2.5, **options):
    """plt.subplots as wide as the report's text; width_ratios, sharex, ... as there."""
    return plt.subplots(rows, columns, figsize=(TEXT_WIDTH, height), layout="constrained", **options)


def save(fig, name, sources=()):
    """Write a plot to report/figures/NAME.svg; `sources` are the files (checkpoints, results) it was drawn from."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    record(name, ".svg", buffer.getvalue(), sources)
    # the notebook then shows as many pixels as before, but letters as small as on a page of text
    enlarged = TEXT_WIDTH / fig.get_figwidth()
    fig.set_size_inches(enlarged * fig.get_size_inches())
    fig.set_dpi(fig.dpi / enlarged)


def record(name, suffix, contents, sources):
    """Write the figure, and beside it NAME.json: what it was drawn from. So the report can tell if that changed."""
    with atomic_path(FIGURES / f"{name}{suffix}") as temporary:
        temporary.write_bytes(contents)
    hashes = {Path(source).relative_to(ROOT).as_posix(): sha256(source) for source in sources}
    write_json(FIGURES / f"{name}.json", {"file": f"{name}{suffix}", "sources": hashes})


def save_result(name, result):
    """Write numbers for the report to report/results/NAME.json, at six digits, which no processor changes."""
    if not PUBLISHING:
        print(f"results/{name}.json stays as it is: `python report/build.py notebooks` writes it")
        return
    rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    write_json(RESULTS / f"{name}.json", rounded)


def read_result(name):
    """report/results/NAME.json, or None where it has not been made."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def guided_rows(name):
    """What is measured of a conditional model's averaged weights: for each guidance and number of steps."""
    results = [read_result(f"{kind}_{name}") for kind in ("sweep", "plain", "intervals", "best")]
    return [row | r["sampler"] for r in results if r for row in r["rows"] if row["weights"] == "ema"]


def shipped(*names):
    """Those of the named checkpoints that are in checkpoints/, in order; says so where none of them is."""
    paths = [path for name in names if (path := CHECKPOINTS / f"{name}.safetensors").is_file()]
    if not paths:
        print(f"checkpoints/ has no {' or '.join(names)} yet: checkpoints/README.md says how to make it")
    return paths


def pixels(images, columns, scale=4, padding=1):
    """A grid of images (N x C x H x W, uint8 or in [-1, 1]), enlarged `scale` times: uint8, H x W x 3."""
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return image_grid(images, columns, padding=padding * scale, scale=scale)


def real_images(name):
    """Test images from report/pictures/real_NAME.png, N x 3 x H x W: the first of each class, or evenly spaced ones."""
    strip = torch.from_numpy(imageio.imread(PICTURES / f"real_{name}.png"))
    return torch.stack(strip.permute(2, 0, 1).split(strip.shape[0], dim=2))


def png(picture):
    """A picture (uint8, H x W x 3) as the contents of a PNG file."""
    return imageio.imwrite("<bytes>", picture, extension=".png")


def show(picture):
    """Show a picture in a notebook, unsmoothed, pixel for pixel."""
    display(Image(png(picture)))


def two_lines(name):
    """A class's name, broken where it can be: columns are narrow."""
    return name.replace(" ", "\n").replace("/", "/\n").replace("automobile", "auto-\nmobile")


def labelled_rows(rows, column_labels=(), scale=4, width=TEXT_WIDTH, gap=1):
    """A figure whose rows are named lists of images (all of one size and number): {"EMA": N x C x H x W, ...}."""
    columns = len(next(iter(rows.values())))
    grid = np.concatenate([pixels(row, columns, scale, gap)[gap * scale :] for row in rows.values()])
    longest_name, longest_label = (max(map(len, "\n".join(texts).split("\n"))) for texts in (rows, column_labels))
    # in inches: the row names' room on the left, the column labels' above, and the picture itself
    left = 0.1 + 0.073 * longest_name
    above = 0.07 + 0.16 * max(1 + label.count("\n") for label in column_labels) if column_labels else 0.02
    picture_width = width - left
    picture_height = picture_width * grid.shape[0] / grid.shape[1]
    # in a notebook an image's pixel is a whole number of the screen's, and the figure at most a tenth over PAGE_WIDTH
    pixels_across = grid.shape[1] / scale
    enlarged = max(1, int(1.1 * PAGE_WIDTH / width * picture_width / pixels_across))
    fig = plt.figure(figsize=(width, above + picture_height), dpi=enlarged * pixels_across / picture_width)
    axes = fig.add_axes((left / width, 0, picture_width / width, picture_height / (above + picture_height)))
    axes.imshow(grid, interpolation="none", aspect="auto", extent=(0, columns, len(rows), 0))
    axes.grid(False)
    axes.set_frame_on(False)
    axes.tick_params(length=0, pad=2, labeltop=True, labelbottom=False)
    # in a larger font the labels would touch
    font_size = min(plt.rcParams["font.size"], 120 * picture_width / columns / max(1, longest_label))
    axes.set_xticks(0.5 + np.arange(len(column_labels)), column_labels, fontsize=font_size)
    axes.set_yticks(0.5 + np.arange(len(rows)), rows)
    return fig


# Homework TODO 582: plot the forward process
def noised_rows(image, times, timesteps=1000, schedules=SCHEDULES, seed=1):
    """{schedule: an image (C x H x W, in [-1, 1]) at each of `times`}, for `labelled_rows`; all with the same noise."""
    noise = torch.randn(image.shape, generator=generator(seed)).expand(len(times), -1, -1, -1)
    x0 = image.expand(len(times), -1, -1, -1)
    return {name: Diffusion(timesteps, name).q_sample(x0, torch.tensor(times), noise) for name in schedules}


# Homework TODO 611: plot beta, sqrt(1 - beta) and other curves against the timestep
def plot_schedules(axes, curve, timesteps=1000, schedules=SCHEDULES, **labels):
    """One line for each schedule; `curve` maps a Diffusion to the T values to plot."""
    for name in schedules:
        axes.plot(curve(Diffusion(timesteps, name)), label=name, **SCHEDULE_STYLE.get(name, {}))
    axes.set(**{"xlabel": "timestep $t$"} | labels)


def frontier(sweeps):
    """{data set: {a key of GUIDANCE_STYLE: rows of a sweep}} -> what guidance buys and costs, a curve for each key.

    Points are guidance scales. Two curves can be compared at equal label agreement: above one another.
    """
    fig, axes = subplots(len(sweeps), 2, height=1.8 * len(sweeps), squeeze=False)
    for (left, right), (name, curves) in zip(axes, sweeps.items(), strict=True):
        for axis, label, measure in ((left, "Fréchet distance", "frechet_distance"), (right, "recall", "recall")):
            for kind, rows in curves.items():
                quality = {row["cfg_scale"]: row["quality"] for row in rows}
                points = {scale: (100 * q["labels"]["agreement"], q[measure]) for scale, q in sorted(quality.items())}
                axis.plot(*zip(*points.values(), strict=True), label=kind, **GUIDANCE_STYLE[kind])
                shift, color = (-6, 5 if kind == "raw" else -10), GUIDANCE_STYLE[kind]["color"]
                text = {"textcoords": "offset points", "ha": "center", "size": 8.5, "color": color}
                for scale in sorted({1, 2, 3} & points.keys()):
                    axis.annotate(f"{scale:g}", points[scale], shift, **text)
            axis.margins(0.06, 0.14)
            axis.set(xlabel="label agreement, %", ylabel=label, title=DATASETS[name].title)
        ticks = [0.05, 0.1, 0.2, 0.5, 1, 2]
        left.set(yscale="log")
        left.set(yticks=ticks, yticklabels=ticks, ylim=left.get_ylim())
        left.minorticks_off()
        right.legend(loc="lower left")
    return fig


def code(*functions):
    """Their source, with the comments above, as a notebook shows it."""
    sources = [(inspect.getcomments(f) or "") + inspect.getsource(f) for f in functions]
    return Markdown("```python\n" + "\n\n".join(sources) + "```")


def watch(losses, draw, total, redraws=8):
    """The training losses as a list; on the way their curve is shown and, below it, the images that draw() makes."""
    seen, handle = [], display("training ...", display_id=True)
    for loss in progress(losses, total=total, desc="training"):
        seen.append(float(loss))
        if len(seen) % max(1, total // redraws) == 0 or len(seen) == total:
            fig, (curve, strip) = subplots(2, 1, height=3, height_ratios=[1.4, 1])
            smooth = [np.mean(seen[max(0, i - 20) : i + 1]) for i in range(len(seen))]
            curve.plot(seen, color="0.8")
            curve.plot(smooth, color="black")
            curve.set(xlabel="step", ylabel="loss", xlim=(0, total), ylim=(0, max(smooth[min(10, len(smooth) - 1) :])))
            images = draw()
            strip.imshow(pixels(images, len(images), scale=4), interpolation="none")
            strip.axis("off")
            plt.close(fig)
            handle.update(fig)
    return seen


def table(heads, rows):
    """A Markdown table; numbers that are not whole have three digits."""
    lines = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def slider(images_at, last, name):
    """A slider over 0..last that shows images_at(value) (N x C x H x W) side by side; when published, a picture."""
    first = round(0.3 * last)

    def picture_at(value):
        images = images_at(value)
        scale = max(1, PAGE_WIDTH // (len(images) * (images.shape[-1] + 1) + 1))
        return pixels(images, len(images), scale)

    if PUBLISHING:
        return still(picture_at(first), f"{name} = {first}")
    control = widgets.IntSlider(first, max=last, description=name, layout={"width": f"{PAGE_WIDTH}px"})
    return widgets.interactive(lambda value: show(picture_at(value)), value=control)


def still(picture, caption):
    """What stands for a widget in a notebook that nobody runs: a picture, and what it shows."""
    show(picture)
    return Markdown(f"*{caption}. Run this cell for the controls.*")
