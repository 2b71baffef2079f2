"""The networks against the course's own (names, shapes, outputs), against formulas written out, and the average."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import modules
from ddpm_conditional import guided
from modules import EMA, PatchUNet, UNet, UNet_conditional
from training import train
from weights import load_checkpoint

DATA = Path(__file__).parent / "data"


def inputs(channels=1, size=8, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=g), torch.randint(1000, (n,), generator=g)


# --- the course's networks ---


@pytest.mark.parametrize("network, arguments", [(UNet, {}), (UNet_conditional, {"num_classes": 10})])
def test_course_names_order_and_shapes(network, arguments):
    expected = json.loads((DATA / "course_checkpoint_shapes.json").read_text())[network.__name__]
    ours = {name: list(w.shape) for name, w in network(**arguments).state_dict().items()}
    assert list(ours.items()) == list(expected.items())


def test_course_outputs():
    golden = {name: torch.from_numpy(a) for name, a in np.load(DATA / "unet_conditional_golden.npz").items()}
    model = randomise(UNet_conditional(num_classes=10))
    with torch.inference_mode():
        x, t = golden["x"], golden["t"]
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([golden["y"], torch.full_like(golden["y"], -1)]))
        torch.testing.assert_close(both[:2], golden["out_cond"], rtol=0, atol=1e-4)
        torch.testing.assert_close(both[2:], golden["out_uncond"], rtol=0, atol=1e-4)
        # without labels at all it is the unconditional network with the same weights
        plain = UNet()
        plain.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("label_emb")})
        torch.testing.assert_close(plain.eval()(x, t), golden["out_uncond"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: UNet(width=6), "multiple of 4"),
        (lambda: PatchUNet(mults=(1, 0)), "at least 1"),
        (lambda: PatchUNet(mults=(1, 2), depth=[1]), "a depth for each level"),
        (lambda: PatchUNet(block="dense"), "unknown block"),
        (lambda: EMA(-0.1), "beta must be in"),
        (lambda: EMA(1), "beta must be in"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_self_attention_is_multihead_attention():
    layer = randomise(modules.SelfAttention(16), scale=0.5)
    x, _ = inputs(16, 4)
    tokens = x.flatten(2).transpose(1, 2)
    normed = layer.ln(tokens)
    tokens = tokens + layer.mha(normed, normed, normed)[0]
    tokens = tokens + layer.ff_self(tokens)
    torch.testing.assert_close(layer(x), tokens.transpose(1, 2).reshape(x.shape), rtol=1e-5, atol=1e-5)


# --- PatchUNet ---


@settings(max_examples=25)
@given(
    width=st.integers(1, 40),
    mults=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    depth=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    block=st.sampled_from(list(modules.BLOCKS)),
    attention=st.booleans(),
    classes=st.sampled_from([None, 1, 3]),
    channels=st.sampled_from([1, 3]),
    times=st.integers(1, 4),
)
def test_patch_unet_of_any_shape(width, mults, depth, block, attention, classes, channels, times):
    model = PatchUNet(channels, width, mults, depth[: len(mults)], 2, classes, block, attention)
    x, t = inputs(channels, times * model.size_multiple, n=2)
    with torch.no_grad():
        eps = model(x, t, None if classes is None else torch.tensor([0, -1]))
    assert eps.shape == x.shape
    assert (eps == 0).all()  # an untrained network predicts no noise: the loss starts at the noise's variance


NETWORKS = {
    "resnet": lambda: PatchUNet(1, width=8, num_classes=5),
    "convnext": lambda: PatchUNet(1, width=8, num_classes=5, block="convnext"),
    "course": lambda: UNet_conditional(1, num_classes=5, width=8),
}


@pytest.mark.parametrize("bias", [1.0001, 0.3337])
def test_16_bits_add_no_constant_to_a_colour(bias):
    """Of the last layer: a sampler would make a tint of it."""
    model = randomise(PatchUNet(channels=3, width=8, patch=1)).eval()
    torch.nn.init.constant_(model.head[-1].weight, 0)
    torch.nn.init.constant_(model.head[-1].bias, bias)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        eps = model(*inputs(channels=3))
    torch.testing.assert_close(eps, torch.full_like(eps, bias), rtol=0, atol=1e-6)
    assert eps.dtype == torch.float32


@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_is_trained_but_no_embedding_of_a_dropped_label(network):
    model = randomise(NETWORKS[network]())
    x, t = inputs(size=24)
    model(x, t, torch.tensor([3, -1, 1])).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    rows = model.label_emb.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("network", NETWORKS)
def test_no_label_and_label_dropout(network):
    """-1 is no label, in part of a batch or all of it, and dropping a label leaves the other images' outputs alone."""
    model = randomise(NETWORKS[network]())
    x, t = inputs(size=16, n=4)
    labels = torch.tensor([3, 1, 4, 1])
    dropped = torch.tensor([3, -1, 4, -1])
    with torch.no_grad():
        cond, uncond, mixed = model(x, t, labels), model(x, t), model(x, t, dropped)
        torch.testing.assert_close(model(x, t, torch.full((4,), -1)), uncond, rtol=0, atol=0)
    torch.testing.assert_close(mixed[[0, 2]], cond[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(mixed[[1, 3]], uncond[[1, 3]], rtol=0, atol=0)
    assert ((cond - uncond).abs().amax((1, 2, 3)) > 1e-3).all()  # a label does matter


@pytest.mark.parametrize("network", NETWORKS)
def test_images_do_not_see_each_other(network):
    """And channels_last is the same network: the two layouts and any batch give the same outputs, up to rounding."""
    model = randomise(NETWORKS[network]())
    x, t = inputs(size=16, n=4)
    labels = torch.tensor([0, 1, -1, 3])
    with torch.no_grad():
        whole = model(x, t, labels)
        for i in range(4):
            alone = model(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)
        other = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, labels)
    torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-2


@pytest.mark.parametrize("dim", [1, 2, 33, 48, 256])
def test_sinusoidal_embedding(dim):
    t = torch.tensor([0, 1, 500, 999])
    ours = modules.sinusoidal_embedding(t, dim)
    for row, time in zip(ours, t.tolist(), strict=True):
        angles = [time * 10000 ** (-i / dim) for i in range(0, dim, 2)]
        expected = ([math.sin(a) for a in angles] + [math.cos(a) for a in angles])[:dim]
        np.testing.assert_allclose(row, expected, atol=2e-4)  # float32 angles up to 999


@pytest.mark.parametrize("dim, heads", [(8, 1), (64, 2)])
@pytest.mark.parametrize("kind", [modules.Attention, modules.LinearAttention])
def test_attention_is_its_formula(kind, dim, heads):
    layer, scale = randomise(kind(dim), scale=0.3), (dim // heads) ** -0.5
    assert layer.heads == heads
    x, _ = inputs(dim, 3)
    q, k, v = layer.qkv(layer.norm(x)).view(3, 3, heads, dim // heads, 9).unbind(1)
    if kind is modules.Attention:
        out = torch.einsum("nhij,nhdj->nhdi", (torch.einsum("nhdi,nhdj->nhij", q, k) * scale).softmax(-1), v)
    else:
        out = torch.einsum("nhdi,nhdj,nhej->nhei", q.softmax(2) * scale, k.softmax(3), v)
    torch.testing.assert_close(layer(x), x + layer.out(out.reshape(3, dim, 3, 3)), rtol=1e-4, atol=1e-5)


def test_resnet_block_is_its_formula():
    block = randomise(modules.ResnetBlock(8, 16, 12), scale=0.3)
    x, emb = inputs(8, 4)[0], torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    scale, shift = F.linear(emb, block.film.weight, block.film.bias)[..., None, None].split(16, 1)
    h = block.conv1(F.silu(F.group_norm(x, 1, block.norm1.weight, block.norm1.bias)))
    h = block.conv2(F.silu(F.group_norm(h, 1) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, emb), h + block.skip(x), rtol=1e-4, atol=1e-5)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("beta, start", [(0.995, 2000), (0.999, 0)])
def test_ema_is_the_geometric_average(beta, start):
    """10,000 steps of a random walk, against the closed form: beta^m w_start-1 + (1 - beta) sum_k beta^(n-k) w_k."""
    steps = 10_000
    walk = torch.randn(steps, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    model, ema = Weights(), EMA(beta, start)
    average = EMA.copy_of(model)
    first = torch.zeros(3, dtype=torch.float64)  # what the average starts from
    for k in range(steps):
        with torch.no_grad():
            model.a.copy_(walk[k])
            model.b.fill_(walk[k, 0])
            model.seen += 1
        ema.step_ema(average, model)
        if k + 1 == start:
            assert torch.equal(average.a, model.a)  # until then, a plain copy
            first = walk[k]
    m = steps - start
    powers = beta ** torch.arange(m - 1, -1, -1, dtype=torch.float64)
    expected = beta**m * first + (1 - beta) * (powers[:, None] * walk[start:]).sum(0)
    torch.testing.assert_close(average.a.data, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(average.b.data, expected[0].expand(2, 2), rtol=1e-9, atol=1e-9)
    assert average.seen == steps and ema.step == steps  # buffers are copied
    assert not any(p.requires_grad for p in average.parameters()) and model.a.requires_grad


def test_a_trained_model_draws_the_class_it_is_asked_for(tiny_data, tmp_path):
    config = tiny_config(steps=200, batch_size=32, lr=5e-3, ema_betas=[0.95], ema_start=20, p_uncond=0.15)
    config["diffusion"]["timesteps"] = 50
    config["model"] |= {"width": 32, "mults": [1]}
    model, diffusion, _ = load_checkpoint(train(config, tiny_data, tmp_path))
    labels = torch.arange(60) % 2
    right = {}
    for scale in (0, 2.0):
        x = diffusion.sample(guided(model, labels, scale), 60, (1, 8, 8), sampler="ddim", steps=20)
        brighter_right = x[..., 4:].mean((1, 2, 3)) > x[..., :4].mean((1, 2, 3))
        right[scale] = (brighter_right == (labels == 1)).float().mean().item()
    assert right[0] > 0.8 and right[2.0] > 0.95, right
