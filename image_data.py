"""The data sets: where each one comes from, how its files become uint8 tensors, and how batches are drawn from them.

Images rest in memory as uint8, N x C x H x W; a model sees float batches in [-1, 1], made by `augment`.
"""

import contextlib
import fnmatch
import functools
import gzip
import hashlib
import io
import math
import os
import re
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import ROOT, UserError, atomic_path, progress, say, to_model

CACHE = ROOT / ".cache"  # decoded photographs; deleting it only costs the time to decode them again
Image.MAX_IMAGE_PIXELS = 210_000_000  # phones make 200 megapixels; Pillow warns above this and refuses twice as many
warnings.filterwarnings("ignore", module="PIL")  # of metadata that is damaged, which does not matter here
HEIC = (".heic", ".heif", ".hif")
NO_HEIC = "in HEIC, which needs `pip install pillow-heif`"
SPLIT_NAMES = {"train": "train|training", "test": "test|testing", "validation": "val|valid|validation|dev|eval"}


# --- data ---------------------------------------------------------------------------------------------------------


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
    labels: torch.Tensor | None  # int64, N: index into classes
    classes: list[str]
    name: str
    flip: bool
    image_size: int
    crop: bool = False
    left_out: dict[str, list[str]] = field(default_factory=dict)  # why files were left out, and their names

    def __len__(self) -> int:
        return len(self.images)


def load_data(
    name_or_path: str | Path,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    labels: bool = False,
) -> ImageData:
    """Load a data set of the table DATASETS or a folder of one's own; never touches the network.

    A folder holds images in class folders (`<class>/*`) or directly, in folders for training and test (or validation)
    or not; or torchvision's `cifar-10-batches-py`; or MNIST's IDX or parquet files. Without a test folder, a tenth of
    the images (chosen by a hash of their names) is the test split. The train split of photographs that are large enough
    is kept at 1.25 image_size, for `augment` to crop. The test split is never flipped nor cropped.

    channels: 1 or 3; by default one's own images have 1 where all of them are grey.
    labels: whether they are needed. Then images beside the class folders are left out; otherwise every image below
    counts, and there are labels only where each image has one. Raises UserError.
    """
    name = str(name_or_path)
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}: it is train or test")
    if image_size is not None and image_size < 1:
        raise UserError(f"the image size must be 1 or more, not {image_size}")
    if channels not in (None, 1, 3):
        raise UserError(f"images have 1 channel (grey) or 3 (RGB), not {channels}")
    row = DATASETS.get(name)
    if row is not None:
        folder, image_size = _find(name, row), image_size or row.image_size
    else:
        folder = Path(name).expanduser().resolve()
        if not name or not folder.is_dir():
            raise UserError(f"no data called {name!r}: it is neither a folder nor one of {', '.join(DATASETS)}")
        name, row = folder.name, DataSet(folder.name, (), 0, channels=None, crop=True)
    found = read_mnist_files(folder, split)
    if found is not None:
        data = _mnist_data(*found, name, image_size)
    elif (folder / "cifar-10-batches-py").is_dir() or folder.name == "cifar-10-batches-py":
        data = _load_cifar_batches(folder, split, image_size or 32, name)
    else:
        data = _load_folder(folder, split, image_size, name, row, labels)
    if labels and data.labels is None:
        raise UserError(f"{name_or_path} has no labels, which a conditional model needs: use class folders")
    data.images = with_channels(data.images, channels or row.channels)
    return data


def describe(train: ImageData, test: ImageData | None, labels: bool) -> str:
    """What was read (its classes, too, where labels are used), and in a line below what was left out and why."""
    size, kind = train.image_size, "grey" if train.images.shape[1] == 1 else "RGB"
    line = f"data: {len(train):,} images for training, {len(test) if test else 0:,} held out; {size} x {size} {kind}"
    if labels and train.labels is not None:
        count = "1 class" if len(train.classes) == 1 else f"{len(train.classes)} classes"
        line += f"; {count}: {', '.join(train.classes)}"
    splits = [data.left_out for data in (train, test) if data]
    left_out = {reason: sorted({name for x in splits for name in x.get(reason, [])}) for x in splits for reason in x}
    return line + (f"\nleft out: {_count(left_out)}" if left_out else "")


def _count(left_out: dict[str, list[str]]) -> str:
    return "; ".join(f"{len(names):,} {reason}, such as {names[0]}" for reason, names in left_out.items())


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


def _mnist_data(images: np.ndarray, labels: np.ndarray, name: str, image_size: int | None) -> ImageData:
    x, size = torch.from_numpy(images)[:, None], image_size or 28
    if size == 32:
        x = torch.nn.functional.pad(x, (2, 2, 2, 2))  # the background is black: no pixel needs to be resampled
    elif size != 28:
        x = resize(x, size)
    plain = name.lower().replace("-", "_")  # a folder called after a data set holds its classes
    known = [row.classes for key, row in DATASETS.items() if row.classes and plain.startswith(key)]
    classes = list(known[0]) if known else [str(i) for i in range(10)]  # MNIST's digits
    return ImageData(x, torch.from_numpy(labels), classes, name, flip=False, image_size=size)  # digits are not mirrored


def read_mnist_files(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (uint8, N x 28 x 28) and labels (int64, N) from a folder's IDX files (gzipped or not) or parquet files.

    None where it has neither. Raises UserError, naming the file, where one is missing or damaged.
    """
    prefix = "train" if split == "train" else "t10k"
    parquet = sorted(folder.glob(f"{split}*.parquet"))
    if parquet:
        return _read_parquet(parquet)
    if not any(folder.glob("*-idx[13]-ubyte*")):
        if any(folder.glob("t*.parquet")):
            raise UserError(f"{folder / split}*.parquet is missing")
        return None
    paths = []
    for stem in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        found = [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]
        if not found:
            raise UserError(f"{folder / stem}[.gz] is missing")
        paths.append(found[0])
    return _check_mnist(_read_idx(paths[0], 3), _read_idx(paths[1], 1), *paths)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8 (unsigned byte), the number of dimensions, each as big-endian int32, the data."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or ends early: {error}") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header:
        raise UserError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise UserError(f"{path} should hold {math.prod(shape):,} bytes of data and holds {len(content) - header:,}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _read_parquet(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    import datasets  # takes seconds: only where it is needed

    images, labels = [], []
    try:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the error
        with tempfile.TemporaryDirectory() as cache:  # nothing is left in, or taken from, the user's cache
            table = datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=cache, keep_in_memory=True)
            for row in table.cast_column("image", datasets.Image()):
                images.append(np.asarray(row["image"].convert("L")))
                labels.append(int(row["label"]))
    except Exception as error:  # pyarrow, datasets and PIL each raise their own
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{paths[0]} is not a readable parquet file of images and labels: {reason[0]}") from error
    finally:
        datasets.enable_progress_bars()
    if len({image.shape for image in images}) != 1:
        raise UserError(f"{paths[0]} has no image, or images of different sizes")
    return _check_mnist(np.stack(images), np.array(labels), paths[0], paths[0])


def _check_mnist(images: np.ndarray, labels: np.ndarray, images_path, labels_path) -> tuple[np.ndarray, np.ndarray]:
    if images.shape[1:] != (28, 28) or len(images) == 0:
        raise UserError(f"{images_path} should hold images of 28 x 28 and has the shape {images.shape}")
    if len(labels) != len(images):
        raise UserError(f"{labels_path} has {len(labels):,} labels for {len(images):,} images")
    if labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{labels_path} has labels outside 0..9")
    return images, labels.astype(np.int64)


def _load_folder(root: Path, split: str, image_size: int | None, name: str, row: DataSet, labels: bool) -> ImageData:
    left_out: dict[str, list[str]] = {}
    listings = _list_splits(root, labels, left_out)
    files, labels_of, classes = listings[split]
    if not files:
        count = len(listings["train"].files)
        raise UserError(f"{root} has too few images ({count}) to hold out a tenth of them as the test split")
    size, large = image_size or row.image_size, False
    if row.crop:  # photographs of any size
        size, large = _judge_size(root, listings["train"].files + listings["test"].files, image_size)

    def read(part: str) -> tuple[np.ndarray, np.ndarray]:
        side = round(1.25 * size) if large and part == "train" else size
        return _load_images(root, listings[part].files, side)

    kept, images = read(split)
    _sort_by_reason(root, [files[i] for i in sorted(set(range(len(files))) - set(kept.tolist()))], left_out)
    y = np.array(labels_of)[kept]
    empty = sorted(set(labels_of) - set(y.tolist()))
    if not len(y) or (labels and empty):
        of_class = f" of the class {classes[empty[0]]}" if classes and empty else ""
        raise UserError(f"{root} has no readable image{of_class}")
    other = "test" if split == "train" else "train"
    grey = row.channels is None and is_grey(images) and (not listings[other].files or is_grey(read(other)[1]))
    if grey:
        images = images[:, :1]
        say(f"{root}: all images are grey, so they have one channel and are not mirrored (see --channels and --flip)")
    labelled, training = torch.from_numpy(y) if classes else None, split == "train"
    flip = training and row.flip and not grey
    return ImageData(torch.from_numpy(images), labelled, classes, name, flip, size, training and large, left_out)


def _list_splits(root: Path, labels: bool, left_out: dict[str, list[str]]) -> dict[str, "Listing"]:
    """The images of both splits. Raises UserError where there is none, or where classes that are needed differ."""
    folder, test_folder, unused = split_folders(root)
    train, test = list_images(folder, labels, left_out), None
    if test_folder is not None:
        test = list_images(test_folder, labels, left_out)
        if labels and not test.classes:
            say(f"{test_folder} has no class folders: a tenth of {folder} is held out instead")
            unused, test = [*unused, test_folder], None
        elif test.classes != train.classes:
            if labels:
                there, here = ", ".join(test.classes), ", ".join(train.classes)
                raise UserError(
                    f"{test_folder} has the classes {there}, {folder} has {here}: "
                    "labels are numbers in the order of the names, so both must have the same"
                )
            train, test = train._replace(classes=[]), test._replace(classes=[])
    for other in unused:
        names = [_below(root, file) for file in _files_below(other) if is_image(file)]
        left_out.setdefault("in folders that are neither trained on nor held out", []).extend(names)
    if test is None:
        order = sorted(range(len(train.files)), key=lambda i: zlib.crc32(os.fsencode(_below(folder, train.files[i]))))
        tenth = len(order) // 10
        train, test = train.select(sorted(order[tenth:])), train.select(sorted(order[:tenth]))
    return {"train": train, "test": test}


def _judge_size(root: Path, files: list[Path], image_size: int | None) -> tuple[int, bool]:
    """The size for photographs of many sizes, by default at most 64, and whether they are large enough for crops.

    A few small ones among them do not decide: three quarters are at least as large.
    """
    files = files[:: math.ceil(len(files) / 10_000)]
    sides = _read_all(root, files, shorter_side, np.dtype("<i4"), "reading sizes")
    if not len(sides):
        raise UserError(f"{root} has no readable image: {_count({why_unreadable(files[0]): [files[0].name]})}")
    usual = int(np.sort(sides["value"])[len(sides) // 4])
    size = image_size or min(64, usual)
    small = sides[sides["value"] < size]
    if len(small):
        example = f"{_below(root, files[small['file'][0]])}, whose shorter side has {small['value'][0]} pixels"
        count = f"{len(small):,} of {len(sides):,}"
        say(f"{root}: {count} images are smaller than {size} and are enlarged, such as {example}")
    return size, usual >= round(1.25 * size)  # enlarging images only to crop them would blur them


def _load_cifar_batches(root: Path, split: str, image_size: int, name: str) -> ImageData:
    import torchvision

    parent = root.parent if root.name == "cifar-10-batches-py" else root
    try:  # these files are pickles: torchvision compares their MD5 with the published ones before it reads them
        batches = torchvision.datasets.CIFAR10(parent, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{parent}/cifar-10-batches-py has a missing or damaged file: download it again") from error
    x = torch.from_numpy(batches.data).permute(0, 3, 1, 2)
    if image_size != 32:
        x = resize(x, image_size)
    return ImageData(x.contiguous(), torch.tensor(batches.targets), batches.classes, name, split == "train", image_size)


# --- which files --------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    files: list[Path]
    labels: list[int]  # indices into classes; 0 where there are none
    classes: list[str]

    def select(self, index: list[int]) -> "Listing":
        return Listing([self.files[i] for i in index], [self.labels[i] for i in index], self.classes)


def visible(names: Iterable[str]) -> list[str]:
    """Sorted, without what systems put beside the user's files."""
    return sorted(name for name in names if not name.startswith((".", "__MACOSX", "@eaDir", "$RECYCLE")))


def by_number(name: str) -> list:
    """A key that sorts names as people count: 2 before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def subfolders(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(visible(os.listdir(folder)), key=by_number) if (folder / name).is_dir()]


@functools.cache
def image_suffixes() -> set[str]:
    """Of all that Pillow reads; with pillow-heif that is HEIC, too."""
    with contextlib.suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found]

        pillow_heif.register_heif_opener()
    kinds = Image.registered_extensions().items()
    no_pictures = ("BUFR", "GRIB", "HDF5", "MPEG")
    return {suffix for suffix, kind in kinds if kind in Image.OPEN and kind not in no_pictures}


def is_image(file: Path) -> bool:
    """By its suffix, or where that says nothing by its first bytes; it may still be damaged."""
    if file.suffix.lower() in image_suffixes():
        return True
    with contextlib.suppress(OSError), open(file, "rb") as stream:
        start = stream.read(12)
        return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or start[::8] + start[8:] == b"RWWEBP"
    return False


def split_folders(root: Path) -> tuple[Path, Path | None, list[Path]]:
    """The folder of training images, the one that is held out (None: a part of the first), and those of neither."""
    folder = _open(root)
    own, below = _contents(folder)
    kinds: dict[str, list[Path]] = {"train": [], "test": [], "validation": [], "": []}
    for entry in below:
        kinds[_split_of(entry.name)].append(entry)
    held_out, others = kinds["test"] + kinds["validation"], kinds[""]
    if not kinds["train"]:
        return folder, None, []
    train = kinds["train"][0]
    flat = _contents(_open(train))[0]
    if flat and not held_out and (others or own):
        return folder, None, []  # trains among other vehicles, or an album beside images
    if len(kinds["train"]) > 1 or (others and flat == bool(held_out)):
        names = ", ".join(entry.name for entry in below)
        raise UserError(
            f"{folder} can be read in two ways: {train.name}/ as the training images and the rest as other folders, or "
            f"all as the classes {names}: rename {train.name}/, or move what does not belong to the data out of it"
        )
    if held_out and held_out[0].name.lower() != "test":
        say(f"{folder}: {held_out[0].name}/ is held out")
    return _open(train), _open(held_out[0]) if held_out else None, held_out[1:] + others


def _split_of(name: str) -> str:
    """train, test or validation where a folder's name says so, as in seg_train, Testing, val2017; otherwise nothing."""
    for split, words in SPLIT_NAMES.items():
        if re.search(rf"(?<![a-z])({words})[ _-]*(set|split|data|images)?(?![a-z])", name.lower()):
            return split
    return ""


def _contents(folder: Path) -> tuple[bool, list[Path]]:
    """Whether images lie in a folder itself, and which of its folders have some."""
    own = any(is_image(folder / name) for name in visible(os.listdir(folder)) if not (folder / name).is_dir())
    return own, [entry for entry in subfolders(folder) if any(map(is_image, _files_below(entry)))]


def _open(folder: Path) -> Path:
    """Past the folders that hold nothing but one folder of folders, as archives have around the data."""
    own, below = _contents(folder)
    if own or len(below) != 1 or _contents(below[0])[0]:
        return folder
    return _open(below[0])


def list_images(folder: Path, labels: bool = True, left_out: dict[str, list[str]] | None = None) -> Listing:
    """The images of a folder of class folders, or of any other folder; `left_out` is told of other files.

    labels: whether they are needed; see `load_data`. Raises UserError for an empty class or folder.
    """
    left_out = {} if left_out is None else left_out

    def sort_out(files: list[Path]) -> list[Path]:
        images = []
        for file in files:
            if is_image(file):
                images.append(file)
            else:
                reason = NO_HEIC if file.suffix.lower() in HEIC else "not an image"
                left_out.setdefault(reason, []).append(_below(folder, file))
        return images

    own = sort_out([folder / name for name in visible(os.listdir(folder)) if not (folder / name).is_dir()])
    classes = {}
    for entry in subfolders(folder):
        found = list(_files_below(entry))
        if images := sort_out(found):
            classes[entry.name] = images
        elif labels and not found and not is_run(os.listdir(entry)):
            raise UserError(f"the class folder {entry} is empty: fill it or delete it")
    if labels and classes and own:
        inside = sum(map(len, classes.values()))
        if len(own) > inside:
            raise UserError(
                f"{folder} has {len(own):,} images of no class beside {inside:,} in the class folders "
                f"{', '.join(classes)}: move each into its class, or train without labels, which reads them all"
            )
        left_out.setdefault("beside the class folders", []).extend(_below(folder, file) for file in own)
        own = []
    files = own + [file for images in classes.values() for file in images]
    if not files:
        raise UserError(f"{folder} has no image")
    if own:
        return Listing(files, [0] * len(files), [])
    return Listing(files, [i for i, images in enumerate(classes.values()) for _ in images], list(classes))


def is_run(names: list[str]) -> bool:
    """Whether files of these names make a training run's folder, which a user may have put among the images."""
    return "model.safetensors" in names or ".lock" in names or bool(fnmatch.filter(names, "state_*.pt"))


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its folders but hidden ones and runs', always in the same order."""

    def refuse(error):
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        if is_run(names):
            folders[:] = names[:] = []
        folders[:] = visible(folders)
        yield from (Path(parent, name) for name in visible(names))


def describe_folder(name_or_path: str | Path) -> str | None:
    """What tells a folder of one's own from others of its name, wherever it lies: its images' number and a hash.

    The hash is of their names and sizes. None for built-in data.
    """
    folder = Path(name_or_path).expanduser().resolve()
    if str(name_or_path) in DATASETS or not folder.is_dir():
        return None
    facts = [name + f"\0{status.st_size}\n".encode() for name, status in _file_facts(folder, _data_files(folder))]
    return f"{len(facts)} files, {hashlib.sha256(b''.join(facts)).hexdigest()[:16]}"


def _data_files(folder: Path) -> list[Path]:
    """The images of both splits; all files of a folder that holds the data in other formats."""
    parts = [part for part in split_folders(folder)[:2] if part and any(_contents(part))]
    return [file for part in parts for file in list_images(part, False).files] or list(_files_below(folder))


def _file_facts(folder: Path, files: Iterable[Path]) -> Iterator[tuple[bytes, os.stat_result]]:
    """Each file's path below the folder, and its size and times. A link to nowhere has none, and is passed over."""
    for file in files:
        with contextlib.suppress(OSError):
            yield os.fsencode(_below(folder, file)), file.stat()


def _below(folder: Path, file: Path) -> str:
    """The file's path relative to the folder it is in (Path.relative_to takes a second for 50,000 files)."""
    return str(file)[len(str(folder)) + 1 :]


# --- from files to pixels -----------------------------------------------------------------------------------------

one_at_a_time = threading.Lock()  # for images that need gigabytes


def to_rgb(image: Image.Image, format: str | None = None) -> Image.Image:
    """The image in 8-bit RGB: other numbers are scaled by their range, and what is transparent lets white through."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bits(np.asarray(image), format))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_8_bits(x: np.ndarray, format: str | None) -> np.ndarray:
    """Greys as uint8. PNG has 16 bits; other files do not say their range, which is the smallest usual one that fits.

    Raises UserError where none does, or where one would leave the image all but black.
    """
    whole = x.dtype.kind in "iu"
    ranges = [65535] if format == "PNG" else [255, 4095, 65535, 2**31 - 1] if whole else [1, 255, 65535]
    low, high = x.min(), x.max()
    for i, top in enumerate(ranges):
        if -0.001 * top <= low and high <= 1.001 * top and (i == 0 or high > top / 64):
            scaled = x.astype(np.int64) * 255 // top if whole else (x.astype(np.float64) / top * 255).round()
            return scaled.clip(0, 255).astype(np.uint8)
    raise UserError("with numbers in an unusual range")


def upright(image: Image.Image) -> Image.Image:
    """Turned as the camera noted it, or as it is where its notes cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # pixels that cannot be read are an error a moment later
        return image


def _decode(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            with one_at_a_time if math.prod(image.size) > 50_000_000 else contextlib.nullcontext():
                rgb = to_rgb(upright(image), image.format)
    except (SyntaxError, ValueError, UnidentifiedImageError):
        # Pillow refuses a PNG or JPEG for some damages of its metadata: torchvision reads the pixels only, all or none
        import torchvision

        try:
            pixels = torchvision.io.decode_image(torchvision.io.read_file(str(path)), "RGB")
        except RuntimeError:
            pixels = None
        if pixels is None:
            raise
        rgb = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return np.asarray(ImageOps.fit(rgb, (side, side), Image.Resampling.BILINEAR))


def decode_image(path: Path, side: int) -> np.ndarray | None:
    """The centre square of an image file, antialiased to uint8 side x side x 3; None where it cannot be decoded."""
    try:
        return _decode(path, side)
    except MemoryError:
        raise
    except Exception:  # a damaged image makes PIL raise OSError, SyntaxError, ValueError, struct.error, ...
        return None


def why_unreadable(path: Path) -> str:
    """In a few words, why `decode_image` gives nothing."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
        if not start:
            return "empty"
        if start[4:8] == b"ftyp" and ".heic" not in image_suffixes():
            return NO_HEIC
        _decode(path, 8)
    except UserError as error:
        return str(error)
    except UnidentifiedImageError:
        return "in no format that Pillow can open"
    except Image.DecompressionBombError:
        return "larger than 420 megapixels"
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            return f"not readable ({error.strerror})"
        return "cut off" if "truncated" in str(error).lower() else "damaged"
    return "damaged"


def shorter_side(path: Path) -> np.ndarray | None:
    with contextlib.suppress(Exception), Image.open(path) as image:
        return np.array(min(image.size), "<i4")
    return None


@contextlib.contextmanager
def in_threads(read: Callable, files: list[Path], description: str) -> Iterator[Iterable[np.ndarray | None]]:
    """`read` of every file, in order, in several threads (PIL decodes outside of Python's lock), with a bar."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        yield progress(pool.map(read, files), total=len(files), desc=description, unit="image")
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all the others


def decode_images(files: list[Path], side: int, description: str):
    """`decode_image` of every file, as `in_threads`."""
    return in_threads(lambda file: decode_image(file, side), files, description)


def _load_images(folder: Path, files: list[Path], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the files (their indices) are readable images, and their pixels, uint8 N x 3 x side x side."""
    value = np.dtype(("u1", (side, side, 3)))
    records = _read_all(folder, files, lambda file: decode_image(file, side), value, f"decoding {folder.name}")
    return records["file"].copy(), records["value"].transpose(0, 3, 1, 2)


def _read_all(folder: Path, files: list[Path], read: Callable, value: np.dtype, description: str) -> np.ndarray:
    """`read` each file once: the results are kept, memory-mapped, under CACHE.

    A record has a file's index and its value; a file of which `read` gives None has none.
    """
    record = np.dtype([("file", "<i8"), ("value", value)])
    key = hashlib.sha256(os.fsencode(folder) + f"\0{value}\0{'.heic' in image_suffixes()}\n".encode())
    for name, status in _file_facts(folder, files):
        key.update(name + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    cache = CACHE / f"{key.hexdigest()[:32]}.bin"

    def write(stream) -> None:
        with in_threads(read, files, description) as values:
            for i, x in enumerate(values):
                if x is not None:
                    stream.write(np.int64(i).astype("<i8").tobytes() + x.tobytes())

    try:
        if not cache.exists():
            with atomic_path(cache) as temporary, open(temporary, "wb") as stream:
                write(stream)
        # "c": writes stay private; PyTorch warns about read-only arrays
        return np.memmap(cache, record, "c") if cache.stat().st_size else np.empty(0, record)
    except (UserError, OSError, ValueError) as error:
        say(f"the decoded images stay in memory: {error}")
        buffer = io.BytesIO()
        write(buffer)
        return np.frombuffer(buffer.getbuffer(), record)


def _sort_by_reason(folder: Path, files: list[Path], left_out: dict[str, list[str]]) -> dict[str, list[str]]:
    """`left_out`, with these unreadable files added."""
    for file in files:
        left_out.setdefault(why_unreadable(file), []).append(_below(folder, file))
    return left_out


def say_left_out(folder: Path, files: list[Path], total: int) -> None:
    """Say which files are no readable images, and why, if any."""
    if files:
        say(f"{folder}: left out {len(files)} of {total:,} files: {_count(_sort_by_reason(folder, files, {}))}")


def is_grey(images: np.ndarray) -> bool:
    """Whether uint8 N x 3 x H x W images have no colour at all; the first that has one ends the search."""
    parts = (images[i : i + 100] for i in range(0, len(images), 100))
    return all((part[:, :1] == part).all() for part in parts)


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

    Flips each image with probability 1/2 where data.flip, and cuts and resizes a random part of 80-100% of its area
    where data.crop. Depends on the generator only; without one it flips nothing and shows each image whole.
    """
    if data.crop and generator is not None:
        images = _random_crops(data, index, generator)
    else:
        images = data.images[index]
        if images.shape[-1] != data.image_size:
            images = resize(images, data.image_size)
    if data.flip and generator is not None:
        coin = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        images = torch.where(coin.to(images.device)[:, None, None, None], images.flip(3), images)
    return to_model(images)


def _random_crops(data: ImageData, index, generator: torch.Generator) -> torch.Tensor:
    """A box of 80-100% of the area at any place in each image, resized to image_size.

    The box is as wide or as high as still fits (torchvision's RandomResizedCrop draws again until it fits).
    """
    index = torch.as_tensor(index)
    side = data.images.shape[-1]
    area, shape, top, left = torch.rand(4, len(index), generator=generator, device=generator.device)
    area = 0.8 + 0.2 * area
    height, width = (area**shape * side).round(), (area ** (1 - shape) * side).round()
    top, left = (top * (side - height + 1)).floor(), (left * (side - width + 1)).floor()
    boxes = torch.stack([top, left, top + height, left + width], 1).int().tolist()
    # one by one, yet fast: PyTorch resizes uint8 images whose channels come last in vectorised integers
    return torch.cat(
        [
            resize(data.images[i : i + 1, :, top:bottom, left:right], data.image_size)
            for i, (top, left, bottom, right) in zip(index.tolist(), boxes)
        ]
    )


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """N x C x H x W, uint8 or float -> N x C x size x size, filtered so that nothing aliases."""
    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
