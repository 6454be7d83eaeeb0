"""Measures of reconstructions against direct sums and closed forms."""

import math
from types import SimpleNamespace

from fused_ddpm.fill import interpolate
from fused_ddpm.metrics import (
    Intervals,
    calibration,
    compare,
    crps,
    evaluate,
    psnr,
    rank_histogram,
    ssim,
    table,
    unseen,
)

import numpy as np
import pytest
import torch


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
    made |= {"regression": 0.9 * truth, "convolution": interpolate(truth, seen, 0.2)}
    metrics = evaluate(made)
    assert (metrics["num_images"], metrics["num_draws"]) == (3, 3)
    assert metrics["sparsity"] == pytest.approx(seen.float().mean().item())
    guesses = {"draw": draws[0], "mean": draws.mean(0)}
    guesses |= {name: made[name] for name in ("regression", "convolution")}
    for name, guess in guesses.items():
        for part, where in [(metrics, ~seen), (metrics["query"], target)]:
            assert part["psnr"][name] == psnr(guess, truth, where)
            assert part["ssim"][name] == ssim(guess, truth, where)
    assert metrics["psnr"].keys() == guesses.keys()
    assert metrics["psnr"]["mean"] != metrics["query"]["psnr"]["mean"]
    parts = {"psnr", "ssim", "query", "calibration", "foreground"}
    assert metrics.keys() == parts | {"num_images", "num_draws", "sparsity"}
    assert metrics["calibration"] == calibration(draws, truth, ~seen)
    bright = truth.amax(1, keepdim=True) > 0.03
    assert metrics["foreground"] == calibration(draws, truth, ~seen & bright)
    one = evaluate(made | {"draws": draws[:1]})  # has no spread
    assert one.keys() == metrics.keys() - {"calibration", "foreground"}


def test_only_where_there_is_a_truth():
    """Of incomplete images: nothing hangs on the values of what is missing."""
    made = found()
    there = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(2)) < 0.7
    made |= {"observed": there, "target_mask": made["target_mask"] & there}
    made["linear"] = 0.9 * made["truth"]
    where = ~made["cond_mask"] & there
    assert torch.equal(unseen(made), where) and 0 < where.float().mean() < 0.7
    assert torch.equal(unseen(found()), ~made["cond_mask"])
    metrics, intervals = evaluate(made), Intervals()
    assert metrics["psnr"]["mean"] == psnr(made["draws"].mean(0), made["truth"], where)
    assert metrics["psnr"]["linear"] == psnr(0.9 * made["truth"], made["truth"], where)
    assert metrics["calibration"] == calibration(made["draws"], made["truth"], where)
    intervals.fit(made, steps=3)
    other = made | {"truth": torch.where(there, made["truth"], 0.5)}
    again, also = evaluate(other), Intervals()
    also.fit(other, steps=3)
    assert again["psnr"]["mean"] == metrics["psnr"]["mean"]
    assert again["calibration"] == metrics["calibration"]
    assert torch.equal(also.log_spread, intervals.log_spread)
    assert torch.equal(also.log_factor, intervals.log_factor)


def test_compare_keeps_names_and_measures():
    truth, where, noisy = pictures()
    result = compare({"a": truth + 0.1, "b": noisy}, truth, where)
    assert result.keys() == {"psnr", "ssim"} and result["ssim"].keys() == {"a", "b"}
    assert result["psnr"]["a"] == pytest.approx(20, abs=1e-3)
    assert result["ssim"]["b"] == ssim(noisy, truth, where)


def test_the_table_shows_them_all():
    made = found()
    made |= {name: made["truth"] for name in ("regression", "gaussian", "linear", "convolution")}
    metrics = evaluate(made)
    called = {"draw": "one draw", "mean": "mean of 3", "regression": "regression"}
    called |= {"gaussian": "Gaussian", "linear": "first guess"}
    called |= {"convolution": "convolution"}
    for where, part in [("unseen", metrics), ("query", metrics["query"])]:
        first, *lines = table(metrics, where).splitlines()
        assert first == f"3 test images, {where} pixels only:"
        assert len(lines) == len(called) + (where == "unseen")
        for line, (name, title) in zip(lines, called.items(), strict=False):
            decibels, similarity = part["psnr"][name], part["ssim"][name]
            assert line.split() == [
                *title.split(), "PSNR", f"{decibels:.2f}", "dB", "SSIM", f"{similarity:.3f}"
            ]  # fmt: skip
    last, ratio = table(metrics).splitlines()[-1], metrics["calibration"]["spread_over_skill"]
    assert f"spread over skill {ratio:.2f}" in last and "should be 50.0%" in last


# -- calibration -----------------------------------------------------------------------------------


def exchangeable(k, n=64, scale=1.0, seed=0):
    """(draws, truth, everywhere): K draws and the truth from one distribution in each pixel.

    scale: what the draws' distance from its centre is multiplied with, to make them wrong.
    """
    g = torch.Generator().manual_seed(seed)
    centre, std = 0.02 + torch.rand(2, n, 1, 32, 32, generator=g)
    truth = centre + std * torch.randn(centre.shape, generator=g)
    draws = centre + scale * std * torch.randn(k, *centre.shape, generator=g)
    return draws, truth, torch.ones(n, 1, 32, 32, dtype=torch.bool)


def as_found(draws, truth, where):
    return {"draws": draws, "truth": truth, "cond_mask": ~where}


@pytest.mark.parametrize("k", [2, 8])
def test_draws_of_the_posterior_are_calibrated(k):
    c = calibration(*exchangeable(k))
    assert c["spread_over_skill"] == pytest.approx(1, abs=0.01)
    assert c["within_draws_expected"] == (k - 1) / (k + 1)
    assert c["within_draws"] == pytest.approx((k - 1) / (k + 1), abs=0.01)
    assert c["rank_histogram"] == pytest.approx([1 / (k + 1)] * (k + 1), abs=0.01)


def test_ranks_of_images_that_are_mostly_black():
    """Clipped and rounded as in a file, where a float draw would often be just above the truth."""
    draws, truth, where = exchangeable(8, n=8)
    draws, truth = ((x - 1.2).clamp(0, 1) for x in (draws, truth))
    truth = (255 * truth).round() / 255
    assert 0.4 < (truth == 0).float().mean() < 0.9
    ranks = rank_histogram(draws, truth, where)
    assert ranks == pytest.approx([1 / 9] * 9, abs=0.01)
    assert calibration(draws, truth, where)["within_draws"] == pytest.approx(7 / 9, abs=0.01)


def test_narrow_and_wide_draws_show():
    for scale, low in [(0.5, True), (2.0, False)]:
        c = calibration(*exchangeable(8, scale=scale))
        variance, error = (1 + 1 / 8) * scale**2, 1 + scale**2 / 8
        assert c["spread_over_skill"] == pytest.approx((variance / error) ** 0.5, rel=0.02)
        assert (c["within_draws"] < 0.7) == low
        ends, middle = c["rank_histogram"][0], c["rank_histogram"][4]
        assert (ends > 1.5 * middle) == low and (middle > 1.5 * ends) != low


def test_crps_against_pairs_and_is_least_for_the_truth():
    draws, truth, where = exchangeable(5, n=2)
    pairs = sum((x - y).abs() for x in draws for y in draws) / (2 * 5 * 4)
    direct = ((draws - truth).abs().mean(0) - pairs)[where].mean().item()
    assert crps(draws, truth, where) == pytest.approx(direct, rel=1e-4)
    scores = [crps(*exchangeable(8, scale=scale)) for scale in (0.7, 1.0, 1.4)]
    assert scores[1] < min(scores[0], scores[2])
    few, many = (crps(*exchangeable(k)) for k in (2, 16))  # fair: no matter how many
    assert few == pytest.approx(many, rel=0.02)


def test_ranks_split_ties_evenly():
    truth, where = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    draws = torch.tensor([0.0, 0.0, -1.0, 1.0]).view(4, 1, 1, 1, 1).expand(-1, 1, 1, 2, 2)
    assert rank_histogram(draws, truth, where) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_intervals_hold_on_images_they_were_not_fitted_on():
    intervals = Intervals()
    made = exchangeable(8, scale=0.6)  # too narrow by much
    intervals.fit(as_found(*made), steps=20)
    draws, truth, where = exchangeable(8, scale=0.6, seed=1)
    for level in (0.5, 0.9):
        assert intervals.coverage(draws, truth, where, level) == pytest.approx(level, abs=0.01)
    narrow = draws.std(0) < draws.std(0).median()  # and for small spreads as for large ones
    for part in (narrow, ~narrow):
        assert intervals.coverage(draws, truth, part) == pytest.approx(0.9, abs=0.03)
    config = SimpleNamespace(num_draws=8, sample_steps=20)
    assert intervals.fit_to(config)
    for other in (dict(num_draws=7), dict(sample_steps=21)):  # they hold for no other draws
        assert not intervals.fit_to(SimpleNamespace(**vars(config) | other))
    again = Intervals()
    again.load_state_dict(intervals.state_dict())
    assert torch.equal(again.half_width(draws), intervals.half_width(draws))


def test_intervals_hold_for_flat_and_for_busy_pixels():
    """Three quarters of the pixels are flat, with draws too wide, the others busy, too narrow."""
    def made(seed):
        flat, busy = exchangeable(8, scale=1.5, seed=seed), exchangeable(8, scale=0.5, seed=seed)
        where = flat[2] & (torch.rand(flat[1].shape[2:]) < 0.75)
        draws = torch.where(where, 0.01 * flat[0], busy[0])
        return draws, torch.where(where, 0.01 * flat[1], busy[1]), where

    torch.manual_seed(0)
    draws, truth, _ = made(0)
    intervals = Intervals()
    intervals.fit(as_found(draws, truth, torch.ones_like(truth[:, :1]).bool()), steps=20)
    draws, truth, where = made(1)
    for part in (where, ~where):
        assert intervals.coverage(draws, truth, part) == pytest.approx(0.9, abs=0.02)


def test_one_draw_teaches_intervals_nothing():
    intervals = Intervals()
    intervals.fit(as_found(*exchangeable(1, n=2)), steps=20)
    assert intervals.fitted_to.tolist() == [0, 0]
    assert torch.equal(intervals.log_factor, Intervals().log_factor)
