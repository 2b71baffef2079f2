"""Weight files: how denoisers and classifiers are written, read and built again, the course's .pt files included.

A file of this project is a safetensors file with {"raw/NAME": ..., "ema_0.999/NAME": ...} and the run's configuration
inside.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ddpm import Diffusion
from modules import NETWORKS
from utils import UserError, atomic_path

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
    tensors = {
        n: w.detach().to("cpu", torch.float16 if half else None, copy=True, memory_format=torch.contiguous_format)
        for n, w in tensors.items()
    }
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


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    with atomic_path(path) as temporary:
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        temporary.write_bytes(save(contiguous, {"config": json.dumps(config)}))  # save_file hides a full disk


def read_file(path: Path, hint: str) -> tuple[dict[str, torch.Tensor], dict]:
    """What `save_tensors` wrote: tensors and config. Raises UserError, with `hint`."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads((file.metadata() or {})["config"])
    except FileNotFoundError:
        raise UserError(f"there is no {path.name} in {path.parent.name}/: {hint}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or not what its name says ({error}): {hint}") from error
