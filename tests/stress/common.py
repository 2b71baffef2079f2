"""What the stress commands share: the project on the path, a tiny run to break, checks after a fault, the record."""

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # bit-exact only at one number of threads

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

import image_data  # noqa: E402
import training  # noqa: E402
import utils  # noqa: E402
import weights  # noqa: E402

torch.set_num_threads(1)
RESULTS = ROOT / "report/results/reliability.json"


def tiny_images():
    """40 images of 8 x 8 in two classes."""
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=utils.generator(0))
    return image_data.ImageData(images, torch.arange(40) % 2, ["a", "b"], "noise", flip=True, image_size=8)


def tiny_config(steps):
    return {
        "model": {"name": "PatchUNet", "channels": 1, "width": 8, "mults": [1], "num_classes": 2},
        "diffusion": {"timesteps": 20, "schedule": "cosine", "objective": "simple"},
        "data": {"name": "noise", "image_size": 8, "flip": True, "images": 40, "classes": ["a", "b"]},
        "train": {
            "loss": "l2",
            "steps": steps,
            "batch_size": 4,
            "lr": 1e-3,
            "optimizer": "adam",
            "seed": 0,
            "precision": "float32",
            "ema_betas": [0.9],
            "ema_start": 2,
            "p_uncond": 0.2,
            "label_dropout": "example",
        },
    }


def train_saving_often(steps, folder):
    """A run, or what is left of it, that saves its state after every step."""
    training.RunFolder.save_is_due = lambda self: True
    training.train(tiny_config(steps), tiny_images(), folder, resume=True, device="cpu")


def states(folder):
    return sorted(Path(folder).glob("state_*.pt"))


def newest_step(folder):
    return max((int(path.name.split("_")[1]) for path in states(folder)), default=-1)


def unreadable(folder):
    """The files of a run folder, hidden ones apart, that are not whole: there should never be one."""
    bad = []
    for path in states(folder):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != path.stem.split("_")[-1]:
            bad.append(path.name)
    for path in Path(folder).glob("[!.]*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                [file.get_tensor(name) for name in file.keys()]
        except Exception:
            bad.append(path.name)
    return bad


def final_bits(folder):
    """SHA-256 of a finished run's weights, and of everything in its last state."""
    folder, digest = Path(folder), hashlib.sha256()
    digest.update((folder / "model.safetensors").read_bytes())

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for name in value:
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            [add(v) for v in value]
        else:
            digest.update(repr(value).encode())

    add(weights.load_state(folder)[0])
    return digest.hexdigest()


def record(section, result):
    """Put a command's result into report/results/reliability.json."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    results[section] = {"command": f"python tests/stress/{section}.py", "machine": machine, **result}
    with utils.atomic_path(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    print(json.dumps(results[section], indent=2))
    print(f"wrote {RESULTS}")
