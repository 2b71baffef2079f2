"""What all scripts need and no other file owns: errors, files, arguments, devices, seeds, grids, GIFs."""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import secrets
import signal
import sys
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TORCHRUN = "TORCHELASTIC_RUN_ID"  # a variable that torchrun gives all its processes
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        message = "out of memory: try a smaller --batch-size, --n or --image-size, or --accumulate"
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error: Exception) -> bool:
    """For a full GPU PyTorch raises torch.OutOfMemoryError; for full main memory and Apple's GPUs only RuntimeError."""
    reasons = ("can't allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(reason in str(error) for reason in reasons)


def look_up(table: dict, name: str, kind: str):
    """table[name]. Raises ValueError, with the names that there are, for one that is not."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(table)}")
    return table[name]


def is_main() -> bool:
    """True in the one process that writes and speaks, where torchrun has started several."""
    return TORCHRUN not in os.environ or os.environ["RANK"] == "0"


@functools.cache
def say(message: str) -> None:
    """Print a notice to stderr, once."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix: on success it becomes `path`, on failure it is removed.

    So `path` is at every moment either the old file or the whole new one. Raises UserError where it cannot be written.
    """
    path = Path(path)
    # cut, because a name may be as long as the file system permits
    temporary = path.parent / f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}"
    try:
        if path.exists() and not path.is_file():  # a rename would replace /dev/null
            raise UserError(f"cannot write {path}: it exists and is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or the rename could reach the disk before the contents
        os.replace(temporary, path)
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
    with contextlib.suppress(EOFError), atomic_path(path):
        raise EOFError  # any error but one in writing would do: nothing is kept


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        told = super()._get_help_string(action).split(" (default: ")  # the help's own default, then the script's
        return action.help if action.default is None else " (default: ".join([told[0], *told[1:][-1:]])


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors in one line and every flag's default in --help."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": HelpFormatter} | settings)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def number(kind: type, low: float, high: float = 2**63 - 1, above: bool = False):
    """An argparse type: an int or float from `low` (with above: greater than it) to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            bound = f"at most {high}" if value > high else f"more than {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse calls it "invalid int value"
    return parse


positive = number(int, 1)  # a count
natural = number(int, 0)


def progress(iterable=None, **settings):
    """A tqdm bar that adapts to the terminal's width and does not flood a log file."""
    notebook = "ipykernel" in sys.modules  # which shows errors on a red ground, and so stderr
    interval = 0.2 if sys.stderr.isatty() or notebook else 5
    return tqdm(iterable, dynamic_ncols=True, mininterval=interval, file=sys.stdout if notebook else None, **settings)


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


@functools.cache
def pick_precision(device):
    """The fastest precision that this device really has: bfloat16, else float16 on a GPU, else float32.

    CPUs without bfloat16 units emulate it, up to 100 times slower, and do not say so: a small matrix product is timed.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type != "cpu":
        return "float32"

    def seconds(dtype):
        a = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=4))

    return "bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"


def autocast(device, precision=None):
    """A context in which networks compute in `precision` (None: what suits the device)."""
    precision = precision or pick_precision(device)
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "float32")


def generator(*key: int) -> torch.Generator:
    """A random stream for every key of numbers from 0 on, such as (seed, step): equal keys give equal streams."""
    # SeedSequence pads with zeros, so without their number (1,) and (1, 0) would be the same key.
    # (PyTorch's CPU generator uses the lower 32 bits of the seed: two of 10,000 streams coincide with probability 1%.)
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped) -> uint8 in 0..255, any shape; inverse of `to_model`."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


# --- pictures -----------------------------------------------------------------------------------------------------


def image_grid(images: torch.Tensor, columns: int, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Images (uint8, N x C x H x W, C = 1 or 3), row by row on white, enlarged `scale` times -> uint8, H x W x 3."""
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(enlarged, nrow=columns, padding=padding, pad_value=255)
    if len(images) == 1:  # to which torchvision gives no border
        grid = torch.nn.functional.pad(grid, 4 * (padding,), value=255)
    return grid.permute(1, 2, 0).contiguous().numpy()


def save_grid(images: torch.Tensor, path: str | Path, columns: int) -> None:
    """Write `image_grid` as a picture; the format follows from the path's suffix."""
    grid = Image.fromarray(image_grid(images, columns))
    with atomic_path(path) as temporary:
        grid.save(temporary)


def save_gif(frames: list[np.ndarray], path: str | Path) -> None:
    """Write frames (uint8, H x W x 3, all of one size), ten a second, as a GIF that repeats for ever.

    Each has the 256 colours that fit it best. The last one stays for a second longer.
    """
    frames = [reduce_colours(frame) for frame in frames]
    durations = [100] * (len(frames) - 1) + [1100]  # in ms
    contents = imageio.imwrite("<bytes>", frames, extension=".gif", plugin="pillow", duration=durations, loop=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(contents)


def reduce_colours(frame: np.ndarray) -> np.ndarray:
    """The picture (uint8, H x W x 3) in the 256 colours that fit it best: itself where it has no more.

    Pillow's default, the median cut, mixes rare saturated colours into common dull ones. Here the palette covers the
    whole range and is improved by k-means, on a part of the pixels, since on all of them noise would take long.
    """
    picture, pixels = Image.fromarray(frame), frame.reshape(1, -1, 3)
    if picture.getcolors(256):
        return frame
    sample = Image.fromarray(np.ascontiguousarray(pixels[:, :: math.ceil(pixels.shape[1] / 32768)]))
    palette = sample.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=400)
    return np.asarray(picture.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB"))
