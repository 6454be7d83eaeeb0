"""How near a reconstruction comes. Images are float (N, C, H, W) in [0, 1]."""

from fused_ddpm.fill import gaussian_blur

import numpy as np
import torch
import torch.nn as nn


def psnr(x, truth, where):
    """Decibels over the pixels of `where` (N, 1, H, W), each image by itself, then the mean."""
    where = where.expand_as(x)
    mse = ((x - truth) ** 2 * where).sum((1, 2, 3)) / where.sum((1, 2, 3))
    return (-10 * mse.clamp(min=1e-10).log10()).mean().item()


def ssim(x, truth, where):
    """Structural similarity (Wang et al. 2004; Gaussian window, sigma 1.5), mean over `where`."""
    inside = gaussian_blur(truth * 0 + 1, 1.5)

    def mean(image):
        return gaussian_blur(image, 1.5) / inside

    mx, my = mean(x), mean(truth)
    vx, vy = mean(x * x) - mx * mx, mean(truth * truth) - my * my
    covariance = mean(x * truth) - mx * my
    luminance = (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (vx + vy + 0.03**2)
    return (luminance * structure)[where.expand_as(x)].mean().item()


def compare(guesses, truth, where):
    """{"psnr": {name: dB}, "ssim": {name: ...}} of guesses {name: images} over `where`."""
    measures = {"psnr": psnr, "ssim": ssim}
    return {
        measure: {name: of(guess, truth, where) for name, guess in guesses.items()}
        for measure, of in measures.items()
    }


def crps(draws, truth, where):
    """Fair continuous ranked probability score of K draws (K, N, C, H, W), mean over `where`.

    mean |x_k - y| - sum |x_k - x_l| / (2 K (K - 1)): least for draws from the truth's own
    distribution, whatever K (Ferro 2014).
    """
    k = len(draws)
    error = (draws - truth).abs().mean(0)
    order = torch.arange(k, dtype=draws.dtype).view(-1, 1, 1, 1, 1)
    between = ((2 * order - k + 1) * draws.sort(0).values).sum(0) / (k * (k - 1))
    return (error - between)[where.expand_as(truth)].mean().item()


def spread_over_skill(draws, truth, where):
    """sqrt((1 + 1/K) mean variance / mean squared error of the mean): 1 for exchangeable draws."""
    where, k = where.expand_as(truth), len(draws)
    variance = draws.var(0)[where].mean()
    error = ((draws.mean(0) - truth) ** 2)[where].mean()
    return ((1 + 1 / k) * variance / error.clamp(min=1e-12)).sqrt().item()


def rank_histogram(draws, truth, where):
    """How often the truth has rank 0..K among the draws, shares (K + 1,): 1 / (K + 1) each, if it
    could be one of them. Where the truth is in 8 bits so are the draws, and ties, as of plain
    black, are split evenly (Hamill 2001)."""
    levels = (255 * truth).round()
    if (255 * truth - levels).abs().max() < 0.01:
        draws, truth = (255 * draws).round(), levels
    where, k = where.expand_as(truth), len(draws)
    below = (draws < truth).sum(0)[where]
    ties = (draws == truth).sum(0)[where]
    histogram = torch.zeros(k + 1, dtype=torch.float64)
    for t in range(k + 1):
        rank, share = below[ties == t], 1 / (t + 1)
        for step in range(t + 1):
            histogram += torch.bincount(rank + step, minlength=k + 1) * share
    return (histogram / histogram.sum()).tolist()


class Intervals(nn.Module):
    """From the spread of K draws to how far off their mean is, learnt on held-out images.

    Pixels are sorted by the draws' spread into bins, in each of which 50 and 90% of the errors are
    below the spread times a factor; between the bins' centres the factors go on linearly in
    log-log. So an interval holds for flat and for busy pixels alike. Kept in the checkpoint.
    """

    LEVELS = (0.5, 0.9)
    FLOOR = 1e-3  # of spreads and widths: a quarter of a grey level

    def __init__(self, bins=8):
        super().__init__()
        self.register_buffer("log_spread", torch.linspace(-7, 0, bins))
        gaussian = torch.tensor([[0.6745], [1.6449]]).log()  # at first
        self.register_buffer("log_factor", gaussian.repeat(1, bins))  # (levels, bins)
        self.register_buffer("fitted_to", torch.tensor([0, 0]))  # K draws of S steps

    def fit_to(self, config):
        """Whether they are for draws as config makes them."""
        return self.fitted_to.tolist() == [config.num_draws, config.sample_steps]

    @torch.no_grad()
    def fit(self, found, steps):
        """To the draws of held-out images, made in so many steps. found: see evaluate."""
        draws, truth, where = found["draws"], found["truth"], unseen(found)
        where = where.expand_as(truth)
        if len(draws) < 2 or where.sum() < len(self.log_spread):  # nothing to learn from
            return
        self.fitted_to.copy_(torch.tensor([len(draws), steps]))
        spread = draws.std(0)[where].clamp(min=self.FLOOR).log()
        error = (draws.mean(0) - truth).abs()[where]
        bins = spread.argsort().tensor_split(len(self.log_spread))
        self.log_spread.copy_(torch.stack([spread[part].mean() for part in bins]))
        for factor, level in zip(self.log_factor, self.LEVELS, strict=True):
            width = torch.stack([sorted_at(error[part], level) for part in bins])
            factor.copy_(width.clamp(min=self.FLOOR).log() - self.log_spread)

    def half_width(self, draws, level=0.9):
        """The interval is the mean of the draws (K, N, C, H, W) plus or minus this."""
        spread = draws.std(0).clamp(min=self.FLOOR).log().cpu()
        table = self.log_spread.tolist(), self.log_factor[self.LEVELS.index(level)].tolist()
        factor = torch.from_numpy(np.interp(spread.numpy(), *table))
        return (spread + factor).exp().to(draws)

    def coverage(self, draws, truth, where, level=0.9):
        inside = (draws.mean(0) - truth).abs() <= self.half_width(draws, level)
        return inside[where.expand_as(truth)].float().mean().item()


def sorted_at(values, share):
    """The quantile, also of more values than torch.quantile takes."""
    return values.sort().values[min(int(share * len(values)), len(values) - 1)]


def calibration(draws, truth, where, intervals=None):
    """By name: how far K draws are from draws of the posterior, over `where`."""
    k, ranks = len(draws), rank_histogram(draws, truth, where)
    found = {
        "crps": crps(draws, truth, where),
        "spread_over_skill": spread_over_skill(draws, truth, where),
        "within_draws": sum(ranks[1:-1]),
        "within_draws_expected": (k - 1) / (k + 1),
        "rank_histogram": ranks,
    }
    for level in Intervals.LEVELS if intervals else []:
        found[f"interval_{level:.0%}"] = intervals.coverage(draws, truth, where, level)
    return found


def unseen(found):
    """bool (N, 1, H, W): the pixels to judge by, those not seen of which there is a truth."""
    return ~found["cond_mask"] & found.get("observed", torch.tensor(True))


def evaluate(found, intervals=None):
    """All measures of what a script's `reconstruct` found, over the unseen pixels, by name.

    found: truth, cond_mask, target_mask, draws (K, N, C, H, W), observed if not all of the truth is
    there, and by their own names other reconstructions (N, C, H, W), values in [0, 1]. "query":
    over the target pixels; "foreground": calibration over pixels that are not plain black.
    """
    truth, draws, where = found["truth"], found["draws"], unseen(found)
    others = {k: x for k, x in found.items() if k in CALLED and x.shape == truth.shape}
    guesses = {"draw": draws[0], "mean": draws.mean(0)} | others
    measured = compare(guesses, truth, where=where)
    measured["query"] = compare(guesses, truth, where=found["target_mask"])
    if len(draws) > 1:
        foreground = where & (truth.amax(1, keepdim=True) > 0.03)
        measured["calibration"] = calibration(draws, truth, where, intervals)
        measured["foreground"] = calibration(draws, truth, foreground, intervals)
    if "gaussian_std" in found:
        error = (found["gaussian"] - truth).abs() / found["gaussian_std"].clamp(min=1e-6)
        inside = error[where.expand_as(error)] < 1.6449
        measured["gaussian_interval_90%"] = inside.float().mean().item()
    sparsity = found["cond_mask"].float().mean().item()
    return measured | {"num_images": len(truth), "num_draws": len(draws), "sparsity": sparsity}


CALLED = {
    "draw": "one draw",
    "mean": "mean of {}",
    "regression": "regression",
    "gaussian": "Gaussian",
    "linear": "first guess",
    "convolution": "convolution",
}


def table(metrics, where="unseen"):
    """The same as lines of text, of the unseen pixels or of the "query" pixels among them."""
    measured = metrics["query"] if where == "query" else metrics
    lines = [f"{metrics['num_images']} test images, {where} pixels only:"]
    for key, name in CALLED.items():
        if key in measured["psnr"]:
            name = name.format(metrics["num_draws"])
            decibels, similarity = measured["psnr"][key], measured["ssim"][key]
            lines.append(f"  {name:14} PSNR {decibels:5.2f} dB   SSIM {similarity:.3f}")
    if where == "unseen" and "calibration" in metrics:
        c = metrics["calibration"]
        lines.append(
            f"  draws: spread over skill {c['spread_over_skill']:.2f}, CRPS {c['crps']:.4f}, truth "
            f"within them {c['within_draws']:.1%} (should be {c['within_draws_expected']:.1%})"
        )
    return "\n".join(lines)
