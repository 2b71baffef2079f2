"""What the tests share: the project on the path, one thread, tiny data, tiny runs, and bad input's one line."""

import dataclasses
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

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
    """A folder laid out as Fashion-MNIST's, with 64 training and 16 test images of noise; the class is the brightness."""
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
    return {
        "model": {"name": "PatchUNet", "channels": 1, "width": 8, "num_classes": 2},
        "diffusion": {"timesteps": 20, "schedule": "cosine", "objective": "simple"},
        "data": {"name": "halves", "image_size": 8, "flip": False, "images": 40, "classes": ["left", "right"]},
        "train": {
            "loss": "huber",
            "steps": 12,
            "batch_size": 8,
            "lr": 1e-3,
            "optimizer": "adam",
            "seed": 0,
            "precision": "float32",
            "ema_betas": [0.5, 0.9],
            "ema_start": 2,
            "p_uncond": 0.2,
            "label_dropout": "example",
        }
        | train,
    }


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
