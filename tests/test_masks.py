"""Masks: exact in their counts, a function of key and epoch alone, fair to every pixel."""

import math
from types import SimpleNamespace

import pytest
import torch

from fused_ddpm.masks import PATTERNS, TEST_INDEX, check_masks, make_masks, mask_counts

patterns = pytest.mark.parametrize("pattern", list(PATTERNS))


def settings(pattern="random", sparsity=0.2, target=None, size=32):
    return SimpleNamespace(
        mask_pattern=pattern, sparsity=sparsity, target_sparsity=target, image_size=size
    )


@patterns
@pytest.mark.parametrize("sparsity, target", [(0.2, 0.2), (0.1, 0.4), (0.5, 0.5), (0.003, 0.7)])
@pytest.mark.parametrize("size", [32, 15])
def test_masks_are_exact_and_disjoint(pattern, sparsity, target, size):
    config = settings(pattern, sparsity, target, size)
    cond_mask, target_mask = make_masks(torch.arange(50), 3, size, config)
    assert cond_mask.shape == target_mask.shape == (50, 1, size, size)
    assert cond_mask.dtype == target_mask.dtype == torch.bool
    n, seen = size**2, round(sparsity * size**2)
    assert (cond_mask.sum((1, 2, 3)) == seen).all()
    assert (target_mask.sum((1, 2, 3)) == min(round(target * n), n - seen)).all()
    assert not (cond_mask & target_mask).any()


@patterns
def test_masks_depend_on_key_and_epoch_alone(pattern):
    config, keys = settings(pattern), (5 << 32) + torch.arange(40)

    def masks(keys, epoch=5):
        return torch.stack(make_masks(keys, epoch, 32, config))

    whole = masks(keys)
    assert torch.equal(whole, masks(keys))
    assert torch.equal(whole[:, 7:9], masks(keys[7:9]))
    assert torch.equal(whole[:, [9, 7]], masks(keys[[9, 7]]))
    one_of_two = make_masks(keys, 5, 32, settings(pattern, target=0.2))  # None means the same
    assert torch.equal(whole, torch.stack(one_of_two))
    for other in (masks(keys, 6), masks(keys + 40), masks(keys + (1 << 32))):
        same = (whole == other).all(dim=(2, 3, 4))
        assert same.float().mean() < 0.3  # grid has five phases, so some coincide


def test_random_masks_cover_all_pixels_alike():
    masks = make_masks(torch.arange(4000), 0, 32, settings())
    for mask in masks:
        rate = mask.float().mean(0)
        error = math.sqrt(0.2 * 0.8 / 4000)
        assert (rate - 0.2).abs().max() < 5 * error and abs(rate.std() - error) < 0.1 * error


@patterns
@pytest.mark.parametrize("sparsity", [0.05, 0.2])
def test_every_pixel_beside_the_seen_ones_is_a_target_now_and_then(pattern, sparsity):
    config = settings(pattern, sparsity)
    cond_mask, target_mask = make_masks(torch.arange(2000), 0, 32, config)
    expected = sparsity / (1 - sparsity)
    for offset in [(0, 1), (1, 1), (2, 0), (0, 3), (5, 4)]:  # from a seen pixel
        there = cond_mask.roll(offset, (2, 3)) & ~cond_mask
        rate = (target_mask & there).sum() / there.sum()
        # Walks favour what is near, no pattern leaves a place out.
        assert rate > 0.1 * expected, offset


def test_patterns_look_as_they_are_called():
    neighbours = {}
    for pattern in PATTERNS:
        cond_mask, _ = make_masks(torch.arange(64), 0, 32, settings(pattern))
        right = (cond_mask[..., :-1] & cond_mask[..., 1:]).sum().item()
        below = (cond_mask[:, :, :-1] & cond_mask[:, :, 1:]).sum().item()
        neighbours[pattern] = (right + below) / cond_mask.sum().item()
    assert neighbours["grid"] < 1 / 205  # 205 pixels, but the lattice has 204 or 205
    assert neighbours["random"] == pytest.approx(2 * 0.2 * 31 / 32, rel=0.1)
    assert neighbours["block"] > 1.4  # 1.5 inside a 4x4 block
    assert neighbours["walk"] > 0.9  # a path of n pixels has at least n - 1 neighbours


@patterns
def test_test_images_have_masks_of_their_own(pattern):
    config, index = settings(pattern, 0.1), torch.arange(30)
    train, held_out = (make_masks(index + i, 0, 32, config)[1] for i in (0, TEST_INDEX))
    assert (train == held_out).all(dim=(1, 2, 3)).float().mean() < 0.3


@pytest.mark.parametrize(
    "sparsity, target, size, expected",
    [
        (0.2, None, 32, (1024, 205, 205)),
        (0.3, 0.7, 15, (225, 68, 157)),  # 67.5 and 157.5: both up would be a pixel too many
        (0.5, None, 3, (9, 4, 4)),
        (0.1, 0.4, 10, (100, 10, 40)),
    ],
)
def test_counts(sparsity, target, size, expected):
    assert mask_counts(size, settings(sparsity=sparsity, target=target)) == expected


@pytest.mark.parametrize(
    "sparsity, target, message",
    [
        (0.2, None, None),
        (0.5, 0.5, None),
        (0.3, 0.7, None),
        (
            *(0.6, None),
            "--sparsity 0.6 and --target-sparsity 0.6: "
            "the masks are disjoint, so their sum must not exceed 1",
        ),
        (
            *(0.001, None),
            "--sparsity 0.001: that is 0 pixels to see and 0 to score of the 256 there are",
        ),
        (
            *(0.5, 0.001),
            "--sparsity 0.5: that is 128 pixels to see and 0 to score of the 256 there are",
        ),
    ],
)
def test_masks_that_cannot_be_are_named(sparsity, target, message):
    config = settings(sparsity=sparsity, target=target, size=16)
    found = [message for wrong, message in check_masks(config) if wrong]
    assert found == ([message] if message else [])
