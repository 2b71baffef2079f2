"""The diffusion process: beta schedules, the forward process, its posterior, the objectives and the samplers.

Run as a script it trains and samples an unconditional model of photographs (landscapes by default):

    python ddpm.py train --out runs/landscapes
    python ddpm.py sample --checkpoint runs/landscapes/model.safetensors --n 16 --out landscapes.png

Conventions: images are float, N x C x H x W, in [-1, 1]. Timesteps are 0-based: t = 0 is the least noisy step, t = T-1
the noisiest, and index t reads `betas[t]`. Coefficients are computed in float64 and stored in float32.
"Ho" is Ho et al. 2020 (arXiv 2006.11239), whose t is 1-based: our t is their t - 1.
"""

import math

import torch
from torch.nn import functional as F

SCHEDULES = ("linear", "cosine", "quadratic", "sigmoid")
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}
OBJECTIVES = ("simple", "vlb")
SAMPLERS = {"ddpm": None, "ddim": 50, "dpm": 20}  # and their default numbers of steps; None: all T
ETAS = {"ddim": 0.0, "dpm": 1.0}  # how much noise they add by default: 0 none, 1 as much as DDPM
MIN_SIGNAL = 1e-4  # alphas_cumprod where few-step sampling starts
BETA_START, BETA_END = 1e-4, 0.02  # chosen by Ho et al. for T = 1000
MAX_TIMESTEPS = 100_000


def beta_schedule(name, timesteps):
    """The T variances beta_t of the forward process's steps, float64, each in (0, 1).

    linear      Ho section 4
    cosine      Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17, with s = 0.008 and betas clipped at 0.999
    quadratic   linear in sqrt(beta)
    sigmoid     a logistic curve from beta_start to beta_end
    Raises ValueError for an unknown name and for T < 1 or beyond reason.
    """
    if not 1 <= timesteps <= MAX_TIMESTEPS:
        raise ValueError(f"timesteps must be between 1 and {MAX_TIMESTEPS}, not {timesteps}")
    f64 = torch.float64
    if name == "linear":
        return torch.linspace(BETA_START, BETA_END, timesteps, dtype=f64)
    if name == "cosine":
        u = torch.linspace(0, 1, timesteps + 1, dtype=f64)
        alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    if name == "quadratic":
        return torch.linspace(BETA_START**0.5, BETA_END**0.5, timesteps, dtype=f64) ** 2
    if name == "sigmoid":
        return torch.linspace(-6, 6, timesteps, dtype=f64).sigmoid() * (BETA_END - BETA_START) + BETA_START
    raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")


def per_image(table, t):
    """table[t] for N timesteps, shaped N x 1 x 1 x 1 to multiply images."""
    return table[t].view(-1, 1, 1, 1)


def with_next(visited):
    """[999, 949, ..., 0] -> [(999, 949), ..., (0, -1)]: every timestep with the one that follows."""
    return list(zip(visited, [*visited[1:], -1], strict=True))


def noise_level(sampler, eta=None):
    """A sampler's eta: the one given, or its default; None for DDPM, which has no choice."""
    return ETAS.get(sampler) if eta is None or sampler not in ETAS else eta


class Diffusion:
    """The process for one schedule. All tables have T entries; index t is step t.

    alphas_cumprod is the share of the image's variance that survives until x_t: x_t = sqrt(alphas_cumprod) x0 +
    sqrt(1 - alphas_cumprod) noise (Ho eq. 4). posterior_* describe q(x_{t-1} | x_t, x0) (Ho eqs. 6-7).
    """

    def __init__(self, timesteps=1000, schedule="linear", objective="simple"):
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
        self.timesteps, self.schedule, self.objective = timesteps, schedule, objective
        betas = beta_schedule(schedule, timesteps)
        alphas_cumprod = (1 - betas).cumprod(0)
        if alphas_cumprod[-1] < 1e-70:  # its root would be 0 in float32
            raise ValueError(
                f"{timesteps} timesteps are too many for the {schedule} schedule: the image is long gone before"
            )
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        # The samplers read these as Python floats: exact, and no table look-up on the device in each step.
        self.alphas_cumprod_float64 = alphas_cumprod.tolist()

        self.betas = betas.float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.alphas_cumprod_prev = alphas_cumprod_prev.float()
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt().float()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt().float()
        self.posterior_variance = (betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)).float()
        self.posterior_mean_coef1 = (betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)).float()
        self.posterior_mean_coef2 = ((1 - betas).sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)).float()
        # Ho eq. 12 with sigma_t^2 = beta_t: the factor before ||noise - eps||^2 in the variational bound.
        self.vlb_weights = (betas / (2 * (1 - betas) * (1 - alphas_cumprod))).float()

    def to(self, device):
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    # --- forward process -------------------------------------------------------------------------------------------

    def q_sample(self, x0, t, noise):
        """x_t given x0, in one step: Ho eq. 4. Shapes: x0, noise N x C x H x W; t int64 N."""
        return per_image(self.sqrt_alphas_cumprod, t) * x0 + per_image(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def q_posterior(self, x0, x_t, t):
        """Mean (N x C x H x W) and variance (N x 1 x 1 x 1) of q(x_{t-1} | x_t, x0): Ho eqs. 6-7."""
        mean = per_image(self.posterior_mean_coef1, t) * x0 + per_image(self.posterior_mean_coef2, t) * x_t
        return mean, per_image(self.posterior_variance, t)

    def predict_x0(self, x_t, t, eps):
        """The x0 that x_t and the predicted noise imply: Ho eq. 4 solved for x0."""
        return (x_t - per_image(self.sqrt_one_minus_alphas_cumprod, t) * eps) / per_image(self.sqrt_alphas_cumprod, t)

    # --- training --------------------------------------------------------------------------------------------------

    def loss(self, model, x0, t, noise, labels=None, loss="l2"):
        """The training loss, a scalar: the noise's prediction error at x_t, averaged over pixels and images.

        objective "simple" weights all t alike (Ho eq. 14); "vlb" has the variational bound's weights (Ho eq. 12).
        """
        eps = model(self.q_sample(x0, t, noise), t, labels)
        per_pixel = LOSSES[loss](eps.float(), noise, reduction="none")
        if self.objective == "vlb":
            per_pixel = per_image(self.vlb_weights, t) * per_pixel
        return per_pixel.mean()

    # --- sampling --------------------------------------------------------------------------------------------------
    # A sampler is a generator that yields every x_t: first the noise it starts from, last the sample. `eps_model(x, t)`
    # predicts the noise in a batch x at one timestep t (a Python int); `draw()` returns fresh standard normal noise.

    def step_pairs(self, steps):
        """The timesteps visited, as pairs (t, next t): `steps` of them, evenly spaced from T-1 down; the last next is -1."""
        self.check_steps(steps)
        return with_next([round(self.timesteps * (1 - i / steps)) - 1 for i in range(steps)])

    def log_snr_pairs(self, steps):
        """As `step_pairs`, but evenly spaced in the log-SNR, and from the noisiest t that still holds some of the image.

        At purer noise the predicted x0 is a small error divided by a smaller number: it says nothing, and is clipped.
        """
        self.check_steps(steps)
        half_log_snr = torch.tensor([self.half_log_snr(t) for t in range(self.timesteps)], dtype=torch.float64)
        first = max(t for t in range(self.timesteps) if t < steps or self.signal(t) >= MIN_SIGNAL)
        targets = torch.linspace(half_log_snr[first], half_log_snr[0], steps, dtype=torch.float64)
        visited = []
        for i, t in enumerate(torch.searchsorted(-half_log_snr, -targets).tolist()):
            after, before = steps - 1 - i, visited[-1] if visited else self.timesteps
            visited.append(
                max(after, min(t, before - 1))
            )  # a timestep of its own for each step, also where they are few
        return with_next(visited)

    def check_steps(self, steps):
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must be between 1 and the model's {self.timesteps} timesteps, not {steps}")

    def signal(self, t):
        """alphas_cumprod at t as a float; 1 at t = -1, the clean image."""
        return self.alphas_cumprod_float64[t] if t >= 0 else 1.0

    def half_log_snr(self, t):
        """log(sqrt(alphas_cumprod) / sqrt(1 - alphas_cumprod)) at t, the lambda of Lu et al."""
        return 0.5 * math.log(self.signal(t) / (1 - self.signal(t)))

    def x0_and_eps(self, eps_model, x, t, clip):
        """The predicted x0, clipped to the images' range where asked, and the noise consistent with it."""
        a = self.signal(t)
        eps = eps_model(x, t)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - a**0.5 * x0) / (1 - a) ** 0.5
        return x0, eps

    def ddpm_sampler(self, eps_model, x, draw, steps=None, variance="posterior", clip=True):
        """Ancestral sampling, Ho algorithm 2: x_{t-1} ~ N(posterior mean at the predicted x0, sigma_t^2).

        variance "posterior" is the posterior's, "beta" is beta_t: Ho section 3.2's two choices. With fewer steps than T
        the same formulas hold for the coarser chain, whose step from t to s has beta = 1 - signal(t) / signal(s).
        """
        yield x
        for t, s in self.step_pairs(steps or self.timesteps):
            a_t, a_s = self.signal(t), self.signal(s)
            beta = 1 - a_t / a_s
            x0, _ = self.x0_and_eps(eps_model, x, t, clip)
            x = (beta * a_s**0.5 * x0 + (1 - beta) ** 0.5 * (1 - a_s) * x) / (1 - a_t)
            if s >= 0:
                sigma2 = beta * (1 - a_s) / (1 - a_t) if variance == "posterior" else beta
                x = x + sigma2**0.5 * draw()
            yield x

    def ddim_sampler(self, eps_model, x, draw, steps=50, eta=0.0, clip=True):
        """Song et al. 2021 (arXiv 2010.02502), eq. 12: eta = 0 is deterministic, eta = 1 has the DDPM's noise."""
        yield x
        for t, s in self.step_pairs(steps):
            a_t, a_s = self.signal(t), self.signal(s)
            x0, eps = self.x0_and_eps(eps_model, x, t, clip)
            sigma2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
            x = a_s**0.5 * x0 + (1 - a_s - sigma2) ** 0.5 * eps
            if sigma2 > 0:
                x = x + sigma2**0.5 * draw()
            yield x

    def dpm_sampler(self, eps_model, x, draw, steps=20, eta=1.0, clip=True):
        """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095): second order, so that a few steps are enough.

        eta = 0 solves the deterministic equation (their algorithm 2), eta = 1 the stochastic one, which corrects errors of
        the network as DDPM's noise does. Each step extrapolates x0 from the last two predictions. The last step, to the
        clean image, is DDIM's.
        """
        yield x
        last_x0 = last_h = None
        for t, s in self.log_snr_pairs(steps):
            a_t, a_s = self.signal(t), self.signal(s)
            x0, _ = self.x0_and_eps(eps_model, x, t, clip)
            if s < 0:
                yield x0
                return
            h = self.half_log_snr(s) - self.half_log_snr(t)
            d = x0 if last_x0 is None else x0 + h / (2 * last_h) * (x0 - last_x0)
            x = ((1 - a_s) / (1 - a_t)) ** 0.5 * math.exp(-eta * h) * x - a_s**0.5 * math.expm1(-(1 + eta) * h) * d
            if eta > 0:
                x = x + (-(1 - a_s) * math.expm1(-2 * eta * h)) ** 0.5 * draw()
            last_x0, last_h = x0, h
            yield x

    @torch.inference_mode()
    def trajectory(
        self,
        model,
        shape,
        indices,
        seed=0,
        labels=None,
        cfg_scale=0.0,
        sampler="ddim",
        steps=None,
        eta=None,
        variance="posterior",
        clip=True,
        x_T=None,
    ):
        """Yield every x_t (N x C x H x W) of the images numbered `indices`; image i's noise depends on (seed, i) alone.

        shape is C x H x W; labels int64 N or None; x_T replaces the starting noise; steps, eta: None is the sampler's default.
        """
        steps, eta = self.step_count(sampler, steps), noise_level(sampler, eta)
        device = self.betas.device
        draw = ImageNoise(seed, indices, shape, device)
        x = draw() if x_T is None else x_T.to(device)
        eps_model = guided(model, None if labels is None else labels.to(device), cfg_scale)
        if sampler == "ddpm":
            return (yield from self.ddpm_sampler(eps_model, x, draw, steps, variance, clip))
        if sampler == "ddim":
            return (yield from self.ddim_sampler(eps_model, x, draw, steps, eta, clip))
        return (yield from self.dpm_sampler(eps_model, x, draw, steps, eta, clip))

    def step_count(self, sampler, steps=None):
        """How many steps a sampler takes: `steps`, or its default where that is None."""
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: choose from {', '.join(SAMPLERS)}")
        return steps or min(SAMPLERS[sampler] or self.timesteps, self.timesteps)

    def sample(self, model, n, shape, **options):
        """n samples, n x C x H x W on the CPU; options as for `sample_batches`."""
        return torch.cat(list(self.sample_batches(model, n, shape, **options)))

    def sample_batches(self, model, n, shape, labels=None, batch_size=250, x_T=None, progress=None, **options):
        """Yield n samples, float on the CPU, in batches of at most batch_size; options as for `trajectory`.

        progress(total=...): makes a bar, such as tqdm's, that is moved on after every step of every batch.
        """
        firsts = range(0, n, batch_size)
        steps = self.step_count(options.get("sampler", "ddim"), options.get("steps"))
        bar = progress(total=steps * len(firsts)) if progress else None
        for first in firsts:
            part = slice(first, min(first + batch_size, n))
            trajectory = self.trajectory(
                model,
                shape,
                range(part.start, part.stop),
                labels=None if labels is None else labels[part],
                x_T=None if x_T is None else x_T[part],
                **options,
            )
            for i, x in enumerate(trajectory):
                if bar is not None and i > 0:
                    bar.update()
            yield x.float().cpu()
        if bar is not None:
            bar.close()


class ImageNoise:
    """Standard normal noise in which image i's stream comes from (seed, i), whatever batch it is drawn in."""

    def __init__(self, seed, indices, shape, device="cpu"):
        from utils import generator

        self.generators = [generator(seed, i) for i in indices]
        self.shape, self.device = shape, device

    def __call__(self):
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return noise.to(self.device, memory_format=torch.channels_last)


def guided(model, labels=None, cfg_scale=0.0):
    """eps_model(x, t) with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6, as in the course).

    cfg_scale = 0 (or 1) is no guidance: the conditional prediction alone. Otherwise
    eps = eps_uncond + cfg_scale (eps_cond - eps_uncond), the paper's (1 + w) eps_cond - w eps_uncond at w = cfg_scale - 1.
    Both predictions come from one pass over a batch of twice the size.
    """

    def eps_model(x, t):
        t = torch.full((len(x),), t, device=x.device)
        if labels is None or cfg_scale in (0, 1):
            return model(x, t, labels).float()
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, -1)]))
        eps_cond, eps_uncond = both.float().chunk(2)
        return torch.lerp(eps_uncond, eps_cond, cfg_scale)

    return eps_model


def main(argv=None):
    import cli  # late: only the script needs the training loop

    parser, _ = cli.make_parser("An unconditional DDPM of photographs.", "landscapes", shape={})
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    from utils import command_line

    command_line(main)
