"""Weight files: how the weights of denoisers and classifiers are written, read and built again.

A file of this project is a safetensors file with a configuration inside. A denoiser's tensors are called "raw/NAME" and
"ema_0.999/NAME", one kind of weights each. Wherever a checkpoint is read, a run's folder, its state_*.pt and weights
of the course's networks (a .pt) serve as well. Of a pickle only tensors and plain containers are read: it runs nothing.
"""

import hashlib
import io
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ddpm import Diffusion
from modules import NETWORKS
from utils import UserError, atomic_path, is_out_of_memory, say, sha256

# --- safetensors files, with a configuration inside ------------------------------------------------------------------


def save_tensors(path, tensors, config):
    """Write named tensors and a configuration (whatever JSON can hold) to a safetensors file."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    contents = save(contiguous, {"config": json.dumps(config, sort_keys=True)})
    with atomic_path(path) as temporary:  # not save_file, which hides that the disk is full in an error of its own
        temporary.write_bytes(contents)


def read_tensors(path, hint="was it copied whole?"):
    """The tensors and the configuration that `save_tensors` wrote. Raises UserError, which ends with the hint."""
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            return {name: file.get_tensor(name) for name in file.keys()}, config
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a checkpoint of this project, or missing or damaged: {hint}") from error


def save_checkpoint(path, weights, config, losses=None, half=False):
    """Write a denoiser's {"raw": state_dict, "ema_0.999": state_dict, ...} and its configuration to one file.

    losses: the training loss of every step. half: store the weights in float16, as published files do.
    """
    tensors = {name: w.half() if half else w for name, w in name_tensors(weights).items()}
    save_tensors(path, tensors | ({} if losses is None else {"losses": losses}), config)


def name_tensors(weights):
    """{"raw": {NAME: tensor}, ...} as {"raw/NAME": tensor, ...}."""
    return {f"{kind}/{name}": w for kind, state in weights.items() for name, w in state.items()}


# --- the states of a run, where it goes on after an interruption -----------------------------------------------------

STATES = f"state_{'[0-9]' * 8}_{'[0-9a-f]' * 16}.pt"
STATE_ENTRIES = {"config", "step", "losses", "model", "optimizer", "emas", "scaler"}


def save_state(folder, state, good=()):
    """Write state_STEP_HASH.pt (HASH tells of damage), then drop all others but the last of `good`, those known whole.

    Returns the two paths. (The newest by name may be damaged: then the run went on from one before it.)
    """
    buffer = io.BytesIO()  # PyTorch reports a full disk as a RuntimeError
    torch.save(state, buffer)
    contents = buffer.getbuffer()
    path = folder / f"state_{state['step']:08d}_{hashlib.sha256(contents).hexdigest()[:16]}.pt"
    with atomic_path(path) as temporary:
        temporary.write_bytes(contents)
    good = [*[p for p in good if p != path][-1:], path]
    for old in set(folder.glob(STATES)) - set(good):
        old.unlink()
    return good


def load_state(folder, entries=STATE_ENTRIES):
    """The newest undamaged state of a folder, which has these entries, and its path; None, None where there is none."""
    for path in sorted(Path(folder).glob(STATES), reverse=True):
        contents = path.read_bytes()
        if hashlib.sha256(contents).hexdigest()[:16] == path.stem.split("_")[-1]:
            try:
                state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
                if entries <= state.keys():
                    return state, path
            except Exception as error:  # not written by this program: torch.load raises what it likes
                if is_out_of_memory(error):
                    raise
        say(f"{path} is damaged and is passed over")
    return None, None


# --- reading a denoiser, whoever wrote it ----------------------------------------------------------------------------


def find_checkpoint(path):
    """The file that a checkpoint's path stands for: of a run's folder its newest weights. Raises UserError.

    The scripts ask once, when they read their flags: a run that still trains soon has newer ones.
    """
    path = Path(path)
    if path.is_file():
        return path
    finished, (state, newest) = path / "model.safetensors", load_state(path)
    if finished.exists() and (state is None or read_tensors(finished)[1]["train"]["steps"] >= state["step"]):
        return finished
    if state is None:
        raise UserError(f"no checkpoint at {path}: there is no such file, or the folder holds no run")
    return newest


def describe_checkpoint(path):
    """What a result or a run records of a checkpoint: its file's name and contents."""
    file = find_checkpoint(path)
    return {"checkpoint": file.name, "sha256": sha256(file)}


def read_checkpoint(path):
    """A denoiser's tensors (float32; "raw/NAME", "ema_0.999/NAME", ...) and its configuration. Raises UserError."""
    path = find_checkpoint(path)
    tensors, config = read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    try:  # raises for whatever those who read a configuration would stumble over
        config["model"]["name"], config["diffusion"].items(), ", ".join(config["data"].get("classes") or ())
        [f"{beta:g}" for beta in config["train"]["ema_betas"]]
        f"{images_seen(config['train']):d}"
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint of this project: its configuration is incomplete") from error
    return {name: tensor.float() for name, tensor in tensors.items()}, config


def read_pickle(path):
    """As `read_checkpoint`, of what torch.save wrote: a run's state, or weights of the course's networks."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes happen to provoke
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is not a checkpoint: it is {what_it_is(path)}") from error
    if isinstance(contents, dict) and STATE_ENTRIES <= contents.keys():
        say(f"{path}: the weights after step {contents['step']}")
        weights = {"raw": contents["model"], **contents["emas"]}
        config = json.loads(contents["config"])
        config["train"]["steps"] = contents["step"]
    else:
        weights = find_state_dicts(contents)
        if not weights:
            entries = ", ".join(map(str, contents)) if isinstance(contents, dict) else type(contents).__name__
            raise UserError(f"{path} holds no weights of the course's networks, only {entries[:200] or 'nothing'}")
        config = course_config(next(iter(weights.values())))
    return name_tensors(weights), config


def find_state_dicts(contents, key=""):
    """{"raw": state_dict, "ema": state_dict} of the course's networks, wherever they are in nested dicts.

    They may be under names such as "model" or "ema_state_dict", and have prefixes such as DataParallel's "module.".
    """
    if not isinstance(contents, dict):
        return {}
    found, last = {}, "outc.weight"  # which the course's networks have, and no optimizer
    tensors = {str(name): value for name, value in contents.items() if torch.is_tensor(value)}
    for name, value in contents.items():
        found = find_state_dicts(value, f"{key}{name}/") | found
    for prefix in (name.removesuffix(last) for name in tensors if name.endswith(last)):
        state = {name.removeprefix(prefix): w for name, w in tensors.items() if name.startswith(prefix)}
        found.setdefault("ema" if "ema" in f"{key}{prefix}".lower() else "raw", state)
    return found


def course_config(weights):
    """The configuration that weights of the course's networks imply; the course's own were trained at 64 x 64."""
    channels, width = weights["outc.weight"].shape[:2]
    model = {"name": "UNet", "channels": channels, "width": width}
    if "label_emb.weight" in weights:
        model |= {"name": "UNet_conditional", "num_classes": len(weights["label_emb.weight"])}
    training = {"steps": 0, "batch_size": 0, "ema_betas": []}  # it is not known how long
    diffusion = {"timesteps": 1000, "schedule": "linear"}
    return {"model": model, "diffusion": diffusion, "data": {"image_size": 64}, "train": training}


BEGINNINGS = {  # of files that should hold weights, and what such a file is
    b"<": "a web page: the download was refused, so open the address in a browser",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"pk": "a whole model or other Python objects, not weights alone (save model.state_dict()), or it is damaged",
    b"\x80": "a pickle of more than weights (save model.state_dict() with torch.save), or it is damaged",
    b"": "something else, or it is damaged",
}


def what_it_is(path):
    """What is in a file that should hold weights, in plain words."""
    with open(path, "rb") as file:
        start = file.read(1000).lstrip().lower()
    if start.startswith(b"pk") and b"data.pkl" not in start:  # the first file in what torch.save writes
        return "a zip archive: unpack it first"
    return next(what for beginning, what in BEGINNINGS.items() if start.startswith(beginning)) if start else "empty"


def select_weights(tensors, kind, config, path="the checkpoint"):
    """The kind of weights meant and its state dict. Raises UserError where there is none.

    kind: "raw", "ema_BETA", or "ema", the first of the run's --ema-beta that is there; None: "ema", else "raw".
    """
    kinds = sorted({name.split("/")[0] for name in tensors if "/" in name})
    if kind in (None, "ema"):
        averages = ["ema", *(f"ema_{beta:g}" for beta in config["train"]["ema_betas"])]
        kind = next((average for average in averages if average in kinds), kind or "raw")
    if kind not in kinds:
        raise UserError(f"{path} has no {kind} weights, only {', '.join(kinds)}")
    return kind, {name.removeprefix(f"{kind}/"): w for name, w in tensors.items() if name.startswith(f"{kind}/")}


def images_seen(settings):
    """How many images a run of these settings (config["train"]) has seen, with those of the run it was started from."""
    before = (settings.get("init") or {}).get("images", 0)
    return settings["steps"] * settings["batch_size"] + before


# --- building it -----------------------------------------------------------------------------------------------------


def build_model(config):
    """A network from its configuration, e.g. {"name": "PatchUNet", "width": 48}."""
    try:
        return NETWORKS[config["name"]](**{name: value for name, value in config.items() if name != "name"})
    except Exception as error:  # a checkpoint may ask for anything, and PyTorch's layers raise what they like
        raise UserError(f"this network cannot be built from {config}: {error}") from error


def build_diffusion(config):
    """A Diffusion from its configuration, e.g. {"timesteps": 1000, "schedule": "linear"}."""
    try:
        return Diffusion(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"this diffusion process cannot be built from {config}: {error}") from error


def image_shape(model, config):
    """(C, H, W) of the images that a model works on. Raises UserError for a size that it cannot work on."""
    size = config["data"]["image_size"]
    if not isinstance(size, int) or size < 1 or size % model.size_multiple:
        raise UserError(f"this network needs an --image-size that {model.size_multiple} divides, not {size}")
    return model.channels, size, size


def load_weights(model, weights, path):
    """load_state_dict, but an error names the first tensor that does not fit."""
    own = model.state_dict()
    for name in [*own, *weights]:
        there, here = (tuple(w[name].shape) if name in w else "missing" for w in (weights, own))
        if there != here:
            raise UserError(f"{path} does not fit the network: {name} is {there} in the file, {here} in the network")
    model.load_state_dict(weights)


def load_checkpoint(path, weights=None, device="cpu", image_size=None):
    """(model in eval mode, Diffusion, config) of a checkpoint, for images of image_size (None: as it was trained).

    weights: None (the average where there is one), "raw", "ema", or "ema_BETA"; config["weights"] says which was read.
    Raises UserError.
    """
    tensors, config = read_checkpoint(path)
    config["weights"], state = select_weights(tensors, weights, config, path)
    config["data"]["image_size"] = image_size or config["data"].get("image_size")
    model = build_model(config["model"])
    load_weights(model, state, path)
    image_shape(model, config)  # refuses a size that does not fit
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, build_diffusion(config["diffusion"]).to(device), config
