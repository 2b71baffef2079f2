"""How good samples are: Frechet and kernel distance, precision and recall, label agreement; bits/dim and noise error.

    python evaluate.py SAMPLES.npz --data NAME        compare samples with the test split of a data set
    python evaluate.py noise-error CHECKPOINT         a model's held-out error of the predicted noise, against t
    python evaluate.py likelihood CHECKPOINT          a model's variational bound in bits/dim
    python evaluate.py sanity --data NAME             do the numbers order real, damaged and memorised images rightly?
    python evaluate.py train-features NAME            train the classifier in whose features all this is measured

Distances mean something only between equal sample counts, the same features and the same reference: every result
records all three. The feature classifiers and what they say about the real images are in checkpoints/, so comparing
samples needs no data set.
"""

import argparse
import contextlib
import functools
import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from features import (
    FeatureNet,
    check_shape,
    features_of,
    load_features,
    load_reference,
    load_whole,
    shrink,
    statistics,
    train_features,
)
from image_data import DATASETS, ImageData, load_data
from utils import (
    ROOT,
    ArgumentParser,
    UserError,
    check_writable,
    command_line,
    generator,
    load_samples,
    natural,
    pick_device,
    positive,
    progress,
    samples_source,
    sha256,
    to_model,
    write_json,
)
from weights import load_checkpoint

# --- distances between two sets of features -----------------------------------------------------------------------


def psd_sqrt(a: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(mu1: torch.Tensor, cov1: torch.Tensor, mu2: torch.Tensor, cov2: torch.Tensor) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64 (Dowson & Landau 1982; Heusel et al. 2017).

    cov1 cov2 has the eigenvalues of the symmetric S cov2 S with S = cov1^(1/2), so no general matrix root is needed.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).double() for a in (mu1, cov1, mu2, cov2))
    root = psd_sqrt(cov1)
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item())


def frechet_features(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features."""
    return frechet(*statistics(a), *statistics(b))


def frechet_bootstrap(x: torch.Tensor, mu: torch.Tensor, cov: torch.Tensor, draws: int = 100, seed: int = 0) -> dict:
    """How the Frechet distance to (mu, cov) varies with the choice of samples: they are drawn again with replacement.

    Resampling biases the distance upwards, about as much as a finite number of samples does already. So interval_95
    has the width of the bootstrap's distribution, moved back to the estimate: it bounds the distance *at this sample
    count*. `bias` is the shift: roughly what infinitely many samples would take off the distance.
    """
    if draws < 2:
        raise UserError(f"the bootstrap needs at least 2 draws, not {draws}")
    estimate = frechet(*statistics(x), mu, cov)
    g = generator(seed)
    again = torch.tensor(
        [frechet(*statistics(x[torch.randint(len(x), (len(x),), generator=g)]), mu, cov) for _ in range(draws)],
        dtype=torch.float64,
    )
    bias = again.mean().item() - estimate
    low, high = torch.quantile(again, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "interval_95": [max(0.0, low - bias), high - bias],
        "standard_error": again.std().item(),
        "bias": bias,
        "draws": draws,
        "seed": seed,
    }


def kid(a: torch.Tensor, b: torch.Tensor, seed: int = 0, blocks: int = 10) -> dict:
    """Kernel distance: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    Both sets are shuffled and cut into disjoint blocks, whose estimates are independent: their mean and its
    standard error. It can be negative, since it is 0 on average for equal distributions.
    """
    if min(len(a), len(b)) < 2 * blocks:
        raise UserError(f"the kernel distance needs at least {2 * blocks} samples, not {min(len(a), len(b))}")
    g = generator(seed)
    parts = [x.double()[torch.randperm(len(x), generator=g)].tensor_split(blocks) for x in (a, b)]
    estimates = torch.tensor([squared_mmd(x, y) for x, y in zip(*parts, strict=True)], dtype=torch.float64)
    return {
        "kid": estimates.mean().item(),
        "standard_error": estimates.std().item() / math.sqrt(blocks),
        "blocks": blocks,
        "seed": seed,
    }


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(u, v):
        return (u @ v.T / u.shape[1] + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return (off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean()).item()


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """N x D and M x D -> N x M; cheaper than torch.cdist and exact enough once both are centred."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_(min=0)


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3, chunk: int = 1000) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), features N x D and M x D.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in the
    set. Precision: the share of fake points in the real manifold; recall: of real points in the fake one. Both depend
    on the counts, which should be equal.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall with k = {k} need more than {k} samples of each kind")
    centre = real.double().mean(0)
    real, fake = (x.double() - centre for x in (real, fake))

    def squared_radii(x):
        # the nearest point is the point itself
        return torch.cat([squared_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(chunk)])

    def share_inside(points, manifold):
        radii = squared_radii(manifold)
        inside = [(squared_distances(part, manifold) <= radii).any(1) for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def label_agreement(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """How often the classifier names the label asked for, and the probability it gives to it; per class too."""
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise UserError(f"label {outside[0]} is out of range: the classifier knows the labels 0 to {len(classes) - 1}")
    agrees = (logits.argmax(1) == labels).double()
    confidence = logits.double().softmax(1)[torch.arange(len(labels)), labels]
    per_class = [
        {
            "label": label,
            "class": classes[label],
            "count": int((labels == label).sum()),
            "agreement": agrees[labels == label].mean().item(),
            "confidence": confidence[labels == label].mean().item(),
        }
        for label in labels.unique().tolist()
    ]
    mean = agrees.mean().item()
    return {
        "agreement": mean,
        "standard_error": math.sqrt(mean * (1 - mean) / len(labels)),
        "confidence": confidence.mean().item(),
        "per_class": per_class,
    }


# --- samples against a data set -----------------------------------------------------------------------------------


def check_samples(images) -> torch.Tensor:
    """uint8 N x H x W x C (array or tensor) -> uint8 tensor N x C x H x W. Raises UserError."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f"samples must be uint8 N x H x W x C in 0..255, not {images.dtype} {tuple(images.shape)}")
    if len(images) and images.max() <= 1:
        raise UserError(f"the samples' largest value is {images.max()}: images must use the range 0..255")
    return images.permute(0, 3, 1, 2)


def check_count(count: int, dimensions: int) -> None:
    if count <= dimensions:
        raise UserError(
            f"{count} samples do not determine the covariance of {dimensions} features, so a Frechet "
            f"distance would mean nothing: make at least {dimensions + 1}, better 5,000"
        )


@contextlib.contextmanager
def one_thread():
    """For many small matrices: on a busy machine threads wait for one another ten times longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def compare(x: torch.Tensor, reference: dict[str, torch.Tensor], k: int = 3, seed: int = 0, draws: int = 100) -> dict:
    """All distances between samples' features and a reference."""
    check_count(*x.shape)
    if not x.isfinite().all():
        raise UserError("the samples' features are not finite numbers")
    mu, cov, test = reference["test_mean"], reference["test_cov"], reference["test_features"].float()
    pairs = min(len(x), len(test))
    g = generator(seed, 1)
    some_x, some_test = (a[torch.randperm(len(a), generator=g)[:pairs]] for a in (x, test))
    precision, recall = precision_recall(some_test, some_x, k)
    result: dict[str, Any] = {"frechet_distance": frechet(*statistics(x), mu, cov)}
    if draws:
        result["frechet_bootstrap"] = frechet_bootstrap(x, mu, cov, draws, seed)
    return result | {
        "frechet_distance_to_train": frechet(*statistics(x), reference["train_mean"], reference["train_cov"]),
        "kernel_distance": kid(x, test, seed),
        "precision": precision,
        "recall": recall,
        "precision_recall_settings": {"k": k, "count": pairs, "seed": seed},
    }


def evaluate_samples(
    images,
    labels=None,
    data_name: str = "fashion_mnist",
    features_name: str | None = None,
    k: int = 3,
    seed: int = 0,
    draws: int = 100,
    need_labels: bool = False,
) -> dict:
    """Compare samples (uint8, N x H x W x C; labels int64, N, or None) with the test split of a data set.

    features_name: the feature classifier, by default the data set's own; "inception" is the standard FID's network. For the
    classifier of another data set, samples and real images that are larger than its own are shrunk.
    need_labels: an error where there are none. Raises UserError.
    """
    x = check_samples(images)
    if labels is None and need_labels:
        raise UserError("the samples have no labels, so their agreement with the classifier cannot be measured")
    if features_name == "inception":
        return {"samples": len(x), **inception_distance(x, data_name, seed)}
    net = load_features(features_name or data_name)
    if need_labels and net.name != Path(data_name).name:
        raise UserError(f"the classifier of {net.name} does not know the labels of {Path(data_name).name}")
    image_size = x.shape[-1]
    if net.name != Path(data_name).name:
        x = shrink(net, x)
    check_shape(net, x)
    check_count(len(x), net.head.in_features)
    reference, facts = load_reference(data_name, net, image_size)
    sample_features, logits = features_of(net, x)
    result = {
        "samples": len(x),
        "image_size": image_size,
        "data": Path(data_name).name,
        "reference": {"split": "test", "images": facts["test_images"], "sha256": facts["sha256"]},
        "features": {"name": net.name, "dimensions": net.head.in_features, "sha256": net.sha256},
        **compare(sample_features, reference, k, seed, draws),
    }
    if labels is not None and net.name == Path(data_name).name:
        result["labels"] = label_agreement(logits, torch.as_tensor(labels).long(), net.classes)
    return result


def inception_distance(images: torch.Tensor, data_name: str, seed: int = 0) -> dict:
    """The standard FID and KID, with the Inception network of torchmetrics; needs its weights and the data set."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("--features inception needs `pip install torchmetrics torch-fidelity`") from None
    test = load_data(data_name, "test", images.shape[-1])
    check_count(len(images), 2048)
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(20)  # offline, a download may otherwise wait for minutes
        # antialias=False: resized as in the original FID
        inception = NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False)
    except Exception as error:  # a package that is missing, or whatever a failed download provokes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the Inception weights cannot be had ({reason}): leave --features out") from error
    finally:
        socket.setdefaulttimeout(timeout)

    def inception_features(x):
        x = x.expand(-1, 3, -1, -1)
        return torch.cat([inception(part.contiguous()) for part in progress(x.split(50), desc="Inception")])

    fake, real = inception_features(images), inception_features(test.images)
    return {
        "data": Path(data_name).name,
        "reference": {"split": "test", "images": len(test)},
        "features": {"name": "inception-v3-compat", "dimensions": 2048},
        "frechet_distance": frechet_features(fake, real),
        "kernel_distance": kid(fake, real, seed),
    }


def nearest_neighbours(
    samples: torch.Tensor, data: ImageData, net: FeatureNet | None = None, k: int = 1, chunk: int = 2000
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each sample (uint8, N x C x H x W) the k nearest images of `data`: indices and distances, both N x k.

    Distances are Euclidean, between pixels (0..255) or, where a classifier is given, between its features.
    """

    def embed(images):
        return features_of(net, images)[0] if net else images.flatten(1).float()

    there, here = tuple(samples.shape[1:]), tuple(data.images.shape[1:])
    if there != here:
        raise UserError(f"the samples are {there} (channels, height, width), the images of {data.name} {here}")
    x = embed(samples).double()
    best = torch.empty(len(x), 0, dtype=torch.float64)
    index = torch.empty(len(x), 0, dtype=torch.int64)
    for start in range(0, len(data), chunk):
        part = squared_distances(x, embed(data.images[start : start + chunk]).double())
        index = torch.cat([index, torch.arange(start, start + part.shape[1]).expand_as(part)], 1)
        best, order = torch.cat([best, part], 1).topk(min(k, start + part.shape[1]), largest=False)
        index = index.gather(1, order)
    return index, best.sqrt()


# --- a model against held-out images ------------------------------------------------------------------------------


def model_images(data_name: str | None, config: dict, count: int) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """`count` test images (float, in [-1, 1]) that fit a checkpoint, spread over the split; labels; the data's name."""
    name = data_name or config["data"].get("name")
    if name is None:
        raise UserError("the checkpoint does not name its data set: give --data")
    if data_name is None and name not in DATASETS:
        raise UserError(f"the model was trained on a folder called {name}: say where it is with --data")
    data = load_data(name, "test", config["data"]["image_size"])
    channels, there = config["model"].get("channels", 3), data.images.shape[1]
    if there != channels:
        raise UserError(f"the model's images have {channels} channels, those of {name} {there}: give another --data")
    if not 2 <= count <= len(data):
        raise UserError(f"--n must be between 2 and the number of test images of {name}, {len(data):,}, not {count:,}")
    index = torch.arange(count) * len(data) // count
    classes = config["model"].get("num_classes")
    labels = data.labels[index] if classes and data.labels is not None else None
    if labels is not None and (
        len(data.classes) != classes or config["data"].get("classes", data.classes) != data.classes
    ):
        raise UserError(f"the classes of {name} are not those of the model: give another --data")
    return to_model(data.images[index]), labels, data.name


def stratified_timesteps(first: int, last: int, count: int, g: torch.Generator) -> torch.Tensor:
    """`count` timesteps in first..last-1, spread as evenly as can be, in random order."""
    position = (torch.arange(count) + torch.rand(count, generator=g, dtype=torch.float64)) / count
    t = first + (position * (last - first)).long().clamp(max=last - first - 1)
    return t[torch.randperm(count, generator=g)]


def predict_noise(model, diffusion, images, t, noise, labels, batch_size) -> torch.Tensor:
    """The model's predictions at x_t, N x C x H x W on the CPU."""
    parts = []
    for i in range(0, len(images), batch_size):
        x0, e, s = (a[i : i + batch_size].to(diffusion.betas.device) for a in (images, noise, t))
        y = None if labels is None else labels[i : i + batch_size].to(s.device)
        parts.append(model(diffusion.q_sample(x0, s, e), s, y).float().cpu())
    eps = torch.cat(parts)
    if not eps.isfinite().all():
        raise UserError("the model predicts noise that is not finite: its weights are damaged or its training diverged")
    return eps


@torch.inference_mode()
def noise_error(
    model,
    diffusion,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    bins: int = 20,
    seed: int = 0,
    batch_size: int = 250,
) -> dict:
    """Held-out mean squared error of the predicted noise (Ho et al. 2020, eq. 14), in total and against t.

    Each image (float, in [-1, 1], N x C x H x W) is seen at one t in each of `bins` equal ranges of t. Comparable
    between models of one T and schedule whatever loss they were trained with.
    """
    T = diffusion.timesteps
    edges = sorted({round(i * T / min(bins, T)) for i in range(min(bins, T) + 1)})
    per_range, total, variance = [], 0.0, 0.0
    for i, (first, last) in enumerate(progress(list(zip(edges[:-1], edges[1:], strict=True)), desc="noise error")):
        g = generator(seed, i)
        t = stratified_timesteps(first, last, len(images), g)
        noise = torch.randn(images.shape, generator=g)
        eps = predict_noise(model, diffusion, images, t, noise, labels, batch_size)
        errors = (eps - noise).double().square().flatten(1).mean(1)
        mean, se, share = errors.mean().item(), standard_error(errors), (last - first) / T
        per_range.append({"t_from": first, "t_to": last - 1, "mse": mean, "standard_error": se})
        total, variance = total + share * mean, variance + (share * se) ** 2
    return {
        "mse": total,
        "standard_error": math.sqrt(variance),
        "per_t": per_range,
        "images": len(images),
        "labels": labels is not None,
        "timesteps": T,
        "schedule": diffusion.schedule,
        "seed": seed,
    }


def standard_error(x: torch.Tensor) -> float:
    return x.std().item() / math.sqrt(len(x))


def log_discretized_gaussian(x: torch.Tensor, mean: torch.Tensor, sigma: float) -> torch.Tensor:
    """log p(x) of images in [-1, 1] with 256 levels under Ho et al. 2020, eq. 13; float64, any shape.

    Each level owns the Gaussian's mass within 1/255 of it; the outermost two reach to infinity.
    """
    x, mean = x.double(), mean.double()
    low = torch.where(x < -0.999, -torch.inf, (x - 1 / 255 - mean) / sigma)
    high = torch.where(x > 0.999, torch.inf, (x + 1 / 255 - mean) / sigma)
    # a far right tail has no digits left of 1: mirror it to the left, where log_ndtr keeps them
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    log_high = torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))


@torch.inference_mode()
def variational_bound(
    model,
    diffusion,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    variance: str = "beta",
    clip: bool = True,
    seed: int = 0,
    batch_size: int = 250,
) -> dict:
    """The bound L_T + sum of L_t + L_0 on -log p (Ho et al. 2020, eq. 5 and section 3.3) in bits/dim.

    images: float N x C x H x W with the 256 levels of [-1, 1]. With our 0-based t the terms are: L_0 at t = 0, the
    discretised decoder -log p(image | x_t); at 1 <= t < T the KL divergences L_t from the posterior; the prior's L_T.
    variance: sigma_t^2 is "beta" (beta_t) or the "posterior"'s, which is 0 at t = 0: there, as in Ho et al.'s code,
    that of t = 1 stands in. clip: clip the predicted x0 to [-1, 1].
    Each image is seen at one t in each of a row of ranges that grow with t, since the smallest t matter most; the sum
    is unbiased, and its standard error is that of independent images.
    """
    T, dims = diffusion.timesteps, images[0].numel()
    a = torch.tensor(diffusion.alphas_cumprod_float64, dtype=torch.float64)
    a_prev = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])
    betas = 1 - a / a_prev
    posterior = betas * (1 - a_prev) / (1 - a)
    if variance not in ("beta", "posterior"):
        raise UserError(f"unknown variance {variance!r}: it is beta or posterior")
    sigma2 = betas.clone() if variance == "beta" else posterior.clone()
    if variance == "posterior":
        sigma2[0] = posterior[1] if T > 1 else betas[0]
    coef = betas * a_prev.sqrt() / (1 - a)  # of x0 in the posterior's mean, Ho et al. eq. 7
    nats_to_bits = 1 / (dims * math.log(2))

    x0 = images.double()
    # KL(N(sqrt(a) x0, 1 - a) || N(0, 1)) at the last t
    prior = 0.5 * (a[-1] * x0.square() + (1 - a[-1]) - 1 - torch.log1p(-a[-1])).flatten(1).sum(1) * nats_to_bits
    edges = timestep_ranges(T)
    per_image, per_range = prior.clone(), []
    for i, (first, last) in enumerate(progress(list(zip(edges[:-1], edges[1:], strict=True)), desc="bound")):
        g = generator(seed, i)
        t = stratified_timesteps(first, last, len(images), g)
        noise = torch.randn(images.shape, generator=g)
        eps = predict_noise(model, diffusion, images, t, noise, labels, batch_size)
        at = a[t].view(-1, 1, 1, 1)
        # x_t is float32 in the model's eyes; its own prediction of x0 follows in float64
        predicted = x0 + ((1 - at) / at).sqrt() * (noise.double() - eps.double())
        if clip:
            predicted = predicted.clamp(-1, 1)
        if first == 0:
            # the posterior's mean at t = 0 is the predicted x0 itself
            terms = -log_discretized_gaussian(x0, predicted, sigma2[0].sqrt().item())
        else:
            v1, v2, c = (table[t].view(-1, 1, 1, 1) for table in (posterior, sigma2, coef))
            terms = 0.5 * ((v2 / v1).log() + v1 / v2 - 1 + (c * (x0 - predicted)).square() / v2)
        terms = terms.flatten(1).sum(1) * nats_to_bits
        per_range.append(
            {
                "t_from": first,
                "t_to": last - 1,
                "bits_per_dim_per_step": terms.mean().item(),
                "standard_error": standard_error(terms),
            }
        )
        per_image += (last - first) * terms
    if not per_image.isfinite().all():
        raise UserError("the bound is not finite: the model's predictions are too far off")
    kl = sum(r["bits_per_dim_per_step"] * (r["t_to"] - r["t_from"] + 1) for r in per_range[1:])
    return {
        "bits_per_dim": per_image.mean().item(),
        "standard_error": standard_error(per_image),
        "L_T": prior.mean().item(),
        "sum_of_L_t": kl,
        "L_0": per_range[0]["bits_per_dim_per_step"],
        "per_t": per_range,
        "images": len(images),
        "dimensions": dims,
        "labels": labels is not None,
        "variance": variance,
        "clip": clip,
        "timesteps": T,
        "schedule": diffusion.schedule,
        "seed": seed,
    }


def timestep_ranges(timesteps: int, growth: float = 1.25) -> list[int]:
    """Edges 0, 1, 2, ..., T of ranges of t whose lengths grow with t; t = 0 is a range of its own."""
    edges = [0]
    while edges[-1] < timesteps:
        edges.append(min(timesteps, max(edges[-1] + 1, round(edges[-1] * growth))))
    return edges


# --- sanity -------------------------------------------------------------------------------------------------------


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur, uint8 N x C x H x W."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    x = F.pad(images.float(), (reach,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel))
    return x.round().to(torch.uint8)


def add_noise(images: torch.Tensor, sigma: float, g: torch.Generator) -> torch.Tensor:
    """Gaussian noise of standard deviation `sigma` in the units of [-1, 1]; uint8 in and out."""
    return (images + 127.5 * sigma * torch.randn(images.shape, generator=g)).round().clamp(0, 255).to(torch.uint8)


def sanity(data_name: str, n: int = 5000, seed: int = 0) -> dict:
    """Every measure on real, damaged, mode-dropped and memorised images, and the Frechet distance against the count."""
    train, net = load_whole(data_name), load_features(data_name)
    check_shape(net, train.images)
    reference, facts = load_reference(data_name, net)
    g = generator(seed)
    n = min(n, len(train))
    check_count(n, net.head.in_features)
    order = torch.randperm(len(train), generator=g)
    x = train.images[order[:n]]
    test = load_data(data_name, "test").images
    # chosen at random, since the images of a folder come class by class
    sets = {"test": test[torch.randperm(len(test), generator=generator(seed, 1))[:n]], "train": x}
    for sigma in (0.5, 1.0, 2.0):
        sets[f"blurred {sigma:g} px"] = blur(x, sigma)
    for sigma in (0.05, 0.1, 0.2, 0.4):
        sets[f"noised {sigma:g}"] = add_noise(x, sigma, g)
    if train.labels is not None:
        # so many images of the classes that are left that the count is equal
        labels = train.labels[order]
        for dropped in (1, 3, 5):
            if dropped < len(train.classes):
                sets[f"without {dropped} of {len(train.classes)} classes"] = train.images[order[labels >= dropped][:n]]
    for distinct in (n // 50, n // 10):
        sets[f"memorised {distinct} images"] = x[torch.arange(n) % distinct]
    sets["noise only"] = torch.randint(256, x.shape, generator=g, dtype=torch.uint8)
    rows = []
    for name, images in sets.items():
        rows.append({"name": name, "count": len(images), **compare(features_of(net, images)[0], reference, seed=seed)})
    return {
        "data": Path(data_name).name,
        "seed": seed,
        "sets": rows,
        "curve": count_curve(net, train, reference, seed),
        "reference": {"split": "test", "images": facts["test_images"], "sha256": facts["sha256"]},
        "features": {
            "name": net.name,
            "dimensions": net.head.in_features,
            "sha256": net.sha256,
            "test_accuracy": net.test_accuracy,
        },
    }


def count_curve(net: FeatureNet, train: ImageData, reference: dict, seed: int, repeats: int = 10) -> list[dict]:
    """Training images against the test split, by their number: the Frechet distance's mean and spread over subsets, and
    precision and recall of the first subset."""
    x, test = features_of(net, train.images)[0], reference["test_features"].float()
    counts = [count for count in (200, 500, 1000, 2000, 5000, 10_000, 20_000) if x.shape[1] < count <= len(x)]
    curve = []
    for count in counts:
        subsets = [x[torch.randperm(len(x), generator=generator(seed, count, i))[:count]] for i in range(repeats)]
        with one_thread():
            values = [frechet(*statistics(subset), reference["test_mean"], reference["test_cov"]) for subset in subsets]
        pairs = min(count, len(test))
        some_test = test[torch.randperm(len(test), generator=generator(seed, count))[:pairs]]
        precision, recall = precision_recall(some_test, subsets[0][:pairs])
        curve.append(
            {
                "count": count,
                "mean": float(np.mean(values)),
                "repeats": repeats,
                "standard_deviation": float(np.std(values, ddof=1)),
                "precision": precision,
                "recall": recall,
            }
        )
    return curve


# --- command line -------------------------------------------------------------------------------------------------


def run_samples(args) -> dict:
    images, labels = load_samples(args.samples)
    source = samples_source(args.samples)
    result = evaluate_samples(images, labels, args.data, args.features, args.k, args.seed, args.bootstrap, args.labels)
    return {"file": args.samples.name, "file_sha256": sha256(args.samples), **source, **result}


def run_train_features(args) -> dict:
    return train_features(args.name, args.seed)


def run_sanity(args) -> dict:
    return sanity(args.data, args.n, args.seed)


def run_model(args, measure) -> dict:
    """noise-error and likelihood: the checkpoint, its images, the measurement."""
    model, diffusion, config = load_checkpoint(args.checkpoint, args.weights, pick_device(args.device))
    images, labels, data_name = model_images(args.data, config, args.n)
    result = measure(model, diffusion, images, labels, seed=args.seed, batch_size=args.batch_size)
    return {
        "checkpoint": args.checkpoint.name,
        "sha256": sha256(args.checkpoint),
        "weights": config["weights"],
        "data": data_name,
        "split": "test",
        **result,
    }


def run_noise_error(args) -> dict:
    return run_model(args, functools.partial(noise_error, bins=args.bins))


def run_likelihood(args) -> dict:
    return run_model(args, functools.partial(variational_bound, variance=args.variance, clip=args.clip))


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--seed", type=natural, default=0, help="of everything random")
        sub.add_argument("--json-out", type=Path, help="also write the result to this file")
        sub.set_defaults(run=run)
        return sub

    sub = command("samples", run_samples, "compare samples with a data set's test split (`samples` may be left out)")
    sub.add_argument("samples", type=Path, help=".npz with images (uint8, N x H x W x C) and perhaps labels (int64, N)")
    sub.add_argument("--data", required=True, help="fashion_mnist, cifar10, ...: the data set to compare with")
    sub.add_argument("--features", help="whose classifier's features, or inception (default: the data set's own)")
    sub.add_argument("--labels", action="store_true", help="it is an error if the samples have no labels")
    sub.add_argument("--k", type=positive, default=3, help="neighbours in precision and recall")
    sub.add_argument("--bootstrap", type=natural, default=100, help="draws for the Frechet distance's interval")

    sub = command("train-features", run_train_features, "train a data set's feature classifier and store references")
    sub.add_argument("name", help="the data set")

    sub = command(
        "sanity",
        run_sanity,
        "measure real, damaged, mode-dropped and memorised images, by default to report/results/sanity_DATA.json",
    )
    sub.add_argument("--data", default="fashion_mnist", help="the data set")
    sub.add_argument("--n", type=positive, default=5000, help="images in each set")

    for name, run, help in (
        ("noise-error", run_noise_error, "mean squared error of the predicted noise on test images"),
        ("likelihood", run_likelihood, "variational bound on test images, in bits/dim"),
    ):
        sub = command(name, run, help)
        sub.add_argument("checkpoint", type=Path, help=".safetensors of this project or .pt of the course")
        sub.add_argument("--data", help="the data set (default: the one the model was trained on)")
        sub.add_argument("--n", type=positive, default=1000, help="test images")
        sub.add_argument("--weights", help="raw, ema or ema_BETA (default: the average where there is one)")
        sub.add_argument("--batch-size", type=positive, default=250, help="images at once")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
        if name == "noise-error":
            sub.add_argument("--bins", type=positive, default=20, help="ranges of t")
        else:
            sub.add_argument("--variance", choices=["beta", "posterior"], default="beta", help="sigma_t^2")
            sub.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True, help="the predicted x0")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    commands = ("samples", "train-features", "sanity", "noise-error", "likelihood", "-h", "--help")
    if argv and argv[0] not in commands:
        argv.insert(0, "samples")
    args = parser.parse_args(argv)
    if args.run is run_sanity:
        args.json_out = args.json_out or ROOT / f"report/results/sanity_{Path(args.data).name}.json"
    if args.json_out:
        check_writable(args.json_out)  # better before the work than after it
    result = {"command": " ".join(["python evaluate.py", *argv]), **args.run(args)}
    print(json.dumps(result, indent=2, allow_nan=False))
    if args.json_out:
        write_json(args.json_out, result)
        print(f"wrote {args.json_out}", file=sys.stderr)


if __name__ == "__main__":
    command_line(main)
