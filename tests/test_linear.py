"""Kriging against its formulas, covariances against those of known Gaussians, also with gaps."""

from pathlib import Path
from types import SimpleNamespace

import sparse_ddpm
from fused_ddpm import linear, ops
from fused_ddpm.fill import set_convolution
from fused_ddpm.folders import Part
from fused_ddpm.linear import PRIORS, RIDGE, SHARP, LinearFill, once_each, telling_order
from fused_ddpm.masks import hide, in_parts, make_masks, observe

import pytest
import torch
import torch.nn as nn
from helpers import make_config


def covariance_of(side, reach=2.0):
    """Of an image whose edges vary more than its middle, float64 (side^2, side^2)."""
    place = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
    size = 0.3 + 0.05 * (place - (side - 1) / 2).abs().amax(1)
    return size * size[:, None] * torch.exp(-torch.cdist(place, place) / reach)


def gaussian_images(covariance, n, channels=1, seed=0):
    """(N, C, side, side), float32: draws, with a mean that falls from channel to channel."""
    g, side = torch.Generator().manual_seed(seed), round(len(covariance) ** 0.5)
    white = torch.randn(n, channels, side**2, generator=g, dtype=torch.float64)
    drawn = (white @ torch.linalg.cholesky(covariance).T).view(n, channels, side, side)
    return (drawn + mean_of(channels, side)).float()


def mean_of(channels, side):
    slope = torch.linspace(-0.2, 0.3, side, dtype=torch.float64)
    return slope.expand(channels, side, side) - 0.1 * torch.arange(channels).view(-1, 1, 1)


def fill_of(covariance, channels=1, fraction=0.2):
    """A LinearFill that knows mean and covariance."""
    side = round(len(covariance) ** 0.5)
    fill = LinearFill((channels, side, side), fraction)
    fill.mean.copy_(mean_of(channels, side))
    fill.covariance.copy_(covariance)
    fill.load_state_dict(fill.state_dict())
    return fill


def conditional(mean, covariance, x, seen):
    """(mean (C, D), variance (D,)) of images (C, D) given their seen pixels (D,), in float64."""
    m, c, o = mean.double().flatten(1), covariance.double(), seen.flatten()
    gain = c[:, o] @ c[o][:, o].inverse()
    return m + (x.double().flatten(1) - m)[:, o] @ gain.T, (c - gain @ c[o]).diagonal()


def random_seen(n, side, counts, seed=0):
    """bool (N, 1, side, side), so many of each image."""
    score = torch.rand(n, side**2, generator=torch.Generator().manual_seed(seed))
    return (score.argsort(1).argsort(1) < torch.tensor(counts)[:, None]).view(n, 1, side, side)


# -- the filled image ------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[20], [20, 20], [3, 25, 1, 64, 0, 40], [0]])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_filled_image_is_the_conditional_mean(counts, dtype, error):
    covariance, n = covariance_of(8), len(counts)
    fill = fill_of(covariance, channels=2).to(dtype)
    x, seen = gaussian_images(covariance, n, 2).to(dtype), random_seen(n, 8, counts)
    cond = torch.where(seen, x, 0)
    given, mask, state, filled, variance = fill(cond, seen, ~seen)
    assert given is cond and torch.equal(mask, seen.to(dtype)) and torch.equal(state, 1 - mask)
    for i in range(n):
        expected, _ = conditional(fill.mean, fill.covariance, x[i], seen[i])
        torch.testing.assert_close(filled[i].flatten(1).double(), expected, rtol=0, atol=error)
        alone = fill(cond[i : i + 1], seen[i : i + 1], seen[i : i + 1])
        torch.testing.assert_close(alone[3], filled[i : i + 1], rtol=0, atol=error)
        torch.testing.assert_close(alone[4], variance[i : i + 1], rtol=0, atol=error)
    assert filled.dtype == variance.dtype == dtype and variance.shape == seen.shape


@pytest.mark.skipif("cpu" not in ops.BACKENDS, reason=ops.REASON)
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_weights_of_kernel_and_reference_agree(dtype, error):
    covariance, seen = covariance_of(8).to(dtype), random_seen(5, 8, [9, 0, 64, 1, 30]).flatten(1)
    off = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    kernel = torch.ops.fused_ddpm.linear_weights
    weights = kernel(covariance, seen, off)
    expected = linear.linear_weights_reference(covariance, seen, off)
    torch.testing.assert_close(weights, expected, rtol=error, atol=error)
    assert torch.equal(weights != 0, seen[:, None].expand_as(off))
    strided = covariance.T, seen.T.contiguous().T, off.mT.contiguous().mT
    assert torch.equal(kernel(*strided), weights)
    torch.library.opcheck(kernel, (covariance, seen, off))
    for wrong in (covariance[1:], seen, off), (covariance, seen[1:], off), (covariance, seen, seen):
        with pytest.raises(ValueError, match="do not fit"):
            kernel(*wrong)
    for wrong in (covariance, seen.to(dtype), off), (covariance.half(), seen, off):
        with pytest.raises(TypeError, match="bool, covariance and off of one type"):
            kernel(*wrong)


def test_what_is_not_seen_is_not_asked():
    fill, seen = fill_of(covariance_of(8)), random_seen(3, 8, [10, 20, 5])
    x = torch.rand(3, 1, 8, 8)
    *_, filled, variance = fill(torch.where(seen, x, 0), seen, seen)
    *_, other, also = fill(torch.where(seen, x, torch.rand(3, 1, 8, 8)), seen, seen)
    assert torch.equal(filled, other) and torch.equal(variance, also)


def test_what_pixels_say_is_as_written():
    """r^2 / (1 - r^2) of each seen one, of which the largest counts most."""
    covariance, seen = covariance_of(4), random_seen(2, 4, [5, 9])
    fill = fill_of(covariance)
    size = covariance.diagonal().sqrt()
    r2 = (covariance / size / size[:, None]) ** 2
    for i in range(2):
        _, about = fill._fill(torch.zeros(2, 1, 4, 4), seen)
        o = seen[i].flatten()
        said = (r2[:, o] / (1 - r2[:, o]).clamp(min=1e-3)).pow(SHARP).sum(1).pow(1 / SHARP)
        expected = (size**2 / (1 + said)).view(1, 4, 4)
        torch.testing.assert_close(about[i].double(), expected, rtol=1e-4, atol=0)
        _, exact = conditional(fill.mean, covariance, torch.zeros(1, 16), seen[i])
        ranks = [x.flatten().argsort().argsort()[~o].double() for x in (expected, exact)]
        assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.8  # it orders pixels by it



# -- noise for an image that is drawn in parts -----------------------------------------------------


def test_coupled_noise_is_white_where_it_is_drawn_from():
    fill, n = fill_of(covariance_of(6)), 36
    seen, state = random_seen(1, 6, [7]), random_seen(1, 6, [11], seed=1)
    state &= ~seen
    unit = torch.eye(n).view(n, 1, 6, 6)
    at = state.flatten()
    z = fill.couple(unit, seen.expand(n, 1, 6, 6), state.expand(n, 1, 6, 6)).flatten(1)
    assert torch.equal(z[:, ~at], torch.eye(n)[:, ~at])
    torch.testing.assert_close(z[:, at].T @ z[:, at], torch.eye(int(at.sum())), atol=1e-4, rtol=0)


def test_parts_from_coupled_noise_make_up_one_draw_of_a_gaussian():
    covariance, n, channels = covariance_of(8), 3, 2
    fill, keys = fill_of(covariance, channels), torch.tensor([5, 6, 7])
    seen, g = random_seen(n, 8, [10, 14, 1]), torch.Generator().manual_seed(3)
    x, white = (torch.randn(n, channels, 8, 8, generator=g) for _ in "12")
    whole, states = x * seen, 0
    for state, known in in_parts(keys, seen, 3, 0.4, SETTINGS):
        z = fill.couple(white, known, state).double()
        guess = fill._fill(whole * known, known)[0]
        for i in range(n):  # the exact flow: of the noise, times the root of the covariance
            s, o = state[i].flatten(), known[i].flatten()
            gain = covariance[s][:, o] @ covariance[o][:, o].inverse()
            values, vectors = torch.linalg.eigh(covariance[s][:, s] - gain @ covariance[o][:, s])
            root = vectors * values.sqrt() @ vectors.T
            drawn = guess[i].flatten(1)[:, s].double() + z[i].flatten(1)[:, s] @ root
            whole[i].flatten(1)[:, s] = drawn.float()
        states = states + state.int()
    assert torch.equal(states, (~seen).int())
    root = torch.linalg.cholesky(covariance)
    field = fill.mean.double() + (white.flatten(2).double() @ root.T).view(x.shape)
    for i in range(n):  # Matheron: a draw of all, moved to what is seen
        off = (x[i] - field[i]).flatten(1)
        moved, _ = conditional(torch.zeros(channels, 8, 8), covariance, off, seen[i])
        expected = (field[i].flatten(1) + moved).view(channels, 8, 8)
        torch.testing.assert_close(whole[i].double(), expected, atol=2e-3, rtol=0)


def test_coupled_noise_of_an_image_hangs_on_no_other():
    fill, white = fill_of(covariance_of(8, reach=8.0), 2), torch.randn(3, 2, 8, 8)
    seen, state = random_seen(3, 8, [0, 20, 3]), random_seen(3, 8, [30, 4, 0], seed=1)
    state &= ~seen
    together = fill.couple(white, seen, state)
    for i in range(3):
        alone = fill.couple(white[i : i + 1], seen[i : i + 1], state[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    assert torch.isfinite(together).all() and torch.equal(together[2], white[2])


def test_coupled_noise_of_large_images_is_that_given():
    fill = LinearFill((1, 80, 80), 0.2)
    white = torch.randn(2, 1, 80, 80)
    mask = random_seen(2, 80, [100, 200])
    assert torch.equal(fill.couple(white, mask, ~mask), white)


# -- fitting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, batch", [(1, 500), (3, 64)])
def test_of_complete_images_it_is_the_sample_covariance(channels, batch):
    """With the prior that the docstrings tell of, worth 100 rows, or 10 images in the mean."""
    x = gaussian_images(covariance_of(5), 500, channels).double()
    fill = LinearFill((channels, 5, 5), 0.2)
    fill.fit((part, None) for part in x.float().split(batch))

    middle = x[:batch].mean()  # numbers are held near it, for precision
    off = (500 * (x - middle).mean(0) + 10 * (x - middle).mean()) / 510
    torch.testing.assert_close(fill.mean.double(), middle + off, rtol=0, atol=1e-6)
    rows, off = (x - middle).flatten(2).flatten(0, 1), off.flatten(1)
    squares = rows.T @ rows - 500 * off.T @ off
    typical = torch.zeros(25, 25, dtype=torch.float64)
    for i in range(25):  # the mean over pairs at this distance, drawn towards 0 where it is large
        for j in range(25):
            dy, dx = i // 5 - j // 5, i % 5 - j % 5
            pairs = [
                squares[y * 5 + c, (y - dy) * 5 + c - dx]
                for y in range(max(dy, 0), 5 + min(dy, 0))
                for c in range(max(dx, 0), 5 + min(dx, 0))
            ]
            typical[i, j] = sum(pairs) / len(rows) / 25
    prior = PRIORS[0]
    expected = (squares + prior * typical) / (len(rows) + prior) + RIDGE * torch.eye(25)
    torch.testing.assert_close(fill.covariance.double(), expected, rtol=0, atol=2e-6)
    sample = torch.cov((x - x.mean(0)).flatten(2).flatten(0, 1).T, correction=0)
    assert (fill.covariance - sample).abs().max() < prior / len(rows) * sample.abs().max()


def with_gaps(covariance, n, fraction=0.4):
    """(x, observed) of images of which so much is there; the rest is 0."""
    x = gaussian_images(covariance, n)
    part = Part(x, torch.zeros(n))
    return observe(part, torch.arange(n), fraction)


def test_images_of_which_60_percent_are_missing_teach_the_same():
    covariance, errors, excess = covariance_of(8), [], []
    truth, seen = gaussian_images(covariance, 400, seed=1), random_seen(400, 8, [13] * 400)
    best = fill_of(covariance)._fill(truth * seen, seen)[0] - truth
    for n in (500, 16_000):
        x, observed = with_gaps(covariance, n)
        assert (observed.sum((1, 2, 3)) == 26).all() and (x[~observed] == 0).all()
        fill = LinearFill((1, 8, 8), 0.2)
        fill.fit(zip(x.split(999), observed.split(999), strict=True))
        assert torch.linalg.eigvalsh(fill.covariance.double()).min() > 0.5 * RIDGE
        assert torch.equal(fill.covariance, fill.covariance.T)
        scale = covariance.diagonal().sqrt()
        errors.append(((fill.covariance - covariance) / scale / scale[:, None]).square().mean())
        off = fill._fill(truth * seen, seen)[0] - truth
        excess.append(off[~seen].square().mean() / best[~seen].square().mean())
        noise = 1.2 / (0.16 * n)  # of a covariance from as many pairs as are observed
        assert errors[-1] < noise and (fill.mean - mean_of(1, 8)).abs().max() < 2 * noise**0.5
    assert excess[1] < 1.03 < excess[0] < 1.15  # of the least squared error there is


def smooth_covariance(side):
    """Of images that a few waves tell: what completing them is good for."""
    place = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
    size = 0.3 + 0.02 * place.sum(1)
    near = torch.exp(-((torch.cdist(place, place) / 4) ** 2))
    return size * size[:, None] * near + 0.01 * torch.eye(side**2)


def test_images_completed_by_draws_have_the_covariance_they_are_drawn_by():
    """And from that of other images they come nearer to it, also for each channel's mean."""
    covariance = smooth_covariance(8)
    x, observed = observe(Part(gaussian_images(covariance, 8000, 2), None), torch.arange(8000), 0.4)
    for start in (covariance, 1.5 * covariance.diagonal().diag() + 0.5 * covariance):
        fill = fill_of(start, channels=2)
        fill.mean.sub_(0.2)
        before = (start - covariance).norm() / covariance.norm()
        batches = list(zip(x.split(4000), observed.split(4000), strict=True))
        for _ in range(3):
            middle, mean, squares, count = fill._completed(batches)
            assert count == 16_000
            off = squares - mean.flatten(1).T @ mean.flatten(1) / 2 * count
            fill.mean.copy_(middle + mean)
            fill.covariance.copy_(off / count)
        after = (fill.covariance - covariance).norm() / covariance.norm()
        assert after < (0.04 if before == 0 else 0.3 * before)
        assert (fill.mean - mean_of(2, 8)).abs().max() < 0.03


def test_completed_images_tell_more_than_the_pairs_there_are(monkeypatch):
    covariance, error = smooth_covariance(12), []
    truth, seen = gaussian_images(covariance, 300, seed=1), random_seen(300, 12, [29] * 300)
    x, observed = with_gaps(covariance, 1200)
    masks = make_masks(torch.arange(1000, 1200), 0, 12, SETTINGS, observed[1000:])
    for completions in (0, 2):
        monkeypatch.setattr(linear, "COMPLETIONS", completions)
        fill = LinearFill((1, 12, 12), 0.2)
        fill.fit([(x[:1000], observed[:1000])], (x[1000:], *masks))
        off = fill._fill(truth * seen, seen)[0] - truth
        error.append(off[~seen].square().mean().item())
    off = fill_of(covariance)._fill(truth * seen, seen)[0] - truth
    least = off[~seen].square().mean().item()
    assert error[1] - least < 0.7 * (error[0] - least)


def test_with_few_images_distance_alone_tells_the_covariance():
    """How much it counts is chosen on images that were not fitted."""
    covariance = covariance_of(12, reach=4.0)
    truth, seen = gaussian_images(covariance, 300, seed=1), random_seen(300, 12, [29] * 300)
    worse = []
    for n in (60, 6000):
        x, observed = with_gaps(covariance, n + 60)
        masks = make_masks(torch.arange(n, n + 60), 0, 12, SETTINGS, observed[n:])
        error = []
        for held_out in (None, (x[n:], *masks)):
            fill = LinearFill((1, 12, 12), 0.2)
            fill.fit([(x[:n], observed[:n])], held_out)
            off = fill._fill(truth * seen, seen)[0] - truth
            error.append(off[~seen].square().mean())
        worse.append(error[0] / error[1])
        best = fill_of(covariance)._fill(truth * seen, seen)[0] - truth
        assert error[1] < (1.2 if n == 60 else 1.05) * best[~seen].square().mean()
    assert min(worse) > 1.03


def test_garbage_where_nothing_is_observed_changes_no_bit():
    """After observe, which has to come first: 0 times NaN is NaN."""
    x = gaussian_images(covariance_of(6), 60, 2)
    own = random_seen(60, 6, [30] * 60)
    keys = torch.arange(60)
    for observed, fraction in [(None, 0.4), (own, None), (own, 0.4)]:
        there = torch.ones_like(own) if observed is None else observed
        there = there & hide(keys, 6, fraction) if fraction else there
        fits = []
        for garbage in (x, 9 * torch.randn_like(x), torch.full_like(x, torch.nan)):
            part = Part(torch.where(there, x, garbage), keys, observed)
            fill = LinearFill((2, 6, 6), 0.2)
            read, mask = observe(part, keys, fraction)
            assert torch.equal(mask, there)
            fill.fit([(read, mask)])
            fill.measure(read, *make_masks(keys, 0, 6, SETTINGS, mask))
            fits.append(torch.cat([value.flatten() for value in fill.state_dict().values()]))
        assert torch.isfinite(fits[0]).all()
        assert torch.equal(fits[0], fits[1]) and torch.equal(fits[0], fits[2])


SETTINGS = SimpleNamespace(sparsity=[0.2], target_sparsity=None, mask_pattern="random")


def test_a_checkpoint_has_all_of_it():
    """What pixels say of each other is not in it, but follows; also inside another module."""
    first, second = nn.Module(), nn.Module()
    first.fill, second.fill = (LinearFill((2, 6, 6), 0.2) for _ in range(2))
    x, keys = gaussian_images(covariance_of(6), 200, 2), torch.arange(200)
    masks = make_masks(keys, 0, 6, SETTINGS)
    first.fill.fit([(x, None)])
    first.fill.measure(x, *masks)
    saved = first.state_dict()
    assert {name.removeprefix("fill.") for name in saved} == {
        "mean", "covariance", "place", "log_variance", "scored"
    }  # fmt: skip
    second.load_state_dict(saved)
    assert torch.equal(second.fill.said, first.fill.said) and first.fill.said.std() > 0
    seen = masks[0]
    pairs = zip(*(module.fill(x * seen, seen, seen) for module in (first, second)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


# -- how far off it is -----------------------------------------------------------------------------


def test_the_table_is_the_mean_squared_error():
    """In each bin, against the exact one; and on new images, in five groups."""
    covariance = covariance_of(10)
    fill = fill_of(covariance, channels=2)
    assert fill.scored == 1
    keys = torch.arange(1200)
    cond, scored = make_masks(keys, 0, 10, SETTINGS)
    x = gaussian_images(covariance, 1200, 2)
    fill.measure(x, cond, scored)

    def exact_of(x, seen):
        each = [conditional(fill.mean, covariance, *pair)[1] for pair in zip(x, seen, strict=True)]
        return torch.stack(each).view(seen.shape)

    _, about = fill._fill(x * cond, cond)
    bins, exact = fill._bin(about)[scored].round(), exact_of(x, cond)[scored]
    full = [k for k in range(16) if (bins == k).sum() > 500]
    for k in full:
        true = exact[bins == k].mean().item()
        assert fill.log_variance[k].exp().item() == pytest.approx(true, rel=0.03)
    assert len(full) > 3

    x, (seen, _) = gaussian_images(covariance, 300, 2, 1), make_masks(keys[:300], 1, 10, SETTINGS)
    *_, filled, variance = fill(x * seen, seen, ~seen)
    error = ((filled - x) ** 2).mean(1, keepdim=True)[~seen]
    variance, exact = variance[~seen], exact_of(x, seen)[~seen]
    for part in variance.argsort().tensor_split(5):
        true = exact[part].mean().item()
        assert variance[part].mean().item() == pytest.approx(true, rel=0.08)  # bins are wide
        assert error[part].mean().item() == pytest.approx(true, rel=0.08)
    assert variance.max() > 3 * variance.min()


def test_large_images_are_filled_by_convolution(monkeypatch):
    assert len(LinearFill((3, 64, 64), 0.2).covariance) == 64**2
    fill = LinearFill((3, 65, 65), 0.2)
    assert len(fill.covariance) == len(fill.said) == 0
    monkeypatch.setattr(linear, "LARGEST_SIDE", 31)
    fill, x = LinearFill((1, 32, 32), 0.2), gaussian_images(covariance_of(32), 200)
    seen, scored = make_masks(torch.arange(200), 0, 32, SETTINGS)
    fill.fit([(x[:100], None)])
    fill.measure(x[:100], seen[:100], scored[:100])
    x, seen = x[100:], seen[100:]
    *_, filled, variance = fill(x * seen, seen, ~seen)
    expected, density = set_convolution(x * seen, seen, 0.2)
    assert torch.equal(filled, expected)
    error = ((filled - x) ** 2)[~seen]
    variance, density = variance[~seen], density[~seen]
    for part in density.argsort().tensor_split(5):
        assert variance[part].mean().item() == pytest.approx(error[part].mean().item(), rel=0.1)
    again = LinearFill((1, 32, 32), 0.2)
    again.load_state_dict(fill.state_dict())
    assert torch.equal(again(x * seen, seen, seen)[4], fill(x * seen, seen, seen)[4])


@pytest.mark.parametrize(
    "scored, unseen, parts",
    [(0.2, 0.8, 4), (0.2, 0.6, 3), (0.2, 0.81, 5), (0.2, 0.1, 1), (0.3, 0.7, 3), (0.2002, 0.8, 4)],
)
def test_in_how_many_parts(scored, unseen, parts):
    fill = LinearFill((1, 4, 4), 0.2)
    fill.scored.fill_(scored)
    assert fill.parts(unseen) == parts


def test_parts_are_as_large_as_is_scored_where_the_fewest_pixels_are_seen():
    config = make_config(sparse_ddpm, image_size=8, observed_only=0.5, sparsity=[0.125, 0.25])
    images = torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    part = Part(images.to(torch.uint8), torch.zeros(64, dtype=torch.int64), None)
    fill, run = LinearFill((1, 8, 8), 0.25), SimpleNamespace(seeds=lambda i: i, dir=Path())
    fill.learn(run, SimpleNamespace(images=part.images, shape=(1, 8, 8), train=part), config)
    assert fill.scored == 0.5 - 0.125 and fill.parts(0.75) == 2


# -- what to measure next --------------------------------------------------------------------------


def uneven(n=20):
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return root @ root.T / n + 0.01 * torch.eye(n)


def left(covariance, chosen):
    """Conditional variances (D,) given the chosen values."""
    o = torch.tensor(chosen, dtype=torch.long)
    gain = covariance[:, o] @ covariance[o][:, o].inverse()
    return (covariance - gain @ covariance[o]).diagonal()


@pytest.mark.parametrize("count", [None, 7, 1])
def test_the_telling_order_is_the_greedy_one(count):
    covariance, chosen = uneven(), []
    for _ in range(count or 20):
        remaining = left(covariance, chosen).clone()
        remaining[chosen] = -1
        chosen.append(remaining.argmax().item())
    remaining = left(covariance, chosen).clone()
    remaining[chosen] = -1
    chosen += [i for i in remaining.argsort(descending=True).tolist() if i not in chosen]
    ranks = telling_order(covariance, count)
    assert ranks.dtype == torch.int64 and ranks.argsort().tolist() == chosen


def test_what_says_all_of_another_comes_first_and_that_one_last():
    covariance = torch.tensor([[1.0, 0, 2], [0, 0.5, 0], [2, 0, 4]])
    assert telling_order(covariance).tolist() == [2, 1, 0]


def test_the_first_of_the_order_tell_more_than_random_ones():
    covariance = covariance_of(8, reach=3.0)
    first = telling_order(covariance).argsort()[:10].tolist()
    g = torch.Generator().manual_seed(0)
    others = [torch.randperm(64, generator=g)[:10].tolist() for _ in range(50)]
    least = min(left(covariance, other).sum() for other in others)
    assert left(covariance, first).sum() < least


def test_equal_rows_in_turn_are_computed_once():
    asked = []

    def function(x, mask):
        asked.append(x.flatten().tolist())
        return x + mask, ~mask

    x = torch.tensor([1.0, 1, 2, 2, 2, 1, 1]).view(-1, 1, 1, 1)
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 1]).bool().view(-1, 1, 1, 1)
    together, apart = once_each(function, x, mask), function(x, mask)
    assert asked[0] == [1, 2, 2, 1]
    assert all(map(torch.equal, together, apart))
