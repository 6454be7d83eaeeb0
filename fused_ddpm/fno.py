"""The FNO U-Net of sparse_ddo.py: layers that are operations on functions, the same on any grid.

Fourier neural operators: Li et al. 2021, arXiv 2010.08895. Functions are periodic here.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from fused_ddpm.unet import TimeEmbedding, group_norm, zero


@functools.cache
def fourier_matrix(n, modes, device):
    """exp(-2 pi i k x), complex (modes, n): k = -modes/2 .. modes/2 - 1, x the n pixel centres."""
    k, x = torch.arange(-modes // 2, modes // 2), (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.exp(-2j * math.pi * k[:, None] * x).to(torch.complex64).to(device)


@functools.cache
def resize_matrix(size, n, device):
    """(n, size): from values at `size` pixel centres to those at n.

    By the Fourier modes below half the smaller of the two grids.
    """
    half = min(size, n) // 2
    k = torch.arange(1 - half, half, dtype=torch.float64)
    x, y = ((torch.arange(m, dtype=torch.float64) + 0.5) / m for m in (size, n))
    waves = torch.cos(2 * math.pi * k * (y[:, None, None] - x[:, None]))
    return waves.mean(-1).mul(len(k) / size).float().to(device)


@functools.cache
def places_in_shells(n, channels, device):
    """Places of modes (k1, k2), (channels, n, n), if they are listed by max(k1, k2).

    A finer grid only adds to that list, so a mode draws the same numbers on any grid.
    """
    k1, k2 = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    shell = torch.maximum(k1, k2)
    place = shell**2 + torch.where(k1 == shell, k2, shell + 1 + k1)
    return (channels * place + torch.arange(channels)[:, None, None]).to(device)


def cached(make, *args):
    return make(*args)


def prepare_to_compile():
    """Else torch.compile makes the matrices anew in each call. It takes seconds, so only then."""
    global cached
    cached = torch.compiler.assume_constant_result(cached)


def resize(x, n):
    """Band-limited resampling (..., size, size) -> (..., n, n)."""
    if x.shape[-1] == n:
        return x
    matrix = cached(resize_matrix, x.shape[-1], n, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return matrix @ x.float() @ matrix.T


class SpectralConv(nn.Module):
    """A convolution by its lowest Fourier modes, plus a 1x1 convolution for all modes."""

    def __init__(self, in_channels, channels, modes, gain=1.0):
        super().__init__()
        self.modes, self.point = modes, nn.Conv2d(in_channels, channels, 1)
        # Half of the variance through either path, where the input is smooth: a function's few
        # modes hold most of it.
        nn.init.normal_(self.point.weight, std=gain * (0.5 / in_channels) ** 0.5)
        nn.init.zeros_(self.point.bias)
        weight = torch.randn(modes * modes // 2, in_channels, channels, 2)
        self.weight = nn.Parameter(weight * gain * (0.25 / in_channels) ** 0.5)

    def forward(self, x):
        n, f = x.shape[-1], cached(fourier_matrix, x.shape[-1], self.modes, x.device)
        half = f[self.modes // 2 :]  # k2 >= 0; the image is real, so the others follow
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for this
            h = x.float()
            h = f @ torch.complex(h @ half.real.T, h @ half.imag.T) / n**2
            h = h.flatten(2).permute(2, 0, 1)  # (B, in, modes, modes/2) to (.., B, in)
            h = h @ torch.view_as_complex(self.weight)  # (modes * modes/2, B, out)
            h = h.permute(1, 2, 0).unflatten(2, (self.modes, -1))
            h = f.mH @ torch.cat([h[..., :1], 2 * h[..., 1:]], dim=-1)  # (B, out, n, modes/2)
            h = h.real @ half.real + h.imag @ half.imag  # real part of h times half's conjugate
        return self.point(x) + h


class Block(nn.Module):
    def __init__(self, in_channels, channels, emb_dim, modes):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = SpectralConv(in_channels, channels, modes)
        self.scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm2 = group_norm(channels)
        self.conv2 = SpectralConv(channels, channels, modes, gain=0.5)
        same = in_channels == channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class FnoUnet(nn.Module):
    """z (B, C, n, n), t (B,) in [0, 1], cond (B, C, m, m), cond_mask (B, 1, m, m) -> (B, C, n, n).

    n, the grid of the state, may differ from m, that of the context. The context is an image, zero
    where nothing is seen, and reaches the network through convolutions on its own grid: that path,
    unlike all others, is tied to the grid it was trained on. config: dim, dim_mults, num_blocks,
    modes, conditioning; see sparse_ddo.py.
    """

    def __init__(self, channels, config):
        super().__init__()
        dims, emb_dim = [config.dim * m for m in config.dim_mults], 2 * max(config.dim, 64)
        modes = [config.modes // 2**level for level in range(len(dims))]

        def stage(level, in_channels):
            widths = [in_channels] + [dims[level]] * (config.num_blocks - 1)
            blocks = (Block(width, dims[level], emb_dim, modes[level]) for width in widths)
            return nn.ModuleList(blocks)

        self.sizes = [2 * m for m in modes]  # grids of the lower levels, whatever n
        self.time = TimeEmbedding(emb_dim)
        self.encoder, features = nn.Identity(), channels + 1
        if config.conditioning == "encoder":
            layers = []
            for width in (channels + 1, 32, 32):
                conv = nn.Conv2d(width, 32, 3, padding=1, padding_mode="circular")
                layers += [conv, group_norm(32), nn.SiLU()]
            self.encoder, features = nn.Sequential(*layers), 32
        self.lift = nn.Conv2d(channels + features + 4, dims[0], 1)
        self.down, self.narrow = nn.ModuleList(), nn.ModuleList()
        self.widen, self.up = nn.ModuleList(), nn.ModuleList()
        for level in range(len(dims) - 1):
            here, below = dims[level], dims[level + 1]
            self.down.append(stage(level, here))
            self.widen.append(nn.Conv2d(here, below, 1))
            self.narrow.append(nn.Conv2d(below, here, 1))
            self.up.append(stage(level, 2 * here))
        self.mid = stage(len(dims) - 1, dims[-1])
        last = zero(nn.Conv2d(dims[0], channels, 1))
        self.out = nn.Sequential(group_norm(dims[0]), nn.SiLU(), last)

    def forward(self, z, t, cond, cond_mask):
        emb, n = self.time(1000 * t), z.shape[-1]
        context = torch.cat([cond, cond_mask.to(cond.dtype)], dim=1)
        features = resize(self.encoder(context), n)
        angle = 2 * math.pi * (torch.arange(n, device=z.device) + 0.5) / n
        row, column = torch.meshgrid(angle, angle, indexing="ij")
        place = torch.stack([row.sin(), row.cos(), column.sin(), column.cos()])
        x = self.lift(torch.cat([z, features, place.expand(len(z), -1, -1, -1)], dim=1))
        skips = []
        for blocks, widen, size in zip(self.down, self.widen, self.sizes[1:], strict=True):
            for block in blocks:
                x = block(x, emb)
            skips.append(x)
            x = widen(resize(x, size))
        for block in self.mid:
            x = block(x, emb)
        for blocks, narrow in zip(reversed(self.up), reversed(self.narrow), strict=True):
            skip = skips.pop()
            x = torch.cat([resize(narrow(x), skip.shape[-1]), skip], dim=1)
            for block in blocks:
                x = block(x, emb)
        return self.out(x)
