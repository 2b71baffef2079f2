"""Throw strange flags and malformed files at every command.

Nothing may end in a traceback, a hang, a half-written output or a file outside of its folder.

    python tests/stress/fuzz.py [--cases 2400] [--seed 0] [--only NAME ...]

Hypothesis makes the cases, all in this one process. Each runs a script's main() as the script itself does, in a folder
of its own, with a limit on processor time and on memory. A command must end with exit status 0, or with 2 and one line.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
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
from common import record, tiny_config, tiny_images, unreadable
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
SCRIPTS = [ddpm.main, ddpm_unconditional.main, ddpm_conditional.main]
counts: collections.Counter = collections.Counter()


class Hang(BaseException):
    """Not an Exception, so that no command can catch it."""


# --- running one case ----------------------------------------------------------------------------------------------


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
        image_data.load_samples(path)
    elif path.suffix in (".png", ".gif"):
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".json":
        json.loads(path.read_text())


def check(area, main, argv, damaged=False):
    """Run main(argv) in this folder, whose sub-folder out/ is for outputs and project/ for what is downloaded.

    `damaged` says that out/ holds unreadable files already, which may stay.
    """
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
        assert damaged or not unreadable(folder), f"{shown} left unreadable files in {folder}"
    for entry in (world / "project").iterdir():
        assert "-download-" not in entry.name, f"{shown} left {entry}"
    counts[area] += 1
    counts["refused" if code else "accepted"] += 1
    return code


# --- what is thrown ------------------------------------------------------------------------------------------------


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


def flags(switches, table):
    """Up to five flags, in any order, twice if it comes to that; now and then written --flag=value or without a value.

    `table` is flag -> its values: words in a string, a strategy, or a tuple of these.
    """
    each = [st.sampled_from(switches.split()).map(lambda switch: [switch])]
    for name, values in table.items():
        for value in values if isinstance(values, tuple) else (values,):
            value = st.sampled_from([*value.split(), ""]) if isinstance(value, str) else value
            each.append(value.map(lambda v, name=name: [name, *v] if isinstance(v, list) else [name, v]))
            each.append(value.map(lambda v, name=name: [f"{name}={v}"]))
        each.append(st.just([name]))
    return st.lists(st.one_of(*each), max_size=5).map(lambda lists: [word for words in lists for word in words])


def several(values, most=3):
    """What a flag that takes several values gets: none to `most` of these words."""
    return st.lists(st.sampled_from(values.split()), max_size=most)


out_names = st.one_of(
    st.sampled_from(["", "out/" + 300 * "a" + ".png", "out/" + 120 * "ü" + ".png", "out/ü \n.npz"]),
    st.sampled_from("out/x.png out/x.gif out/x.npz out/x.json out/x.safetensors out out/a/b/c.png out/x".split()),
    st.sampled_from("out/x.PNG out/../out/y.npz /dev/null /dev/full /proc/x.png out/.png . out/-.gif".split()),
    st.just("photos/dogs/0.png/x.gif"),
    texts.map(lambda t: f"out/{t.replace('/', '_')}.png"),
)
CHECKPOINTS = (
    "plain classes STATE plain/model.safetensors classes/model.safetensors course.pt nowhere.pt plain/config.json"
)
DEVICE = ("cpu auto cuda mps meta cuda:9 cpu:0 xla vulkan", texts)
WEIGHTS = "raw ema ema_0.5 ema_0.9 losses x"

# Counts that only ask for more work than a test has time for (a million images, say) are not tried: they are no errors.
TRAIN_TABLE = {
    "--data": ("idx photos flat empty nowhere idx/train-labels-idx1-ubyte .", texts),
    "--image-size": ("1 2 3 4 5 8 9 12 0 -8 10000000", texts),
    "--channels": ("1 3 0 2 -1 x", texts),
    "--schedule": (" ".join(ddpm.SCHEDULES), texts),
    "--timesteps": numbers,
    "--timestep-sampling": (" ".join(training.TIMESTEP_SAMPLING), texts),
    "--loss": (" ".join(ddpm.LOSSES), texts),
    "--objective": (" ".join(ddpm.OBJECTIVES), texts),
    "--epochs": "0.01 0.1 0.3 1e-9 0 -1 nan inf 1e30",
    "--minutes": "0 -1 nan inf 1e-9 one",
    "--batch-size": f"1 2 3 7 16 40 0 -1 {10**30} x",
    "--lr": numbers,
    "--cooldown": numbers,
    "--optimizer": (" ".join(training.OPTIMIZERS), texts),
    "--seed": numbers,
    "--model": ("patch course", texts),
    "--width": ("1 2 3 4 5 8 12 33 0 -4 1000000000", texts),
    "--mults": several("1 2 3 0 -1 1000 x", 4),
    "--depth": "1 2 0 -1 1000000000 x",
    "--patch": "1 2 3 0 64 65 x",
    "--block": ("resnet convnext", texts),
    "--ema-beta": several("0 0.5 0.9 0.999999 1 -1 nan x"),
    "--ema-start": numbers,
    "--p-uncond": numbers,
    "--label-dropout": ("example batch", texts),
    "--precision": ("float32", texts),
    "--accumulate": f"1 2 3 4 0 -1 {10**30} x",
    "--sample-every": "0 1 2 -1 x",
    "--device": DEVICE,
    "--init": f"{CHECKPOINTS} idx",
    "--out": "out/run out/plain out/classes idx/train-labels-idx1-ubyte/x /dev/null /proc/run",
}
train_flags = flags("--flip --no-flip --attention --no-attention --resume --help", TRAIN_TABLE)
sample_flags = flags(
    "--clip --no-clip --ema --no-ema --help x --",
    {
        "--checkpoint": (f"{CHECKPOINTS} idx/train-labels-idx1-ubyte", texts),
        "--n": "1 2 3 5 10 0 -1 1.5 x １",
        "--image-size": "8 16 12 9 0 -1 x",
        "--sampler": (" ".join(ddpm.SAMPLERS), texts),
        "--steps": f"1 2 3 10 11 0 -1 {10**30} x",
        "--eta": numbers,
        "--variance": ("posterior beta", texts),
        "--cfg-scale": numbers,
        "--cfg-interval": several("0 0.2 0.5 1 2 19 20 -1 nan inf x"),
        "--start-from": ("flat/0.png photos/dogs/0.png photos flat idx samples.npz empty nowhere.png .", texts),
        "--strength": numbers,
        "--seed": numbers,
        "--device": DEVICE,
        "--labels": (f"all none 0 1,0 -1 9 10 0, , a b a,b b,0 A a,x {5000 * '1'}", st.just("a, b"), texts),
        "--batch-size": f"1 2 250 0 -1 {10**30}",
        "--out": out_names,
    },
)
publish_flags = flags(
    "--help",
    {"--run": ("plain classes out/run empty nowhere STATE", texts), "--weights": several(WEIGHTS), "--out": out_names},
)
sweep_flags = flags(
    "--help",
    {
        "--checkpoint": CHECKPOINTS,
        "--scales": numbers,
        "--n": "0 100 -1 x",
        "--steps": f"0 20 {10**30}",
        "--sampler": (" ".join(ddpm.SAMPLERS), texts),
        "--data": ("fashion_mnist cifar10 nowhere/cifar10", texts),
        "--seed": numbers,
        "--weights": "raw ema x",
        "--device": DEVICE,
        "--out": out_names,
    },
)
grid_table = TRAIN_TABLE | {"--only": texts, "--out": "out/grid /dev/null", "--n": numbers}
grid_flags = flags("--flip --no-flip --resume --help", grid_table)
evaluate_flags = flags(
    "--help",
    {
        "--data": ("fashion_mnist cifar10 idx nowhere", texts),
        "--device": DEVICE,
        "--features": ("fashion_mnist nowhere", texts),
        "--bootstrap": "0 1 5 -1 x",
        "--seed": numbers,
        "--json-out": out_names.map(lambda name: re.sub(r"(png|gif|npz)$", "json", name)),
        "--n": "1 2 8 0 -1 x",
        "--weights": "raw ema ema_0.5 x",
        "--batch-size": "1 5 0 -1",
    },
)


# --- the world in which a case runs --------------------------------------------------------------------------------


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
    training.train(tiny_config(2), tiny_images(), template / "classes", device="cpu")
    plain = tiny_config(2)
    plain["model"].pop("num_classes")
    training.train(plain, tiny_images(), template / "plain", device="cpu")
    weights = build_model({"name": "UNet_conditional", "channels": 1, "width": 4, "num_classes": 3}).state_dict()
    torch.save(weights, template / "course.pt")
    samples = torch.from_numpy(rng.integers(0, 256, (8, 1, 28, 28)).astype(np.uint8))
    image_data.save_samples(template / "samples.npz", samples, np.arange(8))
    import datasets

    rows = {"image": [{"bytes": (template / "flat/0.png").read_bytes(), "path": None}] * 3, "label": [0, 1, 2]}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.disable_progress_bars()
    (template / "parquet").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(template / f"parquet/{split}.parquet")
    with zipfile.ZipFile(template / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((template / "photos").rglob("*.*")):
            archive.write(path, path.relative_to(template))
    shutil.copytree(template / "idx", template / "gzip")
    for path in (template / "gzip").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (template / "lone").mkdir()
    shutil.copy(template / "flat/0.png", template / "lone")


@contextlib.contextmanager
def world(template):
    """A fresh copy of the template, as the working directory and as the place beside the scripts."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary, "world")
        shutil.copytree(template, folder)
        image_data.ROOT = utils.ROOT = folder / "project"
        image_data.CACHE = Path(temporary, "cache")
        row = dataclasses.replace(
            image_data.DATASETS["fashion_mnist"], folders=("data/fashion_mnist", str(folder / "no debian"))
        )
        image_data.DATASETS["fashion_mnist"] = row
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir("/")


def no_network(url):
    raise utils.UserError(f"no network (cannot reach {url})")


# --- the cases ------------------------------------------------------------------------------------------------------

TINY = (
    "--image-size 8 --width 8 --mults 1 --batch-size 4 --timesteps 10 --epochs 0.1 --sample-every 0 --precision float32"
)
TRAIN = f"train {TINY} --device cpu --out out/run"
SAMPLE = "sample --n 2 --steps 2 --device cpu"
MEASURE = "plain/model.safetensors --data idx --n 4"
UNPACK = [(download_datasets.main, f"{n} --from photos.zip") for n in [*image_data.DATASETS, "checkpoints"]]

# name: (share of the cases, commands of which one is drawn, the flags that are added to it)
COMMANDS = {
    "train": (5, [(main, f"{TRAIN} --data idx") for main in SCRIPTS], train_flags),
    "sample": (
        4,
        [
            (main, f"{SAMPLE} --out out/x.npz --checkpoint {name}")
            for main in SCRIPTS
            for name in ("plain", "classes/model.safetensors")
        ],
        sample_flags,
    ),
    "publish": (2, [(ddpm.main, "publish --run plain --out out/x.safetensors")], publish_flags),
    "sweep": (1, [(ddpm_conditional.main, "sweep --checkpoint plain/model.safetensors --out out/x.json")], sweep_flags),
    "grid": (
        1,
        [(ddpm_unconditional.main, "grid --out out/grid")],
        st.tuples(grid_flags, texts).map(lambda d: [*d[0], "--only", d[1]]),
    ),
    "evaluate": (
        2,
        [
            (evaluate.main, line)
            for line in (
                "samples samples.npz --data fashion_mnist",
                "samples.npz --data idx",
                "samples photos --data idx",
                f"noise-error {MEASURE}",
                f"likelihood {MEASURE}",
                "train-features nowhere",
            )
        ],
        evaluate_flags,
    ),
    "words": (
        2,
        [(main, "") for main in [*SCRIPTS, evaluate.main, download_datasets.main]],
        st.lists(
            st.one_of(
                st.sampled_from(
                    "train sample publish grid sweep --help -h --out --data idx --n fashion_mnist cifar10".split()
                ),
                st.sampled_from("landscapes checkpoints --from photos.zip -- -".split()),
                texts,
            ),
            max_size=6,
        ),
    ),
}

# name: (share of the cases, which files are mangled, commands of which one then reads them; FILE is the mangled one)
FILES = {
    "npz": (2, "samples.npz", [(evaluate.main, "samples.npz --data fashion_mnist --bootstrap 0")]),
    "checkpoint": (
        3,
        "[pc]*/model.safetensors",
        [
            (ddpm_conditional.main, f"{SAMPLE} --checkpoint FILE --out out/x.{suffix}")
            for suffix in ("png", "npz", "gif")
        ],
    ),
    "pt": (1, "course.pt", [(ddpm_conditional.main, f"{SAMPLE} --checkpoint FILE --out out/x.png")]),
    "state": (
        1,
        "classes/state_*.pt",
        [(ddpm_conditional.main, f"{SAMPLE} --checkpoint {name} --out out/x.png") for name in ("classes", "FILE")],
    ),
    "idx": (
        1,
        "idx/train-*",
        [(ddpm.main, f"{TRAIN} --data idx"), (download_datasets.main, "fashion_mnist --from idx")],
    ),
    "gzip": (
        1,
        "gzip/train-*",
        [(ddpm.main, f"{TRAIN} --data gzip"), (download_datasets.main, "fashion_mnist --from gzip")],
    ),
    "parquet": (
        1,
        "parquet/train.parquet",
        [(ddpm.main, f"{TRAIN} --data parquet"), (download_datasets.main, "fashion_mnist --from parquet")],
    ),
    "picture": (
        2,
        "photos/*/*",
        [(ddpm_conditional.main, f"{TRAIN} --data photos"), (download_datasets.main, "cifar10 --from photos")],
    ),
    "lone": (
        1,
        "lone/*",
        [
            (ddpm.main, f"{TRAIN} --data lone"),
            (ddpm.main, f"{SAMPLE} --checkpoint plain --out out/x.png --start-from FILE"),
        ],
    ),
    "zip": (2, "photos.zip", UNPACK),
}


def run_command(area, commands, more_flags, data):
    main, line = data.draw(st.sampled_from(commands))
    state = str(next(Path("classes").glob("state_*.pt")))
    check(area, main, [str(word).replace("STATE", state) for word in [*line.split(), *data.draw(more_flags)]])


def mangle_file(area, pattern, commands, data):
    path = data.draw(st.sampled_from(sorted(Path().glob(pattern))))
    path.write_bytes(data.draw(mangled(path.read_bytes())))
    main, line = data.draw(st.sampled_from(commands))
    check(area, main, [word.replace("FILE", str(path)) for word in line.split()])


def resume(data):
    """--resume on a folder with a mangled state: truncated, flipped, or with the checksum of what it now is."""
    shutil.copytree("classes", "out/run")
    paths = sorted(Path("out/run").glob("state_*.pt"))
    path = data.draw(st.sampled_from(paths))
    bad = data.draw(mangled(path.read_bytes()))
    if data.draw(st.booleans()):
        path.unlink()
        path = path.with_name(f"state_00000009_{hashlib.sha256(bad).hexdigest()[:16]}.pt")
    path.write_bytes(bad)
    for other in paths if data.draw(st.booleans()) else []:
        other.unlink(missing_ok=True)
    before = contents(Path("out/run"))

    def work(argv):
        training.train(tiny_config(3), tiny_images(), "out/run", resume=True, device="cpu")

    if check("resume", work, [], damaged=True):
        assert {p: h for p, h in contents(Path("out/run")).items() if p in before} == before


def strange_samples(data):
    """A readable .npz with arrays that are no images."""
    shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
    kind = data.draw(st.sampled_from(["uint8", "int64", "float32", "bool", "complex64", "U3", "datetime64[s]"]))
    arrays = {data.draw(st.sampled_from(["images", "arr_0", "x"])): np.zeros(shape, kind)}
    if data.draw(st.booleans()):
        arrays["labels"] = np.zeros(data.draw(st.lists(st.integers(0, 5), max_size=2)), kind)
    np.savez("x.npz", **arrays)
    check("npz", evaluate.main, "x.npz --data fashion_mnist --bootstrap 0".split())


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 70), st.floats(), st.text(max_size=5), st.just("PatchUNet")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
SETTINGS = ["depth", "patch", "block", "time_dim"]


def strange_configuration(data):
    """A readable .safetensors whose configuration asks for something else."""
    tensors, config = read_checkpoint("classes/model.safetensors")
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(["model", "diffusion", "data", "train"]))
        value = data.draw(json_values)
        if data.draw(st.booleans()) and isinstance(config.get(section), dict):
            key = data.draw(st.one_of(st.sampled_from([*config[section], *SETTINGS]), st.text(max_size=5)))
            config[section][key] = value
        else:
            config[section] = value
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2)):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
        kind = data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]))
        tensors[name] = torch.zeros(shape, dtype=kind)
    save_file(tensors, "x.safetensors", {"config": json.dumps(config)})
    check("safetensors", ddpm_conditional.main, f"{SAMPLE} --checkpoint x.safetensors --out out/x.png".split())


MEMBERS = (
    r"../evil.png /evil.png a/../../evil.png ..\evil.png C:\evil.png a/b.png a a/ a/b/c.png train/x/1.png test/x/1.png"
)
MEMBERS += " test/y/1.png .hidden/1.png __MACOSX/1.png a//b.png ./1.png ünï/1.png " + 300 * "a" + ".png"


def strange_archive(data):
    """A readable zip archive whose members have strange names, links among them."""
    member = st.one_of(st.sampled_from([*MEMBERS.split(), ""]), texts)
    picture = Path("flat/0.png").read_bytes()
    with contextlib.suppress(ValueError, OSError), zipfile.ZipFile("photos.zip", "w") as archive:
        for name in data.draw(st.lists(member, max_size=4)):
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.external_attr = data.draw(st.sampled_from([0, 0o100644, 0o120777, 0o020666, 0o040755])) << 16
            archive.writestr(info, data.draw(st.sampled_from([picture, b"", b"/etc/passwd", b"text"])))
    run_command("zip", UNPACK, st.just([]), data)


# name: (share of the cases, a function of hypothesis's data that runs one case in a fresh world)
CASES = {
    **{n: (share, functools.partial(run_command, n, *row)) for n, (share, *row) in COMMANDS.items()},
    **{f"{n} file": (share, functools.partial(mangle_file, n, *row)) for n, (share, *row) in FILES.items()},
    "strange configuration": (3, strange_configuration),
    "strange samples": (1, strange_samples),
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
    parser.add_argument(
        "--only", nargs="+", choices=CASES, metavar="NAME", help="these kinds of cases only; nothing is recorded"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGPROF, out_of_time)
    # what asks for too much memory is to be told so, and not to take the machine down
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, resource.RLIM_INFINITY))
    download_datasets.require_network = no_network
    random.seed(args.seed)
    began, failures = time.process_time(), []
    with tempfile.TemporaryDirectory() as temporary:
        template = Path(temporary, "template")
        build(template)
        shares = sum(share for share, _ in CASES.values())
        for name, (share, case) in CASES.items():
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
