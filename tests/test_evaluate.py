"""evaluate.py and features.py against scipy, brute force, closed forms and other libraries; errors; shipped files."""

import json
import math
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.stats
import torch
from conftest import class_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import evaluate
import features
from ddpm import Diffusion
from image_data import ImageData, load_data, save_samples
from modules import PatchUNet
from utils import UserError, generator, sha256, to_model, to_uint8
from weights import read_tensors, save_checkpoint, save_tensors


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def random_covariance(dimensions, rank, seed):
    a = normal(dimensions, rank, seed=seed)
    return a @ a.T / rank


# --- distances ----------------------------------------------------------------------------------------------------


@given(dimensions=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_frechet_equals_scipy_sqrtm(dimensions, seed):
    mu1, mu2 = normal(2, dimensions, seed=seed)
    cov1, cov2 = (random_covariance(dimensions, 2 * dimensions + 1, seed + i) for i in (1, 2))
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy()).real
    expected = (mu1 - mu2).square().sum().item() + np.trace(cov1.numpy() + cov2.numpy() - 2 * root)
    assert evaluate.frechet(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_frechet_closed_form_and_symmetry():
    # commuting covariances: the sum over axes of (difference of means)^2 + (difference of standard deviations)^2
    first = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 0.0]).square().diag()
    second = torch.tensor([0.0, 2.0, 5.0]), torch.tensor([3.0, 0.5, 0.0]).square().diag()
    low_rank = torch.zeros(10), random_covariance(10, 3, seed=1)
    for a, b, expected in ((first, second, 11.25), (second, first, 11.25), (first, first, 0), (low_rank, low_rank, 0)):
        assert evaluate.frechet(*a, *b) == pytest.approx(expected, abs=1e-6)


def test_statistics_are_numpys():
    x = normal(50, 4).float()
    mean, cov = features.statistics(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


def test_bootstrap_interval_holds_its_estimate_and_shrinks_with_the_count():
    mu, cov = torch.zeros(4).double(), torch.eye(4).double()
    widths = []
    for count in (200, 3200):
        x = normal(count, 4, seed=count) + 0.5
        result = evaluate.frechet_bootstrap(x, mu, cov)
        low, high = result["interval_95"]
        assert low < evaluate.frechet(*features.statistics(x), mu, cov) < high
        assert result["bias"] > 0
        widths.append(high - low)
    assert 2 < widths[0] / widths[1] < 8  # a sixteenth of the variance: a quarter of the width


def test_kid_is_unbiased_and_sees_a_difference():
    same = [evaluate.kid(normal(100, 6, seed=2 * i), normal(150, 6, seed=2 * i + 1), seed=i) for i in range(60)]
    values = np.array([result["kid"] for result in same])
    assert abs(values.mean()) < 3 * values.std(ddof=1) / math.sqrt(len(values))
    # the reported standard error is the one that these repetitions show
    assert np.mean([result["standard_error"] for result in same]) == pytest.approx(values.std(ddof=1), rel=0.25)
    other = evaluate.kid(normal(300, 6, seed=1), normal(300, 6, seed=2) + 0.5)
    assert other["kid"] > 5 * other["standard_error"]


def test_squared_mmd_brute_force():
    x, y = normal(7, 3, seed=1), normal(5, 3, seed=2)

    def mean_kernel(a, b):
        pairs = [(u, v) for i, u in enumerate(a) for j, v in enumerate(b) if a is not b or i != j]
        return np.mean([(u @ v / 3 + 1).item() ** 3 for u, v in pairs])

    expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    assert evaluate.squared_mmd(x, y) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_brute_force(k):
    real, fake = normal(40, 2, seed=1), 1.5 * normal(60, 2, seed=2) + 0.3

    def share_inside(points, manifold):
        radii = [sorted(math.dist(a, b) for b in manifold)[k] for a in manifold]
        return np.mean([any(math.dist(p, m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points])

    r, f = real.tolist(), fake.tolist()
    expected = {"precision": share_inside(f, r), "recall": share_inside(r, f)}
    assert evaluate.precision_recall(real, fake, k, chunk=17) == pytest.approx(expected)


def test_label_agreement():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0], [5.0, 0.0]])
    result = evaluate.label_agreement(logits, torch.tensor([0, 1, 1, 0]), ["a", "b"])
    assert result["agreement"] == 0.75 and result["per_class"] == {"a": 1.0, "b": 0.5}
    assert result["standard_error"] == pytest.approx(scipy.stats.binom(4, 0.75).std() / 4)
    assert evaluate.label_agreement(logits, ["0", "b", "1", "a"], ["a", "b"]) == result  # names of class folders
    for unknown in (torch.tensor([-1]), ["-1"]):
        with pytest.raises(UserError, match="label '?-1'? is none of the 2 classes a, b"):
            evaluate.label_agreement(logits[:1], unknown, ["a", "b"])


@pytest.mark.parametrize("by", ["pixels", "features"])
def test_nearest_neighbours_brute_force(by):
    torch.manual_seed(0)
    net = features.FeatureNet(1, 6, 2, [4, 8], [1]).eval() if by == "features" else None
    images = torch.randint(256, (30, 1, 6, 6), generator=generator(1), dtype=torch.uint8)
    data = ImageData(images, None, [], "toy", False, 6)
    samples = images[[20, 3]] ^ 4  # near to these two, but not the same
    index, distance = evaluate.nearest_neighbours(samples, data, net)
    embed = (lambda x: net(to_model(x))[0].detach().double()) if net else lambda x: x.flatten(1).double()
    nearest = torch.cdist(embed(samples), embed(images)).sort(1)
    assert index.tolist() == nearest.indices[:, 0].tolist() == [20, 3]
    np.testing.assert_allclose(distance, nearest.values[:, 0], atol=1e-6)
    with pytest.raises(UserError, match="the images of toy"):
        evaluate.nearest_neighbours(images[..., :4], data, net)


@pytest.mark.parametrize("copies, share", [(0, 0.5), (100, 0.75), (200, 1.0)])
def test_copying(copies, share):
    """Of 200 samples, so many are slightly changed training images; the others are images of their own."""
    images = torch.randint(256, (900, 1, 6, 6), generator=generator(1), dtype=torch.uint8)
    train, test = (ImageData(x, None, [], "toy", False, 6) for x in (images[:500], images[500:700]))
    samples = images[700:].clone()
    seen = torch.randperm(500, generator=generator(0))[:200]  # equally many of both
    samples[:copies] = images[seen[:copies]] ^ 1
    result = evaluate.copying(samples, train, test)
    assert result["images_of_each"] == 200
    p = result["share_of_training_images"]
    assert abs(p - share) <= 3 * 0.5 / math.sqrt(200) * (copies < 200)
    assert result["standard_error"] == pytest.approx(scipy.stats.binom(200, p).std() / 200)


# --- likelihood and noise error -----------------------------------------------------------------------------------

MEAN, STD = -0.2, 0.3  # of the Gaussian whose optimal predictor is known


def optimal_predictor(diffusion):
    """E[noise | x_t] for pixels that are independent N(MEAN, STD^2)."""
    alphas_cumprod = diffusion.exact["alphas_cumprod"]

    def eps_model(x, t, labels=None):
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (x.double() - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)).float()

    return eps_model


def gaussian_images(count, size=4):
    x = normal(count, 1, size, size, seed=3) * STD + MEAN
    return to_model(to_uint8(x))


def expected_bound(images, diffusion):
    """The bound with the optimal predictor, every term exactly, in float64 numpy: bits/dim and its three parts."""
    a = diffusion.exact["alphas_cumprod"].numpy()
    x0 = images.double().numpy().ravel()
    a_prev = np.append(1, a[:-1])
    beta = 1 - a / a_prev
    posterior = beta * (1 - a_prev) / (1 - a)
    L_T = np.mean((a[-1] * x0**2 - a[-1] - np.log(1 - a[-1])) / 2)
    L_t = []
    for t in range(1, len(a)):
        gain = np.sqrt(a[t]) * STD**2 / (a[t] * STD**2 + 1 - a[t])  # of E[x0 | x_t]
        error = (x0 - MEAN) ** 2 * (1 - gain * np.sqrt(a[t])) ** 2 + gain**2 * (1 - a[t])
        mean_error = (beta[t] * np.sqrt(a_prev[t]) / (1 - a[t])) ** 2 * error
        L_t.append(np.mean(np.log(beta[t] / posterior[t]) + (posterior[t] + mean_error) / beta[t] - 1) / 2)
    gain = np.sqrt(a[0]) * STD**2 / (a[0] * STD**2 + 1 - a[0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    L_0 = 0.0
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        x_t = np.sqrt(a[0]) * x0 + np.sqrt(1 - a[0]) * node
        mean = MEAN + gain * (x_t - np.sqrt(a[0]) * MEAN)
        above = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
        below = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
        decoder = scipy.stats.norm(mean, np.sqrt(beta[0]))  # the upper tail has its digits in sf, the lower one in cdf
        mass = np.maximum(decoder.cdf(above) - decoder.cdf(below), decoder.sf(below) - decoder.sf(above))
        L_0 -= weight * np.mean(np.log(mass))
    parts = np.array([L_T, sum(L_t), L_0]) / np.log(2)
    return parts.sum(), parts


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_bound_of_the_optimal_predictor(schedule):
    diffusion, images = Diffusion(300, schedule), gaussian_images(500)
    result = evaluate.variational_bound(optimal_predictor(diffusion), diffusion, images, clip=False, batch_size=500)
    bits, parts = expected_bound(images, diffusion)
    assert result["standard_error"] < 0.02 * bits
    assert abs(result["bits_per_dim"] - bits) < 4 * result["standard_error"]
    assert [result["L_T"], result["sum_of_L_t"], result["L_0"]] == pytest.approx(parts, rel=0.03, abs=1e-4)
    assert result["bits_per_dim"] == pytest.approx(result["L_T"] + result["sum_of_L_t"] + result["L_0"])
    # no model of these pixels can do better than their entropy
    entropy = scipy.stats.norm(MEAN, STD).entropy() / np.log(2) + np.log2(127.5)
    assert bits > entropy - 0.05


@pytest.mark.parametrize("clip", [True, False])
def test_bound_against_denoising_diffusion_pytorch(clip):
    from denoising_diffusion_pytorch.learned_gaussian_diffusion import LearnedGaussianDiffusion

    diffusion, images, asked = Diffusion(1000, "linear"), gaussian_images(8), []

    def wrong(x, t, labels=None):
        asked.append((x.clone(), t.clone()))
        return 0.9 * x + 0.05 * torch.sin(3 * x)

    ours = evaluate.variational_bound(wrong, diffusion, images, clip=clip, batch_size=8)

    class WithVariance(nn.Module):
        channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 1, 2, False, False

        def forward(self, x, t):
            return torch.cat([wrong(x, t), torch.ones_like(x)], 1)  # 1: the upper limit of the variance, beta_t

    settings = {"image_size": 4, "timesteps": 1000, "beta_schedule": "linear", "objective": "pred_noise"}
    theirs = LearnedGaussianDiffusion(WithVariance(), 1.0, **settings)
    for term, (x_t, t) in zip(ours["per_t"], list(asked), strict=True):
        a = theirs.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise = (x_t - a.sqrt() * images) / (1 - a).sqrt()
        total = theirs.p_losses(images, t, noise, clip_denoised=clip, loss_reduction="none")
        simple = (wrong(x_t, t) - noise).square().flatten(1).mean(1)
        # they approximate the normal distribution function, we do not: to be seen at t = 0 only
        tolerance = 0.01 if term["t_from"] == 0 else 2e-3
        assert term["bits_per_dim_per_step"] == pytest.approx((total - simple).mean().item(), rel=tolerance, abs=2e-7)


def test_discretized_gaussian_is_a_distribution_and_keeps_digits_in_the_tails():
    levels = torch.arange(256).double() / 127.5 - 1
    for mean, sigma in ((0.0, 0.01), (-1.3, 0.5), (0.99, 0.1)):
        mass = evaluate.log_discretized_gaussian(levels, torch.tensor(mean, dtype=torch.float64), sigma).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-12)
        below, above = (scipy.stats.norm.cdf(levels.numpy() + d, mean, sigma) for d in (-1 / 255, 1 / 255))
        np.testing.assert_allclose(mass[1:-1], (above - below)[1:-1], atol=1e-15)
    far = evaluate.log_discretized_gaussian(torch.tensor([-0.5, 0.5]), torch.tensor([0.5, -0.5]), 0.01)
    assert far[0] == pytest.approx(far[1].item()) and -5100 < far[0] < -4800


@given(st.integers(1, 3000))
def test_timesteps_are_seen_evenly(timesteps):
    edges = evaluate.timestep_ranges(timesteps)
    assert edges[:2] == [0, 1] and edges[-1] == timesteps and edges == sorted(set(edges))
    t = evaluate.stratified_timesteps(timesteps, timesteps + 10, 100, generator(0))
    assert torch.bincount(t - timesteps).tolist() == [10] * 10 and t.tolist() != sorted(t.tolist())


def test_noise_error_of_the_optimal_predictor():
    diffusion, images = Diffusion(200, "cosine"), gaussian_images(400)
    result = evaluate.noise_error(optimal_predictor(diffusion), diffusion, images, batch_size=400)
    a = diffusion.exact["alphas_cumprod"].numpy()
    x0 = images.double().numpy().ravel()
    # noise - E[noise | x_t] is linear in x0 - MEAN and the noise
    gain = np.sqrt(1 - a) / (a * STD**2 + 1 - a)
    expected = gain**2 * a * np.mean((x0 - MEAN) ** 2) + (1 - gain * np.sqrt(1 - a)) ** 2
    assert abs(result["mse"] - expected.mean()) < 4 * result["standard_error"] < 0.02
    assert [r["mse"] for r in result["per_t"]] == pytest.approx(expected.reshape(20, 10).mean(1), rel=0.1)
    assert result == evaluate.noise_error(optimal_predictor(diffusion), diffusion, images, batch_size=77)


def test_a_model_that_is_not_finite():
    for measure in (evaluate.noise_error, evaluate.variational_bound):
        with pytest.raises(UserError, match="not finite"):
            measure(lambda x, *_: x * math.nan, Diffusion(10), gaussian_images(4))


# --- the classifier and its files ---------------------------------------------------------------------------------


def test_shift_and_flip():
    images = torch.randint(256, (200, 1, 6, 6), generator=generator(0), dtype=torch.uint8)
    moved = features.shift_and_flip(images, 1, True, generator(1))
    assert torch.equal(moved, features.shift_and_flip(images, 1, True, generator(1)))
    padded = nn.functional.pad(to_model(images), (1, 1, 1, 1), mode="reflect")
    seen = set()
    for image, source in zip(moved, padded, strict=True):
        windows = {(top, left): source[:, top : top + 6, left : left + 6] for top in range(3) for left in range(3)}
        seen |= {(False, *at) for at, window in windows.items() if torch.equal(image, window)}
        seen |= {(True, *at) for at, window in windows.items() if torch.equal(image, window.flip(2))}
    assert len(seen) == 18
    assert torch.equal(features.shift_and_flip(images, 0, False, generator(1)), to_model(images))


def test_one_cycle_rises_to_one_and_ends_at_zero():
    shares = [features.one_cycle(i / 1000) for i in range(1001)]
    assert shares[0] == pytest.approx(0.04) and shares[200] == 1 and shares[1000] == pytest.approx(0)
    assert shares[:200] == sorted(shares[:200]) and shares[200:] == sorted(shares[200:], reverse=True)


def test_a_folder_called_like_built_in_data_is_not_taken_for_it(tmp_path):
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(UserError, match="is called like the built-in cifar10"):
        features.load_features(tmp_path / "cifar10")


@pytest.fixture
def tiny_recipe(tmp_path, monkeypatch):
    """Classifiers are trained in no time, in a project folder of their own."""
    monkeypatch.setattr(features, "ROOT", tmp_path)
    monkeypatch.setattr(features, "CHECKPOINTS", tmp_path / "checkpoints")
    cycle = {"epochs": 2, "learning_rate": 0.2, "weight_decay": 5e-4, "shift": 1, "flip": False}
    recipe = {"widths": [4, 8], "depths": [1], "batch_size": 10, "cycles": [cycle]}
    monkeypatch.setattr(features, "DEFAULT_RECIPE", features.DEFAULT_RECIPE | recipe)


def test_another_folder_of_the_same_name_is_not_taken_for_the_classifiers(tmp_path, tiny_recipe, monkeypatch):
    for side, count in ("a", 10), ("b", 11), ("moved", 10):
        class_folder(tmp_path / side / "photos", {"cats": count, "dogs": 10}, size=(8, 8))
    features.train_features(str(tmp_path / "a/photos"))
    assert features.load_features(tmp_path / "a/photos").classes == ["cats", "dogs"]
    assert features.load_features(tmp_path / "moved/photos").classes == ["cats", "dogs"]
    with pytest.raises(UserError, match="another folder of that name .20 files, .*; here 21 files, "):
        features.load_features(tmp_path / "b/photos")
    with pytest.raises(UserError, match="another folder of that name"):
        evaluate.evaluate_samples(torch.zeros(20, 3, 8, 8), None, tmp_path / "b/photos", "photos")
    monkeypatch.chdir(tmp_path / "a/photos")
    assert features.load_features(".").name == "photos"


@pytest.fixture
def toy(tiny_recipe, monkeypatch):
    """A data set `toy` that is easy: class 1 is bright on the left, class 0 on the right."""

    def load(name, split="train", image_size=None, channels=None, labels=False):
        if name != "toy":
            return load_data(name, split, image_size, channels, labels)
        count = 400 if split == "train" else 100
        g = generator(count)
        images = torch.randint(100, (count, 1, 8, 8), generator=g, dtype=torch.uint8)
        labels = torch.randint(2, (count,), generator=g)
        images[labels == 1, :, :, :4] += 120
        images[labels == 0, :, :, 4:] += 120
        return ImageData(images, labels, ["right", "left"], "toy", False, 8)

    monkeypatch.setattr(features, "load_data", load)
    return load


@pytest.fixture
def run(capsys):
    """run(*argv): the JSON object that the command prints, alone on stdout."""

    def run(*argv):
        capsys.readouterr()
        evaluate.main([str(a) for a in argv])
        return json.loads(capsys.readouterr().out)

    return run


def test_from_training_a_classifier_to_numbers(toy, tmp_path, run):
    facts = run("train-features", "toy")
    assert facts["test_accuracy"] > 0.9 and facts["command"] == "python evaluate.py train-features toy"
    net = features.load_features("toy")
    assert features.accuracy(net, toy("toy", "test")) == facts["test_accuracy"]

    train, path = toy("toy"), tmp_path / "samples.npz"
    save_samples(path, train.images, train.labels, {"seed": 5})
    out = tmp_path / "report/results/toy.json"
    real = run(path, "--data", "toy", "--json-out", out, "--seed", 3)
    assert json.loads(out.read_text()) == real
    assert (real["file"], real["seed"], real["file_sha256"]) == ("samples.npz", 5, sha256(path))
    assert real["samples"] == 400 and real["features"]["sha256"] == net.sha256
    assert real["labels"]["agreement"] > 0.9 and real["reference"]["images"] == 100
    assert real["frechet_distance_to_train"] == pytest.approx(0, abs=1e-6)

    # the same images as pictures in class folders, where the labels are the folders' names
    for i, (image, label) in enumerate(zip(train.images, train.labels, strict=True)):
        folder = tmp_path / "pictures" / train.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    pictures = run(tmp_path / "pictures", "--data", "toy", "--seed", 3, "--bootstrap", 0)
    assert pictures["labels"]["agreement"] == real["labels"]["agreement"] and pictures["samples"] == 400
    assert pictures["frechet_distance"] == pytest.approx(real["frechet_distance"], rel=1e-4)
    assert "frechet_bootstrap" in real and "frechet_bootstrap" not in pictures
    assert run("copying", path, "--data", "toy")["share_of_training_images"] > 0.55  # a quarter of the images

    result = run("sanity", "--data", "toy")
    rows = {row["name"]: row for row in result["sets"]}
    for measure in (lambda row: row["frechet_distance"], lambda row: row["kernel_distance"]["kid"]):
        assert measure(rows["train"]) < measure(rows["noised 0.4"]) < measure(rows["noise only"])
        assert measure(rows["train"]) < measure(rows["blurred 2 px"])
    assert rows["without 1 of 2 classes"]["recall"] < rows["train"]["recall"] > rows["memorised 8 images"]["recall"]
    assert [point["count"] for point in result["curve"]] == [200]

    with pytest.raises(UserError, match="cannot write"):
        run(path, "--data", "toy", "--json-out", ".")


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """photographs(n): a folder of n of them without classes; `rgb` is a classifier with 8 features for 8 x 8 pixels."""
    monkeypatch.setattr(features, "CHECKPOINTS", tmp_path)
    shape = {"channels": 3, "image_size": 8, "classes": 2, "widths": [4, 8], "depths": [1]}
    facts = {"architecture": shape, "classes": ["a", "b"], "test_accuracy": 0.5}
    save_tensors(tmp_path / "features_rgb.safetensors", features.FeatureNet(**shape).state_dict(), facts)

    def make(count):
        g, folder = generator(5), tmp_path / "photographs"
        folder.mkdir()
        for i in range(count):
            pixels = torch.randint(256, (24, 24, 3), generator=g, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        return folder

    return make


@pytest.mark.parametrize("size", [8, 16])  # 16: twice as large as the classifier takes; both sides are shrunk
def test_a_folder_of_photographs_is_measured_in_another_classifiers_features(size, photographs, tmp_path, run):
    folder = photographs(400)
    save_samples(tmp_path / "samples.npz", features.load_splits(folder, size)[0].images)
    result = run(tmp_path / "samples.npz", "--data", folder, "--features", "rgb")
    assert result["features"]["name"] == "rgb" and result["data"] == "photographs" and result["image_size"] == size
    assert result["frechet_distance_to_train"] == pytest.approx(0, abs=1e-6)
    assert result["frechet_distance"] > 0


def test_too_few_held_out_images(photographs, tmp_path, run, monkeypatch, capsys, refused):
    """A distance to them would mean nothing: what can be said without it is, and the way out is named."""
    monkeypatch.setattr(evaluate, "kid", lambda *_: {})
    folder = photographs(80)
    save_samples(tmp_path / "samples.npz", features.load_splits(folder, 8)[0].images)
    assert "--features cifar10" in refused(evaluate.main, tmp_path / "samples.npz", "--data", folder)
    evaluate.main([str(tmp_path / "samples.npz"), "--data", str(folder), "--features", "rgb"])
    out, err = capsys.readouterr()
    assert "too few for 8 features: add images until 9 are held out" in err and "--features" in err
    result = json.loads(out)
    assert "frechet_distance" not in result and result["frechet_distance_to_train"] == pytest.approx(0, abs=1e-6)


def test_mirrored_features_do_not_tell_left_from_right():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    for mirror in (False, True):
        net = features.FeatureNet(3, 8, 2, [4, 8], [1], mirror).eval()
        for here, there in zip(net(x), net(x.flip(-1)), strict=True):
            assert torch.allclose(here, there, atol=1e-6) == mirror
    weights = net.state_dict()
    plain = features.FeatureNet(3, 8, 2, [4, 8], [1])
    plain.load_state_dict(weights)
    assert torch.allclose(net(x)[1], (plain.eval()(x)[1] + plain(x.flip(-1))[1]) / 2, atol=1e-6)


def test_interrupted_classifier_training_goes_on_to_the_same_weights(toy, tmp_path, monkeypatch):
    first = features.train_features("toy")
    path = tmp_path / "checkpoints/features_toy.safetensors"
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(features, "train_epoch", lambda *_: pytest.fail("trained again"))
        assert features.train_features("toy") == first  # what is finished is not repeated
    shutil.rmtree(tmp_path / "runs")
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "accuracy", Mock(side_effect=[0.9, KeyboardInterrupt]))  # in the second epoch
        features.train_features("toy")
    assert not path.exists()
    facts = features.train_features("toy")
    assert [h["epoch"] for h in facts["history"]] == [1, 2]
    first, second = (safetensors.torch.load(data) for data in (whole, path.read_bytes()))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_shipped_classifier():
    net, test = features.load_features("fashion_mnist"), load_data("fashion_mnist", "test")
    reference, _ = features.load_reference("fashion_mnist", net)
    _, facts = read_tensors(features.checkpoint_path("features", "fashion_mnist"), "")
    assert facts["test_accuracy"] >= 0.94
    some = ImageData(test.images[:1000], test.labels[:1000], test.classes, "", False, 28)
    assert features.accuracy(net, some) > 0.92
    assert reference["test_features"].shape == (10_000, net.head.in_features) == reference["train_features"].shape
    # the stored half-precision features are those behind the stored statistics
    stored = features.statistics(reference["test_features"])
    assert evaluate.frechet(*stored, reference["test_mean"], reference["test_cov"]) < 1e-3


# --- bad input ----------------------------------------------------------------------------------------------------


def samples(tmp_path, shape=(300, 28, 28, 1), **more):
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8), **more)
    return tmp_path / "x.npz"


@pytest.mark.parametrize(
    "make, options, message",
    [
        ({"shape": (300, 32, 32, 1)}, [], "expects 28 x 28 x 1"),
        ({"shape": (100, 28, 28, 1)}, [], "are too few for 128 features"),
        ({"labels": np.full(300, 10)}, [], "label 10 is none of the 10 classes"),
        ({}, ["--data", "nonsense"], "features_nonsense.safetensors"),
        ({}, ["--features", "nonsense"], "features_nonsense.safetensors"),
        ({}, ["--bootstrap", "1"], "at least 2 draws"),
    ],
)
def test_bad_samples(tmp_path, refused, make, options, message):
    out = tmp_path / "out.json"
    line = refused(evaluate.main, samples(tmp_path, **make), "--data", "fashion_mnist", *options, "--json-out", out)
    assert message in line and not out.exists()


@pytest.mark.parametrize(
    "model, data, count, message",
    [
        ({}, {}, 1, "--n must be between"),
        ({}, {"name": None}, 10, "trained on data without a name: say where it is with --data"),
        ({}, {"name": "photos"}, 10, "trained on photos: say where it is with --data"),
        ({"num_classes": 10}, {"classes": list("abcdefghij")}, 10, "are not those of the model"),
    ],
)
def test_images_that_do_not_fit_the_model(model, data, count, message):
    data = {"name": "fashion_mnist", "image_size": 28} | data
    with pytest.raises(UserError, match=message):
        evaluate.model_images(None, {"model": {"channels": 1} | model, "data": data}, count)


def test_inception_without_its_package_is_one_line(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    line = refused(evaluate.main, samples(tmp_path), "--data", "fashion_mnist", "--features", "inception")
    assert "pip install torchmetrics torch-fidelity" in line


def test_inception_against_pytorch_fid():
    """With another network in Inception's place: the distance that pytorch-fid computes from its features."""
    pytest.importorskip("torchmetrics")
    from pytorch_fid.fid_score import calculate_frechet_distance

    class Network(nn.Module):
        def forward(self, x):
            return nn.functional.adaptive_avg_pool2d(x[:, 0].float(), 3).flatten(1)

    test = load_data("fashion_mnist", "test").images
    images = torch.randint(256, (300, 1, 28, 28), generator=generator(0), dtype=torch.uint8)
    result = evaluate.inception_distance(images, "fashion_mnist", network=Network())
    x, y = (Network()(part.expand(-1, 3, -1, -1)).double() for part in (images, test))
    moments = [f(part.numpy()) for part in (x, y) for f in (lambda a: a.mean(0), lambda a: np.cov(a, rowvar=False))]
    assert result["frechet_distance"] == pytest.approx(calculate_frechet_distance(*moments), rel=1e-4)
    assert result["kernel_distance"]["kid"] > 0
    with pytest.raises(UserError, match="at least two samples"):
        evaluate.inception_distance(images[:1], "fashion_mnist", network=Network())


def test_a_checkpoint_from_the_command_line(tmp_path, run):
    config = {"model": {"name": "PatchUNet", "channels": 1, "width": 8}, "diffusion": {"timesteps": 40}}
    config |= {"data": {"name": "fashion_mnist", "image_size": 28}}
    config |= {"train": {"ema_betas": [], "steps": 1, "batch_size": 1}}
    model = PatchUNet(channels=1, width=8)  # its last layer starts at zero: it predicts that there is no noise
    path = tmp_path / "run/model.safetensors"
    save_checkpoint(path, {"raw": model.state_dict()}, config)
    result = run("noise-error", path.parent, "--n", 50)
    assert result["mse"] == pytest.approx(1, abs=0.02) and result["data"] == "fashion_mnist"
    assert [(r["t_from"], r["t_to"]) for r in result["per_t"]] == [(t, t + 1) for t in range(0, 40, 2)]
    result = run("likelihood", path, "--n", 20)
    assert result["images"] == 20 and result["variance"] == "beta" and result["clip"]
    assert result["sha256"] == sha256(path)
    with pytest.raises(UserError, match="missing.safetensors"):
        run("likelihood", tmp_path / "missing.safetensors")
