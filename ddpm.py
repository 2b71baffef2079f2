"""The diffusion process: beta schedules, the forward process, its posterior, the objectives and the samplers.

Run as a script it trains and samples an unconditional model of photographs (landscapes by default):

    python ddpm.py train --out runs/landscapes
    python ddpm.py sample --checkpoint runs/landscapes/model.safetensors --n 16 --out landscapes.png

Conventions: images are float, N x C x H x W, in [-1, 1]. Timesteps are 0-based: t = 0 is the least noisy step, t = T-1
the noisiest, and index t reads `betas[t]`. Coefficients are computed in float64 and stored in float32.
"Ho" is Ho et al. 2020 (arXiv 2006.11239), whose t is 1-based: our t is their t - 1.

The process knows its network as a noise predictor, `eps_model(x, t)`: x is N x C x H x W, t int64 N, the result has the
shape of x. Every network of modules.py is one; ddpm_conditional.py makes others, with labels and guidance.
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional as F

from utils import UserError, command_line, generator, look_up, progress

BETA_START, BETA_END = 1e-4, 0.02  # chosen by Ho et al. for T = 1000
MIN_SIGNAL = 1e-4  # alphas_cumprod where few-step sampling starts


# --- beta schedules ------------------------------------------------------------------------------------------------


def linear_schedule(timesteps):
    """beta grows evenly (Ho section 4)."""
    return torch.linspace(BETA_START, BETA_END, timesteps, dtype=torch.float64)


# Homework TODO 455: the cosine schedule
def cosine_schedule(timesteps):
    """alphas_cumprod follows a squared cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17; s = 0.008)."""
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


def quadratic_schedule(timesteps):
    """sqrt(beta) grows evenly."""
    return torch.linspace(BETA_START**0.5, BETA_END**0.5, timesteps, dtype=torch.float64) ** 2


def sigmoid_schedule(timesteps):
    """beta follows a logistic curve."""
    return torch.linspace(-6, 6, timesteps, dtype=torch.float64).sigmoid() * (BETA_END - BETA_START) + BETA_START


# A schedule of your own is a function of T and its row here.
SCHEDULES = {
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "quadratic": quadratic_schedule,
    "sigmoid": sigmoid_schedule,
}


def beta_schedule(name, timesteps):
    """The T variances beta_t of the forward process's steps, float64, each in (0, 1).

    Raises ValueError for an unknown name and for T < 1 or beyond reason.
    """
    if not 1 <= timesteps <= 100_000:
        raise ValueError(f"timesteps must be between 1 and 100,000, not {timesteps}")
    return look_up(SCHEDULES, name, "schedule")(timesteps)


# --- losses and objectives -----------------------------------------------------------------------------------------

# Each compares the predicted with the true noise, pixel by pixel.
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}

# Homework bonus: how much the error at t counts. "simple" counts all t alike (Ho eq. 14, L_simple); "vlb" has the
# weights of the variational bound (Ho eq. 12 with sigma_t^2 = beta_t).
OBJECTIVES = {
    "simple": lambda betas, alphas_cumprod: torch.ones_like(betas),
    "vlb": lambda betas, alphas_cumprod: betas / (2 * (1 - betas) * (1 - alphas_cumprod)),
}


# --- the process ---------------------------------------------------------------------------------------------------


def per_image(table, t):
    """table[t] for N timesteps, shaped N x 1 x 1 x 1 to multiply images."""
    return table[t].view(-1, 1, 1, 1)


class Diffusion:
    """The process for one schedule. All tables have T entries; index t is step t.

    alphas_cumprod is the share of the image's variance that survives until x_t: x_t = sqrt(alphas_cumprod) x0 +
    sqrt(1 - alphas_cumprod) noise (Ho eq. 4). posterior_* describe q(x_{t-1} | x_t, x0) (Ho eqs. 6-7).
    """

    def __init__(self, timesteps=1000, schedule="linear", objective="simple"):
        self.timesteps, self.schedule, self.objective = timesteps, schedule, objective
        self.set_betas(beta_schedule(schedule, timesteps))

    def set_betas(self, betas):
        """Compute all tables, in float64, and store them as float32 on the CPU."""
        alphas_cumprod = (1 - betas).cumprod(0)
        if alphas_cumprod[-1] < 1e-70:  # its root would be 0 in float32
            gone = "the image is long gone before the last"
            raise ValueError(f"{self.timesteps} timesteps are too many for the {self.schedule} schedule: {gone}")
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        self.exact = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "posterior_mean_coef1": betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef2": (1 - betas).sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
            "posterior_variance": betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
            "vlb_weights": OBJECTIVES["vlb"](betas, alphas_cumprod),
            "loss_weights": look_up(OBJECTIVES, self.objective, "objective")(betas, alphas_cumprod),
        }
        self.to("cpu")

    def to(self, device, dtype=torch.float32):
        """Store the tables on `device` as `dtype`; returns self."""
        for name, table in self.exact.items():
            setattr(self, name, table.to(dtype).to(device))
        return self

    def respaced(self, visited):
        """The same process seen at some of its timesteps only: a Diffusion whose step i is t = visited[i], ascending.

        Its betas follow from the same alphas_cumprod (Nichol & Dhariwal 2021, section 4).
        """
        alphas_cumprod = self.exact["alphas_cumprod"][visited]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        process = copy.copy(self)
        process.timesteps = len(visited)
        process.set_betas(1 - alphas_cumprod / before)
        return process.to(self.betas.device, self.betas.dtype)

    def shortened(self, timesteps):
        """Its first `timesteps` steps alone, as a Diffusion: for starting at a noised image instead of pure noise."""
        self.check_steps(timesteps)
        return self.respaced(list(range(timesteps)))

    # --- forward process ---

    # Homework TODO 563: the output of the forward process
    def q_sample(self, x0, t, noise):
        """x_t given x0, in one step: Ho eq. 4. Shapes: x0, noise N x C x H x W; t int64 N."""
        return per_image(self.sqrt_alphas_cumprod, t) * x0 + per_image(self.sqrt_one_minus_alphas_cumprod, t) * noise

    # Homework TODO 506: the posterior
    def q_posterior(self, x0, x_t, t):
        """Mean (N x C x H x W) and variance (N x 1 x 1 x 1) of q(x_{t-1} | x_t, x0): Ho eqs. 6-7."""
        mean = per_image(self.posterior_mean_coef1, t) * x0 + per_image(self.posterior_mean_coef2, t) * x_t
        return mean, per_image(self.posterior_variance, t)

    def predict_x0(self, x_t, t, eps):
        """The x0 that x_t and the predicted noise imply: Ho eq. 4 solved for x0."""
        return (x_t - per_image(self.sqrt_one_minus_alphas_cumprod, t) * eps) / per_image(self.sqrt_alphas_cumprod, t)

    # --- training ---

    def loss(self, eps_model, x0, t, noise, loss="l2"):
        """The training loss, a scalar: the error of the noise predicted at x_t, averaged over pixels and images."""
        eps = eps_model(self.q_sample(x0, t, noise), t)
        error = look_up(LOSSES, loss, "loss")(eps.float(), noise, reduction="none")
        return (per_image(self.loss_weights, t) * error).mean()

    # --- sampling ---

    def even_timesteps(self, steps):
        """`steps` timesteps, evenly spaced from T-1 down. Raises UserError."""
        self.check_steps(steps)
        return [round(self.timesteps * (1 - i / steps)) - 1 for i in range(steps)]

    def log_snr_timesteps(self, steps):
        """As `even_timesteps`, but evenly spaced in the log-SNR, from the noisiest t that holds some of the image.

        At purer noise the predicted x0 is a small error divided by a smaller number: it says nothing, and is clipped.
        """
        self.check_steps(steps)
        half_log_snr = torch.tensor([self.half_log_snr(t) for t in range(self.timesteps)], dtype=torch.float64)
        first = max(t for t in range(self.timesteps) if t < steps or self.signal(t) >= MIN_SIGNAL)
        targets = torch.linspace(half_log_snr[first], half_log_snr[0], steps, dtype=torch.float64)
        visited = []
        for i, t in enumerate(torch.searchsorted(-half_log_snr, -targets).tolist()):
            after, before = steps - 1 - i, visited[-1] if visited else self.timesteps
            visited.append(max(after, min(t, before - 1)))  # no timestep twice, also where they are few
        return visited

    def check_steps(self, steps):
        if not 1 <= steps <= self.timesteps:
            raise UserError(f"steps must be between 1 and the process's {self.timesteps} timesteps, not {steps}")

    def signal(self, t):
        """alphas_cumprod at t as a float, unrounded; 1 at t = -1, the clean image."""
        return self.exact["alphas_cumprod"][t].item() if t >= 0 else 1.0

    def half_log_snr(self, t):
        """log(sqrt(alphas_cumprod) / sqrt(1 - alphas_cumprod)) at t, the lambda of Lu et al."""
        return 0.5 * math.log(self.signal(t) / (1 - self.signal(t)))

    def x0_and_eps(self, eps_model, x, t, clip):
        """The x0 predicted for a batch at one t, clipped to [-1, 1] where asked, and the noise consistent with it."""
        index = torch.full((len(x),), t, device=x.device)
        eps = eps_model(x, index).to(x.dtype)
        x0 = self.predict_x0(x, index, eps)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - self.signal(t) ** 0.5 * x0) / (1 - self.signal(t)) ** 0.5
        return x0, eps

    @torch.inference_mode()
    def trajectory(self, eps_model, shape, indices, seed=0, sampler="ddim", steps=None, eta=None, x_T=None, **options):
        """Yield every x_t (N x C x H x W) of the images numbered `indices`; image i's noise depends on (seed, i) alone.

        shape is C x H x W; x_T replaces the starting noise; steps, eta: None is the sampler's default (see `SAMPLERS`).
        options: the sampler's `variance` and `clip`.
        """
        draw = image_noise(seed, indices, shape, self.betas.device)
        x = draw() if x_T is None else x_T.to(self.betas.device)
        steps, eta = self.step_count(sampler, steps), noise_level(sampler, eta)
        run = SAMPLERS[sampler].function
        yield from run(self, eps_model, x, draw, steps, eta=eta, **options)

    def step_count(self, sampler, steps=None):
        """How many steps a sampler takes: `steps`, or its default where that is None."""
        default = look_up(SAMPLERS, sampler, "sampler").steps or self.timesteps
        return min(default, self.timesteps) if steps is None else steps

    def sample(self, eps_model, n, shape, **options):
        """n samples, n x C x H x W on the CPU; options as for `sample_batches`."""
        return torch.cat(list(self.sample_batches(lambda part: eps_model, n, shape, **options)))

    def sample_batches(self, predictor, n, shape, batch_size=250, x_T=None, desc=None, **options):
        """Yield n samples, float on the CPU, in batches of at most batch_size; options as for `trajectory`.

        predictor(part): the eps_model for the images of the slice `part`, which may have labels of their own.
        desc: the name of a bar that shows every step of every batch; None: there is no bar.
        """
        firsts = range(0, n, batch_size)
        steps = self.step_count(options.get("sampler", "ddim"), options.get("steps"))
        with progress(total=steps * len(firsts), unit="step", desc=desc, disable=desc is None) as bar:
            for first in firsts:
                part = slice(first, first + batch_size)
                start = None if x_T is None else x_T[part]
                for i, x in enumerate(self.trajectory(predictor(part), shape, range(n)[part], x_T=start, **options)):
                    bar.update(i > 0)
                yield x.float().cpu()


def image_noise(seed, indices, shape, device="cpu"):
    """A function that draws standard normal noise: image i's comes from (seed, i), whatever batch it is drawn in."""
    generators = [generator(seed, i) for i in indices]

    def draw():
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return noise.to(device, memory_format=torch.channels_last)

    return draw


# --- samplers ------------------------------------------------------------------------------------------------------
# A sampler is a generator that yields every x_t: first the noise x it starts from, last the sample. `draw()` returns
# fresh standard normal noise. Each step goes from a timestep t to the next, s; the last to s = -1, the clean image.
# All take eta, variance and clip, also where they have no use for one.


# Homework TODO 750 and 758: sampling, one step and the loop
def ddpm_sampler(diffusion, eps_model, x, draw, steps, variance="posterior", clip=True, eta=None):
    """Ancestral sampling, Ho algorithm 2: x_{t-1} ~ N(posterior mean at the predicted x0, sigma_t^2).

    variance "posterior" is the posterior's, "beta" is beta_t: Ho section 3.2's two choices. With fewer steps than T it
    walks along the coarser chain through `steps` of the timesteps.
    """
    yield x
    visited = diffusion.even_timesteps(steps)[::-1]
    chain = diffusion.respaced(visited)
    for i in reversed(range(steps)):
        x0, _ = diffusion.x0_and_eps(eps_model, x, visited[i], clip)
        mean, sigma2 = chain.q_posterior(x0, x, torch.full((len(x),), i, device=x.device))
        if variance == "beta":
            sigma2 = chain.betas[i]
        x = mean + sigma2.sqrt() * draw() if i > 0 else mean
        yield x


def ddim_sampler(diffusion, eps_model, x, draw, steps, eta=0.0, clip=True, variance=None):
    """Song et al. 2021 (arXiv 2010.02502), eq. 12: eta = 0 is deterministic, eta = 1 has the DDPM's noise."""
    yield x
    for t, s in pairwise([*diffusion.even_timesteps(steps), -1]):
        a_t, a_s = diffusion.signal(t), diffusion.signal(s)
        x0, eps = diffusion.x0_and_eps(eps_model, x, t, clip)
        sigma2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        x = a_s**0.5 * x0 + (1 - a_s - sigma2) ** 0.5 * eps
        if sigma2 > 0:
            x = x + sigma2**0.5 * draw()
        yield x


def dpm_sampler(diffusion, eps_model, x, draw, steps, eta=1.0, clip=True, variance=None):
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095): second order, so that a few steps are enough.

    eta = 0 solves the deterministic equation (their algorithm 2), eta = 1 the stochastic one, which corrects errors of
    the network as DDPM's noise does. Each step extrapolates x0 from the last two predictions. The last step, to the
    clean image, is DDIM's.
    """
    yield x
    last_x0 = last_h = None
    for t, s in pairwise([*diffusion.log_snr_timesteps(steps), -1]):
        a_t, a_s = diffusion.signal(t), diffusion.signal(s)
        x0, _ = diffusion.x0_and_eps(eps_model, x, t, clip)
        if s < 0:
            yield x0
            return
        h = diffusion.half_log_snr(s) - diffusion.half_log_snr(t)
        d = x0 if last_x0 is None else x0 + h / (2 * last_h) * (x0 - last_x0)
        x = ((1 - a_s) / (1 - a_t)) ** 0.5 * math.exp(-eta * h) * x - a_s**0.5 * math.expm1(-(1 + eta) * h) * d
        if eta > 0:
            x = x + (-(1 - a_s) * math.expm1(-2 * eta * h)) ** 0.5 * draw()
        last_x0, last_h = x0, h
        yield x


class Sampler(NamedTuple):
    function: Callable
    steps: int | None  # by default; None: all T
    eta: float | None  # how much noise it adds by default: 0 none, 1 as much as DDPM; None: it has no such choice


# A sampler of your own is a function and its row here.
SAMPLERS = {
    "ddpm": Sampler(ddpm_sampler, steps=None, eta=None),
    "ddim": Sampler(ddim_sampler, steps=50, eta=0.0),
    "dpm": Sampler(dpm_sampler, steps=20, eta=1.0),
}


def noise_level(sampler, eta=None):
    """A sampler's eta: the one given, or its default; None for one that has no choice, such as DDPM."""
    default = look_up(SAMPLERS, sampler, "sampler").eta
    return default if eta is None or default is None else eta


def main(argv=None):
    import cli  # late: the process itself needs no command line

    parser, _ = cli.make_parser("An unconditional DDPM of photographs.", "landscapes", shape={})
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command_line(main)
