"""The classifiers in whose features samples are measured, their training, and what they say about the real images."""

import hashlib
import json
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from image_data import DATASETS, ImageData, describe, describe_folder, load_data, resize, short_name
from utils import ROOT, UserError, autocast, generator, pick_precision, progress, say, sha256, to_model
from weights import load_state, read_tensors, save_state, save_tensors

CHECKPOINTS = ROOT / "checkpoints"
# a feature classifier's network and training; the data set's row in DATASETS may have other values
DEFAULT_RECIPE: dict = {
    "widths": [32, 64, 128],
    "depths": [1, 1],
    "mirror": False,
    "batch_size": 128,
    "label_smoothing": 0.05,
    "cycles": [{"epochs": 16, "learning_rate": 0.1, "weight_decay": 5e-4, "shift": 2, "flip": True}],
}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut (He et al. 2015); stride 2 halves the resolution."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            pool = nn.AvgPool2d(stride, ceil_mode=True)  # ceil: 7 -> 4, as the strided convolution
            self.shortcut = nn.Sequential(pool, nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class FeatureNet(nn.Module):
    """A small ResNet classifier: float N x C x H x W in [-1, 1] -> features N x widths[-1], logits N x classes.

    Its features are the activations before the last layer, averaged over positions and, with `mirror`, once trained,
    over the image and its mirror image. `load_features` sets what follows; `sha256` is of the weights' file.
    """

    name = sha256 = ""
    classes: list[str]
    test_accuracy: float

    def __init__(self, channels: int, image_size: int, classes: int, widths: list, depths: list, mirror: bool = False):
        super().__init__()
        self.mirror = mirror
        self.image_shape = (channels, image_size, image_size)
        self.stem = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks = []
        for width_in, width, depth in zip(widths[:-1], widths[1:], depths, strict=True):
            blocks += [ResidualBlock(width_in if i == 0 else width, width, 2 if i == 0 else 1) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        views = [x, x.flip(-1)] if self.mirror and not self.training else [x]
        features = sum(self.blocks(F.relu(self.norm(self.stem(view)))).mean((2, 3)) for view in views) / len(views)
        return features, self.head(features)


def shift_and_flip(images: torch.Tensor, shift: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Move each image (uint8, N x C x H x W) by up to `shift` pixels, reflected at the border; perhaps flip it."""
    n, _, height, width = images.shape
    padded = F.pad(to_model(images), (shift,) * 4, mode="reflect")
    corners = torch.randint(0, 2 * shift + 1, (n, 2), generator=generator).tolist()
    x = torch.stack([image[:, t : t + height, left : left + width] for image, (t, left) in zip(padded, corners)])
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5 * flip
    return torch.where(mirrored, x.flip(3), x)


def one_cycle(position: float, rise: float = 0.2) -> float:
    """The learning rate's share of its peak at 0..1 of a cycle: a cosine up, a cosine down (Smith & Topin 2018)."""
    if position < rise:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * position / rise)) / 2
    return (1 + math.cos(math.pi * (position - rise) / (1 - rise))) / 2


def train_features(name: str, seed: int = 0) -> dict:
    """Train the classifier of data set `name`; write features_NAME and reference_NAME (.safetensors) to checkpoints/.

    An interrupted training goes on from runs/features_NAME/. Returns the facts that the weights' file records.
    """
    weights_path, reference_path = (checkpoint_path(kind, name) for kind in ("features", "reference"))
    train, test = load_splits(name, labels=True)
    if name == "fashion_mnist" and len(train) < 60_000:
        raise UserError("the shipped sample is too small: run `python download_datasets.py fashion_mnist` first")
    recipe = DEFAULT_RECIPE | (DATASETS[name].recipe if name in DATASETS else {})
    if len(train) < (least := recipe["batch_size"]) or len(train.classes) < 2:
        raise UserError(f"{name} is too little for a classifier: that needs {least} training images and two classes")
    shape = {"channels": train.images.shape[1], "image_size": train.image_size, "classes": len(train.classes)}
    architecture = shape | {key: recipe[key] for key in ("widths", "depths", "mirror")}
    torch.manual_seed(seed)
    net = FeatureNet(**architecture).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True)
    facts: dict = {"data": name, "folder": describe_folder(name), "seed": seed}
    facts |= {"architecture": architecture, "recipe": recipe}
    identity, history = json.dumps([facts, len(train)]), []
    states = ROOT / f"runs/features_{short_name(name)}"
    state, _ = load_state(states, {"identity", "net", "optimizer", "history"})
    if state is not None and state["identity"] == identity:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
        say(f"going on after epoch {len(history)}")
    epochs = [(cycle, i / cycle["epochs"]) for cycle in recipe["cycles"] for i in range(cycle["epochs"])]
    for epoch in range(len(history), len(epochs)):
        loss = train_epoch(net, optimizer, train, recipe, *epochs[epoch], seed, epoch)
        history.append({"epoch": epoch + 1, "loss": loss, "test_accuracy": accuracy(net, test)})
        say(json.dumps(history[-1]))
        state = {"identity": identity, "step": epoch + 1, "history": history}
        save_state(states, state | {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    weights = net.half().state_dict()
    net.float()  # from here on exactly what the file will hold
    facts |= {"classes": train.classes, "history": history, "precision": pick_precision("cpu")}
    facts["test_accuracy"] = accuracy(net, test)
    save_tensors(weights_path, weights, facts)
    counts = {"train_images": len(train), "test_images": len(test), "features_sha256": sha256(weights_path)}
    save_tensors(reference_path, make_reference(net, train, test), {"data": short_name(name)} | counts)
    say(f"wrote {weights_path} and {reference_path}")
    return facts


def load_splits(name: str | Path, image_size=None, channels=None, labels=False) -> tuple[ImageData, ImageData]:
    """The training and the test images (see `load_data`), none kept larger for random crops. Says what was read."""
    train, test = (load_data(name, split, image_size, channels, labels) for split in ("train", "test"))
    say(describe(train, test, labels))
    train.images = resize(train.images, train.image_size)
    return train, test


def train_epoch(net, optimizer, train: ImageData, recipe, cycle, begin: float, seed: int, epoch: int) -> float:
    """One pass over the data, `begin` (0..1) of the way through `cycle`; its mean loss."""
    net.train()
    total, steps = 0.0, len(train) // recipe["batch_size"]
    batches = torch.randperm(len(train), generator=generator(seed, epoch)).split(recipe["batch_size"])
    for step, index in enumerate(progress(batches[:steps], desc=f"epoch {epoch + 1}")):
        x = shift_and_flip(train.images[index], cycle["shift"], cycle["flip"], generator(seed, epoch, step))
        with autocast("cpu"):
            logits = net(x)[1]
        loss = F.cross_entropy(logits.float(), train.labels[index], label_smoothing=recipe["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        lr = cycle["learning_rate"] * one_cycle(begin + step / steps / cycle["epochs"])
        optimizer.param_groups[0].update(lr=lr, weight_decay=cycle["weight_decay"])
        optimizer.step()
        total += loss.item()
    return total / steps


def features_of(net: FeatureNet, images: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (float32, N x D) and logits (float32, N x classes) of images (uint8, N x C x H x W)."""
    net.eval()
    with torch.inference_mode():
        parts = [net(to_model(images[i : i + batch_size])) for i in range(0, len(images), batch_size)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def accuracy(net: FeatureNet, data: ImageData) -> float:
    return (features_of(net, data.images)[1].argmax(1) == data.labels).double().mean().item()


def checkpoint_path(kind: str, name: str | Path) -> Path:
    """checkpoints/KIND_NAME.safetensors. Raises UserError for a folder that is called like built-in data."""
    short = short_name(name)
    if str(name) != short and short in DATASETS:
        raise UserError(f"{name} is called like the built-in {short}: use that name for it, or rename the folder")
    return CHECKPOINTS / f"{kind}_{short}.safetensors"


def load_features(name: str | Path) -> FeatureNet:
    """The feature classifier of data set `name` from checkpoints/. Raises UserError."""
    path, train = checkpoint_path("features", name), f"`python evaluate.py train-features {name}`"
    hint = f"{train} makes it where images have class labels; without, add --features cifar10 for photographs"
    weights, config = read_tensors(path, hint)
    try:
        net = FeatureNet(**config["architecture"])
        net.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit the network: {hint}") from error
    # a name without a path does for a folder that is elsewhere
    if (here := describe_folder(name)) != (there := config.get("folder")) and (here or str(name) != short_name(name)):
        folders = f"{there or 'unknown'}; here {here or 'none'}"
        raise UserError(f"{path} is of another folder of that name ({folders}): rename this one, or run {train}")
    net.name, net.sha256 = short_name(name), sha256(path)
    net.classes, net.test_accuracy = config["classes"], config["test_accuracy"]
    return net.float().to(memory_format=torch.channels_last).eval().requires_grad_(False)


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D) and unbiased covariance (D x D) of features N x D, in float64."""
    x = x.double()
    return x.mean(0), x.T.cov()


def make_reference(net: FeatureNet, train: ImageData, test: ImageData, seed: int = 0) -> dict[str, torch.Tensor]:
    """What evaluations need of the real images: the two splits' statistics, and the features of some of them."""
    chosen = torch.randperm(len(train), generator=generator(seed))[:10_000].sort().values
    reference = {"train_index": chosen.int()}
    for split, data in (("train", train), ("test", test)):
        x = features_of(net, data.images)[0]
        reference[f"{split}_mean"], reference[f"{split}_cov"] = statistics(x)
        reference[f"{split}_features"] = (x[chosen] if split == "train" else x).half()
    return reference


def load_reference(name: str | Path, net: FeatureNet, image_size=None) -> tuple[dict[str, torch.Tensor], dict]:
    """What `make_reference` made of data set `name` in the features of `net`, and what results record of both.

    Of another data set than the classifier's it is computed from the images, which are loaded at the samples' size and
    shrunk as samples are. Raises UserError.
    """
    if short_name(name) == net.name:
        path, remedy = checkpoint_path("reference", name), f"run `python evaluate.py train-features {name}`"
        reference, facts = read_tensors(path, remedy)
        if facts["features_sha256"] != net.sha256:
            raise UserError(f"{path.name} was made with other weights: {remedy}")
        say(f"data: {facts['train_images']:,} images for training, {facts['test_images']:,} held out")
        digest = sha256(path)
    else:
        train, test = load_splits(name, image_size, net.image_shape[0])
        train.images, test.images = shrink(net, train.images), shrink(net, test.images)
        check_shape(net, test.images)
        reference = make_reference(net, train, test)
        digest = hashlib.sha256(b"".join(reference[key].numpy().tobytes() for key in sorted(reference))).hexdigest()
    images = {"split": "test", "images": len(reference["test_features"]), "sha256": digest}
    classifier = {"name": net.name, "dimensions": net.head.in_features, "sha256": net.sha256}
    return reference, {"reference": images, "features": classifier}


def check_shape(net: FeatureNet, images: torch.Tensor) -> None:
    there, here = (" x ".join(map(str, (*shape[1:], shape[0]))) for shape in (images.shape[1:], net.image_shape))
    if there != here:
        raise UserError(f"the images are {there} (height x width x channels), the feature classifier expects {here}")


def shrink(net: FeatureNet, images: torch.Tensor) -> torch.Tensor:
    """Larger square images as small as the classifier takes them, and grey ones in its three channels."""
    channels, _, size = net.image_shape
    if images.shape[-2] == images.shape[-1] > size:
        images = resize(images, size)
    return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images
