"""The U-Net of ddpm.py, cfg_ddpm.py and sparse_ddpm.py."""

import math

from fused_ddpm import norm_silu

import torch
import torch.nn as nn
import torch.nn.functional as F


class NormSilu(nn.GroupNorm):
    """silu(norm(x) (1 + scale) + shift); scale, shift: (B, C), or neither."""

    def __init__(self, channels):
        super().__init__(math.gcd(8, channels), channels)

    def forward(self, x, scale=None, shift=None):
        return norm_silu(x, self.weight, self.bias, self.num_groups, scale, shift)


def zero(layer):
    """Start at zero: a block as its skip, a network as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, out): sines and cosines of 64 frequencies from 1 to 1/8660, then an MLP."""

    def __init__(self, out):
        super().__init__()
        frequencies = torch.exp(-math.log(10000) * torch.arange(64) / 64)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(128, out), nn.SiLU(), nn.Linear(out, out), nn.SiLU())

    def forward(self, t):
        angle = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))


class ResBlock(nn.Module):
    def __init__(self, in_channels, channels, emb_dim, dropout):
        super().__init__()
        self.norm1 = NormSilu(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm2, self.dropout = NormSilu(channels), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        same = in_channels == channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x, emb):
        h = self.conv1(self.norm1(x))
        h = self.norm2(h, *self.scale_shift(emb).chunk(2, dim=1))
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 64))
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb):
        B, C, H, W = x.shape
        # bfloat16 x and float32 weights can take five times as long on a CPU.
        qkv = self.qkv(self.norm(x.to(self.norm.weight.dtype)))
        qkv = qkv.reshape(B, 3, self.heads, C // self.heads, H * W)
        h = self.mix(*qkv.transpose(-1, -2).unbind(1))  # (B, heads, H*W, C/heads)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))

    def mix(self, q, k, v):
        if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] > 256:
            return F.scaled_dot_product_attention(q, k, v)
        # Twice as fast as the fused one on a CPU, for more memory.
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class LinearAttention(Attention):
    """Keys sum the values up to a (C/heads, C/heads) matrix first: cost H*W, not (H*W)^2.

    Shen et al. 2021.
    """

    def mix(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


class Unet(nn.Module):
    """x (B, in_channels, H, W), t (B,) -> (B, out_channels, H, W).

    With num_classes it also takes labels (B,) int64; the label num_classes is the null class, as is
    None. Without, labels are ignored.
    config: image_size, dim, dim_mults, num_blocks, attn_resolutions, linear_attention, dropout; see
    ddpm.py.
    """

    def __init__(self, in_channels, out_channels, config, num_classes=0):
        super().__init__()
        self.null_class = num_classes
        dims, emb_dim = [config.dim * m for m in config.dim_mults], 2 * max(config.dim, 64)
        bottom = len(dims) - 1

        def attention(level):
            if config.image_size // 2**level in config.attn_resolutions:
                return [Attention(dims[level])]
            return [LinearAttention(dims[level])] if config.linear_attention else []

        def stage(level, in_channels):
            blocks = []
            for width in [in_channels] + [dims[level]] * (config.num_blocks - 1):
                blocks += [ResBlock(width, dims[level], emb_dim, config.dropout), *attention(level)]
            return nn.ModuleList(blocks)

        self.time = TimeEmbedding(emb_dim)
        if num_classes:
            table = nn.Embedding(num_classes + 1, 128)
            mlp = nn.Linear(128, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
            self.classes = nn.Sequential(table, *mlp)
        self.stem = nn.Conv2d(in_channels, dims[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in range(bottom):
            here, below = dims[level], dims[level + 1]
            self.down.append(stage(level, here))
            self.downsample.append(nn.Conv2d(here, below, 2, stride=2))
            self.upsample.append(nn.Conv2d(below, here, 1))  # before nearest-neighbour
            self.up.append(stage(level, 2 * here))
        deepest = config.image_size // 2**bottom
        middle = [] if deepest in config.attn_resolutions else [Attention(dims[-1])]
        self.mid = nn.ModuleList([*stage(bottom, dims[-1]), *middle, *stage(bottom, dims[-1])])
        last = zero(nn.Conv2d(dims[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(NormSilu(dims[0]), last)

    def forward(self, x, t, labels=None):
        emb = self.time(t)
        if self.null_class:
            labels = torch.full_like(t, self.null_class) if labels is None else labels
            emb = emb + self.classes(labels)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for blocks, downsample in zip(self.down, self.downsample, strict=True):
            for block in blocks:
                x = block(x, emb)
            skips.append(x)
            x = downsample(x)
        for block in self.mid:
            x = block(x, emb)
        for blocks, upsample in zip(reversed(self.up), reversed(self.upsample), strict=True):
            x = F.interpolate(upsample(x), scale_factor=2.0, mode="nearest")
            x = torch.cat([x, skips.pop()], dim=1)
            for block in blocks:
                x = block(x, emb)
        return self.out(x)


def check_sizes(config):
    """For a config's check: (wrong, message) of what is asked of sizes and steps."""
    yield not config.dim_mults, "--dim-mults: needs one level at least"
    halvings, steps = len(config.dim_mults) - 1, config.num_timesteps
    size = f"--image-size {config.image_size}: the U-Net halves it {halvings} times, so it must "
    yield config.image_size % 2**halvings, f"{size}be a multiple of {2**halvings}"
    many = f"--sample-steps {config.sample_steps}: at most --num-timesteps, {steps}"
    yield config.sample_steps > steps, many
