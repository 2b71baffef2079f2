"""The diffusion process against independent references: diffusers, Bayes' rule on a grid, and Gaussian data, for which
the optimal noise predictor and every sampler's mean and variance are known exactly."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import ddpm
from ddpm import SCHEDULES, Diffusion, beta_schedule, ddim_sampler, ddpm_sampler, dpm_sampler, image_noise
from ddpm_conditional import guided, predictor, with_labels
from utils import UserError

DIFFUSERS_NAMES = {
    "linear": "linear",
    "cosine": "squaredcos_cap_v2",
    "quadratic": "scaled_linear",
    "sigmoid": "sigmoid",
}
a_schedule = st.sampled_from(list(SCHEDULES))
f64 = torch.float64


def noise_sequence(shape, seed=0):
    """draw() as the samplers want it: the same sequence for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=f64)


def exact_diffusion(timesteps, schedule):
    """With tables in float64, for comparisons beyond float32's digits."""
    return Diffusion(timesteps, schedule).to("cpu", f64)


def some_model(x, t, labels=None):
    """A smooth function of x and t (one for all images, or one each) that predicts no noise in particular."""
    t = torch.as_tensor(t).to(x.dtype).view(-1, 1, 1, 1)
    return 0.6 * x + 0.3 * torch.sin(3 * x + 0.1 * t) + (0 if labels is None else 0.1 * labels.view(-1, 1, 1, 1))


# --- schedules ---


@pytest.mark.parametrize("timesteps", [1, 2, 10, 200, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_diffusers(name, timesteps):
    theirs = diffusers.DDPMScheduler(timesteps, 1e-4, 0.02, DIFFUSERS_NAMES[name])
    ours = beta_schedule(name, timesteps)
    assert ours.dtype == f64
    np.testing.assert_allclose(ours, theirs.betas, atol=1e-6)


def test_cosine_schedule_by_its_definition():
    """alphas_cumprod is f(t) / f(0), until the clipping of the last betas."""
    f = [math.cos((t / 10 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(11)]
    alphas_cumprod = (1 - beta_schedule("cosine", 10)).cumprod(0)
    np.testing.assert_allclose(alphas_cumprod[:-1], np.array(f[1:10]) / f[0], rtol=1e-12)
    assert beta_schedule("cosine", 10)[-1] == 0.999


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Diffusion(10, "linaer"), "unknown schedule"),
        (lambda: Diffusion(0, "linear"), "between 1 and"),
        (lambda: Diffusion(objective="l2"), "unknown objective"),
        (lambda: Diffusion(10).sample(some_model, 1, (1, 4, 4), sampler="euler"), "unknown sampler"),
        (lambda: Diffusion(10).even_timesteps(0), "steps must be between"),
        (lambda: Diffusion(10).even_timesteps(11), "steps must be between"),
        (lambda: Diffusion(10).log_snr_timesteps(11), "steps must be between"),
        (lambda: Diffusion(10).shortened(11), "steps must be between"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises((ValueError, UserError), match=words):
        call()


@given(a_schedule, st.integers(1, 2000))
def test_tables(schedule, timesteps):
    d = Diffusion(timesteps, schedule)
    tables = {name: value for name, value in vars(d).items() if isinstance(value, torch.Tensor)}
    for name, table in tables.items():
        assert table.shape == (timesteps,) and table.dtype == torch.float32 and table.isfinite().all(), name
    betas = beta_schedule(schedule, timesteps)
    assert ((betas > 0) & (betas < 1)).all()
    exact = np.cumprod(1 - betas.numpy())
    assert (np.diff(exact, prepend=1) < 0).all()
    np.testing.assert_allclose(d.exact["alphas_cumprod"], exact, rtol=1e-10)
    for name, want in {
        "betas": betas,
        "alphas_cumprod": exact,
        "alphas_cumprod_prev": [1, *exact[:-1]],
        "sqrt_alphas_cumprod": exact**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - exact) ** 0.5,
    }.items():
        np.testing.assert_allclose(tables[name], want, rtol=1e-6)
    assert [d.posterior_mean_coef1[0], d.posterior_mean_coef2[0], d.posterior_variance[0]] == [1, 0, 0]  # it is x0
    assert (d.posterior_variance <= d.betas).all()


@given(a_schedule, st.integers(1, 1000), st.data())
def test_q_sample_is_t_plus_1_single_steps(schedule, timesteps, data):
    """Both are Gaussian: equal means and variances are equal distributions."""
    t = data.draw(st.integers(0, timesteps - 1))
    mean, variance = 1.0, 0.0
    for beta in beta_schedule(schedule, timesteps)[: t + 1].tolist():
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
    d, one, index = Diffusion(timesteps, schedule), torch.ones(1, 1, 1, 1), torch.tensor([t])
    np.testing.assert_allclose(d.q_sample(one, index, 0 * one).item(), mean, rtol=1e-5)
    np.testing.assert_allclose(d.q_sample(0 * one, index, one).item(), variance**0.5, rtol=1e-5)


@given(a_schedule, st.integers(1, 1000), st.integers(1, 5), st.sampled_from([(1, 1, 9), (1, 4, 4), (3, 2, 6)]))
def test_forward_shapes_and_inverse(schedule, timesteps, n, shape):
    d, g = Diffusion(timesteps, schedule), torch.Generator().manual_seed(n)
    x0, noise = torch.randn(2, n, *shape, generator=g)
    t = torch.randint(timesteps, (n,), generator=g)
    x_t = d.q_sample(x0, t, noise)
    mean, variance = d.q_posterior(x0, x_t, t)
    assert x_t.shape == mean.shape == x0.shape and variance.shape == (n, 1, 1, 1)
    for i in range(n):  # each image has its own timestep
        alone = d.q_sample(x0[i : i + 1], t[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(alone[0], x_t[i])
    # where most of the image is left, float32 gets it back from x_t and the noise
    clear = d.alphas_cumprod[t] > 1e-4
    torch.testing.assert_close(d.predict_x0(x_t, t, noise)[clear], x0[clear], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps, t", [(10, 1), (10, 9), (200, 1), (200, 120), (1000, 7), (1000, 700)])
def test_posterior_is_bayes_rule(schedule, timesteps, t):
    """q(x_{t-1} | x_t, x0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x0), here normalised on a fine grid."""
    betas = beta_schedule(schedule, timesteps).numpy()
    a_prev, a = np.prod(1 - betas[:t]), np.prod(1 - betas[: t + 1])
    x0 = 0.7
    x_t = a**0.5 * x0 - 1.5 * (1 - a) ** 0.5
    centre, spread = a_prev**0.5 * x0, (1 - a_prev) ** 0.5
    x_prev = np.linspace(centre - 12 * spread, centre + 12 * spread, 100_001)
    likelihood = stats.norm.logpdf(x_t, (1 - betas[t]) ** 0.5 * x_prev, betas[t] ** 0.5)
    log_p = likelihood + stats.norm.logpdf(x_prev, centre, spread)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    assert p[0] < 1e-12 and p[-1] < 1e-12  # the grid is wide enough
    mean = (p * x_prev).sum()
    variance = (p * (x_prev - mean) ** 2).sum()
    as_images = torch.tensor([x0, x_t]).view(2, 1, 1, 1, 1)
    ours = Diffusion(timesteps, schedule).q_posterior(*as_images, torch.tensor([t]))
    np.testing.assert_allclose(ours[0].item(), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1].item(), variance, rtol=1e-5)


@pytest.mark.parametrize("loss", ddpm.LOSSES)
def test_losses(loss):
    d, t = Diffusion(100, "cosine"), torch.tensor([0, 5, 50, 99])
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    error = (some_model(d.q_sample(x0, t, noise), t) - noise).numpy().astype(np.float64)
    expected = {
        "l1": np.abs(error),
        "l2": error**2,
        "huber": np.where(np.abs(error) < 1, error**2 / 2, np.abs(error) - 0.5),
    }[loss].mean()
    np.testing.assert_allclose(d.loss(some_model, x0, t, noise, loss).item(), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_vlb_weights_are_the_bounds(schedule):
    """For t > 0 the weighted squared error is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), sigma_t^2 = beta_t, up to a
    constant: the squared distance of the two means over 2 beta_t (Ho eq. 8)."""
    d = Diffusion(100, schedule, objective="vlb")
    x0, noise, wrong = torch.randn(3, 6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 2, 10, 50, 80, 90])
    x_t = d.q_sample(x0, t, noise)
    distance = d.q_posterior(x0, x_t, t)[0] - d.q_posterior(d.predict_x0(x_t, t, wrong), x_t, t)[0]
    expected = (distance**2 / (2 * d.betas[t].view(-1, 1, 1, 1))).mean().item()
    ours = d.loss(lambda *_: wrong, x0, t, noise).item()
    np.testing.assert_allclose(ours, expected, rtol=1e-3)


# --- samplers against diffusers ---


def with_our_betas(scheduler, schedule):
    """A scheduler of diffusers with our coefficients in float64, for comparisons beyond float32's digits."""
    scheduler.betas = beta_schedule(schedule, scheduler.config.num_train_timesteps)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=f64)
    return scheduler


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance, theirs", [("posterior", "fixed_small"), ("beta", "fixed_large")])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_is_diffusers(schedule, variance, theirs, clip):
    """Every single step of a chain, each from the same x_t and with the same noise."""
    timesteps, shape, g = 40, (2, 3, 4, 4), torch.Generator().manual_seed(1)
    scheduler = diffusers.DDPMScheduler(timesteps, variance_type=theirs, clip_sample=clip)
    scheduler, d = with_our_betas(scheduler, schedule), exact_diffusion(timesteps, schedule)
    x_t = noise_sequence(shape)()
    chain = ddpm_sampler(d, some_model, x_t, noise_sequence(shape, 1), timesteps, variance, clip)
    assert next(chain) is x_t
    for t, ours in zip(reversed(range(timesteps)), chain, strict=True):
        expected = scheduler.step(some_model(x_t, t), t, x_t, generator=g).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        x_t = ours


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_is_diffusers(schedule, eta, clip):
    timesteps, steps, shape = 100, 20, (2, 1, 4, 4)
    scheduler = diffusers.DDIMScheduler(timesteps, clip_sample=clip, timestep_spacing="trailing")
    scheduler, d = with_our_betas(scheduler, schedule), exact_diffusion(timesteps, schedule)
    scheduler.set_timesteps(steps)
    x_t, their_draw = noise_sequence(shape)(), noise_sequence(shape, 1)
    chain = ddim_sampler(d, some_model, x_t, noise_sequence(shape, 1), steps, eta, clip)
    next(chain)
    assert d.even_timesteps(steps) == scheduler.timesteps.tolist()
    for t, ours in zip(scheduler.timesteps.tolist(), chain, strict=True):
        noise = {"eta": eta, "variance_noise": their_draw()} if eta > 0 and t > 4 else {}  # the last step adds none
        eps = some_model(x_t, t)
        expected = scheduler.step(eps, t, x_t, use_clipped_model_output=True, **noise).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        x_t = ours


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with NumPy 2
@pytest.mark.parametrize("spacing", ["even_timesteps", "log_snr_timesteps"])
@pytest.mark.parametrize("eta, algorithm", [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps, steps", [(1000, 20), (1000, 7), (60, 60), (50, 1), (50, 2)])
def test_dpm_is_diffusers(schedule, timesteps, steps, eta, algorithm, spacing):
    """On timesteps evenly spaced in t, which theirs can choose, and on ours."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        timesteps,
        algorithm_type=algorithm,
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    # theirs rounds x and the noise to float32, which tells on large x: at purer noise, and with noise added
    tolerance = 1e-6 if spacing == "even_timesteps" and eta == 0 else 1e-5
    d, shape = exact_diffusion(timesteps, schedule), (2, 1, 4, 4)
    theirs.set_timesteps(steps)
    if spacing == "even_timesteps":
        d.log_snr_timesteps = d.even_timesteps
    else:
        theirs.timesteps = torch.tensor(d.log_snr_timesteps(steps))
    a = (1 - beta_schedule(schedule, timesteps)).cumprod(0)[theirs.timesteps]
    theirs.sigmas = torch.cat([(1 / a - 1).sqrt(), torch.zeros(1, dtype=f64)])  # in float64, as ours
    x, draw, their_draw = noise_sequence(shape)(), noise_sequence(shape, 1), noise_sequence(shape, 1)
    chain = dpm_sampler(d, some_model, x, draw, steps, eta, clip=False)
    next(chain)
    for i, (t, ours) in enumerate(zip(theirs.timesteps, chain, strict=True)):
        noise = their_draw() if eta and i < steps - 1 else torch.zeros(shape, dtype=f64)  # the last step adds none
        x = theirs.step(some_model(x, t.item()), t, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, x, rtol=tolerance, atol=tolerance)


# --- samplers on Gaussian data ---
# For data N(MEAN, STD^2) in every pixel the optimal prediction of the noise is linear in x_t, so without clipping each
# sampler is affine in its starting noise and in what it draws: mean and variance obey exact recursions.

MEAN, STD = 0.3, 0.2


def gain(a):
    """The factor of x_t - sqrt(a) MEAN in the optimal prediction of the noise; a is alphas_cumprod."""
    return (1 - a) ** 0.5 / (a * STD**2 + 1 - a)


def sampled_mean_and_variance(run, diffusion, steps, sources, **options):
    """A sampler's exact output mean and variance, from its response to each of its independent sources of noise.

    It is run once on a batch: image 0 sees no noise at all, image i > 0 a unit of source i only.
    """
    drawn = iter(torch.eye(sources + 1, dtype=f64)[1:])

    def draw():
        return next(drawn).view(-1, 1, 1, 1)

    def eps_model(x, t):
        a = diffusion.signal(t[0])
        return gain(a) * (x - a**0.5 * MEAN)

    *_, response = run(diffusion, eps_model, draw(), draw, steps, clip=False, **options)
    assert not list(drawn)  # all noise was used
    response = response.flatten()
    return response[0].item(), ((response[1:] - response[0]) ** 2).sum().item()


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 2, 30, 300])
def test_ddpm_on_gaussian_data(schedule, timesteps, variance):
    d = exact_diffusion(timesteps, schedule)
    ours = sampled_mean_and_variance(ddpm_sampler, d, timesteps, sources=timesteps, variance=variance)
    betas = beta_schedule(schedule, timesteps).numpy()
    a = np.cumprod(1 - betas)
    mean, var = 0.0, 1.0
    for t in reversed(range(timesteps)):
        # Ho eq. 11: (x_t - beta_t / sqrt(1 - a_t) eps) / sqrt(1 - beta_t)
        share = betas[t] / (1 - a[t]) ** 0.5 * gain(a[t])
        slope, shift = np.array([1 - share, share * a[t] ** 0.5 * MEAN]) / (1 - betas[t]) ** 0.5
        a_prev = a[t - 1] if t else 1.0
        noise = {"posterior": betas[t] * (1 - a_prev) / (1 - a[t]), "beta": betas[t] if t else 0.0}[variance]
        mean, var = slope * mean + shift, slope**2 * var + noise
    np.testing.assert_allclose(ours, (mean, var), rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps, steps", [(2, 2), (30, 30), (100, 10), (1000, 50), (1000, 7)])
def test_ddim_on_gaussian_data(schedule, timesteps, steps, eta):
    d = exact_diffusion(timesteps, schedule)
    ours = sampled_mean_and_variance(ddim_sampler, d, steps, sources=steps if eta else 1, eta=eta)
    a = np.append(np.cumprod(1 - beta_schedule(schedule, timesteps).numpy()), 1.0)  # a[-1] is the clean image
    visited = [round(timesteps * (1 - i / steps)) - 1 for i in range(steps)] + [-1]
    mean, var = 0.0, 1.0
    for t, s in zip(visited[:-1], visited[1:], strict=True):
        sigma = eta * ((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])) ** 0.5  # Song eq. 16
        # Song eq. 12, as slope * x_t + shift
        keep, point = (a[s] / a[t]) ** 0.5, (1 - a[s] - sigma**2) ** 0.5 - (a[s] * (1 - a[t]) / a[t]) ** 0.5
        slope, shift = keep + point * gain(a[t]), -point * gain(a[t]) * a[t] ** 0.5 * MEAN
        mean, var = slope * mean + shift, slope**2 * var + sigma**2
    np.testing.assert_allclose(ours, (mean, var), rtol=1e-6)


@pytest.mark.parametrize(
    "run, options, noisy",
    [
        (ddpm_sampler, {}, True),
        (ddpm_sampler, {"variance": "beta"}, True),
        (ddim_sampler, {}, False),
        (ddim_sampler, {"eta": 1.0}, True),
        (dpm_sampler, {"eta": 0.0}, False),
        (dpm_sampler, {}, True),
    ],
)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_samplers_approach_the_data(schedule, run, options, noisy):
    """With more steps, every sampler's mean and standard deviation come closer to the data's. cosine: T grows. linear
    reaches noise only at T = 1000, so there the number of steps grows."""
    errors = []
    for steps in (10, 40, 160, 640):
        d = Diffusion(steps if schedule == "cosine" else 1000, schedule)
        mean, variance = sampled_mean_and_variance(run, d, steps, sources=steps if noisy else 1, **options)
        errors.append(max(abs(mean - MEAN), abs(variance**0.5 - STD)))
    assert errors[-1] < 0.01
    assert errors[-1] < errors[0] / 2 and errors[2] <= errors[0]


@given(st.integers(1, 3000), st.data())
def test_even_timesteps(timesteps, data):
    steps = data.draw(st.integers(1, timesteps))
    visited = Diffusion(timesteps).even_timesteps(steps)
    gaps = -np.diff([*visited, -1])
    assert len(visited) == steps and visited[0] == timesteps - 1
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 2  # evenly spaced, up to rounding


@given(a_schedule, st.integers(1, 300), st.data())
def test_log_snr_timesteps(schedule, timesteps, data):
    steps, d = data.draw(st.integers(1, timesteps)), Diffusion(timesteps, schedule)
    visited = d.log_snr_timesteps(steps)
    first = visited[0]
    assert len(visited) == steps and visited[-1] >= 0 and (np.diff(visited) < 0).all()
    assert d.signal(first) >= ddpm.MIN_SIGNAL or first < steps  # nearly pure noise only where every timestep is needed
    assert first == timesteps - 1 or d.signal(first + 1) < ddpm.MIN_SIGNAL


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_snr_timesteps_are_evenly_spaced(schedule):
    """Up to the timesteps that there are: none lies between where a step should end and where it does."""
    d, steps = Diffusion(1000, schedule), 10
    visited = d.log_snr_timesteps(steps)
    targets = np.linspace(d.half_log_snr(visited[0]), d.half_log_snr(0), steps)
    for t, target in list(zip(visited, targets, strict=True))[1:-1]:
        assert d.half_log_snr(t) <= target < d.half_log_snr(t - 1)


@given(a_schedule, st.integers(1, 60), st.sampled_from(list(ddpm.SAMPLERS)), st.booleans(), st.data())
def test_samplers_yield_every_step(schedule, timesteps, sampler, clip, data):
    steps = data.draw(st.integers(1, timesteps))
    n, shape = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([(1, 4, 4), (3, 2, 6)]))
    d = Diffusion(timesteps, schedule)
    chain = list(d.trajectory(some_model, shape, range(n), sampler=sampler, steps=steps, clip=clip, eta=0.5))
    assert len(chain) == steps + 1
    assert all(x.shape == (n, *shape) and x.isfinite().all() for x in chain)
    if clip:
        assert chain[-1].abs().max() <= 1 + 1e-6


@given(a_schedule, st.integers(1, 300), st.data())
def test_respaced_is_the_same_process(schedule, timesteps, data):
    """At the timesteps that it visits it holds as much of the image; one of its steps is several of the whole."""
    d = exact_diffusion(timesteps, schedule)
    visited = sorted(d.even_timesteps(data.draw(st.integers(1, timesteps))))
    coarse = d.respaced(visited)
    torch.testing.assert_close(coarse.alphas_cumprod, d.alphas_cumprod[visited], rtol=1e-9, atol=0)
    between = zip([-1, *visited[:-1]], visited, strict=True)
    survive = torch.stack([(1 - d.betas[s + 1 : t + 1]).prod() for s, t in between])
    torch.testing.assert_close(1 - coarse.betas, survive, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_shortened_starts_at_a_noised_image(sampler):
    """The network sees the timesteps that it knows, from where the image was noised down to 0."""
    d, seen = Diffusion(100, "cosine"), []

    def eps_model(x, t):
        seen.append(t[0].item())
        return some_model(x, t)

    x_t = d.q_sample(torch.zeros(1, 1, 2, 2), torch.tensor([39]), torch.ones(1, 1, 2, 2))
    d.shortened(40).sample(eps_model, 1, (1, 2, 2), x_T=x_t, sampler=sampler, steps=10)
    assert len(seen) == 10 and seen[0] == 39 and seen == sorted(seen, reverse=True)


def test_a_perfect_predictor_gets_the_image_back():
    x0 = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    d = Diffusion(100, "cosine")

    def eps_model(x, t):
        a = d.signal(t[0])
        return (x - a**0.5 * x0) / (1 - a) ** 0.5

    for sampler in ddpm.SAMPLERS:
        torch.testing.assert_close(d.sample(eps_model, 2, (1, 4, 4), sampler=sampler, steps=20), x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_image_i_depends_on_seed_and_i_only(sampler):
    d = Diffusion(30, "cosine")
    options = {"sampler": sampler, "steps": 10, "eta": 0.7, "seed": 5}
    many = d.sample(some_model, 7, (1, 4, 4), **options)
    assert many.shape == (7, 1, 4, 4) and many.dtype == torch.float32
    assert torch.equal(d.sample(some_model, 3, (1, 4, 4), **options), many[:3])
    for batch_size in (1, 2, 7, 100):
        assert torch.equal(d.sample(some_model, 7, (1, 4, 4), batch_size=batch_size, **options), many)
    assert len({tuple(x.flatten().tolist()) for x in many}) == 7
    assert not torch.equal(d.sample(some_model, 7, (1, 4, 4), **options | {"seed": 6}), many)


def test_sample_with_own_start_and_labels_in_batches():
    d, x_T = Diffusion(30, "cosine"), torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1, 0])
    eps_model = with_labels(some_model, labels)
    whole = d.sample(eps_model, 5, (1, 4, 4), x_T=x_T, steps=5)
    batches = d.sample_batches(predictor(some_model, labels), 5, (1, 4, 4), x_T=x_T, steps=5, batch_size=2)
    assert torch.equal(torch.cat(list(batches)), whole)
    alone = d.sample(with_labels(some_model, labels[3:4]), 1, (1, 4, 4), x_T=x_T[3:4], steps=5)
    assert torch.equal(alone, whole[3:4])
    chain = list(d.trajectory(eps_model, (1, 4, 4), range(5), x_T=x_T, steps=5))
    assert torch.equal(chain[0], x_T) and torch.equal(chain[-1], whole)


@pytest.mark.parametrize("sampler, steps, eta", [("ddpm", 200, None), ("ddim", 50, 0.0), ("dpm", 20, 1.0)])
def test_defaults(sampler, steps, eta):
    d = Diffusion(200, "cosine")

    def sample(**options):
        return d.sample(some_model, 2, (1, 2, 2), sampler=sampler, **options)

    assert torch.equal(sample(), sample(steps=steps, eta=eta))
    assert not torch.equal(sample(), sample(steps=steps - 1))
    assert torch.equal(sample(), sample(eta=0.5)) == (eta is None)


def test_noise_is_standard_normal_and_independent():
    noise = image_noise(0, range(4000), (1, 2, 2))
    first, second = noise().flatten(), noise().flatten()
    for x in (first, second):
        assert stats.kstest(x, "norm").pvalue > 0.01
    for x, y in [(first, second), (first[:-4], first[4:])]:  # the next draw, the next image
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.03


# --- classifier-free guidance ---


class TwoPredictions:
    """A model whose conditional prediction is 3 x + label, and its unconditional one x; it counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels=None):
        self.calls.append(len(x))
        assert len(t) == len(x)
        if labels is None:
            return x
        with_label = (labels >= 0).view(-1, 1, 1, 1)
        return torch.where(with_label, 3 * x + labels.view(-1, 1, 1, 1), x)


@given(st.floats(0, 20), st.integers(1, 5))
def test_cfg_algebra(scale, n):
    model, x = TwoPredictions(), torch.linspace(-1, 1, n).view(n, 1, 1, 1)
    labels = torch.arange(n) % 3
    eps = guided(model, labels, scale)(x, torch.full((n,), 7))
    cond, uncond = 3 * x + labels.view(-1, 1, 1, 1), x
    if scale == 0:
        assert torch.equal(eps, cond)  # no guidance at all, not the unconditional prediction
    else:
        w = scale - 1
        torch.testing.assert_close(eps, (1 + w) * cond - w * uncond, rtol=1e-4, atol=1e-4)  # the paper's eq. 6
    assert model.calls == ([n] if scale in (0, 1) else [2 * n])  # one pass, whatever the scale
    assert torch.equal(guided(model, None, scale)(x, torch.zeros(n).long()), uncond)


def test_guidance_in_an_interval_of_timesteps():
    """At and between its ends the guided prediction, elsewhere the conditional one, in a pass of half the size."""
    model, x, labels = TwoPredictions(), torch.ones(2, 1, 1, 1), torch.tensor([0, 1])
    eps_model = guided(model, labels, 3.0, cfg_interval=(10, 20))
    for t, inside in {9: False, 10: True, 15: True, 20: True, 21: False}.items():
        model.calls.clear()
        cond = 3 * x + labels.view(-1, 1, 1, 1)
        expected = x + 3 * (cond - x) if inside else cond
        torch.testing.assert_close(eps_model(x, torch.full((2,), t)), expected)
        assert model.calls == [4 if inside else 2]
