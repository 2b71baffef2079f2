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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ddpm import Diffusion
from modules import EMA, NETWORKS
from utils import (
    UserError,
    atomic_path,
    augment,
    generator,
    is_out_of_memory,
    pick_device,
    progress,
    save_grid,
    say,
    to_uint8,
    write_json,
)

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_STEPS = 10**8  # more is a mistake, and the losses are kept in memory
TIMED_STEPS = 20  # with --minutes: how many steps are timed before the run's length is fixed


# --- precision -------------------------------------------------------------------------------------------------------


@functools.cache
def pick_precision(device):
    """The fastest precision that this device really has: bfloat16, else float16 on a GPU, else float32.

    CPUs without bfloat16 units emulate it, up to 100 times slower, and do not say so: a small matrix product is timed.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type != "cpu":
        return "float32"

    def seconds(dtype):
        a, best = torch.ones(256, 256, dtype=dtype), math.inf
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return best

    return "bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"


def autocast(device, precision=None):
    """A context in which networks compute in `precision` (None: what suits the device)."""
    precision = precision or pick_precision(device)
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "float32")


def keep_freed_memory():
    """Tell glibc to keep freed memory. Returned to the system, it is faulted in again, page by page, in every step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that glibc takes


# --- checkpoints: safetensors, with the configuration inside ---------------------------------------------------------


def build_model(config):
    """A network from its configuration, e.g. {"name": "PatchUNet", "width": 48}."""
    try:
        arguments = dict(config)
        return NETWORKS[arguments.pop("name")](**arguments)
    except Exception as error:  # a checkpoint may ask for anything, and PyTorch's layers raise what they like
        raise UserError(f"this network cannot be built from {config}: {error}") from error


def build_diffusion(config):
    """A Diffusion from its configuration, e.g. {"timesteps": 1000, "schedule": "linear"}."""
    try:
        return Diffusion(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"this diffusion process cannot be built from {config}: {error}") from error


def image_shape(model, config):
    """(C, H, W) of the images that a model works on."""
    return (model.channels, *[config["data"]["image_size"]] * 2)


def check_image_size(model, size):
    if not isinstance(size, int) or size < 1 or size % model.size_multiple:
        raise UserError(f"this network needs an --image-size that {model.size_multiple} divides, not {size}")


def images_seen(settings):
    """How many images a run of these settings (config["train"]) has seen, with those of the run it was started from."""
    before = (settings.get("init") or {}).get("images", 0)
    return settings["steps"] * settings["batch_size"] + before


def save_checkpoint(path, weights, config, losses=None, half=False):
    """Write {"raw": state_dict, "ema_0.999": state_dict, ...} with the configuration to one safetensors file.

    losses: the training loss of every step. half: store the weights in float16, as published files do.
    """
    tensors = {f"{kind}/{name}": w for kind, state in weights.items() for name, w in state.items()}
    # After a copy each tensor owns its memory and is contiguous, as the format wants.
    tensors = {n: w.detach().to("cpu", torch.float16 if half else None, copy=True, memory_format=torch.contiguous_format)
               for n, w in tensors.items()}  # fmt: skip
    if losses is not None:
        tensors["losses"] = losses.cpu().contiguous()
    contents = save(tensors, metadata={"config": json.dumps(config, sort_keys=True)})
    with atomic_path(path) as temporary:  # not save_file, which hides that the disk is full in an error of its own
        temporary.write_bytes(contents)


def read_checkpoint(path):
    """All tensors (float32) and the configuration of a safetensors checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            for section in ("model", "diffusion", "data"):
                config[section].items()
            [f"{beta:g}" for beta in config["train"]["ema_betas"]]
            f"{images_seen(config['train']):d}"
            return {name: file.get_tensor(name).float() for name in file.keys()}, config
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a checkpoint of this project, or it is damaged: {error}") from error


def find_kind(tensors, kind, config, path="the checkpoint"):
    """The kind of weights that is meant: "raw", "ema_BETA", or for "ema" the first of the run's --ema-beta that is there.

    None is "ema", or "raw" where there is no average. Raises UserError.
    """
    kinds = sorted({name.split("/")[0] for name in tensors if "/" in name})
    if kind is None:
        kind = "ema" if any(k.startswith("ema") for k in kinds) else "raw"
    if kind == "ema" and kind not in kinds:
        of_run = [f"ema_{beta:g}" for beta in config["train"]["ema_betas"]]  # a published file may hold some of them
        kind = next((k for k in of_run if k in kinds), kind)
    if kind not in kinds:
        raise UserError(f"{path} has no {kind} weights, only {', '.join(kinds)}")
    return kind


def select_weights(tensors, kind, config, path="the checkpoint"):
    """The state dict of one kind of weights (see `find_kind`)."""
    kind = find_kind(tensors, kind, config, path)
    return {name.removeprefix(f"{kind}/"): w for name, w in tensors.items() if name.startswith(f"{kind}/")}


def read_course_checkpoint(path):
    """Weights and configuration of one of the course's .pt files, a pickled state dict, read as data only."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("module."): w.float() for name, w in weights.items()}
        channels, width = weights["outc.weight"].shape[:2]
    except OSError as error:
        raise UserError(f"no checkpoint at {path}: {error.strerror}") from error
    except Exception as error:  # torch.load raises whatever the bytes happen to provoke
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a state dict of the course's networks, or it is damaged: {reason}") from error
    model = {"name": "UNet", "channels": channels, "width": width}
    if "label_emb.weight" in weights:
        model |= {"name": "UNet_conditional", "num_classes": len(weights["label_emb.weight"])}
    return weights, {"model": model, "diffusion": {"timesteps": 1000, "schedule": "linear"}, "data": {"image_size": 64}}


def load_weights(model, weights, path):
    """load_state_dict, but an error names the first tensor that does not fit."""
    own = model.state_dict()
    for name in [*own, *weights]:
        there, here = (tuple(w[name].shape) if name in w else "nothing" for w in (weights, own))
        if there != here:
            raise UserError(f"{path} does not fit the network: {name} is {there} in the file, {here} in the network")
    model.load_state_dict(weights)


def load_checkpoint(path, weights=None, device="cpu"):
    """(model in eval mode, Diffusion, config) from a safetensors checkpoint or a course .pt file.

    weights: None (the average where there is one), "raw", "ema", or "ema_BETA"; config["weights"] says which was read.
    Raises UserError.
    """
    if Path(path).suffix == ".pt":
        state, config = read_course_checkpoint(path)
        if weights not in (None, "raw"):
            raise UserError(f"{path} has no {weights} weights, only raw")
        config["weights"] = "raw"
    else:
        tensors, config = read_checkpoint(path)
        config["weights"] = find_kind(tensors, weights, config, path)
        state = select_weights(tensors, config["weights"], config, path)
    model = build_model(config["model"])
    load_weights(model, state, path)
    check_image_size(model, config["data"].get("image_size"))
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, build_diffusion(config["diffusion"]).to(device), config


# --- state: what an interrupted run needs to go on -------------------------------------------------------------------


# The names that a run gives its files, so that no other file in its folder is ever deleted.
HEX = "[0-9a-f]"
STATES = f"state_{'[0-9]' * 8}_{HEX * 16}.pt"
HALF_WRITTEN = [f".{name}-{HEX * 8}.{suffix}" for name, suffix in
                (("state_*", "pt"), ("samples_*", "png"), ("model", "safetensors"), ("config", "json"))]  # fmt: skip


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
        if received and number == signal.SIGINT:  # a second SIGTERM may be torchrun's, which passes on what all received
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
        coins = torch.rand(len(x0) if train["label_dropout"] == "example" else 1, generator=g)
        labels = torch.where(coins < train["p_uncond"], -1, data.labels[index])
    return x0, t, noise, labels


def train(config, data, out, resume=False, device="auto", minutes=None, sample_every=0, compile=False, accumulate=1,
          init=None):  # fmt: skip
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
            raise UserError(f"--batch-size {config['train']['batch_size']} must be a multiple of processes x "
                            f"--accumulate = {world * accumulate}")  # fmt: skip
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
                raise UserError("torch.compile does not work here (has this machine a C++ compiler?): leave --compile "
                                "out") from error  # fmt: skip
            if not is_out_of_memory(error):
                raise
            raise UserError(f"out of memory: try --batch-size {max(1, config['train']['batch_size'] // 2)}, or the same "
                            f"batch in smaller parts with --accumulate {2 * accumulate}") from error  # fmt: skip
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
                raise UserError(f"{out} was started with {name} = {there}, not {here}: --resume goes on with the same "
                                "settings only; use another --out")  # fmt: skip


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
            raise UserError(f"the run in {self.out} has made {state['step']} steps already, more than {settings['steps']}")
        return state

    def save(self):
        start = time.monotonic()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged(self.step)
        self.states = save_state(self.out, {
            "config": json.dumps(self.config, sort_keys=True), "step": self.step, "losses": self.losses.cpu().clone(),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "emas": {kind: ema_model.state_dict() for kind, ema_model in self.ema_models.items()},
            "scaler": self.scaler.state_dict(),
        }, self.states)  # fmt: skip
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
                    loss = self.diffusion.loss(model, x0, t, noise, labels, settings["loss"]) / accumulate
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
            say(f"the averages begin at step {start}, and the run ends at {steps}: they will be copies of the raw weights "
                "(--ema-start)")  # fmt: skip

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
            images = self.diffusion.sample(model, n, shape, labels=labels, sampler="dpm")
        save_grid(to_uint8(images), self.out / f"samples_{self.step:08d}.png", columns=8)

    def finish(self):
        if self.last_good != self.step:
            self.save()
        weights = {"raw": self.model.state_dict()} | {k: m.state_dict() for k, m in self.ema_models.items()}
        save_checkpoint(self.out / "model.safetensors", weights, self.config, self.losses)
        write_json(self.out / "config.json", self.config)
