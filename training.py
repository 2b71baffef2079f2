"""The one training loop, its exact resume, and checkpoint files.

Every random draw of step k (which images, flips, timesteps, noise, dropped labels) comes from (seed, k) and is made for the
global batch. So on a CPU a run that was killed and resumed ends with the same bits as one that was not, and several
processes each take their slice of the same batch.

A run folder holds:
    state_STEP_HASH.pt   everything needed to go on: the newest two; HASH is the contents' SHA-256, so damage is noticed
    samples_STEP.png     the same noise, denoised by the averaged weights as training goes on
    model.safetensors    the finished weights, with the configuration and the loss of every step inside
    config.json          the finished run's configuration, to read
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import hashlib
import importlib
import io
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ddpm_conditional import drop_labels, with_labels
from image_data import augment
from modules import EMA
from utils import (
    UserError,
    atomic_path,
    autocast,
    generator,
    is_out_of_memory,
    pick_device,
    pick_precision,
    progress,
    save_grid,
    say,
    to_uint8,
    write_json,
)
from weights import (
    build_diffusion,
    build_model,
    check_image_size,
    image_shape,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    select_weights,
)

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
MAX_STEPS = 10**8  # more is a mistake, and the losses are kept in memory
TIMED_STEPS = 20  # with --minutes: how many steps are timed before the run's length is fixed


def keep_freed_memory():
    """Tell glibc to keep freed memory. Returned to the system, it is faulted in again, page by page, in every step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that glibc takes


# --- state: what an interrupted run needs to go on -------------------------------------------------------------------


# The names that a run gives its files, so that no other file in its folder is ever deleted.
HEX = "[0-9a-f]"
STATES = f"state_{'[0-9]' * 8}_{HEX * 16}.pt"
HALF_WRITTEN = [
    f".{name}-{HEX * 8}.{suffix}"
    for name, suffix in (("state_*", "pt"), ("samples_*", "png"), ("model", "safetensors"), ("config", "json"))
]


def save_state(folder, state, good=()):
    """Write state_STEP_HASH.pt atomically, then drop all states but it and the last one of `good`, known to be whole.

    Returns the two paths. (The newest by name may be damaged: then the run went on from one before it.)
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents = buffer.getbuffer()
    path = folder / f"state_{state['step']:08d}_{hashlib.sha256(contents).hexdigest()[:16]}.pt"
    with atomic_path(path) as temporary:
        temporary.write_bytes(contents)
    good = [*[p for p in good if p != path][-1:], path]
    for old in set(folder.glob(STATES)) - set(good):
        old.unlink()
    return good


STATE_PARTS = {"config", "step", "losses", "model", "optimizer", "emas", "scaler"}


def load_state(folder):
    """The newest undamaged state of a run folder and its path; None, None where there is none."""
    for path in sorted(folder.glob(STATES), reverse=True):
        contents = path.read_bytes()
        if hashlib.sha256(contents).hexdigest()[:16] == path.stem.split("_")[-1]:
            try:
                state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
                if STATE_PARTS <= state.keys():
                    return state, path
            except Exception as error:  # not written by this program: torch.load raises what it likes
                if is_out_of_memory(error):
                    raise
        say(f"{path} is damaged: going on from the state before it")
    return None, None


class Held(UserError):
    """Another process is working on the run."""


@contextlib.contextmanager
def locked(folder):
    """Hold the run folder's lock; a second process that wants it is refused. A new folder that stays empty goes again."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Held(f"another process is training in {folder}: wait for it, or use another --out") from error
        try:
            yield
        finally:
            if new and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()


@contextlib.contextmanager
def stop_signals():
    """Yield a function that tells whether Ctrl-C or a termination request has come; a second Ctrl-C interrupts at once."""
    received = []

    def handler(number, frame):
        if (
            received and number == signal.SIGINT
        ):  # a second SIGTERM may be torchrun's, which passes on what all received
            raise KeyboardInterrupt
        received.append(number)

    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


# --- several processes -----------------------------------------------------------------------------------------------


def under_torchrun():
    """True if torchrun started this process. (A scheduler may set some of its variables, too.)"""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_main():
    """True in the one process that writes and speaks."""
    return not under_torchrun() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def process_group(device="auto"):
    """(rank, number of processes) of this process, as torchrun started it; (0, 1) without torchrun."""
    if not under_torchrun():
        yield 0, 1
        return
    if not dist.is_initialized():  # once for all runs of this process: PyTorch may hang in a second time
        if torch.cuda.is_available() and device in ("auto", "cuda"):
            count = torch.cuda.device_count()
            if int(os.environ["LOCAL_RANK"]) >= count:
                raise UserError(f"there are more processes than GPUs: start {count} of them, or add --device cpu")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is put on GPU 0
        kind = pick_device(device)
        if int(os.environ["WORLD_SIZE"]) > 1 and (kind.type not in ("cpu", "cuda") or kind.index is not None):
            raise UserError("several processes need --device cpu, or --device cuda for a GPU each")
        # Whoever waits for a process that has failed, in C++, would not notice torchrun's request to end in Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Imported later (DistributedDataParallel does), it keeps the group as a default argument: destroy_process_group
        # then leaves gloo's threads behind, and one that frees a tensor while Python shuts down aborts the process.
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
        atexit.register(leave_process_group)
    yield dist.get_rank(), dist.get_world_size()


def leave_process_group():
    gc.collect()  # a DistributedDataParallel that waits for the collector would keep gloo's threads, too
    dist.destroy_process_group()


def any_process(flag, world, device):
    """True if `flag` is true in any process."""
    if world == 1:
        return flag
    tensor = torch.tensor(float(flag), device=device)
    dist.all_reduce(tensor)
    return tensor.item() > 0


# --- the loop --------------------------------------------------------------------------------------------------------


def draw_indices(seed, step, batch_size, count):
    """Which images step `step` sees: the batches of an endless row of shuffled epochs."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {p // count: None for p in positions}
    for epoch in epochs:
        epochs[epoch] = epoch_order(seed, epoch, count)
    return torch.tensor([epochs[p // count][p % count] for p in positions])


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return torch.randperm(count, generator=generator(seed, 0, epoch)).tolist()


def draw_batch(data, config, step, timesteps):
    """Everything random about a step's global batch: x0, t, noise, labels."""
    train = config["train"]
    g = generator(train["seed"], 1, step)
    index = draw_indices(train["seed"], step, train["batch_size"], len(data.images))
    x0 = augment(data, index, g)
    t = torch.randint(timesteps, (len(x0),), generator=g)
    noise = torch.randn(x0.shape, generator=g)
    labels = None
    if config["model"].get("num_classes"):
        # One coin for each image, as in Ho & Salimans, or one for the whole batch, as in the course.
        labels = drop_labels(data.labels[index], train["p_uncond"], g, train["label_dropout"])
    return x0, t, noise, labels


def train(
    config, data, out, resume=False, device="auto", minutes=None, sample_every=0, compile=False, accumulate=1, init=None
):
    """Train as `config` says and return the path of the finished model.safetensors.

    init: a checkpoint whose weights a new run starts from, instead of random ones.

    config: {"model": {...}, "diffusion": {...}, "data": {...}, "train": {"loss", "steps" or None with minutes,
    "batch_size", "lr", "optimizer", "seed", "p_uncond", "label_dropout", "ema_betas", "ema_start", "precision"}}.
    Raises UserError for bad input, KeyboardInterrupt once everything is saved after Ctrl-C or a termination request.
    """
    out = Path(out)
    if not out.name:
        raise UserError(f"a run needs a folder of its own, such as --out runs/NAME, not {str(out)!r}")
    with process_group(device) as (rank, world), contextlib.ExitStack() as stack:
        if config["train"]["batch_size"] % (world * accumulate):
            raise UserError(
                f"--batch-size {config['train']['batch_size']} must be a multiple of processes x "
                f"--accumulate = {world * accumulate}"
            )
        held = None
        if rank == 0:
            try:
                stack.enter_context(locked(out))
            except (UserError, OSError) as error:
                held = error
        device = pick_device(device)
        if any_process(held is not None, world, device):  # or the others would wait for rank 0
            raise held or Held(f"process 0 cannot train in {out}: see its message")
        stop_requested = stack.enter_context(stop_signals())  # before the first state, which says that a run can go on
        try:
            run = Run(config, data, out, device, rank, world, resume, init)
            run.loop(stop_requested, minutes, sample_every, compile, accumulate)
        except (MemoryError, RuntimeError) as error:
            if world > 1 and "closed by peer" in str(error):
                raise UserError("another process has failed: see its message") from error
            if compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise UserError(
                    "torch.compile does not work here (has this machine a C++ compiler?): leave --compile out"
                ) from error
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory: try --batch-size {max(1, config['train']['batch_size'] // 2)}, or the same "
                f"batch in smaller parts with --accumulate {2 * accumulate}"
            ) from error
    return out / "model.safetensors"


def take_over(settings, started):
    """Fill in what --minutes, or no --precision, left to the machine: as the run that was `started` had it."""
    for name in ("steps", "precision"):
        if settings[name] is None:
            settings[name] = started[name]


def check_settings(config, started, out):
    """Raise UserError where the run in `out`, started with the configuration `started`, had other settings than `config`.

    The number of steps may differ: a run can be made longer.
    """
    for section in config:
        for name in {**config[section], **started.get(section, {})}:
            here, there = config[section].get(name), started.get(section, {}).get(name)
            if here != there and name != "steps":
                raise UserError(
                    f"{out} was started with {name} = {there}, not {here}: --resume goes on with the same "
                    "settings only; use another --out"
                )


class Run:
    """A run's model, averages, optimizer and position."""

    def __init__(self, config, data, out, device, rank, world, resume, init=None):
        self.config, self.data, self.out, self.device, self.rank, self.world = config, data, out, device, rank, world
        settings = config["train"]
        state = self.read_folder(resume)
        if settings["precision"] is None:
            settings["precision"] = pick_precision(device)
            if world > 1:  # it is found by timing, and all must agree
                agreed = [settings["precision"]]
                dist.broadcast_object_list(agreed, 0)
                settings["precision"] = agreed[0]
        torch.manual_seed(settings["seed"])
        self.model = build_model(config["model"]).to(device, memory_format=torch.channels_last)
        check_image_size(self.model, config["data"]["image_size"])
        self.diffusion = build_diffusion(config["diffusion"]).to(device)
        self.emas = {f"ema_{b:g}": EMA(b, settings["ema_start"]) for b in settings["ema_betas"]}
        self.ema_models = {kind: EMA.copy_of(self.model) for kind in self.emas}
        fused = {"fused": True} if device.type in ("cpu", "cuda") else {}
        self.optimizer = OPTIMIZERS[settings["optimizer"]](self.model.parameters(), lr=settings["lr"], **fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "float16")
        self.step, self.losses = 0, torch.zeros(0)
        self.saved_at, self.save_seconds = time.monotonic(), 0.0
        if state is not None:
            self.restore(state)
            return
        if init is not None:
            self.start_from(init)
        if rank == 0:
            self.save()

    # --- state ---

    def start_from(self, path):
        """Take over the weights of a checkpoint; the averages start from its average, where it has one."""
        tensors, config = read_checkpoint(path)
        load_weights(self.model, select_weights(tensors, "raw", config, path), path)
        for ema_model in self.ema_models.values():
            load_weights(ema_model, select_weights(tensors, None, config, path), path)

    def read_folder(self, resume):
        """The state to go on from, or None; the settings that depend on the machine's speed are taken over from it."""
        state, path = load_state(self.out)
        if self.world > 1:
            dist.barrier()  # rank 0 writes to the folder only when all have read it
        if self.rank == 0:
            older = [p for p in sorted(self.out.glob(STATES)) if path and p < path]
            # what a kill left behind: files half written, an old state that was about to go
            for leftover in (*(p for half in HALF_WRITTEN for p in self.out.glob(half)), *older[:-1]):
                leftover.unlink()
        self.states, self.last_good = [], None
        if state is None:
            if (self.out / "model.safetensors").exists():
                raise UserError(f"{self.out} holds a finished run: use another --out, or delete it")
            return None
        if not resume:
            raise UserError(f"{self.out} holds a run already: add --resume to go on with it, or use another --out")
        self.states, self.last_good = [path], state["step"]
        settings = self.config["train"]
        take_over(settings, json.loads(state["config"])["train"])
        if settings["steps"] is not None and settings["steps"] < state["step"]:
            raise UserError(
                f"the run in {self.out} has made {state['step']} steps already, more than {settings['steps']}"
            )
        return state

    def save(self):
        start = time.monotonic()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged(self.step)
        self.states = save_state(
            self.out,
            {
                "config": json.dumps(self.config, sort_keys=True),
                "step": self.step,
                "losses": self.losses.cpu().clone(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "emas": {kind: ema_model.state_dict() for kind, ema_model in self.ema_models.items()},
                "scaler": self.scaler.state_dict(),
            },
            self.states,
        )
        self.last_good, self.saved_at = self.step, time.monotonic()
        self.save_seconds = self.saved_at - start

    def restore(self, state):
        check_settings(self.config, json.loads(state["config"]), self.out)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for kind, weights in state["emas"].items():
            self.ema_models[kind].load_state_dict(weights)
            self.emas[kind].step = state["step"]
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.losses = state["step"], state["losses"]
        if self.rank == 0:
            say(f"going on from step {self.step} in {self.out}")

    def diverged(self, step):
        return UserError(
            f"the loss is not finite at step {step} (learning rate {self.config['train']['lr']:g}): try a smaller --lr; "
            f"the last good state is step {self.last_good} in {self.out}"
        )

    # --- training ---

    def prepare(self):
        """What the first step needs beside the weights."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        keep_freed_memory()
        self.model.train()

    def loop(self, stop_requested, minutes, sample_every, compile, accumulate):
        settings = self.config["train"]
        model = torch.compile(self.model) if compile else self.model
        if self.world > 1:
            model = torch.nn.parallel.DistributedDataParallel(model)
        self.prepare()
        self.extend_losses()
        if settings["steps"] is not None:
            self.check_length(minutes)
        bar = progress(
            total=settings["steps"], initial=self.step, unit="step", desc=self.out.name, disable=self.rank > 0
        )
        checked, started = self.step, time.monotonic()
        warm = min(self.step + 1, TIMED_STEPS - 1)  # the first step also warms up, and compiles: it is not timed
        with bar:
            while settings["steps"] is None or self.step < settings["steps"]:
                self.losses[self.step] = self.train_step(model, accumulate)
                self.step += 1
                bar.update()
                if settings["steps"] is None and self.step in (warm, TIMED_STEPS):
                    self.losses[self.step - 1].item()  # a GPU works behind: this waits for it
                    if self.step == TIMED_STEPS:
                        self.fix_length(minutes, (time.monotonic() - started) / (self.step - warm), bar)
                    started = time.monotonic()
                due = sample_every and self.step % sample_every == 0
                if self.step % 10 and self.step != settings["steps"] and self.device.type != "cpu" and not due:
                    continue  # reading a loss makes a GPU wait: look at ten at a time
                window = self.losses[checked : self.step]
                if not window.isfinite().all():
                    raise self.diverged(checked + int((~window.isfinite()).nonzero()[0]))
                checked = self.step
                bar.set_postfix(loss=f"{self.losses[max(0, self.step - 100) : self.step].mean():.4f}", refresh=False)
                if any_process(stop_requested(), self.world, self.device):
                    self.stop()
                if self.rank == 0:
                    if due:
                        self.sample_grid()
                    if time.monotonic() - self.saved_at > max(5, 60 * self.save_seconds):  # under 2% of the time
                        self.save()
        if self.rank == 0:
            self.finish()
        if self.world > 1:
            dist.barrier()  # nobody looks for the weights before they are there

    def train_step(self, model, accumulate):
        """One optimizer step on this process's share of the global batch; its mean loss, still on the device."""
        settings = self.config["train"]
        batch = draw_batch(self.data, self.config, self.step, self.diffusion.timesteps)
        total = torch.zeros((), device=self.device)
        for part in range(self.rank * accumulate, (self.rank + 1) * accumulate):
            x0, t, noise, labels = (
                None if b is None else b.chunk(self.world * accumulate)[part].to(self.device) for b in batch
            )
            x0, noise = (b.contiguous(memory_format=torch.channels_last) for b in (x0, noise))
            last = part == (self.rank + 1) * accumulate - 1  # the processes exchange gradients once a step
            with model.no_sync() if self.world > 1 and not last else contextlib.nullcontext():
                with autocast(self.device, settings["precision"]):
                    loss = self.diffusion.loss(with_labels(model, labels), x0, t, noise, settings["loss"]) / accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for kind, ema in self.emas.items():
            ema.step_ema(self.ema_models[kind], self.model)
        if self.world > 1:
            dist.all_reduce(total, dist.ReduceOp.SUM)
            total /= self.world
        return total

    def extend_losses(self):
        """Make room for the losses to come; the first `step` entries are those of the steps made."""
        more = torch.full(((self.config["train"]["steps"] or TIMED_STEPS) - self.step,), math.nan)
        self.losses = torch.cat([self.losses[: self.step].cpu(), more]).to(self.device)

    def fix_length(self, minutes, step_seconds, bar):
        """--minutes: from the time that the first steps took, decide how many steps the run has, for good."""
        wanted = round(60 * minutes / step_seconds)
        steps = min(MAX_STEPS, max(self.step, wanted))
        if self.world > 1:  # rank 0's clock decides
            agreed = torch.tensor(steps, device=self.device)
            dist.broadcast(agreed, 0)
            steps = int(agreed)
        self.config["train"]["steps"] = steps
        self.extend_losses()
        bar.reset(total=steps)
        bar.update(self.step)
        if self.rank == 0:
            if wanted < steps:
                say(f"the run has {steps} steps: {minutes:g} minutes would be fewer, but these had to be timed")
            else:
                say(f"{minutes:g} minutes are {steps} steps here")
            self.save()
        self.check_length()

    def check_length(self, minutes=None):
        """Say what the run's length, once it is known, means for what was asked for."""
        steps, start = self.config["train"]["steps"], self.config["train"]["ema_start"]
        if self.rank == 0 and minutes and self.step >= steps:
            say(f"the run's length was fixed at {steps} steps: --epochs makes it longer, --minutes does not")
        if self.rank == 0 and self.emas and steps <= start:
            say(
                f"the averages begin at step {start}, and the run ends at {steps}: they will be copies of the raw weights "
                "(--ema-start)"
            )

    def stop(self):
        if self.rank == 0:
            self.save()
        if self.world > 1:
            dist.barrier()  # torchrun ends all processes as soon as one has left: not in the middle of the save
        raise KeyboardInterrupt(f"stopped at step {self.step}; the same command with --resume goes on from there")

    def sample_grid(self, n=64):
        """The first 64 images of seed 0, by the first average where there is one, in 20 second-order steps."""
        model = next(iter(self.ema_models.values()), self.model)
        shape = image_shape(self.model, self.config)
        classes = self.model.num_classes
        labels = torch.arange(n) % classes if classes else None
        with autocast(self.device, self.config["train"]["precision"]):
            images = self.diffusion.sample(with_labels(model, labels), n, shape, sampler="dpm")
        save_grid(to_uint8(images), self.out / f"samples_{self.step:08d}.png", columns=8)

    def finish(self):
        if self.last_good != self.step:
            self.save()
        weights = {"raw": self.model.state_dict()} | {k: m.state_dict() for k, m in self.ema_models.items()}
        save_checkpoint(self.out / "model.safetensors", weights, self.config, self.losses)
        write_json(self.out / "config.json", self.config)
