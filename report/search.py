"""The search: changes to the training and to the network, tried for equal minutes of one core.

    python report/search.py fashion_mnist            from nothing, without labels
    python report/search.py cifar10                  from the published weights, with labels

Every trial trains with `training.steps`. What the scripts have is a flag of `train`; the rest lives here only. Each
result joins report/results/search_DATA.json when it is there, and a second call makes those that are missing. The
minutes are of processor time: so two of these may run side by side, but nothing else.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import training  # noqa: E402
import utils  # noqa: E402
from ddpm import per_image  # noqa: E402
from ddpm_conditional import predictor  # noqa: E402
from ddpm_unconditional import SHAPE  # noqa: E402
from image_data import load_data  # noqa: E402
from modules import Attention  # noqa: E402
from utils import ArgumentParser, UserError, autocast, command_line, progress, say  # noqa: E402
from weights import read_checkpoint  # noqa: E402

INIT = {"fashion_mnist": None, "cifar10": ROOT / "checkpoints/cifar10_conditional.safetensors"}
SAMPLES = {"fashion_mnist": 2000, "cifar10": 500}
SAMPLER = {"sampler": "dpm", "steps": 10, "seed": 0}
CFG_SCALE = 2.0
NOISE_IMAGES = 100
AVERAGE = 0.95  # the EMA's beta where there is no cooldown: a few hundred steps allow no longer one


# --- what was tried --------------------------------------------------------------------------------------------------


def clip_gradients(run):
    """A gradient is made shorter where its norm is above 1."""

    def clip(*_):
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)

    run.optimizer.register_step_pre_hook(clip)


def laplace_timesteps(diffusion, n, generator, scale=0.5):
    """n timesteps whose log-SNR has a Laplace distribution around 0 (Hang et al. 2024, arXiv 2407.03297)."""
    alphas_cumprod = diffusion.exact["alphas_cumprod"]
    log_snr = (alphas_cumprod / (1 - alphas_cumprod)).log()
    (between,) = torch.gradient(-log_snr)  # how much of log-SNR lies at each timestep
    return torch.multinomial((-log_snr.abs() / scale).exp() * between, n, replacement=True, generator=generator)


def draw_from_laplace(run):
    training.TIMESTEP_SAMPLING["laplace"] = laplace_timesteps
    run.config["train"]["timestep_sampling"] = "laplace"


class VPrediction(nn.Module):
    """A noise predictor whose network predicts v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans and Ho 2022)."""

    def __init__(self, network, diffusion):
        super().__init__()
        self.network, self.diffusion = network, diffusion

    def forward(self, x, t, labels=None):
        d = self.diffusion
        v = self.network(x, t, labels).float()
        return per_image(d.sqrt_alphas_cumprod, t) * v + per_image(d.sqrt_one_minus_alphas_cumprod, t) * x


def predict_v(run):
    """The squared error of v is that of the noise, divided by abar."""
    run.diffusion.loss_weights = (1 / run.diffusion.exact["alphas_cumprod"]).float()
    run.model = VPrediction(run.model, run.diffusion)


def attend_at_second_level(run):
    """Full attention where the image's side is halved once, coming up. It begins as if it were not there."""
    attention = Attention(run.model.width * 4).to(run.device)
    run.model.up[1].append(attention)
    run.optimizer.add_param_group({"params": attention.parameters()})


class Trial(NamedTuple):
    """One change: settings of the network, settings of the training, and what else is done to a new run."""

    what: str
    model: dict = {}
    train: dict = {"cooldown": 0.25}
    change: object = None


COMMON = {
    "cooldown": Trial("cooldown over the last quarter"),
    "deeper": Trial("cooldown, a second block at the two lower levels", model={"depth": [1, 2, 2]}),
    "attention": Trial("cooldown, full attention at half the side", change=attend_at_second_level),
    "laplace": Trial("cooldown, log-SNR drawn from a Laplace distribution", change=draw_from_laplace),
}
TRIALS = {
    "fashion_mnist": COMMON
    | {
        "constant": Trial("constant learning rate", train={"ema_betas": [AVERAGE], "ema_start": 50}),
        "clip": Trial("cooldown, gradient norm clipped at 1", change=clip_gradients),
        "v": Trial("cooldown, v-prediction", change=predict_v),
        "wider": Trial("cooldown, twice the width", model={"width": 32}),
    },
    # a network that starts from weights can grow only where it begins as if it had not
    "cifar10": COMMON
    | {"much_deeper": Trial("cooldown, four blocks at the two lower levels", model={"depth": [1, 4, 4]})},
}


# --- one trial -------------------------------------------------------------------------------------------------------


def start(trial, data_name, seed):
    """A run in memory, before its first step."""
    init = INIT[data_name]
    data = load_data(data_name, "train", labels=init is not None)
    given = read_checkpoint(init)[1] if init else {}
    model = given.get("model", SHAPE | {"name": "PatchUNet", "channels": 1, "num_classes": None}) | trial.model
    config = {
        "model": model,
        "diffusion": given.get("diffusion", {"timesteps": 1000, "schedule": "cosine", "objective": "simple"}),
        "data": {"image_size": data.image_size},
        "train": {"seed": seed} | trial.train,
    }
    run = training.Run(config, data)
    if init:
        run.start_from(init)
    if trial.change:
        trial.change(run)
    return run


def make_steps(run, minutes):
    """Train for so many minutes of this process; returns how many it took. At half-time twice the steps are planned."""
    started = time.process_time()
    for _ in progress(training.steps(run), desc="training", unit="step"):
        if run.config["train"]["steps"] is None and time.process_time() - started > 30 * minutes:
            run.config["train"]["steps"] = 2 * run.step
    return (time.process_time() - started) / 60


def measure(run, data_name):
    """What the weights are worth: the last ones after a cooldown, otherwise their average."""
    model, n = next(iter(run.ema_models.values()), run.model).eval(), SAMPLES[data_name]
    test, asked, shown = load_data(data_name, "test"), None, None
    if INIT[data_name]:
        asked, shown = torch.arange(n) % len(test.classes), test.labels[:NOISE_IMAGES]
    eps_model_of = predictor(model, asked, CFG_SCALE)
    with autocast(run.device, run.config["train"]["precision"]):
        images = torch.cat(list(run.diffusion.sample_batches(eps_model_of, n, run.shape, desc="sampling", **SAMPLER)))
        error = evaluate.noise_error(model, run.diffusion, utils.to_model(test.images[:NOISE_IMAGES]), shown)
    quality = evaluate.evaluate_samples(utils.to_uint8(images), asked, data_name)
    return {"noise_error": error["mse"], "quality": quality}


def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=TRIALS)
    above_0 = utils.number(float, 0, above=True)
    parser.add_argument("--minutes", type=above_0, default=5.0, help="of one core, for a trial")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = ROOT / f"report/results/search_{args.data}.json"
    command = f"python report/search.py {args.data} --minutes {args.minutes:g}"
    result = json.loads(path.read_text()) if path.exists() else {"command": command, "rows": []}
    if result["command"] != command:
        raise UserError(f"{path} is of `{result['command']}`: run that, or delete the file")
    for seed, (name, trial) in itertools.product((0, 1), TRIALS[args.data].items()):
        if any((row["trial"], row["seed"]) == (name, seed) for row in result["rows"]):
            continue
        say(f"{trial.what}, seed {seed}")
        run = start(trial, args.data, seed)
        minutes = make_steps(run, args.minutes)
        about = {"trial": name, "what": trial.what, "seed": seed, "minutes": minutes, "steps": run.step}
        about["parameters"] = sum(p.numel() for p in run.model.parameters())
        result["rows"].append(about | measure(run, args.data))
        utils.write_json(path, result)


if __name__ == "__main__":
    command_line(main)
