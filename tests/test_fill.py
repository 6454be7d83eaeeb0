"""Filling in without a network: the blur against its sum, what interpolation keeps."""

import math
from types import SimpleNamespace

import pytest
import torch

from fused_ddpm.fill import gaussian_blur, interpolate
from fused_ddpm.masks import make_masks
from fused_ddpm.metrics import psnr


def mask_of(sparsity, n=2, size=32):
    config = SimpleNamespace(sparsity=sparsity, target_sparsity=None, mask_pattern="random")
    return make_masks(torch.arange(n), 0, size, config)[0]


@pytest.mark.parametrize("sigma", [0.7, 1.5, 2.0])
def test_the_blur_is_a_gaussian_cut_at_three_sigma(sigma):
    point = torch.zeros(1, 2, 31, 31)
    point[0, :, 15, 15] = torch.tensor([1.0, 2.0])
    blurred = gaussian_blur(point, sigma)
    axis = torch.arange(-15, 16, dtype=torch.float64)
    w = torch.exp(-0.5 * (axis / sigma) ** 2) * (axis.abs() <= math.ceil(3 * sigma))
    w /= w.sum()
    for channel, height in enumerate([1, 2]):
        expected = height * w[:, None] * w
        torch.testing.assert_close(blurred[0, channel].double(), expected, rtol=1e-5, atol=1e-8)
    assert blurred[0, 0].sum().item() == pytest.approx(1, abs=1e-5)


def test_the_blur_sees_zero_outside():
    blurred = gaussian_blur(torch.ones(1, 1, 20, 20), 1.0)
    assert blurred[0, 0, 10, 10].item() == pytest.approx(1, abs=1e-6)
    half = 0.5 * (1 + 0.39894 / 1.0)  # at an edge: half of the weights, and the middle one
    assert blurred[0, 0, 10, 0].item() == pytest.approx(half, abs=2e-3)
    assert blurred[0, 0, 0, 0].item() == pytest.approx(half**2, abs=2e-3)


def test_interpolation_keeps_a_constant_and_what_is_seen():
    truth = torch.full((2, 3, 32, 32), 0.7)
    filled = interpolate(truth, mask_of(0.01), 0.01)
    torch.testing.assert_close(filled, truth, rtol=1e-3, atol=1e-3)
    ramp, seen = torch.linspace(0, 1, 32).expand(2, 3, 32, 32), mask_of(0.2)
    result = interpolate(ramp, seen, 0.2)
    assert torch.equal(torch.where(seen, result, ramp), ramp) and psnr(result, ramp, ~seen) > 25


def test_interpolation_looks_at_nothing_unseen():
    truth, seen = torch.rand(2, 3, 32, 32), mask_of(0.1)
    other = torch.where(seen, truth, torch.rand_like(truth))
    assert torch.equal(interpolate(truth, seen, 0.1), interpolate(other, seen, 0.1))


def test_interpolation_is_a_weighted_mean_of_the_seen():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 16, 16, generator=g, dtype=torch.float32)
    seen = mask_of(0.2, 1, 16)
    result = interpolate(x, seen, 0.2)
    assert result.min() >= x[seen].min() - 1e-5 and result.max() <= x[seen].max() + 1e-5
    row, column = (~seen[0, 0]).nonzero()[40].tolist()
    weight = value = 0.0
    for widths, share in [(0.5, 1), (2, 1e-4), (8, 1e-8)]:
        sigma = widths / 0.2**0.5
        radius = math.ceil(3 * sigma)
        axis = torch.arange(-radius, radius + 1, dtype=torch.float64)
        norm = torch.exp(-0.5 * (axis / sigma) ** 2).sum().item() ** 2
        for i, j in seen[0, 0].nonzero().tolist():
            if max(abs(i - row), abs(j - column)) <= radius:
                distance2 = (i - row) ** 2 + (j - column) ** 2
                w = share * math.exp(-0.5 * distance2 / sigma**2) / norm
                weight, value = weight + w, value + w * x[0, 0, i, j].item()
    assert result[0, 0, row, column].item() == pytest.approx(value / weight, rel=1e-4)


def test_where_nothing_is_near_the_wider_ones_take_over():
    seen = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    seen[0, 0, 2, 2] = True
    x = torch.where(seen, 0.6, 9.0)
    near = interpolate(x, seen, 0.02)[0, 0, 20, 20]
    torch.testing.assert_close(near, torch.tensor(0.6), rtol=1e-3, atol=0)
