"""Points of functions: set convolution, kriging at any place, putting back what is observed."""

import math

import sparse_ddo
from fused_ddpm import points as module
from fused_ddpm.fill import GaussianFill
from fused_ddpm.grids import dct_matrix, idct, resize
from fused_ddpm.points import (
    WIDTHS,
    LinearGuess,
    Points,
    at_points,
    points_of,
    put_back,
    random_points,
    rasterize,
    set_convolution,
    turned,
)

import pytest
import torch
from helpers import make_config, with_modes


def a_function(n, channels=1, highest=6):
    u = torch.randn(2, channels, highest, highest, generator=torch.Generator().manual_seed(0))
    return idct(with_modes(u, n)) * (n / 16)


def masks(n=16, share=0.2):
    return torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(1)) < share


def scattered(count, n=16, channels=1):
    places = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(2))
    values = at_points(a_function(n, channels), places)
    return Points(places, values, torch.ones(2, count, dtype=torch.bool))


def a_guess(channels=1, n=16):
    guess = LinearGuess((channels, n, n), 0.2)
    place = torch.cartesian_prod(torch.arange(float(n)), torch.arange(float(n)))
    guess.linear.covariance.copy_(torch.exp(-torch.cdist(place, place) / 4))
    guess.linear.mean.copy_(torch.linspace(-1, 1, n).expand(channels, n, n))
    return guess


def test_points_of_images_are_their_pixels():
    x, mask = a_function(16, 3), masks()
    places, values, there = points_of(x, mask)
    assert there.sum(1).tolist() == mask.sum((1, 2, 3)).tolist()  # not the same number
    for i in range(2):
        row, column = (places[i][there[i]] * 16 - 0.5).round().long().unbind(1)
        assert torch.equal(values[i][:, there[i]], x[i][:, row, column])
        assert mask[i, 0, row, column].all()
    torch.testing.assert_close(at_points(x, places) * there[:, None], values, rtol=0, atol=1e-5)


def test_values_between_pixels_are_sums_of_cosines():
    x, places = a_function(16), torch.tensor([[[0.31, 0.77], [0.0, 1.0]]] * 2)
    matrix = dct_matrix(16, "cpu").double()
    u = matrix @ x.double() @ matrix.T
    for i, (row, column) in enumerate(places[0].tolist()):
        total = 0
        for k in range(16):
            for j in range(16):
                norm = (1 if k == 0 else 2) ** 0.5 * (1 if j == 0 else 2) ** 0.5 / 16
                wave = math.cos(math.pi * k * row) * math.cos(math.pi * j * column)
                total = total + norm * wave * u[:, 0, k, j]
        found = at_points(x, places)[:, 0, i].double()
        torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-5)
    finer = at_points(a_function(40), places)  # whatever the grid
    torch.testing.assert_close(finer, at_points(x, places), rtol=0, atol=1e-5)


def test_random_points_are_anywhere_and_of_the_function():
    x = a_function(16)
    places, values, there = random_points(x, torch.arange(2), 500)
    assert there.all() and 0 <= places.min() and places.max() < 1
    assert places.mean().item() == pytest.approx(0.5, abs=0.03)
    assert places.var().item() == pytest.approx(1 / 12, rel=0.1)
    assert torch.equal(values, at_points(x, places))
    again, _, _ = random_points(x[1:], torch.tensor([1]), 500)
    assert torch.equal(again[0], places[1]) and not torch.equal(places[0], places[1])


def test_set_convolution_by_its_definition():
    points = scattered(9, channels=2)
    points.there[1, 4:] = False
    found = set_convolution(points, 12).double().unflatten(1, (len(WIDTHS), 3))
    for i, w in enumerate(WIDTHS):
        for b, row, column in [(0, 0, 0), (1, 5, 7), (1, 11, 2)]:
            density, sums = 0.0, torch.zeros(2, dtype=torch.float64)
            for j in range(9):
                r, c = points.places[b, j].tolist()
                square = ((row + 0.5) / 12 - r) ** 2 + ((column + 0.5) / 12 - c) ** 2
                phi = math.exp(-0.5 * square / w**2) * points.there[b, j].item()
                density, sums = density + phi, sums + phi * points.values[b, :, j]
            expected = torch.cat([torch.tensor([density]).double(), sums / (density + 0.1)])
            torch.testing.assert_close(found[b, i, :, row, column], expected, rtol=1e-4, atol=1e-6)


def test_rasterized_points_are_the_image_where_they_are_pixels():
    x, mask = a_function(16, 3), masks()
    image = rasterize(points_of(x, mask), 16)
    assert torch.equal(image, torch.cat([x * mask, mask.float()], dim=1))
    assert torch.equal(rasterize(scattered(30), 16)[:, 1:].sum((2, 3)) <= 30, torch.ones(2, 1) > 0)


@pytest.mark.parametrize("n", [16, 24])
def test_observed_values_are_put_back(n):
    points = scattered(12)
    x = put_back(torch.zeros(2, 1, n, n), points, 0.08)
    assert (at_points(x, points.places) - points.values).abs().max() < 0.02
    same = a_function(n)  # what has the values stays as it is
    torch.testing.assert_close(put_back(same, points, 0.08), same, rtol=0, atol=1e-4)
    fewer = points._replace(there=torch.arange(12).expand(2, -1) < 5)
    only = Points(*(x[..., :5] if i else x[:, :5] for i, x in enumerate(points)))
    zeros = torch.zeros(2, 1, n, n)
    torch.testing.assert_close(put_back(zeros, fewer, 0.08), put_back(zeros, only, 0.08))


def test_values_are_put_back_image_by_image():
    """By the formula, in float64; also where places repeat and what is seen does not."""
    points, n = scattered(300), 16  # so many that some all but coincide
    which = torch.tensor([0, 0, 0, 1, 1])
    places, values, there = (x[which] for x in points)
    there = there & (torch.arange(300) < torch.tensor([300, 300, 9, 9, 300])[:, None])
    points = Points(places, values * torch.arange(1, 6).view(-1, 1, 1) / 5, there)
    x = torch.randn(5, 1, n, n, generator=torch.Generator().manual_seed(1))
    found = put_back(x, points, 0.05)
    centre = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    centre = torch.cartesian_prod(centre, centre)

    def kernel(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / 0.05**2)

    for i in range(5):
        at, y = places[i, there[i]].double(), points.values[i, 0, there[i]].double()
        off = y - at_points(x[i : i + 1], at.float()[None])[0, 0].double()
        weights = torch.linalg.solve(kernel(at, at) + 1e-4 * torch.eye(len(at)), off)
        expected = x[i, 0].double() + (kernel(centre, at) @ weights).view(n, n)
        torch.testing.assert_close(found[i, 0].double(), expected, rtol=1e-3, atol=2e-3)


# -- kriging ---------------------------------------------------------------------------------------


def test_on_the_grid_it_is_the_gaussian_conditional_mean():
    guess, x, mask = a_guess(), a_function(16), masks()
    h, v = guess(points_of(x, mask))
    mean, K = guess.linear.mean.flatten().double(), guess.linear.covariance.double()
    expected, std = GaussianFill(mean, K).fill(x, mask)
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-3)
    v = v / contrast_of(guess, x, mask).view(-1, 1, 1, 1)
    torch.testing.assert_close(v.sqrt()[~mask], std[~mask], rtol=0.01, atol=1e-3)
    assert v[mask].max() < 1e-3
    filled = guess.linear(x * mask, mask, mask)[3]
    torch.testing.assert_close(h, filled, rtol=0, atol=1e-3)


def contrast_of(guess, x, mask):
    """How far the seen pixels are off the mean, by their own covariance; float64, an image each."""
    mean, K = guess.linear.mean.flatten(1).double(), guess.linear.covariance.double()
    found = []
    for image, seen in zip(x.flatten(2).double(), mask.flatten(1), strict=True):
        off = (image - mean)[:, seen]
        square = torch.linalg.solve(K[seen][:, seen], off.T).T * off
        found.append((4 + square.sum() / len(off)) / (4 + seen.sum()))
    return torch.stack(found).float()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_variance_goes_with_the_contrast_of_the_points(channels):
    guess, mask = a_guess(channels), masks()
    x = gp_images(guess, 2)
    (h, v), mean = guess(points_of(x, mask)), guess.linear.mean
    torch.testing.assert_close(contrast_of(guess, x, mask), torch.ones(2), rtol=0, atol=0.5)
    strong, far = guess(points_of(mean + 3 * (x - mean), mask))
    torch.testing.assert_close(strong - mean, 3 * (h - mean), rtol=0, atol=1e-3)
    ratio = contrast_of(guess, mean + 3 * (x - mean), mask) / contrast_of(guess, x, mask)
    torch.testing.assert_close(far, v * ratio.view(-1, 1, 1, 1), rtol=1e-3, atol=1e-5)
    assert 5 < ratio.min() and ratio.max() < 9


def test_in_parts_it_is_the_same(monkeypatch):
    guess, points = a_guess(3), points_of(a_function(16, 3), masks())
    whole = guess(points)
    monkeypatch.setattr(module, "CACHED", 1)  # an image at a time
    for one, all_at_once in zip(guess(points), whole, strict=True):
        torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-6)
    none = guess(Points(torch.rand(2, 0, 2), torch.rand(2, 3, 0), torch.ones(2, 0) > 0))
    torch.testing.assert_close(none[0], guess.linear.mean.expand(2, -1, -1, -1))


def gp_images(guess, count):
    """Draws of the Gaussian that it takes images for."""
    root, mean = torch.linalg.cholesky(guess.linear.covariance), guess.linear.mean
    white = torch.randn(count, *mean.shape, generator=torch.Generator().manual_seed(3))
    return mean + (white.flatten(2) @ root.T).view_as(white)


def test_off_the_grid_it_is_the_conditional_mean_of_the_function():
    """The same as if the points were pixels of a grid four times as fine."""
    guess, x, fine = a_guess(), a_function(16), a_function(64)
    mask = masks(64, 0.01)
    points = points_of(fine, mask)
    h, v = guess(points)
    up = torch.kron(*[wide(16, 64)] * 2)  # (64^2, 16^2): pixels to pixels
    K = up @ guess.linear.covariance.double() @ up.T + 1e-6 * torch.eye(64**2)
    mean = up @ guess.linear.mean.flatten().double()
    expected, _ = GaussianFill(mean, K.double()).fill(fine, mask)
    torch.testing.assert_close(resize(h, 64)[~mask], expected[~mask], rtol=0, atol=5e-3)
    there = h[..., 2::5, 3::5], resize(expected, 16)[..., 2::5, 3::5]
    torch.testing.assert_close(*there, rtol=0, atol=5e-3)
    assert (h - x).square().mean() < 0.8 * x.var() and v.max() > 0.1


def wide(size, n):
    low = dct_matrix(size, "cpu").double()
    return dct_matrix(n, "cpu").double()[:size].T @ low * (n / size) ** 0.5


def test_points_that_are_not_there_say_nothing():
    guess, points = a_guess(), scattered(20)
    there = torch.arange(20).expand(2, -1) < 11
    h, v = guess(points._replace(there=there))
    fewer, of_fewer = guess(Points(points.places[:, :11], points.values[..., :11], there[:, :11]))
    torch.testing.assert_close(h, fewer, rtol=0, atol=1e-4)
    torch.testing.assert_close(v, of_fewer, rtol=0, atol=1e-4)


@pytest.mark.parametrize("largest", [64, 8])
def test_what_it_learns_is_how_far_off_it_is(largest, monkeypatch):
    """In each mode of each axis; with images of more modes than its covariance has, too."""
    monkeypatch.setattr(module, "LARGEST_SIDE", largest)
    config = make_config(sparse_ddo, image_size=16, sparsity=[0.2])
    colours = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]

    class Smooth:
        shape = (3, 16, 16)
        u = torch.randn(600, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        fall = 1 / (1 + torch.arange(16.0)[:, None] + torch.arange(16.0)) ** 1.5
        fall = fall * torch.tensor([0.2, 1.0, 0.5]).view(3, 1, 1)
        images = (turned(colours.T, idct(u * fall * 6)) * 30 + 128).clamp(0, 255).byte()

    guess = LinearGuess(Smooth.shape, 0.2)
    guess.learn(Smooth, config)
    x = Smooth.images[:300] / 127.5 - 1
    mask, _ = sparse_ddo.masks_of(torch.arange(300), 16, config)
    seen = guess.see(points_of(x, mask), 16)
    h, std, axes, V, features = seen
    matrix, left = dct_matrix(16, "cpu"), seen.standardize(x)
    torch.testing.assert_close(seen.restore(left), x)
    torch.testing.assert_close(axes @ axes.mT, torch.eye(3).expand(300, -1, -1))
    ascending = colours[[0, 2, 1]]  # by their variances
    torch.testing.assert_close((axes[0] * ascending).sum(1).abs(), torch.ones(3), rtol=0, atol=0.01)
    error = (matrix @ left @ matrix.T / 16).square()
    assert features.shape == (300, 4 * len(WIDTHS), 16, 16)
    assert error.mean().item() == pytest.approx(V.mean().item(), rel=0.1)
    assert (error.mean(0) / V.mean(0)).log().abs().mean() < 0.2
    assert std.square().mean().item() == pytest.approx(1, abs=0.05)
    assert (x - h).square().mean() < 0.2 * (x - x.mean(0)).square().mean()
    again = guess.see(points_of(x, mask), 32, as_points=False)
    assert again.features.shape == (300, 4, 32, 32) and torch.equal(again[0], h)
