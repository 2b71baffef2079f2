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
import torch
import torchvision
from conftest import Malicious, class_folder, move_fashion_mnist, mutations, write_cifar_batches
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import download_datasets
import image_data
import utils
from image_data import load_data
from utils import UserError

main = download_datasets.main
REPOSITORY = Path(download_datasets.__file__).parent


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


def test_a_link_to_a_larger_disk_is_filled(root, cifar_zip, tmp_path):
    (tmp_path / "large").mkdir()
    (root / "cifar10").symlink_to(tmp_path / "large")
    main(["cifar10", "--from", str(cifar_zip)])
    assert (root / "cifar10").is_symlink() and (tmp_path / "large/train/cat").is_dir()


# --- archives and folders -----------------------------------------------------------------------------------------


def test_an_archive_ends_in_place_checked_and_counted(root, cifar_zip, capsys):
    main(["cifar10", "--from", str(cifar_zip)])
    out = capsys.readouterr().out
    assert "train 6 images (cat 3, dog 3); test 4 images (cat 2, dog 2)" in out and str(root / "cifar10") in out
    assert os.listdir(root) == ["cifar10"] and not list(root.rglob("*DS_Store"))
    data = load_data("cifar10", image_size=8)
    assert data.classes == ["cat", "dog"] and len(data) == 6 and len(load_data("cifar10", "test", 8)) == 4
    assert torchvision.datasets.ImageFolder(str(root / "cifar10/train")).classes == ["cat", "dog"]


def test_a_second_call_sees_that_it_is_all_there(root, cifar_zip, capsys, refused):
    main(["cifar10", "--from", str(cifar_zip)])
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for more in ([], ["--from", str(cifar_zip)]):
        main(["cifar10", *more])
        assert "all there: train 6 images" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    next(root.rglob("*.png")).unlink()
    assert "remove it and run this again" in refused(main, "cifar10")


def test_a_folder_put_there_by_hand_is_checked_once(root, capsys, monkeypatch, refused):
    class_folder(root / "landscape_img_folder", {"sea": 3}, size=(9, 9))
    (root / "landscape_img_folder/sea/note.txt").write_text("mine")
    main(["landscapes"])
    captured = capsys.readouterr()
    assert "all there" in captured.out and "left out 1 of 4 files" in captured.err and "note.txt" in captured.err
    assert (root / "landscape_img_folder/sea/note.txt").exists()  # other people's files stay
    monkeypatch.setattr(image_data, "decode_image", lambda *_: pytest.fail("checked again"))
    main(["landscapes"])
    (root / "landscape_img_folder/empty").mkdir()
    assert "empty" in refused(main, "landscapes")


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
    assert sorted(p.name for p in (root / "landscape_img_folder").iterdir() if p.is_dir()) == ["forest", "sea"]
    assert (tmp_path / "kinds/sea/000.png").exists()  # a copy: the source is left as it was


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar_archives(root, tmp_path, cifar_zip, mode):
    with tarfile.open(tmp_path / "x.tar", mode) as archive:
        archive.add(tmp_path / "source", ".")
    main(["cifar10-64", "--from", str(tmp_path / "x.tar")])
    assert len(list((root / "cifar10-64").rglob("*.png"))) == 10


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


# --- archives that are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "..\\evil.png", "C:\\evil.png", "C:evil.png", "\\evil.png"],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_outside_of_the_target_are_refused(root, cifar_zip, tmp_path, name, kind, refused):
    before = sorted(tmp_path.rglob("*"))
    if kind == "zip":
        with zipfile.ZipFile(cifar_zip, "a") as archive:
            archive.writestr(zipfile.ZipInfo(name), b"evil")
        path = cifar_zip
    else:
        path = tmp_path / "x.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "source", "source")
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
    line = refused(main, "cifar10", "--from", path)
    assert "refused" in line and "outside" in line and path.name in line
    assert nothing_left(root) and [p for p in sorted(tmp_path.rglob("*")) if p != path] == [
        p for p in before if p != path
    ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tar_archives_are_refused(root, tmp_path, kind, refused):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cat/link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert "link or a device" in refused(main, "landscapes", "--from", tmp_path / "x.tar.gz")
    assert nothing_left(root)


def test_links_in_zip_archives_are_refused(root, cifar_zip, refused):
    with zipfile.ZipFile(cifar_zip, "a") as archive:
        info = zipfile.ZipInfo("cifar10/train/cat/link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert "link or a device" in refused(main, "cifar10", "--from", cifar_zip)
    assert nothing_left(root)


def test_archives_that_are_cut_or_changed_are_refused(root, cifar_zip, tmp_path, refused):
    content = cifar_zip.read_bytes()
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "source", "source")
    tar = (tmp_path / "x.tar.gz").read_bytes()
    plain = gzip.decompress(tar)
    end = tarfile.open(fileobj=io.BytesIO(plain)).getmembers()[-1].offset  # the last member and the end mark are gone
    middle = len(content) // 3
    for damaged in (
        b"",
        b"no archive",
        content[:-100],
        content[: len(content) // 2],
        tar[: len(tar) // 2],
        tar[:-9],
        plain[:end],
        content[:middle] + b"\0\xff\0\xff" * 5 + content[middle + 20 :],
    ):
        (tmp_path / "bad").write_bytes(damaged)
        assert str(tmp_path / "bad") in refused(main, "cifar10", "--from", tmp_path / "bad")
        assert nothing_left(root)


def test_archives_with_a_password_are_refused(root, cifar_zip, refused):
    content = bytearray(cifar_zip.read_bytes())
    for signature, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.find(signature) + flags] |= 1
    cifar_zip.write_bytes(content)
    assert "password" in refused(main, "cifar10", "--from", cifar_zip)
    assert nothing_left(root)


def test_two_members_of_one_name_are_refused(root, cifar_zip, refused):
    with zipfile.ZipFile(cifar_zip, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("cifar10/train/cat/000.png", b"another")
    assert "two members called 000.png" in refused(main, "cifar10", "--from", cifar_zip)
    assert nothing_left(root)


def _archives():
    """The same zip and tar.gz in every run: no clock in them."""
    text = b"text " * 30
    zip_bytes, tar_bytes = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zip_bytes, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("class/a.txt"), text)
    with (
        gzip.GzipFile(fileobj=tar_bytes, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        info = tarfile.TarInfo("class/a.txt")
        info.size = len(text)
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


# --- images that are refused or left out --------------------------------------------------------------------------


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


def test_empty_classes_are_refused(root, tmp_path, cifar_zip, refused):
    for file in (tmp_path / "source/cifar10/test/dog").iterdir():
        file.write_text("no image")
    line = refused(main, "cifar10", "--from", zipped(tmp_path / "source", tmp_path / "x.zip"))
    assert "test/dog is empty" in line and "-download-" not in line
    assert nothing_left(root)


def test_wrong_layouts_are_refused(root, tmp_path, cifar_zip, refused):
    class_folder(tmp_path, {"flat": 2})
    assert "no class folders" in refused(main, "cifar10", "--from", tmp_path / "flat")
    (tmp_path / "source/cifar10/test/dog").rename(tmp_path / "source/cifar10/test/wolf")
    assert "different classes" in refused(main, "cifar10", "--from", tmp_path / "source")
    (tmp_path / "empty").mkdir()
    assert "no image" in refused(main, "landscapes", "--from", tmp_path / "empty")
    assert "no such file" in refused(main, "landscapes", "--from", tmp_path / "not there")
    assert nothing_left(root)


# --- failures while writing ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(root, cifar_zip, monkeypatch, refused):
    copy, count = shutil.copyfileobj, iter(range(100))

    def full(source, target):
        if next(count) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "no space left on the disk" in refused(main, "cifar10", "--from", cifar_zip)
    assert nothing_left(root)


def test_too_large_archives_are_refused_beforehand(root, cifar_zip, monkeypatch, refused):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    assert "GB left" in refused(main, "cifar10", "--from", cifar_zip)
    assert nothing_left(root)


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
    program = (
        f"import os, signal, shutil, sys; sys.path.insert(0, {str(REPOSITORY)!r}); import image_data, utils, download_datasets\n"
        f"from pathlib import Path; utils.ROOT = image_data.ROOT = Path({str(root)!r})\n"
        "copy, n = shutil.copyfileobj, iter(range(9))\n"
        "shutil.copyfileobj = lambda a, b: copy(a, b) if next(n) < 3 else os.kill(os.getpid(), signal.SIGKILL)\n"
        f"download_datasets.main(['cifar10', '--from', {str(cifar_zip)!r}])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode < 0
    assert not (root / "cifar10").exists()
    main(["cifar10", "--from", str(cifar_zip)])
    assert len(load_data("cifar10")) == 6


# --- Fashion-MNIST ------------------------------------------------------------------------------------------------


def test_fashion_mnist_from_a_folder_and_an_archive(root, tmp_path, idx_folder, capsys):
    main(["fashion_mnist", "--from", str(idx_folder)])
    assert "train 64 images, test 16 images" in capsys.readouterr().out
    assert len(load_data("fashion_mnist")) == 64 and sorted(os.listdir(root / "data")) == ["fashion_mnist"]
    main(["fashion_mnist"])
    assert "all there" in capsys.readouterr().out
    shutil.rmtree(root / "data")
    main(["fashion_mnist", "--from", str(zipped(idx_folder, tmp_path / "x.zip", "some/where/"))])
    assert len(load_data("fashion_mnist", "test")) == 16


def test_fashion_mnist_from_debian_is_used_where_it_is(root, idx_folder, monkeypatch, capsys):
    move_fashion_mnist(monkeypatch, idx_folder)
    main(["fashion_mnist"])
    assert "nothing to fetch: train 64 images" in capsys.readouterr().out and nothing_left(root)


def test_bad_fashion_mnist_is_refused(root, tmp_path, idx_folder, refused):
    shutil.copytree(idx_folder, tmp_path / "copy")
    path = tmp_path / "copy/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in refused(main, "fashion_mnist", "--from", tmp_path / "copy")
    path.unlink()
    assert path.name in refused(main, "fashion_mnist", "--from", tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    assert "neither the IDX files" in refused(main, "fashion_mnist", "--from", tmp_path / "empty")
    assert nothing_left(root)


def hub(monkeypatch, name, splits):
    """Let `datasets.load_dataset(name)` give these splits."""
    import datasets

    def load_dataset(asked, cache_dir):
        assert asked == name and Path(cache_dir).parent.name.startswith(".")
        return {split: datasets.Dataset.from_dict(rows) for split, rows in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_fashion_mnist_from_the_hub(root, online, monkeypatch):
    rows = {"image": [Image.new("L", (28, 28), i) for i in range(3)], "label": [0, 9, 4]}
    hub(monkeypatch, "zalando-datasets/fashion_mnist", {"train": rows, "test": rows})
    main(["fashion_mnist"])
    data = load_data("fashion_mnist")
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2] and data.labels.tolist() == [0, 9, 4]


def test_fashion_mnist_from_torchvision_where_the_hub_fails(root, online, server, monkeypatch, idx_folder, capfd):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("the hub is down\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    resources = []
    for file in idx_folder.iterdir():
        (server.folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        md5 = hashlib.md5((server.folder / f"{file.name}.gz").read_bytes()).hexdigest()
        resources.append((f"{file.name}.gz", md5))
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [server.url])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
    main(["fashion_mnist"])
    assert len(load_data("fashion_mnist")) == 64


def test_without_any_source_the_sample_stands_in(root, refused):
    line = refused(main, "fashion_mnist")
    assert "sample" in line and "no network" in line and nothing_left(root)


def test_the_sample_is_cut_from_the_full_data(root, monkeypatch, refused):
    images = torch.randint(0, 256, (10_000, 1, 28, 28), dtype=torch.uint8)
    full = image_data.ImageData(images, torch.arange(10_000) % 10, [], "fashion_mnist", False, 28)
    with monkeypatch.context() as patch:
        patch.setattr(image_data, "load_data", lambda name, split: full)
        download_datasets.make_sample(root / "data/fashion_mnist_sample", train=12, test=5)
    train, test = load_data("fashion_mnist"), load_data("fashion_mnist", "test")
    assert torch.equal(train.images, images[:12]) and train.labels.tolist() == [*range(10), 0, 1] and len(test) == 5
    assert "not there" in refused(main, "fashion_mnist", "--make-sample")  # not from itself


# --- CIFAR-10 from the network ------------------------------------------------------------------------------------


def test_cifar10_from_the_hub(root, online, monkeypatch):
    import datasets

    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"img": [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(4)], "label": [1, 0, 0, 1]}
    splits = {split: datasets.Dataset.from_dict(rows, features=features) for split in ("train", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, cache_dir: splits)
    main(["cifar10"])
    data = load_data("cifar10")
    assert data.classes == ["cat", "dog"] and data.images[:, 0, 0, 0].tolist() == [1, 2, 0, 3]


def test_cifar10_from_torchvision_where_the_hub_fails(root, online, server, tmp_path, monkeypatch, capsys):
    import datasets

    def fail(name, cache_dir):
        Path(cache_dir).mkdir()
        (Path(cache_dir) / "half").write_text("half a download")
        raise ConnectionError("the hub is down")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    write_cifar_batches(tmp_path / "cifar-10-batches-py", monkeypatch)
    with tarfile.open(server.folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    md5 = hashlib.md5((server.folder / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", server.url + "cifar-10-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5)
    main(["cifar10"])
    assert len(load_data("cifar10")) == 50 and not list(root.rglob("half"))
    assert "fetching from torchvision" in capsys.readouterr().err


def test_without_a_network_every_source_is_named(root, refused):
    line = refused(main, "cifar10")
    for words in ("hub: no network", "torchvision: no network", "Kaggle: no Kaggle token", "--from"):
        assert words in line
    assert nothing_left(root)


def test_the_network_is_looked_for_quickly(server, monkeypatch):
    monkeypatch.undo()  # the real require_network
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    download_datasets.require_network(server.url)
    download_datasets.require_network(server.url + "not/there")  # an error page is an answer
    server.web.shutdown()
    server.web.server_close()
    with pytest.raises(UserError, match="no network"):
        download_datasets.require_network(server.url)
    with pytest.raises(UserError, match="no network"):
        download_datasets.require_network("not a url")


# --- Kaggle -------------------------------------------------------------------------------------------------------

SECRET = "KGAT_0123456789abcdef"


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
        if self.path.endswith("IntrospectToken"):
            content, kind = json.dumps({"active": True, "username": "student"}).encode(), "application/json"
        else:
            content, kind = cifar_zip.read_bytes(), "application/zip"
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


def test_kaggle_with_an_old_token(root, tmp_path, kaggle_site, capsys):
    put_secret(tmp_path / "home/.kaggle/kaggle.json", json.dumps({"username": "student", "key": SECRET}))
    main(["cifar10-64"])
    call, body, authorization = kaggle_site[-1]
    assert call == "DownloadDataset" and authorization.startswith("Basic ")
    assert body["datasetSlug"] == "cifar10-64x64-resized-via-cai-super-resolution"
    assert "test 4 images (cat 2, dog 2)" in capsys.readouterr().out and os.listdir(root) == ["cifar10-64"]


@pytest.mark.parametrize("place", ["file", "environment"])
def test_kaggle_with_a_new_token(root, tmp_path, kaggle_site, monkeypatch, capsys, place):
    if place == "file":
        put_secret(tmp_path / "home/.kaggle/access_token")
    else:
        monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    main(["landscapes"])
    call, body, authorization = kaggle_site[-1]
    assert call == "DownloadDataset" and authorization == f"Bearer {SECRET}"
    assert (body["ownerSlug"], body["datasetSlug"]) == ("arnaud58", "landscape-pictures")
    assert (root / "landscape_img_folder").is_dir()
    assert SECRET not in "".join(capsys.readouterr())


def fake_kaggle(monkeypatch, download):
    api = types.SimpleNamespace(authenticate=lambda: None, dataset_download_files=download)
    monkeypatch.setitem(sys.modules, "kaggle", types.SimpleNamespace(api=api))
    monkeypatch.setenv("KAGGLE_USERNAME", "student")
    monkeypatch.setenv("KAGGLE_KEY", SECRET)


class HTTPError(OSError):
    def __init__(self, status):
        super().__init__(f"{status} for {SECRET}")
        self.response = types.SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    "error, words",
    [
        (HTTPError(401), "HTTP status 401 (is the token still valid?)"),
        (HTTPError(404), "HTTP status 404"),
        (ConnectionError(f"reset while sending {SECRET}"), "ConnectionError"),
        (ValueError(SECRET), "ValueError"),
        (SystemExit(1), "credentials were not accepted"),
    ],
)
def test_kaggle_failing(root, monkeypatch, online, capsys, refused, error, words):
    def download(*_, **__):
        print(SECRET)  # what a package might print
        raise error

    fake_kaggle(monkeypatch, download)
    line = refused(main, "landscapes")
    assert words in line and SECRET not in line and nothing_left(root)
    assert "https://www.kaggle.com/datasets/arnaud58/landscape-pictures" in line and "--from" in line


def test_kaggle_giving_half_an_archive(root, monkeypatch, online, cifar_zip, refused):
    def download(name, path, **_):
        Path(path).mkdir()
        (Path(path) / "x.zip").write_bytes(cifar_zip.read_bytes()[:500])

    fake_kaggle(monkeypatch, download)
    assert "ends early" in refused(main, "landscapes")
    fake_kaggle(monkeypatch, lambda *_, **__: None)
    assert "no archive" in refused(main, "landscapes")
    assert nothing_left(root)


@pytest.mark.parametrize(
    "file, content, mode, words",
    [
        ("kaggle.json", json.dumps({"username": "a", "key": SECRET}), 0o644, "chmod 600"),
        ("access_token", SECRET, 0o640, "chmod 600"),
        ("kaggle.json", "", 0o600, "is empty"),
        ("access_token", "\n", 0o600, "is empty"),
        ("kaggle.json", f'{{"username": "a", "key": "{SECRET}"', 0o600, "as JSON"),
        ("kaggle.json", json.dumps([SECRET]), 0o600, "as JSON"),
        ("kaggle.json", json.dumps({"username": SECRET}), 0o600, "as JSON"),
        ("kaggle.json", json.dumps({"username": "", "key": SECRET}), 0o600, "as JSON"),
    ],
)
def test_bad_credentials(root, tmp_path, online, refused, file, content, mode, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle", None)  # must not be imported
    put_secret(tmp_path / "home/.kaggle" / file, content, mode)
    line = refused(main, "landscapes")
    assert words in line and file in line and SECRET not in line and nothing_left(root)


def test_no_credentials_name_the_three_steps(root, online, refused, tmp_path):
    line = refused(main, "cifar10-64")
    for words in ("(1)", "(2)", "(3)", "kaggle.com/settings", "access_token", "chmod 600", "--from ARCHIVE"):
        assert words in line


@pytest.mark.parametrize("variable, folder", [("KAGGLE_CONFIG_DIR", "own"), ("XDG_CONFIG_HOME", "own/kaggle")])
def test_credentials_in_other_places(tmp_path, monkeypatch, variable, folder):
    monkeypatch.setenv(variable, str(tmp_path / "own"))
    put_secret(tmp_path / folder / "kaggle.json", json.dumps({"username": "a", "key": SECRET}))
    download_datasets.check_kaggle_credentials()


# --- the course's checkpoints -------------------------------------------------------------------------------------


def write_checkpoints(folder, names=download_datasets.COURSE_CHECKPOINTS):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        torch.save({"weight": torch.zeros(2)}, folder / name)


def test_checkpoints_from_google_drive(root, online, monkeypatch, capsys):
    def download_folder(id, output, use_cookies):
        assert id == "1beUSI-edO98i6J9pDR67BKGCfkzUL5DX"
        write_checkpoints(Path(output) / "checkpoints")
        return [output]

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


@pytest.mark.parametrize("outcome", ["raises", "gives nothing", "no network"])
def test_google_drive_failing(root, monkeypatch, refused, outcome):
    def download_folder(**_):
        if outcome == "raises":
            raise RuntimeError("too many accesses\ncheck the FAQ")

    if outcome != "no network":
        monkeypatch.setattr(download_datasets, "require_network", lambda url: None)
    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download_folder=download_folder))
    line = refused(main, "checkpoints")
    assert "1beUSI-edO98i6J9pDR67BKGCfkzUL5DX" in line and "--from" in line
    assert nothing_left(root)


def test_checkpoints_by_hand(root, tmp_path, capsys, refused):
    write_checkpoints(tmp_path / "hand")
    main(["checkpoints", "--from", str(tmp_path / "hand/conditional_ckpt.pt")])
    captured = capsys.readouterr()
    assert os.listdir(root / "checkpoints") == ["conditional_ckpt.pt"]
    assert "conditional_ema_ckpt.pt is still missing" in captured.err
    main(["checkpoints", "--from", str(zipped(tmp_path / "hand", tmp_path / "x.zip"))])
    assert sorted(os.listdir(root / "checkpoints")) == sorted(download_datasets.COURSE_CHECKPOINTS)
    assert (tmp_path / "hand/conditional_ckpt.pt").exists()
    (root / "checkpoints/conditional_ckpt.pt").write_bytes(b"half")
    assert "conditional_ckpt.pt" in refused(main, "checkpoints")


def test_bad_checkpoints_are_refused_and_not_executed(root, tmp_path, refused):
    (tmp_path / "hand").mkdir()
    path = tmp_path / "hand/conditional_ckpt.pt"
    for content in (b"", b"no checkpoint", pickle.dumps(Malicious(tmp_path / "pwned"), protocol=2)):
        path.write_bytes(content)
        assert "not a PyTorch checkpoint" in refused(main, "checkpoints", "--from", tmp_path / "hand")
    torch.save(Malicious(tmp_path / "pwned"), path)
    assert "not a PyTorch checkpoint" in refused(main, "checkpoints", "--from", path)
    torch.save([1, 2], path)
    assert "dictionary of tensors" in refused(main, "checkpoints", "--from", path)
    path.unlink()
    assert "found none of" in refused(main, "checkpoints", "--from", tmp_path / "hand")
    assert not (tmp_path / "pwned").exists() and nothing_left(root)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_line(root, refused):
    for argv in (["imagenet"], [], ["cifar10", "--make-sample"]):
        assert "see --help" in refused(main, *argv)
    result = subprocess.run(
        [sys.executable, REPOSITORY / "download_datasets.py", "cifar10-64", "--from", "nowhere"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "download_datasets.py: error: --from nowhere: there is no such file or folder\n"


def test_help_and_import_need_neither_kaggle_nor_gdown(capsys):
    source = (REPOSITORY / "download_datasets.py").read_text()
    assert not any(
        line.startswith(("import kaggle", "import gdown", "import datasets")) for line in source.splitlines()
    )
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "--from" in capsys.readouterr().out
