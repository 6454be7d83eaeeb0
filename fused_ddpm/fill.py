"""Filling in without a network: what a network starts from, and has to beat."""

import copy
import functools
import math
from pathlib import Path

from fused_ddpm.files import write
from fused_ddpm.images import to_float, to_unit
from fused_ddpm.processes import from_first, rank

import numpy as np
import torch


@functools.cache
def gaussian_matrix(n, sigma, device):
    """(n, n): row i has a Gaussian of sigma pixels around i, cut at 3 sigma; zero outside."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    reach = math.ceil(3 * sigma)
    total = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).sum()
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= reach)
    return (kernel / total).to(device)


def gaussian_blur(x, sigma):
    """x (..., H, W), zero outside, with a Gaussian of sigma pixels, cut at 3 sigma.

    By two matrix products: at these sizes faster than convolutions, however wide the Gaussian.
    """
    rows = gaussian_matrix(x.shape[-2], sigma, x.device)
    columns = gaussian_matrix(x.shape[-1], sigma, x.device)
    return rows @ x @ columns


def set_convolution(x, mask, fraction):
    """(filled, density), (N, C, H, W) and (N, 1, H, W): Gordon et al. 2020 (ConvCNP).

    Each pixel of `filled` is a Gaussian-weighted mean of the seen ones: normalised convolution
    (Knutsson & Westin 1993). x: (N, C, H, W); mask: bool (N, 1, H, W), about `fraction` of the
    pixels. The Gaussian's width follows the fraction; two wider ones take over where no seen pixel
    is near. density: sum of the first Gaussian over the seen pixels, about 1 on average.
    """
    seen, sigma = mask.to(x.dtype), 0.5 / fraction**0.5
    near = gaussian_blur(seen, sigma)
    weight, value = near, gaussian_blur(x * seen, sigma)
    for wider, share in [(4, 1e-4), (16, 1e-8)]:
        weight = weight + share * gaussian_blur(seen, wider * sigma)
        value = value + share * gaussian_blur(x * seen, wider * sigma)
    return value / weight.clamp(min=1e-30), near / fraction


def interpolate(x, mask, fraction):
    """x (N, C, H, W) where mask (N, 1, H, W) is set, and filled by set_convolution elsewhere."""
    return torch.where(mask, x, set_convolution(x, mask, fraction)[0])


class GaussianFill:
    """The conditional mean of a Gaussian: what the best linear method can do.

    Optimal interpolation, or kriging with the data's own covariance. With mean m and covariance S,

        x_U = m_U + S_UO S_OO^-1 (x_O - m_O),    variance S_UU - S_UO S_OO^-1 S_OU

    O the seen values, U the others. One float64 Cholesky factor an image: O(|O|^2 (|O| + |U|)).
    """

    def __init__(self, mean, covariance):
        """mean: (D,), covariance: (D, D), of flattened images, float64."""
        self.mean, self.covariance = mean, covariance

    @classmethod
    def fit(cls, images, batch=4096):
        """From images, uint8 (N, C, H, W), taken to [-1, 1], a batch at a time."""
        parts = images.flatten(1).split(batch)
        mean = sum(to_float(part).double().sum(0) for part in parts) / len(images)
        covariance = 0
        for part in parts:
            centred = to_float(part) - mean.float()
            covariance = covariance + (centred.T @ centred).double()
        ridge = 1e-5 * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        return cls(mean, covariance / len(images) + ridge)

    @classmethod
    def of(cls, data, config):
        """That of data.images, from a gaussian.npz beside the checkpoint or in out_dir; or else it
        is fitted, and left in out_dir in float32. In the first process; None in the others."""
        about = f"{data.name} {data.shape}"
        folders = [Path(config.out_dir)]
        if config.sample:
            folders.append(Path(config.sample).parent)
        there = [cls.read(folder / "gaussian.npz", about) for folder in folders if rank() == 0]
        found = next((gaussian for gaussian in there if gaussian), None)
        if not from_first(found is not None):
            images = data.images  # in all processes, of which the first may have to download
            if rank() == 0:
                fitted = cls.fit(images)
                arrays = {"mean": fitted.mean, "covariance": fitted.covariance}
                arrays = {name: x.float().cpu().numpy() for name, x in arrays.items()}
                write(Path(config.out_dir, "gaussian.npz"), arrays | {"about": np.array(about)})
                found = cls(*(torch.from_numpy(x).double() for x in arrays.values()))
        return found

    @classmethod
    def read(cls, path, about):
        """None where that is not what the file is about, or it is damaged: it can be fitted."""
        try:
            with np.load(path) as saved:
                if saved["about"] == about:
                    parts = saved["mean"], saved["covariance"]
                    return cls(*(torch.from_numpy(x).double() for x in parts))
        except Exception:  # numpy raises all sorts: OSError, KeyError, BadZipFile, ...
            return None

    def fill(self, x, mask):
        """(mean, standard deviation), each like x (N, C, H, W): x itself and 0 where mask is set.

        mask: bool (N, 1, H, W) or (N, C, H, W).
        """
        filled, spread = x.double().flatten(1).clone(), torch.zeros_like(x).double().flatten(1)
        seen = mask.expand_as(x).flatten(1)
        for row, there in enumerate(seen):
            o, u = there.nonzero()[:, 0], (~there).nonzero()[:, 0]
            factor = torch.linalg.cholesky(self.covariance[o[:, None], o])
            cross = self.covariance[o[:, None], u]
            given = (filled[row, o] - self.mean[o])[:, None]
            half = torch.linalg.solve_triangular(factor, cross, upper=False)
            whitened = torch.linalg.solve_triangular(factor, given, upper=False)
            filled[row, u] = self.mean[u] + (half.T @ whitened)[:, 0]
            left = self.covariance.diagonal()[u] - (half**2).sum(0)
            spread[row, u] = left.clamp(min=0).sqrt()
        return filled.view(x.shape).to(x.dtype), spread.view(x.shape).to(x.dtype)


LARGEST = 8192  # values of an image; a covariance of so many takes 512 MiB


def baselines(found, data, config, fill=None):
    """What fills in without a network, by name: like found["truth"] (N, C, H, W), in [0, 1].

    convolution, and of a LinearFill linear; in the first process also gaussian and gaussian_std,
    unless --no-baselines says so, the images are too large, or not all there.
    """
    truth, mask = 2 * found["truth"] - 1, found["cond_mask"]
    made = {"convolution": interpolate(truth, mask, mask.float().mean().item())}
    if fill and fill.mean.shape == truth.shape[1:]:  # sparse_ddo.py's may have fewer pixels
        fill = copy.deepcopy(fill).cpu()
        parts = zip((truth * mask).split(64), mask.split(64), strict=True)
        made["linear"] = torch.cat([fill(x, m, m)[3] for x, m in parts])
    whole = truth[0].numel() <= LARGEST and "observed" not in found
    if config.baselines and whole and (gaussian := GaussianFill.of(data, config)):
        made["gaussian"], std = gaussian.fill(truth, mask)
        made["gaussian_std"] = std - 1  # of [0, 1], in the end
    return {name: to_unit(x) for name, x in made.items()}
