"""The benchmark's two sides do the same work, to the tolerances stated here, and the command runs. No test times."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel

import benchmark
import image_data
import training
import utils
from ddpm import Diffusion, beta_schedule, ddpm_sampler
from ddpm_conditional import guided
from modules import EMA
from weights import build_model

POINT_1 = {"name": "PatchUNet", "channels": 1, "width": 8, "num_classes": 2}
COURSE = benchmark.COURSE | {"width": 8}


@pytest.fixture(autouse=True)
def fashion(idx_folder, monkeypatch):
    """The benchmark's "fashion_mnist" is the tests' small folder."""
    monkeypatch.setattr(benchmark, "load_data", lambda name: image_data.load_data(idx_folder))


def test_the_plain_side_stores_attention_matrices_and_ours_does_not():
    def largest_kept():
        kept, model = [], build_model(COURSE)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            model(torch.randn(1, 1, 32, 32), torch.tensor([5]))
        return max(kept)

    matrix = 4 * 256**2  # 4 heads at 16 x 16, the first level with attention
    assert largest_kept() < matrix
    with sdpa_kernel(SDPBackend.MATH):
        assert largest_kept() >= matrix


def test_training_steps_end_with_the_same_weights(tiny_data):
    config = tiny_config(ema_betas=[benchmark.EMA_BETA], ema_start=0)
    # At width 8 a norm's group is one channel, which a bias before it cannot change: its gradient is rounding error
    # alone, and Adam, which divides by the gradient's size, would turn that into steps of full length.
    config["model"]["width"] = 16
    run = training.Run(config, tiny_data)
    model, ema_model = copy.deepcopy(randomise(run.model)), EMA.copy_of(run.model)
    run.ema_models["ema_0.995"].load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)
    alphas_cumprod = (1 - beta_schedule("cosine", 20)).cumprod(0).float()
    for step, ours in zip(range(3), training.steps(run), strict=False):
        x0, t, noise, labels = training.draw_batch(tiny_data, config, step, run.diffusion)
        plain = benchmark.plain_step(model, ema_model, optimizer, alphas_cumprod, x0, t, noise, labels)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    for ours, plain in ((run.model, model), (run.ema_models["ema_0.995"], ema_model)):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (p - q).abs().mean() < 1e-5


@pytest.mark.parametrize("cfg_scale", [0.0, 3.0])
def test_plain_sampling_is_our_ddpm_without_clipping(cfg_scale):
    model, x, labels = randomise(build_model(POINT_1)), torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    noises, betas = torch.randn(12, 2, 1, 8, 8), beta_schedule("linear", 12)
    draws = [lambda *like, remaining=iter(noises): next(remaining) for side in range(2)]
    *_, plain = benchmark.plain_sampler(model, x, betas.float(), labels, cfg_scale, draws[0])
    with torch.no_grad():
        *_, ours = ddpm_sampler(Diffusion(12), guided(model, labels, cfg_scale), x, draws[1], 12, clip=False)
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, tolerance", [(28, 1e-6), (56, 0.05)])  # PIL resizes in whole greys
def test_batches_are_the_same(size, tolerance):
    data = benchmark.load_images(size)
    for i, (x0, labels) in zip(range(4), benchmark.plain_batches(data, 16, shuffle=False), strict=False):
        index = torch.arange(16 * i, 16 * i + 16)
        torch.testing.assert_close(x0, image_data.augment(data, index), rtol=0, atol=tolerance)
        assert labels.tolist() == data.labels[index].tolist()


@pytest.mark.parametrize("name", ["train_default", "train_course_32", "sample", "guided"])
def test_every_comparison_runs(name, monkeypatch, tmp_path, capsys):
    what, unit, sides, settings, *amounts = benchmark.SPEED[name]
    settings = ({**settings[0], "width": 8}, settings[1], 4) if unit == "steps/s" else settings
    model, out = randomise(build_model(POINT_1)), tmp_path / "result.json"
    monkeypatch.setitem(benchmark.SPEED, name, (what, unit, sides, settings, *amounts))
    monkeypatch.setattr(benchmark, "measure_alone", benchmark.measure)
    monkeypatch.setattr(benchmark, "AT_LEAST", 0)
    monkeypatch.setattr(benchmark, "TURNS", 1)
    monkeypatch.setattr(benchmark, "IMAGE", (1, 8, 8))
    monkeypatch.setattr(benchmark, "load_model", lambda c, n: (model, Diffusion(20), torch.arange(n) % 2))
    benchmark.main(["--only", name, "--json-out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["command"] == f"python benchmark.py --only {name}"
    for side in (row["plain"], row["ours"], row["gain"]):
        assert 0 < side["min"] <= side["median"] <= side["max"]
    assert what in capsys.readouterr().out


def test_only_rows_of_this_name_and_machine_are_replaced(tmp_path, monkeypatch):
    out, here = tmp_path / "result.json", benchmark.machine()
    rows = [{"name": "sample", "machine": "another"}, {"name": "sample", "machine": here}, {"name": "samplers_x"}]
    out.write_text(json.dumps({"rows": rows}))
    seconds = iter([10.0, 5.0, 40.0, 10.0, 20.0, 2.0])
    monkeypatch.setattr(benchmark, "measure_alone", lambda make, settings: next(seconds))
    benchmark.main(["--only", "sample", "--json-out", str(out)])
    first, second, third = json.loads(out.read_text())["rows"]
    assert (first, third) == (rows[0], rows[2]) and second["machine"] == here
    assert second["gain"] == {"median": 800, "min": 400, "max": 2000}  # turn by turn, for 200 steps against one item


def test_minutes_are_steps_times_seconds_of_a_step(monkeypatch):
    def steps(run):
        for run.step in range(1, (run.total or 10**4) + 1):
            yield

    def our_run(*_, steps=None, **settings):
        run = SimpleNamespace(total=steps, diffusion=None, model=torch.nn.Identity())
        run.ema_models = {"ema_0.995": run}
        return run

    monkeypatch.setattr(benchmark, "load_images", lambda size: range(60_000))
    monkeypatch.setattr(benchmark, "our_run", our_run)
    monkeypatch.setattr(training, "steps", steps)
    monkeypatch.setattr(benchmark, "distance", lambda model, *_, **options: 4000 / getattr(model, "step", 500))
    monkeypatch.setattr(benchmark, "measure_alone", lambda make, _: 6 if make.func == benchmark.plain_training else 0.6)
    (row,) = benchmark.minutes_to_equal_quality("minutes")
    assert row["ours"]["median"] == pytest.approx(6)  # 600 steps, the first multiple of 200 at or below 8.0
    assert row["plain"]["median"] == pytest.approx(234.3)


def test_samplers_are_compared_by_steps(monkeypatch):
    def sample(model, n, shape, steps, **unused):  # brighter with more steps, for the stand-in of a distance
        return torch.full((n, *shape), steps / 127.5 - 1)

    monkeypatch.setattr(benchmark, "load_model", lambda *_: (None, SimpleNamespace(sample=sample), None))
    monkeypatch.setattr(benchmark.evaluate, "evaluate_samples", lambda x, data_name: {"frechet_distance": int(x.max())})
    (row,) = benchmark.compare_samplers("samplers")
    assert list(row["samplers"]) == ["ddpm", "ddim, eta = 0", "dpm, eta = 0", "dpm, eta = 1"]
    points = row["samplers"]["ddpm"]
    assert {steps: p["frechet_distance"] for steps, p in points.items()} == {str(s): s for s in (5, 10, 20, 50, 100)}


def test_bad_input_ends_with_one_line(refused, tmp_path):
    assert "'nonsense'" in refused(benchmark.main, "--only", "nonsense")
    (tmp_path / "bad.json").write_text("[]")
    assert "not a result" in refused(benchmark.main, "--json-out", tmp_path / "bad.json")
    assert "cannot write" in refused(benchmark.main, "--json-out", tmp_path)


def test_a_measuring_process_that_dies():
    with pytest.raises(utils.UserError, match="has died"):
        benchmark.measure_alone(os._exit, (1,))
