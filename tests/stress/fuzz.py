"""Throw strange flags and malformed files at every command: nothing may end in a traceback, a hang, a half-written output
or a file outside of its folder.

    python tests/stress/fuzz.py [--cases 2400] [--seed 0] [--only NAME ...]

Hypothesis makes the cases, all in this one process. Each runs a script's main() as the script itself does, in a folder of
its own, with a limit on processor time and on memory. A command must end with exit status 0, or with 2 and one line.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
from common import record, tiny_config, unreadable
from conftest import write_idx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import ddpm
import ddpm_conditional
import ddpm_unconditional
import download_datasets
import evaluate
import image_data
import training
import utils
from weights import build_model, read_checkpoint

CPU_SECONDS = 30  # a case that computes for longer hangs
SCRIPTS = {
    "ddpm.py": ddpm.main,
    "ddpm_unconditional.py": ddpm_unconditional.main,
    "ddpm_conditional.py": ddpm_conditional.main,
}
counts: collections.Counter = collections.Counter()


class Hang(BaseException):
    """Not an Exception, so that no command can catch it."""


# --- running one case --------------------------------------------------------------------------------------------------


def out_of_time(*_):
    raise Hang(f"more than {CPU_SECONDS} s of processor time")


def contents(folder, *apart):
    """Every file below a folder and its SHA-256; locks and the folders `apart` are left out."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock" and not any(path.is_relative_to(folder / name) for name in apart)
    }


def whole(path):
    """Is this output readable to its end? Raises what its reader raises if not."""
    if path.suffix == ".npz":
        utils.load_samples(path)
    elif path.suffix in (".png", ".gif"):
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".json":
        json.loads(path.read_text())


def check(area, main, argv):
    """Run main(argv) in the folder `world`, whose sub-folder out/ is for outputs and project/ for what is downloaded."""
    world = Path.cwd()
    argv = [str(a) for a in argv]
    before, outputs = contents(world, "out", "project"), contents(world / "out")
    shown = f"{' '.join(map(repr, argv))} in {world}"
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [f"{area}.py", *argv]
    utils.say.cache_clear()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            utils.command_line(lambda: main(argv))
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    text = err.getvalue()
    assert "Traceback" not in text, f"{shown}: {text}"
    assert code in (0, 2), f"{shown} ended with {code}: {text}"
    if code == 2:
        errors = re.findall(r"^\S+: error: .+$", text, re.MULTILINE)
        assert len(errors) == 1 and text.endswith(f"{errors[0]}\n"), f"{shown}: {text}"
    # nothing but the outputs has changed, and they are whole
    assert contents(world, "out", "project") == before, f"{shown} wrote outside of out/"
    after = contents(world / "out")
    for path in after:
        assert not re.search(r"^\..*-[0-9a-f]{8}\.|-download-", path.name), f"{shown} left {path}"
        if outputs.get(path) != after[path]:
            whole(path)
    for folder in {path.parent for path in after}:
        assert not unreadable(folder), f"{shown} left unreadable files in {folder}"
    for entry in (world / "project").iterdir():
        assert "-download-" not in entry.name, f"{shown} left {entry}"
    counts[area] += 1
    counts["refused" if code else "accepted"] += 1
    return code


# --- what is thrown ----------------------------------------------------------------------------------------------------


@st.composite
def mangled(draw, data):
    """`data` with some bytes flipped, replaced, cut out, doubled, zeroed or cut off; now and then only noise."""
    data = bytearray(data)
    if draw(st.integers(0, 30)) == 0:
        return draw(st.binary(max_size=300))
    for _ in range(draw(st.integers(1, 3))):
        # the beginning and the end hold the structure: aim there half of the time
        near = draw(st.sampled_from(["anywhere", "anywhere", "start", "end"]))
        low, high = {
            "anywhere": (0, len(data)),
            "start": (0, min(len(data), 120)),
            "end": (max(0, len(data) - 120), len(data)),
        }[near]
        at = draw(st.integers(low, max(low, high)))
        kind = draw(st.sampled_from(["flip", "bytes", "cut", "double", "zero", "end"]))
        length = draw(st.integers(1, 40))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "bytes":
            data[at : at + length] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == "end":
            del data[at:]
    return bytes(data)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, 1, 2, 7, 8, 16, 28, 10**6, 10**12, 10**30, -(2**63), 2**63, 2**64]),
    st.floats(),
    st.sampled_from(["nan", "inf", "-inf", "1e-400", "1e400", "0x10", "1_0", "１", "", " 3 ", "-0", "+5", "1e3"]),
)
small = st.integers(1, 12)


def flag(name, *values):
    """A flag with one value of the strategies, or without any."""
    return st.one_of(
        *[v.map(lambda x: [name, x]) for v in values],
        *[v.map(lambda x: [f"{name}={x}"]) for v in values],
        st.just([name]),
    )


def choice(name, *values):
    return flag(name, st.sampled_from(values), texts)


def flags_of(*flags):
    """Up to five of these flags, in any order, twice if it comes to that."""
    return st.lists(st.one_of(*flags), max_size=5).map(lambda lists: [word for words in lists for word in words])


out_names = st.one_of(
    st.sampled_from(
        [
            "out/x.png",
            "out/x.gif",
            "out/x.npz",
            "out/x.json",
            "out/x.safetensors",
            "out",
            "out/a/b/c.png",
            "",
            "out/x",
            "out/x.PNG",
            "out/../out/y.npz",
            "/dev/null",
            "/dev/full",
            "/proc/x.png",
            "photos/dogs/0.png/x.gif",
            "out/" + 300 * "a" + ".png",
            "out/ü \n.npz",
            "out/.png",
            ".",
            "out/-.gif",
        ]
    ),
    texts.map(lambda t: f"out/{t.replace('/', '_')}.png"),
)
device = flag(
    "--device", st.sampled_from(["cpu", "auto", "cuda", "mps", "meta", "cuda:9", "cpu:0", "xla", "vulkan"]), texts
)

# Counts that only ask for more work than a test has time for (a million images, say) are not tried: they are no errors.
train_flags = flags_of(
    flag(
        "--data",
        st.sampled_from(["idx", "photos", "flat", "empty", "nowhere", "idx/train-labels-idx1-ubyte", "", "."]),
        texts,
    ),
    flag("--image-size", st.sampled_from([1, 2, 3, 4, 5, 8, 9, 12, 0, -8, 10**7]), texts),
    st.sampled_from([["--flip"], ["--no-flip"], ["--attention"], ["--no-attention"], ["--resume"], ["--help"]]),
    choice("--schedule", *ddpm.SCHEDULES),
    flag("--timesteps", numbers),
    choice("--loss", *ddpm.LOSSES),
    choice("--objective", *ddpm.OBJECTIVES),
    flag("--epochs", st.sampled_from([0.01, 0.1, 0.3, 1e-9, 0, -1, "nan", "inf", 1e30])),
    flag("--minutes", st.sampled_from([0, -1, "nan", "inf", 1e-9, "one"])),
    flag("--batch-size", st.sampled_from([1, 2, 3, 7, 16, 40, 0, -1, 10**30, "x"])),
    flag("--lr", numbers),
    choice("--optimizer", *training.OPTIMIZERS),
    flag("--seed", numbers),
    choice("--model", "patch", "course"),
    flag("--width", st.sampled_from([1, 2, 3, 4, 5, 8, 12, 33, 0, -4, 10**9]), texts),
    st.lists(st.sampled_from([1, 2, 3, 0, -1, 1000, "x"]), max_size=4).map(lambda m: ["--mults", *m]),
    flag("--depth", st.sampled_from([1, 2, 0, -1, 10**9, "x"])),
    flag("--patch", st.sampled_from([1, 2, 3, 0, 64, 65, "x"])),
    choice("--block", "resnet", "convnext"),
    st.lists(st.sampled_from([0, 0.5, 0.9, 0.999999, 1, -1, "nan", "x"]), max_size=3).map(lambda b: ["--ema-beta", *b]),
    flag("--ema-start", numbers),
    flag("--p-uncond", numbers),
    choice("--label-dropout", "example", "batch"),
    choice("--precision", "float32"),
    flag("--accumulate", st.sampled_from([1, 2, 3, 4, 0, -1, 10**30, "x"])),
    flag("--sample-every", st.sampled_from([0, 1, 2, -1, "x"])),
    device,
    flag("--init", st.sampled_from(["plain/model.safetensors", "course.pt", "nowhere.safetensors", "idx", ""])),
    flag(
        "--out",
        st.sampled_from(
            ["out/run", "out/plain", "out/classes", "idx/train-labels-idx1-ubyte/x", "/dev/null", "/proc/run"]
        ),
    ),
)
sample_flags = flags_of(
    flag(
        "--checkpoint",
        st.sampled_from(
            [
                "plain/model.safetensors",
                "classes/model.safetensors",
                "course.pt",
                "nowhere.pt",
                "plain",
                "idx/train-labels-idx1-ubyte",
                "plain/config.json",
                "",
            ]
        ),
        texts,
    ),
    flag("--n", st.sampled_from([1, 2, 3, 5, 10, 0, -1, 1.5, "x", "１"])),
    choice("--sampler", *ddpm.SAMPLERS),
    flag("--steps", st.sampled_from([1, 2, 3, 10, 11, 0, -1, 10**30, "x"])),
    flag("--eta", numbers),
    choice("--variance", "posterior", "beta"),
    flag("--cfg-scale", numbers),
    flag("--seed", numbers),
    device,
    st.sampled_from([["--clip"], ["--no-clip"], ["--ema"], ["--no-ema"], ["--help"], ["x"], ["--"]]),
    flag("--labels", texts, st.sampled_from(["all", "none", "0", "1,0", "-1", "9", "10", "0,", "0 1", "1" * 5000])),
    flag("--batch-size", st.sampled_from([1, 2, 250, 0, -1, 10**30])),
    flag("--out", out_names),
)
publish_flags = flags_of(
    flag("--run", st.sampled_from(["plain", "classes", "out/run", "empty", "nowhere", ""]), texts),
    st.lists(st.sampled_from(["raw", "ema", "ema_0.5", "ema_0.9", "losses", "", "x"]), max_size=3).map(
        lambda w: ["--weights", *w]
    ),
    flag("--out", out_names),
    st.just(["--help"]),
)
sweep_flags = flags_of(
    flag(
        "--checkpoint",
        st.sampled_from(
            ["plain/model.safetensors", "classes/model.safetensors", "nowhere.safetensors", "course.pt", ""]
        ),
    ),
    flag("--scales", numbers),
    flag("--n", st.sampled_from([0, 100, -1, "x"])),
    flag("--steps", st.sampled_from([0, 20, 10**30])),
    choice("--sampler", *ddpm.SAMPLERS),
    flag("--data", st.sampled_from(["fashion_mnist", "cifar10", "nowhere/cifar10", ""]), texts),
    flag("--seed", numbers),
    flag("--weights", st.sampled_from(["raw", "ema", "x"])),
    device,
    flag("--out", out_names),
)
grid_flags = flags_of(
    flag("--only", texts), flag("--out", st.sampled_from(["out/grid", "/dev/null"])), flag("--n", numbers), train_flags
)
evaluate_flags = flags_of(
    flag("--data", st.sampled_from(["fashion_mnist", "cifar10", "idx", "nowhere", ""]), texts),
    device,
    flag("--features", st.sampled_from(["fashion_mnist", "nowhere"]), texts),
    st.just(["--labels"]),
    st.just(["--help"]),
    flag("--k", st.sampled_from([1, 3, 0, -1, 10**30, "x"])),
    flag("--bootstrap", st.sampled_from([0, 1, 5, -1, "x"])),
    flag("--seed", numbers),
    flag("--json-out", out_names.map(lambda name: re.sub(r"(png|gif|npz)$", "json", name))),
    flag("--n", st.sampled_from([1, 2, 8, 0, -1, "x"])),
    flag("--weights", st.sampled_from(["raw", "ema", "ema_0.5", "x"])),
    flag("--bins", st.sampled_from([1, 3, 10**9, 0, "x"])),
    flag("--batch-size", st.sampled_from([1, 5, 0, -1])),
)


# --- the world in which a case runs ------------------------------------------------------------------------------------


def build(template):
    """Valid small inputs of every kind, made once; each case works on a copy."""
    rng = np.random.default_rng(0)
    for name in ("out", "project", "empty", "idx", "flat"):
        (template / name).mkdir(parents=True)
    for prefix, n in (("train", 40), ("t10k", 20)):
        write_idx(template / f"idx/{prefix}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(template / f"idx/{prefix}-labels-idx1-ubyte", np.arange(n) % 10)
    for i in range(12):
        picture = Image.fromarray(rng.integers(0, 256, (12, 10, 3)).astype(np.uint8))
        for folder in ("photos/cats" if i % 2 else "photos/dogs", "flat"):
            (template / folder).mkdir(parents=True, exist_ok=True)
            picture.save(template / folder / f"{i}.{('png', 'jpg', 'gif')[i % 3]}")
    training.train(tiny_config(2), _images(), template / "classes", device="cpu")
    plain = tiny_config(2)
    plain["model"].pop("num_classes")
    training.train(plain, _images(), template / "plain", device="cpu")
    weights = build_model({"name": "UNet_conditional", "channels": 1, "width": 4, "num_classes": 3}).state_dict()
    torch.save(weights, template / "course.pt")
    utils.save_samples(template / "samples.npz", rng.integers(0, 256, (8, 28, 28, 1)).astype(np.uint8), np.arange(8))
    import datasets

    rows = {"image": [{"bytes": (template / "flat/0.png").read_bytes(), "path": None}] * 3, "label": [0, 1, 2]}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(template / "three.parquet")
    with zipfile.ZipFile(template / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((template / "photos").rglob("*.*")):
            archive.write(path, path.relative_to(template))


def _images():
    from common import tiny_images

    return tiny_images()


@contextlib.contextmanager
def world(template):
    """A fresh copy of the template, as the working directory and as the place beside the scripts."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary, "world")
        shutil.copytree(template, folder)
        image_data.ROOT, image_data.CACHE = folder / "project", Path(temporary, "cache")
        row = dataclasses.replace(image_data.DATASETS["fashion_mnist"], folders=("data/fashion_mnist",))
        image_data.DATASETS["fashion_mnist"] = row
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir("/")


def no_network(url):
    raise utils.UserError(f"no network (cannot reach {url})")


TINY = [
    "--image-size",
    8,
    "--width",
    8,
    "--mults",
    1,
    "--batch-size",
    4,
    "--timesteps",
    10,
    "--epochs",
    0.1,
    "--sample-every",
    0,
    "--precision",
    "float32",
    "--device",
    "cpu",
]
SAMPLE = ["--n", 2, "--steps", 2, "--device", "cpu"]
names = st.sampled_from(list(SCRIPTS))


def cases(template):
    """name: (share of the cases, a function of hypothesis's data that runs one case in a fresh world)."""

    def files(name):
        return (template / name).read_bytes()

    def train(data):
        script = data.draw(names)
        check("train", SCRIPTS[script], ["train", "--data", "idx", *TINY, "--out", "out/run", *data.draw(train_flags)])

    def resume(data):
        """--resume on a folder with a mangled state: truncated, flipped, or with the checksum of what it now is."""
        shutil.copytree("classes", "out/run")
        paths = sorted(Path("out/run").glob("state_*.pt"))
        path = data.draw(st.sampled_from(paths))
        bad = data.draw(mangled(path.read_bytes()))
        good_name = data.draw(st.booleans())
        if good_name:
            path.unlink()
            path = path.with_name(f"state_00000009_{hashlib.sha256(bad).hexdigest()[:16]}.pt")
        path.write_bytes(bad)
        for other in paths if data.draw(st.booleans()) else []:
            other.unlink(missing_ok=True)
        outside = contents(Path("out/run"))

        def work(argv):
            training.train(tiny_config(3), _images(), "out/run", resume=True, device="cpu")

        code = _check_resume(work)
        if code:
            assert {p: h for p, h in contents(Path("out/run")).items() if p in outside} == outside

    def _check_resume(work):
        # a mangled state may stay where it is: it is known by its checksum, and not an output of this command
        global unreadable
        kept, unreadable = unreadable, lambda folder: []
        try:
            return check("resume", work, [])
        finally:
            unreadable = kept

    def sample(data):
        script = data.draw(names)
        first = ["sample", "--checkpoint", data.draw(st.sampled_from(["plain", "classes"])) + "/model.safetensors"]
        check("sample", SCRIPTS[script], [*first, *SAMPLE, "--out", "out/x.npz", *data.draw(sample_flags)])

    def publish(data):
        check(
            "publish", ddpm.main, ["publish", "--run", "plain", "--out", "out/x.safetensors", *data.draw(publish_flags)]
        )

    def sweep_and_grid(data):
        if data.draw(st.booleans()):
            argv = ["sweep", "--checkpoint", "plain/model.safetensors", "--out", "out/x.json", *data.draw(sweep_flags)]
            check("sweep", ddpm_conditional.main, argv)
        else:
            argv = ["grid", "--out", "out/grid", *data.draw(grid_flags), "--only", data.draw(texts)]
            check("grid", ddpm_unconditional.main, argv)

    def evaluation(data):
        command = data.draw(st.sampled_from(["samples", "noise-error", "likelihood", "", "train-features", "sanity"]))
        first = {
            "samples": ["samples.npz", "--data", "fashion_mnist"],
            "": ["samples.npz", "--data", "idx"],
            "train-features": ["nowhere"],
            "sanity": ["--data", "nowhere"],
        }.get(command, ["plain/model.safetensors", "--data", "idx", "--n", 4])
        check("evaluate", evaluate.main, [*([command] if command else []), *first, *data.draw(evaluate_flags)])

    def words(data):
        """Anything at all, for every script."""
        main = data.draw(st.sampled_from([*SCRIPTS.values(), evaluate.main, download_datasets.main]))
        some = st.sampled_from(
            [
                "train",
                "sample",
                "publish",
                "grid",
                "sweep",
                "--help",
                "-h",
                "--out",
                "--data",
                "idx",
                "--n",
                "fashion_mnist",
                "cifar10",
                "landscapes",
                "checkpoints",
                "--from",
                "photos.zip",
                "--",
                "-",
            ]
        )
        check("words", main, data.draw(st.lists(st.one_of(some, texts), max_size=6)))

    def samples_file(data):
        Path("x.npz").write_bytes(data.draw(mangled(files("samples.npz"))))
        check("npz", evaluate.main, ["x.npz", "--data", "fashion_mnist", "--bootstrap", 0])

    def strange_samples(data):
        """A readable .npz with arrays that are no images."""
        shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
        kind = data.draw(st.sampled_from(["uint8", "int64", "float32", "bool", "complex64", "U3", "datetime64[s]"]))
        arrays = {"images": np.zeros(shape, kind)}
        if data.draw(st.booleans()):
            arrays["labels"] = np.zeros(data.draw(st.lists(st.integers(0, 5), max_size=2)), kind)
        np.savez("x.npz", **arrays)
        check("npz", evaluate.main, ["x.npz", "--data", "fashion_mnist", "--bootstrap", 0])

    def checkpoint_file(data):
        name = data.draw(st.sampled_from(["plain/model.safetensors", "classes/model.safetensors", "course.pt"]))
        path = Path(f"x{Path(name).suffix}")
        path.write_bytes(data.draw(mangled(files(name))))
        out = data.draw(st.sampled_from(["out/x.png", "out/x.npz", "out/x.gif"]))
        check(
            path.suffix[1:],
            ddpm_conditional.main,
            ["sample", "--checkpoint", path, *SAMPLE, "--n", 1, "--steps", 1, "--out", out],
        )

    json_values = st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-2, 70),
            st.floats(),
            st.text(max_size=5),
            st.just("PatchUNet"),
            st.just("UNet"),
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
        max_leaves=5,
    )

    def strange_configuration(data):
        """A readable .safetensors whose configuration asks for something else."""
        tensors, config = read_checkpoint("classes/model.safetensors")
        for _ in range(data.draw(st.integers(1, 3))):
            section = data.draw(st.sampled_from(["model", "diffusion", "data", "train"]))
            value = data.draw(json_values)
            if data.draw(st.booleans()) and isinstance(config.get(section), dict):
                key = data.draw(
                    st.one_of(
                        st.sampled_from([*config[section], "depth", "patch", "block", "time_dim"]), st.text(max_size=5)
                    )
                )
                config[section][key] = value
            else:
                config[section] = value
        for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2)):
            shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
            tensors[name] = torch.zeros(
                shape, dtype=data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]))
            )
        save_file(tensors, "x.safetensors", {"config": json.dumps(config)})
        check(
            "safetensors",
            ddpm_conditional.main,
            ["sample", "--checkpoint", "x.safetensors", *SAMPLE, "--n", 1, "--steps", 1, "--out", "out/x.png"],
        )

    def idx_file(data):
        path = Path("idx") / data.draw(st.sampled_from(["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]))
        bad = data.draw(mangled(path.read_bytes()))
        if data.draw(st.booleans()):  # mangled before or after it is compressed
            bad = data.draw(st.sampled_from([gzip.compress(bad), data.draw(mangled(gzip.compress(path.read_bytes())))]))
            path.unlink()
            path = path.with_name(f"{path.name}.gz")
        path.write_bytes(bad)
        if data.draw(st.booleans()):
            check("idx", ddpm.main, ["train", "--data", "idx", *TINY, "--epochs", 0.01, "--out", "out/run"])
        else:
            check("idx", download_datasets.main, ["fashion_mnist", "--from", "idx"])

    def parquet_file(data):
        Path("parquet").mkdir()
        Path("parquet/train.parquet").write_bytes(data.draw(mangled(files("three.parquet"))))
        Path("parquet/test.parquet").write_bytes(files("three.parquet"))
        if data.draw(st.booleans()):
            check("parquet", ddpm.main, ["train", "--data", "parquet", *TINY, "--out", "out/run"])
        else:
            check("parquet", download_datasets.main, ["fashion_mnist", "--from", "parquet"])

    def picture_file(data):
        """A mangled PNG, JPEG or GIF among good pictures, or nothing but that one."""
        path = data.draw(st.sampled_from(sorted(Path("photos").rglob("*.*"))))
        path.write_bytes(data.draw(mangled(path.read_bytes())))
        if data.draw(st.booleans()):
            for other in set(path.parent.iterdir()) - {path}:
                other.unlink()
        if data.draw(st.booleans()):
            check(
                "picture",
                ddpm_conditional.main,
                ["train", "--data", "photos", *TINY, "--epochs", 0.01, "--out", "out/run"],
            )
        else:
            check("picture", download_datasets.main, ["cifar10", "--from", "photos"])

    def archive_file(data):
        name = data.draw(st.sampled_from(["cifar10", "landscapes", "cifar10-64", "fashion_mnist", "checkpoints"]))
        Path("x.zip").write_bytes(data.draw(mangled(files("photos.zip"))))
        check("zip", download_datasets.main, [name, "--from", "x.zip"])

    def strange_archive(data):
        """A readable zip archive whose members have strange names, links among them."""
        member = st.one_of(
            st.sampled_from(
                [
                    "../evil.png",
                    "/evil.png",
                    "a/../../evil.png",
                    "..\\evil.png",
                    "C:\\evil.png",
                    "a/b.png",
                    "a",
                    "a/",
                    "a/b/c.png",
                    "train/x/1.png",
                    "test/x/1.png",
                    "test/y/1.png",
                    ".hidden/1.png",
                    "__MACOSX/1.png",
                    "a//b.png",
                    "./1.png",
                    300 * "a" + ".png",
                    "ünï/1.png",
                    "",
                ]
            ),
            texts,
        )
        with contextlib.suppress(ValueError, OSError), zipfile.ZipFile("x.zip", "w") as archive:
            for name in data.draw(st.lists(member, max_size=4)):
                info = zipfile.ZipInfo("x")
                info.filename = name
                info.external_attr = data.draw(st.sampled_from([0, 0o100644, 0o120777, 0o020666, 0o040755])) << 16
                archive.writestr(info, data.draw(st.sampled_from([files("flat/0.png"), b"", b"/etc/passwd", b"text"])))
        name = data.draw(st.sampled_from(["cifar10", "landscapes", "cifar10-64"]))
        check("zip", download_datasets.main, [name, "--from", "x.zip"])

    return {
        "train": (5, train),
        "sample": (4, sample),
        "publish": (2, publish),
        "sweep and grid": (2, sweep_and_grid),
        "evaluate": (2, evaluation),
        "words": (2, words),
        "checkpoint file": (3, checkpoint_file),
        "strange configuration": (3, strange_configuration),
        "samples file": (2, samples_file),
        "strange samples": (1, strange_samples),
        "idx file": (2, idx_file),
        "parquet file": (1, parquet_file),
        "picture file": (2, picture_file),
        "archive file": (2, archive_file),
        "strange archive": (2, strange_archive),
        "resume": (1, resume),
    }


def fuzz(template, case, examples, seed):
    """Run `case` in that many fresh worlds; the first failure is made as small as possible, and raised."""

    @hypothesis_seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(st.data())
    def run(data):
        with world(template):
            case(data)

    run()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2400, help="how many, about (default: 2400)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: 0)")
    parser.add_argument("--only", nargs="+", help="these kinds of cases only; nothing is recorded")
    args = parser.parse_args()
    signal.signal(signal.SIGPROF, out_of_time)
    # what asks for too much memory is to be told so, and not to take the machine down
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, resource.RLIM_INFINITY))
    download_datasets.require_network = no_network
    random.seed(args.seed)
    began, failures = time.process_time(), []
    with tempfile.TemporaryDirectory() as temporary:
        template = Path(temporary, "template")
        build(template)
        kinds = cases(template)
        shares = sum(share for share, _ in kinds.values())
        for name, (share, case) in kinds.items():
            if args.only and name not in args.only:
                continue

            share_of_cases = max(1, -(-args.cases * share // shares))
            total, start = sum(counts.values()), time.process_time()
            try:
                fuzz(template, case, share_of_cases, args.seed)
            except (Exception, Hang) as error:
                traceback.print_exc()
                failures.append(f"{name}: {error}")
            made = (sum(counts.values()) - total) // 2
            print(
                f"{name}: {made} cases, {time.process_time() - start:.0f} s, {dict(counts)}",
                file=sys.stderr,
                flush=True,
            )
    cases_made = counts["accepted"] + counts["refused"]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not args.only:
        by_input = {name: n for name, n in sorted(counts.items()) if name not in ("accepted", "refused")}
        record(
            "fuzz",
            {
                "cases": cases_made,
                "accepted": counts["accepted"],
                "refused_with_one_line": counts["refused"],
                "tracebacks_hangs_half_written_or_outside": len(failures),
                "cases_by_command_or_input": by_input,
                "seed": args.seed,
                "processor_minutes": round((time.process_time() - began) / 60, 1),
            },
        )
    return failures


if __name__ == "__main__":
    sys.exit(bool(main()))
