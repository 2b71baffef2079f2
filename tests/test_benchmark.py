"""The benchmark's two sides do the same work, to the tolerances stated here, and the command runs. No test times."""

import copy
import json
import os
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel

import benchmark
import image_data
import training
import utils
from ddpm import Diffusion, beta_schedule, ddpm_sampler
from ddpm_conditional import guided
from modules import EMA
from weights import build_model, save_checkpoint

POINT_1 = {"name": "PatchUNet", "channels": 1, "width": 8, "num_classes": 2}
COURSE = {"name": "UNet_conditional", "channels": 1, "width": 8, "num_classes": 10}


@pytest.fixture
def fashion(idx_folder, monkeypatch):
    """The benchmark's "fashion_mnist" is the tests' small folder."""
    monkeypatch.setattr(benchmark, "load_data", lambda name: image_data.load_data(idx_folder))


def randomise(model):
    """Move the weights away from their zeros, behind which a difference could hide."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return model


# --- both sides do the same ------------------------------------------------------------------------------------------


def test_the_plain_side_stores_attention_matrices_and_ours_does_not():
    def largest_kept():
        kept, model = [], build_model(COURSE)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            model(torch.randn(1, 1, 32, 32), torch.tensor([5]))
        return max(kept)

    matrix = 4 * 256**2  # 4 heads at 16 x 16, the first level with attention
    with sdpa_kernel(SDPBackend.MATH):
        assert largest_kept() >= matrix
    assert largest_kept() < matrix


def test_training_steps_end_with_the_same_weights(tiny_data):
    config = tiny_config(ema_betas=[benchmark.EMA_BETA], ema_start=0)
    # At width 8 a norm's group is one channel, which a bias before it cannot change: its gradient is rounding error
    # alone, and Adam, which divides by the gradient's size, would turn that into steps of full length.
    config["model"]["width"] = 16
    run = training.Run(config, tiny_data)
    randomise(run.model)
    model, ema_model = copy.deepcopy(run.model), EMA.copy_of(run.model)
    run.ema_models["ema_0.995"].load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)
    alphas_cumprod = (1 - beta_schedule("cosine", 20)).cumprod(0).float()
    for step, ours in zip(range(3), training.steps(run), strict=False):
        x0, t, noise, labels = training.draw_batch(tiny_data, config, step, run.diffusion)
        plain = benchmark.plain_step(model, ema_model, optimizer, alphas_cumprod, x0, t, noise, labels)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    assert run.step == 3
    for ours, plain in ((run.model, model), (run.ema_models["ema_0.995"], ema_model)):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (p - q).abs().mean() < 1e-5


@pytest.mark.parametrize("cfg_scale", [0.0, 3.0])
def test_plain_sampling_is_our_ddpm_without_clipping(cfg_scale):
    timesteps = 12
    model = randomise(build_model(POINT_1))
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    noises = torch.randn(timesteps, 2, 1, 8, 8)

    def draws():
        remaining = iter(noises)
        return lambda *like: next(remaining)

    betas = beta_schedule("linear", timesteps).float()
    *_, plain = benchmark.plain_sampler(model, x, betas, labels, cfg_scale, draws())
    eps_model = guided(model, labels, cfg_scale)
    with torch.no_grad():
        *_, ours = ddpm_sampler(Diffusion(timesteps), eps_model, x, draws(), timesteps, clip=False)
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_batches_are_the_same(fashion):
    data = benchmark.load_images(28)
    for i, (x0, labels) in zip(range(4), benchmark.plain_batches(data, 16, shuffle=False), strict=False):
        index = torch.arange(16 * i, 16 * i + 16)
        torch.testing.assert_close(x0, image_data.augment(data, index), rtol=0, atol=1e-6)
        assert labels.tolist() == data.labels[index].tolist()


# --- the command -----------------------------------------------------------------------------------------------------


class InThisProcess:
    """Stands in for a pool of one process, since the works themselves are what these tests run."""

    def __init__(self, *settings):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def small(fashion, monkeypatch, tmp_path):
    """Every comparison with small networks, few images and short turns."""
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(benchmark, "AT_LEAST", 0)
    monkeypatch.setattr(benchmark, "SAMPLES", 6)
    monkeypatch.setattr(benchmark.evaluate, "evaluate_samples", lambda images, data_name: {"frechet_distance": 0.5})
    for name in (benchmark.QUICK, benchmark.BEST, benchmark.GUIDED):
        config = tiny_config()
        config["data"]["image_size"] = 28
        if name != benchmark.GUIDED:
            del config["model"]["num_classes"]
        config["diffusion"]["timesteps"] = 100
        weights = {"ema_0.5": randomise(build_model(config["model"])).state_dict()}
        save_checkpoint(tmp_path / f"checkpoints/{name}.safetensors", weights, config)
    return tmp_path


@pytest.mark.parametrize("name", benchmark.SPEED)
def test_every_comparison_of_speed_runs(name, small, monkeypatch, capsys):
    what, unit, sides, settings, *amounts = benchmark.SPEED[name]
    if sides == benchmark.TRAIN:
        model, image_size, _ = settings
        settings = model | {"width": 8}, min(image_size, 32), 4
    monkeypatch.setitem(benchmark.SPEED, name, (what, unit, sides, settings, *amounts))
    benchmark.main(["--only", name, "--json-out", str(small / "result.json")])
    rows = json.loads((small / "result.json").read_text())["rows"]
    assert rows[0]["name"] == name and rows[0]["command"] == f"python benchmark.py --only {name}"
    for side in ("plain", "ours", "gain"):
        assert 0 < rows[0][side]["min"] <= rows[0][side]["median"] <= rows[0][side]["max"]
    assert what in capsys.readouterr().out


def test_samplers_are_compared_on_two_networks(small, monkeypatch):
    drawn = []

    def evaluate(images, data_name):
        drawn.append(bytes(images))
        return {"frechet_distance": 0.5}

    monkeypatch.setattr(benchmark.evaluate, "evaluate_samples", evaluate)
    rows = benchmark.compare_samplers("samplers")
    assert [row["name"] for row in rows] == ["samplers_grid_cosine_l2", "samplers_fashion_mnist"]
    for row in rows:
        assert list(row["samplers"]) == ["ddpm", "ddim, eta = 0", "dpm, eta = 0", "dpm, eta = 1"]
        assert all(list(points) == ["5", "10", "20", "50", "100"] for points in row["samplers"].values())
    assert len(set(drawn)) == len(drawn) == 40  # no two ways draw the same images


def test_minutes_are_steps_times_seconds_of_a_step(monkeypatch):
    def steps(run):
        for run.step in range(1, (run.total or 10**4) + 1):
            yield

    def our_run(model, data, batch_size, schedule="linear", steps=None, **settings):
        run = SimpleNamespace(step=0, total=steps, diffusion=None, model=torch.nn.Identity())
        run.ema_models = {"ema_0.995": run}
        return run

    monkeypatch.setattr(benchmark, "load_images", lambda size: range(60_000))
    monkeypatch.setattr(benchmark, "our_run", our_run)
    monkeypatch.setattr(training, "steps", steps)
    monkeypatch.setattr(benchmark, "distance", lambda model, *_, **options: 4000 / getattr(model, "step", 500))
    monkeypatch.setattr(
        benchmark, "measure_alone", lambda make, settings: (6 if make.func == benchmark.plain_training else 0.6, 1)
    )
    (row,) = benchmark.minutes_to_equal_quality("minutes")
    assert row["ours"]["median"] == pytest.approx(6)  # 600 steps, the first multiple of 200 at or below 8.0
    assert row["plain"]["median"] == pytest.approx(234.3)


def test_gains_are_formed_turn_by_turn():
    faster = benchmark.row("x", "x", "s", np.array([10.0, 40.0, 20.0]), np.array([5.0, 10.0, 2.0]))
    assert faster["gain"] == {"median": 4.0, "min": 2.0, "max": 10.0}
    assert benchmark.row("x", "x", "steps/s", np.array([2.0]), np.array([3.0]))["gain"]["median"] == 1.5


def test_only_rows_of_this_name_and_machine_are_replaced(tmp_path, monkeypatch):
    out, here = tmp_path / "result.json", benchmark.machine()
    rows = [{"name": "sample", "machine": "another"}, {"name": "sample", "machine": here}, {"name": "samplers_x"}]
    out.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(benchmark, "measure_alone", lambda make, settings: (2.0, 1.0))
    benchmark.main(["--only", "sample", "--json-out", str(out)])
    first, second, third = json.loads(out.read_text())["rows"]
    assert (first, third) == (rows[0], rows[2]) and second["machine"] == here and second["gain"]["median"] == 200


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_ends_with_one_line(refused, tmp_path):
    assert "'nonsense'" in refused(benchmark.main, "--only", "nonsense")
    (tmp_path / "bad.json").write_text("[]")
    assert "not a result" in refused(benchmark.main, "--json-out", tmp_path / "bad.json")
    assert "cannot write" in refused(benchmark.main, "--json-out", tmp_path)


@pytest.mark.parametrize("make, message", [("a_side_that_refuses", "no such data"), ("a_side_that_dies", "has died")])
def test_a_side_that_fails_in_its_own_process(make, message):
    with pytest.raises(utils.UserError, match=message):
        benchmark.measure_alone(globals()[make], ())


def a_side_that_refuses():
    raise utils.UserError("no such data")


def a_side_that_dies():
    os._exit(1)
