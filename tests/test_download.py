"""download_datasets.py against local stand-ins: archives good and bad, the hub, mirrors, Kaggle and Google Drive."""

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
import torchvision
from conftest import move_fashion_mnist
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_utils import Malicious, class_folder, mutations, write_cifar_batches

import download_datasets
import image_data
import utils
from image_data import load_data
from modules import UNet
from utils import UserError

main = download_datasets.main
REPOSITORY = Path(download_datasets.__file__).parent
SECRET = "KGAT_0123456789abcdef"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder that the scripts lie in, empty; no credentials; no network unless a test provides one."""
    root = tmp_path / "project"
    root.mkdir()
    for module in (image_data, utils):
        monkeypatch.setattr(module, "ROOT", root)
    move_fashion_mnist(monkeypatch, tmp_path / "no debian")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "XDG_CONFIG", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # a proxy is not asked for the stand-in servers

    def refuse(url):
        raise UserError(f"no network (cannot reach {url})")

    monkeypatch.setattr(download_datasets, "require_network", refuse)
    return root


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(download_datasets, "require_network", lambda url: None)


@pytest.fixture
def server(tmp_path):
    """A local web server: its folder and its address."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{web.server_port}/", web=web)
        web.shutdown()


@pytest.fixture
def untrusted(server, tmp_path):
    """The same server behind a certificate that it signed itself."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    server.certificate = tmp_path / "certificate.pem"
    command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-out", server.certificate, "-keyout", tmp_path / "key.pem"]
    subprocess.run(["openssl", *command.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, tmp_path / "key.pem")
    server.web.socket = context.wrap_socket(server.web.socket, server_side=True)
    server.web.handle_error = lambda *_: None  # clients hang up
    server.url = server.url.replace("http", "https")
    return server


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def cifar_zip(tmp_path):
    """An archive laid out as those of CIFAR-10, wrapped in a folder, with macOS's litter."""
    for split, count in (("train", 3), ("test", 2)):
        class_folder(tmp_path / "source/cifar10" / split, {"cat": count, "dog": count}, size=(8, 8))
    (tmp_path / "source/__MACOSX").mkdir()
    (tmp_path / "source/__MACOSX/._cat").write_text("litter")
    (tmp_path / "source/cifar10/.DS_Store").write_text("litter")
    return zipped(tmp_path / "source", tmp_path / "cifar10.zip")


def nothing_left(root):
    """Neither a data folder nor a temporary one."""
    return [path for path in root.rglob("*") if path.name != "data"] == []


# --- archives and folders -----------------------------------------------------------------------------------------


def test_an_archive_ends_in_place_checked_and_counted(root, cifar_zip, capsys):
    main(["cifar10", "--from", str(cifar_zip)])
    out = capsys.readouterr().out
    assert "train 6 images (cat 3, dog 3); test 4 images (cat 2, dog 2)" in out and str(root / "cifar10") in out
    assert os.listdir(root) == ["cifar10"] and not list(root.rglob("*DS_Store"))
    data = load_data("cifar10", image_size=8)
    assert data.classes == ["cat", "dog"] and len(data) == 6 and len(load_data("cifar10", "test", 8)) == 4
    assert torchvision.datasets.ImageFolder(str(root / "cifar10/train")).classes == ["cat", "dog"]
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for more in ([], ["--from", str(cifar_zip)]):  # once more
        main(["cifar10", *more])
        assert "all there: train 6 images" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_link_to_a_larger_disk_is_filled(root, cifar_zip, tmp_path):
    (tmp_path / "large").mkdir()
    (root / "cifar10").symlink_to(tmp_path / "large")
    main(["cifar10", "--from", str(cifar_zip)])
    assert (root / "cifar10").is_symlink() and (tmp_path / "large/train/cat").is_dir()


@pytest.mark.parametrize("wrapping", ["", "landscape Images/", "a/b/"])
def test_flat_landscapes_go_into_one_folder(root, tmp_path, wrapping, capsys):
    class_folder(tmp_path, {"flat": 4}, size=(90, 80))
    main(["landscapes", "--from", str(zipped(tmp_path / "flat", tmp_path / "x.zip", wrapping))])
    assert "4 images (landscapes 4)" in capsys.readouterr().out
    folder = torchvision.datasets.ImageFolder(str(root / "landscape_img_folder"))
    assert folder.classes == ["landscapes"] and len(folder) == 4
    assert load_data("landscapes").images.shape == (4, 3, 80, 80)


def test_landscapes_keep_their_kinds(root, tmp_path):
    class_folder(tmp_path / "kinds", {"sea": 2, "forest": 1}, size=(9, 9))
    main(["landscapes", "--from", str(tmp_path / "kinds")])
    assert sorted(path.name for path in (root / "landscape_img_folder").iterdir()) == ["forest", "sea"]
    assert (tmp_path / "kinds/sea/000.png").exists()  # a copy: the source is left as it was


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("old_python", [False, True])
def test_tar_archives(root, tmp_path, cifar_zip, mode, old_python, monkeypatch):
    if old_python:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "x.tar", mode) as archive:
        archive.add(tmp_path / "source", ".")
    main(["cifar10-64", "--from", str(tmp_path / "x.tar")])
    assert len(list((root / "cifar10-64").rglob("*.png"))) == 10


def test_zip_archives_with_backslashes(root, tmp_path, cifar_zip):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in (tmp_path / "source").rglob("*.png"):
            archive.write(file, "_")
            archive.infolist()[-1].filename = str(file.relative_to(tmp_path)).replace("/", "\\")
    main(["cifar10-64", "--from", str(tmp_path / "x.zip")])
    assert len(list((root / "cifar10-64/train/cat").rglob("*.png"))) == 3


def test_torchvision_batches_become_folders(root, tmp_path, monkeypatch):
    contents = write_cifar_batches(tmp_path / "cifar-10-batches-py", monkeypatch)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    main(["cifar10", "--from", str(tmp_path / "cifar-10-python.tar.gz")])
    data = load_data("cifar10")
    assert len(data) == 50 and data.labels.tolist() == sorted(5 * list(range(10)))
    assert np.array_equal(data.images[0].flatten(), contents["data_batch_1"]["data"][0])  # the first airplane


def test_torchvision_batches_of_a_stranger_are_refused(root, tmp_path, refused):
    write_cifar_batches(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py/data_batch_2").write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    assert "missing or damaged" in refused(main, "cifar10", "--from", tmp_path / "cifar-10-batches-py")
    assert not (tmp_path / "pwned").exists() and nothing_left(root)


# --- archives and images that are refused -------------------------------------------------------------------------


def add_to_zip(name, mode=0, content=b"evil"):
    def add(path):
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(info, content)

    return add


def add_to_tar(name, kind=tarfile.REGTYPE):
    def add(path):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, 4 if kind == tarfile.REGTYPE else 0
        info.linkname = "" if kind == tarfile.REGTYPE else "/etc/passwd"
        with tarfile.open(path, "w") as archive:
            archive.add(path.parent / "source", "source")
            archive.addfile(info, io.BytesIO(b"evil"))

    return add


def with_password(path):
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.find(signature) + flags] |= 1
    path.write_bytes(content)


def changed(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def cut_tar(cut):
    """A compressed tar archive, cut short; or, for a `cut` of None, a plain one without its last member and end mark."""

    def write(path):
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w:gz" if cut else "w") as archive:
            archive.add(path.parent / "source", "source")
        content = tar.getvalue()
        end = cut or tarfile.open(fileobj=io.BytesIO(content)).getmembers()[-1].offset
        path.write_bytes(content[:end])

    return write


OUTSIDE = (
    "../evil.png",
    "a/../../evil.png",
    "/tmp/evil.png",
    "..\\evil.png",
    "C:\\evil.png",
    "C:evil.png",
    "\\evil.png",
)
CAT = "cifar10/train/cat"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "spoil, words",
    [
        *[(add(name), "would land outside") for name in OUTSIDE for add in (add_to_zip, add_to_tar)],
        *[
            (add_to_tar("source/link", kind), "link or a device")
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        ],
        (add_to_zip(f"{CAT}/link.png", stat.S_IFLNK | 0o777), "link or a device"),
        (with_password, "password"),
        (add_to_zip(f"{CAT}/000.png"), f"two members called {CAT}/000.png"),
        (add_to_zip(CAT), f"two members called {CAT}, a file and a folder"),
        (add_to_tar("source/cifar10/train/dog/001.png"), "two members called source/cifar10/train/dog/001.png"),
        (changed(lambda content: b""), "neither a folder nor a zip or tar archive"),
        (changed(lambda content: b"no archive"), "neither a folder nor a zip or tar archive"),
        (changed(lambda content: b"\n<!DOCTYPE html><title>Sign in"), "is a web page"),
        (changed(lambda content: content[:-100]), "ends early"),
        (changed(lambda content: content[: len(content) // 2]), "ends early"),
        (changed(lambda content: content[:500] + b"\0\xff\0\xff" * 5 + content[520:]), "is damaged"),
        (cut_tar(-9), "ends early"),
        (cut_tar(-1000), "ends early"),
        (cut_tar(None), "ends early"),
    ],
)
def test_bad_archives_are_refused(root, cifar_zip, tmp_path, refused, spoil, words):
    spoil(cifar_zip)
    before = sorted(tmp_path.rglob("*"))
    line = refused(main, "cifar10", "--from", cifar_zip)
    assert words in line and str(cifar_zip) in line
    assert nothing_left(root) and sorted(tmp_path.rglob("*")) == before


def _archives():
    """The same zip and tar.gz in every run: no clock in them."""
    text = b"text " * 30
    zip_bytes, tar_bytes = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zip_bytes, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("class/a.txt"), text)
    info = tarfile.TarInfo("class/a.txt")
    info.size = len(text)
    with (
        gzip.GzipFile(fileobj=tar_bytes, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        archive.addfile(info, io.BytesIO(text))
    return zip_bytes.getvalue(), tar_bytes.getvalue()


@given(st.one_of(*map(mutations, _archives())))
def test_fuzzed_archives_are_unpacked_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "archive").write_bytes(content)
    try:
        download_datasets.unpack(folder / "archive", folder / "target")
    except UserError as error:
        assert "archive" in str(error)
    assert sorted(os.listdir(folder)) == ["archive", "target"]
    shutil.rmtree(folder)


def test_bad_images_are_named_counted_and_left_out(root, tmp_path, cifar_zip, capsys):
    folder = tmp_path / "source/cifar10/train/cat"
    content = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(content[: len(content) // 2])
    (folder / "notes.txt").write_text("no image")
    main(["cifar10", "--from", str(zipped(tmp_path / "source", tmp_path / "x.zip"))])
    captured = capsys.readouterr()
    assert "left out 2 of 7 files" in captured.err and "cat/001.png, cat/notes.txt" in captured.err
    assert "train 5 images (cat 2, dog 3)" in captured.out
    assert sorted(os.listdir(root / "cifar10/train/cat")) == ["000.png", "002.png"]


def test_wrong_layouts_are_refused(root, tmp_path, cifar_zip, refused):
    class_folder(tmp_path, {"flat": 2})
    (tmp_path / "empty").mkdir()
    wolf = shutil.copytree(tmp_path / "source", tmp_path / "wolf")
    (wolf / "cifar10/test/dog").rename(wolf / "cifar10/test/wolf")
    for file in (tmp_path / "source/cifar10/test/dog").iterdir():
        file.write_text("no image")
    for name, source, words in (
        ("cifar10", "flat", "no class folders"),
        ("cifar10", "wolf", "different classes"),
        ("cifar10", "source", "test/dog has no image"),
        ("landscapes", "empty", "no image"),
        ("landscapes", "not there", "no such file"),
        ("fashion_mnist", "flat", "neither the IDX files"),
    ):
        line = refused(main, name, "--from", tmp_path / source)
        assert words in line and "-download-" not in line and nothing_left(root)


# --- failures while writing ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(root, cifar_zip, monkeypatch, refused):
    copy, count = shutil.copyfileobj, iter(range(100))

    def full(source, target, *length):
        if next(count) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        assert "No space left on device" in refused(main, "cifar10", "--from", cifar_zip)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    assert "GB left" in refused(main, "cifar10", "--from", cifar_zip) and nothing_left(root)


@pytest.mark.parametrize("place", ["shutil.copyfileobj", "image_data.decode_image", "os.replace"])
def test_an_interruption_leaves_nothing_that_looks_complete(root, cifar_zip, monkeypatch, place):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, interrupt)
        main(["cifar10", "--from", str(cifar_zip)])
    assert nothing_left(root)
    main(["cifar10", "--from", str(cifar_zip)])
    assert (root / "cifar10").is_dir()


def test_a_kill_leaves_nothing_that_looks_complete(root, cifar_zip):
    """SIGKILL while unpacking: no data folder; the next call works."""
    program = f"""
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
import download_datasets, image_data, utils
utils.ROOT = image_data.ROOT = Path({str(root)!r})
copy, n = shutil.copyfileobj, iter(range(9))
shutil.copyfileobj = lambda *files: copy(*files) if next(n) < 3 else os.kill(os.getpid(), {int(signal.SIGKILL)})
download_datasets.main(["cifar10", "--from", {str(cifar_zip)!r}])
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -signal.SIGKILL
    assert not (root / "cifar10").exists()
    main(["cifar10", "--from", str(cifar_zip)])
    assert len(load_data("cifar10")) == 6


# --- Fashion-MNIST ------------------------------------------------------------------------------------------------


def test_fashion_mnist_from_a_folder_and_an_archive(root, tmp_path, idx_folder, capsys):
    for source in (idx_folder, zipped(idx_folder, tmp_path / "x.zip", "some/where/")):
        main(["fashion_mnist", "--from", str(source)])
        main(["fashion_mnist"])
        out = capsys.readouterr().out
        assert "wrote" in out and "all there: train 64 images, test 16 images" in out
        assert len(load_data("fashion_mnist")) == 64 and sorted(os.listdir(root / "data")) == ["fashion_mnist"]
        shutil.rmtree(root / "data")


def test_fashion_mnist_from_debian_is_used_where_it_is(root, idx_folder, monkeypatch, capsys):
    move_fashion_mnist(monkeypatch, idx_folder)
    main(["fashion_mnist"])
    assert f"{idx_folder} is all there: train 64 images" in capsys.readouterr().out and nothing_left(root)


def test_bad_fashion_mnist_is_refused(root, tmp_path, idx_folder, refused):
    path = shutil.copytree(idx_folder, tmp_path / "copy") / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in refused(main, "fashion_mnist", "--from", tmp_path / "copy")
    path.unlink()
    assert path.name in refused(main, "fashion_mnist", "--from", tmp_path / "copy") and nothing_left(root)


# --- the hub, torchvision, and what the row of a data set says ----------------------------------------------------


def give_from_hub(monkeypatch, name, splits, image="image", classes=None):
    """Let `datasets.load_dataset(name)` give {split: (images, labels)}."""
    import datasets

    label = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), "label": label})

    def load_dataset(asked, cache_dir):
        assert asked == name and Path(cache_dir).parent.name.startswith(".")
        rows = {split: {image: images, "label": labels} for split, (images, labels) in splits.items()}
        return {split: datasets.Dataset.from_dict(rows[split], features=features) for split in splits}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_fashion_mnist_from_the_hub(root, online, monkeypatch):
    split = ([Image.new("L", (28, 28), i) for i in range(3)], [0, 9, 4])
    give_from_hub(monkeypatch, "zalando-datasets/fashion_mnist", {"train": split, "test": split})
    main(["fashion_mnist"])
    data = load_data("fashion_mnist")
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2] and data.labels.tolist() == [0, 9, 4]


def test_cifar10_from_the_hub(root, online, monkeypatch):
    split = ([Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(4)], [1, 0, 0, 1])
    give_from_hub(monkeypatch, "uoft-cs/cifar10", {"train": split, "test": split}, "img", ["cat", "dog"])
    main(["cifar10"])
    data = load_data("cifar10")
    assert data.classes == ["cat", "dog"] and data.images[:, 0, 0, 0].tolist() == [1, 2, 0, 3]


def test_a_new_data_set_is_one_row(root, online, monkeypatch, capsys):
    row = image_data.DataSet("Flowers", folders=("flowers",), image_size=16, hub="someone/flowers")
    monkeypatch.setitem(image_data.DATASETS, "flowers", row)
    split = ([Image.new("RGB", (20, 16), (i, 0, 0)) for i in range(20)], [0, 1] * 10)
    give_from_hub(monkeypatch, "someone/flowers", {"train": split}, classes=["rose", "tulip"])
    main(["flowers"])
    assert "train 20 images (rose 10, tulip 10)" in capsys.readouterr().out
    assert load_data("flowers").images.shape == (18, 3, 16, 16) and load_data("flowers").classes == ["rose", "tulip"]


def fail(name, cache_dir):
    Path(cache_dir).mkdir()
    (Path(cache_dir) / "half").write_text("half a download")
    raise ConnectionError("the hub is down\nand more")


def test_torchvision_where_the_hub_fails(root, online, server, monkeypatch, idx_folder, tmp_path, capsys):
    monkeypatch.setattr("datasets.load_dataset", fail)
    write_cifar_batches(tmp_path / "cifar-10-batches-py", monkeypatch)
    with tarfile.open(server.folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    for file in idx_folder.iterdir():
        (server.folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in server.folder.iterdir()}
    archive = "cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", server.url + archive)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5.pop(archive))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [server.url])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", list(md5.items()))
    for name, count in (("cifar10", 50), ("fashion_mnist", 64)):
        main([name])
        assert len(load_data(name)) == count and not list(root.rglob("half"))
        assert "fetching from torchvision" in capsys.readouterr().err


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, words",
    [
        ("fashion_mnist", ("hub: no network", "torchvision: no network", "datasets/zalando-datasets/fashion_mnist")),
        (
            "cifar10",
            ("hub: no network", "torchvision: no network", "kaggle: no Kaggle token", "cifar10-pngs-in-folders"),
        ),
        ("checkpoints", ("Google Drive: no network", "folders/1beUSI-edO98i6J9pDR67BKGCfkzUL5DX")),
    ],
)
def test_without_a_network_every_source_is_named(root, refused, name, words):
    line = refused(main, name)
    for part in (*words, f"download_datasets.py {name} --from"):
        assert part in line
    assert nothing_left(root)


def test_the_network_is_looked_for_quickly(server, monkeypatch):
    monkeypatch.undo()  # the real require_network
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    download_datasets.require_network(server.url)
    download_datasets.require_network(server.url + "not/there")  # an error page is an answer
    server.web.shutdown()
    server.web.server_close()
    for url in (server.url, "not a url"):
        with pytest.raises(UserError, match="no network"):
            download_datasets.require_network(url)


def visit(server):
    def download_folder(**_):
        requests.get(server.url)

    return types.SimpleNamespace(download_folder=download_folder)


@pytest.mark.parametrize("name, source", [("cifar10", "torchvision"), ("cifar10", "hub"), ("checkpoints", "drive")])
def test_a_certificate_that_is_not_trusted(root, untrusted, monkeypatch, refused, name, source):
    """Reported as what it is, whichever client the library uses: urllib, httpx or requests."""
    address = untrusted.url if source == "hub" else "http://127.0.0.1:1"
    monkeypatch.undo()
    for module in (image_data, utils):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", untrusted.url if source == "torchvision" else address)
    monkeypatch.setitem(sys.modules, "gdown", visit(untrusted))
    line = refused(main, name)
    print(line)
    assert "certificate is not trusted (self" in line and "SSL_CERT_FILE" in line and nothing_left(root)


# --- Kaggle -------------------------------------------------------------------------------------------------------


def put_secret(path, content=SECRET, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


@pytest.fixture
def kaggle_site(server, monkeypatch, cifar_zip, online):
    """The real kaggle package, freshly imported, and a local server that answers its calls."""
    log = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        log.append((self.path.rsplit("/", 1)[-1], body, self.headers.get("Authorization", "")))
        content, kind = cifar_zip.read_bytes(), "application/zip"
        if self.path.endswith("IntrospectToken"):
            content, kind = json.dumps({"active": True, "username": "student"}).encode(), "application/json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    monkeypatch.setattr(server.web.RequestHandlerClass.func, "do_POST", do_POST, raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] in ("kaggle", "kagglesdk")]:
        monkeypatch.delitem(sys.modules, name)
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url.rstrip("/"))
    yield log
    for name in [name for name in sys.modules if name.split(".")[0] in ("kaggle", "kagglesdk")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "place, authorization",
    [("kaggle.json", "Basic "), ("access_token", f"Bearer {SECRET}"), (None, f"Bearer {SECRET}")],
)
def test_kaggle(root, tmp_path, kaggle_site, monkeypatch, capsys, place, authorization):
    if place is None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    else:
        content = json.dumps({"username": "student", "key": SECRET}) if place == "kaggle.json" else SECRET
        put_secret(tmp_path / "home/.kaggle" / place, content)
    main(["cifar10-64"])
    call, body, sent = kaggle_site[-1]
    assert call == "DownloadDataset" and sent.startswith(authorization)
    slug = "cifar10-64x64-resized-via-cai-super-resolution"
    assert (body["ownerSlug"], body["datasetSlug"]) == ("joaopauloschuler", slug)
    captured = capsys.readouterr()
    assert "test 4 images (cat 2, dog 2)" in captured.out and os.listdir(root) == ["cifar10-64"]
    assert SECRET not in "".join(captured)


def test_kaggle_behind_a_certificate_of_ones_own(root, untrusted, kaggle_site, monkeypatch, refused):
    """Only the client that the package uses decides whether it is trusted."""
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    line = refused(main, "cifar10-64")
    assert "certificate is not trusted (self" in line and SECRET not in line and nothing_left(root)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(untrusted.certificate))
    main(["cifar10-64"])
    assert os.listdir(root) == ["cifar10-64"]


class HTTPError(OSError):
    def __init__(self, status):
        super().__init__(f"{status} for {SECRET}")
        self.response = types.SimpleNamespace(status_code=status)


def give_half(name, path, **_):
    Path(path).mkdir()
    zip_bytes = _archives()[0]
    (Path(path) / "landscape-pictures.zip").write_bytes(zip_bytes[: len(zip_bytes) // 2])


def raising(error):
    def call(*_, **__):
        print(SECRET)  # what a package might print
        raise error

    return call


@pytest.mark.parametrize(
    "sign_in, download, words",
    [
        (raising(SystemExit(1)), None, "no Kaggle token that works: (1)"),
        (raising(OSError("Could not find kaggle.json")), None, "no Kaggle token that works: (1)"),
        (raising(requests.ConnectionError(SECRET)), None, "ConnectionError"),
        (None, raising(HTTPError(401)), "HTTP status 401"),
        (None, raising(ConnectionError(f"reset while sending {SECRET}")), "ConnectionError"),
        (None, raising(ValueError(SECRET)), "ValueError"),
        (None, raising(SystemExit(1)), "SystemExit"),
        (None, give_half, "ends early"),
    ],
)
def test_kaggle_failing(root, monkeypatch, online, capsys, refused, sign_in, download, words):
    api = types.SimpleNamespace(authenticate=sign_in or (lambda: None), dataset_download_files=download)
    monkeypatch.setitem(sys.modules, "kaggle", types.SimpleNamespace(api=api))
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    line = refused(main, "landscapes")
    assert words in line and SECRET not in line and nothing_left(root)
    assert "https://www.kaggle.com/datasets/arnaud58/landscape-pictures" in line and "--from" in line


def test_no_credentials_name_the_three_steps(root, online, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle", None)  # is not even imported
    line = refused(main, "cifar10-64")
    for words in ("(1)", "(2)", "(3)", "kaggle.com/settings", "access_token", "chmod 600", "--from PATH"):
        assert words in line


@pytest.mark.parametrize(
    "content", ["", "\n", f'{{"username": "a", "key": "{SECRET}"', f'["{SECRET}"]', '{"username": "a"}']
)
@pytest.mark.parametrize("file", ["kaggle.json", "access_token"])
def test_credentials_of_no_use_name_the_three_steps(root, tmp_path, kaggle_site, refused, file, content): ...


@pytest.mark.parametrize(
    "variable, file",
    [
        ("HOME", ".kaggle/access_token"),
        ("HOME", ".kaggle/kaggle.json"),
        ("HOME", ".config/kaggle/kaggle.json"),
        ("KAGGLE_CONFIG_DIR", "kaggle.json"),
        ("XDG_CONFIG_HOME", "kaggle/kaggle.json"),
    ],
)
@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_token_that_others_can_read_is_refused(root, tmp_path, monkeypatch, refused, variable, file, mode):
    monkeypatch.setitem(sys.modules, "kaggle", None)
    monkeypatch.setenv(variable, str(tmp_path / "own"))
    put_secret(tmp_path / "own" / file, mode=mode)
    line = refused(main, "landscapes")
    assert f"chmod 600 {tmp_path / 'own' / file}" in line and SECRET not in line and nothing_left(root)


# --- the course's checkpoints -------------------------------------------------------------------------------------


def write_checkpoints(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in download_datasets.COURSE_CHECKPOINTS:
        torch.save(UNet(channels=1, width=4).state_dict(), folder / name)


def test_checkpoints_from_google_drive(root, online, monkeypatch, capsys):
    def download_folder(url, output, use_cookies):
        assert url.endswith("/1beUSI-edO98i6J9pDR67BKGCfkzUL5DX")
        write_checkpoints(Path(output) / "checkpoints")

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download_folder=download_folder))
    (root / "checkpoints").mkdir()
    (root / "checkpoints/ours.safetensors").write_text("stays")
    main(["checkpoints"])
    expected = ["ours.safetensors", *download_datasets.COURSE_CHECKPOINTS]
    assert sorted(os.listdir(root / "checkpoints")) == sorted(expected) and os.listdir(root) == ["checkpoints"]
    monkeypatch.setitem(sys.modules, "gdown", None)
    capsys.readouterr()
    main(["checkpoints"])
    assert "has all" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, words", [(RuntimeError("too many accesses\nsee the FAQ"), "too many"), (None, "found none")]
)
def test_google_drive_failing(root, monkeypatch, online, refused, error, words):
    def download_folder(**_):
        if error:
            raise error

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download_folder=download_folder))
    line = refused(main, "checkpoints")
    assert words in line and "folders/1beUSI-edO98i6J9pDR67BKGCfkzUL5DX" in line and nothing_left(root)


def test_checkpoints_by_hand(root, tmp_path, capsys):
    write_checkpoints(tmp_path / "hand")
    main(["checkpoints", "--from", str(tmp_path / "hand/conditional_ckpt.pt")])
    assert os.listdir(root / "checkpoints") == ["conditional_ckpt.pt"]
    assert "conditional_ema_ckpt.pt is still missing" in capsys.readouterr().err
    main(["checkpoints", "--from", str(zipped(tmp_path / "hand", tmp_path / "x.zip"))])
    assert sorted(os.listdir(root / "checkpoints")) == sorted(download_datasets.COURSE_CHECKPOINTS)
    assert (tmp_path / "hand/conditional_ckpt.pt").exists()


def test_bad_checkpoints_are_refused_and_not_executed(root, tmp_path, refused):
    (tmp_path / "hand").mkdir()
    path = tmp_path / "hand/conditional_ckpt.pt"
    stream = io.BytesIO()
    torch.save(Malicious(tmp_path / "pwned"), stream)
    for content, words in (
        (b"", "empty"),
        (b"no checkpoint", "damaged"),
        (b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded", "a web page"),
        (pickle.dumps(Malicious(tmp_path / "pwned"), protocol=2), "more than weights"),
        (stream.getvalue(), "not weights alone"),
    ):
        path.write_bytes(content)
        for source in (path, path.parent):
            line = refused(main, "checkpoints", "--from", source)
            assert words in line and path.name in line and nothing_left(root)
    path.unlink()
    assert "found none of" in refused(main, "checkpoints", "--from", tmp_path / "hand")
    assert not (tmp_path / "pwned").exists() and nothing_left(root)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_line(root, refused, capsys):
    for argv in (["imagenet"], [], ["cifar10", "--nothing"]):
        assert "see --help" in refused(main, *argv)
    program = [sys.executable, REPOSITORY / "download_datasets.py", "cifar10-64", "--from", "nowhere"]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "download_datasets.py: error: --from nowhere: there is no such file or folder\n"
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "--from" in capsys.readouterr().out
