"""The networks that predict noise, and the moving average of their weights.

Every network is called as `model(x, t, labels=None)`:
    x       float, N x C x H x W, in [-1, 1]: the noisy images x_t
    t       int64, N, 0-based: the timestep of each image
    labels  int64, N, or None: class indices; -1 (or None for the whole batch) means "no label"
and returns the predicted noise eps, with the shape of x.

`PatchUNet` is this project's own network: Point 1's, and that of all published models but `cifar10_course`.
`UNet` and `UNet_conditional` are the course's networks: their parameters keep the course's names, order and shapes.
"""

import copy

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from utils import look_up


# Homework EMA 7-32: the moving average of the weights
class EMA:
    """Exponential moving average of a model's weights: ema = beta * ema + (1 - beta) * weights, after every step.

    The average forgets a step after about 1 / (1 - beta) further steps. Until `start` steps have been made it is a
    plain copy: averaging over the first, quickly changing weights would only blur them. Buffers are always copied.
    """

    def __init__(self, beta=0.995, start=2000):
        if not 0 <= beta < 1:
            raise ValueError(f"EMA beta must be in [0, 1), not {beta}")
        self.beta, self.start, self.step = beta, start, 0

    @torch.no_grad()
    def step_ema(self, ema_model, model):
        """Call once after every optimizer step."""
        if self.step < self.start:
            self.reset_parameters(ema_model, model)
        else:
            self.update_model_average(ema_model, model)
        self.step += 1

    @torch.no_grad()
    def update_model_average(self, ema_model, model):
        """ema += (1 - beta) * (weights - ema), for all tensors in one fused call."""
        torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - self.beta)
        for ema_buffer, buffer in zip(ema_model.buffers(), model.buffers(), strict=True):
            ema_buffer.copy_(buffer)

    def reset_parameters(self, ema_model, model):
        ema_model.load_state_dict(model.state_dict())

    @staticmethod
    def copy_of(model):
        """A frozen copy to hold the average."""
        return copy.deepcopy(model).eval().requires_grad_(False)


def sinusoidal_embedding(t, dim):
    """N timesteps -> N x dim: sin(t f), then cos(t f), f = 10000^(-i / dim) for even i (Vaswani et al. 2017, 3.5)."""
    frequencies = 10000 ** (-torch.arange(0, dim, 2, device=t.device, dtype=torch.float32) / dim)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


# Homework TODO 215: the table of label embeddings
def label_embedding(num_classes, dim):
    """A row of `dim` numbers for each class, as many as a time embedding has; None for an unconditional network."""
    return nn.Embedding(num_classes, dim) if num_classes else None


# Homework TODO 232: labels join the time embedding
def add_labels(emb, embedding, labels):
    """Time embeddings (N x dim) plus each label's row of the table; -1 or None, "no label", adds nothing."""
    if labels is None or embedding is None:
        return emb
    return emb + embedding(labels.clamp(min=0)) * (labels >= 0)[:, None]


# --- PatchUNet: most of the work at low resolution -------------------------------------------------------------------


def equal_groups(dim):
    """How many equal groups of about 32 features (never fewer) `dim` has, for attention's heads and norm."""
    return next(n for n in range(max(1, dim // 32), 0, -1) if dim % n == 0)


def norm(dim, affine=True):
    # Groups of 32: with fewer channels a group, PyTorch's channels_last kernel on a CPU takes several times as long.
    return nn.GroupNorm(equal_groups(dim), dim, affine=affine)


def zero_init(layer):
    """Start a residual branch (or the whole network) at zero, so that training begins from the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResnetBlock(nn.Module):
    """norm, SiLU, conv; norm, scale and shift by the embedding (FiLM), SiLU, conv; plus the input."""

    def __init__(self, dim_in, dim_out, emb_dim):
        super().__init__()
        self.norm1, self.conv1 = norm(dim_in), nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.film = zero_init(nn.Linear(emb_dim, 2 * dim_out))
        self.norm2, self.conv2 = norm(dim_out, affine=False), zero_init(nn.Conv2d(dim_out, dim_out, 3, padding=1))
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.conv2(F.silu(h)) + self.skip(x)


class ConvNextBlock(nn.Module):
    """7x7 depthwise conv plus the embedding, then two 3x3 convs around GELU: The Annotated Diffusion Model's block."""

    def __init__(self, dim_in, dim_out, emb_dim, mult=2):
        super().__init__()
        self.depthwise = nn.Conv2d(dim_in, dim_in, 7, padding=3, groups=dim_in)
        self.emb = nn.Linear(emb_dim, dim_in)
        self.net = nn.Sequential(
            nn.GroupNorm(1, dim_in),
            nn.Conv2d(dim_in, dim_out * mult, 3, padding=1),
            nn.GELU(),
            nn.GroupNorm(1, dim_out * mult),
            nn.Conv2d(dim_out * mult, dim_out, 3, padding=1),
        )
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x, emb):
        h = self.depthwise(x) + self.emb(emb)[:, :, None, None]
        return self.net(h) + self.skip(x)


BLOCKS = {"resnet": ResnetBlock, "convnext": ConvNextBlock}


class Attention(nn.Module):
    """Full softmax attention over the H*W positions, residual."""

    def __init__(self, dim):
        super().__init__()
        self.heads, self.norm = equal_groups(dim), norm(dim)
        self.qkv, self.out = nn.Conv2d(dim, 3 * dim, 1), zero_init(nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        qkv = self.qkv(self.norm(x))
        q, k, v = rearrange(qkv, "n (three heads d) h w -> three n heads (h w) d", three=3, heads=self.heads)
        # By way of channels last, the order in memory that the convolutions want.
        attended = rearrange(self.attend(q, k, v), "n heads (h w) d -> n h w (heads d)", h=x.shape[2])
        return x + self.out(rearrange(attended, "n h w c -> n c h w"))

    def attend(self, q, k, v):
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            # over a few dozen positions float32 is four times as fast
            with torch.autocast("cpu", enabled=False):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
        return F.scaled_dot_product_attention(q, k, v)


class LinearAttention(Attention):
    """Attention in time linear in H*W: softmax over features of q and over positions of k (Shen et al. 2018)."""

    def attend(self, q, k, v):
        q, k = q.softmax(dim=-1) * q.shape[-1] ** -0.5, k.softmax(dim=-2)
        return q @ (k.transpose(-2, -1) @ v)


class PatchUNet(nn.Module):
    """A U-Net on `patch` x `patch` pixel blocks, with FiLM-conditioned blocks and attention in the middle.

    channels     image channels, 1 or 3
    width        feature maps at the first level; level i has width * mults[i], at 1 / (patch * 2^i) of the image's side
    depth        blocks per level, going down and again coming up: one number, or one for each level
    num_classes  None: unconditional; otherwise a label's embedding is added to the time embedding
    block        "resnet" or "convnext"
    attention    linear attention at the outer levels (all but the lowest), coming up; the middle always has full
                 attention
    """

    def __init__(
        self, channels=1, width=32, mults=(1, 2), depth=1, patch=2, num_classes=None, block="resnet", attention=True
    ):
        super().__init__()
        block = look_up(BLOCKS, block, "block")
        depths = [depth] * len(mults) if isinstance(depth, int) else depth
        if len(depths) != len(mults) or min(channels, width, patch, *depths, *mults) < 1:
            raise ValueError("channels, width, mults, depth and patch must be at least 1, with a depth for each level")
        self.channels, self.num_classes, self.patch, self.width = channels, num_classes, patch, width
        self.size_multiple = patch * 2 ** (len(mults) - 1)
        dims = [width * m for m in mults]
        emb_dim, outer = 4 * width, range(len(dims) - 1)

        def blocks(level, dim_in):
            dims_in = [dim_in] + [dims[level]] * (depths[level] - 1)
            return [block(d, dims[level], emb_dim) for d in dims_in]

        def outer_attention(level):
            return [LinearAttention(dims[level])] if attention and level in outer else []

        self.time_mlp = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.label_emb = label_embedding(num_classes, emb_dim)
        self.stem = nn.Conv2d(channels * patch**2, dims[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(blocks(i, d)) for i, d in enumerate(dims))
        self.shrink = nn.ModuleList(nn.Conv2d(dims[i], dims[i + 1], 2, stride=2) for i in outer)
        self.mid = nn.ModuleList([block(dims[-1], dims[-1], emb_dim), Attention(dims[-1])])
        self.up = nn.ModuleList(nn.ModuleList(blocks(i, 2 * d) + outer_attention(i)) for i, d in enumerate(dims))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(dims[i + 1], dims[i], 2, stride=2) for i in outer)
        last = zero_init(nn.Conv2d(dims[0], channels * patch**2, 3, padding=1))
        self.head = nn.Sequential(norm(dims[0]), nn.SiLU(), last)

    def forward(self, x, t, labels=None):
        emb = self.time_mlp(sinusoidal_embedding(t, self.width))
        emb = F.silu(add_labels(emb, self.label_emb, labels))

        x = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = []
        for level, layers in enumerate(self.down):
            x = apply_layers(layers, x, emb)
            skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        x = apply_layers(self.mid, x, emb)
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                x = self.grow[level](x)
            x = apply_layers(self.up[level], torch.cat([x, skips.pop()], dim=1), emb)
        # In 16 bits the last layer's rounding would add a constant to each colour, and a tint to the samples.
        with torch.autocast(x.device.type, enabled=False):
            return F.pixel_shuffle(self.head(x.float()), self.patch)


def apply_layers(layers, x, emb):
    for layer in layers:
        x = layer(x) if isinstance(layer, Attention) else layer(x, emb)
    return x


# --- the course's networks -------------------------------------------------------------------------------------------


class DoubleConv(nn.Module):
    """Two 3x3 convs with GroupNorm(1 group), GELU between; the residual form is gelu(x + f(x))."""

    def __init__(self, in_channels, out_channels, mid_channels=None, residual=False):
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.residual = residual
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 3, padding=1, bias=False),
            nn.GroupNorm(1, mid_channels),
            nn.GELU(),
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False),
            nn.GroupNorm(1, out_channels),
        )

    def forward(self, x):
        return F.gelu(x + self.double_conv(x)) if self.residual else self.double_conv(x)


class Down(nn.Module):
    """Halve the image's side, then add the embedding to every position."""

    def __init__(self, in_channels, out_channels, emb_dim):
        super().__init__()
        self.maxpool_conv = nn.Sequential(
            nn.MaxPool2d(2), DoubleConv(in_channels, in_channels, residual=True), DoubleConv(in_channels, out_channels)
        )
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))

    def forward(self, x, emb):
        return self.maxpool_conv(x) + self.emb_layer(emb)[:, :, None, None]


class Up(nn.Module):
    """Double the image's side, join the skip, then add the embedding to every position."""

    def __init__(self, in_channels, out_channels, emb_dim):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = nn.Sequential(
            DoubleConv(in_channels, in_channels, residual=True), DoubleConv(in_channels, out_channels, in_channels // 2)
        )
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))

    def forward(self, x, skip, emb):
        x = self.conv(torch.cat([skip, self.up(x)], dim=1))
        return x + self.emb_layer(emb)[:, :, None, None]


class SelfAttention(nn.Module):
    """A pre-norm transformer layer over the H*W tokens of an image of any size: 4-head attention, then a small MLP."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.ln = nn.LayerNorm(channels)
        self.ff_self = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x):
        tokens = rearrange(x, "n c h w -> n (h w) c")
        qkv = F.linear(self.ln(tokens), self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, k, v = rearrange(qkv, "n l (three heads d) -> three n heads l d", three=3, heads=self.mha.num_heads)
        # The same as self.mha(...), whose own path may store the (H W) x (H W) attention matrix.
        attended = F.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.mha.out_proj(rearrange(attended, "n heads l d -> n l (heads d)"))
        tokens = tokens + self.ff_self(tokens)
        return rearrange(tokens, "n (h w) c -> n c h w", h=x.shape[2])


class UNet(nn.Module):
    """The course's U-Net, for images whose sides 8 divides; `width` 64 is the course's."""

    size_multiple = 8

    def __init__(self, channels=3, time_dim=256, num_classes=None, width=64):
        super().__init__()
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, the number of attention heads, not {width}")
        self.channels, self.time_dim, self.num_classes = channels, time_dim, num_classes
        w = width
        self.inc = DoubleConv(channels, w)
        self.down1, self.sa1 = Down(w, 2 * w, time_dim), SelfAttention(2 * w)
        self.down2, self.sa2 = Down(2 * w, 4 * w, time_dim), SelfAttention(4 * w)
        self.down3, self.sa3 = Down(4 * w, 4 * w, time_dim), SelfAttention(4 * w)
        self.bot1, self.bot2, self.bot3 = DoubleConv(4 * w, 8 * w), DoubleConv(8 * w, 8 * w), DoubleConv(8 * w, 4 * w)
        self.up1, self.sa4 = Up(8 * w, 2 * w, time_dim), SelfAttention(2 * w)
        self.up2, self.sa5 = Up(4 * w, w, time_dim), SelfAttention(w)
        self.up3, self.sa6 = Up(2 * w, w, time_dim), SelfAttention(w)
        self.outc = nn.Conv2d(w, channels, 1)
        self.label_emb = label_embedding(num_classes, time_dim)

    def forward(self, x, t, labels=None):
        emb = add_labels(sinusoidal_embedding(t, self.time_dim), self.label_emb, labels)
        x1 = self.inc(x)
        x2 = self.sa1(self.down1(x1, emb))
        x3 = self.sa2(self.down2(x2, emb))
        x4 = self.sa3(self.down3(x3, emb))
        x4 = self.bot3(self.bot2(self.bot1(x4)))
        x = self.sa4(self.up1(x4, x3, emb))
        x = self.sa5(self.up2(x, x2, emb))
        x = self.sa6(self.up3(x, x1, emb))
        return self.outc(x)


class UNet_conditional(UNet):
    """The course's name for it with num_classes: a label's embedding, as wide as the time embedding, is added to it."""


NETWORKS = {cls.__name__: cls for cls in (PatchUNet, UNet, UNet_conditional)}
