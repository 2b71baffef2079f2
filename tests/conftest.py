"""What the tests share: the project on the path, one thread, tiny data, tiny runs, and bad input's one line."""

import dataclasses
import hashlib
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

import image_data

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)  # the networks here are too small for two, and one is the same on every machine
# derandomize: every run of the suite tries the same examples
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Decoded images go to a temporary folder, and notices that are said once are said again in each test."""
    import utils

    monkeypatch.setattr(image_data, "CACHE", tmp_path_factory.mktemp("cache"))
    utils.say.cache_clear()


def move_fashion_mnist(monkeypatch, folder):
    """Debian's copy of Fashion-MNIST is looked for in `folder`."""
    row = image_data.DATASETS["fashion_mnist"]
    folders = ("data/fashion_mnist", str(folder))
    monkeypatch.setitem(image_data.DATASETS, "fashion_mnist", dataclasses.replace(row, folders=folders))


def write_idx(path, array):
    """An IDX file of unsigned bytes."""
    array = np.asarray(array, np.uint8)
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """A folder laid out as Fashion-MNIST's: 64 training and 16 test images of noise; the class is the brightness."""
    folder, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for prefix, count in (("train", 64), ("t10k", 16)):
        labels = np.arange(count) % 10
        images = 20 * labels[:, None, None] + rng.integers(0, 50, (count, 28, 28))
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture(scope="session")
def tiny_data():
    """40 images of 8 x 8 in two classes: the left or the right half is bright."""
    from image_data import ImageData

    rng = np.random.default_rng(0)
    labels = torch.arange(40) % 2
    images = torch.from_numpy(rng.integers(0, 60, (40, 1, 8, 8)).astype(np.uint8))
    for image, label in zip(images, labels, strict=True):
        image[0, :, 4 * label : 4 * label + 4] += 180
    return ImageData(images, labels, ["left", "right"], "halves", flip=False, image_size=8)


def tiny_config(**train):
    """The configuration of a run that takes a fraction of a second; `train` overrides its settings."""
    settings = {"loss": "huber", "steps": 12, "batch_size": 8, "lr": 1e-3, "optimizer": "adam", "seed": 0}
    settings |= {"precision": "float32", "ema_betas": [0.5, 0.9], "ema_start": 2}
    settings |= {"p_uncond": 0.2, "label_dropout": "example"}
    return {
        "model": {"name": "PatchUNet", "channels": 1, "width": 8, "num_classes": 2},
        "diffusion": {"timesteps": 20, "schedule": "cosine", "objective": "simple"},
        "data": {"name": "halves", "image_size": 8, "flip": False, "images": 40, "classes": ["left", "right"]},
        "train": settings | train,
    }


@pytest.fixture(scope="session")
def finished(tiny_data, tmp_path_factory):
    """The folder of a run of 12 steps that nothing interrupted: to read only."""
    from training import train

    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config(), tiny_data, folder)
    return folder


def randomise(model, scale=0.05):
    """Weights as the course's reference file wants them; no layer stays zero and hides what is before it."""
    rng = np.random.RandomState(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            value = scale * rng.standard_normal(tuple(p.shape))
            p.copy_(torch.from_numpy(value + (p.ndim == 1 and name.endswith(".weight"))))
    return model.eval()


@pytest.fixture
def refused(capsys):
    """refused(main, *argv): the command ends with exit status 2 and one clear line, no traceback; returns the line."""
    from utils import command_line

    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            command_line(lambda: main([str(a) for a in argv]))
        err = capsys.readouterr().err
        assert exit.value.code == 2, err
        assert "Traceback" not in err
        errors = re.findall(r"^.*\berror: .*$", err, re.MULTILINE)
        assert len(errors) == 1 and err.endswith(errors[0] + "\n"), err
        return errors[0]

    return run


@pytest.fixture(scope="session")
def fuzz_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def picture(path, size=(32, 32), seed=0, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return pixels


def class_folder(root, counts, size=(32, 32)):
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / name / f"{i:03}.png", size, seed=1000 * label + i)
    return root


def mutations(content):
    """Byte strings near `content`: cut, with bytes changed, or with some inserted."""
    position = st.integers(0, len(content) - 1)
    cut = position.map(lambda i: content[:i])
    changed = st.tuples(position, st.integers(0, 255)).map(
        lambda c: content[: c[0]] + bytes([c[1]]) + content[c[0] + 1 :]
    )
    inserted = st.tuples(position, st.binary(max_size=20)).map(lambda c: content[: c[0]] + c[1] + content[c[0] :])
    return st.one_of(cut, changed, inserted, st.binary(max_size=100))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_cifar_batches(folder, monkeypatch):
    """Ten 32 x 32 images in torchvision's layout, whose checksums torchvision then expects."""
    folder.mkdir()
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    rng, md5 = np.random.default_rng(0), {}
    contents = {"batches.meta": {"label_names": classes}}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        contents[name] = {"data": rng.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[name, md5[name]] for name in md5 if name.startswith("data")])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5["batches.meta"]})
    return contents
