"""Fetch the data and the course's checkpoints to where the scripts look for them.

    python download_datasets.py {fashion_mnist,cifar10,cifar10-64,landscapes,checkpoints} [--from ARCHIVE_OR_FOLDER]

Everything is fetched, unpacked and checked in a temporary folder beside its place and then renamed, so what is in its
place is complete. A second call only counts what is there. A data set is a row of image_data.DATASETS.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import shutil
import socket
import ssl
import stat
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import requests
from PIL import Image

import utils
from image_data import DATASETS, DataSet, checked, count_reasons, decode_images, load_data, split_folders
from utils import ArgumentParser, UserError, command_line, progress, say
from weights import load_checkpoint

MNIST_FILES = ("*-idx[13]-ubyte", "*-idx[13]-ubyte.gz", "train*.parquet", "test*.parquet")
COURSE_FOLDER = "https://drive.google.com/drive/folders/1beUSI-edO98i6J9pDR67BKGCfkzUL5DX"
COURSE_CHECKPOINTS = ("unconditional_ckpt.pt", "conditional_ckpt.pt", "conditional_ema_ckpt.pt")
NO_TOKEN = (
    "no Kaggle token that works: (1) sign in at https://www.kaggle.com/settings/api, (2) click Generate New Token, (3) "
    "save it as ~/.kaggle/access_token (Python 3.10: a legacy API key, as kaggle.json) and run `chmod 600` on that file"
)
TRUST = (
    "where a company or a proxy signs, let SSL_CERT_FILE and REQUESTS_CA_BUNDLE name its .pem file; with Python from "
    "python.org on macOS run its `Install Certificates.command`; if it has expired, look at this computer's clock"
)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*DATASETS, "checkpoints"])
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="an archive or folder that you have")
    args = parser.parse_args(argv)
    if args.source is not None and not args.source.exists():
        raise UserError(f"--from {args.source}: there is no such file or folder")
    socket.setdefaulttimeout(30)  # for libraries that set none
    if args.name == "checkpoints":
        get_checkpoints(args.source)
    else:
        get_data(args.name, args.source)


# --- data sets ----------------------------------------------------------------------------------------------------


def get_data(name: str, source: Path | None) -> None:
    """Into its folder beside the scripts, from `source` or from where its row says, checked and counted."""
    row = DATASETS[name]
    target, *others = [(utils.ROOT / folder).resolve() for folder in row.folders]  # perhaps links to a larger disk
    for place in [target, *(others if source is None else [])]:
        if place.is_dir() and any(place.iterdir()):
            print(f"{place} is all there: {count_images(place, not row.flat)}")
            return
    with staging(target) as folder:
        if source is None:
            sources = {key: partial(fetch_from, row) for key, fetch_from in SOURCES.items() if getattr(row, key)}
            page = f"www.kaggle.com/datasets/{row.kaggle}" if row.kaggle else f"huggingface.co/datasets/{row.hub}"
            fetch(sources, folder, name, f"https://{page}")
        else:
            unpack(source, folder / "source")
        images = folder / target.name
        arrange(folder / "source", images, name)
        counts = count_images(images, not row.flat)
        if target.is_dir():
            target.rmdir()  # it is empty, and Windows renames nothing onto a folder
        os.replace(images, target)
    print(f"wrote {target}: {counts}")


def arrange(source: Path, images: Path, name: str) -> None:
    """Bring `source` into the layout that is read: MNIST's files, or class folders of images that all decode."""
    row = DATASETS[name]
    if row.classes:
        images.mkdir()
        files = [file for pattern in MNIST_FILES for file in source.rglob(pattern) if file.is_file()]
        if not files:
            raise UserError(f"found neither the IDX files of {row.title} nor train*.parquet and test*.parquet")
        for file in files:
            file.replace(images / file.name)
        return
    if batches := list(source.rglob("data_batch_1")):  # CIFAR-10 as its authors and torchvision have it
        renamed = batches[0].parent.rename(source.with_name("cifar-10-batches-py"))
        for split in ("train", "test"):
            data = load_data(renamed, split)  # compares MD5s
            pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images)
            write_images(pictures, data.labels.tolist(), data.classes, images / split)  # type: ignore[union-attr]
        return
    folders = [file.parent for file in visible_files(source) if file.suffix.lower() in Image.registered_extensions()]
    found = Path(os.path.commonpath(folders or [source]))  # archives wrap it in other folders
    flat = [part for part in split_folders(found)[0] if not any(entry.is_dir() for entry in part.iterdir())]
    if flat and not row.flat:
        raise UserError(f"{flat[0]} has no class folders")
    if flat == [found]:  # one class, called after the data set
        images.mkdir()
    found.rename(images / name if flat == [found] else images)
    for part in split_folders(images)[0]:
        files = visible_files(part)
        decoded = decode_images(files, 8, f"checking {part.name}")
        left_out = {str(file.relative_to(part)): why for file, why in zip(files, decoded) if isinstance(why, str)}
        if left_out:
            say(f"{part}: left out {len(left_out)} of {len(files):,} files: {count_reasons(left_out)}")
        for name in left_out:
            (part / name).unlink()


def visible_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not is_hidden(path.relative_to(folder)) and path.is_file())


def is_hidden(path: PurePath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def count_images(root: Path, labels: bool) -> str:
    """How many images each split and class has, in words. Raises UserError where one has none or is damaged."""
    if any(any(root.glob(pattern)) for pattern in (*MNIST_FILES, "cifar-10-batches-py")):
        return ", ".join(f"{split} {len(load_data(root, split)):,} images" for split in ("train", "test"))
    groups_of = {part.name: checked(part, groups, labels) for part, groups in split_folders(root)[0].items()}
    if labels and len({tuple(groups) for groups in groups_of.values()}) > 1:
        raise UserError(f"{root}: train and test have different classes")
    words = []
    for name, groups in groups_of.items():
        each = [f"{label} {len(files):,}" for label, files in groups.items() if label]
        count = sum(map(len, groups.values()))
        words.append(f"{name} {count:,} images" + (f" ({', '.join(each)})" if each else ""))
    return "; ".join(words)


def write_images(pictures: Iterable[Image.Image], labels: list[int], classes: list[str], folder: Path) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
    for i, (picture, label) in enumerate(progress(zip(pictures, labels), total=len(labels), desc=folder.name)):
        picture.save(folder / classes[label] / f"{i:05}.png")


# --- the course's checkpoints -------------------------------------------------------------------------------------


def get_checkpoints(source: Path | None) -> None:
    """Into checkpoints/, from `source` (an archive, a folder or one .pt file) or from Google Drive."""
    target = utils.ROOT / "checkpoints"
    missing = [name for name in COURSE_CHECKPOINTS if not (target / name).is_file()]
    if not missing:
        print(f"{target} has all of the course's checkpoints: {', '.join(COURSE_CHECKPOINTS)}")
        return
    with staging(target) as folder:
        if source is None:
            fetch({"Google Drive": from_google_drive}, folder, "checkpoints", COURSE_FOLDER)
        else:
            unpack(source, folder / "source")
        files = {file.name: file for file in folder.rglob("*.pt") if file.name in missing}
        if not files:
            raise UserError(f"found none of {', '.join(missing)} in {source or COURSE_FOLDER}")
        for file in files.values():
            load_checkpoint(file)
        target.mkdir(exist_ok=True)
        for name, file in files.items():
            os.replace(file, target / name)
            print(f"wrote {target / name}")
    for name in sorted(set(missing) - set(files)):
        say(f"{name} is still missing")


# --- where data comes from ----------------------------------------------------------------------------------------


def fetch(sources: Mapping[str, Callable[[Path], None]], folder: Path, name: str, page: str) -> None:
    """Into `folder`/source, from the first source that gives it. Raises UserError with the reasons of all."""
    reasons = []
    for source, fetch_from in sources.items():
        print(f"fetching from {source}", file=sys.stderr)
        try:
            return fetch_from(folder)
        except UserError as error:
            reasons.append(f"{source}: {error}")
        for entry in folder.iterdir():  # half a download
            shutil.rmtree(entry)
    by_hand = f"download {page} in a browser and run `python download_datasets.py {name} --from PATH`"
    raise UserError(f"{'; '.join(reasons)}; without it, {by_hand}")


def from_google_drive(folder: Path) -> None:
    with fetching("https://drive.google.com"), contextlib.redirect_stdout(sys.stderr):
        import gdown

        gdown.download_folder(url=COURSE_FOLDER, output=str(folder / "source"), use_cookies=False)


def from_hub(row: DataSet, folder: Path) -> None:
    """MNIST's kind as parquet files, all others as class folders of PNG files."""
    with fetching(endpoint := os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        import datasets
        from huggingface_hub import HfApi

        HfApi(endpoint).dataset_info(row.hub, timeout=10)  # load_dataset tries five times and does not say what failed
        splits = datasets.load_dataset(row.hub, cache_dir=str(folder / "hub"))
        (folder / "source").mkdir()
        for split, data in splits.items():
            if row.classes:
                data.to_parquet(folder / "source" / f"{split}.parquet")
            else:
                column = {type(feature): name for name, feature in reversed(data.features.items())}
                image, label = column[datasets.Image], column[datasets.ClassLabel]
                pictures, names = (example[image] for example in data), data.features[label].names
                write_images(pictures, list(data[label]), names, folder / "source" / split)


def from_torchvision(row: DataSet, folder: Path) -> None:
    import torchvision

    kind = getattr(torchvision.datasets, row.torchvision)
    with fetching(kind.url if hasattr(kind, "url") else kind.mirrors[0]):
        kind(folder / "source", download=True)  # compares MD5s


def from_kaggle(row: DataSet, folder: Path) -> None:
    """No message repeats what Kaggle's package says: it might name a secret."""
    check_kaggle_token()
    with fetching("https://www.kaggle.com", secret=True), contextlib.redirect_stdout(io.StringIO()):
        try:
            import kaggle  # signs in at once, and old versions raise where they cannot

            kaggle.api.authenticate()
        except (ImportError, requests.RequestException):
            raise
        except (Exception, SystemExit) as error:
            raise UserError(NO_TOKEN) from error
        kaggle.api.dataset_download_files(row.kaggle, path=str(folder / "kaggle"), quiet=False)
    unpack(folder / "kaggle" / (row.kaggle.split("/")[1] + ".zip"), folder / "source")


def check_kaggle_token() -> None:
    """Kaggle's package takes a token that other users can read as well: here it is refused. So is having none."""
    home, config = Path.home() / ".kaggle", os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    folders = [home, Path(config, "kaggle"), os.environ.get("KAGGLE_CONFIG_DIR") or home]
    names = ("access_token", "access_token.txt", "kaggle.json", "credentials.json")
    files = [file for folder in folders for name in names if (file := Path(folder, name)).is_file()]
    if not files and not (os.environ.get("KAGGLE_API_TOKEN") or os.environ.get("KAGGLE_KEY")):
        raise UserError(NO_TOKEN)
    for file in files:
        if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{file} holds a secret and is open to other users: run `chmod 600 {file}`")


def require_network(url: str) -> None:
    """Fail within seconds where the libraries would wait for minutes. Any answer, an error page too, is a network."""
    try:
        with contextlib.suppress(requests.exceptions.SSLError, requests.ReadTimeout):  # the library may trust others
            requests.head(url, timeout=5)
    except requests.RequestException as error:
        raise UserError(f"no network (cannot reach {url})") from error


@contextlib.contextmanager
def fetching(url: str, secret: bool = False) -> Iterator[None]:
    """What a download library raises becomes a UserError, without its words where they may hold a secret."""
    require_network(url)
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise UserError(f"the server's certificate is not trusted ({cause.verify_message}): {TRUST}") from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        detail = f", HTTP status {status}" if status else "" if secret else f": {error}"
        raise UserError(f"the download failed ({type(error).__name__}{detail})") from error


# the columns of image_data.DATASETS that say where a data set is fetched from
SOURCES = {"hub": from_hub, "torchvision": from_torchvision, "kaggle": from_kaggle}


# --- unpacking ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which is gone afterwards whatever happens."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-download-", dir=target.parent))
    try:
        yield folder
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left on the disk for {target}: nothing was kept") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(source: Path, folder: Path) -> None:
    """Copy a folder or a .pt file, or unpack a zip or tar archive, hidden files apart.

    Raises UserError for an archive that is damaged, protected, larger than the disk, or has links or members outside.
    """
    folder.mkdir()
    try:
        if source.is_dir():
            for file in progress(visible_files(source), desc=f"copying {source.name}", unit="file"):
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        elif source.suffix == ".pt":  # a zip archive as well, but not to be unpacked
            shutil.copyfile(source, folder / source.name)
        elif zipfile.is_zipfile(source):
            unpack_zip(source, folder)
        elif tarfile.is_tarfile(source):
            unpack_tar(source, folder)
        else:
            with open(source, "rb") as file:
                if file.read(100).lstrip().startswith(b"<"):
                    raise UserError(
                        f"{source} is a web page: the download was refused, so open the address in a browser"
                    )
            raise UserError(f"{source} is neither a folder nor a zip or tar archive, or it ends early")
    except Exception as error:  # damaged bytes make zipfile, tarfile and the decompressors raise all kinds of errors
        of_the_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if of_the_disk or isinstance(error, UserError):
            raise
        raise UserError(f"{source} is damaged or ends early ({error})") from error


def unpack_zip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        members = []
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise UserError(f"{source} is protected by a password: unpack it and give the folder to --from")
            info.filename = info.filename.replace("\\", "/")  # some programs for Windows write it so
            is_file = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            members.append((info.filename, info.is_dir(), is_file, info.file_size, info))
        archive.extractall(folder, wanted(members, source, folder))


def unpack_tar(source: Path, folder: Path) -> None:
    with tarfile.open(source) as archive:
        members = [(info.name, info.isdir(), info.isfile(), info.size, info) for info in archive.getmembers()]
        # tarfile takes an archive that ends between two members for whole, and never reads a compressed one's checksum
        stream: Any = archive.fileobj
        if stream.tell() == archive.offset:
            raise EOFError("its end mark is missing")
        while stream.read(1 << 20):
            pass
        # before Python 3.10.12 and 3.11.4 there is no filter, only what `wanted` has checked
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, wanted(members, source, folder), **safely)


def wanted(members: list[tuple[str, bool, bool, int, Any]], source: Path, folder: Path) -> Iterable[Any]:
    """The infos of the files of (name, is folder, is file, size, info), with a bar. Raises UserError: see `unpack`."""
    files, need = {}, 0
    for name, is_folder, is_file, size, info in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
            raise UserError(f"{source} is refused: its member {name!r} would land outside of the target")
        if not is_folder and not is_file:
            raise UserError(f"{source} is refused: its member {name} is a link or a device")
        if not is_folder and not is_hidden(path):
            if path in files:
                raise UserError(f"{source} has two members called {path}")
            files[path], need = info, need + size
    if clash := files.keys() & {parent for path in files for parent in path.parents}:
        raise UserError(f"{source} has two members called {clash.pop()}, a file and a folder")
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{source} needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left")
    return progress(files.values(), desc=f"unpacking {source.name}", unit="file")


if __name__ == "__main__":
    command_line(main)
