"""The data sets: where each one comes from, how its files become uint8 tensors, and how batches are drawn from them.

Images rest in memory as uint8, N x C x H x W; a model sees float batches in [-1, 1], made by `augment`.
"""

import contextlib
import fnmatch
import functools
import gzip
import hashlib
import io
import itertools
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import ROOT, UserError, atomic_path, progress, say, to_model

CACHE = ROOT / ".cache"  # decoded photographs; deleting it only costs the time to decode them again
Image.MAX_IMAGE_PIXELS = 210_000_000  # phones make 200 megapixels; Pillow warns above this and refuses twice as many
warnings.filterwarnings("ignore", module="PIL")  # of metadata that is damaged, which does not matter here
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
    left_out: dict[str, str] = field(default_factory=dict)  # files and why they were left out

    def __len__(self) -> int:
        return len(self.images)


def load_data(
    name: str | Path, split="train", image_size: int | None = None, channels: int | None = None, labels: bool = False
) -> ImageData:
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
        folder = Path(name).expanduser().resolve()
        if not name or not folder.is_dir():
            raise UserError(f"no data called {name!r}: it is neither a folder nor one of {', '.join(DATASETS)}")
        name, row = folder.name, DataSet(folder.name, (), 0, channels=None, crop=True)
    arrays = _read_mnist(folder, split, name) or _read_cifar_batches(folder, split)
    if arrays:
        x, size = torch.from_numpy(arrays[0]).contiguous(), image_size or arrays[0].shape[-1]
        if (x.shape[-1], size) == (28, 32):
            x = torch.nn.functional.pad(x, (2, 2, 2, 2))  # the background is black: no pixel needs to be resampled
        elif x.shape[-1] != size:
            x = resize(x, size)
        flip = split == "train" and x.shape[1] == 3  # digits and shoes are not mirrored
        data = ImageData(x, torch.from_numpy(arrays[1]).long(), arrays[2], name, flip, size)
    else:
        data = _load_folder(folder, split, image_size, name, row, labels)
    if labels and data.labels is None:
        raise UserError(f"{title} has no labels, which a conditional model needs: use class folders")
    data.images = with_channels(data.images, channels or row.channels)
    return data


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


def _count(left_out: Mapping[str, str]) -> str:
    """In words, of files' names and why they are left out: how many for each reason, and one of them."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{len(some):,} {reason}, such as {min(some)}" for reason, some in names.items())


# --- MNIST's and CIFAR-10's own files -----------------------------------------------------------------------------

Arrays = tuple[np.ndarray, np.ndarray, list[str]]  # images (uint8, N x C x H x W), labels (N), classes


def _read_mnist(folder: Path, split: str, name: str) -> Arrays | None:
    """From IDX files (gzipped or not) or parquet files; None where the folder has neither."""
    prefix = {"train": "train", "test": "t10k"}[split]
    if any(folder.glob(f"{split}*.parquet")):
        x_path = y_path = folder / f"{split}*.parquet"
        images, labels = _read_parquet(x_path)
    elif any(folder.glob("*-idx[13]-ubyte*")):
        x_path, y_path = folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte"
        images, labels = _read_idx(x_path), _read_idx(y_path)
    elif any(folder.glob("t*.parquet")):
        raise UserError(f"{folder / split}*.parquet is missing")
    else:
        return None
    if not len(images) or images.shape[1:] != (28, 28):
        raise UserError(f"{x_path} should hold images of 28 x 28 and has the shape {images.shape}")
    if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{y_path} should hold a label within 0..9 for each of {len(images):,} images")
    plain = name.lower().replace("-", "_")  # a folder called after a data set holds its classes
    known = [row.classes for key, row in DATASETS.items() if row.classes and plain.startswith(key)]
    return images[:, None], labels, list(known[0]) if known else [str(i) for i in range(10)]  # MNIST's digits


def _read_idx(path: Path) -> np.ndarray:
    """A file of bytes, perhaps gzipped: 0, 0, 8 (unsigned byte), the number of dimensions, each as >i4, the data."""
    zipped = path.with_name(f"{path.name}.gz")
    if not path.is_file() and not zipped.is_file():
        raise UserError(f"{path}[.gz] is missing")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
        if content[:3] != bytes((0, 0, 8)):
            raise ValueError("it does not begin as an IDX file of bytes")
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    except (EOFError, IndexError, ValueError, struct.error, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or ends early: {error}") from error


def _read_parquet(pattern: Path) -> tuple[np.ndarray, np.ndarray]:
    from pyarrow import parquet  # late: few need it

    try:
        table = parquet.read_table([str(path) for path in sorted(pattern.parent.glob(pattern.name))])
        files = (io.BytesIO(cell["bytes"]) for cell in table["image"].to_pylist())
        images = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
        return images, np.array(table["label"].to_pylist())
    except Exception as error:  # pyarrow and PIL each raise their own
        raise UserError(f"{pattern} has no readable images and labels: {error}") from error


def _read_cifar_batches(folder: Path, split: str) -> Arrays | None:
    parent = folder.parent if folder.name == "cifar-10-batches-py" else folder
    if not (parent / "cifar-10-batches-py").is_dir():
        return None
    try:  # these files are pickles: torchvision compares their MD5 with the published ones before it reads them
        batches = torchvision.datasets.CIFAR10(parent, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{parent}/cifar-10-batches-py has a missing or damaged file: download it again") from error
    return batches.data.transpose(0, 3, 1, 2), np.array(batches.targets), batches.classes


# --- folders of images --------------------------------------------------------------------------------------------


def _load_folder(root: Path, split: str, image_size: int | None, name: str, row: DataSet, labels: bool) -> ImageData:
    listings, left_out = _list_splits(root, labels)
    files = {part: list(itertools.chain(*groups.values())) for part, groups in listings.items()}
    every = files["train"] + files["test"]
    if not files[split]:
        raise UserError(f"{root} has too few images ({len(every)}) to hold out a tenth of them as the test split")
    size, large = _judge_size(root, every, image_size) if row.crop else (image_size or row.image_size, False)
    sides = {"train": round(1.25 * size) if large else size, "test": size}
    images, reasons = _load_images(root, files[split], sides[split])
    left_out |= {file: reason for file, reason in zip(files[split], reasons) if reason}
    names = {_below(root, file): reason for file, reason in left_out.items()}
    same = listings["train"].keys() == listings["test"].keys()
    classes = list(listings[split]) if same and "" not in listings[split] else []
    unreadable = [name for name, group in listings[split].items() if group and all(file in left_out for file in group)]
    if not len(images) or (labels and unreadable):
        of_class = f" of the class {unreadable[0]}" if classes else ""
        raise UserError(f"{root} has no readable image{of_class}: {_count(names)}")
    grey = row.channels is None and is_grey(images)
    for part in files if grey else ():  # both splits have the same channels, whichever one the colour is in
        grey = grey and (not files[part] or is_grey(_load_images(root, files[part], sides[part])[0]))
    if grey:
        images = images[:, :1]
        say(f"{root}: all images are grey, so they have one channel and are not mirrored (see --channels and --flip)")
    y = [label for label, group in enumerate(listings[split].values()) for file in group if file not in left_out]
    flip, crop = split == "train" and row.flip and not grey, split == "train" and large
    x, labelled = torch.from_numpy(images), torch.tensor(y) if classes else None
    return ImageData(x, labelled, classes, name, flip, size, crop, names)


def _judge_size(root: Path, files: list[Path], image_size: int | None) -> tuple[int, bool]:
    """The size for photographs of many sizes (three quarters are at least as large), and whether to crop them."""
    sides = {}
    for file in progress(files[:: math.ceil(len(files) / 10_000)], desc="reading sizes", unit="image"):
        with contextlib.suppress(Exception), Image.open(file) as image:  # what cannot be read is named later
            sides[file] = min(image.size)
    usual = sorted(sides.values())[len(sides) // 4] if sides else 64
    size = image_size or min(64, usual)
    small = [file for file, side in sides.items() if side < size]
    if small:
        example = f"{_below(root, small[0])}, whose shorter side has {sides[small[0]]} pixels"
        count = f"{len(small):,} of {len(sides):,}"
        say(f"{root}: {count} images are smaller than {size} and are enlarged, such as {example}")
    return size, usual >= round(1.25 * size)  # enlarging images only to crop them would blur them


# --- which files --------------------------------------------------------------------------------------------------

Groups = dict[str, list[Path]]  # the images below a folder by the folder in it that holds them, "" those in it itself


def visible(names: Iterable[str]) -> list[str]:
    """Sorted, without what systems put beside the user's files."""
    return sorted(name for name in names if not name.startswith((".", "__MACOSX", "@eaDir", "$RECYCLE")))


def by_number(name: str) -> list:
    """A key that sorts names as people count: 2 before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


@functools.cache
def image_suffixes() -> set[str]:
    """Of all that Pillow reads; with pillow-heif that is HEIC, too."""
    with contextlib.suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found]

        pillow_heif.register_heif_opener()
    no_pictures = ("BUFR", "GRIB", "HDF5", "MPEG")
    kinds = Image.registered_extensions().items()
    return {suffix for suffix, kind in kinds if kind in Image.OPEN and kind not in no_pictures}


def is_image(file: Path) -> bool:
    """By its suffix, or where that says nothing by its first bytes; it may still be damaged."""
    if file.suffix.lower() in image_suffixes():
        return True
    with contextlib.suppress(OSError), open(file, "rb") as stream:
        start = stream.read(12)
        webp = start[:4] == b"RIFF" and start[8:] == b"WEBP"
        return webp or start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8"))
    return False


def is_run(names: Iterable[str]) -> bool:
    """Whether files of these names make a training run's folder, which a user may have put among the images."""
    return "model.safetensors" in names or ".lock" in names or bool(fnmatch.filter(names, "state_*.pt"))


def files_below(folder: Path, top: bool = True) -> Iterator[Path]:
    """All files in a folder and its folders but hidden ones and runs', always in the same order."""
    entries = {entry.name: entry.is_dir() for entry in os.scandir(folder)}
    if is_run(entries) and not top:
        return
    yield from (folder / name for name in visible(entries) if not entries[name])
    for name in visible(entries):
        if entries[name] and not folder.resolve().is_relative_to((folder / name).resolve()):  # no link upwards
            yield from files_below(folder / name, top=False)


def by_folder(folder: Path, images: list[Path]) -> Groups:
    groups: Groups = {}
    for image in images:
        name, _, inside = _below(folder, image).partition(os.sep)
        groups.setdefault(name if inside else "", []).append(image)
    return {name: groups[name] for name in sorted(groups, key=by_number)}


def _open(folder: Path, images: list[Path]) -> tuple[Path, Groups]:
    """Past the folders that hold nothing but one folder of folders, as archives have around the data."""
    groups = by_folder(folder, images)
    name = next(iter(groups), "")
    if len(groups) == 1 and name and "" not in by_folder(folder / name, images):
        return _open(folder / name, images)
    return folder, groups


def split_folders(root: Path) -> tuple[dict[Path, Groups], list[Path]]:
    """The folder of training images and, if it is apart, the one of those held out; then the images of neither."""
    folder, groups = _open(root, [file for file in files_below(root) if is_image(file)])
    kinds: dict[str, list[str]] = {"train": [], "test": [], "validation": [], "": []}
    for name in filter(None, groups):
        kinds[_split_of(name)].append(name)
    train, held_out, others = kinds["train"], kinds["test"] + kinds["validation"], kinds[""]
    flat = bool(train) and "" in _open(folder / train[0], groups[train[0]])[1]
    if not train or (flat and not held_out and (others or "" in groups)):
        return {folder: groups}, []  # perhaps trains among other vehicles, or an album beside images
    if len(train) > 1 or (others and flat == bool(held_out)):
        raise UserError(
            f"{folder} can be read in two ways: {train[0]}/ as the training images and the rest as other folders, or "
            f"all as the classes {', '.join(filter(None, groups))}: rename {train[0]}/, or move what does not belong "
            "to the data out of it"
        )
    if held_out and held_out[0].lower() != "test":
        say(f"{folder}: {held_out[0]}/ is held out")
    unused = [file for name in held_out[1:] + others for file in groups[name]]
    return dict(_open(folder / name, groups[name]) for name in train + held_out[:1]), unused


def _split_of(name: str) -> str:
    """train, test or validation where a folder's name says so, as in seg_train, Testing, val2017; otherwise nothing."""
    for split, words in SPLIT_NAMES.items():
        if re.search(rf"(?<![a-z])({words})[ _-]*(set|split|data|images)?(?![a-z])", name.lower()):
            return split
    return ""


def _checked(folder: Path, groups: Groups, labels: bool) -> Groups:
    """The groups of a folder, without images of no class where labels are needed and these are few.

    Raises UserError where they are many, where a class is empty, and where there is no image at all.
    """
    for entry in (folder / name for name in visible(os.listdir(folder)) if labels):
        if entry.is_dir() and not any(files_below(entry)) and not is_run(os.listdir(entry)):
            raise UserError(f"the class folder {entry} is empty: fill it or delete it")
    if not groups:
        raise UserError(f"{folder} has no image")
    classes = {name: files for name, files in groups.items() if name}
    own, inside = len(groups.get("", [])), sum(map(len, classes.values()))
    if labels and own > inside > 0:
        raise UserError(
            f"{folder} has {own:,} images of no class beside {inside:,} in the class folders {', '.join(classes)}: "
            "move each into its class, or train without labels, which reads them all"
        )
    return classes if labels and classes else groups


def _list_splits(root: Path, labels: bool) -> tuple[dict[str, Groups], dict[Path, str]]:
    """The images of both splits, and why other files are left out. Raises UserError where classes that count differ."""
    found, unused = split_folders(root)
    (folder, train), *apart = [(part, _checked(part, groups, labels)) for part, groups in found.items()]
    if apart and labels and "" in apart[0][1]:
        say(f"{apart[0][0]} has no class folders: a tenth of {folder} is held out instead")
        unused, apart = unused + apart[0][1][""], []
    if apart:
        test_folder, test = apart[0]
        if labels and list(test) != list(train):
            raise UserError(
                f"{test_folder} has the classes {', '.join(test)}, {folder} has {', '.join(train)}: "
                "labels are numbers in the order of the names, so both must have the same"
            )
    else:
        files = sorted(itertools.chain(*train.values()), key=lambda file: zlib.crc32(os.fsencode(_below(folder, file))))
        tenth = set(files[: len(files) // 10])
        test = {name: [file for file in group if file in tenth] for name, group in train.items()}
        train = {name: [file for file in group if file not in tenth] for name, group in train.items()}
    used = set(itertools.chain(*train.values(), *test.values(), unused))
    left_out = {file: _why_left_out(file) for part in found for file in files_below(part) if file not in used}
    left_out |= dict.fromkeys(unused, "in folders that are neither trained on nor held out")
    return {"train": train, "test": test}, left_out


def _why_left_out(file: Path) -> str:
    if is_image(file):
        return "beside the class folders"
    return NO_HEIC if file.suffix.lower() in (".heic", ".heif", ".hif") else "not an image"


def describe_folder(name_or_path: str | Path) -> str | None:
    """What tells a folder of one's own from others of its name: its images' number and a hash of their names and sizes.

    Of all files where it holds the data in other formats; None for built-in data.
    """
    folder = Path(name_or_path).expanduser().resolve()
    if str(name_or_path) in DATASETS or not folder.is_dir():
        return None
    images = [file for groups in split_folders(folder)[0].values() for file in itertools.chain(*groups.values())]
    facts = _file_facts(folder, images or files_below(folder))
    lines = [name + f"\0{status.st_size}\n".encode() for name, status in facts]
    return f"{len(lines)} files, {hashlib.sha256(b''.join(lines)).hexdigest()[:16]}"


def _file_facts(folder: Path, files: Iterable[Path]) -> Iterator[tuple[bytes, os.stat_result]]:
    """Each file's path below the folder, and its size and times, which a link to nowhere does not have."""
    for file in files:
        with contextlib.suppress(OSError):
            yield os.fsencode(_below(folder, file)), file.stat()


def _below(folder: Path, file: Path) -> str:
    """The file's path relative to the folder it is in (Path.relative_to takes a second for 50,000 files)."""
    return str(file)[len(str(folder)) + 1 :]


# --- from files to pixels -----------------------------------------------------------------------------------------

one_at_a_time = threading.Lock()  # for images that need gigabytes


def decode_image(path: Path, side: int) -> np.ndarray | str:
    """The centre square of an image file, antialiased to uint8 side x side x 3; or in a few words why there is none."""
    try:
        return _decode(path, side)
    except MemoryError:
        raise
    except UserError as error:
        return str(error)
    except Image.DecompressionBombError:
        return "larger than 420 megapixels"
    except Exception as error:  # a damaged image makes PIL raise OSError, SyntaxError, ValueError, struct.error, ...
        if isinstance(error, OSError) and error.strerror:
            return f"not readable ({error.strerror})"
        start = path.read_bytes()[:12]
        if start[4:8] == b"ftyp" and ".heic" not in image_suffixes():
            return NO_HEIC
        if isinstance(error, UnidentifiedImageError):
            return "in no format that Pillow can open" if start else "empty"
        return "cut off" if "truncated" in str(error).lower() else "damaged"


def _decode(path: Path, side: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            with one_at_a_time if math.prod(image.size) > 50_000_000 else contextlib.nullcontext():
                upright: Image.Image = image
                with contextlib.suppress(Exception):  # the camera's notes may be damaged
                    upright = ImageOps.exif_transpose(image)
                rgb = to_rgb(upright, image.format)
    except (SyntaxError, ValueError, UnidentifiedImageError) as error:
        # Pillow refuses a PNG or JPEG for some damages of its metadata: torchvision reads the pixels only, all or none
        try:
            pixels = torchvision.io.decode_image(str(path), "RGB")
        except RuntimeError:
            raise error
        rgb = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return np.asarray(ImageOps.fit(rgb, (side, side), Image.Resampling.BILINEAR))


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


def _load_images(folder: Path, files: list[Path], side: int) -> tuple[np.ndarray, list[str]]:
    """The readable files' pixels (uint8, N x 3 x side x side), and for every file why it is not readable, or "".

    Each is decoded once: the results are kept, memory-mapped, under CACHE.
    """
    record = np.dtype([("reason", "S100"), ("pixels", "u1", (side, side, 3))])
    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in _file_facts(folder, files)]
    key = repr((os.fsencode(folder), side, ".heic" in image_suffixes(), facts))
    cache = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"

    def write(stream) -> None:
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # PIL decodes outside of Python's lock
        try:
            results = pool.map(lambda file: decode_image(file, side), files)
            for x in progress(results, total=len(files), desc=f"decoding {folder.name}", unit="image"):
                row = (x.encode(), 0) if isinstance(x, str) else (b"", x)
                stream.write(np.array(row, record).tobytes())
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all the others

    try:
        if not cache.exists():
            with atomic_path(cache) as temporary, open(temporary, "wb") as stream:
                write(stream)
        records: np.ndarray = np.memmap(cache, record, "c")  # writes stay private
    except (UserError, OSError, ValueError) as error:
        say(f"the decoded images stay in memory: {error}")
        buffer = io.BytesIO()
        write(buffer)
        records = np.frombuffer(buffer.getbuffer(), record)
    reasons = [reason.decode(errors="replace") for reason in records["reason"]]
    pixels = records["pixels"][[not reason for reason in reasons]] if any(reasons) else records["pixels"]
    return pixels.transpose(0, 3, 1, 2), reasons


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

    Perhaps flipped where data.flip, and cropped where data.crop; without a generator each is shown as it is.
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
    """A box of 80-100% of the area, as wide or as high as still fits, at any place in each image, resized."""
    index = torch.as_tensor(index)
    side = data.images.shape[-1]
    area, shape, top, left = torch.rand(4, len(index), generator=generator, device=generator.device)
    area = 0.8 + 0.2 * area
    height, width = (area**shape * side).round(), (area ** (1 - shape) * side).round()
    top, left = (top * (side - height + 1)).floor(), (left * (side - width + 1)).floor()
    boxes = torch.stack([top, left, top + height, left + width], 1).int().tolist()
    # one by one, yet fast: PyTorch resizes uint8 images whose channels come last in vectorised integers
    crops = (
        data.images[i : i + 1, :, top:bottom, left:right]
        for i, (top, left, bottom, right) in zip(index.tolist(), boxes)
    )
    return torch.cat([resize(crop, data.image_size) for crop in crops])


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """N x C x H x W, uint8 or float -> N x C x size x size, filtered so that nothing aliases."""
    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
