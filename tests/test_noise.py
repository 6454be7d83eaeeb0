"""Philox against its published vectors; what is drawn with it against the distribution it names."""

import itertools

from fused_ddpm import noise, seeded_integers, seeded_uniform
from fused_ddpm.noise import normal_reference, random_words

import pytest
import torch

# Random123's kat_vectors
VECTORS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_philox_known_answers(counter, key, expected):
    words = noise.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert " ".join(f"{w.item():08x}" for w in words) == expected


def test_words_are_philox_of_key_place_step_and_stream():
    keys = torch.tensor([0, 0x299F31D0A4093822, -1])
    words = random_words(keys, 11, 5, 3)
    assert words.shape == (3, 11) and words.dtype == torch.int64
    for i, key in enumerate([(0, 0), (0xA4093822, 0x299F31D0), (0xFFFFFFFF, 0xFFFFFFFF)]):
        for group in range(3):
            counter = [torch.tensor(c) for c in (group, 0, 5, 3)]
            four = torch.stack(noise.philox(counter, [torch.tensor(k) for k in key]))
            assert torch.equal(words[i, 4 * group : 4 * group + 4], four[: 11 - 4 * group])
    assert torch.equal(words, random_words(keys, 11, torch.tensor(5), torch.tensor(3)))
    assert torch.equal(words[:, :4], random_words(keys, 4, 5, 3))  # a prefix, whatever n


def test_noise_is_standard_normal():
    z = normal_reference(torch.arange(64), 16384, 3, 0, torch.float64)
    n = z.numel()
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - expected) < 4.5 * (variance / n) ** 0.5
    # Kolmogorov-Smirnov: sqrt(n) D is above 2.0 once in 1500
    cdf = torch.special.ndtr(z.flatten().sort().values)
    assert n**0.5 * (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 2.0
    neighbours, pairs, images = (z[:, 1:], z[:, :-1]), (z[:, ::2], z[:, 1::2]), (z[1:], z[:-1])
    for a, b in (neighbours, pairs, images):
        assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5
    for step, stream in [(4, 0), (3, 1)]:
        other = normal_reference(torch.arange(64), 16384, step, stream, torch.float64)
        assert abs((z * other).mean()) < 4.5 / n**0.5


def test_the_largest_and_the_smallest_word_give_finite_noise(monkeypatch):
    extremes = torch.tensor([[0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0]])
    monkeypatch.setattr(noise, "random_words", lambda keys, n, step, stream: extremes)
    for dtype in (torch.float32, torch.float64):
        z = normal_reference(torch.zeros(1, dtype=torch.int64), 8, 0, 0, dtype)
        assert z.isfinite().all() and z.abs().max() < 7


def test_streams_differ():
    names = ["STEP_NOISE", "START_NOISE", "MASK_KEYS", "TRAIN_NOISE", "TIMESTEP", "MIRROR", "DROP"]
    streams = [getattr(noise, name) for name in names]
    assert len(set(streams)) == len(streams)
    keys = torch.arange(3)
    for a, b in itertools.combinations(streams, 2):
        words, others = random_words(keys, 64, 0, a), random_words(keys, 64, 0, b)
        assert not (words == others).any()


@pytest.mark.parametrize("n", [1, 2, 10, 50, 1000])
def test_integers_are_in_range_and_uniform(n):
    count = 100_000
    drawn = seeded_integers(torch.arange(count) + (7 << 33), n, noise.TIMESTEP)
    assert drawn.shape == (count,) and drawn.dtype == torch.int64
    found = drawn.bincount(minlength=n).double()
    assert len(found) == n  # none is n or above
    chi2 = ((found - count / n) ** 2 / (count / n)).sum().item()  # mean n - 1, variance 2 (n - 1)
    assert abs(chi2 - (n - 1)) <= 4.5 * (2 * (n - 1)) ** 0.5


def test_integers_of_the_widest_range():
    n = 2**31 - 1
    drawn = seeded_integers(torch.arange(10_000), n, 4)
    assert 0 <= drawn.min() < n / 1000 and n - n / 1000 < drawn.max() < n
    assert drawn.double().mean().item() / n == pytest.approx(0.5, abs=4.5 / (12 * 10_000) ** 0.5)


def test_uniform_numbers_are_uniform():
    n = 100_000
    u = seeded_uniform(torch.arange(n) - n // 2, noise.DROP)
    assert u.shape == (n,) and u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    ordered = u.double().sort().values
    assert n**0.5 * (ordered - (torch.arange(n) + 0.5) / n).abs().max() < 2.0
    a, b = u[1:] - 0.5, u[:-1] - 0.5  # neighbouring keys
    assert abs((a * b).mean()) < 4.5 / 12 / n**0.5
    assert not torch.equal(u, seeded_uniform(torch.arange(n) - n // 2, noise.MIRROR))


def test_a_key_draws_the_same_in_any_batch():
    keys = torch.randint(-(2**62), 2**62, (40,), generator=torch.Generator().manual_seed(0))
    for draw in (
        lambda k: seeded_integers(k, 1000, 4),
        lambda k: seeded_uniform(k, 4),
        lambda k: normal_reference(k, 10, 2, 1),
    ):
        whole = draw(keys)
        assert torch.equal(whole[7:9], draw(keys[7:9])) and torch.equal(whole[[3]], draw(keys[[3]]))
