"""Masks: exact in their counts, a function of key and epoch alone, fair to every pixel."""

import math
import zipfile
from dataclasses import dataclass, replace
from types import SimpleNamespace

from fused_ddpm.files import UserError
from fused_ddpm.masks import (
    PATTERNS,
    TEST_INDEX,
    as_tested,
    check_masks,
    hide,
    in_parts,
    make_masks,
    mask_counts,
)

import numpy as np
import pytest
import torch

patterns = pytest.mark.parametrize("pattern", list(PATTERNS))


@dataclass
class Settings:
    mask_pattern: str
    sparsity: list
    target_sparsity: float | None
    image_size: int
    test_sparsity: float | None = None
    test_pattern: str | None = None
    observed_only: float | None = None


def settings(pattern="random", sparsity=0.2, target=None, size=32):
    sparsity = sparsity if isinstance(sparsity, list) else [sparsity]
    return Settings(pattern, sparsity, target, size)


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
        (0.2, None, 32, (1024, 205, 205, 205)),
        (0.3, 0.7, 15, (225, 68, 68, 157)),  # 67.5 and 157.5: both up would be a pixel too many
        (0.5, None, 3, (9, 4, 4, 4)),
        ([0.1, 0.4], None, 10, (100, 10, 40, 40)),
        ([0.1, 0.5], 0.3, 10, (100, 10, 50, 30)),
        (0.1, 0.4, 10, (100, 10, 10, 40)),
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
        ([0.1, 0.4], None, None),
        ([0.4, 0.4], 0.6, None),
        (
            *([0.1, 0.7], None),
            "--sparsity 0.1 0.7 and --target-sparsity 0.7: "
            "the masks are disjoint, so their sum must not exceed 1",
        ),
        (
            *([0.4, 0.1], None),
            "--sparsity 0.4 0.1: is a fraction, or two, the smaller first, to draw it from",
        ),
        (
            *([0.1, 0.2, 0.3], None),
            "--sparsity 0.1 0.2 0.3: is a fraction, or two, the smaller first, to draw it from",
        ),
        (
            *([0.001, 0.2], None),
            "--sparsity 0.001 0.2: that is 0 pixels to see and 51 to score of the 256 there are",
        ),
    ],
)
def test_masks_that_cannot_be_are_named(sparsity, target, message):
    config = settings(sparsity=sparsity, target=target, size=16)
    found = [message for wrong, message in check_masks(config) if wrong]
    assert found == ([message] if message else [])


@pytest.mark.parametrize(
    "pattern, wrong",
    [("random,walk", []), ("learned", []), ("mine.npy,grid", []), ("stripes", ["stripes"]),
     ("random,a.txt,block,b", ["a.txt", "b"]), ("random,", [""])],
)  # fmt: skip
def test_patterns_that_are_none_are_named(pattern, wrong):
    found = [message for bad, message in check_masks(settings(pattern)) if bad]
    cure = "choose from random, block, grid, walk, learned, or a .npy file"
    assert found == [f"--mask-pattern {name}: {cure}" for name in wrong]
    if pattern != "learned":  # which test_pattern cannot be
        tested = replace(settings(), test_pattern=pattern)
        found = [message for bad, message in check_masks(tested) if bad]
        assert found == [f"--test-pattern {name}: {cure}" for name in wrong]


def test_learned_is_a_name_and_no_part_of_one():
    at_hand = replace(settings(), test_pattern="out/learned/mask.npy")
    assert not [message for bad, message in check_masks(at_hand) if bad]
    for pattern in ("learned", "random,learned"):
        found = [m for bad, m in check_masks(replace(settings(), test_pattern=pattern)) if bad]
        assert "--test-pattern learned: give the run's mask.npy" in found


@pytest.mark.parametrize("fraction, wrong", [(0.001, True), (0.004, True), (0.01, False)])
def test_of_what_is_observed_something_is_left_to_score(fraction, wrong):
    config = replace(settings(size=16), observed_only=fraction)
    said = f"--observed-only {fraction}: leaves less than two of the 256 pixels of an image"
    assert [message for bad, message in check_masks(config) if bad] == [said] * wrong


# -- what differs between images -------------------------------------------------------------------


@patterns
def test_a_range_of_fractions(pattern):
    """Evenly on a logarithmic scale, and no pixel outside it; as many are scored as are seen."""
    config = settings(pattern, [0.05, 0.4], size=16)
    cond_mask, target_mask = make_masks(torch.arange(3000), 2, 16, config)
    seen, scored = (mask.sum((1, 2, 3)) for mask in (cond_mask, target_mask))
    assert seen.min() == round(0.05 * 256) and seen.max() == round(0.4 * 256)
    assert len(seen.unique()) == 102 - 13 + 1  # each count now and then
    assert torch.equal(seen, scored) and not (cond_mask & target_mask).any()
    below = (seen.double() < 256 * (0.05 * 0.4) ** 0.5).double().mean().item()
    assert below == pytest.approx(0.5, abs=4.5 * 0.5 / 3000**0.5)
    again = make_masks(torch.arange(3000), 3, 16, config)[0].sum((1, 2, 3))
    assert (again == seen).double().mean() < 0.1  # another in each epoch
    part = make_masks(torch.arange(5, 9), 2, 16, config)[0]
    assert torch.equal(part, cond_mask[5:9])


def test_a_range_with_a_target_of_its_own():
    config = settings(sparsity=[0.1, 0.6], target=0.3, size=10)
    cond_mask, target_mask = make_masks(torch.arange(200), 0, 10, config)
    assert (target_mask.sum((1, 2, 3)) == 30).all() and not (cond_mask & target_mask).any()
    config = settings(sparsity=[0.2, 0.5], size=3)  # 2 to 4 of 9 pixels
    cond_mask, target_mask = make_masks(torch.arange(200), 0, 3, config)
    assert set(cond_mask.sum((1, 2, 3)).tolist()) == {2, 3, 4}
    assert torch.equal(cond_mask.sum((1, 2, 3)), target_mask.sum((1, 2, 3)))


def test_several_patterns_come_in_equal_shares():
    config, keys = settings("random,block,walk", size=16), torch.arange(3000)
    mixed = make_masks(keys, 1, 16, config)[0]
    shares = 0
    for pattern in ("random", "block", "walk"):
        alone = make_masks(keys, 1, 16, settings(pattern, size=16))[0]
        share = (mixed == alone).flatten(1).all(1).double().mean().item()
        assert share == pytest.approx(1 / 3, abs=4.5 * (2 / 9 / 3000) ** 0.5)
        shares += share
    assert shares == pytest.approx(1)
    other = make_masks(keys, 2, 16, config)[0]
    assert not (mixed == other).flatten(1).all(1).any()
    torch.testing.assert_close(make_masks(keys[7:9], 1, 16, config)[0], mixed[7:9])


def test_the_settings_of_test_images():
    """--test-sparsity and --test-pattern: training's where they are not given."""
    config = settings("walk", [0.1, 0.5], target=0.4)
    same = as_tested(config)
    assert same == config
    other = as_tested(replace(config, test_sparsity=0.8, test_pattern="grid"))
    assert (other.sparsity, other.mask_pattern) == ([0.8], "grid")
    assert other.target_sparsity == pytest.approx(0.2)
    assert not any(wrong for wrong, _ in check_masks(other))
    one = as_tested(replace(settings(sparsity=0.2), test_sparsity=0.3))
    assert mask_counts(32, one) == (1024, 307, 307, 307)


# -- of a file -------------------------------------------------------------------------------------


def test_a_file_of_the_pixels_to_see(tmp_path):
    """A mask: its pixels are seen, if there are as many as asked for; else some, or all of them."""
    mask = np.zeros((16, 16), bool)
    mask[2:6, 3:16] = True  # 52
    np.save(tmp_path / "mask.npy", mask)
    for sparsity in (52 / 256, 0.1, 0.3):
        config = settings(str(tmp_path / "mask.npy"), sparsity, size=16)
        cond_mask, target_mask = make_masks(torch.arange(9), 0, 16, config)
        count = round(sparsity * 256)
        assert (cond_mask.sum((1, 2, 3)) == count).all() and not (cond_mask & target_mask).any()
        assert (target_mask.sum((1, 2, 3)) == count).all()
        assert ((cond_mask[:, 0] & torch.from_numpy(mask)).sum((1, 2)) == min(count, 52)).all()
        assert torch.equal(cond_mask[0], cond_mask[5])


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
def test_a_file_of_an_order(tmp_path, dtype):
    order = np.random.default_rng(0).permutation(256).reshape(16, 16)
    values = order.astype(dtype) if dtype != np.float32 else -1e4 + 0.5 * order.astype(dtype)
    np.save(tmp_path / "order.npy", values)
    config = settings(str(tmp_path / "order.npy"), [0.1, 0.4], size=16)
    cond_mask, target_mask = make_masks(torch.arange(50), 0, 16, config)
    seen = cond_mask.sum((1, 2, 3))
    first = torch.from_numpy(order) < seen[:, None, None]
    assert torch.equal(cond_mask[:, 0], first) and len(seen.unique()) > 20
    both = torch.from_numpy(order) < 2 * seen[:, None, None]
    assert torch.equal((cond_mask | target_mask)[:, 0], both)


def test_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "order.npy"
    config = settings(str(path), size=16)

    def said():
        with pytest.raises(UserError) as error:
            make_masks(torch.arange(2), 0, 16, config)
        return str(error.value)

    assert said().startswith(f"--mask-pattern {path}: cannot be read (")
    path.write_bytes(b"none")
    assert said().startswith(f"--mask-pattern {path}: cannot be read (")
    np.save(path, np.array([{}]), allow_pickle=True)
    assert said().startswith(f"--mask-pattern {path}: cannot be read (")
    np.save(path, np.full((16, 16), "x"))
    assert said().startswith(f"--mask-pattern {path}: cannot be read (")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"none")
    assert said().startswith(f"--mask-pattern {path}: cannot be read (")
    np.save(path, np.zeros((16, 8)))
    assert said() == f"--mask-pattern {path}: is 16x8, the images are 16x16"
    np.save(path, np.zeros(256))
    assert said() == f"--mask-pattern {path}: is 256, the images are 16x16"


# -- of incomplete images --------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*PATTERNS, "random,block"])
@pytest.mark.parametrize("sparsity", [0.2, 0.9, [0.05, 0.4]])
def test_of_incomplete_images_all_is_seen_or_scored(pattern, sparsity):
    observed = torch.rand(300, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    observed = observed < torch.linspace(0.02, 1, 300).view(-1, 1, 1, 1)
    config, keys = settings(pattern, sparsity, size=16), torch.arange(300)
    cond_mask, target_mask = make_masks(keys, 0, 16, config, observed)
    assert not (cond_mask & target_mask).any()
    assert torch.equal(cond_mask | target_mask, observed)
    there, seen = observed.sum((1, 2, 3)), cond_mask.sum((1, 2, 3))
    assert (4 * seen <= 3 * there).all() and seen.min() >= 1
    _, least, most, _ = mask_counts(16, config)
    assert (seen >= torch.minimum(there * 3 // 4, torch.tensor(least))).all() and seen.max() <= most
    if least == most:
        assert torch.equal(seen, torch.minimum(there * 3 // 4, torch.tensor(least)))
    some = make_masks(keys[3:5], 0, 16, config, observed[3:5])
    assert torch.equal(torch.stack(some), torch.stack([cond_mask, target_mask])[:, 3:5])
    other, _ = make_masks(keys, 1, 16, config, observed)
    assert (other == cond_mask).flatten(1).all(1).double().mean() < 0.3


def test_of_next_to_nothing_no_more_than_that_is_seen():
    observed = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    observed[1, 0, 3, 4] = True
    observed[2, 0, 3, 4:6] = True
    for pattern in PATTERNS:
        config = settings(pattern, size=8)
        cond_mask, target_mask = make_masks(torch.arange(3), 0, 8, config, observed)
        assert torch.equal(cond_mask | target_mask, observed)
        assert cond_mask.sum((1, 2, 3)).tolist() == [0, 1, 1]


@pytest.mark.parametrize("size, fraction", [(16, 0.4), (15, 0.4), (8, 1.0), (32, 0.001)])
def test_what_is_hidden_is_hidden_for_good(size, fraction):
    keys = (7 << 32) + torch.arange(50)
    there = hide(keys, size, fraction)
    assert there.shape == (50, 1, size, size) and there.dtype == torch.bool
    assert (there.sum((1, 2, 3)) == round(fraction * size**2)).all()
    assert torch.equal(hide(keys[[9, 7]], size, fraction), there[[9, 7]])
    if 0.1 < fraction < 1:
        assert len(there.flatten(1).unique(dim=0)) == 50  # each image its own
        smaller = hide(keys, size, fraction / 2)
        assert not (smaller & ~there).any()


def test_what_is_hidden_is_anywhere():
    rate = hide(torch.arange(4000), 16, 0.4).double().mean(0)
    error = math.sqrt(0.4 * 0.6 / 4000)
    assert (rate - 0.4).abs().max() < 5 * error and abs(rate.std() - error) < 0.15 * error
    cond_mask, _ = make_masks(torch.arange(4000), 0, 16, settings(sparsity=0.4, size=16))
    both = (hide(torch.arange(4000), 16, 0.4) & cond_mask).double().mean().item()
    assert both == pytest.approx(0.4 * 102 / 256, rel=0.01)  # nor has it to do with the masks


def of_pattern(pattern, size):
    return SimpleNamespace(mask_pattern=pattern, image_size=size)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("pattern", ["random", "block"])
def test_parts_are_equal_disjoint_and_all_there_is(parts, fraction, pattern):
    """And each sees what is seen, and of the parts before it as much as is asked for."""
    cond_mask = torch.rand(60, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    cond_mask = cond_mask < torch.linspace(0.05, 0.95, 60).view(-1, 1, 1, 1)
    keys = (3 << 32) + torch.arange(60)

    def drawn(i=slice(None), keys=keys):
        found = in_parts(keys[i], cond_mask[i], parts, fraction, of_pattern(pattern, 9))
        return torch.stack([torch.stack(x) for x in found])

    found = drawn()
    assert found.shape == (parts, 2, 60, 1, 9, 9) and found.dtype == torch.bool
    states, seen = found.unbind(1)
    assert torch.equal(states.sum(0), (~cond_mask).long())
    sizes = states.sum((2, 3, 4))
    assert (sizes.amax(0) - sizes.amin(0)).max() <= 1
    before = cond_mask
    for state, given in zip(states, seen, strict=True):
        assert not (cond_mask & ~given).any() and not (given & ~before).any()
        counts = cond_mask.sum((1, 2, 3)).clamp(min=round(fraction * 81))
        assert torch.equal(given.sum((1, 2, 3)), counts.minimum(before.sum((1, 2, 3))))
        before = before | state
    assert torch.equal(drawn([8, 3]), found[:, :, [8, 3]])
    if parts > 1:
        other = drawn(keys=keys + 60)[:, 0]
        assert (other == states).flatten(2).all(2).all(0)[:50].double().mean() < 0.1


def test_parts_are_of_squares_if_training_scored_squares():
    """But for one, perhaps, at each end of a part; also in an image larger than those."""
    squares = torch.rand(7, 1, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    cond_mask = squares.repeat_interleave(4, 2).repeat_interleave(4, 3)
    config = of_pattern("block", 32)
    states = torch.cat([x for x, _ in in_parts(torch.arange(7), cond_mask, 3, 0.5, config)], dim=1)
    pooled = states.unflatten(3, (6, 4)).unflatten(2, (5, 4)).sum((3, 5))
    assert ((pooled % 16 != 0).any(1).sum((1, 2)) <= 2).all() and (pooled == 16).any()


def test_without_parts_all_is_drawn_at_once():
    cond_mask = hide(torch.arange(3), 8, 0.3)
    ((state, seen),) = in_parts(torch.arange(3), cond_mask, None, 0.2, of_pattern("random", 8))
    assert state.all() and torch.equal(seen, cond_mask)


def test_any_pixel_gets_into_any_part_with_any_other():
    cond_mask = torch.zeros(9000, 1, 4, 4, dtype=torch.bool)
    cond_mask[:, 0, 3] = True  # and 12 pixels to draw
    drawn = in_parts(torch.arange(9000), cond_mask, 3, 0.5, of_pattern("random", 4))
    found, seen = (
        torch.stack(x)[:, :, 0, :3].flatten(2).double() for x in zip(*drawn, strict=True)
    )
    assert (found.mean(1) - 1 / 3).abs().max() < 5 * (2 / 9 / 9000) ** 0.5
    together = torch.einsum("pni,pnj->ij", found, found) / 9000
    off = together[~torch.eye(12, dtype=torch.bool)] - 3 / 11  # three others of eleven
    assert off.abs().max() < 5 * (3 / 11 * 8 / 11 / 9000) ** 0.5
    shown = seen[2].mean(0)  # 4 of the 8 drawn so far
    assert (shown - 1 / 3).abs().max() < 5 * (2 / 9 / 9000) ** 0.5
