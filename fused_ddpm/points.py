"""Observations as a list of points: a function seen at any places of the unit square.

Nothing here is tied to a grid, but for `rasterize`.
"""

from typing import NamedTuple

from fused_ddpm.grids import cosines, dct, dct_matrix, resize
from fused_ddpm.images import to_float
from fused_ddpm.linear import LARGEST_SIDE, LinearFill, once_each, set_apart
from fused_ddpm.masks import make_masks, places_of
from fused_ddpm.noise import FRACTION, POINTS, random_words, seeded_uniform

import torch
import torch.nn as nn

WIDTHS = 1 / 64, 1 / 32, 1 / 16  # standard deviations of the set convolution, in image widths
NUGGET = 1e-4  # added to variances of what is enforced
LEAST = 0.02  # of std^2
CACHED = 2**19  # numbers


class Points(NamedTuple):
    """places: (B, P, 2), row and column in [0, 1]; values: (B, C, P); there: bool (B, P).

    Images need not have equally many: what is not there is read nowhere.
    """

    places: torch.Tensor
    values: torch.Tensor
    there: torch.Tensor


# -- Points ----------------------------------------------------------------------------------------


def points_of(x, mask):
    """The pixels of images x (B, C, n, n) where mask, bool (B, 1, n, n), is set."""
    n, seen = x.shape[-1], mask.flatten(1)
    o, there = places_of(seen)
    places = torch.stack([o // n, o % n], dim=2).to(x.dtype).add(0.5) / n
    values = x.flatten(2).gather(2, o[:, None].expand(-1, x.shape[1], -1))
    return Points(places, values * there[:, None], there)


def random_points(x, keys, count, key=None):
    """`count` points of each of the functions x (B, C, n, n), anywhere; by a key half to twice."""
    if key is not None:
        count = round(count * 2 ** (2 * seeded_uniform(key, FRACTION).item() - 1))
    words = random_words(keys, 2 * count, 0, POINTS)
    places = ((words >> 8).to(x.dtype) * 2**-24).view(-1, count, 2)
    return Points(places, at_points(x, places), torch.ones_like(places[..., 0], dtype=torch.bool))


def at_points(x, places):
    """Values (B, C, P) of functions x (B, C, n, n) at places (B, P, 2)."""
    waves, u = cosines(places, x.shape[-1]), dct(x)
    along = waves[:, None, :, 0] @ u  # (B, C, P, n)
    return (along * waves[:, None, :, 1]).sum(-1)


def bell(square):
    """exp(-square), but 4e-18 at least: smaller numbers slow a solve down tenfold."""
    return torch.exp(-square.clamp(max=40))


def set_convolution(points, n):
    """(B, len(WIDTHS) (1 + C), n, n): Gordon et al. 2020 (ConvCNP), an operation on functions.

    For each width the density sum_j phi(u - u_j), phi a Gaussian, and the values' mean weighted
    with it, at the pixel centres u of any grid.
    """
    places, values, there = points
    centre = (torch.arange(n, device=places.device, dtype=places.dtype) + 0.5) / n
    off, channels = centre[:, None] - places.mT[:, :, None], []  # (B, 2, n, P)
    for width in WIDTHS:
        row, column = bell((off / width).square() / 2).unbind(1)
        row = row * there[:, None]
        density = (row @ column.mT)[:, None]
        sums = (row[:, None] * values[:, :, None]) @ column[:, None].mT
        channels += [density, sums / (density + 0.1)]
    return torch.cat(channels, dim=1)


def rasterize(points, n):
    """(B, C + 1, n, n): each point in the pixel that holds it, and a mask; elsewhere 0.

    What convolutions on pixels need. It moves points by up to half a pixel, and on another grid it
    is another function.
    """
    places, values, there = points
    pixel = (places * n).long().clamp(0, n - 1)
    pixel = torch.where(there, pixel[..., 0] * n + pixel[..., 1], n * n)  # one beyond the end
    given = torch.cat([values, there[:, None].to(values.dtype)], dim=1)
    image = values.new_zeros(*given.shape[:2], n * n + 1)
    image.scatter_(2, pixel[:, None].expand_as(given), given)
    return image[:, :, :-1].unflatten(2, (n, n))


def put_back(x, points, length):
    """x (B, C, n, n) changed, as little as the kernel exp(-(r / length)^2) can, so that it has the
    values of the points: x + K(., O) (K(O, O) + NUGGET)^-1 (y - x(O))."""
    (places, values, there), n = points, x.shape[-1]
    at = places.mT  # (B, 2, P)

    def factor(at, there):
        square = (at[..., None] - at[:, :, None]).square().sum(1)
        among = bell(square / length**2) * (there[:, :, None] & there[:, None])
        among = among + NUGGET * torch.eye(at.shape[2], device=x.device)
        return [torch.linalg.cholesky_ex(among)[0]]

    (root,) = once_each(factor, at, there)
    off = (values - at_points(x, places)) * there[:, None]
    weights = torch.cholesky_solve(off.mT, root).mT  # (B, C, P)
    centre = (torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n
    row, column = bell(((centre[:, None] - at[:, :, None]) / length).square()).unbind(1)
    return x + (row[:, None] * weights[:, :, None]) @ column[:, None].mT


# -- The best linear guess -------------------------------------------------------------------------


def turned(axes, x):
    """x (B, C, n, n) with its channels along axes, (C, C) or (B, C, C)."""
    return (axes @ x.flatten(2)).view(x.shape)


class Seen(NamedTuple):
    """All that a network is told about points of functions.

    h, std: (B, C, n, n), (B, 1, n, n), the guess and how far it is off. axes: (B, C, C), as rows,
    of the channels. V: (B, C, n, n), the variances of each axis's modes. features: of
    set_convolution on the grid of h; or where a network wants pixels, `rasterize` on the image's.
    """

    h: torch.Tensor
    std: torch.Tensor
    axes: torch.Tensor
    V: torch.Tensor
    features: torch.Tensor

    def standardize(self, x):
        """What h leaves open of images x (B, C, n, n), in units of std, along the axes."""
        return turned(self.axes, (x - self.h) / self.std)

    def restore(self, r):
        """x (B, C, n, n), of which r is what h leaves open."""
        return self.h + self.std * turned(self.axes.mT, r)


class LinearGuess(nn.Module):
    """The best linear guess of a function from points of it: kriging with the images' covariance.

    The training images are functions of s x s cosine modes. So are their mean m and covariance K:
    with b(u) the row of s^2 numbers that takes pixels to the value at a place u, K(u, u') =
    b(u) K b(u')^T, whatever u and u'. That gives at any place, and so on any grid,

        h(u) = m(u) + K(u, O) K(O, O)^-1 (y - m(O))
        v(u) = (K(u, u) - K(u, O) K(O, O)^-1 K(O, u)) (nu + |y - m(O)|^2) / (nu + number of O)

    of which the pixels of the s x s grid hold all there is. |d|^2 is d^T K(O, O)^-1 d, a mean over
    channels, as a rule the number of O: an image of more contrast is off by more (a Student-t
    process, Shah et al. 2014, whose nu is 2 more). What h leaves open, (x - h) / std with std^2 =
    v / mean v, is taken to be uncorrelated between modes and between `axes`, as rows the principal
    axes of its channels; the variances, in units of mean v, are `spectrum`. Both are measured on
    training images. Next to points std^2 is LEAST.
    """

    def __init__(self, shape, fraction):
        """shape: (C, n, n) of the images; of those wider than LARGEST_SIDE the lowest modes."""
        super().__init__()
        (channels, n, _), self.fraction = shape, fraction
        side = min(n, LARGEST_SIDE)
        self.linear = LinearFill((channels, side, side), fraction)
        self.register_buffer("rest", torch.tensor(0.0))  # variance of the modes above
        self.register_buffer("nu", torch.tensor(4.0))  # points that the usual contrast is worth
        self.register_buffer("axes", torch.eye(channels))
        self.register_buffer("spectrum", torch.ones(channels, n, n) / n**2)

    @torch.no_grad()
    def learn(self, data, config):
        """From the training images."""
        some, rest = set_apart(data)
        n, side = data.shape[-1], len(self.linear.mean[0])

        def read(i):
            return to_float(data.images[i])

        x = read(some)
        lowest, masks = resize(x, side), make_masks(some, 0, side, config)
        self.linear.fit(((resize(read(i), side), None) for i in rest), (lowest, *masks))
        self.linear.measure(lowest, *masks)
        self.rest.copy_((x.square().mean() - lowest.square().mean()).clamp(min=0))
        mask, _ = make_masks(some, 0, n, config)
        left, mean = [], 0
        for part, where in zip(x.split(64), mask.split(64), strict=True):
            h, std, v = self.with_std(points_of(part, where))
            left.append((part - h) / std)
            mean = mean + v.sum()
        left = torch.cat(left)
        flat = left.transpose(0, 1).flatten(1)
        axes = torch.linalg.eigh(flat @ flat.T)[1].mT
        # Either sign is an axis: the same one in every process.
        self.axes.copy_(torch.where(axes.sum(1, keepdim=True) < 0, -axes, axes))
        square = (dct(turned(self.axes, left)) / n).square().sum(0)
        self.spectrum.copy_((square + 1e-6 * square.mean()) / mean)

    def forward(self, points):
        """(h, v), (B, C, n, n) and (B, 1, n, n)."""
        few = len(points.places)
        if points.places.is_cpu:  # as many as a cache has room for
            size = points.places.shape[1] * len(self.linear.covariance)
            few = max(CACHED // max(size, 1), 1)
        parts = zip(*(x.split(few) for x in points), strict=True)
        parts = [self._solve(Points(*part)) for part in parts]
        return [torch.cat(x) for x in zip(*parts, strict=True)]

    def _solve(self, points):
        (places, values, there), n = points, self.spectrum.shape[-1]
        mean, K = self.linear.mean.flatten(1), self.linear.covariance
        side, whole = len(self.linear.mean[0]), torch.eye(places.shape[1], device=K.device)
        at = places * side - 0.5
        pixel = at.round()
        if ((at - pixel).abs() < 1e-3).all():  # on the grid: rows of K, and no product with it
            o = (pixel[..., 0] * side + pixel[..., 1]).long()
            cross, among, middle = K[o], K[o[:, :, None], o[:, None]], mean[:, o].transpose(0, 1)
        else:
            waves = cosines(places, side) @ dct_matrix(side, K.device)
            b = (waves[..., 0, :, None] * waves[..., 1, None, :]).flatten(2)
            cross = b @ K  # (B, P, s^2)
            among, middle = cross @ b.mT, mean @ b.mT
        both = there[:, :, None] & there[:, None]
        among = torch.where(both, among, 0) + (self.rest + 1e-6 + ~there[:, :, None]) * whole
        cross, off = cross * there[:, :, None], (values - middle) * there[:, None]
        factor = torch.linalg.cholesky_ex(among)[0]
        inverse = torch.linalg.solve_triangular(factor, whole.expand_as(factor), upper=False)
        half, white = inverse @ cross, inverse @ off.mT
        h = (white.mT @ half + mean).unflatten(2, (side, side))
        v = (K.diagonal() - half.square().sum(1)).clamp(min=1e-5) + self.rest
        contrast = (self.nu + white.square().mean(2).sum(1)) / (self.nu + there.sum(1))
        v = v.view(-1, 1, side, side) * contrast.view(-1, 1, 1, 1)
        if side < n:
            h = resize(h, n)
            v = nn.functional.interpolate(v, size=n, mode="bilinear")
        return h, v

    def with_std(self, points):
        """(h, std, mean of v, (B, 1, 1, 1)): v is std^2 times that, where std^2 is above LEAST."""
        h, v = self(points)
        mean = v.mean((2, 3), keepdim=True)
        return h, (v / mean).clamp(min=LEAST).sqrt(), mean

    def see(self, points, size, as_points=True):
        """Seen by a network. size: of the image that is wanted, where features are pixels."""
        h, std, mean = self.with_std(points)
        features = set_convolution(points, h.shape[-1]) if as_points else rasterize(points, size)
        axes = self.axes.expand(len(h), -1, -1)
        return Seen(h, std, axes, self.spectrum * mean, features)
