"""Fetch the data and the course's checkpoints to where the scripts look for them.

    python download_datasets.py {fashion_mnist,cifar10,cifar10-64,landscapes,checkpoints} [--from ARCHIVE_OR_FOLDER]

Everything is fetched, unpacked and checked in a temporary folder beside its place and then renamed, so what is in its
place is complete. A second call only looks whether all of it is still there.
"""

import argparse
import contextlib
import errno
import io
import json
import lzma
import os
import re
import shutil
import socket
import stat
import struct
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image

import utils
from image_data import (
    DATASETS,
    decode_images,
    list_images,
    load_data,
    read_mnist_files,
    say_left_out,
)
from utils import ArgumentParser, UserError, atomic_path, command_line, progress, say

COURSE_FOLDER = "1beUSI-edO98i6J9pDR67BKGCfkzUL5DX"  # on Google Drive
COURSE_CHECKPOINTS = ("unconditional_ckpt.pt", "conditional_ckpt.pt", "conditional_ema_ckpt.pt")
RECORD = ".complete.json"  # in a finished folder: how many images each class has


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*DATASETS, "checkpoints"])
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="an archive (zip, tar) or folder that you have (default: look where it may lie, then download)",
    )
    parser.add_argument(
        "--make-sample",
        action="store_true",
        help="with fashion_mnist: write the sample shipped in data/fashion_mnist_sample (default: no)",
    )
    args = parser.parse_args(argv)
    if args.make_sample and args.name != "fashion_mnist":
        parser.error("--make-sample goes with fashion_mnist")
    if args.source is not None and not args.source.exists():
        raise UserError(f"--from {args.source}: there is no such file or folder")
    socket.setdefaulttimeout(30)  # for libraries that set none
    if args.make_sample:
        make_sample(utils.ROOT / "data/fashion_mnist_sample")
    elif args.name == "fashion_mnist":
        get_fashion_mnist(args.source)
    elif args.name == "checkpoints":
        get_checkpoints(args.source)
    else:
        get_images(args.name, args.source)


# --- Fashion-MNIST ------------------------------------------------------------------------------------------------


def get_fashion_mnist(source: Path | None) -> None:
    """Into data/fashion_mnist, from `source`, the hub or torchvision's mirror. Debian's copy is used where it lies."""
    target = (utils.ROOT / "data/fashion_mnist").resolve()  # perhaps a link to a larger disk
    if is_filled(target):
        print(f"{target} is all there: {count_fashion_mnist(target)}")
        return
    debian = Path(DATASETS["fashion_mnist"].folders[1])
    if source is None and debian.is_dir():
        counts = count_fashion_mnist(debian)
        print(f"{debian} has Fashion-MNIST, nothing to fetch: {counts}")
        return
    with staging(target) as folder:
        data = folder / "data"
        if source is not None:
            unpack(source, folder / "source")
            collect_fashion_mnist(folder / "source", data)
        else:
            try:
                try_each(
                    folder,
                    {
                        "the Hugging Face hub": lambda: fashion_mnist_from_hub(folder, data),
                        "torchvision": lambda: fashion_mnist_from_torchvision(folder, data),
                    },
                )
            except UserError as error:
                raise UserError(f"the shipped sample of Fashion-MNIST will stand in: {error}") from error
        publish(data, target, count_fashion_mnist(data))


def count_fashion_mnist(folder: Path) -> str:
    """Read both splits and say how many images they have. Raises UserError where one is missing or damaged."""
    counts = []
    for split in ("train", "test"):
        found = read_mnist_files(folder, split)
        if found is None:
            raise UserError(f"{folder} has neither the IDX files of Fashion-MNIST nor train*.parquet and test*.parquet")
        counts.append(f"{split} {len(found[0]):,} images")
    return ", ".join(counts)


def collect_fashion_mnist(source: Path, folder: Path) -> None:
    """Move the IDX or parquet files that lie anywhere under `source` into one flat folder."""
    folder.mkdir()
    for pattern in ("*-idx[13]-ubyte", "*-idx[13]-ubyte.gz", "train*.parquet", "test*.parquet"):
        for file in [path for path in source.rglob(pattern) if path.is_file()]:
            file.rename(folder / file.name)


def fashion_mnist_from_hub(folder: Path, data: Path) -> None:
    data.mkdir()
    with fetching():
        splits = load_from_hub(DATASETS["fashion_mnist"].hub, folder / "hub")
        for split in ("train", "test"):
            splits[split].to_parquet(data / f"{split}.parquet")


def fashion_mnist_from_torchvision(folder: Path, data: Path) -> None:
    from torchvision.datasets import FashionMNIST

    require_network(FashionMNIST.mirrors[0])
    with fetching():
        FashionMNIST(folder / "torchvision", download=True)  # compares MD5s
    collect_fashion_mnist(folder / "torchvision", data)


def make_sample(folder: Path, train: int = 2500, test: int = 1000) -> None:
    """The first images of both splits, as PNG in parquet: they stand in where the full data is out of reach."""
    import datasets

    labels = datasets.ClassLabel(names=list(DATASETS["fashion_mnist"].classes))
    features = datasets.Features(image=datasets.Image(), label=labels)
    for split, count in (("train", train), ("test", test)):
        data = load_data("fashion_mnist", split)
        if data.labels is None or len(data) < 10_000:
            raise UserError("the sample is cut from all of Fashion-MNIST, which is not there")
        pictures = []
        for image in data.images[:count, 0].numpy():
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG", optimize=True)
            pictures.append({"bytes": stream.getvalue(), "path": None})
        rows = {"image": pictures, "label": data.labels[:count].tolist()}
        with atomic_path(folder / f"{split}.parquet") as temporary:
            datasets.Dataset.from_dict(rows, features=features).to_parquet(temporary)
        print(f"wrote {folder / split}.parquet: {count:,} images")


# --- CIFAR-10 and landscapes: folders of images -------------------------------------------------------------------


def get_images(name: str, source: Path | None) -> None:
    """Into the folder beside the scripts, as <class>/* or {train,test}/<class>/*, checked and counted."""
    target = (utils.ROOT / DATASETS[name].folders[0]).resolve()  # perhaps a link to a larger disk
    if is_filled(target):
        print(f"{target} is all there: {describe(confirm(target))}")
        return
    with staging(target) as folder:
        found = folder / "source"
        if source is not None:
            unpack(source, found)
        elif name == "cifar10":
            try_each(
                folder,
                {
                    "the Hugging Face hub": lambda: cifar10_from_hub(folder, found),
                    "torchvision": lambda: cifar10_from_torchvision(found),
                    "Kaggle": lambda: from_kaggle(name, folder, found),
                },
            )
        else:
            from_kaggle(name, folder, found)
        images = arrange(find_images(found), folder, name)
        for file in unreadable_images(images):
            file.unlink()
        counts = count_files(images)
        (images / RECORD).write_text(json.dumps(counts))
        publish(images, target, describe(counts))


def confirm(target: Path) -> dict[str, dict[str, int]]:
    """Count a folder that is in its place; check it if it was put there by hand. Raises UserError if files are gone."""
    if (target / "cifar-10-batches-py").is_dir():
        splits = {split: load_data(target, split) for split in ("train", "test")}  # compares MD5s
        return {split: {"images": len(data)} for split, data in splits.items()}
    counts = count_files(target)
    try:
        recorded = json.loads((target / RECORD).read_text())
    except (OSError, ValueError):
        unreadable_images(target)
        with contextlib.suppress(UserError), atomic_path(target / RECORD) as temporary:  # it may be read-only
            temporary.write_text(json.dumps(counts))
        return counts
    if recorded != counts:
        raise UserError(f"{target} has not the images that it was finished with: remove it and run this again")
    return counts


def find_images(folder: Path) -> Path:
    """The folder that holds the splits, the class folders or the images: archives wrap it in others."""
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        folders = [entry for entry in entries if entry.is_dir()]
        pictures = any(entry.suffix.lower() in Image.registered_extensions() for entry in entries)
        if len(folders) != 1 or pictures or folders[0].name == "train":
            return folder
        folder = folders[0]


def arrange(images: Path, folder: Path, name: str) -> Path:
    """Bring torchvision's batches and a flat folder of landscapes into the layout of the others."""
    if (images / "data_batch_1").is_file():
        batches = images.rename(folder / "cifar-10-batches-py")
        for split in ("train", "test"):
            data = load_data(batches, split)
            assert data.labels is not None
            pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images)
            write_images(pictures, data.labels.tolist(), data.classes, folder / "images" / split)
        return folder / "images"
    without_classes = [split for split in splits_of(images) if not list_images(split)[2]]
    if without_classes and name != "landscapes":
        raise UserError(f"{without_classes[0]} has no class folders")
    if without_classes == [images]:
        (folder / "images").mkdir()
        return images.rename(folder / "images" / "landscapes").parent
    return images


def write_images(pictures: Iterable[Image.Image], labels: list[int], classes: list[str], folder: Path) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
    bar = progress(zip(pictures, labels), total=len(labels), desc=f"writing {folder.name}", unit="image")
    for i, (picture, label) in enumerate(bar):
        picture.save(folder / classes[label] / f"{i:05}.png")


def splits_of(root: Path) -> list[Path]:
    return [root / split for split in ("train", "test") if (root / split).is_dir()] or [root]


def count_files(root: Path) -> dict[str, dict[str, int]]:
    """{split: {class: number of files}}. Raises UserError for an empty class and for splits with different classes."""
    counts = {}
    for folder in splits_of(root):
        _, labels, classes = list_images(folder)
        number = Counter(labels)
        split = "" if folder == root else folder.name
        counts[split] = {name: number[i] for i, name in enumerate(classes or ["images"])}
    if len({tuple(classes) for classes in counts.values()}) > 1:
        raise UserError(f"{root}: train and test have different classes")
    return counts


def unreadable_images(root: Path) -> list[Path]:
    """Decode every image. Those that do not decode are returned, and named and counted on stderr."""
    unreadable = []
    for folder in splits_of(root):
        files = list_images(folder)[0]
        with decode_images(files, 8, f"checking {folder.name}") as decoded:
            bad = [file for file, image in zip(files, decoded) if image is None]
        say_left_out(folder, bad, len(files))
        unreadable += bad
    return unreadable


def describe(counts: dict[str, dict[str, int]]) -> str:
    parts = []
    for split, classes in counts.items():
        each = ", ".join(f"{name} {number:,}" for name, number in classes.items())
        parts.append(f"{split} {sum(classes.values()):,} images ({each})".strip())
    return "; ".join(parts)


def cifar10_from_hub(folder: Path, found: Path) -> None:
    with fetching():
        splits = load_from_hub(DATASETS["cifar10"].hub, folder / "hub")
        for split in ("train", "test"):
            data = splits[split]
            write_images((row["img"] for row in data), data["label"], data.features["label"].names, found / split)


def cifar10_from_torchvision(found: Path) -> None:
    from torchvision.datasets import CIFAR10

    require_network(CIFAR10.url)
    with fetching():
        CIFAR10(found, download=True)  # compares MD5s


# --- the course's checkpoints -------------------------------------------------------------------------------------


def get_checkpoints(source: Path | None) -> None:
    """Into checkpoints/, from `source` (an archive, a folder or one .pt file) or from Google Drive."""
    target = utils.ROOT / "checkpoints"
    missing = [name for name in COURSE_CHECKPOINTS if not (target / name).is_file()]
    if not missing:
        for name in COURSE_CHECKPOINTS:
            check_checkpoint(target / name)
        print(f"{target} has all of the course's checkpoints: {', '.join(COURSE_CHECKPOINTS)}")
        return
    with staging(target) as folder:
        found = folder / "source"
        if source is None:
            from_google_drive(found)
        elif source.is_file() and source.suffix == ".pt":  # a zip archive as well, but not to be unpacked
            found.mkdir()
            shutil.copyfile(source, found / source.name)
        else:
            unpack(source, found)
        files = {file.name: file for file in found.rglob("*.pt") if file.name in missing}
        if not files:
            raise UserError(f"found none of {', '.join(missing)} in {source or 'the course folder'}")
        for file in files.values():
            check_checkpoint(file)
        target.mkdir(exist_ok=True)
        for name, file in files.items():
            os.replace(file, target / name)
            print(f"wrote {target / name}")
    for name in sorted(set(missing) - set(files)):
        say(f"{name} is still missing")


def check_checkpoint(path: Path) -> None:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch each raise their own
        raise UserError(f"{path} is not a PyTorch checkpoint, is damaged or not safe to load: remove it") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold the weights of a network (a dictionary of tensors)")


def from_google_drive(found: Path) -> None:
    page = f"https://drive.google.com/drive/folders/{COURSE_FOLDER}"
    try:
        require_network("https://drive.google.com")
        with fetching(), contextlib.redirect_stdout(sys.stderr):
            import gdown

            if not gdown.download_folder(id=COURSE_FOLDER, output=str(found), use_cookies=False):
                raise UserError("Google Drive gave no file")
    except UserError as error:
        by_hand = f"download {page} in a browser and run `python download_datasets.py checkpoints --from FOLDER`"
        raise UserError(f"{error}; without it, {by_hand}, or use the checkpoints that are shipped") from error


# --- where data comes from ----------------------------------------------------------------------------------------


def load_from_hub(name: str, cache: Path) -> Any:
    require_network(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    import datasets

    return datasets.load_dataset(name, cache_dir=str(cache))


def from_kaggle(name: str, folder: Path, found: Path) -> None:
    """Download and unpack a Kaggle data set. No message repeats what Kaggle's package says: it might name a secret."""
    page = f"https://www.kaggle.com/datasets/{DATASETS[name].kaggle}"
    try:
        check_kaggle_credentials()
        require_network("https://www.kaggle.com")
        with fetching(secret=True), contextlib.redirect_stdout(io.StringIO()):
            import kaggle  # signs in on import, and old versions exit where they cannot

            kaggle.api.authenticate()
            kaggle.api.dataset_download_files(
                DATASETS[name].kaggle, path=str(folder / "kaggle"), quiet=False, unzip=False
            )
    except UserError as error:
        by_hand = f"download {page} in a browser and run `python download_datasets.py {name} --from ARCHIVE`"
        raise UserError(f"{error}; without it, {by_hand}") from error
    archives = list((folder / "kaggle").glob("*.zip"))
    if len(archives) != 1:
        raise UserError(f"Kaggle gave no archive of {DATASETS[name].kaggle}")
    unpack(archives[0], found)


def check_kaggle_credentials() -> None:
    """Look for what Kaggle's package would use, in its order. Raises UserError where that is nothing or of no use."""
    if os.environ.get("KAGGLE_API_TOKEN"):
        return
    home = Path.home() / ".kaggle"
    for file in (home / "access_token", home / "access_token.txt"):
        if file.is_file():
            read_private(file)
            return
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        return
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"
    for folder in (os.environ.get("KAGGLE_CONFIG_DIR"), home, config):
        if folder and (file := Path(folder) / "kaggle.json").is_file():
            try:
                token = json.loads(read_private(file))
                if token["username"] and token["key"]:
                    return
            except (ValueError, TypeError, KeyError):
                pass
            raise UserError(f"{file} is not the file that Kaggle gives (username and key as JSON): create a new token")
    if (home / "credentials.json").is_file():  # of `kaggle auth login`
        read_private(home / "credentials.json")
        return
    raise UserError(
        "no Kaggle token: (1) sign in at https://www.kaggle.com/settings/api, (2) click Generate New Token, "
        "(3) save it as ~/.kaggle/access_token and run `chmod 600 ~/.kaggle/access_token`"
    )


def read_private(file: Path) -> str:
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{file} holds a secret and is open to other users: run `chmod 600 {file}`")
    content = file.read_text(errors="replace").strip()
    if not content:
        raise UserError(f"{file} is empty: put your Kaggle token in it")
    return content


def require_network(url: str) -> None:
    """Fail within seconds where the libraries would retry for minutes. Any answer, an error page too, is a network."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"no network (cannot reach {url})") from error


@contextlib.contextmanager
def fetching(secret: bool = False) -> Iterator[None]:
    """What a download library raises becomes a UserError, without its words where they may hold a secret."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = "the credentials were not accepted" if isinstance(error, SystemExit) else type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            reason += f", HTTP status {status}" + (" (is the token still valid?)" if status in (401, 403) else "")
        elif not secret:
            reason += "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
        raise UserError(f"the download failed ({reason})") from error


def try_each(folder: Path, sources: dict[str, Callable[[], None]]) -> None:
    """Call one after the other until one succeeds; what a failed one left in `folder` is removed."""
    reasons = []
    for label, fetch in sources.items():
        print(f"fetching from {label}", file=sys.stderr)
        try:
            fetch()
            return
        except UserError as error:
            reasons.append(f"{label}: {error}")
        for entry in folder.iterdir():
            shutil.rmtree(entry)
    raise UserError("; ".join(reasons))


# --- unpacking and putting in place -------------------------------------------------------------------------------


def is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which is gone afterwards whatever happens."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-download-", dir=target.parent))
    try:
        yield folder
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"no space left on the disk for {target}: nothing was kept") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path, description: str) -> None:
    os.replace(folder, target)
    print(f"wrote {target}: {description}")


# what reading a damaged archive raises
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    NotImplementedError,
    OSError,
)

# one file to write: its path below the target, its size, and a function that opens it
Member = tuple[PurePosixPath, int, Callable[[], Any]]


def unpack(source: Path, folder: Path) -> None:
    """Copy a folder, or unpack a zip or tar archive, hidden files apart.

    Raises UserError, before anything is written, for a member that would land outside of `folder`, is a link or
    protected by a password; and for an archive that is damaged or larger than the disk.
    """
    folder.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            if source.is_dir():
                members = folder_members(source)
            elif zipfile.is_zipfile(source):
                members = zip_members(stack.enter_context(zipfile.ZipFile(source)), source)
            elif tarfile.is_tarfile(source):
                members = tar_members(stack.enter_context(tarfile.open(source)), source)
            else:
                raise UserError(f"{source} is neither a folder nor a zip or tar archive, or it ends early")
            members = [member for member in members if not is_hidden(member[0])]
            need, free = sum(size for _, size, _ in members), shutil.disk_usage(folder).free
            if need > free:
                raise UserError(f"{source} needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left")
            for name, _, read in progress(members, desc=f"unpacking {source.name}", unit="file"):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with read() as content, open(path, "xb") as file:
                    shutil.copyfileobj(content, file)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{source} has two members called {Path(error.filename).name}") from error
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's fault, not the archive's
        raise UserError(f"{source} is damaged or ends early ({error})") from error


def is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def folder_members(source: Path) -> list[Member]:
    files = [Path(parent, name) for parent, _, names in os.walk(source) for name in names]
    return [
        (PurePosixPath(file.relative_to(source)), file.stat().st_size, partial(open, file, "rb"))
        for file in files
        if file.is_file()
    ]


def zip_members(archive: zipfile.ZipFile, source: Path) -> list[Member]:
    members: list[Member] = []
    for info in archive.infolist():
        name = safe_name(info.filename, source)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{source} is refused: its member {name} is a link or a device")
        if info.flag_bits & 1:
            raise UserError(f"{source} is protected by a password: unpack it and give the folder to --from")
        if name.parts and not info.is_dir():
            members.append((name, info.file_size, partial(archive.open, info)))
    return members


def tar_members(archive: tarfile.TarFile, source: Path) -> list[Member]:
    members: list[Member] = []
    for info in archive.getmembers():
        name = safe_name(info.name, source)
        if not info.isfile() and not info.isdir():
            raise UserError(f"{source} is refused: its member {name} is a link or a device")
        if info.isfile():
            members.append((name, info.size, partial(archive.extractfile, info)))
    stream: Any = archive.fileobj
    if stream.tell() == archive.offset:
        raise EOFError("its end mark is missing")
    while stream.read(1 << 20):  # a compressed archive has its checksum at the very end
        pass
    return members


def safe_name(name: str, source: Path) -> PurePosixPath:
    """A member's name as a path that stays below where it is put, on every system. Raises UserError."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        raise UserError(f"{source} is refused: its member {name!r} would land outside of the target")
    return path


if __name__ == "__main__":
    command_line(main)
