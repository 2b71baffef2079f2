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
from conftest import ROOT, write_idx
from PIL import Image

import cli
import ddpm
import ddpm_conditional
import ddpm_unconditional
import evaluate
import features
import image_data
import utils
from ddpm_conditional import guided
from modules import UNet_conditional
from utils import UserError, load_samples
from weights import build_model, images_seen, load_checkpoint, read_checkpoint, save_checkpoint, select_weights

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
        (
            ["--loss", "huber", "--optimizer", "adamw", "--lr", "2e-4", "--seed", 7],
            "train",
            {"loss": "huber", "optimizer": "adamw", "lr": 2e-4, "seed": 7},
        ),
        (["--flip", "--epochs", "0.25"], "data", {"flip": True}),
        (
            ["--mults", 1, 2, 2, "--depth", 2, "--patch", 1, "--block", "convnext", "--no-attention"],
            "model",
            {"mults": [1, 2, 2], "depth": 2, "patch": 1, "block": "convnext", "attention": False},
        ),
        (["--model", "course"], "model", {"name": "UNet_conditional", "num_classes": 10}),
        (["--p-uncond", 0.3, "--label-dropout", "batch"], "train", {"p_uncond": 0.3, "label_dropout": "batch"}),
        (["--accumulate", 2], "train", {"batch_size": 16}),
        (["--cooldown", 0.5, "--timestep-sampling", "vlb"], "train", {"cooldown": 0.5, "timestep_sampling": "vlb"}),
        (["--epochs", "0.001"], "train", {"steps": 1}),
    ],
)
def test_train_flags(flags, section, expected, idx_folder, tmp_path):
    run(ddpm_conditional.main, "train", "--data", idx_folder, *TINY, *flags, "--out", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())[section]
    assert {name: config[name] for name in expected} == expected
    model, _, _ = load_checkpoint(tmp_path / "model.safetensors")
    assert model.num_classes == 10


def test_train_on_class_folders(tmp_path, refused):
    """Any ImageFolder layout: colour photographs, larger than the training images."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "photos/train" / name).mkdir(parents=True)
        for i in range(6):
            picture = Image.fromarray(rng.integers(0, 255, (20, 30, 3)).astype(np.uint8))
            picture.save(tmp_path / f"photos/train/{name}/{i}.jpg")
    flags = ["--data", tmp_path / "photos", *TINY, "--batch-size", 4]
    run(ddpm_conditional.main, "train", *flags, "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["data"]["classes"] == ["cats", "dogs"] and config["data"]["flip"] is True
    assert config["model"] | {"channels": 3, "num_classes": 2} == config["model"]
    (tmp_path / "photos/train/cats/5.jpg").write_bytes((tmp_path / "photos/train/dogs/5.jpg").read_bytes())
    message = refused(ddpm_conditional.main, "train", *flags, "--out", tmp_path / "run", "--resume")
    assert "started with folder = 12 files, " in message  # the same names, but another image


def test_the_published_commands_train_the_published_networks(monkeypatch):
    """A script's defaults may change; the commands of checkpoints/README.md must still make what is published."""
    text = (ROOT / "checkpoints/README.md").read_text()
    published = dict(re.findall(r"publish --run (\S+) .*--out checkpoints/(\S+)", text))
    monkeypatch.setattr(cli, "run_train", lambda args: trained.append(args))
    for script, flags in re.findall(r"^python (ddpm\S*) (train .*)", text, re.MULTILINE):
        trained = []
        run(SCRIPTS[script].main, *flags.split())
        (args,) = trained
        if str(args.out) not in published:
            continue  # the first of two runs
        _, config = read_checkpoint(ROOT / "checkpoints" / published.pop(str(args.out)))
        channels = build_model(config["model"]).channels
        data = image_data.ImageData(
            torch.empty(1, channels, 1, 1), torch.zeros(1).long(), config["data"]["classes"], "", False, 1
        )
        args.init = None
        made = cli.make_config(args, data)
        shapes = [
            {name: weight.shape for name, weight in build_model(c["model"]).state_dict().items()}
            for c in (made, config)
        ]
        assert shapes[0] == shapes[1], script
        assert made["diffusion"] == config["diffusion"]
        for name in "loss batch_size lr optimizer seed ema_betas ema_start p_uncond label_dropout".split():
            assert made["train"][name] == config["train"][name], (script, name)
    assert not published


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("suffix", ["png", "gif", "npz"])
def test_sample(script, suffix, plain, classes, tmp_path, capsys):
    checkpoint = classes if script == "ddpm_conditional.py" else plain
    out = tmp_path / f"new/folder/x.{suffix}"
    flags = ["--n", 5, "--steps", 4, "--device", "cpu"]
    run(SCRIPTS[script].main, "sample", "--checkpoint", checkpoint, *flags, "--out", out)
    assert f"wrote {out}" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    if suffix == "npz":
        images, labels = load_samples(out)
        assert images.shape == (5, 1, 8, 8)
        assert (labels is None) == (checkpoint == plain)
    else:
        with Image.open(out) as picture:
            side, padding = (8, 2) if suffix == "png" else (16, 2)  # a GIF is enlarged
            assert picture.size == (3 * (side + padding) + padding, 2 * (side + padding) + padding)
            frames = getattr(picture, "n_frames", 1)
        assert frames == 1 if suffix == "png" else frames > 4


@pytest.fixture
def sampled(tmp_path):
    """sampled(main, *flags): the images and labels that `sample` writes."""

    def sample(main, *flags):
        out = tmp_path / f"{hashlib.sha256(repr(flags).encode()).hexdigest()[:8]}.npz"
        run(main, "sample", "--steps", 5, "--device", "cpu", *flags, "--out", out)
        images, labels = load_samples(out)
        return images.numpy(), labels

    return sample


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_image_i_whatever_the_number_and_the_batch(sampler, plain, sampled):
    """Up to rounding: a convolution may add up in another order in a batch of another size."""
    flags = ["--checkpoint", plain, "--sampler", sampler, *([] if sampler == "ddpm" else ["--eta", 0.5])]
    images, _ = sampled(ddpm.main, *flags, "--n", 7)
    for n, batch_size in ((3, 250), (7, 1), (7, 4), (12, 5)):
        again, _ = sampled(ddpm.main, *flags, "--n", n, "--batch-size", batch_size)
        n = min(len(again), 7)
        assert np.abs(again[:n].astype(int) - images[:n]).max() <= 1
    assert len({image.tobytes() for image in images}) == 7
    seed_1, _ = sampled(ddpm.main, *flags, "--n", 7, "--seed", 1)
    assert (seed_1 != images).mean() > 0.1


@pytest.mark.parametrize(
    "text, n, expected",
    [
        ("all", 10, list(range(10))),
        ("all", 20, 2 * list(range(10))),
        ("all", 3, [0, 1, 2]),
        ("3", 4, [3, 3, 3, 3]),
        ("5,0", 4, [5, 0, 5, 0]),
        ("0,1,2", 7, [0, 1, 2, 0, 1, 2, 0]),
        ("none", 4, None),
        (" 1, 2", 2, [1, 2]),
    ],
)
def test_labels(text, n, expected, classes, sampled):
    images, labels = sampled(ddpm_conditional.main, "--checkpoint", classes, "--n", n, "--labels", text)
    assert len(images) == n
    assert (labels is None and expected is None) or labels.tolist() == expected


def test_every_label_gets_its_share():
    for n in range(1, 60):
        counts = cli.parse_labels("all", n, 7).bincount(minlength=7)
        assert counts.sum() == n and counts.max() - counts.min() <= 1


def test_guidance_and_weights_matter(classes, sampled):
    flags = ["--checkpoint", classes, "--n", 10, "--no-clip"]
    plain, _ = sampled(ddpm_conditional.main, *flags)
    assert np.array_equal(sampled(ddpm_conditional.main, *flags, "--cfg-scale", 1)[0], plain)
    assert np.array_equal(sampled(ddpm_conditional.main, *flags, "--ema")[0], plain)
    for other in (["--cfg-scale", 5000], ["--no-ema"]):  # after four steps of training labels hardly matter
        assert not np.array_equal(sampled(ddpm_conditional.main, *flags, *other)[0], plain), other


def test_sample_is_what_python_makes(classes, sampled):
    images, labels = sampled(
        ddpm_conditional.main, "--checkpoint", classes, "--n", 4, "--labels", "2,7", "--cfg-scale", 3
    )
    model, diffusion, _ = load_checkpoint(classes)
    eps_model = guided(model, labels, 3.0)
    x = diffusion.sample(eps_model, 4, (1, 8, 8), sampler="ddim", steps=5)
    expected = ((x.clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(images - expected).max() <= 1


def test_course_checkpoint(tmp_path, sampled, refused):
    path = tmp_path / "conditional_ema_ckpt.pt"
    model = UNet_conditional(num_classes=10, width=4)
    torch.save({f"module.{name}": w for name, w in model.state_dict().items()}, path)
    images, labels = sampled(ddpm_conditional.main, "--checkpoint", path, "--n", 2, "--steps", 1, "--labels", "9")
    assert images.shape == (2, 3, 64, 64) and labels.tolist() == [9, 9]
    message = refused(ddpm_conditional.main, "sample", "--checkpoint", path, "--ema", "--out", tmp_path / "x.png")
    assert "has no ema weights, only raw" in message


def test_a_long_gif_is_short(plain, tmp_path):
    """However many steps, at most 60 pictures, and the sample held for a second."""
    for sampler in ("ddpm", "ddim"):
        out = tmp_path / f"{sampler}.gif"
        run(ddpm.main, "sample", "--checkpoint", plain, "--n", 1, "--steps", 20, "--sampler", sampler, "--out", out)
        with Image.open(out) as gif:
            shown = 0
            for frame in range(gif.n_frames):
                gif.seek(frame)
                shown += gif.info["duration"]
        assert shown == 50 * (21 + 20)
    frames = [torch.full((1, 1, 2, 2), i % 256, dtype=torch.uint8) for i in range(1001)]
    cli.save_denoising_gif(frames, tmp_path / "long.gif", 1)
    with Image.open(tmp_path / "long.gif") as gif:
        assert 40 <= gif.n_frames <= 61


def test_gif_without_frames(tmp_path):
    with pytest.raises(UserError, match="at least one frame"):
        cli.save_denoising_gif([], tmp_path / "x.gif", 1)
    assert list(tmp_path.iterdir()) == []


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
    torch.testing.assert_close(
        after["ema_0.9/stem.weight"], 0.9 * before["ema/stem.weight"] + 0.1 * before["raw/stem.weight"]
    )
    assert "nowhere" in refused(ddpm.main, *flags, "--init", tmp_path / "nowhere", "--out", tmp_path / "new")
    error = refused(ddpm.main, *flags, "--width", 16, "--out", tmp_path / "other")
    assert "does not fit" in error and "published.safetensors" in error
    assert not (tmp_path / "other/config.json").exists() and not list(tmp_path.glob("other/state*"))


def test_grid_publishes_what_it_has(idx_folder, tmp_path, monkeypatch, refused):
    """Results of experiments that other machines ran stay; what is finished is neither trained nor measured again."""
    measured = []

    def measure(name, folder, data, n, device):
        _, config = read_checkpoint(folder / "model.safetensors")
        (folder / "ema.safetensors").write_bytes(name.encode())
        measured.append(name)
        result = {"name": name, "schedule": config["diffusion"]["schedule"], "config": config, "sampler": {"n": n}}
        utils.write_json(folder / "result.json", result)

    monkeypatch.setattr(ddpm_unconditional, "measure", measure)
    monkeypatch.setattr(ddpm_unconditional, "check_measurable", lambda args: None)
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    published = tmp_path / "report/results/grid.json"
    utils.write_json(published, {"runs": [{"name": "sigmoid_l1"}, {"name": "cosine_l2", "old": True}]})
    flags = ["grid", "--out", tmp_path / "grid", "--data", idx_folder, *TINY, "--publish"]
    for only in (["cosine_l2"], ["linear_l1", "cosine_l2"], ["cosine_l2"]):
        run(ddpm_unconditional.main, *flags, "--only", *only)
    runs = json.loads(published.read_text())["runs"]
    _, config = read_checkpoint(tmp_path / "grid/cosine_l2/model.safetensors")
    assert config["model"] == {
        "name": "PatchUNet",
        "channels": 1,
        "width": 8,
    }  # the published experiments', not `train`'s
    assert [(row["name"], row.get("schedule")) for row in runs] == [
        ("linear_l1", "linear"),
        ("sigmoid_l1", None),
        ("cosine_l2", "cosine"),
    ]
    assert json.loads(published.read_text())["command"].endswith("--only linear_l1 sigmoid_l1 cosine_l2")
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "grid_linear_l1.safetensors",
        "grid_cosine_l2.safetensors",
    }
    assert measured == ["cosine_l2", "linear_l1"]
    flags += ["--only", "cosine_l2"]
    assert "started with lr = " in refused(ddpm_unconditional.main, *flags, "--lr", 0.5)
    run(ddpm_unconditional.main, *flags, "--n", 9)
    run(ddpm_unconditional.main, *flags, "--n", 9, "--epochs", 2)  # longer: it goes on, and is measured again
    assert measured == ["cosine_l2", "linear_l1", "cosine_l2", "cosine_l2"]


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
    rows = [
        (row["weights"], row["kind"], row["cfg_scale"], row["quality"]["frechet_distance"]) for row in result["rows"]
    ]
    assert rows == [("raw", "raw", 1, 1), ("raw", "raw", 3, 2), ("ema", "ema_0.5", 1, 4), ("ema", "ema_0.5", 3, 5)]
    assert result["sha256"] == utils.sha256(classes) and result["config"] == read_checkpoint(classes)[1]
    assert result["sampler"] == {"sampler": "dpm", "steps": 3, "eta": 1.0}
    assert "--weights raw ema --scales 1 3 --n 20 --sampler dpm --steps 3 --seed 0 --out" in result["command"]
    assert measured[0].shape == (20, 1, 8, 8)
    assert np.array_equal(measured[2], measured[3])
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(measured[:2] + measured[3:], 2))


def test_any_checkpoint_can_be_sampled(classes, idx_folder, tmp_path, sampled, capsys):
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
    flags = ["--data", idx_folder, *TINY, "--mults", 1, 4, 8, "--patch", 1, "--no-attention", "--ema-start", 0]
    run(ddpm.main, "train", *flags, "--init", stopped, "--out", tmp_path / "more")
    assert "trained on 10 classes, not 0: the labels are learnt anew" in capsys.readouterr().err


def test_image_size_of_the_courses_network(tmp_path, sampled):
    torch.save(UNet_conditional(num_classes=3, width=4).state_dict(), tmp_path / "course.pt")
    flags = ["--checkpoint", tmp_path / "course.pt", "--n", 1, "--steps", 1, "--image-size", 16]
    assert sampled(ddpm_conditional.main, *flags)[0].shape == (1, 3, 16, 16)


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


CLASSES = ["10", "cat", "Cat", "Dog", "Paris, France", "2"]


@pytest.mark.parametrize(
    "text, labels",
    [
        ("cat", [1]),
        ("Cat, dog", [2, 3]),
        ("DOG,cat", [3, 1]),
        ("Paris, France,Dog,0", [4, 3, 0]),
        ("2,10", [5, 0]),
        ("1", [1]),
    ],
)
def test_labels_by_name(text, labels, capsys):
    assert cli.parse_labels(text, len(labels), 6, CLASSES).tolist() == labels
    if text == "2,10":
        assert "--labels 2 is the class called 2, which is number 5" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["CAT", "mouse", "cat,,Dog", "Paris"])
def test_labels_by_a_name_that_is_not_there(text):
    with pytest.raises(UserError, match=r"classes by name \(10, cat, .*\) or number, not"):
        cli.parse_labels(text, 4, 6, CLASSES)


def test_guidance_in_an_interval(classes, sampled):
    flags = ["--checkpoint", classes, "--n", 4, "--no-clip", "--cfg-scale"]
    samples = [
        sampled(ddpm_conditional.main, *flags, 5000, "--cfg-interval", *at)[0] for at in ((0, 19), (5, 9), (20, 30))
    ]
    assert np.array_equal(samples[0], sampled(ddpm_conditional.main, *flags, 5000)[0])
    assert not np.array_equal(samples[0], samples[1])
    assert np.array_equal(samples[2], sampled(ddpm_conditional.main, *flags, 1)[0])


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


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["data: 64 images for training, 16 held out; 8 x 8 grey", "4 steps are few"]),
        (["--timesteps", 20], ["at T = 20 the linear schedule leaves 81", "--schedule cosine leaves 0.0%"]),
    ],
)
def test_what_to_expect_is_said(flags, words, idx_folder, tmp_path, capsys):
    run(ddpm.main, "train", "--data", idx_folder, *TINY, *flags, "--out", tmp_path / "run")
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


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


def test_publish(runs, tmp_path, capsys):
    out = tmp_path / "published.safetensors"
    run(ddpm.main, "publish", "--run", runs / "classes", "--weights", "raw", "ema_0.5", "ema_0.9", "--out", out)
    assert f"wrote {out}" in capsys.readouterr().out
    tensors, config = read_checkpoint(out)
    whole, config_of_run = read_checkpoint(runs / "classes/model.safetensors")
    assert config == config_of_run and tensors.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(tensors[name], whole[name], rtol=1e-3, atol=1e-4)
    assert out.stat().st_size < 0.7 * (runs / "classes/model.safetensors").stat().st_size
    run(ddpm.main, "publish", "--run", runs / "classes", "--out", out)
    tensors, _ = read_checkpoint(out)
    assert {name.split("/")[0] for name in tensors} == {"ema", "losses"}
    torch.testing.assert_close(tensors["ema/stem.weight"], whole["ema_0.5/stem.weight"], rtol=1e-3, atol=1e-4)


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        *[(s, c) for s in SCRIPTS for c in ("train", "sample", "publish")],
        ("ddpm_unconditional.py", "grid"),
        ("ddpm_conditional.py", "sweep"),
        ("ddpm.py",),
    ],
)
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        run(SCRIPTS[argv[0]].main, *argv[1:], "--help")
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.startswith("usage:")
    if argv[1:] and argv[1] != "publish":
        assert "(default: 0)" in out  # of --seed


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schedule", "steep"], "invalid choice: 'steep'"),
        (["--loss", "l3"], "invalid choice"),
        (["--objective", "elbo"], "invalid choice"),
        (["--optimizer", "lion"], "invalid choice"),
        (["--timesteps", 0], "at least 1"),
        (["--timesteps", -5], "at least 1"),
        (["--timesteps", 2.5], "invalid int value"),
        (["--timesteps", 1_000_000], "timesteps must be between"),
        (["--timesteps", 90_000, "--schedule", "linear"], "too many for the linear schedule"),
        (["--epochs", 0], "--epochs"),
        (["--epochs", "nan"], "--epochs"),
        (["--epochs", "inf"], "--epochs"),
        (["--epochs", "1e8"], "steps: that is a mistake"),
        (["--minutes", 0], "--minutes"),
        (["--minutes", 1, "--epochs", 1], "not allowed with"),
        (["--batch-size", 0], "--batch-size"),
        (["--batch-size", "many"], "--batch-size"),
        (["--lr", 0], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--seed", -1], "--seed"),
        (["--width", 0], "--width"),
        (["--mults", 1, 0], "--mults"),
        (["--model", "course", "--width", 6], "multiple of 4"),
        (["--model", "course", "--mults", 1, 2], "a shape of its own: leave --mults 1 2 out"),
        (["--model", "course", "--no-attention"], "leave --no-attention out"),
        (["--ema-beta", 1], "--ema-beta"),
        (["--image-size", 10], "--image-size that 4 divides"),
        (["--image-size", 0], "--image-size"),
        (["--accumulate", 3], "must be a multiple"),
        (["--objective", "vlb", "--loss", "l1"], "--loss l2 only"),
        (["--objective", "vlb", "--timestep-sampling", "vlb"], "twice"),
        (["--timestep-sampling", "laplace"], "invalid choice"),
        (["--channels", 2], "invalid choice"),
        (["--cooldown", 1.5], "--cooldown"),
        (["--device", "toaster"], "no device 'toaster'"),
        (["--device", "meta"], "no device 'meta'"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_train_flags(flags, message, idx_folder, tmp_path, refused):
    if "--minutes" not in flags:
        flags = [*TINY, *flags]
    assert message in refused(ddpm.main, "train", "--data", idx_folder, *flags, "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def broken_data(kind, folder):
    """A folder of data that no one can train on."""
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    write_idx(images, np.zeros((4, 28, 28)))
    write_idx(labels, np.zeros(4))
    if kind == "no labels":
        labels.unlink()
    elif kind == "truncated":
        images.write_bytes(images.read_bytes()[:-100])
    elif kind == "wrong shape":
        write_idx(images, np.zeros((4, 27, 28)))
    elif kind == "other counts":
        write_idx(labels, np.zeros(3))
    elif kind == "no header":
        images.write_bytes(b"\0\0")
    elif kind == "label 99":
        write_idx(labels, [0, 1, 2, 99])
    elif kind == "damaged gzip":
        images.unlink()
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08" + bytes(50))
    else:
        images.unlink(), labels.unlink()
    if kind == "no images":
        (folder / "notes.txt").write_text("nothing to see")
    elif kind == "empty class":
        (folder / "cats").mkdir()
    elif kind == "truncated parquet":
        (folder / "train.parquet").write_bytes(b"PAR1 and no more")


KINDS = (
    "no labels,truncated,wrong shape,other counts,no header,label 99,damaged gzip,nothing,no images,empty class,"
    "truncated parquet"
)


@pytest.mark.parametrize("kind", KINDS.split(","))
def test_bad_data(kind, tmp_path, refused):
    (tmp_path / "data").mkdir()
    broken_data(kind, tmp_path / "data")
    before = everything(tmp_path)
    message = refused(ddpm_unconditional.main, "train", "--data", tmp_path / "data", *TINY, "--out", tmp_path / "run")
    assert str(tmp_path / "data") in message  # it says where
    assert everything(tmp_path) == before


def test_data_that_is_not_there(tmp_path, refused):
    message = refused(ddpm.main, "train", "--data", tmp_path / "nowhere", *TINY, "--out", tmp_path / "run")
    assert "neither a folder nor one of fashion_mnist, cifar10, cifar10-64, landscapes" in message
    message = refused(ddpm.main, "train", "--data", "", *TINY, "--out", tmp_path / "run")
    assert "no data called ''" in message  # not the current folder


def test_conditional_training_needs_classes(tmp_path, refused):
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    message = refused(ddpm_conditional.main, "train", "--data", tmp_path, *TINY, "--out", tmp_path / "run")
    assert "no labels, which a conditional model needs" in message


def test_bad_folders_to_train_in(runs, idx_folder, tmp_path, refused, monkeypatch):
    flags = ["train", "--data", idx_folder, *TINY]
    assert "holds a run already" in refused(ddpm.main, *flags, "--out", runs / "plain")
    assert "started with lr = 0.001, not 0.5" in refused(
        ddpm.main, *flags, "--lr", 0.5, "--resume", "--out", runs / "plain"
    )
    same_shape = ["--patch", 1, "--mults", 1, 4, 8, "--no-attention"]
    error = refused(ddpm.main, *flags, *same_shape, "--resume", "--out", runs / "classes")
    assert "started with num_classes = 10" in error
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        assert str(tmp_path / "file") in refused(ddpm.main, *flags, "--out", out)
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    assert "a folder of its own" in refused(ddpm.main, *flags, "--out", "")  # not the current one
    assert everything(tmp_path) == {tmp_path / "file": b"mine"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "nowhere.safetensors"], "no checkpoint at nowhere.safetensors"),
        (["--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--n", 0], "--n"),
        (["--steps", 21], "--steps 21 is more than the model's 20 timesteps"),
        (["--steps", 0], "--steps"),
        (["--sampler", "euler"], "invalid choice"),
        (["--eta", 1.5], "--eta"),
        (["--sampler", "ddpm", "--eta", 1], "--eta is for --sampler ddim or dpm"),
        (["--sampler", "dpm", "--variance", "beta"], "--variance is for --sampler ddpm"),
        (["--cfg-scale", -1], "--cfg-scale"),
        (["--cfg-scale", "nan"], "--cfg-scale"),
        (["--cfg-interval", 3, 9], "--cfg-scale above 1"),
        (["--cfg-interval", 9, 3, "--cfg-scale", 2], "LOW is at most HIGH"),
        (["--start-from", "nowhere.png"], "nowhere.png is no readable image"),
        (["--strength", 0], "--strength"),
        (["--image-size", 10], "--image-size that 4 divides"),
        (["--labels", "10"], "label 10 is out of range: this checkpoint has the classes 0 to 9"),
        (["--labels", "0,-1"], "label -1 is out of range"),
        (["--labels", "cats"], "not 'cats'"),
        (["--labels", ""], "not ''"),
        (["--labels", "0,,1"], "--labels"),
        (["--out", "x.jpg"], ".png, .gif or .npz"),
        (["--out", "x"], ".png, .gif or .npz"),
        (["--batch-size", 0], "--batch-size"),
        (["--device", "cuda:77"], "no device"),
    ],
)
def test_bad_sample_flags(flags, message, classes, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", classes, "--out", tmp_path / "x.png", *flags]
    assert message in refused(ddpm_conditional.main, "sample", *flags)
    assert everything(tmp_path) == {}


def test_labels_of_a_checkpoint_without_classes(plain, tmp_path, refused):
    flags = ["sample", "--checkpoint", plain, "--out", tmp_path / "x.png", "--labels", "0"]
    assert "no classes" in refused(ddpm_conditional.main, *flags)


@pytest.mark.parametrize("suffix", ["png", "gif", "npz"])
def test_outputs_that_cannot_be_written(suffix, plain, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    (tmp_path / f"folder.{suffix}").mkdir()
    for out in (tmp_path / f"file/x.{suffix}", tmp_path / f"folder.{suffix}", Path(f"/proc/x.{suffix}")):
        message = refused(ddpm.main, "sample", "--checkpoint", plain, "--n", 1, "--steps", 1, "--out", out)
        assert f"cannot write {out}" in message
    assert {p.name for p in tmp_path.iterdir()} == {"file", f"folder.{suffix}"} and (
        tmp_path / "file"
    ).read_text() == "mine"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other architecture", "other classes", "text"])
def test_bad_checkpoints(damage, classes, tmp_path, refused):
    path, data = tmp_path / "model.safetensors", bytearray(classes.read_bytes())
    expected = "is not a checkpoint of this project, or it is damaged"
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[9] ^= 255
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("model")
    else:
        tensors, config = read_checkpoint(classes)
        name, value = {"other architecture": ("width", 16), "other classes": ("num_classes", 3)}[damage]
        config["model"][name] = value
        save_checkpoint(path, {"raw": select_weights(tensors, "raw", config)}, config)
        expected = (
            "does not fit the network: " + {"width": "time_mlp.0.weight", "num_classes": "label_emb.weight"}[name]
        )
    assert expected in refused(ddpm_conditional.main, "sample", "--checkpoint", path, "--out", tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()


def test_bad_publish(runs, tmp_path, refused):
    out = tmp_path / "x.safetensors"
    assert "the folder holds no run" in refused(ddpm.main, "publish", "--run", tmp_path, "--out", out)
    assert "must end in .safetensors" in refused(
        ddpm.main, "publish", "--run", runs / "plain", "--out", tmp_path / "x.pt"
    )
    flags = ["publish", "--run", runs / "plain", "--out", out]
    assert "has no ema_0.7 weights, only ema_0.5, ema_0.9, raw" in refused(ddpm.main, *flags, "--weights", "ema_0.7")
    assert everything(tmp_path) == {}


def test_bad_grid_and_sweep(plain, classes, tmp_path, refused, monkeypatch):
    flags = ["grid", "--out", tmp_path / "grid", "--only", "cosine_l4"]
    assert "invalid choice: 'cosine_l4'" in refused(ddpm_unconditional.main, *flags)
    flags[-1] = "linear_l2_10_epochs"
    for flag, text in (("--loss", "l1"), ("--epochs", 3)):
        assert f"linear_l2_10_epochs has its own {flag}" in refused(ddpm_unconditional.main, *flags, flag, text)
    assert "has its own --seed, 1" in refused(ddpm_unconditional.main, *flags, "linear_l2_seed1", "--seed", 3)
    assert "has its own --flip" in refused(ddpm_unconditional.main, *flags, "linear_l2_flip", "--no-flip")
    assert "has its own --epochs" in refused(ddpm_unconditional.main, *flags, "--minutes", 5)
    flags = ["sweep", "--checkpoint", plain, "--out", tmp_path / "x.json"]
    assert "no classes" in refused(ddpm_conditional.main, *flags)
    assert "nowhere" in refused(ddpm_conditional.main, *flags, "--checkpoint", tmp_path / "nowhere.safetensors")
    course = tmp_path / "course.pt"
    torch.save(UNet_conditional(num_classes=3, channels=1, width=4).state_dict(), course)
    assert "add --data" in refused(ddpm_conditional.main, *flags, "--checkpoint", course, "--weights", "raw")
    error = refused(
        ddpm_conditional.main, *flags, "--checkpoint", course, "--weights", "raw", "--data", "fashion_mnist"
    )
    assert "64 x 64" in error and "28 x 28" in error
    steps = ["--steps", 21]  # more than its timesteps
    assert "more than the model's 20 timesteps" in refused(
        ddpm_conditional.main, *flags, "--checkpoint", classes, *steps
    )
    (tmp_path / "x.json").write_text("{not json")
    assert "x.json" in refused(ddpm_conditional.main, *flags, "--checkpoint", classes)
    assert (tmp_path / "x.json").read_text() == "{not json"
    utils.write_json(tmp_path / "y.json", {"command": "another", "sha256": "of other weights", "rows": []})
    error = refused(ddpm_conditional.main, *flags[:-1], tmp_path / "y.json", "--checkpoint", classes)
    assert "other settings or weights" in error
    flags = ["sweep", "--checkpoint", classes]
    monkeypatch.setattr(evaluate, "evaluate_samples", lambda *_, **__: pytest.fail("refused only after the work"))
    assert "has no bogus" in refused(
        ddpm_conditional.main, *flags, "--weights", "raw", "bogus", "--out", tmp_path / "z.json"
    )
    assert "cannot write" in refused(ddpm_conditional.main, *flags, "--out", tmp_path)


def test_guidance_needs_labels(plain, classes, tmp_path, refused):
    flags = ["sample", "--cfg-scale", 3, "--out", tmp_path / "x.png", "--checkpoint"]
    assert "this checkpoint has no classes" in refused(ddpm_conditional.main, *flags, plain)
    assert "leave --labels none out" in refused(ddpm_conditional.main, *flags, classes, "--labels", "none")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--timesteps", 50], "--timesteps must be at least"),
        (["--n", 100], "make at least 129"),
        (["--image-size", 32], "32 x 32"),
        (["--data", "nowhere/fashion_mnist"], "no folder nowhere/fashion_mnist"),
    ],
)
def test_a_grid_that_could_not_be_measured_is_not_trained(flags, words, tmp_path, refused):
    assert words in refused(ddpm_unconditional.main, "grid", "--out", tmp_path / "grid", *flags)
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--seed", "--image-size"])
@pytest.mark.parametrize("text", ["9" * 400, "inf", "nan", "1e999"])
def test_absurd_numbers(flag, text, idx_folder, tmp_path, refused):
    assert flag in refused(ddpm.main, "train", "--data", idx_folder, "--out", tmp_path / "run", flag, text)


def test_a_published_part_of_the_averages_can_be_sampled(classes, runs, tmp_path, sampled):
    out = tmp_path / "part.safetensors"
    run(ddpm_conditional.main, "publish", "--run", runs / "classes", "--weights", "raw", "ema_0.9", "--out", out)
    images, _ = sampled(ddpm_conditional.main, "--checkpoint", out, "--n", 2)
    assert np.array_equal(sampled(ddpm_conditional.main, "--checkpoint", out, "--n", 2, "--ema")[0], images)


def test_samples_name_their_source(classes, tmp_path):
    run(ddpm_conditional.main, "sample", "--checkpoint", classes, "--n", 2, "--seed", 3, "--out", tmp_path / "x.npz")
    source = utils.samples_source(tmp_path / "x.npz")
    assert (source["checkpoint"], source["sha256"]) == (classes.name, utils.sha256(classes))
    assert (source["seed"], source["sampler"], source["steps"], source["eta"]) == (3, "ddim", 20, 0)
    assert source["weights"] == "ema_0.5"  # the run's first average
    assert (source["clip"], source["variance"]) == (True, None)
    ddpm_flags = ["--sampler", "ddpm", "--steps", 2, "--variance", "beta", "--no-clip"]
    run(ddpm_conditional.main, "sample", "--checkpoint", classes, "--n", 2, *ddpm_flags, "--out", tmp_path / "z.npz")
    source = utils.samples_source(tmp_path / "z.npz")
    assert (source["eta"], source["clip"], source["variance"]) == (None, False, "beta")  # DDPM has no eta
    utils.save_samples(tmp_path / "y.npz", torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert utils.samples_source(tmp_path / "y.npz") == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_as_a_script(script, monkeypatch, capsys):
    """What `python SCRIPT ...` does: no command, and an error that the script itself turns into a line."""
    for argv in ([], ["sample", "--checkpoint", "nowhere.safetensors", "--out", "/tmp/never-written.png"]):
        monkeypatch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        err = capsys.readouterr().err
        assert exit.value.code == 2 and len(err.splitlines()) == 1 and err.startswith(f"{script}: error: ")
