"""The benchmark's two sides do the same work, to the tolerances stated here, and the command runs. No test times."""

import json

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import image_data
import training
import utils
from ddpm import Diffusion, beta_schedule, guided
from modules import EMA
from weights import build_model, read_checkpoint, save_checkpoint

POINT_1 = {"name": "PatchUNet", "channels": 1, "width": 8, "num_classes": 2}
COURSE = {"name": "UNet_conditional", "channels": 3, "width": 8, "num_classes": 3}


@pytest.fixture
def fashion(idx_folder, monkeypatch):
    """The benchmark's "fashion_mnist" is the tests' small folder."""

    def load(name, *args, **settings):
        return image_data.load_data(idx_folder if name == "fashion_mnist" else name, *args, **settings)

    monkeypatch.setattr(benchmark, "load_data", load)


def randomise(model):
    """Move the weights away from their zeros, behind which a difference could hide."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return model


# --- both sides do the same ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [POINT_1, COURSE], ids=["point 1", "course"])
def test_stored_attention_changes_neither_predictions_nor_gradients(config):
    ours, plain = build_model(config), benchmark.plain_network(config)
    plain.load_state_dict(randomise(ours).state_dict())
    x, t, labels = torch.randn(2, config["channels"], 16, 16), torch.tensor([3, 700]), torch.tensor([1, 0])
    outputs = [model(x, t, labels) for model in (ours, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for model, output in zip((ours, plain), outputs, strict=True):
        output.square().sum().backward()
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (ours, plain)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_the_plain_network_really_stores_its_attention_matrices():
    def largest_kept(model):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            model(torch.randn(1, 3, 32, 32), torch.tensor([5]))
        return max(kept)

    matrix = 4 * (32 * 32) ** 2  # 4 heads at 32 x 32
    assert largest_kept(benchmark.plain_network(COURSE)) >= matrix > largest_kept(build_model(COURSE))


def test_training_steps_end_with_the_same_weights(tiny_data, tmp_path):
    config = tiny_config(ema_betas=[benchmark.EMA_BETA], ema_start=0)
    # At width 8 a norm's group is one channel, which a bias before it cannot change: its gradient is rounding error
    # alone, and Adam, which divides by the gradient's size, would turn that into steps of full length.
    config["model"]["width"] = 16
    run = training.Run(config, tiny_data, tmp_path, torch.device("cpu"), 0, 1, resume=False)
    model, ema_model, optimizer = benchmark.plain_state(config["model"], torch.device("cpu"))
    for module in (run.model, model):
        randomise(module)
    run.ema_models["ema_0.995"], ema_model = EMA.copy_of(run.model), EMA.copy_of(model)
    alphas_cumprod = (1 - beta_schedule("cosine", 20)).cumprod(0).float()
    for _ in range(3):
        x0, t, noise, labels = training.draw_batch(tiny_data, config, run.step, 20)
        plain = benchmark.plain_step(model, ema_model, optimizer, alphas_cumprod, x0, t, noise, labels)
        ours = run.train_step(run.model, accumulate=1)
        run.step += 1
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    for ours, plain in ((run.model, model), (run.ema_models["ema_0.995"], ema_model)):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (p - q).abs().mean() < 1e-5


@pytest.mark.parametrize("cfg_scale, variance", [(0.0, "posterior"), (3.0, "beta")])
def test_plain_sampling_is_our_ddpm_without_clipping(cfg_scale, variance):
    timesteps = 12
    model = randomise(build_model(POINT_1))
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    noises = torch.randn(timesteps, 2, 1, 8, 8)

    def draws():
        remaining = iter(noises)
        return lambda *like: next(remaining)

    betas = beta_schedule("linear", timesteps).float()
    plain = benchmark.plain_sample(model, x, betas, range(timesteps - 1, -1, -1), labels, cfg_scale, variance, draws())
    eps_model = guided(model, labels, cfg_scale)
    with torch.no_grad():
        *_, ours = Diffusion(timesteps).ddpm_sampler(eps_model, x, draws(), variance=variance, clip=False)
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_batches_of_fashion_mnist_are_the_same(fashion):
    loader = benchmark.plain_loader("fashion_mnist", 28, 16, shuffle=False)
    data = benchmark.our_data("fashion_mnist", 28)
    for i, (x0, labels) in enumerate(loader):
        index = torch.arange(16 * i, 16 * i + 16)
        torch.testing.assert_close(x0, image_data.augment(data, index), rtol=0, atol=1e-6)
        assert labels.tolist() == data.labels[index].tolist()


def test_crops_are_the_same_in_distribution(tmp_path):
    """Many crops of one photograph, flipped or not: the mean and the spread of every pixel agree."""
    benchmark.make_photographs(tmp_path / "photographs", 20)
    for path in (tmp_path / "photographs").glob("*/*.jpg"):
        if path.name != "3.jpg":
            (path.parent / path.name).write_bytes((tmp_path / "photographs/class_3/3.jpg").read_bytes())
    source = str(tmp_path / "photographs")
    loader = benchmark.endless(benchmark.plain_loader(source, 32, 20))
    torch.manual_seed(0)
    plain = torch.cat([next(loader)[0] for _ in range(30)])
    ours = benchmark.our_batches(source, 32, 20)
    ours = torch.cat([ours() for _ in range(30)])
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    assert (ours.mean(0) - plain.mean(0)).abs().mean() < 0.03
    assert (ours.std(0) - plain.std(0)).abs().mean() < 0.03


# --- the command -----------------------------------------------------------------------------------------------------


class InProcess(benchmark.Side):
    """A side without a process of its own: the works themselves are what these tests run."""

    def __init__(self, prepare, settings, at_least):
        self.work = prepare(**settings)

    def measure(self):
        return benchmark.timed(self.work, 1)

    def finish(self):
        return {"work": 1, "process": 1}


@pytest.mark.parametrize("name", [name for name in benchmark.BENCHMARKS if name != "train_course_64"])  # quick: as _32
def test_every_comparison_runs(name, fashion, monkeypatch, tmp_path):
    def without_torchrun(folder, effort, settings):
        benchmark.time_one_process(settings, tmp_path / "process", 1)
        seconds = json.loads((tmp_path / "process/seconds.json").read_text())
        return {1: [seconds], 2: [seconds]}

    monkeypatch.setattr(benchmark, "Side", InProcess)
    monkeypatch.setattr(benchmark, "time_processes", without_torchrun)
    (tmp_path / "process").mkdir()
    out = tmp_path / "result.json"
    benchmark.main(["--quick", "--only", name, "--json-out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert rows
    for row in rows:
        for side in row.get("points", {key: row.get(key) for key in ("plain", "ours", "gain")}).values():
            assert 0 < side["min"] <= side["median"] <= side["max"]


def test_the_command_with_real_processes_keeps_earlier_rows(tmp_path, capsys):
    out = tmp_path / "result.json"
    earlier = {"name": "earlier", "what": "measured before"}
    out.write_text(json.dumps({"machine": benchmark.machine_facts(), "rows": [earlier]}))
    benchmark.main(["--quick", "--only", "data_crops", "--json-out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["earlier", "data_crops"]
    assert rows[0] == earlier and rows[1]["turns"] == benchmark.QUICK["repeats"]
    assert "random crops" in capsys.readouterr().out


def test_times_of_another_machine_are_dropped(tmp_path):
    out = tmp_path / "result.json"
    machine = benchmark.machine_facts()
    another = machine | {"cpu": "another"}
    names = ["sample", "quality_sample_grid_cosine_l2_T200", "samplers_fashion_mnist"]
    out.write_text(json.dumps({"machine": another, "rows": [{"name": name} for name in names]}))
    recorded, rows = benchmark.earlier_rows(out, machine, ["sample", "quality_sample"])
    assert recorded == machine and list(rows) == names[1:]
    recorded, rows = benchmark.earlier_rows(out, machine, ["quality_sample"])  # no time is added
    assert recorded == another and list(rows) == names


def test_the_command_measures_the_rows_that_are_there():
    default = ["train_28", "train_28_memory", *benchmark.BENCHMARKS]
    assert benchmark.command_for(default) == "python benchmark.py"
    assert (
        benchmark.command_for(["sample", "samplers", "growth_size"])
        == "python benchmark.py --only sample growth samplers"
    )


def test_gains_are_formed_turn_by_turn():
    faster = benchmark.table_row("x", "x", "s", [10.0, 40.0, 20.0], [5.0, 10.0, 2.0], lower_is_better=True)
    assert faster["gain"] == {"median": 4.0, "min": 2.0, "max": 10.0}
    higher = benchmark.table_row("x", "x", "steps/s", [2.0], [3.0])
    assert higher["gain"]["median"] == 1.5


def test_flops_of_a_step_are_three_times_those_of_the_forward_pass():
    model = build_model(POINT_1)
    with FlopCounterMode(display=False) as forward:
        model(torch.zeros(2, 1, 16, 16), torch.zeros(2).long())
    # less than three times, since no gradient with respect to the images is needed
    assert 2.5 < benchmark.training_flops(POINT_1, 16, 2) / forward.get_total_flops() <= 3


# --- quality: what is resumed, what is compared ----------------------------------------------------------------------


@pytest.fixture
def quality(monkeypatch, tmp_path):
    """Quality runs of 6 samples in a temporary folder, with one distance for all samples."""
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "QUALITY_RUNS", tmp_path / "runs")
    monkeypatch.setattr(benchmark, "SAMPLES", 6)
    monkeypatch.setattr(benchmark, "GUIDED_SAMPLES", 6)
    monkeypatch.setattr(benchmark, "SHAPE_SAMPLES", 6)
    monkeypatch.setattr(benchmark, "GUIDED_STEPS", 3)
    result = {"frechet_distance": 6.0, "samples": 6}
    monkeypatch.setattr(benchmark, "distance", lambda images: result if len(images) == 6 else None)
    return tmp_path


def test_interrupted_sampling_goes_on(quality):
    made = []

    def sample_batch(indices):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(list(indices))
        return torch.full((len(indices), 1, 4, 4), 0.0)

    with pytest.raises(KeyboardInterrupt):
        benchmark.cached_samples("run", 7, sample_batch, batch_size=3)
    first = list(made)
    made.clear()
    images = benchmark.cached_samples("run", 7, sample_batch, batch_size=3)
    assert first + made == [[0, 1, 2], [3, 4, 5], [6]] and images.shape == (7, 4, 4, 1)


def test_guided_quality_compares_one_checkpoint_with_itself(quality):
    config = tiny_config()
    config["model"]["num_classes"] = 10
    model = randomise(build_model(config["model"]))
    path = quality / "checkpoints/fashion_mnist_conditional_20_epochs.safetensors"
    save_checkpoint(path, {"raw": model.state_dict(), "ema_0.5": model.state_dict()}, config)
    (row,) = benchmark.quality_guided("quality_guided", benchmark.QUICK, None)
    plain, ours = row["details"]["plain"], row["details"]["ours"]
    assert plain["sha256"] == ours["sha256"] and (plain["steps"], ours["steps"]) == (19, 3)
    assert row["gain"]["median"] == 1


def test_samplers_are_compared_on_one_network(quality, capsys):
    config = tiny_config()
    del config["model"]["num_classes"]
    config["diffusion"]["timesteps"] = 100
    model = randomise(build_model(config["model"]))
    save_checkpoint(quality / "checkpoints/grid_cosine_l2.safetensors", {"ema_0.5": model.state_dict()}, config)
    (row,) = benchmark.quality_samplers("samplers", benchmark.QUICK, None)
    assert {name: list(points) for name, points in row["samplers"].items()} == {
        "ddpm": [5, 10, 20, 50, 100]
    } | dict.fromkeys(("ddim, eta = 0", "dpm, eta = 0", "dpm, eta = 1"), [5, 10, 20, 50])
    made = {path.parent.name: path.read_bytes() for path in (quality / "runs").rglob("*.npz")}
    assert len(made) == 17 and len(set(made.values())) == 17  # no two ways draw the same images
    assert (
        row["name"] == "samplers_grid_cosine_l2" and "fashion_mnist.safetensors is not there" in capsys.readouterr().err
    )
    benchmark.print_row(row)
    assert "dpm, eta = 1" in capsys.readouterr().out


def test_without_checkpoints_there_are_no_quality_rows(quality, capsys):
    assert benchmark.quality_sampling("quality_sample", benchmark.QUICK, None) == []
    assert "grid_cosine_l2.safetensors is not there" in capsys.readouterr().err


def test_training_for_quality_goes_on_and_is_not_measured_twice(quality, tiny_data):
    config = tiny_config(steps=2)
    del config["model"]["num_classes"]
    for steps in (2, 4, 2):  # a rerun asks for the earlier steps again
        config["train"]["steps"] = steps
        assert benchmark.train_and_measure("ours", config, tiny_data, "ema")["samples"] == 6
    tensors, _ = read_checkpoint(quality / "runs/ours/model.safetensors")
    assert len(tensors["losses"]) == 4


def test_minutes_are_steps_times_seconds_of_a_step(quality, monkeypatch):
    def reached(name, config, data, kind):
        steps = config["train"]["steps"]
        return {"frechet_distance": 8.0 if name == "convnext" else 4000 / steps, "samples": 6}

    data = image_data.ImageData(torch.empty(60_000, 1, 1, 1), None, [], "fashion_mnist", False, 1)
    monkeypatch.setattr(benchmark, "load_data", lambda name: data)
    monkeypatch.setattr(benchmark, "train_and_measure", reached)
    monkeypatch.setattr(benchmark, "take_turns", lambda *args, **settings: ({"plain": [6.0], "ours": [0.6]}, {}))
    (row,) = benchmark.quality_minutes("quality_minutes", benchmark.QUICK, None)
    assert row["details"]["ours"]["steps"] == 600  # the first multiple of 200 at or below 8.0
    assert row["plain"]["median"] == pytest.approx(2343 * 0.1) and row["ours"]["median"] == pytest.approx(6)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_ends_with_one_line(refused, tmp_path):
    assert "'nonsense'" in refused(benchmark.main, "--only", "nonsense")
    (tmp_path / "bad.json").write_text("[]")
    assert "not a result" in refused(benchmark.main, "--quick", "--json-out", tmp_path / "bad.json")
    assert "cannot write" in refused(benchmark.main, "--quick", "--json-out", tmp_path)


def a_side_that_refuses():
    raise utils.UserError("no such data")


def test_a_side_that_fails_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(benchmark.signal, "signal", lambda *handler: None)  # this process keeps its Ctrl-C
    side = object.__new__(benchmark.Side)
    side.pipe, theirs = benchmark.SPAWN.Pipe()
    benchmark.serve(theirs, a_side_that_refuses, {}, 0.0)
    with pytest.raises(utils.UserError, match="no such data"):
        side.receive()
    theirs.close()  # as if the process were gone
    with pytest.raises(utils.UserError, match="has died"):
        side.receive()
