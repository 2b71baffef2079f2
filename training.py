"""The one training loop, its exact resume, and what it does in several processes.

`steps` is the loop: a generator that makes a step each time it is asked for one. `train` asks for all of them.

Every random draw of step k (which images, flips, timesteps, noise, dropped labels) comes from (seed, k) and is made for
the global batch. So on a CPU a run that was killed and resumed ends with the same bits as one that was not, and
several processes each take their slice of the same batch. A run's folder holds:
    state_STEP_HASH.pt   all that is needed to go on: the newest two
    samples_STEP.png     the same noise, denoised by the averaged weights as training goes on
    model.safetensors    the finished weights, with the configuration and the loss of every step inside
    config.json          the finished run's configuration, to read
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

import utils
import weights
from ddpm_conditional import drop_labels, with_labels
from image_data import augment
from modules import EMA
from utils import UserError, say

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# Homework bonus: how the timesteps of a batch of n are drawn. "vlb" draws t in proportion to its weight in the
# variational bound: without weights in the loss, the gradient is the bound's on average, up to a factor.
TIMESTEP_SAMPLING = {
    "uniform": lambda diffusion, n, g: torch.randint(diffusion.timesteps, (n,), generator=g),
    "vlb": lambda diffusion, n, g: torch.multinomial(diffusion.vlb_weights.cpu(), n, replacement=True, generator=g),
}
# config["train"] where it says nothing
DEFAULTS: dict = {
    "loss": "l2",
    "steps": None,
    "batch_size": 128,
    "lr": 1e-3,
    "cooldown": 0.0,
    "optimizer": "adam",
    "seed": 0,
    "precision": None,
    "ema_betas": [],
    "ema_start": 500,
    "p_uncond": 0.1,
    "label_dropout": "example",
    "timestep_sampling": "uniform",
}
FEW_STEPS = 1000  # after fewer, samples are hardly more than blobs
TIMED_STEPS = 20  # with --minutes: how many steps are timed before the run's length is fixed


# --- the loop --------------------------------------------------------------------------------------------------------


class Run:
    """A model in training, in memory: `steps` trains it.

    config: {"model": ..., "diffusion": ..., "data": {"image_size": ...}, "train": DEFAULTS or other values}; it is
    completed in place. rank, world: this process's number of how many. accumulate: into how many parts a batch is cut.
    losses: those of the steps made, which whoever iterates over `steps` may append.
    """

    def __init__(self, config, data, device="cpu", rank=0, world=1, accumulate=1, compiled=False):
        self.config, self.data, self.device = config, data, torch.device(device)
        self.rank, self.world, self.accumulate, self.compiled = rank, world, accumulate, compiled
        settings = config["train"] = DEFAULTS | config["train"]
        if settings["precision"] is None:  # it is found by timing, and all processes must agree
            settings["precision"] = gather(utils.pick_precision(self.device), world)[0]
        if settings["batch_size"] % (world * accumulate):
            raise UserError(f"--batch-size must be a multiple of processes x --accumulate = {world * accumulate}")
        torch.manual_seed(settings["seed"])
        self.model = weights.build_model(config["model"]).to(self.device, memory_format=torch.channels_last).train()
        self.shape = weights.image_shape(self.model, config)
        self.diffusion = weights.build_diffusion(config["diffusion"]).to(self.device)
        self.emas = {f"ema_{b:g}": EMA(b, settings["ema_start"]) for b in settings["ema_betas"]}
        self.ema_models = {kind: EMA.copy_of(self.model) for kind in self.emas}
        fused = {"fused": True} if self.device.type in ("cpu", "cuda") else {}
        self.optimizer = OPTIMIZERS[settings["optimizer"]](self.model.parameters(), lr=settings["lr"], **fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings["precision"] == "float16")
        self.step, self.losses = 0, []

    def start_from(self, path):
        """Take over the weights of a checkpoint, raw and averaged, as far as it has both."""
        tensors, config = weights.read_checkpoint(path)
        has_raw = any(name.startswith("raw/") for name in tensors)
        for network in (self.model, *self.ema_models.values()):
            wanted = "raw" if has_raw and network is self.model else None
            kind, state = weights.select_weights(tensors, wanted, config, path)
            if not has_raw:
                say(f"{path} has no raw weights: training starts from {kind}")
            own = network.state_dict()
            if len(state.get("label_emb.weight", ())) != len(own.get("label_emb.weight", ())):  # of other classes
                state.pop("label_emb.weight", None)
            if new := own.keys() - state.keys():
                say(f"{len(new)} of {len(own)} tensors begin anew, such as {min(new)}: {path} has none that fit")
            weights.load_weights(network, own | state, path)

    def state(self):
        """All that is needed to go on from here, for torch.save."""
        return {
            "config": json.dumps(self.config, sort_keys=True),
            "step": self.step,
            "losses": torch.tensor(self.losses),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "emas": {kind: model.state_dict() for kind, model in self.ema_models.items()},
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state):
        # the losses of an older version's state are as many as the run's steps: NaN for those to come
        self.step, self.losses = state["step"], state["losses"][: state["step"]].tolist()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for kind, average in state["emas"].items():
            self.ema_models[kind].load_state_dict(average)
            self.emas[kind].step = state["step"]
        self.scaler.load_state_dict(state["scaler"])


def steps(run):
    """The training loop (Ho et al. 2020, algorithm 1): each step yields its loss, a scalar, still on the device.

    (Of several processes each yields that of its own share of the batch.) It ends after config["train"]["steps"] steps,
    None: never. Whoever iterates shows, checks, saves and stops.
    """
    settings = run.config["train"]
    network = torch.compile(run.model) if run.compiled else run.model
    if run.world > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    batches = draw_batches(run)
    while settings["steps"] is None or run.step < settings["steps"]:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(settings, run.step)
        losses = []
        for x0, t, noise, labels in parts_of_batch(run, next(batches)):
            # the processes exchange gradients once a step, after its last part
            network.require_backward_grad_sync = len(losses) == run.accumulate - 1
            # Homework TODO 89-94: the training step; drop_labels has already dropped some of the labels
            with utils.autocast(run.device, settings["precision"]):
                loss = run.diffusion.loss(with_labels(network, labels), x0, t, noise, settings["loss"]) / run.accumulate
            run.scaler.scale(loss).backward()
            losses.append(loss.detach())
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        for kind, ema in run.emas.items():
            ema.step_ema(run.ema_models[kind], run.model)
        run.step += 1
        yield sum(losses)


def learning_rate(settings, step):
    """Constant; with a cooldown, linear to 0 over that share of all steps, the last ones."""
    total, cooldown = settings["steps"], settings["cooldown"]
    return settings["lr"] * min(1, (total - step) / (cooldown * total)) if total and cooldown else settings["lr"]


def draw_batches(run, threads=4):
    """`draw_batch` for each step from run.step on: beside a GPU in threads, a few steps ahead of it."""
    pinned = run.device.type != "cpu" and torch.cuda.is_available()  # a copy from pinned memory does not make CUDA wait

    def draw(step):
        batch = draw_batch(run.data, run.config, step, run.diffusion)
        return tuple(b if b is None else b.pin_memory() for b in batch) if pinned else batch

    numbers = itertools.count(run.step)
    if run.device.type == "cpu":  # the threads would take its cores from the training
        yield from map(draw, numbers)
    with ThreadPoolExecutor(threads) as pool:
        coming = [pool.submit(draw, step) for step in itertools.islice(numbers, threads)]
        for step in numbers:
            coming.append(pool.submit(draw, step))
            yield coming.pop(0).result()


def parts_of_batch(run, batch):
    """This process's share of the step's batch on its device, in run.accumulate parts: x0, t, noise, labels."""
    parts = run.world * run.accumulate
    for part in range(run.rank * run.accumulate, (run.rank + 1) * run.accumulate):
        share = (None if b is None else b.chunk(parts)[part] for b in batch)
        x0, t, noise, labels = (b if b is None else b.to(run.device, non_blocking=b.is_pinned()) for b in share)
        x0, noise = (b.contiguous(memory_format=torch.channels_last) for b in (x0, noise))
        yield x0, t, noise, labels


def draw_batch(data, config, step, diffusion):
    """Everything random about a step's global batch: x0 and noise (N x C x H x W), t and labels (int64, N; or None)."""
    train = DEFAULTS | config["train"]
    g = utils.generator(train["seed"], 1, step)
    index = draw_indices(train["seed"], step, train["batch_size"], len(data.images))
    x0 = augment(data, index, g)
    t = utils.look_up(TIMESTEP_SAMPLING, train["timestep_sampling"], "timestep sampling")(diffusion, len(x0), g)
    # Homework TODO 556: the random noise
    noise = torch.randn(x0.shape, generator=g)
    labels = None
    if config["model"].get("num_classes"):
        labels = drop_labels(data.labels[index], train["p_uncond"], g, train["label_dropout"])
    return x0, t, noise, labels


def draw_indices(seed, step, batch_size, count):
    """Which images step `step` sees: the batches of an endless row of shuffled epochs."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return torch.tensor([epoch_order(seed, p // count, count)[p % count] for p in positions])


@functools.lru_cache(maxsize=2)  # threads may be in the last batches of one epoch and the first of the next
def epoch_order(seed, epoch, count):
    return torch.randperm(count, generator=utils.generator(seed, 0, epoch)).tolist()


def keep_freed_memory():
    """Tell glibc to keep freed memory. Returned to the system, it is faulted in again, page by page, in every step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that glibc takes


# --- a run in its folder ---------------------------------------------------------------------------------------------


def train(config, data, out, resume=False, device="auto", minutes=None, sample_every=0, init=None, **options):
    """Train as `config` says and return the path of the finished model.safetensors; config and options as for `Run`.

    minutes: how long, where config["train"]["steps"] is None. init: a checkpoint whose weights a new run starts from.
    Raises UserError for bad input, KeyboardInterrupt once everything is saved after Ctrl-C or a termination request.
    """
    out = Path(out)
    if out.name in ("", ".."):
        raise UserError(f"a run needs a folder of its own, such as --out runs/NAME, not {str(out)!r}")
    config["train"] = DEFAULTS | config["train"]
    rank, world = join_process_group(device)
    lock = locked(out) if rank == 0 else contextlib.nullcontext()
    with lock, stop_signals() as stop_requested:  # before the first state, which says that a run can go on
        try:
            folder = RunFolder(out)
            state = folder.open(config, resume, world)
            run = Run(config, data, utils.pick_device(device), rank, world, **options)
            if state is not None:
                run.restore(state)
            elif init is not None:
                run.start_from(init)
            folder.save(run)
            make_all_steps(run, folder, stop_requested, minutes, sample_every)
        except RuntimeError as error:
            if "closed by peer" in str(error):
                raise UserError("another process has failed: see its message") from error
            if options.get("compiled") and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise UserError("torch.compile does not work here (no C++ compiler?): leave --compile out") from error
            raise
    return out / "model.safetensors"


def make_all_steps(run, folder, stop_requested, minutes, sample_every):
    """Iterate over the run's steps: show them, check them, save them, draw grids, stop when asked to."""
    settings, unread = run.config["train"], []
    if settings["steps"] is not None:
        tell_if_short(run)
    shown = {"unit": "step", "desc": folder.path.name, "disable": run.rank > 0}
    # The first step also warms up, and compiles: it is not timed.
    timed_from, started = min(run.step + 1, TIMED_STEPS - 1), time.monotonic()
    every = 1 if run.device.type == "cpu" else 10  # reading a loss makes a GPU wait: look at ten at a time
    with utils.progress(total=settings["steps"], initial=run.step, **shown) as bar:
        for loss in steps(run):
            unread.append(loss)
            bar.update()
            grid_is_due = sample_every and run.step % sample_every == 0
            if run.step % every and run.step not in (timed_from, TIMED_STEPS, settings["steps"]) and not grid_is_due:
                continue
            losses = sum(gather(torch.stack(unread).cpu(), run.world)) / run.world
            folder.check_finite(run, [losses])
            run.losses += losses.tolist()
            unread.clear()
            bar.set_postfix(loss=f"{sum(run.losses[-100:]) / len(run.losses[-100:]):.4f}", refresh=False)
            if run.step == timed_from:
                started = time.monotonic()
            elif run.step == TIMED_STEPS and settings["steps"] is None:
                seconds = (time.monotonic() - started) / (TIMED_STEPS - timed_from)
                # as many as process 0 has time for, and at least those that are made already
                settings["steps"] = max(TIMED_STEPS, gather(round(60 * minutes / seconds), run.world)[0])
                say(f"--minutes makes this a run of {settings['steps']} steps here")
                tell_if_short(run)
                bar.total = settings["steps"]
                folder.save(run)
            if grid_is_due and run.rank == 0:
                folder.sample_grid(run, stop_requested)
            if any(gather(stop_requested(), run.world)):
                folder.save(run)
                gather(None, run.world)  # torchrun ends all processes once one has left: not in the middle of the save
                stopped = f"stopped at step {run.step}"
                raise KeyboardInterrupt(f"{stopped}; the same command with --resume goes on from there")
            if folder.save_is_due():
                folder.save(run)
    folder.finish(run)


def tell_if_short(run):
    total, start = run.config["train"]["steps"], run.config["train"]["ema_start"]
    if total < FEW_STEPS and not run.config["train"].get("init"):
        say(f"{total} steps are few: expect hardly more than noise before {FEW_STEPS:,} (--epochs, --minutes)")
    if run.emas and total <= start:
        say(f"the averages begin at step {start}, after the run's last: they will be copies of the raw weights")


class RunFolder:
    """A run's folder: its states, grids and finished weights. Process 0 alone writes."""

    def __init__(self, path):
        self.path, self.states, self.last_step = path, [], None
        self.next_save = time.monotonic() + 5

    def open(self, config, resume, world):
        """The state to go on from, None for a new run. Raises UserError, also where the run had other settings.

        `config` takes over what --minutes, or no --precision, left to the machine. A run may be made longer.
        """
        state, path = weights.load_state(self.path)
        gather(None, world)  # process 0 saves only when all have read the folder
        if state is None:
            if (self.path / "model.safetensors").exists():
                raise UserError(f"{self.path} holds a finished run: use another --out, or delete it")
            return None
        if not resume:
            raise UserError(f"{self.path} holds a run already: add --resume to go on with it, or use another --out")
        started = json.loads(state["config"])
        started["train"] = DEFAULTS | started["train"]  # an older version's run lacks the newer settings
        for name in ("steps", "precision"):
            if config["train"][name] is None:
                config["train"][name] = started["train"][name]
        for section, ours in config.items():
            theirs = started[section]
            for name in ours | theirs:
                if ours.get(name) != theirs.get(name) and name != "steps":
                    was = f"{self.path} was started with {name} = {theirs.get(name)}, not {ours.get(name)}"
                    raise UserError(f"{was}: --resume goes on with the same settings and images; use another --out")
        steps, step = config["train"]["steps"], state["step"]
        if steps is not None and steps < step:
            raise UserError(f"the run in {self.path} has made {step} steps already, more than {steps}")
        length = f" of {steps} (more --epochs make it longer)" if steps else ""
        say(f"going on from step {step}{length} in {self.path}")
        self.states, self.last_step = [path], step
        return state

    def save(self, run):
        """Write a state, unless the newest is of this step already."""
        if run.rank > 0 or run.step == self.last_step:
            return
        self.check_finite(run, run.model.parameters())
        start = time.monotonic()
        self.states = weights.save_state(self.path, run.state(), self.states)
        self.last_step, end = run.step, time.monotonic()
        self.next_save = end + max(5, 60 * (end - start))  # so that saving takes under 2% of the time

    def save_is_due(self):
        return time.monotonic() > self.next_save

    def check_finite(self, run, tensors):
        if not all(tensor.isfinite().all() for tensor in tensors):
            lr, last = run.config["train"]["lr"], f"the last good state is step {self.last_step} in {self.path}"
            raise UserError(f"training had diverged by step {run.step}: try a smaller --lr than {lr:g}; {last}")

    def sample_grid(self, run, stop_requested, n=64):
        """The first 64 images of seed 0, by the first average where there is one, in 20 second-order steps."""
        model = next(iter(run.ema_models.values()), run.model)
        labels = torch.arange(n) % model.num_classes if model.num_classes else None
        with utils.autocast(run.device, run.config["train"]["precision"]):
            for x in run.diffusion.trajectory(with_labels(model, labels), run.shape, range(n), sampler="dpm"):
                if stop_requested():
                    return
        utils.save_grid(utils.to_uint8(x).cpu(), self.path / f"samples_{run.step:08d}.png", columns=8)

    def finish(self, run):
        self.save(run)
        if run.rank == 0:
            states = {kind: model.state_dict() for kind, model in {"raw": run.model, **run.ema_models}.items()}
            weights.save_checkpoint(self.path / "model.safetensors", states, run.config, torch.tensor(run.losses))
            utils.write_json(self.path / "config.json", run.config)
        gather(None, run.world)  # nobody looks for the weights before they are there


@contextlib.contextmanager
def locked(folder):
    """Hold the run folder's lock, or raise UserError if another has it. A new folder that stays empty is removed."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # or it would go on with a weaker kind of lock
            lock.acquire()
    except Timeout as error:
        raise UserError(f"another process is training in {folder}: wait for it, or use another --out") from error
    except (OSError, NotImplementedError, UserWarning):  # as on Lustre, VirtualBox and some FUSE mounts
        say(f"{folder} cannot be locked here: see to it yourself that no other process trains in it")
    try:
        for name in (".state_*", ".samples_*", ".model", ".config"):  # what a kill left half written, and no other file
            for half_written in folder.glob(f"{name}-{'[0-9a-f]' * 8}.*"):
                half_written.unlink()
        yield
    finally:
        lock.release()
        if new and os.listdir(folder) in ([".lock"], []):
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


@contextlib.contextmanager
def stop_signals():
    """Yield a function that tells whether Ctrl-C or a request to terminate has come. A second Ctrl-C acts at once."""
    received = []

    def handler(signum, frame):
        if received and signum == signal.SIGINT:  # a second SIGTERM may only be torchrun's, which passes it on
            raise KeyboardInterrupt
        received.append(signum)

    with contextlib.ExitStack() as at_the_end:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, handler)
            at_the_end.callback(signal.signal, number, previous)
        yield lambda: bool(received)


# --- several processes -----------------------------------------------------------------------------------------------


def gather(value, world):
    """The values that all processes give, in their order, in each of them. So all wait until the last has come here."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def join_process_group(device="auto"):
    """(rank, number of processes) of this process, as torchrun started it; (0, 1) without torchrun."""
    if utils.TORCHRUN not in os.environ:
        return 0, 1
    if not dist.is_initialized():  # once for all runs of this process: PyTorch may hang in a second time
        on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
        local_rank = int(os.environ["LOCAL_RANK"])
        if on_gpus and local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)  # before anything is put on GPU 0
        elif on_gpus or utils.pick_device(device).type != "cpu":
            raise UserError("torchrun's processes need a GPU each, or --device cpu")
        # Whoever waits for a process that has failed, in C++, would not notice torchrun's request to end in Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Imported later (DistributedDataParallel does), it keeps the group as a default argument: destroy_process_group
        # then leaves gloo's threads behind, and one that frees a tensor while Python shuts down aborts the process.
        importlib.import_module("torch.distributed.nn")
        dist.init_process_group("nccl" if on_gpus else "gloo")
        atexit.register(dist.destroy_process_group)
        # Called before it: a DistributedDataParallel that waits for the collector would keep gloo's threads, too.
        atexit.register(gc.collect)
    return dist.get_rank(), dist.get_world_size()
