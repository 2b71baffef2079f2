"""The loop and its files: same seed same bits, exact resume, several processes, and every way a run can break."""

import copy
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, tiny_config
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

import training
import utils
from ddpm import Diffusion
from training import locked, train
from utils import UserError
from weights import STATES, build_model, load_checkpoint, load_state, save_state


def contents(folder):
    """The finished model's file, and everything in the last state: equal contents are equal runs."""
    state, path = load_state(folder)
    assert path.stat().st_size > 0
    return (folder / "model.safetensors").read_bytes(), state


def assert_same(one, other):
    """Equal, bit for bit, in whatever containers."""
    (ours, structure), (theirs, other_structure) = tree_flatten(one), tree_flatten(other)
    assert structure == other_structure
    for a, b in zip(ours, theirs, strict=True):
        same = a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, (a, b)


def no_leftovers(folder):
    """No temporary file of an interrupted write."""
    return [p.name for p in Path(folder).rglob(".*") if p.name != ".lock"] == []


def before_each_batch(patch, action):
    """action(step) is called before a step's batch is drawn."""
    draw_batch = training.draw_batch

    def draw(data, config, step, diffusion):
        action(step)
        return draw_batch(data, config, step, diffusion)

    patch.setattr(training, "draw_batch", draw)


@pytest.fixture
def interrupt(tiny_data):
    """interrupt(folder, *steps): a run to which a signal comes while it makes the batch of each step; its states."""

    def run(folder, *steps, number=signal.SIGTERM, **settings):
        for step in steps:
            with pytest.MonkeyPatch.context() as patch:
                before_each_batch(patch, lambda k, step=step: k == step and os.kill(os.getpid(), number))
                # on a busy machine seconds pass, after which a run saves of its own accord
                patch.setattr(training.RunFolder, "save_is_due", lambda self: False)
                with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step + 1}; .*--resume"):
                    train(tiny_config(**settings), tiny_data, folder, resume=True)
        return sorted(folder.glob("state_*.pt"))

    return run


# --- same seed, same bits --------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    tensors = load_file(finished / "model.safetensors")
    assert {name.split("/")[0] for name in tensors} == {"raw", "ema_0.5", "ema_0.9", "losses"}
    assert tensors["losses"].shape == (12,) and tensors["losses"].isfinite().all()
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 12
    assert 1 <= len(list(finished.glob("state_*.pt"))) <= 2 and no_leftovers(finished)


def test_one_seed_one_run(finished, tiny_data, tmp_path):
    """Whatever state the global generator is in, and with or without sample grids."""
    torch.manual_seed(99)
    torch.rand(7)
    train(tiny_config(), tiny_data, tmp_path / "same", sample_every=5)
    assert_same(contents(tmp_path / "same"), contents(finished))
    assert [p.name for p in sorted(tmp_path.glob("same/*.png"))] == ["samples_00000005.png", "samples_00000010.png"]
    train(tiny_config(seed=1), tiny_data, tmp_path / "other")
    assert contents(tmp_path / "other")[0] != contents(finished)[0]


def test_a_run_needs_no_folder(finished, tiny_data):
    """The loop alone, as a notebook uses it: the same weights and losses, and it goes on from wherever it was left."""
    run = training.Run(tiny_config(), tiny_data)
    losses = [loss.item() for _, loss in zip(range(5), training.steps(run))]
    assert run.step == 5
    losses += [loss.item() for loss in training.steps(run)]
    tensors = load_file(finished / "model.safetensors")
    assert losses == tensors["losses"].tolist() and run.step == 12
    for kind, model in {"raw": run.model, **run.ema_models}.items():
        assert all(torch.equal(w, tensors[f"{kind}/{name}"]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_plain_loop_is_the_same_run(tiny_data, tmp_path, optimizer):
    """The loop against one written out here: per-tensor averages, an unfused optimizer, contiguous tensors."""
    lr = 0.05 if optimizer == "sgd" else 1e-3
    config = tiny_config(optimizer=optimizer, loss="l2", lr=lr)
    train(copy.deepcopy(config), tiny_data, tmp_path)
    torch.manual_seed(0)
    model = build_model(config["model"])
    average, losses = copy.deepcopy(model), []
    step_of = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    optim = step_of(model.parameters(), lr=lr, foreach=False)
    diffusion = Diffusion(20, "cosine")
    for step in range(12):
        x0, t, noise, labels = training.draw_batch(tiny_data, config, step, diffusion)
        a = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        loss = ((model(x_t, t, labels) - noise) ** 2).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        with torch.no_grad():
            for p, q in zip(average.parameters(), model.parameters(), strict=True):
                p.copy_(q if step < 2 else 0.9 * p + 0.1 * q)
        losses.append(loss.item())
    ours = load_file(tmp_path / "model.safetensors")["losses"]
    torch.testing.assert_close(ours, torch.tensor(losses), rtol=1e-3, atol=0)
    if optimizer == "sgd":  # Adam makes whole steps of gradients that are only rounding errors
        ours, _, _ = load_checkpoint(tmp_path / "model.safetensors", "ema_0.9")
        for (name, p), q in zip(average.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)


# --- random draws ----------------------------------------------------------------------------------------------------


def test_every_epoch_shows_every_image_once():
    for batch_size in (7, 8, 100):
        shown = torch.cat([training.draw_indices(3, step, batch_size, 40) for step in range(280 // batch_size + 1)])
        epochs = shown[: len(shown) // 40 * 40].view(-1, 40)
        assert (epochs.sort(1)[0] == torch.arange(40)).all()
        assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(training.draw_indices(3, 0, 40, 40), training.draw_indices(4, 0, 40, 40))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_drawn_ahead_are_the_same(tiny_data, device):
    """Beside a GPU, where they are drawn in threads."""
    run = SimpleNamespace(step=7, device=torch.device(device), data=tiny_data, config=tiny_config())
    run.diffusion = Diffusion(20)
    for step, batch in zip(range(7, 17), training.draw_batches(run), strict=False):
        assert_same(batch, training.draw_batch(tiny_data, run.config, step, run.diffusion))


def test_draws_of_a_step(tiny_data):
    config = tiny_config(batch_size=4000, p_uncond=0.2)
    x0, t, noise, labels = training.draw_batch(tiny_data, config, 3, Diffusion(20))
    again = training.draw_batch(tiny_data, config, 3, Diffusion(20))
    assert all(torch.equal(a, b) for a, b in zip((x0, t, noise, labels), again, strict=True))
    assert not torch.equal(training.draw_batch(tiny_data, config, 4, Diffusion(20))[2], noise)
    assert x0.min() >= -1 and x0.max() <= 1 and noise.std().sub(1).abs() < 0.01
    assert t.bincount().shape == (20,) and t.bincount().min() > 120  # 200 expected, standard deviation 14
    dropped = labels == -1
    assert abs(dropped.float().mean() - 0.2) < 0.03
    brighter_right = x0[..., 4:].mean((1, 2, 3)) > x0[..., :4].mean((1, 2, 3))
    assert torch.equal(labels[~dropped] == 1, brighter_right[~dropped])  # a kept label is its image's own


def test_label_dropout_of_whole_batches(tiny_data):
    config = tiny_config(label_dropout="batch", p_uncond=0.3)
    whole = [training.draw_batch(tiny_data, config, step, Diffusion(20))[3] == -1 for step in range(300)]
    assert all(dropped.all() or not dropped.any() for dropped in whole)
    assert abs(sum(dropped[0].item() for dropped in whole) / 300 - 0.3) < 0.1


def test_timesteps_drawn_by_the_bounds_weights(tiny_data):
    """In proportion to them; so the mean gradient is the weighted loss's, divided by the weights' mean."""
    config, diffusion = tiny_config(batch_size=20_000, timestep_sampling="vlb"), Diffusion(20)
    shares = training.draw_batch(tiny_data, config, 0, diffusion)[1].bincount(minlength=20) / 20_000
    torch.testing.assert_close(shares, diffusion.vlb_weights / diffusion.vlb_weights.sum(), atol=0.01, rtol=0)
    config["train"]["timestep_sampling"] = "laplace"
    with pytest.raises(ValueError, match="choose from uniform, vlb"):
        training.draw_batch(tiny_data, config, 0, diffusion)


@pytest.mark.parametrize("cooldown, rates", [(0, [8] * 8), (0.5, [8] * 5 + [6, 4, 2]), (1, [8, 7, 6, 5, 4, 3, 2, 1])])
def test_cooldown(cooldown, rates):
    settings = {"lr": 8.0, "cooldown": cooldown, "steps": 8}
    assert [training.learning_rate(settings, step) for step in range(8)] == rates
    assert training.learning_rate(settings | {"steps": None}, 7) == 8  # --minutes, not yet measured


# --- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_again_and_again_is_the_same_run(finished, tiny_data, tmp_path, interrupt, number):
    before = signal.getsignal(signal.SIGTERM)
    for step in (0, 1, 5, 11):
        assert len(interrupt(tmp_path, step, number=number)) == 2 and not (tmp_path / "model.safetensors").exists()
    train(tiny_config(), tiny_data, tmp_path, resume=True)
    assert_same(contents(tmp_path), contents(finished))
    assert signal.getsignal(signal.SIGTERM) == before  # the handlers are gone with the run


def test_a_second_signal_interrupts_at_once(tiny_data, tmp_path, monkeypatch):
    before_each_batch(monkeypatch, lambda _: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), tiny_data, tmp_path)
    assert load_state(tmp_path)[0]["step"] == 0


def test_resume_from_a_periodic_state(finished, tiny_data, tmp_path, monkeypatch):
    """Killed without notice: what is lost is only what came after the last state."""
    drawn = []

    def kill(step):
        drawn.append(step)
        if step == 9:
            raise SystemExit("killed")

    before_each_batch(monkeypatch, kill)
    monkeypatch.setattr(training.RunFolder, "save_is_due", lambda self: drawn[-1] in (3, 4))
    with pytest.raises(SystemExit):
        train(tiny_config(), tiny_data, tmp_path)
    assert [int(p.name.split("_")[1]) for p in sorted(tmp_path.glob("state_*"))] == [4, 5]
    monkeypatch.undo()
    train(tiny_config(), tiny_data, tmp_path, resume=True)
    assert_same(contents(tmp_path), contents(finished))


def test_resume_to_more_steps_is_the_longer_run(finished, tiny_data, tmp_path):
    train(tiny_config(steps=5), tiny_data, tmp_path)
    train(tiny_config(steps=12), tiny_data, tmp_path, resume=True)
    assert_same(contents(tmp_path), contents(finished))


def test_states_of_older_versions_go_on(finished, tiny_data, tmp_path, interrupt):
    """They lack the newer settings, and their losses are as long as the run, with NaN for the steps to come."""
    interrupt(tmp_path, 6)
    state, path = load_state(tmp_path)
    config = json.loads(state["config"])
    del config["train"]["cooldown"], config["train"]["timestep_sampling"]
    losses = torch.cat([state["losses"], torch.full((5,), float("nan"))])
    save_state(tmp_path, state | {"config": json.dumps(config), "losses": losses}, [path])
    path.unlink()
    train(tiny_config(), tiny_data, tmp_path, resume=True)
    assert_same(contents(tmp_path), contents(finished))


def test_minutes(tiny_data, tmp_path, monkeypatch, capsys):
    """20 steps of 2 s each are timed: 1 minute is 30 steps. An interrupted run has the same length."""
    now, stop_at = [0.0], []

    def take_two_seconds(step):
        now[0] += 2.0
        if step in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))
    before_each_batch(monkeypatch, take_two_seconds)
    train(tiny_config(steps=None), tiny_data, tmp_path / "whole", minutes=1)
    assert load_state(tmp_path / "whole")[0]["step"] == 30
    for step in (12, 25):  # before the length is known, and after
        stop_at[:] = [step]
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(steps=None), tiny_data, tmp_path / "parts", resume=True, minutes=1)
    stop_at.clear()
    train(tiny_config(steps=None), tiny_data, tmp_path / "parts", resume=True, minutes=1)
    assert contents(tmp_path / "parts")[0] == contents(tmp_path / "whole")[0]
    train(tiny_config(steps=None), tiny_data, tmp_path / "whole", resume=True, minutes=2)
    err = capsys.readouterr().err
    assert "going on from step 30 of 30 (more --epochs make it longer)" in err and "a run of 30 steps" in err
    train(tiny_config(steps=None), tiny_data, tmp_path / "short", minutes=0.5)  # as 15 steps would take
    assert "a run of 20 steps" in capsys.readouterr().err
    assert load_state(tmp_path / "short")[0]["step"] == 20


def test_a_stop_is_heeded_within_a_sample_grid(tiny_data, tmp_path, monkeypatch):
    trajectory = Diffusion.trajectory

    def interrupted(self, *args, **options):
        for i, x in enumerate(trajectory(self, *args, **options)):
            assert i < 4, "the grid went on"
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield x

    monkeypatch.setattr(Diffusion, "trajectory", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5"):
        train(tiny_config(), tiny_data, tmp_path, sample_every=5)
    assert not list(tmp_path.glob("samples*"))


def test_compile_without_a_compiler(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=torch._dynamo.exc.TorchDynamoException("no compiler")))
    with pytest.raises(UserError, match="leave --compile out"):
        train(tiny_config(), tiny_data, tmp_path / "run", compiled=True)


def test_sigterm_to_a_real_process(idx_folder, tmp_path):
    flags = "--image-size 8 --width 8 --batch-size 8 --timesteps 10 --device cpu --epochs 500"
    command = [sys.executable, ROOT / "ddpm_unconditional.py", "train", "--data", idx_folder, *flags.split()]
    process = subprocess.Popen([*command, "--out", tmp_path], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("state_*.pt")):  # with the first it is about to train
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "Traceback" not in err
    assert "--resume goes on from there" in err.splitlines()[-1] and load_state(tmp_path)[0]["step"] < 4000


# --- the same training in other ways ---------------------------------------------------------------------------------


def close_to(folder, reference, rtol=1e-4, atol=1e-5):
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, reference))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_is_plain(tiny_data, tmp_path):
    """SGD, so that a small difference of the gradients stays a small difference of the weights."""
    config = tiny_config(optimizer="sgd", lr=0.05)
    train(copy.deepcopy(config), tiny_data, tmp_path / "plain")
    for parts in (2, 8):
        train(copy.deepcopy(config), tiny_data, tmp_path / f"{parts}", accumulate=parts)
        close_to(tmp_path / f"{parts}", tmp_path / "plain")


WORKER = """
def config(): return tiny_config(optimizer="sgd", lr=0.05)
training.train(config(), data, out + "/two")
training.train(config(), data, out + "/resumed", resume=True, accumulate=2)
"""


BEGINNING = """
import atexit, contextlib, os, sys, torch
from pathlib import Path
@atexit.register  # before training's own, so that it runs after it
def threads():
    left = [name for file in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := file.read_text())]
    os.write(1, f"left {{left}}\\n".encode())  # in one piece: two processes write here
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
from conftest import tiny_config
import training
from image_data import ImageData
from utils import UserError, command_line

out = {out!r}
data = ImageData(**torch.load(out + "/data.pt"))
"""


def run_two_processes(folder, data, program):
    """torchrun's two processes of a program, finished; `training`, `data` and `out`, the folder, are there for it."""
    torch.save(vars(data), folder / "data.pt")
    beginning = BEGINNING.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(folder))
    (folder / "worker.py").write_text(beginning + program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, folder / "worker.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def test_two_processes_are_one(tiny_data, tmp_path, interrupt):
    """torchrun with two gloo processes, against one process with the same global batch: and going on, with
    accumulation, with what one process began."""
    settings = {"optimizer": "sgd", "lr": 0.05}
    train(tiny_config(**settings), tiny_data, tmp_path / "one")
    interrupt(tmp_path / "resumed", 5, **settings)
    done = run_two_processes(tmp_path, tiny_data, WORKER)
    assert done.returncode == 0, done.stderr
    for name in ("two", "resumed"):
        close_to(tmp_path / name, tmp_path / "one")
        assert len(list((tmp_path / name).glob("state_*.pt"))) == 2 and no_leftovers(tmp_path / name)
    assert done.stdout.count("left []") == 2  # a thread of gloo's that outlives the group may abort the process


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": 2e-3}, "was started with lr = 0.001, not 0.002: --resume goes on with the same settings and images"),
        ({"ema_betas": [0.5]}, "was started with ema_betas = "),
        ({"width": 16}, "was started with width = 8"),
        ({"schedule": "linear"}, "was started with schedule = cosine"),
        ({"images": 41}, "was started with images = 40"),
        ({"folder": "40 files, b"}, "was started with folder = 40 files, a, not 40 files, b"),
        ({"steps": 11}, "12 steps already, more than 11"),
    ],
)
def test_resume_with_other_settings_is_refused(finished, tiny_data, tmp_path, settings, message):
    """(Each of these settings has its name in one section of the configuration only.)"""
    state, _ = load_state(finished)
    started = json.loads(state["config"])
    started["data"]["folder"] = "40 files, a"
    save_state(tmp_path, state | {"config": json.dumps(started)})
    config = copy.deepcopy(started)
    for name, value in settings.items():
        next(section for section in config.values() if name in section)[name] = value
    with pytest.raises(UserError, match=message):
        train(config, tiny_data, tmp_path, resume=True)
    with pytest.raises(UserError, match="holds a run already: add --resume"):
        train(started, tiny_data, tmp_path)


def test_a_finished_run_is_not_overwritten(tiny_data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"hours of work")
    with pytest.raises(UserError, match="holds a finished run"):
        train(tiny_config(steps=3), tiny_data, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"hours of work"


FAILING = """
def draw_or_fail(data, config, step, diffusion, draw_batch=training.draw_batch):
    if step == 5:
        raise UserError("it broke")
    return draw_batch(data, config, step, diffusion)

def train():
    if os.environ["RANK"] == "1":
        if {at_once}:
            raise UserError("it broke")
        training.draw_batch = draw_or_fail
    training.train(tiny_config(), data, out + "/run", device="cpu")

command_line(train)
"""


@pytest.mark.parametrize("at_once", [True, False])
def test_a_process_that_fails_alone(at_once, tiny_data, tmp_path):
    """Its message is all there is to read, and the others end, where they wait for it to begin or to go on."""
    done = run_two_processes(tmp_path, tiny_data, FAILING.format(at_once=at_once))
    assert done.returncode != 0 and done.stderr.count("error: it broke") == 1
    assert "[rank0]: Traceback" not in done.stderr
    codes = dict(re.findall(r"rank +: (\d).*\n +exitcode +: (-?\d+)", done.stderr))
    assert codes["1"] == "2" and codes.get("0") != f"{-signal.SIGKILL:d}"  # killed: it did not end when it was asked to


def test_one_variable_is_not_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # by a scheduler
    assert training.join_process_group() == (0, 1) and utils.is_main()


@pytest.mark.parametrize("device", ["auto", "mps"])
def test_several_processes_need_cpus_or_all_gpus(device, monkeypatch, tiny_data, tmp_path):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(utils, "pick_device", lambda name: torch.device(name))
    with pytest.raises(UserError, match="need a GPU each, or --device cpu"):
        train(tiny_config(), tiny_data, tmp_path / "run", device=device)


def test_bfloat16_is_close_to_float32(tiny_data, tmp_path):
    if utils.pick_precision(torch.device("cpu")) != "bfloat16":
        pytest.skip("this CPU has no bfloat16")
    for precision in ("float32", "bfloat16"):
        train(tiny_config(precision=precision, optimizer="sgd", lr=0.05), tiny_data, tmp_path / precision)
    close_to(tmp_path / "bfloat16", tmp_path / "float32", rtol=0.05, atol=0.02)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "all"])
def test_damaged_states(finished, tiny_data, tmp_path, interrupt, capsys, damage):
    """The run goes on from the one before, and begins again where none is whole."""
    older, newest = interrupt(tmp_path, 3, 6)
    data = bytearray(newest.read_bytes())
    if damage == "bit":
        data[len(data) // 3] ^= 4
    newest.write_bytes({"truncated": data[:-10], "empty": b""}.get(damage, data))
    if damage == "all":
        newest.write_bytes(b""), older.write_bytes(b"")
    utils.say.cache_clear()
    capsys.readouterr()
    train(tiny_config(), tiny_data, tmp_path, resume=True)
    err = capsys.readouterr().err
    assert f"{newest} is damaged and is passed over" in err
    assert ("going on from step 4" in err) == (damage != "all")
    assert_same(contents(tmp_path), contents(finished))


def test_no_memory_for_a_state_is_not_damage(tiny_data, tmp_path, interrupt, monkeypatch):
    states = interrupt(tmp_path, 3, 6)
    monkeypatch.setattr(torch, "load", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        train(tiny_config(), tiny_data, tmp_path, resume=True)
    assert sorted(tmp_path.glob("state_*.pt")) == list(states)


def test_after_a_damaged_state_the_good_ones_are_kept(tmp_path, interrupt):
    """The damaged state has a later step than the first one saved after it: it must not push out the good ones."""
    older, newest = interrupt(tmp_path, 3, 9)
    newest.write_bytes(b"damaged")
    kept = interrupt(tmp_path, 5)
    assert kept[0] == older and "state_00000006" in kept[1].name and len(kept) == 2


def test_a_state_of_another_program_is_damaged(tmp_path):
    save_state(tmp_path, {"step": 3})
    assert load_state(tmp_path) == (None, None)


def test_a_second_process_is_refused(tiny_data, tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process is training in"):
        train(tiny_config(), tiny_data, tmp_path, resume=True)
    train(tiny_config(steps=1), tiny_data, tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "no"), OSError(errno.ENOLCK, "no"), NotImplementedError()])
def test_a_file_system_without_locks(tiny_data, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=error))
    train(tiny_config(steps=1), tiny_data, tmp_path / "run")
    assert "cannot be locked" in capsys.readouterr().err and (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("steps", [1, 12])
def test_what_is_not_finite_is_not_saved(tiny_data, tmp_path, steps):
    """Also where the last step's loss is still finite, and its update is not."""
    with pytest.raises(UserError, match="diverged by step [12]: .*smaller --lr .*; the last good state is step 0"):
        train(tiny_config(steps=steps, optimizer="sgd", lr=1e300), tiny_data, tmp_path)
    assert load_state(tmp_path)[0]["step"] == 0 and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_while_saving(finished, tiny_data, tmp_path, interrupt, monkeypatch, call):
    """Old states stay whole, nothing half-written is left, and with space again the run goes on."""
    before = {p: p.read_bytes() for p in interrupt(tmp_path, 3, 6)}
    monkeypatch.setattr(utils.os, call, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="cannot write .*state_.*: no space left on the disk"):
        train(tiny_config(), tiny_data, tmp_path, resume=True)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.glob("state_*.pt")} == before and no_leftovers(tmp_path)
    train(tiny_config(), tiny_data, tmp_path, resume=True)
    assert_same(contents(tmp_path), contents(finished))


def test_what_a_kill_left_is_cleared_away(tiny_data, tmp_path, interrupt):
    others = {".backup-20240101.tar", ".env-prod1234.json", "state_dict.pt", "state_1.pt"}
    half = {".model-89abcdef.safetensors", ".config-0123abcd.json", ".state_00000005_0123456789abcdef-89abcdef.pt"}
    states = {path: path.read_bytes() for path in interrupt(tmp_path, 1, 3)}
    interrupt(tmp_path, 5)
    for path, contents in states.items():  # killed between writing a state and dropping the oldest
        path.write_bytes(contents)
    for name in others | half:
        (tmp_path / name).write_text("mine")
    train(tiny_config(), tiny_data, tmp_path, resume=True)
    left = {p.name for p in tmp_path.iterdir()} - {"model.safetensors", "config.json", ".lock"}
    assert len(list(tmp_path.glob(STATES))) == 2 and left - {p.name for p in tmp_path.glob(STATES)} == others
