"""The data sets: where each one comes from, how its files become uint8 tensors, and how batches are drawn from them.
And files of samples, which may have been made elsewhere.

Images rest in memory as uint8, N x C x H x W; a model sees float batches in [-1, 1], made by `augment`.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import ROOT, UserError, atomic_path, progress, say, to_model, to_uint8

CACHE = ROOT / ".cache"  # decoded photographs; deleting it only costs the time to decode them again
Image.MAX_IMAGE_PIXELS = 210_000_000  # phones make 200 megapixels; Pillow warns above this and refuses twice as many
warnings.filterwarnings("ignore", module="PIL")  # of metadata that is damaged, which does not matter here
with contextlib.suppress(ImportError):
    import pillow_heif  # type: ignore[import-not-found]

    pillow_heif.register_heif_opener()
IMAGE_SUFFIXES = (
    "avif bmp dib gif heic heif hif ico jfif jp2 jpe jpeg jpg pbm pgm png ppm psd tga tif tiff webp".split()
)
SPLIT_NAMES = ("train|training", "test|testing", "val|valid|validation|dev|eval")


@dataclass(frozen=True)
class DataSet:
    """A row of DATASETS: all that is particular to a data set. Sources that are left out do not have it."""

    title: str
    folders: tuple[str, ...]  # beside the scripts, or absolute; the first that is there and not empty is read
    image_size: int
    channels: int | None = 3  # None: as many as its files have
    classes: tuple[str, ...] = ()  # of files in MNIST's format, which hold numbers; folders name their own
    hub: str = ""  # its name on the Hugging Face hub
    torchvision: str = ""  # its class in torchvision.datasets
    kaggle: str = ""
    sample: str = ""  # a folder with a small part of it, which ships and stands in
    flat: bool = False  # may come without class folders
    crop: bool = False  # random crops, where the images are large enough
    flip: bool = True  # random horizontal flips
    recipe: dict = field(default_factory=dict)  # where its feature classifier departs from features.DEFAULT_RECIPE


DATASETS = {
    "fashion_mnist": DataSet(
        title="Fashion-MNIST",
        folders=("data/fashion_mnist", "/usr/share/datasets/fashion-mnist"),  # Debian's package puts it there
        image_size=28,
        channels=1,
        classes=tuple("T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")),
        hub="zalando-datasets/fashion_mnist",
        torchvision="FashionMNIST",
        sample="data/fashion_mnist_sample",
        flip=False,  # shoes all point one way
        recipe={
            # ends without flips: a classifier that is blind to them could not see that they put shoes off the data
            "cycles": [
                {"epochs": 10, "learning_rate": 0.2, "weight_decay": 5e-4, "shift": 2, "flip": True},
                {"epochs": 8, "learning_rate": 0.1, "weight_decay": 1e-4, "shift": 2, "flip": False},
                {"epochs": 12, "learning_rate": 0.07, "weight_decay": 1e-4, "shift": 1, "flip": False},
            ]
        },
    ),
    "cifar10": DataSet(
        title="CIFAR-10",
        folders=("cifar10",),
        image_size=32,
        hub="uoft-cs/cifar10",
        torchvision="CIFAR10",
        kaggle="swaroopkml/cifar10-pngs-in-folders",
        recipe={
            "widths": [48, 96, 192, 256],
            "depths": [1, 1, 1],
            "mirror": True,
            "cycles": [
                {"epochs": 24, "learning_rate": 0.1, "weight_decay": 5e-4, "shift": 3, "flip": True},
                {"epochs": 10, "learning_rate": 0.06, "weight_decay": 5e-4, "shift": 2, "flip": True},
            ],
        },
    ),
    "cifar10-64": DataSet(
        title="CIFAR-10 at 64 x 64",  # the course's
        folders=("cifar10-64",),
        image_size=64,
        kaggle="joaopauloschuler/cifar10-64x64-resized-via-cai-super-resolution",
    ),
    "landscapes": DataSet(
        title="landscapes",
        folders=("landscape_img_folder",),
        image_size=64,
        kaggle="arnaud58/landscape-pictures",
        flat=True,
        crop=True,
    ),
}


@dataclass
class ImageData:
    """A data set in memory. `augment` returns its batches as N x C x image_size x image_size."""

    images: torch.Tensor  # uint8, N x C x H x W, possibly memory-mapped; larger than image_size where crop is set
    labels: Any  # int64, N: index into classes; None where there are none
    classes: list[str]
    name: str
    flip: bool
    image_size: int
    crop: bool = False
    left_out: dict[str, str] = field(default_factory=dict)  # files and why they were left out

    def __len__(self) -> int:
        return len(self.images)


def load_data(name: str | Path, split="train", image_size=None, channels=None, labels=False) -> ImageData:
    """Load a data set of the table DATASETS or a folder of one's own; never touches the network. Raises UserError.

    A folder holds images, perhaps in class folders (`<class>/*`) and in folders for training and test (or validation);
    or torchvision's `cifar-10-batches-py`; or MNIST's IDX or parquet files. Without a test folder, a tenth of the
    images (chosen by a hash of their names) is the test split. Large photographs for training are kept at 1.25
    image_size, for `augment` to crop. channels: 1 or 3; by default one's own images have 1 where all of them are grey.
    labels: whether they are needed. Then images beside the class folders are left out; otherwise every image below
    counts, and there are labels only where each image has one.
    """
    title, name = name, str(name)
    if name in DATASETS:
        row = DATASETS[name]
        folder, image_size = _find(name, row), image_size or row.image_size
    else:
        folder = _own_folder(name)
        if not name or not folder.is_dir():
            raise UserError(f"no data called {name!r}: it is neither a folder nor one of {', '.join(DATASETS)}")
        name, row = folder.name, DataSet(folder.name, (), 0, channels=None, crop=True)
    arrays = _read_mnist(folder, split, name) or _read_cifar_batches(folder, split)
    if arrays:
        x, y, classes = torch.from_numpy(arrays[0]).contiguous(), torch.from_numpy(arrays[1]).long(), arrays[2]
        size = image_size or x.shape[-1]
        if (x.shape[-1], size) == (28, 32):
            x = torch.nn.functional.pad(x, (2, 2, 2, 2))  # the background is black: no pixel needs to be resampled
        data = ImageData(resize(x, size), y, classes, name, row.flip, size)
    else:
        data = _load_folder(folder, split, image_size, name, row, labels)
    if labels and data.labels is None:
        raise UserError(f"{title} has no labels, which a conditional model needs: use class folders")
    data.flip = data.flip and split == "train" and data.images.shape[1] == 3  # digits and shoes are not mirrored
    data.images = with_channels(data.images, channels or row.channels)
    return data


def _own_folder(name: str | Path) -> Path:
    return Path(os.path.expanduser(name)).resolve()


def short_name(name: str | Path) -> str:
    """What data are called: a name of the table, or that of a folder without its path."""
    return str(name) if str(name) in DATASETS else _own_folder(name).name


def _find(name: str, row: DataSet) -> Path:
    """The folder of a data set of the table. Raises UserError where it is not there."""
    fetch = f"`python download_datasets.py {name}`"
    for folder in map(ROOT.joinpath, row.folders):
        if folder.is_dir() and any(visible(os.listdir(folder))):
            return folder
    if row.sample and (ROOT / row.sample).is_dir():
        say(f"{row.title}: the shipped sample stands in; {fetch} gets all")
        return ROOT / row.sample
    raise UserError(f"{row.title} is not there: run {fetch} (or give it an archive you have with --from)")


def describe(train: ImageData, test: ImageData | None, labels: bool) -> str:
    """What was read, its classes too where labels are used, and in a line below what was left out and why."""
    size, kind = train.image_size, "grey" if train.images.shape[1] == 1 else "RGB"
    line = f"data: {len(train):,} images for training, {len(test) if test else 0:,} held out; {size} x {size} {kind}"
    if labels and train.labels is not None:
        count = "1 class" if len(train.classes) == 1 else f"{len(train.classes)} classes"
        line += f"; {count}: {', '.join(train.classes)}"
    left_out = train.left_out | (test.left_out if test else {})
    return line + (f"\nleft out: {_count(left_out)}" if left_out else "")


def _count(left_out: dict[str, str]) -> str:
    """In words, of files' names and why they are left out: how many for each reason, and one of them."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{len(some):,} {reason}, such as {min(some)}" for reason, some in names.items())


# --- MNIST's and CIFAR-10's own files: images (uint8, N x C x H x W), labels (N) and classes ----------------------


def _read_mnist(folder: Path, split: str, name: str) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """From IDX files (gzipped or not) or parquet files; None where the folder has neither."""
    if any(folder.glob("*-idx[13]-ubyte*")):
        prefix = folder / ("train" if split == "train" else "t10k")
        images, labels = (_read_idx(Path(f"{prefix}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        source = Path(f"{prefix}-*-ubyte")
    elif any(folder.glob("t*.parquet")):
        images, labels = _read_parquet(source := folder / f"{split}*.parquet")
    else:
        return None
    if labels.ndim != 1 or images.shape != (len(labels), 28, 28) or not set() < {*labels.tolist()} <= {*range(10)}:
        raise UserError(f"{source} should hold images of 28 x 28 and a label within 0..9 for each")
    plain = name.lower().replace("-", "_")  # a folder called after a data set holds its classes, others hold digits
    named = (row.classes for key, row in DATASETS.items() if row.classes and plain.startswith(key))
    return images[:, None], labels, list(next(named, "0123456789"))


def _read_idx(path: Path) -> np.ndarray:
    """A file of bytes, perhaps gzipped: 0, 0, 8 (unsigned byte), the number of dimensions, each as >i4, the data."""
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape).copy()
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UserError(f"{path}[.gz] is missing, damaged or ends early: {error}") from error


def _read_parquet(pattern: Path) -> tuple[np.ndarray, np.ndarray]:
    from pyarrow import parquet  # late: few need it

    try:
        table = parquet.read_table([str(path) for path in sorted(pattern.parent.glob(pattern.name))])
        files = (io.BytesIO(cell["bytes"]) for cell in table["image"].to_pylist())
        images = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
        return images, np.array(table["label"].to_pylist())
    except Exception as error:  # pyarrow and PIL each raise their own
        raise UserError(f"{pattern} has no readable images and labels: {error}") from error


def _read_cifar_batches(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    parent = folder.parent if folder.name == "cifar-10-batches-py" else folder
    if not (parent / "cifar-10-batches-py").is_dir():
        return None
    try:  # these files are pickles: torchvision compares their MD5 with the published ones before it reads them
        batches = torchvision.datasets.CIFAR10(parent, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{parent}/cifar-10-batches-py has a missing or damaged file: download it again") from error
    return batches.data.transpose(0, 3, 1, 2), np.array(batches.targets), batches.classes


# --- folders of images: below, a name is a file's path relative to the data's folder `root` -----------------------


def _load_folder(root: Path, split: str, image_size: int | None, name: str, row: DataSet, labels: bool) -> ImageData:
    splits, classes, left_out = _list_splits(root, labels)
    files, every = splits[split], [*splits["train"], *splits["test"]]
    if not files:
        raise UserError(f"{root} has no image for the {split} split (of ten or more, a tenth is held out)")
    size, crop = _judge_size(root, every, image_size) if row.crop else (image_size or row.image_size, False)
    sides = {"train": round(1.25 * size) if crop else size, "test": size}
    images, unreadable = _load_images(root, list(files), sides[split])
    left_out |= unreadable
    read = [folder for file, folder in files.items() if file not in unreadable]
    unread = set(files.values()) - set(read)
    if not read or (labels and unread):
        raise UserError(f"{root} has no readable image in {', '.join(sorted(unread)) or 'it'}: {_count(left_out)}")
    # both splits have as many channels, whichever one the colour is in
    grey = row.channels is None and is_grey(images)
    if grey and all(is_grey(_load_images(root, list(splits[part]), sides[part])[0]) for part in splits if splits[part]):
        images = images[:, :1]
        say(f"{root}: all images are grey, so they have one channel and are not mirrored (see --channels and --flip)")
    numbers = {folder: number for number, folder in enumerate(classes)}
    x, y = torch.from_numpy(images), torch.tensor([numbers[folder] for folder in read]) if classes else None
    return ImageData(x, y, classes, name, row.flip, size, crop and split == "train", left_out)


def _judge_size(root: Path, names: list[str], image_size: int | None) -> tuple[int, bool]:
    """The size for photographs of many sizes (three quarters are at least as large), and whether to crop them."""
    sides = {}
    for name in progress(names[:: 1 + (len(names) - 1) // 10_000], desc="reading sizes", unit="image"):
        with contextlib.suppress(Exception), Image.open(root / name) as image:  # what cannot be read is named later
            sides[name] = min(image.size)
    usual = sorted(sides.values())[len(sides) // 4] if sides else 64
    size = image_size or min(64, usual)
    small = [name for name, side in sides.items() if side < size]
    if small:
        say(f"{root}: {len(small):,} of {len(sides):,} images are smaller than {size} and enlarged, such as {small[0]}")
    return size, usual >= round(1.25 * size)  # enlarging images only to crop them would blur them


# --- which files count --------------------------------------------------------------------------------------------


def visible(names: Iterable[str]) -> list[str]:
    """Sorted, without what systems put beside the user's files."""
    return sorted(name for name in names if not name.startswith((".", "__MACOSX", "@eaDir", "$RECYCLE")))


def is_image(file: Path) -> bool:
    """By its suffix, or where that says nothing by its first bytes; it may still be damaged."""
    if file.suffix[1:].lower() in IMAGE_SUFFIXES:
        return True
    with contextlib.suppress(Exception), Image.open(file, formats=("JPEG", "PNG", "GIF", "WEBP")):
        return True
    return False


def is_run(names: Iterable[str]) -> bool:
    """Whether files of these names make a training run's folder, which a user may have put among the images."""
    return any(re.fullmatch(r"model\.safetensors|\.lock|state_.*\.pt", name) for name in names)


def files_below(root: Path, inside: str = "") -> Iterator[str]:
    """The names of all files below root / inside but hidden ones and those of runs, always in the same order."""
    folder = root / inside
    entries = {entry.name: entry.is_dir() for entry in os.scandir(folder)}
    if inside and is_run(entries):
        return
    yield from (inside + name for name in visible(entries) if not entries[name])
    for name in visible(entries):
        if entries[name] and not folder.resolve().is_relative_to((folder / name).resolve()):  # no link upwards
            yield from files_below(root, inside + name + os.sep)


def by_folder(names: Iterable[str], inside: str = "") -> tuple[str, dict[str, str]]:
    """The names that begin with `inside`, each with the folder that comes next or ""; sorted by it, 2 before 10.

    Folders that hold nothing but one folder of folders, as archives have around the data, are added to `inside`.
    """
    rest = {name: name[len(inside) :] for name in names if name.startswith(inside)}
    folders = {name: os.path.dirname(rest[name]).partition(os.sep)[0] for name in rest}
    if len(set(folders.values())) == 1 and "" not in folders.values():
        opened = by_folder(rest, inside + min(folders.values()) + os.sep)
        if "" not in opened[1].values():
            return opened
    padded = {folder: re.sub(r"\d+", lambda digits: digits[0].zfill(20), folder) for folder in folders.values()}
    return inside, dict(sorted(folders.items(), key=lambda item: padded[item[1]]))


def split_folders(images: list[str]) -> dict[str, dict[str, str]]:
    """The training images and, if they are apart, those held out, as from `by_folder`."""
    inside, folders = by_folder(images)
    pattern = r"(?<![a-z])({})[ _-]*(set|split|data|images)?(?![a-z])"  # as in seg_train, Testing, val2017
    names = list(dict.fromkeys(folders.values()))
    train, test, validation = (
        [name for name in names if re.search(pattern.format(words), name.lower())] for words in SPLIT_NAMES
    )
    held_out = [name for name in test + validation if name not in train]
    parts = [by_folder(images, inside + name + os.sep) for name in train[:1] + held_out[:1]]
    if not train or (not held_out and ("" in parts[0][1].values() or {*names} - {train[0], ""})):
        return {inside: folders}  # perhaps trains among other vehicles
    if held_out and held_out[0].lower() != "test":
        say(f"{held_out[0]}/ is held out")
    return dict(parts)


def _list_splits(root: Path, labels: bool) -> tuple[dict[str, dict[str, str]], list[str], dict[str, str]]:
    """Each split's images with the folders that hold them; the classes; other files and why they are left out.

    The folders are the classes, but where an image is in none or the splits differ: then there are no classes.
    """
    names = list(files_below(root))
    images = [name for name in names if is_image(root / name)]
    parts = split_folders(images)
    if labels:
        for folder in (root / inside / name for inside in parts for name in visible(os.listdir(root / inside))):
            if folder.is_dir() and not any(files_below(folder)) and not is_run(os.listdir(folder)):
                raise UserError(f"the class folder {folder} is empty: fill it or delete it")
        for inside, part in parts.items():
            parts[inside] = {name: folder for name, folder in part.items() if folder} or part
    (inside, train), (apart, test) = [*parts.items(), ("", {})][:2]
    classes, of_test = (list(dict.fromkeys(part.values())) for part in (train, test))
    if labels and test and of_test != classes:
        say(f"{root / apart} has other class folders than {root / inside}, of which a tenth is held out instead")
        test = {}
    if "" in classes or (test and of_test != classes):
        classes = []
    if not test:
        by_hash = sorted(train, key=lambda name: zlib.crc32(os.fsencode(name[len(inside) :])))
        # but one image of each class stays: a class that is never trained on could not be drawn
        tenth = set(by_hash[: len(train) // 10]).difference({train[name]: name for name in by_hash}.values())
        test = {name: train.pop(name) for name in [*train] if name in tenth}
    left_out = dict.fromkeys(set(names).difference(images), "not an image")
    left_out |= dict.fromkeys(set(images).difference(train, test), "outside of the splits and class folders")
    return {"train": train, "test": test}, classes, left_out


def describe_folder(name_or_path: str | Path) -> str | None:
    """The number of images in a folder of one's own, or of files where it has none, and a hash of names and sizes."""
    folder = _own_folder(name_or_path)
    if str(name_or_path) in DATASETS or not folder.is_dir():
        return None
    names = list(files_below(folder))
    parts = split_folders([name for name in names if is_image(folder / name)])
    images = [name for part in parts.values() for name in part]
    lines = [name + f"\0{status.st_size}\n".encode() for name, status in _file_facts(folder, images or names)]
    return f"{len(lines)} files, {hashlib.sha256(b''.join(lines)).hexdigest()[:16]}"


def _file_facts(root: Path, names: list[str]) -> Iterator[tuple[bytes, os.stat_result]]:
    """Each file's name, and its size and times, which a link to nowhere does not have."""
    for name in names:
        with contextlib.suppress(OSError):
            yield os.fsencode(name), (root / name).stat()


# --- from files to pixels -----------------------------------------------------------------------------------------

one_at_a_time = threading.Lock()  # for images that need gigabytes


def decode_image(path: Path, side: int) -> np.ndarray | str:
    """The centre square of an image file, antialiased to uint8 side x side x 3; or in a few words why there is none."""
    try:
        try:
            image = _read_rgb(path, side)
        except (SyntaxError, ValueError, UnidentifiedImageError):  # perhaps only because the metadata is damaged
            image = without_metadata(path.read_bytes())
        return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))
    except MemoryError:
        raise
    except UserError as error:
        return str(error)
    except Exception as error:  # a damaged image makes PIL raise OSError, SyntaxError, ValueError, struct.error, ...
        if reason := getattr(error, "strerror", None):
            return f"not readable ({reason})"
        if "HEIF" not in Image.OPEN and path.read_bytes()[4:8] == b"ftyp":
            return "in HEIC, which needs `pip install pillow-heif`"
        return "cut off" if "truncated" in str(error) else "damaged, too large or in no format that Pillow can open"


def _read_rgb(path: Path, side: int | None = None) -> Image.Image:
    """Upright; whole, or where a side is given at least twice as large as that where the file is."""
    with Image.open(path) as image:
        if side:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
        with one_at_a_time if image.width * image.height > 50_000_000 else contextlib.nullcontext():
            with contextlib.suppress(Exception):  # the camera's notes may be damaged
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)


def without_metadata(content: bytes) -> Image.Image:
    """A PNG or JPEG read for its pixels alone. (A PNG not by torchvision, whose decoder crashes on some damages.)"""
    if content[:4] != b"\x89PNG":
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        pixels = torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    kept, start = [content[:8]], 8
    while start < len(content):  # a part is its length (4 bytes), its name (4), the data and a checksum (4)
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        if content[start + 4 : start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[start:end])
        start = end
    return to_rgb(Image.open(io.BytesIO(b"".join(kept))))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB: other numbers are scaled by their range, and what is transparent lets white through."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bits(np.asarray(image), image.format))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_8_bits(x: np.ndarray, format: str | None) -> np.ndarray:
    """Greys as uint8. PNG has 16 bits; other files do not say their range: it is the smallest usual one that fits."""
    whole = x.dtype.kind in "iu"
    ranges = [65535] if format == "PNG" else [255, 4095, 65535, 2**31 - 1] if whole else [1, 255, 65535]
    low, high = x.min(), x.max()
    for i, top in enumerate(ranges):
        if -0.001 * top <= low and high <= 1.001 * top and (i == 0 or high > top / 64):  # not all but black
            scaled = x.astype(np.int64) * 255 // top if whole else (x.astype(np.float64) / top * 255).round()
            return scaled.clip(0, 255).astype(np.uint8)
    raise UserError("with numbers in an unusual range")


def _load_images(root: Path, names: list[str], side: int) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels (uint8, N x 3 x side x side), and why others cannot be read; each is decoded once and kept in CACHE."""
    record = np.dtype([("reason", "S100"), ("pixels", "u1", (side, side, 3))])

    def decode_all() -> Iterator[bytes]:
        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes outside of Python's lock
            results = pool.imap(lambda name: decode_image(root / name, side), names)
            for x in progress(results, total=len(names), desc=f"decoding {root.name}", unit="image"):
                yield np.array((x.encode(), 0) if isinstance(x, str) else (b"", x), record).tobytes()

    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in _file_facts(root, names)]
    key = repr((os.fsencode(root), side, "HEIF" in Image.OPEN, facts))
    cache = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    try:
        if not cache.exists():
            with atomic_path(cache) as temporary, open(temporary, "wb") as stream:
                stream.writelines(decode_all())
        records: np.ndarray = np.memmap(cache, record, "c")  # writes stay private
    except (UserError, OSError, ValueError) as error:
        say(f"the decoded images stay in memory: {error}")
        records = np.frombuffer(bytearray().join(decode_all()), record)
    unreadable = {name: reason.decode(errors="replace") for name, reason in zip(names, records["reason"]) if reason}
    pixels = records["pixels"][records["reason"] == b""] if unreadable else records["pixels"]
    return pixels.transpose(0, 3, 1, 2), unreadable


def is_grey(images: np.ndarray) -> bool:
    """Whether uint8 N x 3 x H x W images have no colour at all; the first that has one ends the search."""
    return all((image[:1] == image).all() for image in images)


def with_channels(images: torch.Tensor, channels: int | None) -> torch.Tensor:
    """uint8 N x C x H x W as grey or RGB; grey is the luminance, rounded as Pillow does."""
    if channels is None or channels == images.shape[1]:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)[:, None, None]
    return torch.cat([(((part * weights).sum(1, keepdim=True) + 32768) >> 16).byte() for part in images.split(1000)])


# --- batches ------------------------------------------------------------------------------------------------------


def augment(data: ImageData, index, generator: torch.Generator | None = None) -> torch.Tensor:
    """The images at `index` as a batch for training: float, N x C x image_size x image_size, in [-1, 1].

    Perhaps flipped where data.flip, and cropped where data.crop; without a generator each is shown as it is.
    """
    if data.crop and generator is not None:
        images = _random_crops(data, index, generator)
    else:
        images = resize(data.images[index], data.image_size)
    if data.flip and generator is not None:
        coin = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(coin[:, None, None, None], images.flip(3), images)
    return to_model(images)


def _random_crops(data: ImageData, index, generator: torch.Generator) -> torch.Tensor:
    """A box of 80-100% of the area, as wide or as high as still fits, at any place in each image, resized."""
    index, side = torch.as_tensor(index).tolist(), data.images.shape[-1]
    area, shape, top, left = torch.rand(4, len(index), generator=generator)
    area = 0.8 + 0.2 * area
    height, width = (area**shape * side).round(), (area ** (1 - shape) * side).round()
    top, left = (top * (side - height + 1)).floor(), (left * (side - width + 1)).floor()
    boxes = torch.stack([top, left, top + height, left + width], 1).int().tolist()
    # one by one, yet fast: PyTorch resizes uint8 images whose channels come last in vectorised integers
    crops = [data.images[i : i + 1, :, top:bottom, left:right] for i, (top, left, bottom, right) in zip(index, boxes)]
    return torch.cat([resize(crop, data.image_size) for crop in crops])


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """N x C x H x W, uint8 or float -> N x C x size x size, filtered so that nothing aliases."""
    if images.shape[2:] == (size, size):
        return images
    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


# --- files of samples ------------------------------------------------------------------------------------------------


def save_samples(path: str | Path, images: torch.Tensor, labels=None, source: dict | None = None) -> None:
    """Write an .npz: `images` (uint8, here N x C x H x W, in the file N x H x W x C), and where given `labels` (int64,
    N) and `source`, what made them."""
    arrays: dict[str, Any] = {"images": images.permute(0, 2, 3, 1), "labels": labels, "source": json.dumps(source)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})


def load_samples(path: str | Path) -> tuple[torch.Tensor, torch.Tensor | list[str] | None, dict]:
    """Images (uint8, N x C x H x W), labels and source that this or another program has written. Raises UserError.

    path: an .npz with `images`, `samples` or `arr_0`, and perhaps `labels` or `arr_1` (integers, N); or an .npy; both
    N x H x W x C or N x C x H x W, uint8 or float in [0, 1] or [-1, 1]. Or a folder of pictures of one size: where all
    of them are in class folders, the labels are the names of these, a list. Other programs' have the source {}.
    """
    if Path(path).is_dir():
        return *_read_pictures(Path(path)), {}
    arrays, source = _read_arrays(path), {}
    with contextlib.suppress(KeyError, ValueError, TypeError):
        source = dict(json.loads(str(arrays["source"])))
    images = next((arrays[name] for name in ("images", "samples", "arr_0") if name in arrays), np.empty(0))
    labels = next((arrays[name] for name in ("labels", "arr_1") if name in arrays), None)
    has_shape = images.ndim == 4 and images.size > 0 and {images.shape[1], images.shape[3]} & {1, 3}
    is_float = has_shape and images.dtype.kind == "f" and -1 <= images.min() < images.max() <= 1
    if not is_float and not (has_shape and images.dtype == np.uint8 and images.max() > 1):
        wanted = "N x H x W x C or N x C x H x W (C = 1 or 3), uint8 in 0..255 or float in [0, 1] or [-1, 1]"
        raise UserError(f"{path} needs an array called images, samples or arr_0 that is {wanted}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: labels must be one integer for each of the {len(images):,} images")
    if images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    x = torch.from_numpy(np.ascontiguousarray(images))
    if is_float:
        signed = x.min() < 0
        say(f"{path}: the images are floats, read as in {'[-1, 1]' if signed else '[0, 1]'}")
        x = to_uint8(x if signed else 2 * x - 1)
    return x, None if labels is None else torch.from_numpy(labels.astype(np.int64)), source


def _read_pictures(folder: Path) -> tuple[torch.Tensor, list[str] | None]:
    """All pictures below a folder, as one channel where all are grey, and the names of their class folders."""
    suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in suffixes and not f.name.startswith(".")]
    if not files:
        raise UserError(f"{folder} is not a readable folder of samples: it has no pictures ({', '.join(suffixes)})")
    arrays: list[np.ndarray] = []
    for file in progress(files, desc="reading", unit="image"):
        try:
            arrays.append(np.asarray(_read_rgb(file)))
        except (OSError, ValueError, SyntaxError, UserError) as error:
            raise UserError(f"{file} is not a readable picture") from error
        if arrays[-1].shape != arrays[0].shape:
            raise UserError(f"samples must be of one size, but {file} is larger or smaller than {files[0]}")
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if (x == x[:, :1]).all():
        x = x[:, :1]
    classes = [file.relative_to(folder).parts[0] for file in files if file.parent != folder]
    return x.contiguous(), classes if len(classes) == len(files) else None


def _read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Those of an .npz's arrays that `load_samples` looks for; an .npy's is called images. Raises UserError."""
    names = ("images", "samples", "arr_0", "labels", "arr_1", "source")
    try:
        with open(path, "rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"images": content}
            return {name: content[name] for name in names if name in content}
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise UserError(f"{path} is not a readable file or folder of samples: {error}") from error
