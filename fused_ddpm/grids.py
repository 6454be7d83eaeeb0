"""Functions on the unit square, mirrored at its edges, on grids of pixels: transforms and noise.

A grid of n x n pixels stands for the function of its n x n cosine modes, which are orthogonal at
the pixel centres. On a finer grid a function has the same coefficients, times the ratio of sides.
"""

import functools
import math

import torch


def cosines(places, n):
    """The orthonormal cosine modes (..., n) of a grid of n pixels at places (...) in [0, 1]."""
    k = torch.arange(n, device=places.device, dtype=places.dtype)
    return torch.cos(math.pi * k * places[..., None]) * torch.where(k == 0, 1 / n, 2 / n).sqrt()


@functools.cache
def dct_matrix(n, device):
    """The orthonormal DCT-II: its rows are cosines. At these sizes two products beat an FFT."""
    return cosines((torch.arange(n, dtype=torch.float64) + 0.5) / n, n).T.float().to(device)


def dct(x):
    """Cosine coefficients (..., n, n) of images (..., n, n), proportional to n."""
    matrix = dct_matrix(x.shape[-1], x.device)
    return matrix @ x @ matrix.T


def idct(u):
    matrix = dct_matrix(u.shape[-1], u.device)
    return matrix.T @ u @ matrix


@functools.cache
def resize_matrix(size, n, device):
    """(n, size): values at `size` pixel centres to those at n, by the cosine modes of both."""
    k = min(size, n)
    matrix = dct_matrix(n, "cpu")[:k].double().T @ dct_matrix(size, "cpu")[:k].double()
    return (matrix * (n / size) ** 0.5).float().to(device)


def cached(make, *args):
    return make(*args)


def prepare_to_compile():
    """Else torch.compile makes the matrices anew in each call. It takes seconds, so only then."""
    global cached
    cached = torch.compiler.assume_constant_result(cached)


def along_both(matrix, x):
    """matrix (m, n) on rows and columns of x (B, C, n, n) -> (B, C, m, m), channels last."""
    B, C, n, _ = x.shape
    m = len(matrix)
    x = matrix @ x.permute(0, 2, 3, 1).reshape(B, n, n * C)  # (B, m, n C)
    x = matrix @ x.view(B * m, n, C)
    return x.view(B, m, m, C).permute(0, 3, 1, 2)


def resize(x, n):
    """Band-limited resampling (B, C, size, size) -> (B, C, n, n)."""
    if x.shape[-1] == n:
        return x
    matrix = cached(resize_matrix, x.shape[-1], n, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return along_both(matrix, x.float())


# -- Smooth noise ----------------------------------------------------------------------------------


@functools.cache
def noise_scale(n, length, device):
    """Deviations (n, n) of modes divided by n, of noise with covariance exp(-(r / length)^2)."""
    k = torch.arange(n, dtype=torch.float64)
    spectrum = length * math.pi**0.5 * torch.exp(-((math.pi * k * length) ** 2) / 4)
    return (spectrum[:, None] * spectrum).sqrt().float().to(device)


def gp_noise(white, length):
    """Such noise from white noise (B, C, n, n), as modes divided by n. Its variance is 1 inside the
    image, if the grid resolves it, 2 at an edge and 4 in a corner."""
    return noise_scale(white.shape[-1], length, white.device) * white
