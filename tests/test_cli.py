"""The three scripts from their command lines: what they write, what they say, and how they refuse bad input."""

import hashlib
import itertools
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, class_folder, picture
from PIL import Image, ImageSequence
from safetensors.torch import save_file

import cli
import ddpm
import ddpm_conditional
import ddpm_unconditional
import evaluate
import features
import image_data
import utils
from ddpm_conditional import guided
from image_data import load_samples, save_samples
from modules import UNet_conditional
from utils import UserError
from weights import build_model, images_seen, load_checkpoint, read_checkpoint

SCRIPTS = {"ddpm.py": ddpm, "ddpm_unconditional.py": ddpm_unconditional, "ddpm_conditional.py": ddpm_conditional}
TINY = (
    "--image-size 8 --width 8 --batch-size 16 --timesteps 20 --device cpu --epochs 1 --sample-every 0 "
    "--precision float32 --ema-beta 0.5 0.9 --ema-start 1"
).split()


def run(main, *argv):
    main([str(a) for a in argv])


@pytest.fixture(scope="session")
def runs(idx_folder, tmp_path_factory):
    """Finished runs of four steps: unconditional and conditional."""
    folder = tmp_path_factory.mktemp("runs")
    run(ddpm.main, "train", "--data", idx_folder, *TINY, "--out", folder / "plain")
    run(ddpm_conditional.main, "train", "--data", idx_folder, *TINY, "--out", folder / "classes")
    return folder


@pytest.fixture
def plain(runs):
    return runs / "plain/model.safetensors"


@pytest.fixture
def classes(runs):
    return runs / "classes/model.safetensors"


def everything(folder):
    """Every file below a folder with its contents, except for locks, which are always empty."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_train(script, idx_folder, tmp_path, capsys):
    main = SCRIPTS[script].main
    run(main, "train", "--data", idx_folder, *TINY, "--out", tmp_path / "run")
    assert f"wrote {tmp_path / 'run/model.safetensors'}" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["train"]["steps"] == 4 and config["train"]["batch_size"] == 16
    assert config["diffusion"] == {"timesteps": 20, "schedule": "linear", "objective": "simple"}
    assert config["model"].get("num_classes") == (10 if script == "ddpm_conditional.py" else None)
    assert (config["model"].get("patch"), config["model"].get("mults"), config["model"]["width"]) == {
        "ddpm.py": (None, None, 8),
        "ddpm_unconditional.py": (1, [1, 4, 4], 8),
        "ddpm_conditional.py": (1, [1, 4, 8], 8),
    }[script]  # the script's shape, but for the flag that was given
    assert (config["data"]["image_size"], config["data"]["images"], config["data"]["flip"]) == (8, 64, False)
    before = everything(tmp_path)
    run(main, "train", "--data", idx_folder, *TINY, "--out", tmp_path / "run", "--resume")  # nothing is left to do
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "flags, section, expected",
    [
        (["--objective", "vlb"], "diffusion", {"objective": "vlb"}),
        (["--loss", "huber", "--lr", "2e-4", "--seed", 7], "train", {"loss": "huber", "lr": 2e-4, "seed": 7}),
        (["--flip", "--epochs", "0.25"], "data", {"flip": True}),
        (["--mults", 1, 2, "--patch", 1, "--no-attention"], "model", {"mults": [1, 2], "patch": 1, "attention": False}),
        (["--depth", 2, "--block", "convnext"], "model", {"depth": 2, "block": "convnext"}),
        (["--mults", 1, 2, "--depth", 1, 2], "model", {"depth": [1, 2]}),
        (["--model", "course"], "model", {"name": "UNet_conditional", "num_classes": 10}),
        (["--p-uncond", 0.3, "--label-dropout", "batch"], "train", {"p_uncond": 0.3, "label_dropout": "batch"}),
        (["--accumulate", 2, "--optimizer", "adamw"], "train", {"batch_size": 16, "optimizer": "adamw"}),
        (["--cooldown", 0.5, "--timestep-sampling", "vlb"], "train", {"cooldown": 0.5, "timestep_sampling": "vlb"}),
        (["--epochs", "0.001"], "train", {"steps": 1}),
    ],
)
def test_train_flags(flags, section, expected, idx_folder, tmp_path):
    run(ddpm_conditional.main, "train", "--data", idx_folder, *TINY, *flags, "--out", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())[section]
    assert {name: config[name] for name in expected} == expected
    assert load_checkpoint(tmp_path / "model.safetensors")[0].num_classes == 10


def test_train_on_class_folders(tmp_path, refused):
    """Any ImageFolder layout: colour photographs, larger than the training images."""
    class_folder(tmp_path / "photos/train", {"cats": 6, "dogs": 6}, size=(30, 20))
    flags = ["--data", tmp_path / "photos", *TINY, "--batch-size", 4]
    run(ddpm_conditional.main, "train", *flags, "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["data"]["classes"] == ["cats", "dogs"] and config["data"]["flip"] is True
    assert config["model"] | {"channels": 3, "num_classes": 2} == config["model"]
    picture(tmp_path / "photos/train/cats/006.png", (30, 20))
    error = refused(ddpm_conditional.main, "train", *flags, "--out", tmp_path / "run", "--resume")
    assert "started with images = 11, not 12" in error


def test_the_published_commands_train_the_published_networks(monkeypatch):
    """A script's defaults may change; the commands of checkpoints/README.md must still make what is published."""
    monkeypatch.chdir(ROOT)
    text = Path("checkpoints/README.md").read_text().replace("$epochs", "30")  # the last of a loop
    text = re.sub(r"--init runs/landscapes(64)?\.", "--init checkpoints/landscapes.", text)  # those are not shipped
    published = dict(re.findall(r"publish --run (\S+) .*--out checkpoints/(\S+)", text))
    monkeypatch.setattr(cli, "run_train", lambda args: trained.append(args))
    for script, flags in re.findall(r"^ *python (ddpm\S*) (train .*)", text, re.MULTILINE):
        trained = []
        run(SCRIPTS[script].main, *flags.split())
        (args,) = trained
        if str(args.out) not in published:
            continue  # others go on from it
        _, config = read_checkpoint(ROOT / "checkpoints" / published.pop(str(args.out)))
        network = build_model(config["model"])
        x, classes = torch.empty(1, network.channels, 1, 1), config["data"]["classes"]
        made = cli.make_config(args, image_data.ImageData(x, torch.zeros(1).long(), classes, "", False, 1))
        build_model(made["model"]).load_state_dict(network.state_dict())  # equal names and shapes
        assert made["diffusion"] == config["diffusion"]
        for name in "loss batch_size lr optimizer seed ema_betas ema_start p_uncond label_dropout".split():
            assert made["train"][name] == config["train"][name], (script, name)
    assert not published


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_sample(script, plain, classes, tmp_path, capsys):
    """In every format; a GIF is enlarged."""
    checkpoint = classes if script == "ddpm_conditional.py" else plain
    for suffix, size in {"png": (32, 22), "gif": (56, 38), "npz": None}.items():
        out = tmp_path / f"new/{suffix}/x.{suffix}"
        flags = ["--checkpoint", checkpoint, "--n", 5, "--steps", 4, "--device", "cpu"]
        run(SCRIPTS[script].main, "sample", *flags, "--out", out)
        assert f"wrote {out}" in capsys.readouterr().out and list(out.parent.iterdir()) == [out]
        if suffix == "npz":
            images, labels, _ = load_samples(out)
            assert images.shape == (5, 1, 8, 8) and (labels is None) == (checkpoint == plain)
        else:
            with Image.open(out) as image:
                assert image.size == size and getattr(image, "n_frames", 1) == (5 if suffix == "gif" else 1)


@pytest.fixture
def sampled(tmp_path):
    """sampled(main, *flags): the images and labels that `sample` writes."""

    def sample(main, *flags):
        out = tmp_path / f"{hashlib.sha256(repr(flags).encode()).hexdigest()[:8]}.npz"
        run(main, "sample", "--steps", 5, "--device", "cpu", *flags, "--out", out)
        images, labels, _ = load_samples(out)
        return images.numpy(), labels

    return sample


CLASSES = ["10", "cat", "Cat", "Dog", "Paris, France", "2"]


@pytest.mark.parametrize(
    "text, classes, expected",
    [
        ("all", [], [0, 1, 2, 3, 4, 5, 0, 1]),
        (" 3,0", [], [3, 0, 3]),
        ("none", [], None),
        ("cat", CLASSES, [1]),
        ("Cat, dog", CLASSES, [2, 3]),
        ("DOG,cat", CLASSES, [3, 1]),
        ("Paris, France", CLASSES, [4]),
        ("2,10", CLASSES, [5, 0]),
        ("1", CLASSES, [1]),
    ],
)
def test_labels_by_number_and_name(text, classes, expected, capsys):
    labels = cli.parse_labels(text, len(expected or []), 6, classes)
    assert (labels is None and expected is None) or labels.tolist() == expected
    assert ("--labels 2 is the class called 2, which is number 5" in capsys.readouterr().err) == (text == "2,10")


@pytest.mark.parametrize("text", ["mouse", "cat,,Dog", "Paris", ""])
def test_labels_by_a_name_that_is_not_there(text):
    with pytest.raises(UserError, match=r"classes 10, cat, .*, by name or number \(0 to 5\), not"):
        cli.parse_labels(text, 4, 6, CLASSES)


def test_guidance_and_weights_matter(classes, sampled):
    """(After four steps of training labels hardly matter: the guidance must be strong.)"""

    def drawn(*flags):
        return sampled(ddpm_conditional.main, "--checkpoint", classes, "--n", 10, "--no-clip", *flags)[0].tobytes()

    plain, guided = drawn(), drawn("--cfg-scale", 5000)
    assert drawn("--cfg-scale", 1) == drawn("--ema") == plain
    assert len({plain, guided, drawn("--no-ema"), drawn("--cfg-scale", 5000, "--cfg-interval", 5, 9)}) == 4
    # two steps visit t = 19 and 9 only, so nothing is guided
    assert drawn("--steps", 2, "--cfg-scale", 5000, "--cfg-interval", 10, 18) == drawn("--steps", 2)


def test_sample_is_what_python_makes(classes, sampled):
    """Up to rounding: a convolution may add up in another order in a batch of another size."""
    flags = ["--checkpoint", classes, "--n", 4, "--labels", "2,7", "--cfg-scale", 3, "--seed", 6, "--batch-size", 3]
    images, labels = sampled(ddpm_conditional.main, *flags)
    model, diffusion, _ = load_checkpoint(classes)
    x = diffusion.sample(guided(model, labels, 3.0), 4, (1, 8, 8), sampler="ddim", steps=5, seed=6)
    assert np.abs(images - ((x.clamp(-1, 1) + 1) * 127.5).numpy()).max() <= 1


def test_course_checkpoint(tmp_path, sampled, refused):
    path = tmp_path / "conditional_ema_ckpt.pt"
    model = UNet_conditional(num_classes=10, width=4)
    torch.save({f"module.{name}": w for name, w in model.state_dict().items()}, path)
    for flags, size in (([], 64), (["--image-size", 16], 16)):
        flags = ["--checkpoint", path, "--n", 2, "--steps", 1, "--labels", "9", *flags]
        images, labels = sampled(ddpm_conditional.main, *flags)
        assert images.shape == (2, 3, size, size) and labels.tolist() == [9, 9]
    message = refused(ddpm_conditional.main, "sample", "--checkpoint", path, "--ema", "--out", tmp_path / "x.png")
    assert "has no ema weights, only raw" in message


def test_a_long_gif_is_short(plain, tmp_path):
    """However many steps, at most 60 pictures, and the sample held for a second."""
    out = tmp_path / "short.gif"
    run(ddpm.main, "sample", "--checkpoint", plain, "--n", 1, "--steps", 20, "--out", out)
    with Image.open(out) as gif:
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) == 100 * 21 + 1000
    frames = (torch.full((1, 1, 2, 2), i % 256, dtype=torch.uint8) for i in range(1001))
    cli.save_denoising_gif(frames, 1001, tmp_path / "long.gif", 1)
    with Image.open(tmp_path / "long.gif") as gif:
        assert 40 <= gif.n_frames <= 61


def test_init(runs, idx_folder, tmp_path, refused):
    """A new run that starts from a published run's weights: fine-tuning, or a longer training in parts."""
    published = tmp_path / "published.safetensors"
    run(ddpm.main, "publish", "--run", runs / "plain", "--weights", "raw", "ema", "--out", published)
    flags = ["train", "--data", idx_folder, *TINY, "--init", published]
    run(ddpm.main, *flags, "--epochs", 0.01, "--lr", 1e-12, "--ema-start", 0, "--out", tmp_path / "run")
    before, (after, config) = (read_checkpoint(published)[0], read_checkpoint(tmp_path / "run/model.safetensors"))
    seen = images_seen(read_checkpoint(published)[1]["train"])
    assert config["train"]["init"] == {"checkpoint": published.name, "sha256": utils.sha256(published), "images": seen}
    assert images_seen(config["train"]) == config["train"]["steps"] * config["train"]["batch_size"] + seen > seen
    assert not torch.equal(before["raw/stem.weight"], before["ema/stem.weight"])
    torch.testing.assert_close(after["raw/stem.weight"], before["raw/stem.weight"])
    expected = 0.9 * before["ema/stem.weight"] + 0.1 * before["raw/stem.weight"]
    torch.testing.assert_close(after["ema_0.9/stem.weight"], expected)
    for more in (["--model", "course"], ["--width", 16]):
        error = refused(ddpm.main, *flags, *more, "--out", tmp_path / "other")
        assert "does not fit" in error and "published.safetensors" in error
    tensors, strange = read_checkpoint(published)
    for change in ({"model": {"channels": 1}}, {"diffusion": strange["diffusion"] | {"new": 1}}):
        save_file(tensors, published, {"config": json.dumps(strange | change)})
        refused(ddpm.main, *flags, "--out", tmp_path / "other")
    assert not (tmp_path / "other/config.json").exists() and not list(tmp_path.glob("other/state*"))


def test_init_brings_its_network_and_process(idx_folder, tmp_path, capsys):
    """Unless flags say otherwise; the averages go on from the checkpoint's at once."""
    flags = ["--data", idx_folder, "--epochs", 0.01, "--image-size", 8, "--width", 12, "--mults", 1, "--no-attention"]
    flags += ["--batch-size", 16, "--sample-every", 0, "--precision", "float32"]
    run(ddpm.main, "train", *flags, "--schedule", "cosine", "--timesteps", 30, "--out", tmp_path / "first")
    trained = read_checkpoint(tmp_path / "first")[1]
    flags = [*flags[:6], *flags[11:], "--init", tmp_path / "first"]
    linear = (["--schedule", "linear"], {}, {"schedule": "linear"})
    for more, model, process in ([], {}, {}), linear, (["--depth", "2"], {"depth": 2}, {}):
        out = tmp_path / "-".join(["second", *more])
        run(ddpm.main, "train", *flags, *more, "--out", out)
        config = read_checkpoint(out)[1]
        assert config["model"] == trained["model"] | model and config["diffusion"] == trained["diffusion"] | process
        assert config["train"]["ema_start"] == 0 < trained["train"]["ema_start"]
    assert "tensors begin anew" in capsys.readouterr().err  # of the deeper network's weights, those that are new


def test_grid_publishes_what_it_has(idx_folder, tmp_path, monkeypatch, refused):
    """Results of experiments that other machines ran stay; what is finished is neither trained nor measured again."""
    measured = []

    def measure(name, folder, data, n, device):
        _, config = read_checkpoint(folder / "model.safetensors")
        (folder / "ema.safetensors").write_bytes(name.encode())
        measured.append(name)
        result = {"name": name, "schedule": config["diffusion"]["schedule"], "config": config, "sampler": {"n": n}}
        result["sha256"] = "0"
        utils.write_json(folder / "result.json", result)

    monkeypatch.setattr(ddpm_unconditional, "measure", measure)
    monkeypatch.setattr(ddpm_unconditional, "check_measurable", lambda *_: None)
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    published = tmp_path / "report/results/grid.json"
    elsewhere = {"config": {"train": {"precision": "bfloat16"}}}
    old_rows = [{"name": "sigmoid_l1"} | elsewhere, {"name": "cosine_l2", "old": True} | elsewhere]
    utils.write_json(published, {"runs": old_rows})
    flags = ["grid", "--out", tmp_path / "grid", "--data", idx_folder, *TINY, "--publish"]
    for only in (["cosine_l2"], ["linear_l1", "cosine_l2"], ["linear_l1_seed1"]):
        run(ddpm_unconditional.main, *flags, "--only", *only)
    runs = json.loads(published.read_text())["runs"]
    _, config = read_checkpoint(tmp_path / "grid/cosine_l2/model.safetensors")
    shape = ddpm_unconditional.SHAPE | {"width": 8}
    assert config["model"] == {"name": "PatchUNet", "channels": 1} | shape  # one network for all of Point 1
    rows = {row["name"]: row.get("schedule") for row in runs}
    assert rows == {"linear_l1": "linear", "sigmoid_l1": None, "cosine_l2": "cosine", "linear_l1_seed1": "linear"}
    assert [row["name"] for row in runs if "sha256_not_shipped" in row] == ["linear_l1_seed1"]
    command = "python ddpm_unconditional.py grid --publish --precision"
    ours, theirs = "float32 --only linear_l1 cosine_l2 linear_l1_seed1", "bfloat16 --only sigmoid_l1"
    assert json.loads(published.read_text())["command"] == f"{command} {ours} && {command} {theirs}"
    written = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert written == {"grid_linear_l1.safetensors", "grid_cosine_l2.safetensors"}
    assert measured == ["cosine_l2", "linear_l1", "linear_l1_seed1"]
    flags += ["--only", "cosine_l2"]
    assert "started with lr = " in refused(ddpm_unconditional.main, *flags, "--lr", 0.5)
    run(ddpm_unconditional.main, *flags, "--n", 9)
    run(ddpm_unconditional.main, *flags, "--n", 9, "--epochs", 2)  # longer: it goes on, and is measured again
    assert measured == ["cosine_l2", "linear_l1", "linear_l1_seed1", "cosine_l2", "cosine_l2"]


def test_an_experiment_is_measured_on_all_classes():
    """Class folders come class by class: the first images would be of one class. Others are taken as they come."""
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    for labels, first in (([0] * 6 + [1] * 6, [0, 3, 6, 9]), ([1, 0] * 6, [0, 1, 2, 3]), (None, [0, 1, 2, 3])):
        data = image_data.ImageData(images, None if labels is None else torch.tensor(labels), [], "", False, 1)
        assert ddpm_unconditional.first_images(data, 4).flatten().tolist() == first
        assert len(ddpm_unconditional.first_images(data, 20)) == 20


def test_sweep_goes_on_where_it_stopped(classes, tmp_path, monkeypatch):
    """One row for each kind of weights and scale, the same labels and noise for all; nothing is measured twice."""
    measured = []

    def evaluate_samples(images, labels, data_name):
        assert labels.tolist() == [i % 10 for i in range(20)]
        measured.append(images)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return {"frechet_distance": float(len(measured)), "labels": {"agreement": 0.5}}

    monkeypatch.setattr(features, "load_features", lambda _: SimpleNamespace(head=SimpleNamespace(in_features=2)))
    monkeypatch.setattr(features, "check_shape", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate_samples", evaluate_samples)
    out = tmp_path / "sweep.json"
    flags = ["sweep", "--checkpoint", classes, "--out", out, "--n", 20, "--steps", 3, "--scales", 1, 3]
    with pytest.raises(KeyboardInterrupt):
        run(ddpm_conditional.main, *flags)
    for _ in range(2):
        run(ddpm_conditional.main, *flags)
    result = json.loads(out.read_text())
    rows = [(row["kind"], row["cfg_scale"], row["quality"]["frechet_distance"]) for row in result["rows"]]
    assert rows == [("raw", 1, 1), ("raw", 3, 2), ("ema_0.5", 1, 4), ("ema_0.5", 3, 5)]
    assert result["sha256"] == utils.sha256(classes) and result["config"] == read_checkpoint(classes)[1]
    assert result["sampler"] == {"sampler": "dpm", "steps": 3, "eta": 1.0}
    assert result["command"].endswith("--n 20 --steps 3 --scales 1 3")
    assert measured[0].shape == (20, 1, 8, 8)
    assert np.array_equal(measured[2], measured[3])
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(measured[:2] + measured[3:], 2))
    run(ddpm_conditional.main, *flags, "--weights", "raw", "--eta", 0, "--out", tmp_path / "without_noise.json")
    assert json.loads((tmp_path / "without_noise.json").read_text())["sampler"]["eta"] == 0
    assert not np.array_equal(measured[-2], measured[0])  # both unguided, by the same weights


def test_any_checkpoint_can_be_sampled(classes, tmp_path, sampled, capsys):
    """A finished run's folder is its model. A stopped run's folder or state is its newest weights; the step is said."""
    model = sampled(ddpm_conditional.main, "--checkpoint", classes, "--n", 2)[0]
    assert np.array_equal(sampled(ddpm_conditional.main, "--checkpoint", classes.parent, "--n", 2)[0], model)
    (state,) = classes.parent.glob("state_00000004_*.pt")
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / state.name).write_bytes(state.read_bytes())
    for path in (stopped, state):
        assert np.array_equal(sampled(ddpm_conditional.main, "--checkpoint", path, "--n", 2)[0], model)
        assert "the weights after step 4" in capsys.readouterr().err
        utils.say.cache_clear()
    run(ddpm_conditional.main, "publish", "--run", stopped, "--out", tmp_path / "x.safetensors")
    assert read_checkpoint(tmp_path / "x.safetensors")[1]["train"]["steps"] == 4


def test_starting_from_an_image(plain, tmp_path, sampled):
    """The weaker the noise, the closer the samples stay to the image; each has noise of its own."""
    gradient = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)
    Image.fromarray(gradient).convert("RGB").save(tmp_path / "x.png")
    flags = ["--checkpoint", plain, "--n", 3, "--start-from", tmp_path / "x.png", "--steps", 1, "--strength"]
    errors = []
    for strength in (0.05, 0.3, 1):
        images = sampled(ddpm.main, *flags, strength)[0]
        assert not np.array_equal(images[0], images[1])
        errors.append(np.abs(images[:, 0].astype(int) - gradient).mean())
    assert errors == sorted(errors) and errors[0] < 10
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "x.png")  # grey as training makes it: by luminance
    assert abs(sampled(ddpm.main, *flags, 0.05)[0].mean() - 29) < 10


def test_a_row_in_a_table_is_all_that_the_command_line_needs(idx_folder, tmp_path, monkeypatch, sampled):
    """A schedule, a sampler and a data set of one's own, each by its name."""
    from image_data import DATASETS, DataSet

    def one_step(diffusion, eps_model, x, draw, steps, **unused):
        yield x
        yield diffusion.x0_and_eps(eps_model, x, diffusion.timesteps - 1, clip=True)[0]

    monkeypatch.setitem(ddpm.SCHEDULES, "steep", lambda timesteps: torch.linspace(0.1, 0.9, timesteps).double())
    monkeypatch.setitem(ddpm.SAMPLERS, "one", ddpm.Sampler(one_step, steps=1, eta=None))
    monkeypatch.setitem(DATASETS, "squares", DataSet("squares", (str(idx_folder),), 8, channels=1))
    flags = [*TINY[2:], "--data", "squares", "--schedule", "steep", "--out", tmp_path / "run"]
    run(ddpm.main, "train", *flags)
    images, _ = sampled(ddpm.main, "--checkpoint", tmp_path / "run", "--n", 2, "--sampler", "one", "--steps", 1)
    config = read_checkpoint(tmp_path / "run")[1]
    assert (config["diffusion"]["schedule"], config["data"]["name"]) == ("steep", "squares")
    assert images.shape == (2, 1, 8, 8)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_what_to_expect_is_said(idx_folder, tmp_path, capsys):
    run(ddpm.main, "train", "--data", idx_folder, *TINY, "--ema-start", 5, "--out", tmp_path / "run")
    err = capsys.readouterr().err
    for words in (
        "data: 64 images for training, 16 held out; 8 x 8 grey",
        "at T = 20 the linear schedule leaves 81",
        "take --schedule cosine",
        "4 steps are few",
        "the averages begin at step 5, after the run's last: they will be copies of the raw weights",
    ):
        assert words in err


def test_own_images_get_a_length_that_trains_something(idx_folder, tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(cli.training, "train", lambda config, *_, **__: trained.append(config["train"]) or "x")
    flags = ["train", "--data", idx_folder, "--image-size", 8, "--out", tmp_path / "run"]
    for more in ([], ["--epochs", 5], ["--minutes", 5], ["--batch-size", 64]):
        run(ddpm.main, *flags, *more)
    lengths = [(settings["steps"], settings["batch_size"]) for settings in trained]
    assert lengths == [(2000, 32), (10, 32), (None, 32), (2000, 64)]
    assert "2,000 steps of 32 images, 1,000 passes over yours" in capsys.readouterr().err


def test_guidance_without_label_dropout_is_told(idx_folder, tmp_path, sampled, capsys):
    run(ddpm_conditional.main, "train", "--data", idx_folder, *TINY, "--p-uncond", 0, "--out", tmp_path / "run")
    for scale, told in ((1, False), (3, True)):
        sampled(ddpm_conditional.main, "--checkpoint", tmp_path / "run", "--n", 1, "--cfg-scale", scale)
        assert ("never learnt" in capsys.readouterr().err) == told


# --- publish ---------------------------------------------------------------------------------------------------------


def test_publish(runs, tmp_path, capsys, sampled):
    out, part = tmp_path / "published.safetensors", tmp_path / "part.safetensors"
    run(ddpm.main, "publish", "--run", runs / "classes", "--weights", "raw", "ema_0.5", "ema_0.9", "--out", out)
    assert f"wrote {out}" in capsys.readouterr().out
    tensors, config = read_checkpoint(out)
    whole, config_of_run = read_checkpoint(runs / "classes/model.safetensors")
    assert config == config_of_run and tensors.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(tensors[name], whole[name], rtol=1e-3, atol=1e-4)
    assert out.stat().st_size < 0.7 * (runs / "classes/model.safetensors").stat().st_size  # half the digits
    run(ddpm.main, "publish", "--run", runs / "classes", "--out", part)
    tensors, _ = read_checkpoint(part)
    assert {name.split("/")[0] for name in tensors} == {"ema", "losses"}
    torch.testing.assert_close(tensors["ema/stem.weight"], whole["ema_0.5/stem.weight"], rtol=1e-3, atol=1e-4)
    run(ddpm.main, "publish", "--run", runs / "classes", "--weights", "raw", "ema_0.9", "--out", part)
    images, _ = sampled(ddpm_conditional.main, "--checkpoint", part, "--n", 2)  # by the only average that is there
    assert np.array_equal(sampled(ddpm_conditional.main, "--checkpoint", part, "--n", 2, "--ema")[0], images)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    more = {"ddpm_unconditional.py": ["grid"], "ddpm_conditional.py": ["sweep"]}
    for command in ("train", "sample", "publish", *more.get(script, [])):
        with pytest.raises(SystemExit, match="0"):
            run(SCRIPTS[script].main, command, "--help")
        out = capsys.readouterr().out
        assert out.startswith("usage:") and ("(default: 0)" in out or command == "publish")  # of --seed
        assert command != "grid" or "passes over the data (default: 3) --minutes" in " ".join(out.split())  # not two


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schedule", "steep"], "invalid choice: 'steep'"),
        (["--timesteps", 1_000_000], "timesteps must be between"),
        (["--timesteps", 90_000, "--schedule", "linear"], "too many for the linear schedule"),
        (["--epochs", "1e8"], "at most"),
        (["--minutes", 1, "--epochs", 1], "not allowed with"),
        (["--seed", -1], "--seed"),
        (["--lr", "nan"], "--lr"),
        (["--seed", "9" * 400], "--seed"),
        (["--data", ""], "no data called ''"),
        (["--mults", 1, 0], "--mults"),
        (["--model", "course", "--width", 6], "multiple of 4"),
        (["--model", "course", "--mults", 1, 2], "unexpected keyword argument 'mults'"),
        (["--ema-beta", 1], "--ema-beta"),
        (["--image-size", 10], "--image-size that 4 divides"),
        (["--accumulate", 3], "must be a multiple"),
        (["--objective", "vlb", "--loss", "l1"], "goes with --loss l2"),
        (["--objective", "vlb", "--timestep-sampling", "vlb"], "--timestep-sampling uniform"),
        (["--device", "toaster"], "no device 'toaster'"),
        (["--colour", "red"], "unrecognized arguments: --colour red (see --help)"),
    ],
)
def test_bad_train_flags(flags, message, idx_folder, tmp_path, refused):
    if "--minutes" not in flags:
        flags = [*TINY, *flags]
    assert message in refused(ddpm.main, "train", "--data", idx_folder, *flags, "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_bad_folders_to_train_in(runs, idx_folder, tmp_path, refused, monkeypatch):
    flags = ["train", "--data", idx_folder, *TINY]
    assert "holds a run already" in refused(ddpm.main, *flags, "--out", runs / "plain")
    same_shape = ["--patch", 1, "--mults", 1, 4, 8, "--no-attention"]
    error = refused(ddpm.main, *flags, *same_shape, "--resume", "--out", runs / "classes")
    assert "started with num_classes = 10" in error
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    own = "a folder of its own"  # not the current one, nor its parent
    for out, message in (("file", "file"), ("file/run", "file"), ("", own), ("..", own)):
        assert message in refused(ddpm.main, *flags, "--out", out)
    assert everything(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "nowhere.safetensors"], "no checkpoint at nowhere.safetensors"),
        (["--checkpoint", "plain", "--cfg-scale", 3], "take a checkpoint that has classes"),
        (["--checkpoint", "plain", "--labels", "0"], "this checkpoint has no classes"),
        (["--cfg-scale", 3, "--labels", "none"], "leave --labels none out"),
        (["--steps", 21], "20 timesteps"),
        (["--sampler", "ddpm", "--eta", 1], "--eta has no effect on --sampler ddpm"),
        (["--sampler", "dpm", "--variance", "beta"], "--variance has no effect on --sampler dpm"),
        (["--cfg-interval", 3, 9], "--cfg-scale above 1"),
        (["--cfg-interval", 9, 3, "--cfg-scale", 2], "LOW is at most HIGH"),
        (["--cfg-interval", 20, 30, "--cfg-scale", 2], "below T"),
        (["--start-from", "nowhere.png"], "nowhere.png is no readable image"),
        (["--strength", 0], "--strength"),
        (["--strength", 0.3], "--strength goes with --start-from"),
        (["--image-size", 10], "--image-size that 4 divides"),
        (["--labels", "10"], "by name or number (0 to 9), not '10'"),
        (["--labels", "0,-1"], "not '-1'"),
        (["--out", "x.jpg"], ".png, .gif or .npz"),
    ],
)
def test_bad_sample_flags(flags, message, runs, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(runs)
    flags = ["--checkpoint", "classes", "--out", tmp_path / "x.png", *flags]
    assert message in refused(ddpm_conditional.main, "sample", *flags)
    assert everything(tmp_path) == {}


def test_outputs_that_cannot_be_written(plain, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(cli.weights, "load_checkpoint", lambda *_: pytest.fail("refused only after the work"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.gif").mkdir()
    for out in (tmp_path / "file/x.npz", tmp_path / "folder.gif", Path("/proc/x.png")):
        assert f"cannot write {out}" in refused(ddpm.main, "sample", "--checkpoint", plain, "--out", out)
    assert everything(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--run", "."], "the folder holds no run"),
        (["--out", "x.pt"], "must end in .safetensors"),
        (["--weights", "ema_0.7"], "has no ema_0.7 weights, only ema_0.5, ema_0.9, raw"),
    ],
)
def test_bad_publish(flags, message, runs, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(ddpm.main, "publish", "--run", runs / "plain", "--out", "x.safetensors", *flags)
    assert everything(tmp_path) == {}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "cosine_l4"], "invalid choice: 'cosine_l4'"),
        (["--only", "linear_l2_9_epochs", "--loss", "l1"], "linear_l2_9_epochs has its own --loss"),
        (["--only", "linear_l2_9_epochs", "--minutes", 5], "has its own --epochs"),
        (["--only", "linear_l2_seed1", "--seed", 3], "has its own --seed, 1"),
        (["--only", "linear_l2_flip", "--no-flip"], "has its own --flip"),
        (["--timesteps", 50], "--timesteps must be at least"),
        (["--channels", 3], "28 x 28 x 3"),
        (["--n", 100], "make at least 129"),
        (["--only", "vlb_seed0", "--objective", "vlb", "--n", 100], "make at least 129"),  # its own: only n is wrong
        (["--image-size", 32], "32 x 32"),
        (["--data", "nowhere/fashion_mnist"], "is called like the built-in fashion_mnist"),
    ],
)
def test_bad_grid(flags, message, tmp_path, refused):
    """What could not be measured is not trained either."""
    assert message in refused(ddpm_unconditional.main, "grid", "--out", tmp_path / "grid", *flags)
    assert not (tmp_path / "grid").exists()


def test_bad_sweep(plain, classes, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_samples", lambda *_, **__: pytest.fail("refused only after the work"))
    monkeypatch.chdir(tmp_path)
    course = Path("course.pt")
    torch.save(UNet_conditional(num_classes=3, channels=1, width=4).state_dict(), course)
    Path("not.json").write_text("{not json")
    utils.write_json("other.json", {"command": "another", "sha256": "of other weights", "rows": []})
    before = everything(tmp_path)
    for checkpoint, flags, message in (
        (plain, [], "no classes"),
        ("nowhere.safetensors", [], "nowhere"),
        (course, ["--weights", "raw"], "add --data"),
        (course, ["--weights", "raw", "--data", "fashion_mnist"], "64 x 64"),
        (classes, ["--steps", 21], "20 timesteps"),
        (classes, ["--sampler", "ddpm", "--eta", 1], "--eta has no effect on --sampler ddpm"),
        (classes, ["--intervals", "20-30"], "begin below the model's 20 timesteps"),
        (classes, ["--intervals", "none", "9-5"], "must rise and begin below"),
        (classes, ["--intervals", "5"], "invalid interval value: '5'"),
        (classes, ["--out", "not.json"], "not.json"),
        (classes, ["--out", "other.json"], "other settings or weights"),
        (classes, ["--weights", "raw", "bogus"], "has no bogus"),
        (classes, ["--out", tmp_path], "cannot write"),
    ):
        flags = ["--checkpoint", checkpoint, "--out", "x.json", *flags]
        assert message in refused(ddpm_conditional.main, "sweep", *flags)
        assert everything(tmp_path) == before


def test_samples_name_their_source(classes, tmp_path):
    out = tmp_path / "x.npz"
    origin = {"checkpoint": classes.name, "sha256": utils.sha256(classes), "weights": "ema_0.5"}  # the first average
    by_default = {"seed": 3, "sampler": "ddim", "steps": 20, "eta": 0, "clip": True, "variance": None}
    by_ddpm = {"sampler": "ddpm", "steps": 2, "eta": None, "clip": False, "variance": "beta"}
    ddpm_flags = ["--sampler", "ddpm", "--steps", 2, "--variance", "beta", "--no-clip"]
    for flags, expected in ((["--seed", 3], by_default), (ddpm_flags, by_ddpm)):
        run(ddpm_conditional.main, "sample", "--checkpoint", classes, "--n", 2, *flags, "--out", out)
        source = load_samples(out)[2]
        assert source | origin | expected == source
    save_samples(out, torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8))
    assert load_samples(out)[2] == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_as_a_script(script, monkeypatch, capsys):
    """What `python SCRIPT ...` does: no command, and an error that the script itself turns into a line."""
    for argv in ([], ["sample", "--checkpoint", "nowhere.safetensors", "--out", "/tmp/never-written.png"]):
        monkeypatch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        err = capsys.readouterr().err
        assert exit.value.code == 2 and len(err.splitlines()) == 1 and err.startswith(f"{script}: error: ")
