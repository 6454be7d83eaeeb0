"""toy_diffusion.py: corruption, the loss, the samplers, a run, messages."""

import os

import toy_diffusion as script
from fused_ddpm.files import occupy

import numpy as np
import pytest
import torch
from helpers import exits_with, load, read_json

TINY = """--data shapes --device cpu --image-size 16 --widths 8 16 16 --steps 100 --batch-size 16
--num-samples 10 --lr 5e-3""".split()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_corruption_goes_from_image_to_noise():
    x, noise = randn(3, 1, 8, 8), randn(3, 1, 8, 8, seed=1)
    spoilt = script.corrupt(x, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(spoilt[0], x[0]) and torch.equal(spoilt[2], noise[2])
    torch.testing.assert_close(spoilt[1], 0.75 * x[1] + 0.25 * noise[1])


def test_loss_is_the_squared_distance_to_the_clean_image():
    x, noise, amount = randn(3, 1, 8, 8), randn(3, 1, 8, 8, seed=1), torch.tensor([0.2, 0.5, 1.0])
    assert script.training_loss(lambda spoilt: x, x, noise, amount) == 0
    off = script.training_loss(lambda spoilt: x + 0.5, x, noise, amount)
    assert off.item() == pytest.approx(0.25)
    seen = script.training_loss(lambda spoilt: spoilt, x, noise, amount).item()
    direct = (amount.view(-1, 1, 1, 1) * (noise - x)).square().mean().item()
    assert seen == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_sampler_takes_equal_steps_to_a_constant_prediction(n):
    noise, target = randn(2, 1, 8, 8), randn(2, 1, 8, 8, seed=1).sigmoid()
    x, seen, predicted = script.sample(lambda x: target, noise, "move", n)
    torch.testing.assert_close(x, target)
    assert len(seen) == len(predicted) == n
    for i in range(n):  # what is seen before step i is spoilt by 1 - i / n, as in training
        expected = script.corrupt(target, noise, torch.full((2,), 1 - i / n))
        torch.testing.assert_close(seen[i], expected)


@pytest.mark.parametrize("n, expected", [(5, 0.114), (20, 0.176), (500, 0.2)])
def test_moves_in_small_steps_return_gaussian_data(n, expected):
    """And in five, something smoother: as the docstring says."""
    mean, std = 0.3, 0.2

    def best(x):  # E[x_0 | x_a] where a is known from the step: least squares for N(mean, std^2)
        a = 1 - len(calls) / n
        calls.append(1)
        gain = (1 - a) * std**2 / ((1 - a) ** 2 * std**2 + a**2)
        return mean + gain * (x - (1 - a) * mean)

    calls = []
    x, _, _ = script.sample(best, randn(1, 1, 400, 400), "move", n)
    centre, variance = 0.0, 1.0  # each step is linear
    for i in range(n):
        a = 1 - i / n
        gain = (1 - a) * std**2 / ((1 - a) ** 2 * std**2 + a**2)
        slope = 1 + (gain - 1) / (n - i)
        centre = slope * centre + mean * (1 - gain * (1 - a)) / (n - i)
        variance *= slope**2
    assert centre == pytest.approx(mean)
    assert x.mean().item() == pytest.approx(mean, abs=5 * std / 400)
    assert x.std().item() == pytest.approx(variance**0.5, rel=0.02)
    assert variance**0.5 == pytest.approx(expected, abs=0.0015)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_renoising_shows_the_network_what_it_was_trained_on(n):
    """A perfect network sees its own answer, spoilt by 1 - i / n with noise new in each step."""
    torch.manual_seed(0)
    target = torch.full((2, 1, 64, 64), 0.5)
    x, seen, _ = script.sample(lambda x: target, torch.randn(target.shape), "renoise", n)
    assert torch.equal(x, target) and len(seen) == n
    for i, s in enumerate(seen):
        a = 1 - i / n
        assert s.mean().item() == pytest.approx((1 - a) * 0.5, abs=5 * a / 90)
        assert s.std().item() == pytest.approx(a, rel=0.05)
    noise = [(s - s.mean()).flatten() / s.std() for s in seen]
    assert all((noise[i] * noise[i + 1]).mean().abs() < 5 / 90 for i in range(n - 1))


def test_a_run_learns_and_writes_everything(tmp_path, capsys):
    torch.set_num_threads(1)  # two would wait for each other where a core is all there is
    flags = [*TINY, "--out-dir", str(tmp_path / "run")]
    script.main(flags)
    pictures = {"loss.png", "corruption.png", "predictions.png", "steps.png", "samples.png"}
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == pictures | {"last.pt", "config.json", "history.json", "samples.npy"}
    history = read_json(tmp_path / "run/history.json")
    assert history["steps"] == [50, 100] and history["test_loss"][1] < history["test_loss"][0] < 1
    assert len(history["train_loss"]) == 2
    samples = np.load(tmp_path / "run/samples.npy")
    assert samples.shape == (10, 16, 16, 3) and samples.dtype == np.uint8 and samples.std() > 5
    model = script.Unet(3, [8, 16, 16])
    model.load_state_dict(load(tmp_path / "run/last.pt")["model"])
    assert "holds a run already" in exits_with(2, capsys, lambda: script.main(flags))


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--steps 0", 2, "argument --steps: must lie in [1, 10000000], got 0"),
        ("--lr nan", 2, "argument --lr: must lie in (0, 1], got nan"),
        ("--lr 0", 2, "argument --lr: must lie in (0, 1], got 0"),
        ("--sampler guess", 2, "argument --sampler: invalid choice: 'guess'"),
        ("--image-size 30", 2, "--image-size 30: with 4 widths, a multiple of 8"),
        ("--widths", 2, "--image-size 32: with 0 widths"),
        ("--device cuda:99", 1, "--device cuda:99: "),
        ("--device meta", 1, "--device meta: "),
        ("--data=", 2, "argument --data: must not be empty"),
        ("--data nowhere", 1, "--data nowhere: neither a data set"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, code, message):
    call = lambda: script.main([*flags.split(), "--out-dir", str(tmp_path / "run")])
    assert message in exits_with(code, capsys, call)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; a smaller"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_fails_in_training_fails_in_one_line(tmp_path, capsys, monkeypatch, error, message):
    def fail(*args):
        raise error

    monkeypatch.setattr(script, "train", fail)
    call = lambda: script.main([*TINY, "--out-dir", str(tmp_path)])
    assert message in exits_with(1, capsys, call)


def test_a_folder_in_use_is_found_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "train", lambda *args: pytest.fail("trained"))
    held = occupy(tmp_path)
    call = lambda: script.main([*TINY, "--out-dir", str(tmp_path)])
    assert "another process is at work in it" in exits_with(1, capsys, call)
    os.close(held)
    assert not any(tmp_path.iterdir())
