"""The FNO U-Net: spectral layers against FFT, and the same function whatever the grid."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import away_from_zero, make_config

import sparse_ddo
from fused_ddpm import fno
from fused_ddpm.fno import Block, FnoUnet, SpectralConv, places_in_shells, resize
from fused_ddpm.masks import make_masks

conditionings = pytest.mark.parametrize("conditioning", ["encoder", "concat"])


def small_unet(channels=1, conditioning="encoder"):
    torch.manual_seed(0)
    changes = dict(dim=16, dim_mults=[1, 2, 3], modes=16, conditioning=conditioning)
    return away_from_zero(FnoUnet(channels, make_config(sparse_ddo, **changes))).eval()


def waves(n, highest, channels=1, seed=0):
    """A periodic function of Fourier modes up to `highest`, variance about 1: (1, C, n, n).

    At n x n pixel centres; the same function for any n.
    """
    g = torch.Generator().manual_seed(seed)
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    f = torch.zeros(1, channels, n, n, dtype=torch.float64)
    for k in range(-highest, highest + 1):
        for m in range(-highest, highest + 1):
            a, b = torch.randn(2, 1, channels, 1, 1, generator=g, dtype=torch.float64)
            angle = 2 * math.pi * (k * x[:, None] + m * x)
            f += a * angle.cos() + b * angle.sin()
    return (f / (2 * highest + 1)).float()


# -- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [32, 30, 8])
def test_spectral_convolution_against_fft(n):
    torch.manual_seed(0)
    conv = SpectralConv(3, 5, 8)
    x = torch.randn(2, 3, n, n)
    f = torch.fft.fft2(x.double())
    # Rows -4..3, columns 0..3; the other half follows, as the image is real.
    weight = torch.view_as_complex(conv.weight.detach()).to(torch.complex128).view(8, 4, 3, 5)
    kept = torch.zeros(2, 5, n, n, dtype=torch.complex128)
    for row in range(-4, 4):
        for column in range(4):
            mode = f[:, :, row, column] @ weight[row + 4, column]
            kept[:, :, row, column] += mode * (2 if column else 1)
    # The real part of a mode is the mean of itself and its mirror image. The half pixel turns into
    # and out of the transform cancel.
    expected = torch.fft.ifft2(kept).real + conv.point(x).double()
    torch.testing.assert_close(conv(x).double(), expected, rtol=0, atol=1e-4)


def test_spectral_convolution_against_a_real_fft():
    torch.manual_seed(0)
    conv = SpectralConv(3, 5, 8)
    x = torch.randn(2, 3, 32, 32)
    f = torch.fft.rfft2(x.double())
    weight = torch.view_as_complex(conv.weight.detach()).to(torch.complex128).view(8, 4, 3, 5)
    out = torch.zeros(2, 5, 32, 17, dtype=torch.complex128)
    for row in range(-4, 4):
        for column in range(4):
            out[:, :, row, column] = f[:, :, row, column] @ weight[row + 4, column]
    expected = torch.fft.irfft2(out) + conv.point(x).double()
    torch.testing.assert_close(conv(x).double(), expected, rtol=0, atol=1e-4)


def test_bfloat16_does_not_reach_the_transforms():
    torch.manual_seed(0)
    conv, x = SpectralConv(3, 5, 8), waves(32, 3, 3)
    plain = conv(x) - conv.point(x)
    with torch.autocast("cpu", torch.bfloat16):
        spectral = conv(x) - conv.point(x)
        resized = resize(x, 24)
    torch.testing.assert_close(spectral.float(), plain, rtol=0, atol=1e-5)
    assert resized.dtype == torch.float32 and torch.equal(resized, resize(x, 24))


@pytest.mark.parametrize("channels_in, channels", [(32, 32), (64, 32)])
def test_block_keeps_the_variance(channels_in, channels):
    torch.manual_seed(0)
    block, emb = Block(channels_in, channels, 128, 16), torch.zeros(4, 128)
    smooth = torch.cat([waves(32, 3, channels_in, seed) for seed in range(4)])
    same = channels_in == channels
    for x in (smooth, torch.randn(4, channels_in, 32, 32)):
        expected = x.var().item() if same else block.skip(x).var().item()
        assert block(x, emb).var().item() == pytest.approx(expected, rel=0.2 if same else 0.3)
    conv = SpectralConv(channels_in, channels, 16)
    assert conv(smooth).var().item() == pytest.approx(smooth.var().item(), rel=0.2)


@pytest.mark.parametrize("size, n", [(32, 64), (64, 32), (32, 48), (16, 12)])
def test_resizing_is_exact_for_what_both_grids_can_hold(size, n):
    torch.testing.assert_close(resize(waves(size, 4), n), waves(n, 4), rtol=0, atol=1e-4)


def test_resizing_leaves_out_what_the_coarser_grid_cannot_hold():
    x = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    for k, there in [(3, True), (7, True), (9, False), (15, False)]:
        wave = torch.cos(2 * math.pi * k * x).float().expand(1, 1, 32, 32)
        resized = resize(wave, 16)
        assert resized.abs().max().item() == pytest.approx(1 if there else 0, abs=0.05)
    same = waves(16, 4)
    assert resize(same, 16) is same


def test_modes_are_listed_from_the_lowest_on():
    places = places_in_shells(5, 3, "cpu")
    assert places.shape == (3, 5, 5) and places.flatten().sort().values.tolist() == list(range(75))
    for n in (1, 2, 4):  # a coarser grid has the beginning of the list
        assert torch.equal(places_in_shells(n, 3, "cpu"), places[:, :n, :n])
    assert places[:, 0, 0].tolist() == [0, 1, 2]
    shell = torch.maximum(*torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    assert ((places >= 3 * shell**2) & (places < 3 * (shell + 1) ** 2)).all()


def test_preparing_to_compile_changes_no_number(monkeypatch):
    x, conv = waves(32, 4), SpectralConv(1, 2, 8)
    before = resize(x, 24), conv(x)
    monkeypatch.setattr(fno, "cached", fno.cached)  # restored afterwards
    fno.prepare_to_compile()
    assert torch.equal(resize(x, 24), before[0]) and torch.equal(conv(x), before[1])


# -- the network -----------------------------------------------------------------------------------


@conditionings
@pytest.mark.parametrize("n", [48, 64])
def test_the_same_function_on_another_grid(conditioning, n):
    net, t = small_unet(conditioning=conditioning), torch.tensor([0.4])
    cond = torch.zeros(1, 1, 32, 32)
    coarse, fine = (net(waves(m, 2), t, cond, cond > 0) for m in (32, n))
    assert coarse.std() > 0.05
    torch.testing.assert_close(resize(fine, 32), coarse, rtol=0, atol=1e-3)


@conditionings
def test_context_reaches_the_network(conditioning):
    net, config = small_unet(conditioning=conditioning), make_config(sparse_ddo)
    cond_mask, _ = make_masks(torch.arange(1), 0, 32, config)
    g = torch.Generator().manual_seed(0)
    cond = torch.rand(1, 1, 32, 32, generator=g) * cond_mask
    z, t = torch.randn(1, 1, 32, 32, generator=g), torch.tensor([0.7])
    before = net(z, t, cond, cond_mask)
    row, column = cond_mask[0, 0].nonzero()[5].tolist()
    changed = cond.clone()
    changed[0, 0, row, column] += 0.5
    assert (net(z, t, changed, cond_mask) - before).abs().max() > 1e-3
    assert (net(z, t, cond, cond_mask & False) - before).abs().max() > 1e-3


def test_time_and_place_reach_the_network():
    net, cond = small_unet(), torch.zeros(1, 1, 32, 32)
    outs = [net(waves(32, 2), torch.tensor([t]), cond, cond > 0) for t in (0.0, 0.5, 1.0)]
    assert (outs[0] - outs[1]).abs().max() > 1e-3 and (outs[1] - outs[2]).abs().max() > 1e-3
    moved = net(waves(32, 2).roll(5, -1), torch.tensor([0.0]), cond, cond > 0)
    assert (moved - outs[0].roll(5, -1)).abs().max() > 1e-3


@conditionings
@pytest.mark.parametrize("channels", [1, 3])
def test_unet_shapes_and_gradients(conditioning, channels):
    net = small_unet(channels, conditioning)
    cond = torch.randn(2, channels, 32, 32)
    z, t = torch.randn(2, channels, 48, 48), torch.tensor([0.1, 0.9])
    out = net(z, t, cond, cond[:, :1] > 0)
    assert out.shape == (2, channels, 48, 48)
    out.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_it_starts_as_nothing():
    torch.manual_seed(0)
    net, cond = FnoUnet(1, make_config(sparse_ddo)), torch.zeros(2, 1, 16, 16)
    assert (net(torch.randn(2, 1, 16, 16), torch.tensor([0.0, 1.0]), cond, cond > 0) == 0).all()


def test_the_encoder_is_periodic():
    net, cond = small_unet(), torch.randn(1, 2, 32, 32)
    moved = net.encoder(cond.roll((3, 7), (2, 3)))
    torch.testing.assert_close(moved, net.encoder(cond).roll((3, 7), (2, 3)), rtol=0, atol=1e-5)
    assert F.mse_loss(moved, net.encoder(cond)) > 1e-3
