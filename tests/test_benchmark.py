"""The benchmark's two sides do the same work, to the tolerance stated here, and the command runs. No test looks at a time."""

import json

import pytest
import torch
from conftest import tiny_config

import benchmark
import training
import utils
from ddpm import Diffusion, beta_schedule
from modules import EMA

POINT_1 = {"name": "PatchUNet", "channels": 1, "width": 8, "num_classes": 2}
COURSE = {"name": "UNet_conditional", "channels": 3, "width": 8, "num_classes": 3}


@pytest.fixture
def fashion(idx_folder, monkeypatch):
    """The benchmark's "fashion_mnist" is the tests' small folder."""
    def load(name, *args, **settings):
        return utils.load_data(idx_folder if name == "fashion_mnist" else name, *args, **settings)

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
    ours, plain = training.build_model(config), benchmark.plain_network(config)
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
    assert largest_kept(benchmark.plain_network(COURSE)) >= matrix > largest_kept(training.build_model(COURSE))


def test_training_steps_end_with_the_same_weights(tiny_data, tmp_path):
    config = tiny_config(ema_betas=[benchmark.EMA_BETA], ema_start=0)
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
            # Adam divides a gradient by its size: one that is nearly zero takes its sign from rounding
            assert (p - q).abs().mean() < 1e-5 and (p - q).abs().max() < 1e-3


@pytest.mark.parametrize("cfg_scale, variance", [(0.0, "posterior"), (3.0, "beta")])
def test_plain_sampling_is_our_ddpm_without_clipping(cfg_scale, variance):
    timesteps = 12
    model = randomise(training.build_model(POINT_1))
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    noises = torch.randn(timesteps, 2, 1, 8, 8)

    def draws():
        remaining = iter(noises)
        return lambda *like: next(remaining)

    betas = beta_schedule("linear", timesteps).float()
    plain = benchmark.plain_sample(model, x, betas, range(timesteps - 1, -1, -1), labels, cfg_scale, variance, draws())
    from ddpm import guided

    with torch.no_grad():
        sampler = Diffusion(timesteps).ddpm_sampler(guided(model, labels, cfg_scale), x, draws(), None, variance, False)
        *_, ours = sampler
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)


def test_batches_of_fashion_mnist_are_the_same(fashion):
    loader = benchmark.plain_loader("fashion_mnist", 28, 16, shuffle=False)
    data = benchmark.our_data("fashion_mnist", 28)
    for i, (x0, labels) in enumerate(loader):
        index = torch.arange(16 * i, 16 * i + 16)
        torch.testing.assert_close(x0, utils.augment(data, index), rtol=0, atol=1e-6)
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


@pytest.mark.parametrize("name", [name for name in benchmark.BENCHMARKS])
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


def test_rows_of_another_machine_are_dropped(tmp_path):
    out = tmp_path / "result.json"
    machine = benchmark.machine_facts()
    out.write_text(json.dumps({"machine": machine | {"cpu": "another"}, "rows": [{"name": "earlier"}]}))
    assert benchmark.earlier_rows(out, machine) == {}


def test_gains_are_formed_turn_by_turn():
    faster = benchmark.table_row("x", "x", "s", [10.0, 40.0, 20.0], [5.0, 10.0, 2.0], lower_is_better=True)
    assert faster["gain"] == {"median": 4.0, "min": 2.0, "max": 10.0}
    higher = benchmark.table_row("x", "x", "steps/s", [2.0], [3.0])
    assert higher["gain"]["median"] == 1.5


def test_flops_of_a_step_are_three_times_those_of_the_forward_pass():
    """A single 3x3 convolution by hand: 2 x 9 x in x out per pixel forward, and as much again for each gradient."""
    narrow, wide = (benchmark.training_flops({"name": "PatchUNet", "channels": 1, "width": w}, 28, 2) for w in (32, 64))
    assert 3 < wide / narrow < 4.2
    batch = [benchmark.training_flops(COURSE, 32, n) for n in (1, 3)]
    assert batch[1] == pytest.approx(3 * batch[0], rel=0.01)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_ends_with_one_line(refused, tmp_path):
    assert "'nonsense'" in refused(benchmark.main, "--only", "nonsense")
    (tmp_path / "bad.json").write_text("[]")
    assert "not a result" in refused(benchmark.main, "--quick", "--json-out", tmp_path / "bad.json")
    assert "cannot write" in refused(benchmark.main, "--quick", "--json-out", tmp_path)


def a_side_that_dies():
    raise SystemExit(3)


def a_side_that_refuses():
    raise utils.UserError("no such data")


def test_a_side_that_fails_is_one_clear_error():
    with pytest.raises(utils.UserError, match="has died"):
        benchmark.Side(a_side_that_dies, {}, 0.0)
    with pytest.raises(utils.UserError, match="no such data"):
        benchmark.Side(a_side_that_refuses, {}, 0.0)
