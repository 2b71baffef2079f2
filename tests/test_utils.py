"""utils.py: errors, atomic files, seeds, data sets of every kind, augmentation, pictures, sample files."""

import contextlib
import errno
import gzip
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import move_fashion_mnist, write_idx
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

import image_data
import utils
from image_data import augment, load_data
from utils import UserError, atomic_path, generator, image_grid, load_samples, save_gif, save_samples


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


# --- errors and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("first\nsecond"), 2, "first second"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), 2, "Permission denied: /etc/x"),
        (MemoryError(), 2, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 2, "--batch-size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_expected_errors_become_one_line(error, status, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        utils.command_line(main)
    assert exit.value.code == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


@pytest.mark.skipif(os.name == "nt", reason="there a process is ended from outside without being asked")
def test_a_request_to_terminate_leaves_nothing_half_written(tmp_path):
    def main():
        with utils.atomic_path(tmp_path / "x.txt"):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    with pytest.raises(SystemExit) as exit:
        utils.command_line(main)
    assert exit.value.code == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "operation, error, said",
    [
        ("open", errno.EACCES, True),  # a folder that may be written but not read
        ("fsync", errno.EINVAL, True),
        ("fsync", errno.ENOTSUP, True),
        ("fsync", errno.EIO, None),
    ],
)
def test_systems_that_cannot_flush_go_on_with_a_notice(operation, error, said, tmp_path, monkeypatch, capsys):
    real_open = os.open

    def refuse(opened, *rest, **options):
        if operation == "open" and not os.path.isdir(opened):
            return real_open(opened, *rest, **options)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, operation, refuse)
    expected = contextlib.nullcontext() if said else pytest.raises(UserError, match=os.strerror(error))
    for _ in range(2):
        with expected, atomic_path(tmp_path / "x.txt") as temporary:
            temporary.write_text("whole")
    monkeypatch.undo()
    assert [path.read_text() for path in tmp_path.iterdir()] == (["whole"] if said else [])
    assert capsys.readouterr().err.count("power cut") == bool(said)


def test_names_may_be_as_long_as_the_file_system_permits(tmp_path):
    utils.write_json(tmp_path / ("ü" * 125 + ".json"), [])
    assert len(list(tmp_path.iterdir())) == 1


def test_every_script_starts_without_the_modules_that_only_unix_has():
    program = """
import contextlib, io, runpy, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(script, run_name="__main__")
"""
    scripts = [str(path) for path in sorted(utils.ROOT.glob("*.py"))]
    done = subprocess.run([sys.executable, "-c", program, *scripts], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bugs_keep_their_traceback():
    def main():
        raise RuntimeError("a shape does not fit")

    with pytest.raises(RuntimeError):
        utils.command_line(main)


def test_atomic_path_replaces_whole_files_only(tmp_path):
    path = tmp_path / "new" / "run.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        1 / 0
    assert path.read_text() == "one" and os.listdir(path.parent) == ["run.txt"]


def test_atomic_path_reports_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "file/below", tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="cannot write"), atomic_path(path):
            pass
    with pytest.raises(UserError, match="no space left"), atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):  # another file's fault
        open(tmp_path / "not there")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_check_writable_leaves_no_trace(tmp_path):
    utils.check_writable(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write"):
        utils.check_writable(tmp_path)


def test_arguments_are_checked_in_one_line():
    parser = utils.ArgumentParser()
    parser.add_argument("--n", type=utils.positive, default=3, help="a count")
    parser.add_argument("--lr", type=utils.number(float, 0, 1, above=True))
    assert parser.parse_args(["--n", "2", "--lr", "1"]).lr == 1 and "(default: 3)" in parser.format_help()
    for argv in (["--n", "0"], ["--n", "x"], ["--lr", "0"], ["--lr", "nan"], ["--lr", "2"], ["--what"]):
        with pytest.raises(UserError, match="see --help"):
            parser.parse_args(argv)


def test_atomic_path_keeps_the_mode_that_a_plain_file_gets(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "atomic").stat().st_mode


# --- devices, seeds, number formats -------------------------------------------------------------------------------


def test_devices():
    assert utils.pick_device("cpu").type == "cpu"
    assert utils.pick_device().type in ("cpu", "cuda", "mps")
    for name in ("abacus", "cuda:99", "xla"):
        with pytest.raises(UserError, match="no device"):
            utils.pick_device(name)


def test_equal_keys_give_equal_streams_and_others_different_ones():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 0, 0), (2**40,)]
    draws = [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert draws == [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    with pytest.raises(UserError, match="0 or more"):
        generator(-1)


def test_pixels_survive_the_model_range():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = utils.to_model(pixels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(utils.to_uint8(x), pixels)
    assert utils.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


# --- Fashion-MNIST ------------------------------------------------------------------------------------------------


@pytest.fixture
def only_the_sample(tmp_path, monkeypatch):
    """No full Fashion-MNIST anywhere, and no network."""

    def refuse(*_, **__):
        raise AssertionError("load_data must not use the network")

    move_fashion_mnist(monkeypatch, tmp_path / "nowhere")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_shipped_sample(only_the_sample, capsys, monkeypatch, tmp_path):
    sample = utils.ROOT / "data/fashion_mnist_sample"
    assert sum(file.stat().st_size for file in sample.iterdir()) < 2_000_000
    monkeypatch.setattr(image_data, "ROOT", tmp_path)  # without data/fashion_mnist
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fashion_mnist_sample").symlink_to(sample)
    train, test = load_data("fashion_mnist"), load_data("fashion_mnist", "test")
    assert len(train) >= 2000 and len(test) >= 1000
    assert train.images.shape[1:] == (1, 28, 28) and train.images.dtype == torch.uint8
    assert torch.bincount(train.labels, minlength=10).min() > 150
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]  # the known beginning of Fashion-MNIST
    assert 60 < train.images.float().mean() < 85 and not train.flip and train.image_size == 28
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "sample stands in" in err and "download_datasets.py fashion_mnist" in err


def test_full_data_is_looked_up_in_order(tmp_path, monkeypatch, idx_folder, capsys):
    monkeypatch.setattr(image_data, "ROOT", tmp_path)
    move_fashion_mnist(monkeypatch, tmp_path / "debian")
    with pytest.raises(UserError, match="download_datasets.py fashion_mnist"):
        load_data("fashion_mnist")
    (tmp_path / "debian").symlink_to(idx_folder)
    assert len(load_data("fashion_mnist")) == 64
    own = tmp_path / "data/fashion_mnist"
    own.mkdir(parents=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        write_idx(own / f"{prefix}-images-idx3-ubyte", np.zeros((count, 28, 28)))
        (own / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress((own / f"{prefix}-images-idx3-ubyte").read_bytes())
        )
        (own / f"{prefix}-images-idx3-ubyte").unlink()
        write_idx(own / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    assert len(load_data("fashion_mnist")) == 20 and len(load_data("fashion_mnist", "test")) == 10
    assert capsys.readouterr().err == ""


def test_sizes_of_fashion_mnist(idx_folder):
    plain = load_data(idx_folder).images
    padded = load_data(idx_folder, image_size=32)
    assert padded.image_size == 32 and torch.equal(padded.images[:, :, 2:30, 2:30], plain)
    assert padded.images[:, :, :2].max() == 0
    assert load_data(idx_folder, image_size=16).images.shape == (64, 1, 16, 16)
    with pytest.raises(UserError, match="image size"):
        load_data(idx_folder, image_size=0)
    with pytest.raises(UserError, match="split"):
        load_data(idx_folder, "validation")


def test_other_data_in_mnist_files_has_no_clothes(idx_folder):
    assert load_data(idx_folder).classes == [str(digit) for digit in range(10)]


@pytest.fixture
def idx_copy(tmp_path, idx_folder):
    for file in idx_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "stem, damage",
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1]),
        ("train-images-idx3-ubyte", lambda content: content[:7]),
        ("train-images-idx3-ubyte", lambda content: b""),
        ("train-images-idx3-ubyte", lambda content: b"\0\0\x0d\x03" + content[4:]),
        ("train-images-idx3-ubyte", lambda content: content + b"\0"),
        ("train-images-idx3-ubyte", lambda content: content[:8] + b"\0\0\0\x0e\0\0\0\x38" + content[16:]),  # 14 x 56
        ("train-labels-idx1-ubyte", lambda content: content[:-1] + b"\x0a"),
        ("train-labels-idx1-ubyte", lambda content: b"\0\0\x08\x01\0\0\0\x02\0\0"),
        ("train-labels-idx1-ubyte", None),
        ("train-images-idx3-ubyte", None),
    ],
)
def test_damaged_idx_files_are_named(idx_copy, stem, damage):
    path = idx_copy / stem
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(UserError, match=stem):
        load_data(idx_copy)
    assert len(load_data(idx_copy, "test")) == 16


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20],
        lambda content: b"not gzip",
        lambda content: b"",
        lambda content: content[:100] + b"\xff" * 50 + content[150:],
    ],
)
def test_damaged_gzip_is_named(idx_copy, damage):
    path = idx_copy / "train-images-idx3-ubyte"
    (idx_copy / f"{path.name}.gz").write_bytes(damage(gzip.compress(path.read_bytes())))
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        load_data(idx_copy)


@pytest.fixture(scope="session")
def fuzz_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


VALID_IDX = gzip.compress(bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28)) + bytes(range(196)) * 8)


@given(mutations(VALID_IDX))
def test_fuzzed_idx_files_load_or_are_refused(fuzz_folder, content):
    (fuzz_folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    write_idx(fuzz_folder / "train-labels-idx1-ubyte", np.zeros(2))
    try:
        assert load_data(fuzz_folder).images.shape == (2, 1, 28, 28)
    except UserError as error:
        assert "train-" in str(error)


def test_parquet(tmp_path, capsys):
    import datasets

    (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="train.parquet"):
        load_data(tmp_path)
    with pytest.raises(UserError, match="test.*parquet is missing"):
        load_data(tmp_path, "test")
    datasets.Dataset.from_dict({"text": ["no image"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match="test.parquet"):
        load_data(tmp_path, "test")
    rows = {"image": [Image.new("L", (28, 28), i) for i in range(3)], "label": [0, 9, 4]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    data = load_data(tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2] and data.labels.tolist() == [0, 9, 4]


# --- folders of images --------------------------------------------------------------------------------------------


def test_class_folders_with_splits(tmp_path):
    class_folder(tmp_path / "train", {"zebra": 3, "ant": 4})
    class_folder(tmp_path / "test", {"ant": 1, "zebra": 2})
    pixels = picture(tmp_path / "train/zebra/002.png", seed=77)
    (tmp_path / "train/ant/.DS_Store").write_text("hidden")
    data = load_data(tmp_path)
    assert data.classes == ["ant", "zebra"] and data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (data.name, data.image_size, data.flip, data.crop) == (tmp_path.name, 32, True, False)
    assert np.array_equal(data.images[-1].permute(1, 2, 0), pixels)
    test = load_data(tmp_path, "test")
    assert len(test) == 3 and not test.flip and not test.crop


def test_splits_with_other_classes_are_refused(tmp_path):
    """Labels are numbers: a test split that lacks a class would give the next ones other numbers."""
    class_folder(tmp_path / "train", {"cats": 2, "dogs": 2})
    class_folder(tmp_path / "test", {"dogs": 2})
    load_data(tmp_path, "train", 8)
    with pytest.raises(UserError, match="has the classes dogs, .* has cats, dogs"):
        load_data(tmp_path, "test", 8)


def test_a_tenth_is_held_out_where_there_is_no_test_folder(tmp_path):
    class_folder(tmp_path, {"a": 25, "b": 15}, size=(8, 8))
    train, test = (load_data(tmp_path, split) for split in ("train", "test"))
    assert len(train) == 36 and len(test) == 4
    assert torch.equal(test.images, load_data(tmp_path, "test").images)
    seen = {image.numpy().tobytes() for image in train.images}
    assert len(seen) == 36 and not seen & {image.numpy().tobytes() for image in test.images}
    few = class_folder(tmp_path / "few", {"a": 5})
    assert len(load_data(few)) == 5
    with pytest.raises(UserError, match="too few"):
        load_data(few, "test")


def test_both_splits_have_the_size_of_the_folders_first_image(tmp_path):
    class_folder(tmp_path, {"a": 40}, size=(60, 60))
    by_hash = sorted((f"a/{i:03}.png" for i in range(40)), key=lambda name: zlib.crc32(name.encode()))
    picture(tmp_path / min(by_hash[:4]), (20, 20))  # the test split's first
    assert {load_data(tmp_path, split).image_size for split in ("train", "test")} == {60}


def test_images_beside_class_folders_are_told(tmp_path, capsys):
    class_folder(tmp_path, {"edited": 12}, size=(8, 8))
    picture(tmp_path / "beside.png", (8, 8))
    (tmp_path / "notes.txt").write_text("no image")
    assert len(load_data(tmp_path)) == 11
    assert "belong to no class and are left out: 1 of them" in capsys.readouterr().err


def test_a_flat_folder_has_no_labels(tmp_path, monkeypatch):
    for i in range(4):
        picture(tmp_path / f"{i}.jpg", (100, 90), i)
    monkeypatch.chdir(tmp_path)
    data = load_data(".")
    assert data.labels is None and data.classes == [] and data.name == tmp_path.name
    assert data.images.shape == (4, 3, 80, 80) and data.image_size == 64 and data.crop


def test_only_large_photographs_are_cropped(tmp_path):
    class_folder(tmp_path, {"a": 20}, size=(50, 40))
    assert load_data(tmp_path).images.shape[2:] == (40, 40)
    data = load_data(tmp_path, image_size=32)
    assert data.crop and data.images.shape[2:] == (40, 40)
    assert not load_data(tmp_path, image_size=36).crop
    assert load_data(tmp_path, "test", image_size=32).images.shape[2:] == (32, 32)


def test_damaged_files_are_named_counted_and_left_out(tmp_path, capsys):
    class_folder(tmp_path, {"a": 3, "b": 3})
    content = (tmp_path / "a/001.png").read_bytes()
    (tmp_path / "a/001.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "b/notes.txt").write_text("not an image")
    for _ in range(2):  # decoded, then from the cache
        utils.say.cache_clear()
        data = load_data(tmp_path)
        assert data.labels.tolist() == [0, 0, 1, 1, 1]
        err = capsys.readouterr().err
        assert "left out 2 of 7 files" in err and "a/001.png, b/notes.txt" in err
    for i in range(3):
        (tmp_path / f"a/{i:03}.png").write_text("no")
    with pytest.raises(UserError, match="a has no readable image"):
        load_data(tmp_path)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="no image"):
        load_data(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(UserError, match="no readable image"):
        load_data(tmp_path)
    class_folder(tmp_path, {"a": 2})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_data(tmp_path)
    with pytest.raises(UserError, match="fashion_mnist, cifar10, cifar10-64, landscapes"):
        load_data(tmp_path / "not there")


@pytest.mark.parametrize("name", image_data.DATASETS)
def test_data_that_is_not_there_names_its_command(name, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "ROOT", tmp_path)
    move_fashion_mnist(monkeypatch, tmp_path / "debian")
    with pytest.raises(UserError, match=f"python download_datasets.py {name}`"):
        load_data(name)


def test_named_folders_have_their_own_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "ROOT", tmp_path)
    for folder in ("cifar10", "cifar10-64"):
        for split in ("train", "test"):
            class_folder(tmp_path / folder / split, {"cat": 1, "dog": 1}, size=(64, 64))
    class_folder(tmp_path / "landscape_img_folder", {"sea": 2}, size=(100, 100))
    settings = {
        name: (d.images.shape[-1], d.image_size, d.flip, d.crop, d.name)
        for name in list(image_data.DATASETS)[1:]
        for d in [load_data(name)]
    }
    assert settings == {
        "cifar10": (32, 32, True, False, "cifar10"),
        "cifar10-64": (64, 64, True, False, "cifar10-64"),
        "landscapes": (80, 64, True, True, "landscapes"),
    }


def test_a_data_set_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "ROOT", tmp_path)
    row = image_data.DataSet("toy blocks", folders=("toys/blocks",), image_size=8, flip=False)
    monkeypatch.setitem(image_data.DATASETS, "blocks", row)
    with pytest.raises(UserError, match="^toy blocks is not there: run `python download_datasets.py blocks`"):
        load_data("blocks")
    class_folder(tmp_path / "toys/blocks", {"cube": 10, "ball": 10}, (30, 20))
    data = load_data("blocks")
    assert data.images.shape == (18, 3, 8, 8) and (data.name, data.classes) == ("blocks", ["ball", "cube"])
    assert (data.flip, data.crop) == (False, False) and image_data.describe_folder("blocks") is None
    with pytest.raises(UserError, match="neither a folder nor one of fashion_mnist, .*landscapes, blocks$"):
        load_data("bricks")


def test_a_folder_is_known_by_its_files_wherever_it_lies(tmp_path):
    a, b = (class_folder(tmp_path / side / "photos", {"cats": 3, "dogs": 2}) for side in "ab")
    assert image_data.describe_folder(a) == image_data.describe_folder(b)
    assert image_data.describe_folder(a).startswith("5 files, ")
    (a / ".hidden").write_text("passed over")
    assert image_data.describe_folder(a) == image_data.describe_folder(b)
    class_folder(tmp_path / "split/train", {"cats": 3, "dogs": 2})
    split = image_data.describe_folder(tmp_path / "split")
    picture(tmp_path / "split/elsewhere/000.png")  # neither train nor test
    assert image_data.describe_folder(tmp_path / "split") == split != image_data.describe_folder(a)
    picture(b / "dogs/000.png", (33, 32))
    assert image_data.describe_folder(a) != image_data.describe_folder(b)
    assert image_data.describe_folder("cifar10") is image_data.describe_folder(tmp_path / "nowhere") is None


def test_images_are_decoded_once(tmp_path, monkeypatch):
    class_folder(tmp_path, {"a": 5})
    first = load_data(tmp_path).images.clone()
    with monkeypatch.context() as patch:
        patch.setattr(image_data, "decode_image", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load_data(tmp_path).images, first)
    picture(tmp_path / "a/000.png", seed=99)
    assert not torch.equal(load_data(tmp_path).images, first)
    data = load_data(tmp_path)
    data.images[0] = 0  # a private copy: the cache stays as it is
    assert load_data(tmp_path).images[0].any()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    class_folder(tmp_path / "data", {"a": 5})
    expected = load_data(tmp_path / "data").images.clone()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(image_data, "CACHE", tmp_path / "file")
    assert torch.equal(load_data(tmp_path / "data").images, expected)
    assert "stay in memory" in capsys.readouterr().err


def test_interrupted_decoding_leaves_no_cache(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    class_folder(tmp_path, {"a": 3})
    monkeypatch.setattr(image_data, "decode_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_data(tmp_path)
    assert not list(image_data.CACHE.iterdir())


def test_decoding_agrees_with_torchvision(tmp_path):
    pixels = np.asarray(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize((150, 100))
    )
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = v2.Compose([v2.Resize(80), v2.CenterCrop(80)])(Image.fromarray(pixels))
    decoded = image_data.decode_image(tmp_path / "x.png", 80)
    assert decoded.shape == (80, 80, 3)
    assert np.abs(decoded.astype(int) - np.asarray(expected).astype(int)).max() <= 2


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    decoded = image_data.decode_image(tmp_path / "x.png", 40)
    assert decoded[:, 30:].min() == 255 and decoded[:, :10].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (10, 12)).save(path)
    assert image_data.decode_image(path, 8).shape == (8, 8, 3)


def test_16_bits_and_transparency(tmp_path):
    """16-bit greys keep their brightness; a transparent picture shows white, whatever colours hide behind."""
    grey = np.full((8, 8), 257 * 100, np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.new("LA", (8, 8), (100, 255)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 127)).save(tmp_path / "half.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "palette.png", transparency=0)
    expected = {"grey": 100, "opaque": 100, "clear": 255, "half": [255, 128, 128], "palette": 255}
    for name, colour in expected.items():
        assert (image_data.decode_image(tmp_path / f"{name}.png", 8) == colour).all(), name


def _png():
    stream = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(stream, "PNG")
    return stream.getvalue()


@given(mutations(_png()))
def test_fuzzed_images_decode_or_are_left_out(fuzz_folder, content):
    (fuzz_folder / "x.png").write_bytes(content)
    decoded = image_data.decode_image(fuzz_folder / "x.png", 8)
    assert decoded is None or decoded.shape == (8, 8, 3)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_cifar_batches(folder, monkeypatch=None):
    """Ten 32 x 32 images in torchvision's layout; with monkeypatch torchvision expects their checksums."""
    import hashlib

    folder.mkdir()
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    rng, md5 = np.random.default_rng(0), {}
    contents = {"batches.meta": {"label_names": classes}}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        contents[name] = {"data": rng.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    if monkeypatch:
        cifar = torchvision.datasets.CIFAR10
        monkeypatch.setattr(cifar, "train_list", [[name, md5[name]] for name in md5 if name.startswith("data")])
        monkeypatch.setattr(cifar, "test_list", [["test_batch", md5["test_batch"]]])
        monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5["batches.meta"]})
    return contents


def test_cifar_batches(tmp_path, monkeypatch):
    contents = write_cifar_batches(tmp_path / "cifar-10-batches-py", monkeypatch)
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = load_data(path)
        assert data.images.shape == (50, 3, 32, 32) and data.flip and not data.crop and data.classes[9] == "truck"
        assert np.array_equal(data.images[0].flatten(), contents["data_batch_1"]["data"][0])
    assert load_data(tmp_path, "test", image_size=16).images.shape == (10, 3, 16, 16)


def test_cifar_batches_of_a_stranger_are_not_unpickled(tmp_path):
    write_cifar_batches(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    with pytest.raises(UserError, match="missing or damaged"):
        load_data(tmp_path)
    assert not (tmp_path / "pwned").exists()


# --- augmentation -------------------------------------------------------------------------------------------------


def make_data(images, **settings):
    defaults = {"labels": None, "classes": [], "name": "x", "flip": False, "image_size": images.shape[-1]}
    return image_data.ImageData(images, **(defaults | settings))


def test_without_flip_and_crop_a_batch_is_the_images(idx_folder):
    data = load_data(idx_folder)
    batch = augment(data, torch.tensor([3, 0]), generator(0))
    assert torch.equal(utils.to_uint8(batch), data.images[[3, 0]])


def test_each_image_is_flipped_by_its_own_coin():
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    data = make_data(images, flip=True)
    batch = utils.to_uint8(augment(data, torch.arange(400), generator(5)))
    same = (batch == images).flatten(1).all(1)
    assert torch.equal(batch[~same], images.flip(3)[~same]) and 150 < same.sum() < 250
    assert torch.equal(utils.to_uint8(augment(data, torch.arange(400))), images)  # no generator, no chance


def test_augmentation_depends_on_the_generator_only():
    data = make_data(torch.randint(0, 256, (9, 3, 20, 20), dtype=torch.uint8), flip=True, crop=True, image_size=16)
    index = torch.tensor([4, 4, 1, 0])
    first, again, other = (augment(data, index, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (4, 3, 16, 16) and first.dtype == torch.float32 and first.abs().max() <= 1
    assert not torch.equal(first[0], first[1])  # the same image twice, each with its own box
    assert torch.equal(augment(data, index.numpy(), generator(1)), first)


def test_crops_are_boxes_of_80_to_100_percent_at_any_place():
    # pixels count columns in the first channel and rows in the second, so a crop tells where it came from
    ramp = torch.arange(80, dtype=torch.uint8) * 3
    image = torch.stack([ramp.expand(80, 80), ramp[:, None].expand(80, 80), torch.zeros(80, 80, dtype=torch.uint8)])
    data = make_data(image.expand(300, 3, 80, 80), crop=True, image_size=64)
    x = utils.to_uint8(augment(data, torch.arange(300), generator(0))).float() / 3
    first, last = x[:, :2, 3, 3], x[:, :2, 60, 60]
    scale = (last - first) / 57  # source pixels per pixel
    length = 64 * scale  # width, height
    area = length.prod(1) / 80**2
    assert 0.78 < area.min() < 0.83 and 0.97 < area.max() < 1.02 and length.max() < 81
    start = first + 0.5 - 3.5 * scale
    assert start.min() > -1 and (start + length).max() < 81
    assert start[:, 0].max() > 5 and start[:, 1].max() > 5  # at any place


def test_a_whole_image_is_resized_as_torchvision_does():
    images = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
    data = make_data(images, crop=True, flip=True, image_size=64)
    expected = v2.functional.resize(images, [64, 64], antialias=True)
    assert (utils.to_uint8(augment(data, torch.arange(2))).int() - expected.int()).abs().max() <= 1


# --- pictures and samples -----------------------------------------------------------------------------------------


def test_image_grid():
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 4, 5)
    grid = image_grid(images, columns=2, padding=1)
    assert grid.shape == (2 * 5 + 1, 2 * 6 + 1, 3) and grid.dtype == np.uint8
    assert (grid[1:5, 1:6] == 0).all() and (grid[1:5, 7:12] == 1).all() and (grid[6:10, 1:6] == 2).all()
    assert (grid[6:10, 7:12] == 255).all() and (grid[0] == 255).all()
    assert image_grid(images, columns=9, padding=0, scale=3).shape == (12, 45, 3)
    assert (
        image_grid(images[:1], columns=2, scale=2).tolist()
        == np.pad(np.zeros((8, 10, 3), int), ((2, 2), (2, 2), (0, 0)), constant_values=255).tolist()
    )
    for bad, columns in ((images[:0], 2), (images.float(), 2), (images[0], 2), (images, 0)):
        with pytest.raises(UserError, match="grid"):
            image_grid(bad, columns)


def test_save_grid(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 6, 6), np.uint8)
    utils.save_grid(images, tmp_path / "new/grid.png", 2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new/grid.png")), image_grid(images, 2))
    with pytest.raises(UserError, match=".png"):
        utils.save_grid(images, tmp_path / "grid.docx", 2)
    assert os.listdir(tmp_path) == ["new"]


def gif_frames(path):
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            yield np.asarray(gif.convert("RGB")).astype(int), gif.info


def test_greys_are_exact_in_gifs(tmp_path):
    greys = [np.roll(np.arange(256, dtype=np.uint8), i).reshape(16, 16, 1).repeat(3, 2) for i in range(10)]
    save_gif(greys, tmp_path / "x.gif", fps=20, hold=1)
    for i, (frame, info) in enumerate(gif_frames(tmp_path / "x.gif")):
        assert np.array_equal(frame, greys[i]) and info["duration"] == (1050 if i == 9 else 50) and info["loop"] == 0
    assert i == 9


def test_up_to_256_colours_are_exact_in_gifs(tmp_path):
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    frames = [palette[np.random.default_rng(i).permutation(256)].reshape(16, 16, 3) for i in range(3)]
    save_gif(frames, tmp_path / "x.gif")
    assert all(np.array_equal(frame, frames[i]) for i, (frame, _) in enumerate(gif_frames(tmp_path / "x.gif")))


def test_rare_saturated_colours_survive_in_gifs(tmp_path):
    """Small squares of pure colours on a dull, noisy background. Pillow's own palette is wrong there by up to 151."""
    y, x = np.mgrid[:256, :256]
    picture = np.stack([100 + x / 6, 90 + y / 5, 80 + (x + y) / 9], 2) + np.random.default_rng(0).normal(
        0, 6, (256, 256, 1)
    )
    picture = picture.astype(np.uint8)
    for i in range(8):
        picture[20 + 25 * i : 26 + 25 * i, 20 + 25 * i : 26 + 25 * i] = [255 * (i >> bit & 1) for bit in range(3)]
    save_gif([255 - picture, picture], tmp_path / "x.gif")
    error = np.abs(list(gif_frames(tmp_path / "x.gif"))[-1][0] - picture)
    assert error.max() <= 20 and error.mean() <= 3


def test_gifs_that_cannot_be(tmp_path):
    frame = np.zeros((6, 8, 3), np.uint8)
    for frames in ([], [frame, frame[:3]], [frame.astype(float)]):
        with pytest.raises(UserError, match="frame"):
            save_gif(frames, tmp_path / "bad.gif")
    for fps in (0, 51):
        with pytest.raises(UserError, match="frames a second"):
            save_gif([frame], tmp_path / "bad.gif", fps=fps)
    assert not (tmp_path / "bad.gif").exists()


def test_samples(tmp_path):
    images, labels = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8), torch.arange(5)
    save_samples(tmp_path / "x.npz", images, labels)
    loaded, loaded_labels = load_samples(tmp_path / "x.npz")
    assert np.array_equal(loaded, images.permute(0, 2, 3, 1)) and loaded_labels.tolist() == [0, 1, 2, 3, 4]
    save_samples(tmp_path / "y.npz", loaded)
    assert load_samples(tmp_path / "y.npz")[1] is None
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["images"].dtype == np.uint8 and archive["labels"].dtype == np.int64
    before = (tmp_path / "x.npz").read_bytes()
    save_samples(tmp_path / "x.npz", images, labels)
    assert (tmp_path / "x.npz").read_bytes() == before  # byte for byte


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"pictures": np.zeros((2, 4, 4, 1), np.uint8)}, "no array called images"),
        ({"images": np.zeros((2, 4, 4, 1))}, "uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "N x H x W x C"),
        ({"images": np.zeros((0, 4, 4, 1), np.uint8)}, "N x H x W x C"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8)}, "N x H x W x C"),
        ({"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.zeros(3, int)}, "labels"),
        ({"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.zeros(2)}, "labels"),
        ({"images": np.array([Malicious("pwned")])}, "not a readable"),
    ],
)
def test_sample_files_are_validated(arrays, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        load_samples("x.npz")
    assert not os.path.exists("pwned")


def test_missing_sample_files(tmp_path):
    with pytest.raises(UserError, match="no sample file"):
        load_samples(tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.zeros(3))
    for path in (tmp_path, tmp_path / "x.npy"):
        with pytest.raises(UserError, match="not a readable"):
            load_samples(path)


def _npz():
    stream = io.BytesIO()
    np.savez_compressed(stream, images=np.arange(64, dtype=np.uint8).reshape(4, 4, 4, 1), labels=np.arange(4))
    return stream.getvalue()


@given(mutations(_npz()))
def test_fuzzed_sample_files_load_or_are_refused(fuzz_folder, content):
    (fuzz_folder / "x.npz").write_bytes(content)
    try:
        images, _ = load_samples(fuzz_folder / "x.npz")
        assert images.dtype == np.uint8 and images.ndim == 4
    except UserError as error:
        assert "x.npz" in str(error)


def test_a_link_to_nowhere_is_left_out(tmp_path, capsys):
    for i in range(12):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "z.png").symlink_to(tmp_path / "not there")
    assert len(load_data(tmp_path, image_size=16)) + len(load_data(tmp_path, "test", image_size=16)) == 12
    assert "z.png" in capsys.readouterr().err
