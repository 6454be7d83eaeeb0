"""The best linear guess of a sparse image: what the network starts from."""

import itertools
import math
from dataclasses import replace

from fused_ddpm.fill import set_convolution
from fused_ddpm.masks import make_masks, observe, pattern_names, places_of
from fused_ddpm.ops import fused
from fused_ddpm.processes import rank, wait

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm


class LinearFill(nn.Module):
    """The best linear guess of an image from its seen pixels, and how far off it is.

    The conditional mean of a Gaussian with the mean m and the covariance K of the training images
    (optimal interpolation, kriging), K between pixels and shared by the channels; O: the seen ones.

        filled = m + K_:O K_OO^-1 (x_O - m_O)

    Its exact variance would cost more than the network. How much the seen pixels say of a pixel,
    each by itself, orders pixels nearly as well; what that means in squared error is a table,
    measured on training images that m and K are not of. All is kept in the checkpoint. Images wider
    than LARGEST_SIDE are filled by set_convolution instead, whose density takes that part.
    """

    def __init__(self, shape, fraction, bins=16):
        """shape: (C, H, W); fraction: of the pixels that are seen, as a rule."""
        super().__init__()
        _, height, width = shape
        n = height * width if max(height, width) <= LARGEST_SIDE else 0
        self.fraction = fraction
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("covariance", torch.eye(n))
        self.register_buffer("said", torch.zeros(n, n), persistent=False)
        self.register_buffer("root", None, persistent=False)  # of the covariance, once needed
        self.register_buffer("place", torch.linspace(-7, 0, bins))  # log of a variance
        self.register_buffer("log_variance", torch.linspace(-7, 0, bins))
        self.register_buffer("scored", torch.tensor(1.0))  # fraction, where the fewest are seen
        self.register_load_state_dict_post_hook(lambda fill, _: fill._compare())

    def learn(self, run, data, config):
        """Mean and covariance of most of the training images; how far off it is, of the others."""
        some, rest = set_apart(data)
        size = config.image_size

        def read(i):
            return observe(data.train[i], run.seeds(i), config.observed_only)

        def held_out(config):
            return x, *make_masks(run.seeds(some), 0, size, config, observed)

        x, observed = read(some)
        self.fit(map(read, rest), held_out(replace(config, mask_pattern="random")))
        names, path = pattern_names(config), str(run.dir / "mask.npy")
        if "learned" in names:
            run.write("mask.npy", telling_order(self.covariance).view(size, size).numpy())
            wait()
            config.mask_pattern = ",".join(path if name == "learned" else name for name in names)
        self.measure(*held_out(config))
        fewest = replace(config, sparsity=config.sparsity[:1])
        self.scored.copy_(held_out(fewest)[2].float().mean())

    @torch.no_grad()
    def fit(self, batches, held_out=None):
        """From pairs of images (N, C, H, W) in [-1, 1] and what there is of them, bool (N, 1, H, W)
        or None for all. Where few of them show both of two pixels, the mean over all pairs at the
        same distance counts too: as much as is best for those held_out, as measure takes them.
        Where pixels are missing that is but a start, if there are any to judge: see _completed.
        """
        n, middle = len(self.covariance), None  # middle: near the mean, for precision
        squares, both, shown, sums = 0, 0, 0, 0
        kept, room = [], 2**24 // n if n else 0  # some of those with gaps
        for x, observed in batches:
            there = torch.ones_like(x[:, :1]) if observed is None else observed.to(x.dtype)
            if room > 0 and not there.all():
                kept.append((x, observed))
                room -= len(x)
            if middle is None:
                middle = (x * there).sum() / there.expand_as(x).sum()
            off = (x - middle) * there
            shown, sums = shown + there.sum(0), sums + off.sum(0)
            if n:
                there = there.expand_as(x).flatten(2).flatten(0, 1)
                off = off.flatten(2).flatten(0, 1)
                squares = squares + off.T @ off
                both = both + (len(off) if observed is None else there.T @ there)
        mean = (sums + 10 * sums.sum() / shown.sum() / len(sums)) / (shown + 10)
        if not n:
            self.mean.copy_(middle + mean)
            return
        judges = held_out and [x[:512] for x in held_out]
        if judges and not judges[2].any():  # nothing is scored
            judges = None
        least = self._choose(math.inf, middle, mean, squares, both, judges)
        for _ in range(COMPLETIONS if kept and judges else 0):
            before, least = least, self._choose(least, *self._completed(kept), judges)
            if least == before:
                break
        self._compare()

    def _choose(self, least, middle, mean, squares, both, judges):
        """The least squared error for the judges: so far, or if that is less by this mean, of what
        is off from middle, and its sums of products, both their numbers. These then are kept, and
        without judges in any case."""
        off = squares - mean.flatten(1).T @ mean.flatten(1) / len(mean) * both
        typical = by_distance(off, both, *mean.shape[1:])
        best = self.mean.clone(), self.covariance.clone()
        self.mean.copy_(middle + mean)
        for prior in PRIORS if judges else PRIORS[:1]:
            self.covariance.copy_(shrunk(off, both, typical, prior))
            error = self._errors(*judges)[0].mean().item() if judges else 0
            if error < least:
                least, best = error, (self.mean.clone(), self.covariance.clone())
        self.mean.copy_(best[0])
        self.covariance.copy_(best[1])
        return least

    def _completed(self, batches):
        """What _choose takes, from middle to both, of images completed by a draw each.

        Stochastic EM (Celeux & Diebolt 1985): of pairs of which few images show both, those images
        alone say little; here all pixels of an image have a say. The draw is of a model of lower
        rank, y = W a + e (Tipping & Bishop 1999), since it is made of thousands of images.
        """
        values, vectors = (x.float() for x in torch.linalg.eigh(self.covariance.double()))
        waves = min(RANK, len(values) // 2)
        noise = values[:-waves].mean().clamp(min=RIDGE)
        W = vectors[:, -waves:] * (values[-waves:] - noise).clamp(min=0).sqrt()
        g = torch.Generator(W.device).manual_seed(0)
        sums, squares, count = 0, 0, 0
        few = max(2**18 // len(W), 1)  # whose WO fit in memory
        pieces = (zip(*(tensor.split(few) for tensor in pair), strict=True) for pair in batches)
        pieces = list(itertools.chain(*pieces))
        for x, observed in tqdm(pieces, "completing images", leave=False, disable=rank() > 0):
            there = observed.flatten(1).to(W.dtype)[:, None]  # (N, 1, H W)
            off = (x - self.mean).flatten(2) * there
            WO = W * there.transpose(1, 2)
            precision = WO.transpose(1, 2) @ WO
            precision.diagonal(dim1=1, dim2=2).add_(noise)
            y = torch.randn(*off.shape[:2], waves, generator=g, device=W.device) @ W.T
            y += noise.sqrt() * torch.randn(y.shape, generator=g, device=W.device)
            root = torch.linalg.cholesky_ex(precision)[0]
            a = torch.cholesky_solve(((off - y) @ WO).transpose(1, 2), root)
            y = torch.where(there > 0, off, y + a.transpose(1, 2) @ W.T)
            sums, count = sums + y.sum(0), count + len(y)
            y = y.flatten(0, 1)
            squares = squares + y.T @ y
        mean = (sums / (count + 10)).view_as(self.mean)
        return self.mean, mean, squares, count * len(mean)

    def _compare(self):
        """What a pixel (row) says of another (column): r^2 / (1 - r^2), sharpened."""
        if len(self.covariance):
            self.root = None
            size = self.covariance.diagonal().sqrt()
            r2 = (self.covariance / size / size[:, None]) ** 2
            self.said.copy_((r2 / (1 - r2).clamp(min=1e-3)) ** SHARP)

    @torch.no_grad()
    def measure(self, x, mask, scored):
        """The table, from what it is off at the scored pixels of images x (N, C, H, W), in [-1, 1],
        of which the mask is seen. Both masks are bool (N, 1, H, W)."""
        error, about = self._errors(x, mask, scored)
        bins = self._bin(about).round().long()
        total = bins.bincount(error, len(self.place))
        count = bins.bincount(minlength=len(self.place))
        expected = self.place.double().exp() * error.mean() / about.mean()
        # A bin with few pixels takes, in part, the variance that it stands for.
        self.log_variance.copy_(((total + 100 * expected) / (count + 100)).log())

    def _errors(self, x, mask, scored):
        """(squared error, about) of the scored pixels, one after the other; see measure, _fill."""
        parts = zip(x.split(64), mask.split(64), strict=True)
        filled, about = map(torch.cat, zip(*[self._fill(x * m, m) for x, m in parts], strict=True))
        return ((filled - x) ** 2).mean(1, keepdim=True)[scored].double(), about[scored]

    def _bin(self, about):
        first, last = self.place[0], self.place[-1]
        where = (about.log() - first) / (last - first)
        return where.clamp(0, 1) * (len(self.place) - 1)

    def _fill(self, x, mask):
        """(filled, about): the second (N, 1, H, W) rises with the variance."""
        if not len(self.covariance):
            filled, density = set_convolution(x, mask, self.fraction)
            return filled, 1 / (1 + density)
        seen, off = mask.flatten(1), ((x - self.mean) * mask).flatten(2)
        weights = linear_weights(self.covariance, seen, off)
        filled = (weights @ self.covariance).view(x.shape) + self.mean
        said = (seen.to(x.dtype) @ self.said) ** (1 / SHARP)
        return filled, (self.covariance.diagonal() / (1 + said)).view(mask.shape)

    def couple(self, white, seen, state):
        """Noise x_T from which the state, some of the pixels, is to be drawn given the seen ones.

        white: N(0, I), (N, C, H, W), the same for all parts of a draw; masks: bool (N, 1, H, W).
        Of the state the result is N(0, I), too, but such that for DDIM without noise the parts of a
        draw fit together as those of a Gaussian would: white makes one image y of the images'
        covariance, and where it is off from its best guess by a covariance S, the noise is S^(-1/2)
        (y - guess). For a Gaussian the flow from noise to image multiplies by S^(1/2).
        """
        if not len(self.covariance):
            return white
        if self.root is None:
            self.root = torch.linalg.cholesky_ex(self.covariance.double())[0]
        y = white.flatten(2).double() @ self.root.T
        s, there, of_state = among(self.covariance, state.flatten(1))
        o, known, of_seen = among(self.covariance, seen.flatten(1))
        cross = self.covariance[o[:, :, None], s[:, None, :]]
        cross = torch.where(known[:, :, None] & there[:, None, :], cross, 0).double()
        s, o = (x[:, None].expand(-1, white.shape[1], -1) for x in (s, o))
        y_o = torch.where(known[:, None], y.gather(2, o), 0).mT
        root = torch.linalg.cholesky_ex(of_seen.double())[0]
        solved = torch.linalg.solve_triangular(root, torch.cat([cross, y_o], dim=2), upper=False)
        gain, y_o = solved[:, :, : s.shape[2]], solved[:, :, s.shape[2] :]
        values, vectors = torch.linalg.eigh(of_state.double() - gain.mT @ gain)
        off = (y.gather(2, s) - y_o.mT @ gain) @ vectors / values.clamp(min=RIDGE)[:, None].sqrt()
        flat, coupled = white.flatten(2), (off @ vectors.mT).to(white.dtype)
        coupled = torch.where(there[:, None], coupled, flat.gather(2, s))
        return flat.scatter(2, s, coupled).view_as(white)

    def forward(self, x, mask, state):
        """(x, mask, state, filled, variance): all that a network is told about a sparse image.

        x: (N, C, H, W), 0 where mask, bool (N, 1, H, W), is not set; state: like mask, where x_t
        is; both are returned as 0 and 1 of x's dtype, which is faster to reckon with. filled: like
        x. variance: of its error, (N, 1, H, W).
        """
        filled, about = self._fill(x, mask)
        where = self._bin(about)
        low = where.floor().long().clamp(max=len(self.place) - 2)
        table = self.log_variance
        variance = torch.lerp(table[low], table[low + 1], where - low).exp()
        mask, state = mask.to(x.dtype), state.to(x.dtype)
        return x, mask, state, filled, variance.clamp(min=1e-5)

    def parts(self, unseen):
        """In how many parts this fraction of the pixels is as large as what training scored, on
        average, where it saw the fewest pixels."""
        return max(math.ceil(unseen / self.scored.item() - 0.01), 1)


LARGEST_SIDE = 64  # of images filled with the covariance of their pixels
PRIORS = 100, 1000, 10**4, 10**5  # rows of data that the mean over pairs at a distance is worth
COMPLETIONS, RANK = 2, 150  # how often, and by a model of what rank, missing pixels are drawn
RIDGE = 1e-4  # added to variances: no pixel is known better than that
SHARP = 3  # how much more the most telling one of the seen pixels counts


def among(covariance, mask):
    """(places (N, M), whether there is one, their covariance (N, M, M)) of the pixels that are set
    in a mask (N, n); where an image has fewer than M, rows of the unit matrix."""
    o, there = places_of(mask)
    found = covariance[o[:, :, None], o[:, None, :]]
    if not there.all():
        both = there[:, :, None] & there[:, None, :]
        unit = torch.eye(o.shape[1], dtype=found.dtype, device=found.device)
        found = torch.where(both, found, unit)
    return o, there, found


def linear_weights_reference(covariance, mask, off):
    """linear_weights in PyTorch."""
    o, there, matrix = among(covariance, mask)
    at = o[:, None].expand(-1, off.shape[1], -1)
    root = torch.linalg.cholesky_ex(matrix)[0]
    weights = torch.cholesky_solve(off.gather(2, at).mT, root).mT * there[:, None]
    return torch.zeros_like(off).scatter_(2, at, weights)


def linear_weights(covariance, mask, off):
    """K_OO^-1 off_O, where O are the pixels that are set in an image's mask; elsewhere 0.

    covariance K: (n, n). mask: bool (N, n). off: (N, C, n), like what is returned; finite. The
    kernel, of a CPU alone, passes no gradient.
    """
    if off.is_cpu and fused(off.device) and not off.requires_grad:
        return torch.ops.fused_ddpm.linear_weights(covariance, mask, off)
    return linear_weights_reference(covariance, mask, off)


def once_each(function, *inputs):
    """function(*inputs), tensors of which a row depends on that row of the inputs (B, ...) alone:
    computed once where rows repeat the one before, as those of an image's draws do."""
    if inputs[0].device.type != "cpu":  # it would cost more to wait for the answer
        return function(*inputs)
    new = torch.ones(len(inputs[0]), dtype=torch.bool)
    new[1:] = torch.stack([(x[1:] != x[:-1]).flatten(1).any(1) for x in inputs]).any(0)
    which = new.cumsum(0) - 1
    return [x[which] for x in function(*(x[new] for x in inputs))]


def set_apart(data):
    """(index, batches of indices), int64: of a few training images to judge with, of the others."""
    index, pixels = torch.arange(len(data.images), device=data.images.device), data.shape[-1] ** 2
    few = min(2**22 // pixels, max(len(index) // 8, 16))
    rest = index[few:] if len(index) > few else index
    return index[:few], rest[: 2**26 // pixels].split(4096)


def by_distance(off, count, h, w):
    """A covariance (h w, h w) of the distance alone: each the mean over all pairs at the same.

    off, count: sums of products, and how many there were of each.
    """
    place = torch.arange(h * w, device=off.device)
    row, column = place // w, place % w
    down, right = row[:, None] - row, column[:, None] - column
    pair = (down + h) * (2 * w) + right + w
    count = torch.as_tensor(count, dtype=off.dtype, device=off.device).expand_as(off)
    sums, pairs = (pair.flatten().bincount(x.flatten().double()) for x in (off, count))
    typical = (sums / pairs.clamp(min=1)).to(off.dtype)[pair]
    return typical * (1 - down.abs() / h) * (1 - right.abs() / w)  # so it is a covariance


def shrunk(off, count, typical, prior):
    """The covariance from sums of products, as if `prior` more of each had been typical."""
    count = torch.as_tensor(count, dtype=off.dtype, device=off.device)
    K = (off + prior * typical) / (count + prior)
    if count.min() < count.max():  # each entry from other images: make it a covariance again
        values, vectors = torch.linalg.eigh(K.double())
        K = ((vectors * values.clamp(min=0)) @ vectors.T).to(off.dtype)
    return K + RIDGE * torch.eye(len(K), device=off.device)


def telling_order(covariance, count=None):
    """Ranks int64 (D,) of values by what to measure next: each the one of largest variance given
    those before it (pivoted Cholesky; Shewry & Wynn 1987). After count, by what variance is left.
    """
    left = covariance.diagonal().double().cpu().clone()
    covariance, chosen = covariance.double().cpu(), []
    factor = torch.zeros(count or len(left), len(left), dtype=torch.float64)
    for k, row in enumerate(factor):
        pivot = left.argmax()
        if left[pivot] <= 0:
            break
        row.copy_((covariance[pivot] - factor[:k, pivot] @ factor[:k]) / left[pivot].sqrt())
        left.sub_(row**2)[pivot] = -math.inf
        chosen.append(pivot)
    order = torch.stack([*chosen, *left.argsort(descending=True)[: len(left) - len(chosen)]])
    return order.argsort()


def where_next(draws, observed, count):
    """[(row, column, variance it removes, share of all that is removed by then)], what to measure
    next: each the pixel of largest variance given those before it, as in telling_order.

    draws: (K, H, W, C), observed: bool (H, W), of numpy. A few draws tell variances but hardly
    covariances, so correlations are a Gaussian of the distance instead, a third as wide as the
    seen pixels are apart.
    """
    variance = np.where(observed, 0, draws.var(0, ddof=1, dtype=np.float64).sum(-1))
    std, left, total = np.sqrt(variance), variance.copy(), variance.sum()
    row, column = np.ogrid[: observed.shape[0], : observed.shape[1]]
    found, factors, removed = [], [], 0.0
    for _ in range(count):
        y, x = np.unravel_index(left.argmax(), left.shape)
        if left[y, x] <= 0:
            break
        square = ((row - y) ** 2 + (column - x) ** 2) * observed.mean()
        factor = std[y, x] * std * np.exp(-4.5 * square)
        for other in factors:
            factor -= other[y, x] * other
        factor /= np.sqrt(left[y, x])
        factors.append(factor.astype(np.float32))
        left = (left - factor**2).clip(0)
        left[y, x] = 0
        removed += (factor**2).sum()
        found.append((int(y), int(x), float((factor**2).sum()), float(removed / total)))
    return found
