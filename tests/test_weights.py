"""Weight files: each kind of weights, what others wrote, and every way in which a file can be something else."""

import gzip
import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Malicious, tiny_config
from safetensors.torch import save_file
from test_training import assert_same

from modules import UNet, UNet_conditional
from training import Run, steps, train
from utils import UserError
from weights import find_checkpoint, load_checkpoint, load_state, read_checkpoint, save_checkpoint, save_state


def test_each_kind_of_weights(finished):
    path, raw = finished / "model.safetensors", load_state(finished)[0]["model"]
    for kind in (None, "ema", "ema_0.5", "ema_0.9", "raw"):
        model, diffusion, config = load_checkpoint(path, kind)
        assert config["weights"] == {None: "ema_0.5", "ema": "ema_0.5"}.get(kind, kind)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert (diffusion.timesteps, diffusion.schedule) == (20, "cosine") and config["train"]["steps"] == 12
        assert all(torch.equal(w, raw[n]) for n, w in model.state_dict().items()) == (kind == "raw")
    weights = {kind: load_checkpoint(path, kind)[0].state_dict() for kind in (None, "ema", "ema_0.5")}
    assert_same(weights[None], weights["ema_0.5"])  # the run's first average is the default
    assert_same(weights["ema"], weights["ema_0.5"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda x, path: Path(path).write_bytes(pickle.dumps(x))])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, tiny_data, save):
    marker = tmp_path / "executed"
    save({"outc.weight": Malicious(marker)}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt is not a checkpoint: it is a"):
        load_checkpoint(tmp_path / "evil.pt")
    # nor as a run's state, under the name that its checksum asks for
    data = (tmp_path / "evil.pt").read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    (run / f"state_00000005_{hashlib.sha256(data).hexdigest()[:16]}.pt").write_bytes(data)
    train(tiny_config(steps=1), tiny_data, run, resume=True)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))  # the test's own pickle does work
    assert marker.exists()


@pytest.mark.parametrize(
    "model, change, message",
    [
        ({"width": 12}, {}, r"time_mlp.0.weight is \(32, 8\) in the file, \(48, 12\) in the network"),
        ({"num_classes": 3}, {}, r"label_emb.weight is \(2, 32\) in the file, \(3, 32\) in the network"),
        ({}, {"stem.bias": None}, r"stem.bias is missing in the file, \(8,\) in the network"),
        ({}, {"extra": torch.zeros(2)}, r"extra is \(2,\) in the file, missing in the network"),
    ],
)
def test_mismatch_names_the_first_tensor(finished, tmp_path, model, change, message):
    _, config = read_checkpoint(finished / "model.safetensors")
    weights = load_state(finished)[0]["model"] | change
    config["model"] |= model
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"raw": {name: w for name, w in weights.items() if w is not None}}, config)
    with pytest.raises(UserError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_and_truncated_checkpoints(finished, tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(path)
    torch.save({"outc.weight": torch.zeros(3, 8, 1, 1)}, path)
    whole = (path if suffix == ".pt" else finished / "model.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.update(model=3),
        lambda c: c["model"].update(name="os.system"),
        lambda c: c["diffusion"].update(schedule="steep"),
        lambda c: c["diffusion"].update(timesteps="many"),
        lambda c: c.pop("train"),
        lambda c: c["data"].update(image_size=9),
        lambda c: c["train"].update(ema_betas=["x"]),
    ],
)
def test_checkpoints_with_a_strange_configuration(finished, tmp_path, change):
    tensors, config = read_checkpoint(finished / "model.safetensors")
    change(config)
    save_file(tensors, tmp_path / "x.safetensors", {"config": json.dumps(config)})
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("metadata", [None, {"config": "not json"}, {"config": "[]"}, {"config": "[" * 100_000}])
def test_checkpoints_without_a_configuration(tmp_path, metadata):
    save_file({"raw/x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "x.safetensors")


COURSE = UNet_conditional(num_classes=3, channels=1, width=4).state_dict()
UNCONDITIONAL = UNet(channels=1, width=4).state_dict()
RENAMED = {f"module._orig_mod.{name}": w for name, w in COURSE.items()}


@pytest.mark.parametrize(
    "contents, kinds",
    [
        (COURSE, {"raw"}),
        (UNCONDITIONAL, {"raw"}),
        (RENAMED, {"raw"}),
        ({"model": COURSE, "optimizer": {"state": {}}, "epoch": 3}, {"raw"}),
        ({"state_dict": {f"net.{name}": w for name, w in COURSE.items()} | {"step": 5}}, {"raw"}),
        ({"checkpoint": {"model_state_dict": RENAMED}, "ema": COURSE}, {"raw", "ema"}),
        ({"ema_state_dict": COURSE}, {"ema"}),
    ],
)
def test_the_courses_weights_in_usual_wrappings(contents, kinds, tmp_path):
    torch.save(contents, tmp_path / "x.pt")
    tensors, _ = read_checkpoint(tmp_path / "x.pt")
    assert {name.split("/")[0] for name in tensors} == kinds
    model, diffusion, config = load_checkpoint(tmp_path / "x.pt", image_size=16)
    expected = UNCONDITIONAL if contents is UNCONDITIONAL else COURSE
    assert_same(dict(model.state_dict()), dict(expected))
    assert (diffusion.timesteps, diffusion.schedule, model.training) == (1000, "linear", False)
    assert config["data"]["image_size"] == 16 and config["weights"] == ("ema" if "ema" in kinds else "raw")


def zip_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conditional_ckpt.pt", b"weights")


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: path.write_text("\n <!DOCTYPE html><title>Quota exceeded</title>"), "a web page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "a Git LFS pointer"),
        (lambda path: path.write_bytes(gzip.compress(b"weights")), "a gzip archive: unpack it"),
        (zip_archive, "a zip archive: unpack it"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "a whole model or other Python objects"),
        (lambda path: path.write_bytes(pickle.dumps(Path("x"))), "a pickle of more than weights"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff picture"), "something else"),
        (lambda path: torch.save({"model": {"fc.weight": torch.zeros(1)}, "epoch": 3}, path), "only model, epoch"),
        (lambda path: torch.save(torch.zeros(2), path), "only Tensor"),
        (lambda path: torch.save({0: 1, "outc.weight": torch.zeros(3, 8, 1, 1)}, path), "inc.double_conv.0.weight"),
    ],
)
def test_what_is_no_checkpoint_is_named(write, words, tmp_path):
    """In our words: PyTorch's own end with the advice to load it unsafely."""
    write(tmp_path / "x.pt")
    with pytest.raises(UserError) as refusal:
        load_checkpoint(tmp_path / "x.pt")
    assert words in str(refusal.value) and "weights_only" not in str(refusal.value)


def test_the_newest_weights_of_a_folder(finished, tiny_data, tmp_path):
    assert find_checkpoint(finished) == finished / "model.safetensors"
    older, newest = sorted(finished.glob("state_*.pt"))
    (tmp_path / older.name).write_bytes(older.read_bytes())
    (tmp_path / newest.name).write_bytes(b"damaged")
    assert find_checkpoint(tmp_path) == tmp_path / older.name
    (tmp_path / older.name).unlink()
    with pytest.raises(UserError, match="the folder holds no run"):
        find_checkpoint(tmp_path)
    train(tiny_config(steps=3), tiny_data, tmp_path / "longer")  # and then made longer, and stopped
    run = Run(tiny_config(steps=9), tiny_data)
    run.restore(load_state(tmp_path / "longer")[0])
    next(steps(run))
    (state,) = save_state(tmp_path / "longer", run.state())
    assert find_checkpoint(tmp_path / "longer") == state


def test_init_without_raw_weights_and_with_other_classes(finished, tiny_data, tmp_path, capsys):
    _, config = read_checkpoint(finished)
    average = load_state(finished)[0]["emas"]["ema_0.9"]
    save_checkpoint(tmp_path / "x.safetensors", {"ema_0.9": average}, config)
    other = tiny_config()
    other["model"]["num_classes"] = 3
    run = Run(other, tiny_data)
    fresh = run.model.label_emb.weight.clone()
    run.start_from(tmp_path / "x.safetensors")
    err = capsys.readouterr().err
    assert "has no raw weights: training starts from ema_0.9" in err and "begin anew, such as label_emb.weight" in err
    for model in (run.model, *run.ema_models.values()):
        assert torch.equal(model.label_emb.weight, fresh) and torch.equal(model.stem.weight, average["stem.weight"])
