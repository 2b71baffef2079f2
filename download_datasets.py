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
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PureWindowsPath

import requests

import utils
from image_data import DATASETS, DataSet, files_below, is_image, load_data, visible
from utils import ArgumentParser, UserError, command_line, progress, say
from weights import load_checkpoint

COURSE_FOLDER = "https://drive.google.com/drive/folders/1beUSI-edO98i6J9pDR67BKGCfkzUL5DX"
COURSE_CHECKPOINTS = ("unconditional_ckpt.pt", "conditional_ckpt.pt", "conditional_ema_ckpt.pt")
NO_TOKEN = (
    "no Kaggle token that works: (1) sign in at https://www.kaggle.com/settings/api, (2) click Generate New Token, (3) "
    "save it as ~/.kaggle/access_token (Python 3.10: a legacy API key, as kaggle.json) and run `chmod 600` on that file"
)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*DATASETS, "checkpoints"])
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="an archive or folder that you have")
    args = parser.parse_args(argv)
    socket.setdefaulttimeout(30)  # for libraries that set none
    if args.name == "checkpoints":
        get_checkpoints(args.source)
    else:
        get_data(args.name, args.source)


# --- data sets ----------------------------------------------------------------------------------------------------


def get_data(name: str, given: Path | None) -> None:
    """Into its folder beside the scripts, from what was given or from where its row says, checked and counted."""
    row = DATASETS[name]
    target, *others = [(utils.ROOT / folder).resolve() for folder in row.folders]  # perhaps links to a larger disk
    for place in [target, *others] if given is None else [target]:
        if place.is_dir() and visible(os.listdir(place)):
            print(f"{place} is all there: {count_images(place, row)}")
            return
    sources = {key: partial(fetch, row) for key, fetch in SOURCES.items() if getattr(row, key)}
    page = f"www.kaggle.com/datasets/{row.kaggle}" if row.kaggle else f"huggingface.co/datasets/{row.hub}"
    with obtained(name, target, given, sources, f"https://{page}") as source:
        images = source.with_name(target.name)
        arrange(source, images, name)
        counts = count_images(images, row)
        if target.is_dir():
            shutil.rmtree(target)  # no data is in it, and Windows renames nothing onto a folder
        os.replace(images, target)
    print(f"wrote {target}: {counts}")


def arrange(source: Path, images: Path, name: str) -> None:
    """Bring `source` into a layout that is read: MNIST's files, CIFAR-10's batches, or folders of images."""
    row, files = DATASETS[name], [source / file for file in files_below(source)]
    batches = [file.parent for file in files if file.name == "data_batch_1"]
    if row.classes:
        images.mkdir()
        for file in files:
            file.replace(images / file.name)
    elif batches:  # CIFAR-10 as its authors and torchvision have it
        images.mkdir()
        batches[0].rename(images / "cifar-10-batches-py")
    else:
        found = Path(os.path.commonpath([file.parent for file in files if is_image(file)] or [source]))
        if row.flat and not any(entry.is_dir() for entry in found.iterdir()):
            images.mkdir()
            images /= name  # one class, called after the data set
        found.rename(images)  # without the folders that archives wrap it in


def count_images(root: Path, row: DataSet) -> str:
    """How many images each split has, and their classes, in words. Raises UserError for what cannot be read."""
    splits = ["train"] if row.flat else ["train", "test"]
    found = {split: load_data(root, split, 8, row.channels, labels=not row.flat) for split in splits}  # small: quick
    words = "; ".join(f"{split} {len(data):,} images" for split, data in found.items())
    return f"{words}; classes: {', '.join(found['train'].classes)}"


# --- the course's checkpoints -------------------------------------------------------------------------------------


def get_checkpoints(given: Path | None) -> None:
    """Into checkpoints/, from what was given (an archive, a folder or one .pt file) or from Google Drive."""
    target = utils.ROOT / "checkpoints"
    missing = [name for name in COURSE_CHECKPOINTS if not (target / name).is_file()]
    if not missing:
        print(f"{target} has all of the course's checkpoints: {', '.join(COURSE_CHECKPOINTS)}")
        return
    with obtained("checkpoints", target, given, {"Google Drive": from_google_drive}, COURSE_FOLDER) as source:
        files = {file.name: file for file in source.rglob("*.pt") if file.name in missing}
        if not files:
            raise UserError(f"found none of {', '.join(missing)} in {given or COURSE_FOLDER}")
        for name, file in files.items():
            load_checkpoint(file)
            target.mkdir(exist_ok=True)
            os.replace(file, target / name)
            print(f"wrote {target / name}")
    for name in sorted(set(missing) - set(files)):
        say(f"{name} is still missing")


# --- where data comes from ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def obtained(name: str, target: Path, given: Path | None, sources: dict, page: str) -> Iterator[Path]:
    """The folder `source`, in a temporary one beside `target`: what was given, or what a source has. Raises UserError.

    The temporary folder is gone afterwards whatever happens, and no message speaks of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-download-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True) as folder:
        try:
            if given is not None:
                unpack(given, Path(folder, "source"))
            else:
                by_hand = f"download {page} in a browser and run `python download_datasets.py {name} --from PATH`"
                fetch(sources, Path(folder), by_hand)
            yield Path(folder, "source")
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from error


def fetch(sources: dict, folder: Path, by_hand: str) -> None:
    """From the first source that can. Raises UserError, with the reasons of all."""
    reasons = []
    for source, fetch_from in sources.items():
        say(f"fetching from {source}")
        try:
            return fetch_from(folder)
        except (Exception, SystemExit) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            reasons.append(f"{source}: {why_failed(error, secret=source == 'kaggle')}")
        for entry in folder.iterdir():  # half a download
            shutil.rmtree(entry)
    raise UserError(f"{'; '.join(reasons)}; without it, {by_hand}")


def why_failed(error: BaseException, secret: bool) -> str:
    """What a download library raised, without its words where they may hold a secret."""
    if isinstance(error, UserError):
        return str(error)
    if untrusted := re.search(r"certificate verify failed: ([^(]+) \(", "".join(traceback.format_exception(error))):
        return f"the server's certificate is not trusted ({untrusted[1]}): set SSL_CERT_FILE and REQUESTS_CA_BUNDLE"
    status = getattr(getattr(error, "response", None), "status_code", None)
    detail = f", HTTP status {status}" if status else "" if secret else f": {error}"
    return f"the download failed ({type(error).__name__}{detail})"


def require_network(url: str) -> None:
    """Fail within seconds where the libraries would wait for minutes. Any answer, an error page too, is a network."""
    try:
        with contextlib.suppress(requests.exceptions.SSLError, requests.ReadTimeout):  # the library may trust others
            requests.head(url, timeout=5)
    except requests.RequestException as error:
        raise UserError(f"no network (cannot reach {url})") from error


def from_google_drive(folder: Path) -> None:
    require_network("https://drive.google.com")
    with contextlib.redirect_stdout(sys.stderr):
        import gdown

        gdown.download_folder(url=COURSE_FOLDER, output=str(folder / "source"), use_cookies=False)


def from_hub(row: DataSet, folder: Path) -> None:
    """MNIST's kind as parquet files, all others as class folders of PNG files."""
    require_network(endpoint := os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    import datasets
    from huggingface_hub import HfApi

    HfApi(endpoint).dataset_info(row.hub, timeout=10)  # load_dataset tries five times and does not say what failed
    for split, data in datasets.load_dataset(row.hub, cache_dir=str(folder / "hub")).items():
        place = folder / "source" / split
        place.mkdir(parents=True)
        if row.classes:
            data.to_parquet(place / f"{split}.parquet")
            continue
        column = {type(feature): name for name, feature in reversed(data.features.items())}
        image, label = column[datasets.Image], column[datasets.ClassLabel]
        names = data.features[label].names
        for name in names:
            (place / name).mkdir()
        for i, example in enumerate(progress(data, desc=split)):
            example[image].save(place / names[example[label]] / f"{i:05}.png")


def from_torchvision(row: DataSet, folder: Path) -> None:
    import torchvision

    kind = getattr(torchvision.datasets, row.torchvision)
    require_network(kind.url if hasattr(kind, "url") else kind.mirrors[0])
    kind(folder / "source", download=True)  # compares MD5s


def from_kaggle(row: DataSet, folder: Path) -> None:
    """Nothing of what Kaggle's package says is repeated: it might name a secret."""
    require_network("https://www.kaggle.com")
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            import kaggle  # signs in at once, and old versions raise where they cannot

            kaggle.api.authenticate()
        except (ImportError, requests.RequestException):
            raise
        except (Exception, SystemExit) as error:
            raise UserError(NO_TOKEN) from error
        kaggle.api.dataset_download_files(row.kaggle, path=str(folder / "source"), quiet=False, unzip=True)


# the columns of image_data.DATASETS that say where a data set is fetched from
SOURCES = {"hub": from_hub, "torchvision": from_torchvision, "kaggle": from_kaggle}


# --- unpacking ----------------------------------------------------------------------------------------------------


def unpack(source: Path, folder: Path) -> None:
    """Copy a folder or a .pt file, or unpack a zip or tar archive.

    Raises UserError for an archive that is damaged, larger than the disk, or has links or members outside.
    """
    say(f"unpacking {source.name}")
    try:
        if source.is_dir():
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*"), ignore_dangling_symlinks=True)
        elif source.suffix == ".pt":  # a zip archive as well, but not to be unpacked
            folder.mkdir()
            shutil.copy(source, folder)
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as zipped:
                for info in zipped.infolist():
                    info.filename = info.filename.replace("\\", "/")  # some programs for Windows write it so
                check_members(source, [(info.filename, info.file_size, True) for info in zipped.infolist()], folder)
                zipped.extractall(folder, zipped.infolist())
        elif tarfile.is_tarfile(source):
            with tarfile.open(source) as archive:
                members = [(info.name, info.size, info.isdir() or info.isfile()) for info in archive]
                check_members(source, members, folder)
                archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not before Python 3.10.12
                archive.extractall(folder)
        else:
            raise UserError(f"{source} is neither a folder nor a zip or tar archive, or ends early: is it a web page?")
    except Exception as error:  # damaged bytes make zipfile, tarfile and the decompressors raise all kinds of errors
        if isinstance(error, UserError) or getattr(error, "errno", None) not in (None, errno.EINVAL):  # of the disk
            raise
        raise UserError(f"{source} cannot be unpacked: it is damaged or ends early ({error})") from error


def check_members(source: Path, members: list[tuple[str, int, bool]], folder: Path) -> None:
    """Of each: its name, its size, and whether it is a plain file or folder. Raises UserError as `unpack` says."""
    for name, _, plain in members:
        path = PureWindowsPath(name)  # it knows all separators and drives
        if not plain or path.anchor or ".." in path.parts:
            raise UserError(f"{source} is refused: its member {name!r} is a link or a device, or would land outside")
    need, free = sum(size for _, size, _ in members), shutil.disk_usage(folder.parent).free
    if need > free:
        raise UserError(f"{source} needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left")


if __name__ == "__main__":
    command_line(main)
