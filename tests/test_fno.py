"""The FNO U-Net: spectral layers against the definition, resampling, mirrored edges."""

import math

import sparse_ddo
from fused_ddpm import grids
from fused_ddpm.fno import Block, FnoUnet, SpectralConv, make_conv
from fused_ddpm.grids import dct, idct, resize
from fused_ddpm.points import WIDTHS

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import away_from_zero, make_config, with_modes

conditionings = pytest.mark.parametrize("conditioning", ["setconv", "encoder", "concat"])


def small_unet(channels=1, conditioning="setconv", n=32, spectral=3):
    torch.manual_seed(0)
    changes = dict(dim=16, dim_mults=[1, 2, 3], modes=16, conditioning=conditioning)
    changes["spectral"] = spectral
    net = FnoUnet(channels, (channels, n, n), make_config(sparse_ddo, **changes))
    return away_from_zero(net).eval()


def seen_by(net, batch=1, channels=1, n=32):
    """Of a way in as many channels as it takes."""
    setconv = isinstance(net.encoder, torch.nn.Identity) and net.lift.in_channels > 3 * channels + 3
    features = len(WIDTHS) * (channels + 1) if setconv else channels + 1
    g = torch.Generator().manual_seed(5)
    return torch.randn(batch, features, n, n, generator=g)


def waves(n, highest, channels=1, seed=0):
    """A function of cosine modes up to `highest`, variance about 1: (1, C, n, n).

    At n x n pixel centres; the same function for any n.
    """
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(1, channels, highest + 1, highest + 1, generator=g)
    return idct(with_modes(u, n)) * n / (highest + 1)


# -- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [32, 30, 8])
def test_spectral_convolution_by_the_definition(n):
    torch.manual_seed(0)
    conv, x = SpectralConv(3, 5, 8), torch.randn(2, 3, n, n)
    u, weight = dct(x.double().float()).double(), conv.weight.detach().double()
    kept = torch.zeros(2, 5, n, n, dtype=torch.float64)
    for row in range(8):
        for column in range(8):
            kept[:, :, row, column] = u[:, :, row, column] @ weight[:, :, row, column].T
    expected = idct(kept.float()) + conv.local(x)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-4)
    mirrored = conv(x.flip(-1)) - conv.local(x.flip(-1))  # even kernels: a mirror image stays one
    torch.testing.assert_close(mirrored.flip(-1), conv(x) - conv.local(x), rtol=0, atol=1e-4)


def test_edges_are_mirrors():
    """What a layer makes of an image is a part of what it makes of the image beside its mirrors."""
    torch.manual_seed(0)
    conv, x = SpectralConv(2, 3, 4), torch.randn(1, 2, 8, 8)
    local = F.conv2d(
        torch.cat([x.flip(-1), x, x.flip(-1)], -1), conv.local.weight, conv.local.bias, padding=1
    )[..., 1:-1, 8:16]
    torch.testing.assert_close(conv.local(x)[..., 1:-1, :], local, rtol=0, atol=1e-5)
    left = torch.zeros(1, 2, 8, 8)
    left[..., 0] = 1.0
    off = conv.local(left) - conv.local(0 * left)  # periodic, it would reach the other border
    assert off[..., :2].abs().max() > 1e-2 and off[..., 2:].abs().max() < 1e-6


def test_bfloat16_does_not_reach_the_transforms():
    torch.manual_seed(0)
    conv, x = SpectralConv(3, 5, 8), waves(32, 3, 3)
    nn.init.zeros_(conv.local.weight)
    plain = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        spectral, resized = conv(x), resize(x, 24)
    assert torch.equal(spectral, plain.bfloat16())  # rounded once, in the end
    assert resized.dtype == torch.float32 and torch.equal(resized, resize(x, 24))


@pytest.mark.parametrize("modes", [16, 0])
@pytest.mark.parametrize("channels_in, channels", [(32, 32), (64, 32)])
def test_block_keeps_the_variance(channels_in, channels, modes):
    torch.manual_seed(0)
    block, emb = Block(channels_in, channels, 128, modes), torch.zeros(4, 128)
    smooth = torch.cat([waves(32, 3, channels_in, seed) for seed in range(4)])
    same = channels_in == channels
    for x in (smooth, torch.randn(4, channels_in, 32, 32)):
        expected = x.var().item() if same else block.skip(x).var().item()
        assert block(x, emb).var().item() == pytest.approx(expected, rel=0.2 if same else 0.3)
    assert isinstance(block.conv1, SpectralConv) == (modes > 0)
    alone = make_conv(channels_in, channels, modes)
    assert alone(smooth).var().item() == pytest.approx(smooth.var().item(), rel=0.2)


@pytest.mark.parametrize("size, n", [(32, 64), (64, 32), (32, 48), (16, 12)])
def test_resizing_is_exact_for_what_both_grids_can_hold(size, n):
    torch.testing.assert_close(resize(waves(size, 4), n), waves(n, 4), rtol=0, atol=1e-4)


def test_resizing_leaves_out_what_the_coarser_grid_cannot_hold():
    x = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    for k, there in [(6, True), (15, True), (16, False), (31, False)]:
        wave = torch.cos(math.pi * k * x).float().expand(1, 1, 32, 32)
        resized = resize(wave, 16)
        assert resized.abs().max().item() == pytest.approx(1 if there else 0, abs=0.05)
    same = waves(16, 4)
    assert resize(same, 16) is same


def test_preparing_to_compile_changes_no_number(monkeypatch):
    x, conv = waves(32, 4), SpectralConv(1, 2, 8)
    before = resize(x, 24), conv(x)
    monkeypatch.setattr(grids, "cached", grids.cached)  # restored afterwards
    grids.prepare_to_compile()
    assert torch.equal(resize(x, 24), before[0]) and torch.equal(conv(x), before[1])


# -- the network -----------------------------------------------------------------------------------


@conditionings
def test_context_time_and_place_reach_the_network(conditioning):
    net, t = small_unet(conditioning=conditioning), torch.tensor([0.4])
    x, seen = waves(32, 5), seen_by(small_unet(conditioning=conditioning))
    before = net(x, t, seen)
    changed = seen.clone()
    changed[0, 1, 7, 20] += 5
    assert (net(x, t, changed) - before).abs().max() > 1e-3
    assert (net(x, t + 0.5, seen) - before).abs().max() > 1e-3
    turned = net(x.flip(-1), t, seen.flip(-1)).flip(-1)
    assert (turned - before).abs().max() > 1e-3


@conditionings
@pytest.mark.parametrize("channels, n", [(1, 32), (3, 30)])
def test_unet_shapes_and_gradients(conditioning, channels, n):
    """Also of sizes that cannot be halved twice."""
    net = small_unet(channels, conditioning, n)
    out = net(torch.randn(2, channels, n, n), torch.tensor([0.1, 0.9]), seen_by(net, 2, channels))
    assert out.shape == (2, channels, n, n)
    out.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("spectral", [0, 1, 2, 3, 9])
def test_the_coarsest_levels_are_spectral(spectral):
    """Of 3 levels with 2 layers each, on the way up again; sides of the modes 16, 8 and 4."""
    net = small_unet(spectral=spectral)
    sides = sorted(m.weight.shape[-1] for m in net.modules() if isinstance(m, SpectralConv))
    assert sides == [4] * 2 * (spectral > 0) + [8] * 4 * (spectral > 1) + [16] * 4 * (spectral > 2)


def test_it_starts_as_nothing():
    torch.manual_seed(0)
    net = FnoUnet(1, (1, 16, 16), make_config(sparse_ddo))
    out = net(torch.randn(2, 1, 16, 16), torch.tensor([0.0, 1.0]), seen_by(net, 2, n=16))
    assert (out == 0).all()
