"""download_datasets.py against local stand-ins: archives good and bad, the hub, mirrors, Kaggle and Google Drive."""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import requests
import torch
import torchvision
from conftest import Malicious, class_folder, move_fashion_mnist, write_cifar_batches
from PIL import Image

import download_datasets
import image_data
import utils
from image_data import load_data
from modules import UNet
from utils import UserError

main = download_datasets.main
SECRET = "KGAT_0123456789abcdef"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder that the scripts lie in, empty; no credentials; no network unless a test provides one."""
    root = tmp_path / "project"
    root.mkdir()
    for module in (image_data, utils):
        monkeypatch.setattr(module, "ROOT", root)
    move_fashion_mnist(monkeypatch, tmp_path / "no debian")
    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "XDG_CONFIG", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # nobody answers there
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # but for the stand-in servers
    return root


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(download_datasets, "require_network", lambda url: None)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)


@pytest.fixture
def server(tmp_path):
    """A local web server: its folder and its address."""
    (tmp_path / "www").mkdir()
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path / "www")) as web:
        web.handle_error = lambda *_: None  # clients that do not trust it hang up
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}/"
        yield SimpleNamespace(folder=tmp_path / "www", url=address, web=web, handler=handler)
        web.shutdown()


@pytest.fixture
def source(tmp_path):
    """A folder laid out as CIFAR-10's archives, wrapped in a folder, with macOS's litter."""
    for split, count in (("train", 3), ("test", 2)):
        class_folder(tmp_path / "source/cifar10" / split, {"cat": count, "dog": count}, size=(8, 8))
    (tmp_path / "source/__MACOSX").mkdir()
    (tmp_path / "source/__MACOSX/._cat").write_text("litter")
    (tmp_path / "source/cifar10/.DS_Store").write_text("litter")
    return tmp_path / "source"


def pack(folder, kind, more=(), change=lambda content: content, name=lambda name: name):
    """The folder as FOLDER.archive: "zip", or tar in tarfile's mode `kind`; with more members, (name, type) of each."""
    stream, files = io.BytesIO(), sorted(path for path in folder.rglob("*") if path.is_file())
    with zipfile.ZipFile(stream, "w") if kind == "zip" else tarfile.open(fileobj=stream, mode=kind) as archive:
        for file in files:
            member = name(str(file.relative_to(folder)))
            archive.writestr(member, file.read_bytes()) if kind == "zip" else archive.add(file, member)
        for member, its_type in more:
            if kind == "zip":
                archive.writestr(member, b"evil")
            else:
                info = tarfile.TarInfo(member)
                info.type, info.linkname = its_type or tarfile.REGTYPE, "/etc/passwd" if its_type else ""
                archive.addfile(info)
    path = folder.with_suffix(".archive")
    path.write_bytes(change(stream.getvalue()))
    return path


def nothing_left(root):
    """Neither a data folder nor a temporary one."""
    return [path for path in root.rglob("*") if path.name != "data"] == []


# --- archives and folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip", "zip with backslashes", "w:gz", "w:xz", "old Python"])
def test_an_archive_ends_in_place_checked_and_counted(root, source, tmp_path, kind, capsys, monkeypatch):
    if kind == "old Python":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    if kind == "zip with backslashes":
        source = pack(source, "zip", name=lambda name: name.replace("/", "\\"))
    elif kind != "folder":
        source = pack(source, "w" if kind == "old Python" else kind)
    (tmp_path / "large disk").mkdir()
    (tmp_path / "large disk/.DS_Store").touch()  # as after a look at it
    (root / "cifar10").symlink_to(tmp_path / "large disk")
    main(["cifar10", "--from", str(source)])
    out = capsys.readouterr().out
    assert "train 6 images; test 4 images; classes: cat, dog" in out and str(tmp_path / "large disk") in out
    assert image_data.visible(os.listdir(tmp_path / "large disk")) == ["test", "train"]
    assert os.listdir(root) == ["cifar10"]
    data = load_data("cifar10", image_size=8)
    assert data.classes == ["cat", "dog"] and len(data) == 6 and len(load_data("cifar10", "test", 8)) == 4
    for more in ([], ["--from", str(source)]):  # once more
        main(["cifar10", *more])
        assert "all there: train 6 images" in capsys.readouterr().out


@pytest.mark.parametrize("wrapping", ["", "a/b/"])
def test_flat_landscapes_become_one_class(tmp_path, wrapping, capsys):
    class_folder(tmp_path, {"flat": 4}, size=(90, 80))
    main(["landscapes", "--from", str(pack(tmp_path / "flat", "zip", name=lambda name: wrapping + name))])
    assert "train 4 images; classes: landscapes" in capsys.readouterr().out
    assert load_data("landscapes").images.shape == (4, 3, 80, 80) and load_data("landscapes").classes == ["landscapes"]


def test_batches_of_cifar10_are_kept(tmp_path, monkeypatch):
    contents = write_cifar_batches(tmp_path / "cifar-10-batches-py", monkeypatch)
    main(["cifar10", "--from", str(pack(tmp_path / "cifar-10-batches-py", "w:gz"))])
    data = load_data("cifar10")
    assert len(data) == 50 and data.labels.tolist() == 5 * list(range(10))
    assert np.array_equal(data.images[0].flatten(), contents["data_batch_1"]["data"][0])  # the first airplane


def test_fashion_mnist(root, tmp_path, idx_folder, monkeypatch, refused, capsys):
    copy = shutil.copytree(idx_folder, tmp_path / "copy")
    for source in (copy, pack(copy, "zip", name="some/where/{}".format)):
        main(["fashion_mnist", "--from", str(source)])
        main(["fashion_mnist"])
        assert "all there: train 64 images; test 16 images" in capsys.readouterr().out
        assert len(load_data("fashion_mnist")) == 64 and os.listdir(root / "data") == ["fashion_mnist"]
        shutil.rmtree(root / "data")
    path = copy / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in refused(main, "fashion_mnist", "--from", copy) and nothing_left(root)
    move_fashion_mnist(monkeypatch, idx_folder)
    main(["fashion_mnist"])  # Debian's copy is used where it is
    assert f"{idx_folder} is all there: train 64 images" in capsys.readouterr().out and nothing_left(root)


# --- archives and images that are refused -------------------------------------------------------------------------


def ask_for_a_password(content):
    at = content.find(b"PK\1\2") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


OUTSIDE = ("../a.png", "a/../../a.png", "/tmp/a.png", "..\\a.png", "C:\\a.png", "C:a.png", "\\a.png")
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)


@pytest.mark.parametrize(
    "kind, more, change, words",
    [
        *[(kind, [(name, None)], bytes, "would land outside") for name in OUTSIDE for kind in ("zip", "w")],
        *[("w", [("link", link)], bytes, "link or a device") for link in LINKS],
        ("zip", [], ask_for_a_password, "password"),
        ("zip", [], lambda content: b"", "neither a folder nor a zip or tar archive"),
        ("zip", [], lambda content: b"no archive", "neither a folder nor a zip or tar archive"),
        ("zip", [], lambda content: b"\n<!DOCTYPE html><title>Sign in", "is it a web page"),
        ("zip", [], lambda content: content[: len(content) // 2], "ends early"),
        ("zip", [], lambda content: content[:400] + b"\0\xff\0\xff" * 5 + content[420:], "is damaged"),
        ("w:gz", [], lambda content: content[: len(content) // 2], "ends early"),
    ],
)
def test_bad_archives_are_refused(root, source, tmp_path, refused, kind, more, change, words):
    archive = pack(source, kind, more, change)
    before = sorted(tmp_path.rglob("*"))
    line = refused(main, "cifar10", "--from", archive)
    assert words in line and str(archive) in line and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name, folder, words",
    [
        ("cifar10", "flat", "use class folders"),
        ("cifar10", "wolf", "no image for the test split"),
        ("landscapes", "empty", "no image"),
        ("landscapes", "not there", "No such file"),
        ("fashion_mnist", "flat", "has no labels"),
    ],
)
def test_wrong_layouts_are_refused(root, tmp_path, source, refused, name, folder, words):
    class_folder(tmp_path, {"flat": 2})
    (tmp_path / "empty").mkdir()
    (shutil.copytree(source, tmp_path / "wolf") / "cifar10/test/dog").rename(tmp_path / "wolf/cifar10/test/wolf")
    line = refused(main, name, "--from", tmp_path / folder)
    assert words in line and "-download-" not in line and nothing_left(root)


@pytest.mark.parametrize("place", ["shutil.copyfileobj", "os.replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_ends_early_leaves_nothing(root, source, monkeypatch, place, error):
    archive = pack(source, "zip")
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(place, Mock(side_effect=error))
        main(["cifar10", "--from", str(archive)])
    assert nothing_left(root)
    main(["cifar10", "--from", str(archive)])
    assert len(load_data("cifar10")) == 6


def test_an_archive_larger_than_the_disk_is_refused(root, source, monkeypatch, refused):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert "GB left" in refused(main, "cifar10", "--from", pack(source, "zip")) and nothing_left(root)


# --- the hub, torchvision, and the network ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, hub, mode, column, classes",
    [
        ("fashion_mnist", "zalando-datasets/fashion_mnist", "L", "image", None),
        ("cifar10", "uoft-cs/cifar10", "RGB", "img", ["cat", "dog"]),
        ("flowers", "someone/flowers", "RGB", "image", ["rose", "tulip"]),
    ],
)
def test_from_the_hub_and_a_new_data_set_is_one_row(root, online, monkeypatch, name, hub, mode, column, classes):
    import datasets

    flowers = image_data.DataSet("Flowers", folders=("flowers",), image_size=28, hub="someone/flowers", flip=False)
    monkeypatch.setitem(image_data.DATASETS, "flowers", flowers)
    label = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
    rows = {column: [Image.new(mode, (28, 28), i) for i in range(4)], "label": [1, 0, 0, 1]}
    data = datasets.Dataset.from_dict(rows, datasets.Features({column: datasets.Image(), "label": label}))

    def load_dataset(asked, cache_dir):
        assert asked == hub and str(root) in cache_dir
        return {"train": data, "test": data}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    main([name])
    read = load_data(name, "test", image_size=28)
    greys = sorted(zip(read.images[:, 0, 0, 0].tolist(), read.labels.tolist()))
    assert greys == [(0, 1), (1, 0), (2, 0), (3, 1)] and read.classes[:2] == (classes or ["T-shirt/top", "Trouser"])
    assert load_data(name).flip == (name == "cifar10")  # as the row says


def test_torchvision_where_the_hub_fails(root, online, server, monkeypatch, idx_folder, capsys):
    def fail(name, cache_dir):
        os.makedirs(os.path.join(cache_dir, "half a download"))
        raise ConnectionError("the hub is down\nand more")

    monkeypatch.setattr("datasets.load_dataset", fail)
    for file in idx_folder.iterdir():
        (server.folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    md5 = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in server.folder.iterdir()]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [server.url])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", md5)
    main(["fashion_mnist"])
    assert len(load_data("fashion_mnist")) == 64 and not list(root.rglob("half*"))
    assert "fetching from torchvision" in capsys.readouterr().err


def test_without_a_network_every_source_is_named(root, server, refused):
    for name, words in {
        "fashion_mnist": ("hub: no network", "torchvision: no network", "datasets/zalando-datasets/fashion_mnist"),
        "cifar10": ("hub: no network", "torchvision: no network", "kaggle: no network", "cifar10-pngs-in-folders"),
        "checkpoints": ("Google Drive: no network", "folders/1beUSI-edO98i6J9pDR67BKGCfkzUL5DX"),
    }.items():
        line = refused(main, name)
        assert all(part in line for part in (*words, f"{name} --from PATH")) and nothing_left(root)
    for path in ("", "not/there"):  # an error page is an answer
        download_datasets.require_network(server.url + path)
    server.web.shutdown()
    server.web.server_close()
    for url in (server.url, "not a url"):
        with pytest.raises(UserError, match="no network"):
            download_datasets.require_network(url)


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
@pytest.mark.parametrize("source", ["torchvision", "hub"])
def test_a_certificate_that_is_not_trusted(root, server, tmp_path, monkeypatch, refused, source):
    """The server signed its own. Reported as what it is, whichever client the library uses: urllib or httpx."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = [tmp_path / "certificate.pem", tmp_path / "key.pem"]
    subprocess.run([*command.split(), "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    server.web.socket = context.wrap_socket(server.web.socket, server_side=True)
    url = server.url.replace("http", "https")
    sources = {name: "CIFAR10" if name == source else "" for name in ("torchvision", "hub", "kaggle")}
    row = dataclasses.replace(image_data.DATASETS["cifar10"], **sources)
    monkeypatch.setitem(image_data.DATASETS, "cifar10", row)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    line = refused(main, "cifar10")
    assert f"{source}: the server's certificate is not trusted (self" in line
    assert "SSL_CERT_FILE" in line and nothing_left(root)


# --- Kaggle -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kaggle_site(server, monkeypatch, source, online):
    """The real kaggle package, freshly imported, and a local server that answers its calls."""
    log, archive = [], pack(source, "zip").read_bytes()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        log.append((self.path.rsplit("/", 1)[-1], body, self.headers.get("Authorization", "")))
        answer = json.dumps({"active": True, "username": "student"}).encode()
        asked = self.path.endswith("IntrospectToken")
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if asked else "application/zip")
        self.send_header("Content-Length", str(len(answer if asked else archive)))
        self.end_headers()
        self.wfile.write(answer if asked else archive)

    server.handler.do_POST = do_POST
    for name in [name for name in sys.modules if name.split(".")[0] in ("kaggle", "kagglesdk")]:
        monkeypatch.delitem(sys.modules, name)
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url.rstrip("/"))
    return log


OLD_TOKEN = json.dumps({"username": "student", "key": SECRET})


@pytest.mark.parametrize(
    "file, content, authorization",
    [
        ("kaggle.json", OLD_TOKEN, "Basic "),
        ("access_token", SECRET, f"Bearer {SECRET}"),
        (None, SECRET, f"Bearer {SECRET}"),
        (None, "", None),
        ("kaggle.json", "", None),
        ("kaggle.json", json.dumps({"username": SECRET}), None),
    ],
)
def test_kaggle(root, tmp_path, kaggle_site, monkeypatch, capsys, refused, file, content, authorization):
    if file is None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", content)
    else:
        (tmp_path / "home/.kaggle").mkdir(parents=True)
        (tmp_path / "home/.kaggle" / file).write_text(content)
    if authorization is None:
        line = refused(main, "cifar10-64")
        words = ("no Kaggle token that works: (1)", "(2)", "(3)", "kaggle.com/settings", "chmod 600", "--from PATH")
        assert all(part in line for part in words) and SECRET not in line and nothing_left(root)
        return
    main(["cifar10-64"])
    call, body, sent = kaggle_site[-1]
    assert call == "DownloadDataset" and sent.startswith(authorization)
    slug = "cifar10-64x64-resized-via-cai-super-resolution"
    assert (body["ownerSlug"], body["datasetSlug"]) == ("joaopauloschuler", slug)
    captured = capsys.readouterr()
    assert "test 4 images; classes: cat, dog" in captured.out and os.listdir(root) == ["cifar10-64"]
    assert SECRET not in "".join(captured)


@pytest.mark.parametrize(
    "signs_in, outcome, words",
    [
        (False, SystemExit(1), "no Kaggle token that works: (1)"),
        (False, requests.ConnectionError(SECRET), "ConnectionError"),
        (True, requests.HTTPError(SECRET, response=SimpleNamespace(status_code=403)), "HTTP status 403"),
        (True, ValueError(SECRET), "ValueError"),
    ],
)
def test_kaggle_failing(root, monkeypatch, online, refused, signs_in, outcome, words):
    def call(*_, **__):
        print(SECRET)  # what a package might print
        raise outcome

    api = SimpleNamespace(authenticate=(lambda: None) if signs_in else call, dataset_download_files=call)
    monkeypatch.setitem(sys.modules, "kaggle", SimpleNamespace(api=api))
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    line = refused(main, "landscapes")
    assert words in line and SECRET not in line and nothing_left(root)
    assert "https://www.kaggle.com/datasets/arnaud58/landscape-pictures" in line and "--from" in line


# --- the course's checkpoints and the command ---------------------------------------------------------------------


def write_checkpoints(folder):
    os.makedirs(folder, exist_ok=True)
    for name in download_datasets.COURSE_CHECKPOINTS:
        torch.save(UNet(channels=1, width=4).state_dict(), os.path.join(folder, name))


def test_checkpoints_from_google_drive(root, online, monkeypatch, capsys, refused):
    def use(download_folder):
        monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download_folder=download_folder))

    for download, words in ((Mock(side_effect=RuntimeError("too many accesses")), "too many"), (Mock(), "found none")):
        use(download)
        line = refused(main, "checkpoints")
        assert words in line and "folders/1beUSI-edO98i6J9pDR67BKGCfkzUL5DX" in line and nothing_left(root)
    use(lambda url, output, use_cookies: write_checkpoints(output))
    (root / "checkpoints").mkdir()
    (root / "checkpoints/ours.safetensors").write_text("stays")
    main(["checkpoints"])
    expected = ["ours.safetensors", *download_datasets.COURSE_CHECKPOINTS]
    assert sorted(os.listdir(root / "checkpoints")) == sorted(expected) and os.listdir(root) == ["checkpoints"]
    main(["checkpoints"])
    assert "has all" in capsys.readouterr().out


def test_checkpoints_by_hand(root, tmp_path, capsys, refused):
    write_checkpoints(tmp_path / "hand")
    path = tmp_path / "bad/conditional_ckpt.pt"
    path.parent.mkdir()
    torch.save(Malicious(tmp_path / "pwned"), path)
    for source in (path, path.parent):
        line = refused(main, "checkpoints", "--from", source)
        assert "not weights alone" in line and path.name in line and nothing_left(root)
    assert not (tmp_path / "pwned").exists()
    main(["checkpoints", "--from", str(tmp_path / "hand/conditional_ckpt.pt")])
    assert os.listdir(root / "checkpoints") == ["conditional_ckpt.pt"]
    assert "conditional_ema_ckpt.pt is still missing" in capsys.readouterr().err
    assert "found none of" in refused(main, "checkpoints", "--from", path.parent)
    main(["checkpoints", "--from", str(pack(tmp_path / "hand", "zip"))])
    assert sorted(os.listdir(root / "checkpoints")) == sorted(download_datasets.COURSE_CHECKPOINTS)
