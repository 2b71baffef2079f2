"""The data sets: where each one comes from, how its files become uint8 tensors, and how batches are drawn from them.

Images rest in memory as uint8, N x C x H x W; a model sees float batches in [-1, 1], made by `augment`.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from utils import ROOT, UserError, atomic_path, progress, say, to_model

CACHE = ROOT / ".cache"  # decoded photographs; deleting it only costs the time to decode them again


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """A row of DATASETS: all that is particular to a data set. Sources that are left out do not have it."""

    title: str
    folders: tuple[str, ...]  # beside the scripts, or absolute; the first that is there and not empty is read
    image_size: int
    classes: tuple[str, ...] = ()  # of files in MNIST's format, which hold numbers; folders name their own
    hub: str = ""  # its name on the Hugging Face hub
    torchvision: str = ""  # its class in torchvision.datasets
    kaggle: str = ""
    sample: str = ""  # a folder with a small part of it, which ships and stands in
    crop: bool = False  # random crops, where the images are large enough
    flip: bool = True  # random horizontal flips
    recipe: dict = field(default_factory=dict)  # where its feature classifier departs from features.DEFAULT_RECIPE


DATASETS = {
    "fashion_mnist": DataSet(
        title="Fashion-MNIST",
        folders=("data/fashion_mnist", "/usr/share/datasets/fashion-mnist"),  # Debian's package puts it there
        image_size=28,
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

    def __len__(self) -> int:
        return len(self.images)


def load_data(name_or_path: str | Path, split: str = "train", image_size: int | None = None) -> ImageData:
    """Load a data set of the table DATASETS or a folder of one's own; never touches the network.

    A folder holds images in class folders (`<class>/*`), under `train` and `test` or not, or images directly; or
    torchvision's `cifar-10-batches-py`; or MNIST's IDX or parquet files. Without a test folder, a tenth of the
    images (chosen by a hash of their names) is the test split. The train split of photographs that are large enough
    is kept at 1.25 image_size, for `augment` to crop. The test split is never flipped nor cropped.
    Raises UserError.
    """
    name = str(name_or_path)
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}: it is train or test")
    if image_size is not None and image_size < 1:
        raise UserError(f"the image size must be 1 or more, not {image_size}")
    row = DATASETS.get(name)
    if row is not None:
        folder, image_size = _find(name, row), image_size or row.image_size
    else:
        folder = Path(name).expanduser().resolve()
        if not name or not folder.is_dir():
            raise UserError(f"no data called {name!r}: it is neither a folder nor one of {', '.join(DATASETS)}")
        name, row = folder.name, DataSet(folder.name, (), 0, crop=True)
    found = read_mnist_files(folder, split)
    if found is not None:
        return _mnist_data(*found, name, image_size)
    return _load_folder(folder, split, image_size, name, row)


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


def _load_folder(root: Path, split: str, image_size: int | None, name: str, row: DataSet) -> ImageData:
    may_crop = row.crop
    if (root / "cifar-10-batches-py").is_dir() or root.name == "cifar-10-batches-py":
        return _load_cifar_batches(root, split, image_size or 32, name)
    folder, held_out = root, True
    if (root / "train").is_dir():
        held_out = not (root / "test").is_dir()
        folder = root / ("train" if held_out else split)
    files, labels, classes = list_images(folder)
    first = files  # by which both splits judge the size
    if folder == root / "test" and (root / "train").is_dir():
        if classes != (trained := class_folders(root / "train")):
            raise UserError(
                f"{folder} has the classes {', '.join(classes)}, {root / 'train'} has {', '.join(trained)}: "
                "labels are numbers in alphabetical order, so both must have the same"
            )
    if held_out:  # no test folder
        order = sorted(range(len(files)), key=lambda i: zlib.crc32(_bytes_below(folder, files[i])))
        tenth = len(files) // 10
        chosen = sorted(order[:tenth] if split == "test" else order[tenth:])
        if not chosen:
            raise UserError(f"{folder} has too few images ({len(files)}) to hold out a tenth of them as the test split")
        files, labels = [files[i] for i in chosen], [labels[i] for i in chosen]
    if image_size is None or may_crop:
        shorter = _shorter_side(first)
        image_size = image_size or min(64, shorter)
        # enlarging small images only to crop them would blur them
        may_crop = may_crop and split == "train" and shorter >= round(1.25 * image_size)
    side = round(1.25 * image_size) if may_crop else image_size
    kept, images = _load_images(folder, files, side)
    x, y = torch.from_numpy(images), torch.tensor(labels)[torch.from_numpy(kept)]
    empty = sorted(set(labels) - set(y.tolist()))
    if empty:
        raise UserError(f"{folder / classes[empty[0]] if classes else folder} has no readable image")
    return ImageData(x, y if classes else None, classes, name, row.flip and split == "train", image_size, may_crop)


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


def visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith((".", "__MACOSX")))


def class_folders(folder: Path) -> list[str]:
    return [entry for entry in visible(os.listdir(folder)) if (folder / entry).is_dir()]


def list_images(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and class names of a folder of class folders; of a flat folder the labels are 0, the names none.

    Hidden files are passed over, and images beside class folders. Raises UserError for an empty class or folder.
    """
    classes = class_folders(folder)
    if not classes:
        files = [folder / entry for entry in visible(os.listdir(folder))]
        if not files:
            raise UserError(f"{folder} has no image")
        return files, [0] * len(files), []
    if beside := [
        name for name in visible(os.listdir(folder)) if Path(name).suffix.lower() in Image.registered_extensions()
    ]:
        say(
            f"{folder}: images beside the class folders {', '.join(classes[:3])}... belong to no class and are left out: "
            f"{len(beside):,} of them"
        )
    files, labels = [], []
    for label, name in enumerate(classes):
        before = len(files)
        files += _files_below(folder / name)
        if len(files) == before:
            raise UserError(f"the class folder {folder / name} is empty: fill it or delete it")
        labels += [label] * (len(files) - before)
    return files, labels, classes


def describe_folder(name_or_path: str | Path) -> str | None:
    """What tells a folder of one's own from others of its name, wherever it lies: a hash of its files' names and sizes.

    None for built-in data.
    """
    folder = Path(name_or_path).expanduser().resolve()
    if str(name_or_path) in DATASETS or not folder.is_dir():
        return None
    parts = [folder / "train", folder / "test"] if (folder / "train").is_dir() else [folder]
    files = itertools.chain.from_iterable(map(_files_below, parts))
    facts = [name + f"\0{status.st_size}\n".encode() for name, status in _file_facts(folder, files)]
    return f"{len(facts)} files, {hashlib.sha256(b''.join(facts)).hexdigest()[:16]}"


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its folders but the hidden ones, always in the same order."""
    for parent, folders, names in os.walk(folder):
        folders[:] = visible(folders)
        yield from (Path(parent, entry) for entry in visible(names))


def _file_facts(folder: Path, files: Iterable[Path]) -> Iterator[tuple[bytes, os.stat_result]]:
    """Each file's path below the folder, and its size and times. A link to nowhere has none, and is passed over."""
    for file in files:
        with contextlib.suppress(OSError):
            yield _bytes_below(folder, file), file.stat()


def _bytes_below(folder: Path, file: Path) -> bytes:
    """The file's path relative to the folder it is in (Path.relative_to takes a second for 50,000 files)."""
    return os.fsencode(file)[len(os.fsencode(folder)) + 1 :]


def _shorter_side(files: list[Path]) -> int:
    for file in files:
        with contextlib.suppress(Exception), Image.open(file) as image:
            return min(image.size)
    raise UserError(f"{files[0].parent} has no readable image")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB: 16-bit greys are scaled down, and what is transparent lets white through."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def decode_image(path: Path, side: int) -> np.ndarray | None:
    """The centre square of an image file, antialiased to uint8 side x side x 3; None where it cannot be decoded."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
            square = ImageOps.fit(to_rgb(ImageOps.exif_transpose(image)), (side, side), Image.Resampling.BILINEAR)
        return np.asarray(square)
    except MemoryError:
        raise
    except Exception:  # a damaged image makes PIL raise OSError, SyntaxError, ValueError, struct.error, ...
        return None


@contextlib.contextmanager
def decode_images(files: list[Path], side: int, description: str) -> Iterator[Iterable[np.ndarray | None]]:
    """`decode_image` of every file, in order, in several threads (PIL decodes outside of Python's lock), with a bar."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        images = pool.map(lambda file: decode_image(file, side), files)
        yield progress(images, total=len(files), desc=description, unit="image")
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all the others


def _load_images(folder: Path, files: list[Path], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode files once, into a memory-mapped file under CACHE. Returns which files (indices) and their pixels.

    A record is a file's index and its pixels, so files that are no images are simply not in it.
    """
    record = np.dtype([("file", "<i8"), ("image", "u1", (side, side, 3))])
    key = hashlib.sha256(os.fsencode(folder))
    for name, status in _file_facts(folder, files):
        key.update(name + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    cache = CACHE / f"{folder.parent.name}-{folder.name}-{side}-{key.hexdigest()[:16]}.bin"

    def decode_to(stream) -> None:
        with decode_images(files, side, f"decoding {folder.name}") as images:
            for i, image in enumerate(images):
                if image is not None:
                    stream.write(np.int64(i).astype("<i8").tobytes() + image.tobytes())

    if not cache.exists():
        try:
            with atomic_path(cache) as temporary, open(temporary, "wb") as stream:
                decode_to(stream)
        except UserError as error:
            say(f"the decoded images stay in memory: {error}")
            buffer = io.BytesIO()
            decode_to(buffer)
            records = np.frombuffer(buffer.getbuffer(), record)
    if cache.exists():  # "c": writes stay private; PyTorch warns about read-only arrays
        records = np.memmap(cache, record, "c") if cache.stat().st_size else np.empty(0, record)
    kept = records["file"].copy()
    left_out = sorted(set(range(len(files))) - set(kept.tolist()))
    say_left_out(folder, [files[i] for i in left_out], len(files))
    return kept, records["image"].transpose(0, 3, 1, 2)


def say_left_out(folder: Path, files: list[Path], total: int) -> None:
    """Name and count the files that are no readable images, if any."""
    if files:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:10])
        more = f" and {len(files) - 10} more" if len(files) > 10 else ""
        say(f"{folder}: left out {len(files)} of {total:,} files that are no readable images: {names}{more}")


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
