"""Measures of reconstructions against direct sums and closed forms."""

import math

import numpy as np
import pytest
import torch

from fused_ddpm.fill import interpolate
from fused_ddpm.metrics import compare, evaluate, psnr, ssim, table


def pictures():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 3, 16, 16, generator=g)
    where = torch.rand(3, 1, 16, 16, generator=g) < 0.6
    return truth, where, truth + 0.1 * torch.randn(truth.shape, generator=g)


def test_psnr_against_direct_sums():
    truth, where, noisy = pictures()
    squares, chosen = (noisy - truth) ** 2, where.expand(-1, 3, -1, -1)
    direct = [-10 * math.log10(squares[i][chosen[i]].mean()) for i in range(3)]
    assert psnr(noisy, truth, where) == pytest.approx(np.mean(direct), rel=1e-5)
    assert psnr(truth + 0.1, truth, where) == pytest.approx(20, abs=1e-3)
    assert psnr(torch.where(where, truth, 9.0), truth, where) == pytest.approx(100)


def test_ssim_against_the_definition():
    truth, where, noisy = pictures()
    assert ssim(truth, truth, where) == pytest.approx(1, abs=1e-5)
    # Constant images: the structure term is 1, the luminance term is left.
    a, b = torch.full_like(truth, 0.4), torch.full_like(truth, 0.6)
    luminance = (2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4)
    assert ssim(a, b, where) == pytest.approx(luminance, rel=1e-3)
    # One pixel far from the border, by the definition.
    axis = torch.arange(-5, 6, dtype=torch.float64)
    w = torch.exp(-(axis[:, None] ** 2 + axis**2) / 4.5)
    w /= w.sum()
    x, y = noisy[0, 0, 3:14, 3:14].double(), truth[0, 0, 3:14, 3:14].double()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
    covariance = (w * (x - mx) * (y - my)).sum()
    direct = (2 * mx * my + 1e-4) * (2 * covariance + 9e-4)
    direct /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    only = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    only[0, 0, 8, 8] = True
    found = ssim(noisy[:1, :1], truth[:1, :1], only)
    assert found == pytest.approx(direct.item(), abs=2e-4)


def found():
    truth, _, noisy = pictures()
    draws = torch.stack([noisy, truth + 0.05, truth - 0.02]).clamp(0, 1)
    score = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    seen, target = score < 0.2, (score > 0.3) & (score < 0.5)
    return dict(truth=truth, draws=draws, cond_mask=seen, target_mask=target)


def test_what_is_measured_where():
    made = found()
    truth, draws, seen, target = made.values()
    metrics = evaluate(made, 0.2)
    assert (metrics["num_images"], metrics["num_draws"], metrics["sparsity"]) == (3, 3, 0.2)
    guesses = {"draw": draws[0], "mean": draws.mean(0), "baseline": interpolate(truth, seen, 0.2)}
    for name, guess in guesses.items():
        for part, where in [(metrics, ~seen), (metrics["query"], target)]:
            assert part["psnr"][name] == psnr(guess, truth, where)
            assert part["ssim"][name] == ssim(guess, truth, where)
    assert metrics["psnr"]["mean"] != metrics["query"]["psnr"]["mean"]
    assert metrics.keys() == {"psnr", "ssim", "query", "num_images", "num_draws", "sparsity"}


def test_compare_keeps_names_and_measures():
    truth, where, noisy = pictures()
    result = compare({"a": truth + 0.1, "b": noisy}, truth, where)
    assert result.keys() == {"psnr", "ssim"} and result["ssim"].keys() == {"a", "b"}
    assert result["psnr"]["a"] == pytest.approx(20, abs=1e-3)
    assert result["ssim"]["b"] == ssim(noisy, truth, where)


def test_the_table_shows_them_all():
    metrics = evaluate(found(), 0.2)
    for where, part in [("unseen", metrics), ("query", metrics["query"])]:
        first, *lines = table(metrics, where).splitlines()
        assert first == f"3 test images, {where} pixels only:"
        called = {"draw": "one draw", "mean": "mean of 3", "baseline": "interpolation"}
        assert len(lines) == 3
        for line, (name, title) in zip(lines, called.items(), strict=True):
            decibels, similarity = part["psnr"][name], part["ssim"][name]
            assert line.split() == [
                *title.split(), "PSNR", f"{decibels:.2f}", "dB", "SSIM", f"{similarity:.3f}"
            ]  # fmt: skip
