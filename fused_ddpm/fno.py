"""The FNO U-Net of sparse_ddo.py: layers that are operations on functions, mirrored at the edges.

Fourier neural operators: Li et al. 2021, arXiv 2010.08895. With cosine modes instead, opposite
borders do not mix; their convolutions are even, and 3x3 convolutions beside them need not be. At
the finer levels these are alone: a matrix for each mode is slow, and more than so few steps learn.
3x3 belongs to a grid, so as in convolutional neural operators (Raonic et al. 2023, arXiv
2302.01178) all is done on one, that of the training images, whatever those of input and output are.
"""

from fused_ddpm import grids
from fused_ddpm.grids import along_both, dct_matrix, resize
from fused_ddpm.points import WIDTHS
from fused_ddpm.unet import NormSilu, TimeEmbedding, zero

import torch
import torch.nn as nn
import torch.nn.functional as F


class MirroredConv(nn.Conv2d):
    """3x3. An image that is mirrored at its edges goes on with its last pixel."""

    def __init__(self, in_channels, channels, gain=1.0):
        super().__init__(in_channels, channels, 3)
        nn.init.normal_(self.weight, std=gain * (in_channels * 9) ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # on a CPU it would pad in float32
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return super().forward(x)


class SpectralConv(nn.Module):
    """A matrix for each of the lowest cosine modes, plus a 3x3 convolution for what is local."""

    def __init__(self, in_channels, channels, modes, gain=1.0):
        super().__init__()
        # Half of the variance through either path, where the input is smooth: a function's few
        # modes hold most of it.
        self.local = MirroredConv(in_channels, channels, gain * 0.5**0.5)
        weight = torch.randn(channels, in_channels, modes, modes)
        self.weight = nn.Parameter(weight * gain * (0.5 / in_channels) ** 0.5)

    def forward(self, x):
        modes = self.weight.shape[-1]
        waves = grids.cached(dct_matrix, x.shape[-1], x.device)[:modes]
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for this
            h = along_both(waves, x.float()).flatten(2).permute(2, 0, 1)  # (modes^2, B, in)
            h = h @ self.weight.flatten(2).permute(2, 1, 0)  # (modes^2, B, out)
            h = along_both(waves.T, h.permute(1, 2, 0).unflatten(2, (modes, modes)))
        x = self.local(x)
        return x + h.to(x.dtype)


def make_conv(in_channels, channels, modes, gain=1.0):
    """Spectral; without modes local alone. It keeps the variance of its input, times gain^2."""
    if modes:
        return SpectralConv(in_channels, channels, modes, gain)
    return MirroredConv(in_channels, channels, gain)


class Block(nn.Module):
    def __init__(self, in_channels, channels, emb_dim, modes):
        super().__init__()
        self.norm1 = NormSilu(in_channels)
        self.conv1 = make_conv(in_channels, channels, modes)
        self.scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm2 = NormSilu(channels)
        self.conv2 = make_conv(channels, channels, modes, gain=0.5)
        same = in_channels == channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x, emb):
        h = self.conv1(self.norm1(x))
        h = self.norm2(h, *self.scale_shift(emb).chunk(2, dim=1))
        return self.skip(x) + self.conv2(h)


class FnoUnet(nn.Module):
    """x (B, in_channels, n, n), t (B,) in [0, 1], seen -> (B, C, n, n).

    n is the side of the training images. seen: the features of points.Seen; of the
    conditionings "encoder" and "concat" an image (B, C + 1, m, m), 0 where nothing is seen. It
    reaches the network by way of its pixels: another grid m is another function. shape: (C, n, n).
    config: dim, dim_mults, num_blocks, modes, spectral, conditioning; see sparse_ddo.py.
    """

    def __init__(self, in_channels, shape, config):
        super().__init__()
        channels, n, _ = shape
        dims, emb_dim = [config.dim * m for m in config.dim_mults], 2 * max(config.dim, 64)
        first = len(dims) - config.spectral
        modes = [config.modes // 2**k if k >= first else 0 for k in range(len(dims))]
        coarsest = 2 ** (len(dims) - 1)
        self.size = -(-n // coarsest) * coarsest  # of the grid that all is done on

        def stage(level, in_channels):
            widths = [in_channels] + [dims[level]] * (config.num_blocks - 1)
            blocks = (Block(width, dims[level], emb_dim, modes[level]) for width in widths)
            return nn.ModuleList(blocks)

        self.time = TimeEmbedding(emb_dim)
        self.encoder, features = nn.Identity(), channels + 1
        if config.conditioning == "setconv":
            features = len(WIDTHS) * (channels + 1)
        elif config.conditioning == "encoder":
            layers = []
            for width in (channels + 1, 32, 32):
                layers += [MirroredConv(width, 32), NormSilu(32)]
            self.encoder, features = nn.Sequential(*layers), 32
        self.lift = MirroredConv(in_channels + features + 2, dims[0])
        self.down, self.narrow = nn.ModuleList(), nn.ModuleList()
        self.widen, self.up = nn.ModuleList(), nn.ModuleList()
        for level in range(len(dims) - 1):
            here, below = dims[level], dims[level + 1]
            self.down.append(stage(level, here))
            self.widen.append(nn.Conv2d(here, below, 2, stride=2))
            self.narrow.append(nn.Conv2d(below, here, 1))
            self.up.append(stage(level, 2 * here))
        self.mid = stage(len(dims) - 1, dims[-1])
        last = zero(MirroredConv(dims[0], channels))
        self.out = nn.Sequential(NormSilu(dims[0]), last)

    def forward(self, x, t, seen):
        emb, n, size = self.time(1000 * t), x.shape[-1], self.size
        features = resize(self.encoder(seen), size)
        place = torch.linspace(-1, 1, size, device=x.device)
        place = torch.stack(torch.meshgrid(place, place, indexing="ij"))
        x = torch.cat([resize(x, size), features, place.expand(len(x), -1, -1, -1)], dim=1)
        x = self.lift(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for blocks, widen in zip(self.down, self.widen, strict=True):
            for block in blocks:
                x = block(x, emb)
            skips.append(x)
            x = widen(x)
        for block in self.mid:
            x = block(x, emb)
        for blocks, narrow in zip(reversed(self.up), reversed(self.narrow), strict=True):
            skip = skips.pop()
            x = resize(narrow(x), skip.shape[-1]).to(skip.dtype)
            x = torch.cat([x, skip], dim=1)
            for block in blocks:
                x = block(x, emb)
        return resize(self.out(x), n)
