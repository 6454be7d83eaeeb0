"""Filling in without a network: the blur against its sum, what interpolation keeps."""

import math
from types import SimpleNamespace

from fused_ddpm.fill import (
    GaussianFill,
    baselines,
    gaussian_blur,
    interpolate,
    set_convolution,
)
from fused_ddpm.linear import LinearFill
from fused_ddpm.masks import make_masks
from fused_ddpm.metrics import psnr

import pytest
import torch


def mask_of(sparsity, n=2, size=32):
    config = SimpleNamespace(sparsity=[sparsity], target_sparsity=None, mask_pattern="random")
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


def test_density_is_one_on_average_and_highest_at_seen_pixels():
    seen = mask_of(0.2, 200)
    _, density = set_convolution(torch.zeros(200, 1, 32, 32), seen, 0.2)
    inside = density[:, :, 8:24, 8:24]
    assert inside.mean().item() == pytest.approx(1, abs=0.02)
    assert density[seen].mean() > 1.3 * density[~seen].mean()


# -- the Gaussian conditional mean -----------------------------------------------------------------


def test_gaussian_against_the_formula():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(32, 32, generator=g, dtype=torch.float64) / 6
    covariance, mean = root @ root.T, torch.randn(32, generator=g, dtype=torch.float64)
    x = torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64)
    seen = torch.rand(3, 1, 4, 4, generator=g) < 0.4
    filled, std = GaussianFill(mean, covariance).fill(x, seen)
    for i in range(3):
        o = seen[i].expand(2, -1, -1).flatten()
        u = ~o
        gain = covariance[u][:, o] @ covariance[o][:, o].inverse()
        row = x[i].flatten()
        torch.testing.assert_close(filled[i].flatten()[u], mean[u] + gain @ (row[o] - mean[o]))
        left = (covariance[u][:, u] - gain @ covariance[o][:, u]).diagonal()
        torch.testing.assert_close(std[i].flatten()[u] ** 2, left, rtol=1e-6, atol=1e-9)
        assert torch.equal(filled[i].flatten()[o], row[o]) and (std[i].flatten()[o] == 0).all()


def test_gaussian_takes_any_mask():
    x = torch.rand(2, 3, 4, 4)
    fill = GaussianFill(torch.full((48,), 0.25).double(), torch.eye(48).double())
    nothing, everything = torch.zeros(2, 1, 4, 4).bool(), torch.ones(2, 1, 4, 4).bool()
    filled, std = fill.fill(x, nothing)
    assert (filled == 0.25).all() and (std == 1).all()
    filled, std = fill.fill(x, everything)
    assert torch.equal(filled, x) and (std == 0).all()
    per_channel = torch.rand(2, 3, 4, 4) < 0.5
    filled, _ = fill.fill(x, per_channel)
    assert torch.equal(filled, torch.where(per_channel, x, 0.25))


def test_gaussian_is_fitted_in_batches(tmp_path):
    g = torch.Generator().manual_seed(0)
    images = (torch.rand(300, 2, 3, 3, generator=g) * 255).byte()
    rows = images.flatten(1).double() / 127.5 - 1
    for batch in (64, 1000):
        fitted = GaussianFill.fit(images, batch)
        torch.testing.assert_close(fitted.mean, rows.mean(0), rtol=0, atol=1e-6)
        expected = torch.cov(rows.T, correction=0) + 1e-5 * torch.eye(18).double()
        torch.testing.assert_close(fitted.covariance, expected, rtol=0, atol=1e-6)
    data = SimpleNamespace(images=images, name="noise", shape=(2, 3, 3))
    config = SimpleNamespace(sample=None, out_dir=str(tmp_path))
    first = GaussianFill.of(data, config)
    data.images = None  # the file is enough, also from elsewhere
    config.out_dir, config.sample = str(tmp_path / "new"), str(tmp_path / "last.pt")
    again = GaussianFill.of(data, config)
    assert torch.equal(first.mean, again.mean) and torch.equal(first.covariance, again.covariance)
    torch.testing.assert_close(again.covariance, fitted.covariance, rtol=1e-6, atol=1e-7)
    data.name, data.images = "other", 255 - images  # but it knows what it is of
    other = GaussianFill.of(data, config)
    torch.testing.assert_close(other.mean, -first.mean, rtol=0, atol=1e-6)
    data.name = "noise"
    assert torch.equal(GaussianFill.of(data, config).mean, first.mean)
    kept = tmp_path / "gaussian.npz"
    kept.write_bytes(kept.read_bytes()[:500])  # damaged: fitted anew
    data.images, config.out_dir, config.sample = images, str(tmp_path), None
    assert torch.equal(GaussianFill.of(data, config).mean, first.mean)


def test_gaussian_intervals_hold_for_gaussian_images():
    g = torch.Generator().manual_seed(0)
    x = gaussian_blur(torch.randn(2000, 1, 8, 8, generator=g, dtype=torch.float32), 1.0)
    images = ((x[:1500] + 1) * 127.5).round().clamp(0, 255).byte()
    test, seen = x[1500:], mask_of(0.3, 500, 8)
    filled, std = GaussianFill.fit(images).fill(test, seen)
    inside = ((filled - test).abs() < 1.6449 * std)[~seen].float().mean().item()
    assert inside == pytest.approx(0.9, abs=0.02)


def test_baselines_by_name(tmp_path):
    g = torch.Generator().manual_seed(0)
    truth, seen = torch.rand(3, 1, 8, 8, generator=g), mask_of(0.3, 3, 8)
    images = (255 * torch.rand(100, 1, 8, 8, generator=g)).byte()
    data = SimpleNamespace(images=images, name="noise", shape=(1, 8, 8))
    config = SimpleNamespace(baselines=True, sample=None, out_dir=str(tmp_path))
    found = {"truth": truth, "cond_mask": seen}
    made = baselines(found, data, config)
    assert set(made) == {"convolution", "gaussian", "gaussian_std"}
    for name in ("convolution", "gaussian"):
        torch.testing.assert_close(made[name][seen], truth[seen])
    # Pixels that have nothing to do with each other: the best guess is the mean, off by the std.
    assert made["gaussian_std"][~seen].mean().item() == pytest.approx(12**-0.5, rel=0.2)
    assert (made["gaussian"][~seen] - 0.5).abs().mean() < 0.2
    incomplete = found | {"observed": torch.rand(3, 1, 8, 8, generator=g) < 0.5}
    assert set(baselines(incomplete, data, config)) == {"convolution"}  # nothing to fit it to
    config.baselines, fill = False, LinearFill((1, 8, 8), 0.3)
    fill.mean += 0.5  # in [-1, 1]
    made = baselines(found, data, config, fill)
    assert set(made) == {"convolution", "linear"}
    torch.testing.assert_close(made["linear"], torch.where(seen, truth, 0.75))
