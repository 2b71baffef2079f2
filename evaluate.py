"""How good samples are: Frechet and kernel distance, precision and recall, label agreement; bits/dim and noise error.

    python evaluate.py SAMPLES --data NAME

SAMPLES, an .npz or .npy of this or another program or a folder of pictures, is compared with the test split of a data
set. Distances mean something only between equal sample counts, the same features and the same reference: every result
records all three. The feature classifiers and what they say about the real images are in checkpoints/, so comparing
samples of Fashion-MNIST or CIFAR-10 needs no data set.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from torchvision.transforms.functional import gaussian_blur

import features
import utils
from ddpm import SAMPLERS, noise_level, per_image
from ddpm_conditional import predictor, with_labels
from features import FeatureNet, features_of, statistics
from image_data import DATASETS, ImageData, load_samples, short_name
from utils import ArgumentParser, UserError, generator, natural, positive, progress, say, sha256, to_model
from weights import describe_checkpoint, find_checkpoint, image_shape, load_checkpoint

# --- distances between two sets of features -----------------------------------------------------------------------


def frechet(mu1: torch.Tensor, cov1: torch.Tensor, mu2: torch.Tensor, cov2: torch.Tensor) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64 (Dowson & Landau 1982; Heusel et al. 2017).

    cov1 cov2 has the eigenvalues of the symmetric S cov2 S with S = cov1^(1/2), so no general matrix root is needed.
    """
    mu1, cov1, mu2, cov2 = (a.double() for a in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item())


def frechet_bootstrap(x: torch.Tensor, mu: torch.Tensor, cov: torch.Tensor, draws: int = 100, seed: int = 0) -> dict:
    """How the Frechet distance to (mu, cov) varies with the choice of samples: they are drawn again with replacement.

    Resampling raises the distance by a bias, about as much as a finite number of samples does already. interval_95 is
    therefore the bootstrap's interval moved back to the estimate: it bounds the distance *at this sample count*.
    """
    if draws < 2:
        raise UserError(f"the bootstrap needs at least 2 draws, not {draws}")
    g, count = generator(seed), len(x)
    again = [frechet(*statistics(x[torch.randint(count, (count,), generator=g)]), mu, cov) for _ in range(draws)]
    distances = torch.tensor(again, dtype=torch.float64)
    bias = distances.mean().item() - frechet(*statistics(x), mu, cov)
    low, high = torch.quantile(distances, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    interval, error = [max(0.0, low - bias), high - bias], distances.std().item()
    return {"interval_95": interval, "standard_error": error, "bias": bias, "draws": draws, "seed": seed}


def kid(a: torch.Tensor, b: torch.Tensor, seed: int = 0, blocks: int = 10) -> dict:
    """Kernel distance: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    Both sets are shuffled and cut into disjoint blocks, whose estimates are independent: their mean and its
    standard error. It can be negative, since it is 0 on average for equal distributions.
    """
    if min(len(a), len(b)) < 2 * blocks:
        raise UserError(f"the KID needs {2 * blocks} samples and held-out images, not {len(a)} and {len(b)}")
    g = generator(seed)
    parts = [x.double()[torch.randperm(len(x), generator=g)].tensor_split(blocks) for x in (a, b)]
    estimates = torch.tensor([squared_mmd(x, y) for x, y in zip(*parts, strict=True)], dtype=torch.float64)
    return {"kid": estimates.mean().item(), "standard_error": standard_error(estimates), "blocks": blocks, "seed": seed}


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    xx, yy, xy = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]  # without the pairs (u, u)
    return (sum(within) - 2 * xy.mean()).item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3, chunk: int = 1000) -> dict:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), features N x D and M x D.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in the
    set. Precision: the share of fake points in the real manifold; recall: of real points in the fake one.
    """
    real, fake = real.double(), fake.double()

    def share_inside(points, manifold):
        # the nearest point is the point itself
        radii = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(chunk)])
        inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(chunk)]
        return torch.cat(inside).double().mean().item()

    return {"precision": share_inside(fake, real), "recall": share_inside(real, fake)}


def label_agreement(logits: torch.Tensor, labels: torch.Tensor | list[str], classes: list[str]) -> dict:
    """How often the classifier names the label asked for, in all and for each class.

    labels: int64, N; or the names of class folders, each a class's or its number. Raises UserError.
    """
    known: dict = {key: i for i in range(len(classes)) for key in (i, str(i))}
    known |= {name: i for i, name in enumerate(classes)}
    names = labels if isinstance(labels, list) else labels.tolist()
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"the samples' label {unknown[0]!r} is none of the {len(classes)} classes {', '.join(classes)}")
    asked = torch.tensor([known[name] for name in names])
    agrees = (logits.argmax(1) == asked).double()
    per_class = {classes[label]: agrees[asked == label].mean().item() for label in asked.unique().tolist()}
    error = standard_error(agrees, correction=0)
    return {"agreement": agrees.mean().item(), "standard_error": error, "per_class": per_class}


# --- samples against a data set -----------------------------------------------------------------------------------


def standard_error(x: torch.Tensor, correction: int = 1) -> float:
    """Of the mean of x (N); correction=0 for zeros and ones, whose mean is a share: the binomial error."""
    return x.std(correction=correction).item() / math.sqrt(len(x))


def check_count(count: int, dimensions: int) -> None:
    if count <= dimensions:
        raise UserError(f"{count} samples are too few for {dimensions} features: make at least {dimensions + 1}")


def compare(x: torch.Tensor, reference: dict[str, torch.Tensor], seed: int = 0, draws: int = 100) -> dict:
    """All distances between samples' features and a reference; without Frechet's where too few images are held out."""
    mu, cov, test = reference["test_mean"], reference["test_cov"], reference["test_features"].float()
    check_count(*x.shape)
    result: dict = {}
    if len(test) > len(mu):
        result["frechet_distance"] = frechet(*statistics(x), mu, cov)
        if draws:
            result["frechet_bootstrap"] = frechet_bootstrap(x, mu, cov, draws, seed)
    else:
        advice = f"add images until {len(mu) + 1} are held out, or take another classifier by --features"
        say(f"no Frechet distance: {len(test)} held-out images are too few for {len(mu)} features: {advice}")
    if len(reference["train_features"]) > len(mu):
        result["frechet_distance_to_train"] = frechet(*statistics(x), reference["train_mean"], reference["train_cov"])
    pairs = min(len(x), len(test))
    g = generator(seed, 1)
    some_x, some_test = (a[torch.randperm(len(a), generator=g)[:pairs]] for a in (x, test))
    result["kernel_distance"] = kid(x, test, seed)
    result |= precision_recall(some_test, some_x)
    return result | {"precision_recall_settings": {"k": 3, "count": pairs, "seed": seed}}


def evaluate_samples(images, labels=None, data_name="fashion_mnist", features_name=None, seed=0, draws=100) -> dict:
    """Compare samples (uint8, N x C x H x W; labels int64, N, or the classes' names, or None) with a test split.

    features_name: the classifier, by default the data set's own, or "inception", the standard FID's network. For the
    classifier of another data set, samples and real images that are larger than its own are shrunk. Raises UserError.
    """
    if features_name == "inception":
        return {"samples": len(images), **inception_distance(images, data_name, seed)}
    own, image_size = short_name(features_name or data_name) == short_name(data_name), images.shape[-1]
    net = features.load_features(data_name if own else features_name)
    images = images if own else features.shrink(net, images)
    features.check_shape(net, images)
    reference, about = features.load_reference(data_name, net, image_size)
    x, logits = features_of(net, images)
    result = {"samples": len(images), "image_size": image_size, "data": short_name(data_name)}
    result |= about | compare(x, reference, seed, draws)
    if labels is not None and own:
        result["labels"] = label_agreement(logits, labels, net.classes)
    return result


def inception_distance(images: torch.Tensor, data_name: str, seed: int = 0, network=2048) -> dict:
    """The standard FID and KID, by torchmetrics. Needs the Inception weights and the data set. Raises UserError.

    images: uint8 N x C x H x W. network: how many of Inception's features, or a module that computes others.
    """
    _, test = features.load_splits(data_name, images.shape[-1], images.shape[1])
    if min(len(images), len(test)) < 2:
        raise UserError("a distance needs at least two samples and two held-out images")
    try:
        from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance
        from torchmetrics.wrappers import FeatureShare

        fid = FrechetInceptionDistance(network, antialias=False)  # resized as in the original FID
        kernel = KernelInceptionDistance(network, subset_size=min(1000, len(images), len(test)))
    except Exception as error:  # a package that is missing, or whatever a failed download provokes
        needs = "`pip install torchmetrics torch-fidelity` and, once, the internet, for Inception's weights"
        raise UserError(f"--features inception needs {needs} ({error!r})") from error
    metrics = FeatureShare([fid, kernel])  # one pass through the network serves both
    for real, source in ((True, test.images), (False, images)):
        for part in progress(source.split(50), desc="Inception"):
            metrics.update(part.expand(-1, 3, -1, -1).contiguous(), real=real)
    torch.manual_seed(seed)  # of the subsets for the kernel distance
    distances = metrics.compute()
    mean, deviation = (value.item() for value in distances["KernelInceptionDistance"])
    return {
        "data": test.name,
        "reference": {"split": "test", "images": len(test)},
        "features": {"name": "inception-v3-compat", "dimensions": 2048},
        "frechet_distance": distances["FrechetInceptionDistance"].item(),
        "kernel_distance": {"kid": mean, "standard_deviation": deviation, "seed": seed},
    }


def nearest_neighbours(samples: torch.Tensor, data: ImageData, net: FeatureNet | None = None):
    """For each sample (uint8, N x C x H x W) the nearest image of `data`: indices and distances, both N.

    Distances are Euclidean, between pixels (0..255) or, where a classifier is given, between its features.
    """

    def embed(images):
        return (features_of(net, images)[0] if net else images.flatten(1)).double()

    if samples.shape[1:] != data.images.shape[1:]:
        there, here = tuple(samples.shape[1:]), tuple(data.images.shape[1:])
        raise UserError(f"the samples are {there} (channels, height, width), the images of {data.name} {here}")
    x = embed(samples)
    distances = torch.cat([torch.cdist(x, embed(part)) for part in data.images.split(2000)], 1)
    nearest = distances.min(1)
    return nearest.indices, nearest.values


def copying(samples: torch.Tensor, train: ImageData, test: ImageData, seed: int = 0) -> dict:
    """Of the samples' nearest neighbours among equally many training and test images, the share of training images.

    1/2 where nothing is memorised, up to its (binomial) standard error. Neighbours by their pixels: a classifier has
    seen the training images itself. samples: uint8 N x C x H x W.
    """
    count, g = min(len(train), len(test)), generator(seed)
    distances = []
    for data in (train, test):
        some = data.images[torch.randperm(len(data), generator=g)[:count].sort().values]
        distances.append(nearest_neighbours(samples, dataclasses.replace(data, images=some))[1])
    nearer = (distances[0] < distances[1]).double()
    share = {"share_of_training_images": nearer.mean().item(), "standard_error": standard_error(nearer, correction=0)}
    return share | {"images_of_each": count, "seed": seed}


# --- a model against held-out images ------------------------------------------------------------------------------


def model_images(data_name: str | None, config: dict, count: int) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """`count` test images (float, in [-1, 1]) that fit a checkpoint, spread over the split; labels; the data's name."""
    name = data_name or config["data"].get("name")
    if data_name is None and name not in DATASETS:
        raise UserError(f"the model was trained on {name or 'data without a name'}: say where it is with --data")
    channels, classes = config["model"].get("channels", 3), config["model"].get("num_classes")
    _, data = features.load_splits(name, config["data"]["image_size"], channels, labels=bool(classes))
    if not 2 <= count <= len(data):
        raise UserError(f"--n must be between 2 and the number of test images of {name}, {len(data):,}, not {count:,}")
    if classes and (len(data.classes) != classes or config["data"].get("classes", data.classes) != data.classes):
        raise UserError(f"the classes of {name} are not those of the model: give another --data")
    index = torch.arange(count) * len(data) // count
    labels = data.labels[index] if classes else None
    return to_model(data.images[index]), labels, data.name


def stratified_timesteps(first: int, last: int, count: int, g: torch.Generator) -> torch.Tensor:
    """`count` timesteps in first..last-1, spread as evenly as can be, in random order."""
    position = (torch.arange(count) + torch.rand(count, generator=g, dtype=torch.float64)) / count
    t = first + (position * (last - first)).long().clamp(max=last - first - 1)
    return t[torch.randperm(count, generator=g)]


def predictions(model, diffusion, images, labels, edges: list[int], seed: int, batch_size: int):
    """Noise each image once in each range of t; yields the range's (first, last), t, the noise and its prediction."""
    for i, (first, last) in enumerate(progress(list(zip(edges[:-1], edges[1:], strict=True)), unit="range of t")):
        g = generator(seed, i)
        t = stratified_timesteps(first, last, len(images), g)
        noise = torch.randn(images.shape, generator=g)
        parts = []
        for part in torch.arange(len(images)).split(batch_size):
            x0, s, e = (a[part].to(diffusion.betas.device) for a in (images, t, noise))
            eps_model = with_labels(model, None if labels is None else labels[part])
            parts.append(eps_model(diffusion.q_sample(x0, s, e), s).float().cpu())
        eps = torch.cat(parts)
        if not eps.isfinite().all():
            raise UserError("the model's predictions are not finite: its weights are damaged or its training diverged")
        yield (first, last), t, noise, eps


@torch.inference_mode()
def noise_error(model, diffusion, images: torch.Tensor, labels=None, seed=0, batch_size=250) -> dict:
    """Held-out mean squared error of the predicted noise (Ho et al. 2020, eq. 14), in total and against t.

    Each image (float, in [-1, 1], N x C x H x W) is seen at one t in each of 20 equal ranges of t. Comparable between
    models of one T and schedule whatever loss they were trained with.
    """
    T = diffusion.timesteps
    edges = sorted({round(i * T / min(20, T)) for i in range(min(20, T) + 1)})
    per_range, totals = [], torch.zeros(len(images), dtype=torch.float64)
    for (first, last), _, noise, eps in predictions(model, diffusion, images, labels, edges, seed, batch_size):
        errors = (eps - noise).double().square().flatten(1).mean(1)
        error = {"mse": errors.mean().item(), "standard_error": standard_error(errors)}
        per_range.append({"t_from": first, "t_to": last - 1} | error)
        totals += (last - first) / T * errors  # an image that is hard at one t is hard at others
    result = {"mse": totals.mean().item(), "standard_error": standard_error(totals), "per_t": per_range}
    return result | {"images": len(images), "seed": seed}


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
def variational_bound(model, diffusion, images: torch.Tensor, labels=None, clip=True, seed=0, batch_size=250) -> dict:
    """The bound L_T + sum of L_t + L_0 on -log p (Ho et al. 2020, eq. 5 and section 3.3) in bits/dim.

    images: float N x C x H x W with the 256 levels of [-1, 1]. With our 0-based t the terms are: L_0 at t = 0, the
    discretised decoder -log p(image | x_t); at 1 <= t < T the KL divergences L_t from the posterior; the prior's L_T.
    The model's variance is beta_t. clip: clip the predicted x0 to [-1, 1]. Each image is seen at one t in each of a row
    of ranges that grow with t, since the smallest t matter most; the sum is unbiased.
    """
    process = copy.copy(diffusion).to("cpu", torch.float64)

    def bits_per_dim(nats):
        return nats.flatten(1).mean(1) / math.log(2)

    x0, a = images.double(), process.alphas_cumprod[-1]
    # KL(N(sqrt(a) x0, 1 - a) || N(0, 1)) at the last t
    prior = bits_per_dim(0.5 * (a * x0.square() + (1 - a) - 1 - torch.log1p(-a)))
    totals, per_range = prior.clone(), []
    edges = timestep_ranges(process.timesteps)
    for (first, last), t, noise, eps in predictions(model, diffusion, images, labels, edges, seed, batch_size):
        x_t = process.q_sample(x0, t, noise.double())
        predicted = process.predict_x0(x_t, t, eps.double())
        mean, _ = process.q_posterior(predicted.clamp(-1, 1) if clip else predicted, x_t, t)
        if first == 0:
            terms = -log_discretized_gaussian(x0, mean, process.betas[0].sqrt().item())
        else:
            true_mean, v1 = process.q_posterior(x0, x_t, t)
            v2 = per_image(process.betas, t)
            terms = 0.5 * ((v2 / v1).log() + v1 / v2 - 1 + (true_mean - mean).square() / v2)
        terms = bits_per_dim(terms)
        row = {"t_from": first, "t_to": last - 1, "bits_per_dim_per_step": terms.mean().item()}
        per_range.append(row | {"standard_error": standard_error(terms)})
        totals += (last - first) * terms
    result = {"bits_per_dim": totals.mean().item(), "standard_error": standard_error(totals)}
    result |= {"L_T": prior.mean().item(), "L_0": per_range[0]["bits_per_dim_per_step"]}
    result["sum_of_L_t"] = sum(r["bits_per_dim_per_step"] * (r["t_to"] - r["t_from"] + 1) for r in per_range[1:])
    return result | {"per_t": per_range, "variance": "beta", "clip": clip, "images": len(images), "seed": seed}


def timestep_ranges(timesteps: int) -> list[int]:
    """Edges 0, 1, 2, ..., T of ranges of t whose lengths grow by a quarter; t = 0 is a range of its own."""
    edges = [0]
    while edges[-1] < timesteps:
        edges.append(min(timesteps, max(edges[-1] + 1, round(edges[-1] * 1.25))))
    return edges


# --- many sets of samples: against the guidance scale; the measures' own sanity -----------------------------------


def interval(text: str) -> list[int] | None:
    """An argparse type: 200-700 are the timesteps at which guidance acts, none is all."""
    low, _, high = text.partition("-")
    return None if text == "none" else [int(low), int(high)]


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=find_checkpoint, required=True, help="a conditional checkpoint")
    add("--data", help="the data set to compare with (default: the one the model was trained on)")
    add("--weights", nargs="+", default=["raw", "ema"], help="raw, ema, or ema_BETA")
    add("--scales", nargs="+", type=utils.number(float, 0), default=[1, 1.25, 1.5, 2, 3, 5, 7.5], help="of guidance")
    add("--intervals", nargs="+", type=interval, help="timesteps to guide at, as 200-700 (default: none, guide at all)")
    add("--n", type=positive, default=2000, help="samples per setting, spread over the classes")
    add("--sampler", choices=list(SAMPLERS), default="dpm", help="as for `sample`")
    add("--steps", type=positive, default=20, help="network evaluations per image")
    add("--eta", type=utils.number(float, 0, 1), help="the sampler's noise, as for `sample`")
    add("--seed", type=natural, default=0, help="image i depends on (seed, i) only")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--out", type=Path, required=True, help="the .json to write; the same command goes on with it")
    parser.set_defaults(run=run_sweep)


def run_sweep(args) -> None:
    """Measure the samples of each kind of weights at each scale and interval, but what --out already holds."""
    utils.check_writable(args.out)
    device = utils.pick_device(args.device)
    # all of them before the work: one that is not there is refused at once
    models = {weights: load_checkpoint(args.checkpoint, weights, device) for weights in args.weights}
    model, diffusion, config = models[args.weights[0]]
    if model.num_classes is None:
        raise UserError(f"{args.checkpoint} has no classes, so there is nothing to guide")
    diffusion.check_steps(args.steps)
    sampler = {"sampler": args.sampler, "steps": args.steps, "eta": noise_level(args.sampler, args.eta)}
    if args.eta is not None and sampler["eta"] is None:
        raise UserError(f"--eta has no effect on --sampler {args.sampler}")
    intervals = args.intervals or [None]
    if any(where and where[0] > min(where[1], diffusion.timesteps - 1) for where in intervals):
        raise UserError(f"--intervals must rise and begin below the model's {diffusion.timesteps} timesteps")
    data_name, shape = args.data or config["data"].get("name"), image_shape(model, config)
    if data_name is None:
        raise UserError(f"{args.checkpoint} does not say what it was trained on: add --data")
    result = describe_checkpoint(args.checkpoint) | {"command": args.typed, "sampler": sampler}
    result |= {"n": args.n, "seed": args.seed, "parameters": sum(p.numel() for p in model.parameters()), "rows": []}
    result["config"] = {name: value for name, value in config.items() if name != "weights"}
    if args.out.exists():
        result["rows"] = earlier_rows(args.out, result)
    net = features.load_features(data_name)
    features.check_shape(net, torch.empty(0, *shape))
    check_count(args.n, net.head.in_features)
    labels = torch.arange(args.n) % model.num_classes
    settings = list(itertools.product(args.weights, args.scales, intervals))
    for weights, scale, where in settings[len(result["rows"]) :]:
        model, _, loaded = models[weights]
        name = f"{weights}, cfg_scale {scale:g}" + (f" for {where[0]} <= t <= {where[1]}" if where else "")
        with utils.autocast(device):
            guide = predictor(model, labels, scale, where)
            batches = diffusion.sample_batches(guide, args.n, shape, seed=args.seed, desc=name, **sampler)
            images = torch.cat([utils.to_uint8(x) for x in batches])
        quality = evaluate_samples(images, labels, data_name)
        setting = {"weights": weights, "cfg_scale": scale, "cfg_interval": where, "kind": loaded["weights"]}
        result["rows"].append(setting | {"quality": quality})
        distance, agreement = quality.get("frechet_distance", math.nan), quality["labels"]["agreement"]
        say(f"{name}: Frechet distance {distance:.2f}, label agreement {agreement:.1%}")
        utils.write_json(args.out, result)
    print(f"wrote {args.out}: {len(result['rows'])} settings")


def earlier_rows(path: Path, result: dict) -> list[dict]:
    """The rows that the same command, interrupted, wrote to `path`. Raises UserError."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        earlier = json.loads(path.read_text())
        if (earlier["command"], earlier["sha256"]) == (result["command"], result["sha256"]):
            return earlier["rows"]
    raise UserError(f"{path} is of another command, or of other settings or weights: delete it, or use another --out")


def sanity(data_name: str, seed: int = 0, n: int = 5000) -> dict:
    """Every measure on real, damaged, mode-dropped and memorised images, and the Frechet distance against the count."""
    net = features.load_features(data_name)
    train, test = features.load_splits(data_name, labels=True)
    reference, about = features.load_reference(data_name, net)
    n, g = min(n, len(train)), generator(seed)
    order = torch.randperm(len(train), generator=g)
    x, labels = train.images[order[:n]], train.labels[order]
    sets = {"test": test.images[torch.randperm(len(test), generator=generator(seed, 1))[:n]], "train": x}
    for sigma in (0.5, 1.0, 2.0):
        sets[f"blurred {sigma:g} px"] = gaussian_blur(x.float(), 2 * math.ceil(3 * sigma) + 1, sigma)
    for sigma in (0.05, 0.1, 0.2, 0.4):  # in the units of [-1, 1]
        sets[f"noised {sigma:g}"] = x + 127.5 * sigma * torch.randn(x.shape, generator=g)
    for distinct in (n // 50, n // 10):
        sets[f"memorised {distinct} images"] = x[torch.arange(n) % distinct]
    for dropped in (k for k in (1, 3, 5) if k < len(train.classes)):  # as many images, of the classes that are left
        sets[f"without {dropped} of {len(train.classes)} classes"] = train.images[order[labels >= dropped][:n]]
    sets["noise only"] = torch.randint(256, x.shape, generator=g, dtype=torch.uint8)
    rows = []
    for name, some in sets.items():
        some_x, _ = features_of(net, some.round().clamp(0, 255).to(torch.uint8))
        rows.append({"name": name, "count": len(some), **compare(some_x, reference, seed)})
    result = {"data": net.name, "seed": seed, "sets": rows, **about}
    result["features"]["test_accuracy"] = net.test_accuracy
    return result | {"curve": count_curve(features_of(net, train.images)[0], reference, seed)}


def count_curve(x: torch.Tensor, reference: dict, seed: int, repeats: int = 10) -> list[dict]:
    """Training images' features x against the test split, by their number: the floor of the Frechet distance, mean and
    spread over subsets; precision and recall of the first subset."""
    test, curve = reference["test_features"].float(), []
    for count in (c for c in (200, 500, 1000, 2000, 5000, 10_000, 20_000) if x.shape[1] < c <= len(x)):
        subsets = [x[torch.randperm(len(x), generator=generator(seed, count, i))[:count]] for i in range(repeats)]
        distances = [frechet(*statistics(some), reference["test_mean"], reference["test_cov"]) for some in subsets]
        pairs = min(count, len(test))
        some_test = test[torch.randperm(len(test), generator=generator(seed, count))[:pairs]]
        spread = {"mean": mean(distances), "standard_deviation": stdev(distances)}
        curve.append({"count": count, "repeats": repeats, **spread, **precision_recall(some_test, subsets[0][:pairs])})
    return curve


# --- command line -------------------------------------------------------------------------------------------------


def run_samples(args) -> dict:
    """samples and copying: the file, its images, the measurement."""
    images, labels, source = load_samples(args.samples)
    file = {"file": args.samples.name}
    if args.samples.is_file():
        file |= {"file_sha256": sha256(args.samples)} | source
    if args.command == "samples":
        return file | evaluate_samples(images, labels, args.data, args.features, args.seed, args.bootstrap)
    train, test = features.load_splits(args.data, images.shape[-1], images.shape[1])
    return file | {"data": train.name, "samples": len(images)} | copying(images, train, test, args.seed)


def run_model(measure, args) -> dict:
    """noise-error and likelihood: the checkpoint, its images, the measurement."""
    about = describe_checkpoint(args.checkpoint)
    model, diffusion, config = load_checkpoint(args.checkpoint, args.weights, utils.pick_device(args.device))
    images, labels, data_name = model_images(args.data, config, args.n)
    about |= {"weights": config["weights"], "data": data_name, "split": "test"}
    return about | measure(model, diffusion, images, labels, seed=args.seed, batch_size=args.batch_size)


COMMANDS = {
    "samples": (run_samples, "compare samples with a data set's test split (`samples` may be left out)"),
    "copying": (run_samples, "the share of training images among the samples' nearest neighbours"),
    "sanity": (lambda args: sanity(args.data, args.seed), "do the measures order real and damaged images rightly?"),
    "noise-error": (lambda args: run_model(noise_error, args), "squared error of the predicted noise on test images"),
    "likelihood": (lambda args: run_model(variational_bound, args), "variational bound on test images, in bits/dim"),
    "train-features": (lambda args: features.train_features(args.name, args.seed), "train a feature classifier"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, add = parser.add_subparsers(dest="command", required=True), {}
    for name, (run, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("--seed", type=natural, default=0, help="of everything random")
        command.add_argument("--json-out", type=Path, help="also write the result to this file")
        command.set_defaults(run=run)
        add[name] = command.add_argument
    for name in ("samples", "copying"):
        add[name]("samples", type=Path, help=".npz, .npy, or a folder of pictures")
    for name in ("samples", "copying", "sanity"):
        add[name]("--data", required=True, help="fashion_mnist, cifar10, ...: the data set to compare with")
    add["samples"]("--features", help="whose classifier's features, or inception (default: the data set's own)")
    add["samples"]("--bootstrap", type=natural, default=100, help="draws for the Frechet distance's interval")
    for name in ("noise-error", "likelihood"):
        add[name]("checkpoint", type=find_checkpoint, help="a checkpoint, a run's folder, or the course's weights")
        add[name]("--data", help="the data set (default: the one the model was trained on)")
        add[name]("--n", type=positive, default=1000, help="test images")
        add[name]("--weights", help="raw, ema or ema_BETA (default: the average where there is one)")
        add[name]("--batch-size", type=positive, default=250, help="images at once")
        add[name]("--device", default="auto", help="auto, cpu, cuda or mps")
    add["train-features"]("name", help="the data set")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv.insert(0, "samples")
    args = make_parser().parse_args(argv)
    if args.json_out:
        utils.check_writable(args.json_out)  # better before the work than after it
    result = {"command": shlex.join(["python", "evaluate.py", *argv]), **args.run(args)}
    print(json.dumps(result, indent=2, allow_nan=False))
    if args.json_out:
        utils.write_json(args.json_out, result)
        print(f"wrote {args.json_out}", file=sys.stderr)


if __name__ == "__main__":
    utils.command_line(main)
