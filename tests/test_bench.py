"""bench.py: what it compares with fills in, and its scores are what they are called."""

import math
from types import SimpleNamespace

import bench
import ddpm
from fused_ddpm import features, images, metrics

import pytest
import torch


def smooth_images():
    """Two waves in three channels, in [0, 1], and masks that show 30% of them."""
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    waves = [torch.sin(row / 6 + k) * torch.cos(column / 5 - k) for k in range(6)]
    truth = (0.5 + 0.4 * torch.stack(waves)).view(2, 3, 24, 24)
    seen = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    return truth, seen


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(bench.WAYS))
def test_ways_of_libraries_fill_in_what_they_do_not_see(name, channels):
    _, way, _ = bench.WAYS[name]
    truth, seen = smooth_images()
    truth = truth[:, :channels]
    hidden = torch.where(seen, truth, 1 - truth)
    try:
        filled = bench.fill_singly(way, hidden, seen)
    except ImportError as missing:
        pytest.skip(str(missing))
    assert filled.shape == truth.shape and filled.dtype == truth.dtype
    assert torch.equal(torch.where(seen, filled, truth), truth)
    gain = -1 if "default" in name else 6  # which may be no more than the mean
    grey = metrics.psnr(torch.full_like(truth, 0.5), truth, ~seen)
    assert metrics.psnr(filled, truth, ~seen) > grey + gain


@pytest.mark.parametrize("name", ["scipy griddata, linear", "pykrige kriging, default"])
def test_a_constant_image_is_filled_with_its_constant(name):
    _, seen = smooth_images()
    truth = torch.full((2, 1, 24, 24), 0.3)
    try:
        filled = bench.fill_singly(bench.WAYS[name][1], truth, seen)
    except ImportError as missing:
        pytest.skip(str(missing))
    torch.testing.assert_close(filled, truth)


def test_crps_of_a_normal():
    """At the mean, far away, and against the integral of (F(x) - [x > y])^2."""
    mean, std, truth = (torch.tensor(k).double() for k in ([0.1, 0.2, 0.3], [0.5, 1e-3, 0.2], 0.25))
    x = torch.linspace(-6, 6, 600_001, dtype=torch.float64)
    for m, s in zip(mean, std, strict=True):
        below = torch.special.ndtr((x - m) / s)
        expected = torch.trapezoid((below - (x > truth).double()) ** 2, x).item()
        score = bench.normal_crps(m.view(1), s.view(1), truth.view(1), torch.ones(1).bool())
        assert score == pytest.approx(expected, abs=2e-5)
    at_mean = bench.normal_crps(mean, std, mean, torch.ones(3).bool())
    expected = std.mean().item() * (math.sqrt(2) - 1) / math.sqrt(math.pi)
    assert at_mean == pytest.approx(expected, rel=1e-9)


def test_no_spread_scores_the_distance():
    one = torch.ones(1, dtype=torch.float64)
    score = bench.normal_crps(0 * one, 0 * one, 0.7 * one, one.bool())
    assert score == pytest.approx(0.7, abs=1e-5)


def test_the_share_outside_the_network(monkeypatch):
    """Of a step without, of all with what happens once: on a clock that only the parts move."""
    now = [0.0]
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def take(seconds):
        now[0] += seconds

    def make_sampler(model, shape, config):
        def sample():
            take(3)  # before all steps
            for step in range(4):
                script.predict()
                take(0.05)
                take(1 if step == 3 else 0)  # after them
                yield

        return sample

    run = SimpleNamespace(prepare=lambda run, model: None)
    script = SimpleNamespace(make_sampler=make_sampler, Run=run, predict=lambda: take(0.9))
    clock = bench.Clock("cpu")
    bench.watch_sampler(script, clock)
    clock.watch(script, "predict")
    for _ in range(2):
        for _ in script.make_sampler(None, None, None)():
            take(0.05)  # a caller's part of a step
    steps = [(done[0], done[-2]) for done in clock.steps]
    assert bench.outside(clock, steps) == pytest.approx(0.1)
    starts, seconds = clock.starts["sample"], clock.seconds["sample"]
    whole = [(start, start + s) for start, s in zip(starts, seconds, strict=True)]
    assert bench.outside(clock, whole) == pytest.approx(1 - 3.6 / 8)
    assert bench.outside(clock, []) is None


@pytest.mark.parametrize("name", ["ddpm", *bench.PEERS])
def test_quality_of_minutes(name, tmp_path, monkeypatch):
    if name != "ddpm":
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 64, False: 32})
    monkeypatch.setattr(features, "STEPS", 2)
    monkeypatch.setattr(bench, "MINUTES", [0.002, 0.01])
    monkeypatch.setattr(bench, "NUM_QUALITY", 24)
    for changed in ("held_out_losses", "training_loss"):  # bench.py leaves its own in their place
        monkeypatch.setattr(ddpm, changed, getattr(ddpm, changed))
    job = {"name": name, "device": "cpu", "preset": "small", "batch": 8, "size": 16}
    job |= {"data": "shapes", "sampler": "ddim", "sample_steps": 2, "step": 0.05, "bf16": False}
    row = bench.run_quality(job | {"parameters": 100_000})
    assert len(row["distances"]) == len(row["seconds"]) == 2
    assert 0 < row["seconds"][0] < row["seconds"][1]
    assert all(0 < d < 1e4 for d in row["distances"])
