"""Data, image grids, GIFs, sample files, devices, seeds, error messages: what all scripts need and no other file owns.

Images rest in memory as uint8, N x C x H x W; a model sees float batches in [-1, 1], made by `augment`.
"""

import argparse
import contextlib
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import secrets
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"  # decoded photographs; deleting it only costs the time to decode them again
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it
FASHION_MNIST_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                         "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]  # fmt: skip
# name: (folder beside the scripts, default image size)
FOLDERS = {"cifar10": ("cifar10", 32), "cifar10-64": ("cifar10-64", 64), "landscapes": ("landscape_img_folder", 64)}


# --- errors and files ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong and what to do about it."""


def command_line(main: Callable[[], int | None]) -> None:
    """Run a script's main(): an expected error becomes one line on stderr and exit status 2 (130 for Ctrl-C).

    A request to terminate ends it as an error does, with status 143: files half written are removed.
    """
    status = 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt as error:
        message, status = str(error) or "interrupted", 130
    except BrokenPipeError:  # `... | head`: nobody is left to read a message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        message = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = "out of memory: try a smaller --batch-size, --n or --image-size"
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch reports a full GPU as torch.OutOfMemoryError; full main memory and Apple's GPUs as a plain RuntimeError."""
    reasons = ("can't allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(reason in str(error) for reason in reasons)


@functools.cache
def say(message: str) -> None:
    """Print a notice to stderr, once in a process."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix: on success it becomes `path`, on failure it is removed.

    So `path` is at every moment either the old file or the whole new one. Raises UserError where it cannot be written.
    """
    path = Path(path)
    if not path.name:
        raise UserError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        if path.exists() and not path.is_file():  # a rename would replace /dev/null
            raise UserError(f"cannot write {path}: it exists and is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # some libraries replace the file by one that only its owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself survives a power cut
        finally:
            os.close(folder)
    except OSError as error:
        # an error that names another file is about that file; a failed write names none
        if error.filename is not None and Path(error.filename) not in (temporary, path, *path.parents):
            raise
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or error
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    """`value` as a JSON file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def sha256(path: str | Path) -> str:
    """Of the file's contents, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_writable(path: str | Path) -> None:
    """Raise UserError if `path` could not be written: better before the work than after it."""

    class Probed(Exception):
        pass

    with contextlib.suppress(Probed), atomic_path(path):
        raise Probed


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors in one line and every flag's default in --help."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | settings)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a finite int or float from `low` (with above: greater than it) to `high`."""

    def parse(text: str):
        value = kind(text)
        if (kind is float and not math.isfinite(value)) or not low <= value <= high or (above and value == low):
            bound = f"more than {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(
                f"{text} is not {bound}" + (f" and at most {high}" if high < math.inf else "")
            )
        return value

    parse.__name__ = kind.__name__  # argparse calls it "invalid int value"
    return parse


positive = number(int, 1)  # a count
natural = number(int, 0, 2**63 - 1)  # a seed


def progress(iterable=None, **settings):
    """A tqdm bar that adapts to the terminal's width and does not flood a log file."""
    interval = 0.2 if sys.stderr.isatty() else 5
    return tqdm(iterable, dynamic_ncols=True, mininterval=interval, **settings)


# --- devices, seeds, number formats -------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the first of CUDA, Apple's MPS and the CPU that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # which the devices that only stand in for others refuse
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"there is no device {name!r} here: try --device auto or --device cpu") from error
    return device


def generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A random stream of its own for every key, such as (seed, step): equal keys give equal streams."""
    if any(part < 0 for part in key):
        raise UserError(f"a seed must be 0 or more, not {min(key)}")
    # SeedSequence pads with zeros, so without their number (1,) and (1, 0) would be the same key.
    # (PyTorch's CPU generator uses the lower 32 bits of the seed: two of 10,000 streams coincide with probability 1%.)
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped) -> uint8 in 0..255, any shape; inverse of `to_model`."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


# --- data ---------------------------------------------------------------------------------------------------------


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
    """Load fashion_mnist, cifar10, cifar10-64, landscapes or a folder of one's own; never touches the network.

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
    if name == "fashion_mnist":
        return _load_fashion_mnist(split, image_size)
    if name in FOLDERS:
        folder, default_size = ROOT / FOLDERS[name][0], FOLDERS[name][1]
        if not folder.is_dir():
            raise UserError(f"{folder.name}/ is not there: run `python download_datasets.py {name}` "
                            "(or give it an archive you have with --from)")  # fmt: skip
        return _load_folder(folder, split, image_size or default_size, name, may_crop=name == "landscapes")
    folder = Path(name).expanduser().resolve()
    if not name or not folder.is_dir():
        known = ", ".join(["fashion_mnist", *FOLDERS])
        raise UserError(f"no data called {name!r}: it is neither a folder nor one of {known}")
    found = read_mnist_files(folder, split)
    if found is not None:
        return _mnist_data(*found, name=folder.name, image_size=image_size)
    return _load_folder(folder, split, image_size, folder.name, may_crop=True)


def _load_fashion_mnist(split: str, image_size: int | None) -> ImageData:
    for folder in (ROOT / "data/fashion_mnist", DEBIAN_FASHION_MNIST, ROOT / "data/fashion_mnist_sample"):
        found = read_mnist_files(folder, split)
        if found is not None:
            if folder.name == "fashion_mnist_sample":
                say("Fashion-MNIST: the shipped sample stands in; `python download_datasets.py fashion_mnist` gets all")
            return _mnist_data(*found, name="fashion_mnist", image_size=image_size)
    raise UserError("Fashion-MNIST is not there: run `python download_datasets.py fashion_mnist`")


def _mnist_data(images: np.ndarray, labels: np.ndarray, name: str, image_size: int | None) -> ImageData:
    x, size = torch.from_numpy(images)[:, None], image_size or 28
    if size == 32:
        x = torch.nn.functional.pad(x, (2, 2, 2, 2))  # the background is black: no pixel needs to be resampled
    elif size != 28:
        x = resize(x, size)
    classes = list(FASHION_MNIST_CLASSES) if name.startswith("fashion") else [str(i) for i in range(10)]  # MNIST's digits
    # no flips: shoes all point one way
    return ImageData(x, torch.from_numpy(labels), classes, name, flip=False, image_size=size)


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


def _load_folder(root: Path, split: str, image_size: int | None, name: str, may_crop: bool) -> ImageData:
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
            raise UserError(f"{folder} has the classes {', '.join(classes)}, {root / 'train'} has {', '.join(trained)}: "
                            "labels are numbers in alphabetical order, so both must have the same")  # fmt: skip
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
    return ImageData(x, y if classes else None, classes, name, split == "train", image_size, may_crop)


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
    if beside := [name for name in visible(os.listdir(folder)) if Path(name).suffix.lower() in Image.registered_extensions()]:
        say(f"{folder}: images beside the class folders {', '.join(classes[:3])}... belong to no class and are left out: "
            f"{len(beside):,} of them")  # fmt: skip
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
    if str(name_or_path) in ("fashion_mnist", *FOLDERS) or not folder.is_dir():
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
    return torch.cat([
        resize(data.images[i : i + 1, :, top:bottom, left:right], data.image_size)
        for i, (top, left, bottom, right) in zip(index.tolist(), boxes)
    ])  # fmt: skip


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """N x C x H x W, uint8 or float -> N x C x size x size, filtered so that nothing aliases."""
    return torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


# --- pictures and samples -----------------------------------------------------------------------------------------


def image_grid(images, columns: int, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Images (uint8, N x C x H x W, C = 1 or 3), row by row on white, enlarged `scale` times -> uint8, H x W x 3."""
    images = np.asarray(images)
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3) or images.dtype != np.uint8:
        raise UserError(f"a grid needs uint8 images N x C x H x W with C = 1 or 3, not {images.dtype} {images.shape}")
    if columns < 1 or scale < 1 or padding < 0:
        raise UserError(f"a grid cannot have {columns} columns, scale {scale} and padding {padding}")
    columns = min(columns, len(images))
    images = images.repeat(scale, 2).repeat(scale, 3)
    height, width = images.shape[2] + padding, images.shape[3] + padding
    rows = math.ceil(len(images) / columns)
    grid = np.full((rows * height + padding, columns * width + padding, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + padding, i % columns * width + padding
        grid[top : top + height - padding, left : left + width - padding] = image.transpose(1, 2, 0)
    return grid


def save_grid(images, path: str | Path, columns: int, scale: int = 1) -> None:
    """Write `image_grid` as a picture; the format follows from the path's suffix."""
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise UserError(f"cannot write {path}: a picture's name ends in .png or another picture format's suffix")
    grid = Image.fromarray(image_grid(images, columns, scale=scale))
    with atomic_path(path) as temporary:
        grid.save(temporary)


def save_gif(frames: list[np.ndarray], path: str | Path, fps: float = 20) -> None:
    """Write frames (uint8, H x W x 3, all of one size) as a GIF that repeats for ever. GIF counts in 1/100 s."""
    frames = [np.asarray(frame) for frame in frames]
    if not frames:
        raise UserError(f"cannot write {path}: a GIF needs at least one frame")
    if not 0 < fps <= 50:
        raise UserError(f"a GIF shows more than 0 and at most 50 frames a second, not {fps}")
    if any(f.dtype != np.uint8 or f.shape != frames[0].shape or f.ndim != 3 or f.shape[2] != 3 for f in frames):
        raise UserError(f"cannot write {path}: frames must be uint8 H x W x 3 and all of one size")
    if all((f == f[:, :, :1]).all() for f in frames):
        frames = [f[:, :, 0] for f in frames]  # 256 greys are exact; colours are reduced to a palette
    first, *others = [Image.fromarray(f) for f in frames]
    with atomic_path(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def save_samples(path: str | Path, images, labels=None, source: dict | None = None) -> None:
    """Write an .npz of `images` (uint8, N x H x W x C) and, where given, `labels` (int64, N) and what made them.

    A tensor of images is N x C x H x W as everywhere in this project, a numpy array N x H x W x C as in the file.
    """
    arrays = {"images": _as_file(images)} | ({} if labels is None else {"labels": np.asarray(labels)})
    _check_samples(arrays, path)
    stream_samples(path, [images], arrays["images"].shape, labels, source)


def _as_file(images) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        images = images.cpu().permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(images)


def stream_samples(path: str | Path, batches: Iterable, shape: tuple, labels=None, source: dict | None = None) -> None:
    """`save_samples` of N x H x W x C = `shape` images that come in batches: memory holds one of them at a time."""
    small = {"labels": None if labels is None else np.asarray(labels, dtype=np.int64),
             "source": None if source is None else np.array(json.dumps(source))}  # fmt: skip
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in small.items():
            if array is not None:
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        with archive.open("images.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for images in batches:
                file.write(_as_file(images).tobytes())


def load_samples(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read what `save_samples` writes: images (uint8, N x H x W x C), labels (int64, N) or None. Raises UserError."""
    arrays = _read_npz(path, "images", "labels")
    _check_samples(arrays, path)
    labels = arrays.get("labels")
    return arrays["images"], None if labels is None else labels.astype(np.int64)


def samples_source(path: str | Path) -> dict:
    """What `save_samples` was told of the images' origin: {} for another program's file. Raises UserError."""
    try:
        source = json.loads(str(_read_npz(path, "source")["source"]))
    except (KeyError, ValueError):
        return {}
    return source if isinstance(source, dict) else {}


def _read_npz(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the named arrays that the file has. Raises UserError."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names if name in archive}
    except FileNotFoundError as error:
        raise UserError(f"there is no sample file {path}") from error
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise UserError(f"{path} is not a readable .npz file of samples: {error}") from error


def _check_samples(arrays: dict[str, np.ndarray], path: str | Path) -> None:
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None:
        raise UserError(f"{path} has no array called images")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.size == 0:
        raise UserError(f"{path}: images must be uint8 N x H x W x C, C = 1 or 3, not {images.dtype} {images.shape}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: labels must be one integer for each of the {len(images):,} images")
