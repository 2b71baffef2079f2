"""image_data.py: data sets of every kind, which files count, their pixels, augmentation; files of samples."""

import copy
import gzip
import io
import pickle
import shutil
import socket
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Malicious, class_folder, move_fashion_mnist, mutations, picture, write_cifar_batches, write_idx
from hypothesis import given
from PIL import Image
from torchvision.transforms import v2

import image_data
import utils
from image_data import augment, load_data, load_samples, save_samples
from utils import UserError, generator

# --- Fashion-MNIST ------------------------------------------------------------------------------------------------


def test_the_shipped_sample_stands_in_without_network(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("load_data must not use the network"))
    sample = utils.ROOT / "data/fashion_mnist_sample"
    monkeypatch.setattr(image_data, "ROOT", tmp_path)  # without data/fashion_mnist
    move_fashion_mnist(monkeypatch, tmp_path / "nowhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fashion_mnist_sample").symlink_to(sample)
    train, test = load_data("fashion_mnist"), load_data("fashion_mnist", "test")
    assert len(train) >= 2000 and len(test) >= 1000
    assert train.images.shape[1:] == (1, 28, 28) and train.images.dtype == torch.uint8
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
    for file in idx_folder.iterdir():
        (own / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    write_idx(own / "train-labels-idx1-ubyte", np.zeros(64))  # counts more than the one that is compressed
    assert load_data("fashion_mnist").labels.max() == 0 and len(load_data("fashion_mnist", "test")) == 16
    assert capsys.readouterr().err == ""


def test_sizes_and_classes_of_mnist_files(idx_folder):
    data = load_data(idx_folder)
    assert data.classes == [str(digit) for digit in range(10)]  # and not clothes
    padded = load_data(idx_folder, image_size=32)
    assert padded.image_size == 32 and torch.equal(padded.images[:, :, 2:30, 2:30], data.images)
    assert padded.images[:, :, :2].max() == 0
    assert load_data(idx_folder, image_size=16).images.shape == (64, 1, 16, 16)


@pytest.mark.parametrize(
    "stem, damage",
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1]),
        ("train-images-idx3-ubyte", lambda content: content + b"\0"),
        ("train-images-idx3-ubyte", lambda content: content[:8] + b"\0\0\0\x0e\0\0\0\x38" + content[16:]),  # 14 x 56
        ("train-labels-idx1-ubyte", lambda content: content[:-1] + b"\x0a"),
        ("train-labels-idx1-ubyte", lambda content: b"\0\0\x08\x01\0\0\0\x02\0\0"),
        ("train-images-idx3-ubyte", None),
        ("train-images-idx3-ubyte.gz", lambda content: content[:-20]),
        ("train-images-idx3-ubyte.gz", lambda content: b"not gzip"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, idx_folder, stem, damage):
    shutil.copytree(idx_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / stem.removesuffix(".gz")
    content = path.read_bytes()
    path.unlink()
    if damage:
        (tmp_path / stem).write_bytes(damage(gzip.compress(content) if stem.endswith(".gz") else content))
    with pytest.raises(UserError, match=f"{tmp_path}/train-"):
        load_data(tmp_path)
    assert len(load_data(tmp_path, "test")) == 16


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
    with pytest.raises(UserError, match="test.*parquet"):
        load_data(tmp_path, "test")
    datasets.Dataset.from_dict({"text": ["no image"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match="test.parquet"):
        load_data(tmp_path, "test")
    rows = {"image": [Image.new("L", (28, 28), i) for i in range(3)], "label": [0, 9, 4]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    data = load_data(tmp_path)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2] and data.labels.tolist() == [0, 9, 4]


# --- folders of images --------------------------------------------------------------------------------------------


def test_a_tenth_is_held_out_where_there_is_no_test_folder(tmp_path):
    class_folder(tmp_path, {"a": 25, "b": 15}, size=(8, 8))
    train, test = (load_data(tmp_path, split) for split in ("train", "test"))
    assert torch.equal(test.images, load_data(tmp_path, "test").images) and train.name == tmp_path.name
    assert (train.image_size, train.flip, train.crop, test.flip) == (8, True, False, False)
    train, test = ({image.numpy().tobytes() for image in data.images} for data in (train, test))
    assert len(train) == 36 and len(test) == 4 and not train & test
    single = class_folder(tmp_path / "single", {"a": 20, **dict.fromkeys("bcdefghijk", 1), "l": 20})
    assert set(load_data(single, labels=True).labels.tolist()) == set(range(12))  # no class is held out whole
    few = class_folder(tmp_path / "few", {"a": 5})
    assert len(load_data(few)) == 5
    with pytest.raises(UserError, match="no image for the test split"):
        load_data(few, "test")


def test_a_flat_folder_has_no_labels(tmp_path, monkeypatch):
    for i in range(20):
        picture(tmp_path / f"{i}.jpg", (100, 90), i)
    monkeypatch.chdir(tmp_path)
    data = load_data(".")
    assert data.labels is None and data.classes == [] and data.name == tmp_path.name
    assert data.images.shape == (18, 3, 80, 80) and data.image_size == 64 and data.crop
    assert load_data(".", "test").images.shape == (2, 3, 64, 64) and not load_data(".", "test").crop
    assert load_data(".", image_size=80).images.shape == (18, 3, 80, 80) and not load_data(".", image_size=80).crop


DAMAGED = "damaged, too large or in no format that Pillow can open"


def test_damaged_files_are_named_counted_and_left_out(tmp_path):
    class_folder(tmp_path, {"a": 3, "b": 3})
    content = (tmp_path / "a/001.png").read_bytes()
    (tmp_path / "a/001.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "b/notes.txt").write_text("not an image")
    (tmp_path / "b/z.png").symlink_to(tmp_path / "not there")
    for _ in range(2):  # decoded, then from the cache
        data = load_data(tmp_path, labels=True)
        assert data.labels.tolist() == [0, 0, 1, 1, 1]
        nowhere = "not readable (No such file or directory)"
        assert data.left_out == {"b/notes.txt": "not an image", "a/001.png": "cut off", "b/z.png": nowhere}
    for i in range(3):
        (tmp_path / f"a/{i:03}.png").write_text("no")
    with pytest.raises(UserError, match="no readable image in a"):
        load_data(tmp_path, labels=True)
    assert len(load_data(tmp_path)) == 3


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(UserError, match="no image"):
        load_data(tmp_path)
    picture(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    for size, reason in ((0, DAMAGED), (60, "cut off")):  # 60: with its size, without its pixels
        (tmp_path / "x.png").write_bytes(content[:size])
        with pytest.raises(UserError, match=f"no readable image in it: 1 not an image, .*; 1 {reason}, such as x.png"):
            load_data(tmp_path)
    (tmp_path / "x.png").unlink()
    class_folder(tmp_path, {"a": 2})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_data(tmp_path, labels=True)
    assert load_data(tmp_path).classes == ["a"]


# --- which files count --------------------------------------------------------------------------------------------


def make(root, files):
    """Small coloured pictures and other files at the paths that a text names: `train/cat x 3, notes.txt`."""
    for entry in files.split(", "):
        name, _, count = entry.partition(" x ")
        for i in range(int(count or 1)):
            path = root / f"{name}/{i:02}.png" if count else root / name
            if path.suffix in (".png", ".jpg", ".JPG", ""):
                picture(path, (12, 12), seed=zlib.crc32(str(path.relative_to(root)).encode()), format="PNG")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("not a picture")
    return root


@pytest.mark.parametrize(
    "labels, files, train, test, classes, said",
    [
        (0, "cat x 10, dog x 20", 27, 3, "cat dog", ""),
        (0, "Training/cat x 3, Training/dog x 2, Testing/cat x 1, Testing/dog x 1", 5, 2, "cat dog", ""),
        (0, "TRAIN/b x 2, TRAIN/a x 2, VALID/a x 1, VALID/b x 2", 4, 3, "a b", "VALID/ is held out"),
        (0, "seg_train/seg_train/a x 3, seg_test/seg_test/a x 2, seg_pred/a x 4", 3, 2, "a", "4 outside of the splits"),
        (0, "train2017 x 4, val2017 x 2", 4, 2, "", ""),
        (0, "train/a x 4, test/a x 3, val/a x 2", 4, 3, "a", "2 outside of the splits"),
        (0, "train/a x 4, validation/a x 2, readme.md", 4, 2, "a", "1 not an image"),
        (
            0,
            "data/set/PetImages/Cat x 10, data/set/PetImages/Dog x 10, data/readme[1].txt",
            18,
            2,
            "Cat Dog",
            "1 not an image",
        ),
        (0, "images/train x 4, images/val x 2, labels/train/a.txt, labels/val/b.txt", 4, 2, "", "2 not an image"),
        (0, "train x 10, bus x 10", 18, 2, "bus train", ""),  # vehicles
        (0, "train/train x 3, train/bus x 3, test/train x 1, test/bus x 1", 6, 2, "bus train", ""),
        (0, "training x 10, reading x 10, test x 10", 10, 10, "", "10 outside of the splits"),
        (0, "train/1 x 10, train/2 x 10, bus x 10", 27, 3, "bus train", ""),
        (0, "trainers x 10, boots x 10", 18, 2, "boots trainers", ""),
        (1, "class_9 x 5, class_10 x 4", 9, "no image for the test", "class_9 class_10", ""),
        (0, "a.png, b.png, c.JPG, edited x 7, edited/raw x 10", 18, 2, "", ""),  # an album beside
        (0, "photos x 10, run/state_00000005_0123456789abcdef.pt, run/samples.png", 9, 1, "photos", ""),
        (0, "a x 10, Thumbs.db, a/desktop.ini, a/clip.mpg", 9, 1, "a", "3 not an image, such as Thumbs.db"),
        (0, "a x 10, @eaDir/a x 3, __MACOSX/a x 3, .hidden x 2", 9, 1, "a", ""),
        (0, "cat x 10, dog x 9, cover.png", 18, 2, "", ""),
        (1, "cat x 10, dog x 10, cover.png, back.png", 18, 2, "cat dog", "2 outside of the splits and class folders"),
        (1, "0.png, 1.png, edited x 1", 1, "no image for the test", "edited", "2 outside of the splits"),
        (1, ", ".join(f"{i}.png" for i in range(12)), "has no labels, .* use class folders", "", "", ""),
        (0, "train/cat x 10, train/dog x 10, test x 7", 20, 7, "", ""),  # as of competitions
        (1, "train/cat x 10, train/dog x 10, test x 7", 18, 2, "cat dog", "x/test has other class folders than"),
        (0, "train/cats x 2, train/dogs x 2, test/dogs x 2", 4, 2, "", ""),
        (1, "train/cats x 2, train/dogs x 2, test/dogs x 2", 4, "no image for", "cats dogs", "other class folders"),
    ],
)
def test_layouts(labels, files, train, test, classes, said, tmp_path, capsys):
    """Numbers of images and classes as a person would count them, or why the folder is refused."""
    make(tmp_path / "x", files)
    lines = ""
    for split, expected in (("train", train), ("test", test or train)):
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                load_data(tmp_path / "x", split, labels=labels)
            continue
        data = load_data(tmp_path / "x", split, labels=labels)
        assert len(data) == expected and data.classes == classes.split() and (data.labels is None) == (not classes)
        for label, name in enumerate(data.classes):
            pixels = {np.asarray(Image.open(file)).tobytes() for file in tmp_path.glob(f"**/{name}/**/*.png")}
            assert {x.numpy().tobytes() for x in data.images[data.labels == label].permute(0, 2, 3, 1)} <= pixels
        lines += image_data.describe(data, None, False) + capsys.readouterr().err
    assert said in lines if said else "left out" not in lines


@pytest.mark.parametrize(
    "sides, size, crop",
    [
        ([20] + [150] * 11, 64, True),  # an icon comes first
        ([150] + [48] * 11, 48, False),  # a large one comes first
        ([30, 31] + [90] * 10, 64, True),
        ([40] * 6 + [200] * 6, 40, False),
    ],
)
def test_the_size_is_judged_from_all_files(sides, size, crop, tmp_path, capsys):
    for i, side in enumerate(sides):
        picture(tmp_path / f"{i:02}.png", (side, side + 5), i)
    train, test = (load_data(tmp_path, split) for split in ("train", "test"))
    assert train.image_size == test.image_size == size and train.crop == crop
    small = [side for side in sides if side < size]
    assert (f"{len(small)} of 12 images are smaller than {size}" in capsys.readouterr().err) == bool(small)


def test_the_data_line(tmp_path):
    class_folder(tmp_path, {"bicycle": 30, "bus": 30, "train": 30}, (64, 64))
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    train, test = (load_data(tmp_path, split, labels=True) for split in ("train", "test"))
    line, left_out = image_data.describe(train, test, labels=True).split("\n")
    assert line == "data: 81 images for training, 9 held out; 64 x 64 RGB; 3 classes: bicycle, bus, train"
    assert left_out == "left out: 1 not an image, such as Thumbs.db"
    many = make_data(torch.zeros(60_000, 1, 1, 1, dtype=torch.uint8), labels=torch.zeros(60_000), classes=["a"])
    assert image_data.describe(many, None, False) == "data: 60,000 images for training, 0 held out; 1 x 1 grey"


def test_grey_folders_have_one_channel(tmp_path, idx_folder, capsys):
    """Fashion-MNIST as PNG files is what it is as IDX files."""
    expected = load_data(idx_folder)
    for split in ("train", "test"):
        data = load_data(idx_folder, split)
        for i, (image, label) in enumerate(zip(data.images, data.labels)):
            path = tmp_path / split / str(int(label)) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image[0].numpy())
            picture.convert(["L", "RGB", "P", "LA"][i % 4]).save(path)
    data = load_data(tmp_path, labels=True)
    order = torch.sort(expected.labels, stable=True).indices
    assert torch.equal(data.images, expected.images[order]) and torch.equal(data.labels, expected.labels[order])
    assert not data.flip and data.image_size == 28 and "all images are grey" in capsys.readouterr().err
    assert torch.equal(load_data(tmp_path, channels=3).images, data.images.expand(-1, 3, -1, -1))
    assert torch.equal(load_data(idx_folder, channels=3).images, expected.images.expand(-1, 3, -1, -1))
    Image.new("RGB", (28, 28), (200, 100, 50)).save(tmp_path / "test/0/colour.png")
    for split in ("train", "test"):  # both have the same, whichever split the colour is in
        assert load_data(tmp_path, split).images.shape[1] == 3
    grey = load_data(tmp_path, "test", channels=1)
    assert grey.images.shape[1] == 1 and grey.images[(grey.images - 124).abs().amax((1, 2, 3)) == 0].any()  # luminance


# --- the fingerprint and the cache -----------------------------------------------------------------------------


def test_a_folder_is_known_by_its_files_wherever_it_lies(tmp_path):
    describe = image_data.describe_folder
    a, b = (class_folder(tmp_path / side / "photos", {"cats": 3, "dogs": 2}) for side in "ab")
    assert describe(a) == describe(b) and describe(a).startswith("5 files, ")
    for stray in (".hidden", "Thumbs.db", "cats/notes.txt", "run/model.safetensors"):
        (a / stray).parent.mkdir(exist_ok=True)
        (a / stray).write_text("no image")
    assert describe(a) == describe(b)
    picture(a / "dogs/new.png")
    assert describe(a).startswith("6 files, ")
    before = describe(b)
    picture(b / "dogs/000.png", (33, 32))
    assert describe(b) != before
    for part in ("train", "test"):
        class_folder(tmp_path / "split" / part, {"cats": 3, "dogs": 2})
    before = describe(tmp_path / "split")
    picture(tmp_path / "split/elsewhere/000.png")  # neither train nor test
    assert describe(tmp_path / "split") == before
    assert describe("cifar10") is describe(tmp_path / "nowhere") is None


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
    with monkeypatch.context() as patch:
        patch.setattr(image_data, "progress", interrupt := Mock(side_effect=KeyboardInterrupt))
        pytest.raises(KeyboardInterrupt, load_data, tmp_path / "data")
    assert interrupt.called and not list(image_data.CACHE.iterdir())  # nor is there half a one
    expected = load_data(tmp_path / "data").images.clone()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(image_data, "CACHE", tmp_path / "file")
    assert torch.equal(load_data(tmp_path / "data").images, expected)
    assert "stay in memory" in capsys.readouterr().err


def test_decoding_agrees_with_torchvision(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)).resize((150, 100))
    photo.save(tmp_path / "x.png")
    expected = v2.Compose([v2.Resize(80), v2.CenterCrop(80)])(photo)
    decoded = image_data.decode_image(tmp_path / "x.png", 80)
    assert decoded.shape == (80, 80, 3)
    assert np.abs(decoded.astype(int) - np.asarray(expected).astype(int)).max() <= 2


# --- formats ------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
GREYS = (RAMP * 255).round()


@pytest.mark.parametrize(
    "name, pixels, expected",
    [
        ("one.tif", RAMP.astype(np.float32), GREYS),
        ("sixteen.tif", (RAMP * 65535).astype(np.float32), GREYS),
        ("sixteen.png", (RAMP * 65535).astype(np.uint16), GREYS),
        ("uint12.tif", (RAMP * 4095).astype(np.uint16), GREYS),
        ("int16.tif", (RAMP * 65535).astype(np.int32), GREYS),
        ("int32.tif", (RAMP * (2**31 - 1)).astype(np.int32), GREYS),
        ("dark.png", (RAMP * 600).astype(np.uint16), RAMP * 600 / 257),  # PNG's range is known
        ("black.tif", np.zeros((64, 64), np.float32), np.zeros((64, 64))),
        ("signed.tif", (RAMP * 2 - 1).astype(np.float32), None),
        ("hdr.tif", (RAMP * 3).astype(np.float32), None),
        ("nan.tif", np.full((64, 64), np.nan, np.float32), None),
    ],
)
def test_numbers_of_every_format_are_scaled_by_their_range(name, pixels, expected, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    decoded = image_data.decode_image(tmp_path / name, 64)
    if expected is None:
        assert decoded == "with numbers in an unusual range"
    else:
        assert np.abs(decoded[..., 0].astype(float) - expected).max() <= 1 and image_data.is_grey(decoded.T[None])


@pytest.mark.parametrize(
    "name, mode, settings",
    [
        ("UPPER.JPG", "RGB", {"format": "JPEG"}),
        ("wrong.png", "RGB", {"format": "JPEG"}),
        ("none", "RGB", {"format": "PNG"}),
        ("cmyk.jpg", "CMYK", {}),
        ("palette.png", "P", {}),
        ("half.png", "LA", {}),
        ("bits.png", "1", {}),
        ("x.webp", "RGB", {"lossless": True}),
        ("x.tiff", "CMYK", {}),
        ("x.gif", "P", {"save_all": True, "append_images": [Image.new("P", (90, 70))]}),
        ("moving.webp", "RGB", {"lossless": True, "save_all": True, "append_images": [Image.new("RGB", (90, 70))]}),
    ],
)
def test_everything_that_pillow_opens_counts(name, mode, settings, tmp_path):
    """With the colours of the original, and of a film the first frame."""
    shade = Image.new("RGB", (90, 70), (255, 255, 255) if mode in ("1", "LA") else (200, 40, 90))
    shade.convert(mode, dither=Image.Dither.NONE).save(tmp_path / name, **settings)
    data = load_data(tmp_path, channels=3)
    assert len(data) == 1 and not data.left_out
    expected = torch.tensor(shade.getpixel((0, 0)))[:, None, None]
    assert (data.images[0].int() - expected).abs().max() <= 16


def exif(entry):
    """JPEG metadata with one entry, 12 bytes, in its directory."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"


def with_segment(content, marker, data):
    return content[:2] + bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data + content[2:]


def with_chunk(content, kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return content[:33] + struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc) + content[33:]


ORIENTATION = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize(
    "marker, data, turned",
    [
        (0xE1, exif(ORIENTATION), True),
        (0xE1, b"Exif\0\0" + exif(ORIENTATION), True),
        (0xE1, exif(struct.pack("<HHIHH", 0x0112, 3, 1, 9, 0)), False),  # there is no such orientation
        (0xE1, exif(struct.pack("<HHI4s", 0x0112, 2, 3, b"ab\0\0")), False),
        (0xE1, b"Exif\0\0II*\0\xff\xff\xff\0", False),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><tiff:Orientation", False),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff", False),
        (0xED, b"Photoshop 3.0\0008BIM\x03\xed\0\0\0\0\0\x10ab", False),
        (0xEE, b"Adobe\0", False),
        (b"tEXt", b"Comment\0wrong checksum", False),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 5_000_000), False),
        (b"iCCP", b"icc\0\1garbage", False),
        (b"eXIf", b"II*\0\xff\xff\xff\xff", False),
    ],
)
def test_damaged_metadata_does_not_cost_the_picture(marker, data, turned, tmp_path):
    stream = io.BytesIO()
    photo = Image.fromarray(np.linspace(0, 255, 80 * 60 * 3).reshape(60, 80, 3).astype(np.uint8))
    photo.save(stream, "PNG" if isinstance(marker, bytes) else "JPEG")
    (tmp_path / "plain").write_bytes(stream.getvalue())
    insert = with_chunk if isinstance(marker, bytes) else with_segment
    wrong = (0,) if b"checksum" in data else ()
    (tmp_path / "x").write_bytes(insert(stream.getvalue(), marker, data, *wrong))
    expected, decoded = (image_data.decode_image(tmp_path / name, 48) for name in ("plain", "x"))
    assert np.abs((np.rot90(expected, -1) if turned else expected).astype(int) - decoded).max() <= 3


def test_a_photograph_of_200_megapixels(tmp_path, recwarn):
    Image.new("L", (16320, 12240), 90).save(tmp_path / "x.jpg", quality=30)
    assert np.abs(image_data.decode_image(tmp_path / "x.jpg", 64).astype(int) - 90).max() <= 1 and not recwarn.list
    # a header that claims more than any camera makes
    Image.new("1", (30_000, 15_000)).save(tmp_path / "y.png")
    assert image_data.decode_image(tmp_path / "y.png", 8) == DAMAGED


def test_heic_is_read_where_pillow_heif_is(tmp_path, monkeypatch):
    for i in range(10):
        picture(tmp_path / f"{i}.png", (80, 80), i)
    for name in ("IMG.HEIC", "really_heic.jpg"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for registry in ("OPEN", "ID"):
        monkeypatch.setattr(Image, registry, copy.copy(getattr(Image, registry)))
    Image.OPEN.pop("HEIF", None)
    splits = [load_data(tmp_path, split) for split in ("train", "test")]
    assert sum(map(len, splits)) == 10
    line = image_data.describe(*splits, labels=False).split("\n")[1]
    assert line.startswith("left out: 2 in HEIC, which needs `pip install pillow-heif`, such as ")
    # as the package does, with a reader of its own
    Image.register_open("HEIF", lambda *_: Image.new("RGB", (80, 80), "red"), lambda start: b"ftypheic" in start)
    splits = [load_data(tmp_path, split) for split in ("train", "test")]
    assert sum(map(len, splits)) == 12 and not splits[0].left_out | splits[1].left_out


def test_what_is_transparent_shows_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 127)).save(tmp_path / "half.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "palette.png", transparency=0)
    for name, colour in {"clear": 255, "half": [255, 128, 128], "palette": 255}.items():
        assert (image_data.decode_image(tmp_path / f"{name}.png", 8) == colour).all(), name


PNG = io.BytesIO()
Image.fromarray((np.arange(300) % 256).astype(np.uint8).reshape(10, 10, 3)).save(PNG, "PNG")


@given(mutations(PNG.getvalue()))
def test_fuzzed_images_decode_or_are_left_out(fuzz_folder, content):
    (fuzz_folder / "x.png").write_bytes(content)
    decoded = image_data.decode_image(fuzz_folder / "x.png", 8)
    assert isinstance(decoded, str) or decoded.shape == (8, 8, 3)


def test_cifar_batches(tmp_path, monkeypatch):
    contents = write_cifar_batches(tmp_path / "cifar-10-batches-py", monkeypatch)
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = load_data(path)
        assert data.images.shape == (50, 3, 32, 32) and data.flip and not data.crop and data.classes[9] == "truck"
        assert np.array_equal(data.images[0].flatten(), contents["data_batch_1"]["data"][0])
    assert load_data(tmp_path, "test", image_size=16).images.shape == (10, 3, 16, 16)
    # a stranger's are not unpickled
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    with pytest.raises(UserError, match="missing or damaged"):
        load_data(tmp_path)
    assert not (tmp_path / "pwned").exists()


# --- augmentation -------------------------------------------------------------------------------------------------


def make_data(images, **settings):
    defaults = {"labels": None, "classes": [], "name": "x", "flip": False, "image_size": images.shape[-1]}
    return image_data.ImageData(images, **(defaults | settings))


def test_each_image_is_flipped_by_its_own_coin():
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    data = make_data(images, flip=True)
    batch = utils.to_uint8(augment(data, torch.arange(400), generator(5)))
    same = (batch == images).flatten(1).all(1)
    assert torch.equal(batch[~same], images.flip(3)[~same]) and 150 < same.sum() < 250
    assert torch.equal(utils.to_uint8(augment(data, torch.arange(400))), images)  # no generator, no chance
    data.flip = False
    assert torch.equal(utils.to_uint8(augment(data, torch.tensor([3, 0]), generator(0))), images[[3, 0]])


def test_crops_are_boxes_of_80_to_100_percent_at_any_place():
    # pixels count columns in the first channel and rows in the second, so a crop tells where it came from
    ramp = torch.arange(80, dtype=torch.uint8) * 3
    image = torch.stack([ramp.expand(80, 80), ramp[:, None].expand(80, 80), torch.zeros(80, 80, dtype=torch.uint8)])
    data = make_data(image.expand(300, 3, 80, 80), crop=True, image_size=64)
    x = utils.to_uint8(augment(data, torch.arange(300), generator(0))).float() / 3
    assert x.shape == (300, 3, 64, 64)
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


def test_a_png_on_which_torchvision_crashes_is_left_out(tmp_path):
    png = (
        "89504e470d0a1a0a0000000d494844520000000a0000000a0802000000025058ea0000002149444154789c6364606462c60d58e4e4e486"
    )
    png += "a534e3878f9ff049f3f108a2e9b539b8ab130be091060073ff08c36ca4ef8c0000000049454e44ae426082"
    (tmp_path / "x.png").write_bytes(bytes.fromhex(png))
    assert image_data.decode_image(tmp_path / "x.png", 8) in (DAMAGED, "cut off")


# --- files of samples ---------------------------------------------------------------------------------------------


def test_samples(tmp_path):
    images, labels = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8), torch.arange(5)
    save_samples(tmp_path / "x.npz", images, labels)
    loaded, loaded_labels, _ = load_samples(tmp_path / "x.npz")
    assert torch.equal(loaded, images) and loaded_labels.tolist() == [0, 1, 2, 3, 4]
    before = (tmp_path / "x.npz").read_bytes()
    save_samples(tmp_path / "x.npz", images, labels)
    assert (tmp_path / "x.npz").read_bytes() == before  # byte for byte


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), np.uint8)


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"arr_0": PIXELS, "arr_1": np.arange(5), "more": np.array([Malicious("unread")])}, ""),
        ({"samples": PIXELS.transpose(0, 3, 1, 2)}, ""),
        ({"images": PIXELS / 255}, "read as in [0, 1]"),
        ({"images": (PIXELS.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)}, "read as in [-1, 1]"),
    ],
)
def test_samples_of_other_programs(arrays, said, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **arrays)
    np.save(tmp_path / "x.npy", next(iter(arrays.values())))
    for path in (tmp_path / "x.npz", tmp_path / "x.npy"):
        images, labels, _ = load_samples(path)
        assert torch.equal(images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2)) and said in capsys.readouterr().err
        assert (labels is not None) == (path.suffix == ".npz" and "arr_1" in arrays)


def test_pictures_of_other_programs(tmp_path):
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    images, labels, _ = load_samples(tmp_path)
    assert torch.equal(images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2)) and labels is None
    for name in ("a/x.png", "b/y.jpg"):
        (tmp_path / "grey" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (100, 100, 100)).save(tmp_path / "grey" / name)
    images, labels, _ = load_samples(tmp_path / "grey")
    assert images.shape == (2, 1, 8, 8) and labels == ["a", "b"]
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "grey/a/x.png")  # read as a data set's images are
    Image.new("I;16", (8, 8), 257 * 20).save(tmp_path / "grey/b/y.png")
    (tmp_path / "grey/b/y.jpg").unlink()
    assert load_samples(tmp_path / "grey")[0].flatten(1).unique(dim=1).tolist() == [[255], [20]]
    (tmp_path / "empty").mkdir()
    for path, words in (("", "must be of one size"), ("empty", "it has no pictures"), ("x.npz", "not a readable file")):
        with pytest.raises(UserError, match=words):
            load_samples(tmp_path / path)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"pictures": np.zeros((2, 4, 4, 1), np.uint8)}, "an array called images"),
        ({"images": np.zeros((2, 4, 4, 1))}, "uint8"),
        ({"images": np.ones((2, 4, 4, 1), np.uint8)}, "uint8 in 0..255"),
        ({"images": np.zeros((0, 4, 4, 1), np.uint8)}, "N x H x W x C"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, "N x H x W x C"),
        ({"images": PIXELS, "labels": np.zeros(3, int)}, "labels"),
        ({"images": PIXELS, "labels": np.zeros(5)}, "labels"),
        ({"images": np.array([Malicious("pwned")])}, "not a readable"),
    ],
)
def test_sample_files_are_validated(arrays, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **arrays)
    with pytest.raises(UserError, match=words):
        load_samples("x.npz")
    assert not (tmp_path / "pwned").exists()
