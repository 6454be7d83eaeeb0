"""toy_diffusion.py: corruption, the sampler, a run."""

import json

import numpy as np
import pytest
import torch

import toy_diffusion as script


def test_corruption_goes_from_image_to_noise():
    x, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    spoilt = script.corrupt(x, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(spoilt[0], x[0]) and torch.equal(spoilt[2], noise[2])
    torch.testing.assert_close(spoilt[1], 0.75 * x[1] + 0.25 * noise[1])


@pytest.mark.parametrize("n", [1, 5, 20])
def test_sampler_takes_equal_steps_to_a_constant_prediction(n):
    noise, target = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
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

    calls, noise = [], torch.randn(1, 1, 400, 400, generator=torch.Generator().manual_seed(0))
    x, _, _ = script.sample(best, noise, "move", n)
    centre, variance = 0.0, 1.0  # each step is linear
    for i in range(n):
        a = 1 - i / n
        gain = (1 - a) * std**2 / ((1 - a) ** 2 * std**2 + a**2)
        slope = 1 + (gain - 1) / (n - i)
        centre = slope * centre + mean * (1 - gain * (1 - a)) / (n - i)
        variance *= slope**2
    assert centre == pytest.approx(mean) and x.mean().item() == pytest.approx(mean, abs=5 * std / 400)
    assert x.std().item() == pytest.approx(variance**0.5, rel=0.02)
    assert variance**0.5 == pytest.approx(expected, abs=0.0015)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_renoising_shows_the_network_what_it_was_trained_on(n):
    """A perfect network sees its own answer, spoilt by 1 - i / n with noise that is new in each step."""
    target = torch.full((2, 1, 64, 64), 0.5)
    x, seen, _ = script.sample(lambda x: target, torch.randn(target.shape), "renoise", n)
    assert torch.equal(x, target)
    for i, s in enumerate(seen):
        a = 1 - i / n
        assert s.mean().item() == pytest.approx((1 - a) * 0.5, abs=5 * a / 90) and s.std().item() == pytest.approx(a, rel=0.05)
    noise = [(s - s.mean()).flatten() / s.std() for s in seen]
    assert all((noise[i] * noise[i + 1]).mean().abs() < 5 / 90 for i in range(n - 1))


def test_a_run_learns_and_writes_everything(tmp_path, capsys):
    flags = "--data shapes --image-size 16 --widths 8 16 16 --steps 100 --batch-size 16 --num-samples 10 --lr 5e-3".split()
    flags += ["--out-dir", str(tmp_path / "run")]
    script.main(flags)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "last.pt", "history.json", "loss.png", "corruption.png", "predictions.png", "steps.png", "samples.png", "samples.npy",
    }  # fmt: skip
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert history["steps"] == [50, 100] and history["test_loss"][1] < history["test_loss"][0] < 1
    samples = np.load(tmp_path / "run/samples.npy")
    assert samples.shape == (10, 16, 16, 3) and samples.dtype == np.uint8 and samples.std() > 5
    with pytest.raises(SystemExit) as error:
        script.main(flags)
    assert error.value.code == 2 and "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--steps 0", 2, "--steps 0: must be positive"),
        ("--lr nan", 2, "--lr nan: must be positive"),
        ("--image-size 30", 2, "--image-size 30: with 4 widths, a multiple of 8"),
        ("--device cuda:99", 2, "--device cuda:99: "),
        ("--data nowhere", 1, "--data nowhere: neither a data set"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, code, message):
    with pytest.raises(SystemExit) as error:
        script.main([*flags.split(), "--out-dir", str(tmp_path / "run")])
    shown = capsys.readouterr().err + str(error.value.code)
    assert message in shown and (error.value.code == 2) == (code == 2) and not (tmp_path / "run/last.pt").exists()
