"""sparse_ddo.py: transforms, noise, forward process, sampler, masks over time, runs, messages."""

import math
from dataclasses import replace
from types import SimpleNamespace

import sparse_ddo as script
from fused_ddpm import images, points
from fused_ddpm.grids import noise_scale, resize
from fused_ddpm.images import load_images, to_float
from fused_ddpm.metrics import psnr
from fused_ddpm.points import Points, Seen, at_points, points_of

import numpy as np
import pytest
import torch
from helpers import away_from_zero, exits_with, make_config, read_json, with_modes

TINY = """--data shapes --device cpu --image-size 16 --modes 8 --dim 8 --dim-mults 1 2 --steps 6
--batch-size 16 --sample-steps 4 --num-samples 4 --num-draws 2 --lr 1e-3 --save-every 99""".split()


def run(out_dir, *flags):
    torch.set_num_threads(1)  # two would wait for each other where a core is all there is
    script.main([*TINY, "--out-dir", str(out_dir), *flags])


def small_config(**changes):
    options = dict(image_size=32, sample_steps=20, length_scale=0.05, blur_min=0.0, blur_max=0.25)
    return make_config(script, **options | changes)


def a_function(n, highest):
    """Random Fourier modes up to `highest`, variance about 1, at n x n pixel centres."""
    g = torch.Generator().manual_seed(0)
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    f = torch.zeros(1, 1, n, n, dtype=torch.float64)
    for k in range(-highest, highest + 1):
        for m in range(-highest, highest + 1):
            a, b = torch.randn(2, 1, generator=g, dtype=torch.float64)
            angle = 2 * math.pi * (k * x[:, None] + m * x)
            f += a * angle.cos() + b * angle.sin()
    return (f / (2 * highest + 1)).float()


def at(t):
    """a, sigma and blur at a time, by the definition, for blurs from 0 to 0.25."""
    end = 2 / math.pi * math.atan(math.exp(-5))
    angle = math.pi / 2 * (end + (1 - 2 * end) * t)
    return math.cos(angle), math.sin(angle), 0.25 * math.sin(math.pi * t / 2) ** 2


# -- transforms, noise, forward process ------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 32, 48])
def test_dct_is_the_orthonormal_one(n):
    x = torch.randn(2, 1, n, n, generator=torch.Generator().manual_seed(0))
    u = script.dct(x)
    torch.testing.assert_close(script.idct(u), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(u.square().sum(), x.square().sum())
    place = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for k1, k2 in [(0, 0), (0, 3), (5, 2), (n - 1, n - 1)]:  # by the definition, one sum a mode
        norm = (1 if k1 == 0 else 2) ** 0.5 * (1 if k2 == 0 else 2) ** 0.5 / n
        wave = torch.cos(math.pi * k1 * place)[:, None] * torch.cos(math.pi * k2 * place)
        direct = norm * (x[:, 0].double() * wave).sum((1, 2))
        torch.testing.assert_close(u[:, 0, k1, k2].double(), direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [32, 48])
def test_noise_has_the_covariance_of_its_kernel(n):
    white = script.seeded_normal(torch.arange(4000), (n, n))
    noise = script.idct(script.gp_noise(white, 0.08)) * n

    def patch(dy, dx):  # away from the edges, which mirror it
        return noise[:, n // 3 + dy : n // 3 + dy + 8, n // 3 + dx : n // 3 + dx + 8]

    for dy, dx in [(0, 0), (0, 1), (2, 0), (2, 3), (0, 5)]:
        expected = math.exp(-(dy**2 + dx**2) / (n * 0.08) ** 2)
        found = (patch(0, 0) * patch(dy, dx)).mean().item()
        assert found == pytest.approx(expected, abs=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)


def test_modes_of_the_noise_are_the_same_on_any_grid():
    coarse, fine = (noise_scale(n, 0.05, "cpu") for n in (32, 64))
    torch.testing.assert_close(fine[:32, :32], coarse)
    mean = (1 + 0.05 * math.pi**0.5 / 2) ** 2  # of the variance, more at the edges
    assert fine.square().sum().item() == pytest.approx(mean)


def test_schedule_runs_from_image_to_noise():
    t = torch.linspace(0, 1, 101)
    a, sigma, blur = script.make_schedule(t, small_config())
    torch.testing.assert_close(a**2 + sigma**2, torch.ones_like(a))
    assert (a.diff() < 0).all() and (sigma.diff() > 0).all() and (blur.diff() > 0).all()
    log_snr = (a**2 / sigma**2).log()
    assert log_snr[0].item() == pytest.approx(10) and log_snr[-1].item() == pytest.approx(-10)
    assert log_snr[50].item() == pytest.approx(0, abs=1e-6)
    assert blur[0] == 0 and blur[-1].item() == pytest.approx(0.25)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_forward_marginals_mode_by_mode(t):
    config, count, x = small_config(), 3000, a_function(32, 6) / 3
    white = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    noise, times = script.gp_noise(white, 0.05), torch.full((count,), t)
    z = 32 * script.q_sample(x.expand(count, -1, -1, -1), times, noise, config)[:, 0]
    (a, sigma, blur), u = at(t), script.dct(x)[0, 0]
    for k1, k2 in [(0, 0), (1, 0), (3, 2), (0, 9), (14, 14)]:
        alpha = a * math.exp(-(k1**2 + k2**2) * blur**2 / 2)
        spectrum = math.exp(-(math.pi**2) * (k1**2 + k2**2) * 0.05**2 / 4)
        std = sigma * 32 * (0.05**2 * math.pi * spectrum) ** 0.5
        bound = 5 * std / count**0.5 + 1e-4
        assert z[:, k1, k2].mean().item() == pytest.approx(alpha * u[k1, k2].item(), abs=bound)
        assert z[:, k1, k2].std().item() == pytest.approx(std, rel=5 / (2 * count) ** 0.5)


# -- sampling --------------------------------------------------------------------------------------

KK = torch.arange(32.0)[:, None] ** 2 + torch.arange(32.0) ** 2
MEAN, STD = 0.1, 0.15  # the data of the closed form: a Gaussian process of this mean and deviation


class Stub:
    """A network, and of the points a guess h, off by std with variances V of its modes along axes
    of the channels."""

    def __init__(self, network, h, std, V, axes=None):
        self.network, axes = network, torch.eye(1) if axes is None else axes
        self.parts = h, std, axes[None], V.expand(1, len(axes), -1, -1), h
        self.guess = SimpleNamespace(see=self.see)

    def see(self, points, n, as_points):
        return Seen(*(x.expand(len(points.places), *x.shape[1:]) for x in self.parts))

    def __call__(self, inputs, t, seen):
        return self.network(inputs, t)


def spectrum_of(n):
    k = torch.arange(n, dtype=torch.float64)
    k2 = k[:, None] ** 2 + k**2
    return k2, n**2 * 0.05**2 * math.pi * torch.exp(-(math.pi**2) * k2 * 0.05**2 / 4)


def no_points(count):
    return Points(torch.rand(count, 1, 2), torch.zeros(count, 1, 1), torch.zeros(count, 1) > 0)


@pytest.mark.parametrize("n, steps, eta", [(32, 40, 1.0), (32, 20, 0.0), (48, 12, 0.6)])
@pytest.mark.parametrize("objective", ["residual", "x0", "eps"])
def test_gaussian_data_come_back(n, steps, eta, objective):
    """With the best network there is, mode by mode as the formulas say, and as the data are.

    Data of independent modes: then the guess of the residual is that network, and f is 0.
    """
    options = dict(objective=objective, sample_steps=steps, eta=eta, enforce_observed=False)
    config, count = small_config(image_size=n, **options), 1500
    k2, spectrum = spectrum_of(32)
    mean = torch.zeros(32, 32, dtype=torch.float64)
    mean[0, 0] = 32 * MEAN

    def of_modes(t):  # alpha_k, sigma
        a, sigma, blur = at(t)
        return a * torch.exp(-k2 * blur**2 / 2), sigma

    def best(inputs, t):  # E[r | z] = alpha / (alpha^2 + sigma^2) z, as r has the noise's spectrum
        if objective == "residual":
            return torch.zeros_like(inputs[:, :1])
        alpha, sigma = of_modes(t[0].item())
        D = (alpha**2 + sigma**2) * spectrum / 32**2 + 1e-12
        z = script.dct(inputs[:, 1:2]) * D.sqrt() * 32
        r = alpha / (alpha**2 + sigma**2) * z
        return script.idct((r if objective == "x0" else (z - alpha * r) / sigma).float())

    def closed_form(upto):  # the modes' mean and variance: exact whatever the steps
        if upto == steps:  # x itself
            return mean, STD**2 * spectrum
        alpha, sigma = of_modes((1 - upto / steps) ** 1.5)
        return 0 * mean, (alpha**2 + sigma**2) * spectrum

    h, std = (torch.full((1, 1, 32, 32), value) for value in (MEAN, STD))
    model = Stub(best, h, std, (spectrum / 32**2).float())
    sample = script.make_sampler(model, (1, 32, 32), config)
    first, *_, x = sample(torch.arange(count), no_points(count))
    big = spectrum > 1e-3 * spectrum[0, 0]
    last = script.dct(x) / n
    for z, step in (first, 1), (last, steps):
        z, (m, v) = 32 * z[:, 0, :32, :32].double(), closed_form(step)
        error = ((z.mean(0) - m) / (v / count).sqrt())[big]
        assert len(error) > 400 and error.abs().max() < 5
        assert error.square().mean().item() == pytest.approx(1, abs=0.25)
        ratio = (z.var(0) / v)[big]
        assert (ratio - 1).abs().max() < 5.5 * (2 / count) ** 0.5
        assert ratio.mean().item() == pytest.approx(1, abs=0.01)
        assert ratio.std().item() == pytest.approx((2 / count) ** 0.5, rel=0.25)
    assert n == 32 or last[:, 0, 32:].abs().max() < 1e-4  # what no training image has is not drawn


def test_draws_vary_as_much_as_the_guess_is_off():
    """Pixel by pixel, where the guess is all there is; on a finer grid, too."""
    _, prior = spectrum_of(32)
    V = (prior / prior.sum()).float()  # of variance 1 in a pixel, mirrored at the edges
    white = torch.randn(4000, 32, 32, generator=torch.Generator().manual_seed(1))
    edge = (script.idct(white * V.sqrt()) * 32).std(0)
    std = torch.linspace(0.02, 0.2, 32).expand(1, 1, 32, 32)
    model = Stub(lambda inputs, t: torch.zeros_like(inputs[:, :1]), 0 * std, std, V)
    for n in (32, 64):
        config = small_config(image_size=n, enforce_observed=False, sample_steps=10)
        *_, x = script.make_sampler(model, (1, 32, 32), config)(torch.arange(1000), no_points(1000))
        ratio = resize(x, 32).std(0)[0] / (std[0, 0] * edge)
        assert ratio.mean().item() == pytest.approx(1, abs=0.01)
        assert (ratio - 1).abs().max() < 0.15


def test_draws_have_the_channels_covariance():
    """Along its axes each of a variance of its own, at any place times std^2."""
    _, prior = spectrum_of(32)
    size = torch.tensor([1.0, 0.04, 0.25])
    V = (prior / 32**2).float() * size[:, None, None]  # of variance 1, but for the edges
    axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))[0]
    std = torch.linspace(0.1, 0.2, 32).expand(1, 1, 32, 32)
    model = Stub(lambda inputs, t: torch.zeros_like(inputs[:, :3]), 0 * std, std, V, axes)
    config = small_config(enforce_observed=False, sample_steps=10)
    *_, x = script.make_sampler(model, (3, 32, 32), config)(torch.arange(1000), no_points(1000))
    inside = (x / std)[:, :, 8:24, 8:24].transpose(0, 1).flatten(1)
    expected = axes.T @ (size[:, None] * axes)
    torch.testing.assert_close(torch.cov(inside), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_what_the_network_adds_takes_the_steps_of_ddim(eta):
    """With c and w by their definitions; and the last step has no noise."""
    config, S = small_config(eta=eta), 20
    times, table = (x.double() for x in script.sampling_table(32, config))
    signal_s, N_s, c, spread = table.unbind(1)
    torch.testing.assert_close(times, torch.linspace(1, 0.05, S).double() ** 1.5)
    k2, spectrum = spectrum_of(32)
    for i in (0, 7, S - 2):
        (a_t, sigma_t, blur_t), (a_s, sigma_s, blur_s) = (
            at(((S - j) / S) ** 1.5) for j in (i, i + 1)
        )
        alpha_t, alpha_s = (
            a * torch.exp(-k2 * b**2 / 2) for a, b in ((a_t, blur_t), (a_s, blur_s))
        )
        v = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        w = eta**2 * v * sigma_s**2 / sigma_t**2
        expected = alpha_s - alpha_t * (sigma_s**2 - w).sqrt() / sigma_t
        torch.testing.assert_close(c[i], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(spread[i] ** 2, w * spectrum / 32**2, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(signal_s[i], alpha_s**2, rtol=1e-4, atol=1e-9)
        left = (sigma_s**2 - w) * spectrum / 32**2
        torch.testing.assert_close(N_s[i], left, rtol=1e-4, atol=1e-9)
    assert (spread[-1] == 0).all() and (N_s[-1] < 2e-12).all()
    assert (signal_s[-1] == 1).all() and (c[-1] == 1).all()
    large = script.sampling_table(256, config)  # where alpha is exp(-4000)
    assert all(x.isfinite().all() for x in large)


@pytest.mark.parametrize("objective", ["residual", "x0", "eps"])
@pytest.mark.parametrize("eta, steps", [(0.0, 1), (0.0, 5), (0.7, 5), (1.0, 5)])
def test_every_step_is_that_of_the_formulas(objective, eta, steps):
    """In float64, of a network that is far from the guess and far outside of [-1, 1]."""
    config = small_config(objective=objective, eta=eta, sample_steps=steps, enforce_observed=False)
    k2, prior = spectrum_of(32)
    noise, V = prior / 32**2, (0.075 / (1 + k2) ** 1.5).expand(2, -1, -1)
    f = 2 * torch.cat([a_function(32, 3), -a_function(32, 3).mT], dim=1)
    h, std = torch.full((1, 1, 32, 32), 0.5), torch.full((1, 1, 32, 32), 0.7)
    seeds, axes = torch.arange(3), torch.eye(2)
    model = Stub(lambda inputs, t: f.expand(len(inputs), -1, -1, -1), h, std, V.float(), axes)
    *found, x = script.make_sampler(model, (2, 32, 32), config)(seeds, no_points(3))
    z = script.gp_noise(script.seeded_normal(seeds, (2, 32, 32)), 0.05).double()
    F = script.dct(f).double() / 32
    for i in range(steps):
        (a, sigma, blur), (a_s, sigma_s, blur_s) = (at((1 - j / steps) ** 1.5) for j in (i, i + 1))
        alpha, alpha_s = a * torch.exp(-k2 * blur**2 / 2), a_s * torch.exp(-k2 * blur_s**2 / 2)
        if i + 1 == steps:
            alpha_s, sigma_s = torch.ones_like(alpha), 0.0
        N, N_s = sigma**2 * noise + script.ROUNDING, sigma_s**2 * noise
        D = alpha**2 * V + N
        g = alpha * V * z / D
        if objective == "residual":
            r = g + 32 * F * (V * N / D).sqrt()
        elif objective == "x0":
            r = F
        else:
            r = (z - sigma * F) * (alpha > 1e-3) / alpha.clamp(min=1e-3)
        w = eta**2 * N_s * (1 - (alpha / alpha_s * sigma_s / sigma) ** 2)
        c = alpha_s - alpha * ((N_s - w) / (sigma**2 * noise)).sqrt()
        z = ((alpha_s**2 * V + N_s - w + script.ROUNDING) / D).sqrt() * z + c * (r - g)
        if eta:
            white = script.seeded_normal(seeds, (2, 32, 32), script.STEP_NOISE, i, steps)
            z = z + w.sqrt() * white
        if i + 1 < steps:
            torch.testing.assert_close(found[i].double(), z, rtol=1e-4, atol=1e-4 * z.abs().max())
    expected = 0.5 + 0.7 * 32 * script.idct((z if steps > 1 else r).float())
    assert x.abs().max() > 1.5
    torch.testing.assert_close(x, expected.expand_as(x), rtol=0, atol=1e-4 * x.abs().max())


def small_model(**changes):
    """A network away from its start, and a guess from a smooth covariance."""
    config = small_config(modes=16, dim=8, dim_mults=[1, 2], **changes)
    torch.manual_seed(0)
    model = away_from_zero(script.make_model((1, 32, 32), config)).eval()
    place = torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0))
    model.guess.linear.covariance.copy_(0.1 * torch.exp(-torch.cdist(place, place) / 4))
    return model, config


def low_modes(n, seed):
    """A function of 8 x 8 cosine modes, at n x n pixel centres: (2, 1, n, n)."""
    u = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return script.idct(with_modes(u, n)) * (n / 32)


def scattered(count, seed=0):
    """Points of low_modes(.., 0), off any grid."""
    places = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    return Points(places, at_points(low_modes(32, 0), places), torch.ones(2, count) > 0)


@pytest.mark.parametrize("conditioning", ["setconv", "encoder", "concat"])
@pytest.mark.parametrize("n", [24, 48, 64])
def test_the_same_function_on_another_grid(conditioning, n):
    """Given points off the grid; but not where these become pixels, whatever grid that is."""
    model, config = small_model(conditioning=conditioning, enforce_observed=False, sample_steps=5)
    points, found = scattered(100), []
    for m in (32, n):
        sample = script.make_sampler(model, (1, 32, 32), replace(config, image_size=m))
        *_, x = sample(torch.arange(2), points)
        found.append(resize(x, n))
    assert found[0].std() > 0.05
    off = (found[1] - found[0]).norm() / found[0].norm()
    assert off < 1e-6 if conditioning == "setconv" else off > 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_draws_are_the_same_functions_on_another_grid(eta):
    """With the observed values put back, which a finer grid shows too."""
    model, _ = small_model()
    points, drawn = scattered(100), {}
    for n in (32, 64):
        config = small_config(eta=eta, sample_steps=5, image_size=n)
        sample = script.make_sampler(model, (1, 32, 32), config)
        *_, drawn[n] = sample(torch.arange(2), points)
        off = at_points(drawn[n], points.places) - points.values
        assert off.abs().mean() < 2e-3  # but where two of them nearly coincide, nothing
    torch.testing.assert_close(resize(drawn[64], 32), drawn[32], rtol=0, atol=1e-4)


def test_sampler_yields_every_step_and_depends_on_seed_and_points_alone():
    model, config = small_model(sample_steps=6)
    seeds = torch.arange(5)
    cond_mask, _ = script.masks_of(seeds, 32, config)
    points = points_of(2 * torch.rand(5, 1, 32, 32) - 1, cond_mask)
    sample = script.make_sampler(model, (1, 32, 32), config)
    kept, copies = [], []
    for z in sample(seeds, points):
        kept.append(z)
        copies.append(z.clone())
    assert len(kept) == 6
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert (at_points(kept[-1], points.places) - points.values).abs().max() < 0.01
    *_, one = sample(seeds[3:4], Points(*(x[3:4] for x in points)))
    torch.testing.assert_close(one, kept[-1][3:4], rtol=0, atol=1e-4)
    *_, other = sample(seeds + 5, points)
    assert (other - kept[-1]).abs().amax((1, 2, 3)).min() > 0.01
    *_, other = sample(seeds, points._replace(values=-points.values))
    assert ((other - kept[-1]).abs() * ~cond_mask).amax((1, 2, 3)).min() > 1e-3


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch):
    """watch(out_dir, *flags): [(x_start, t, masks)] of a run's steps, as they come to the loss."""

    def watched(out_dir, *flags):
        steps = []

        def record(
            model, guess, x_start, t, noise, masks, points, config
        ):  # the loss: steps cost nothing
            if model.training:
                steps.append((x_start, t, torch.cat(list(masks), dim=1)))
            return 1 + 0 * sum(p.sum() for p in model.parameters())

        with monkeypatch.context() as m:
            m.setattr(script, "training_loss", record)
            few = "--num-samples 1 --num-draws 1 --sample-steps 1 --sample-every 99"
            run(out_dir, *flags, *few.split())
        return steps

    return watched


@pytest.mark.parametrize("mode, flip", [("fixed", False), ("fixed", True), ("random_epoch", False)])
def test_masks_are_new_in_every_epoch_or_fixed(tmp_path, watch, mode, flip):
    """Then of a mirrored image mirrored, so that an image only ever shows one set of pixels."""
    shapes, _ = load_images("shapes", image_size=16)
    own = {to_float(x).numpy().tobytes(): (i, False) for i, x in enumerate(shapes)}
    own |= {to_float(x.flip(-1)).numpy().tobytes(): (i, True) for i, x in enumerate(shapes)}
    masks, both = {}, set()
    flags = ["--mask-mode", mode, *["--flip"] * flip]
    flags += ["--steps", "39", "--seed", "3"]  # three epochs of 13 batches
    for x_start, _, pairs in watch(tmp_path, *flags):
        assert (pairs.sum((2, 3)) == 26).all() and not pairs.all(1).any()
        for x, pair in zip(x_start, pairs, strict=True):
            i, turned = own[x.numpy().tobytes()]
            masks.setdefault(i, []).append(pair.flip(-1) if turned else pair)
            both.add((i, turned))
    assert len(masks) > 150 and max(map(len, masks.values())) == 3
    for pairs in masks.values():
        different = len({pair.numpy().tobytes() for pair in pairs})
        assert different == (1 if mode == "fixed" else len(pairs))
    first = {same[0].numpy().tobytes() for same in masks.values()}
    assert len(first) == len(masks)  # each image its own
    assert len(both) > 1.6 * len(masks) if flip else not any(turned for _, turned in both)


def test_masks_depend_on_the_mask_seed_alone(tmp_path, watch):
    """Not on the seed of the run."""
    found = []
    for flags in ("--seed 1", "--seed 2", "--seed 2 --mask-seed 43"):
        out_dir = tmp_path / str(len(found))
        steps = watch(out_dir, *flags.split(), "--steps", "13")
        pairs = (pair for x, _, masks in steps for pair in zip(x, masks, strict=True))
        found.append({x.numpy().tobytes(): masks for x, masks in pairs})
    one, two, other = found
    both = one.keys() & two.keys()  # an epoch leaves a few out, each seed others
    assert len(both) > 150 and all(torch.equal(one[x], two[x]) for x in both)
    assert not any(torch.equal(two[x], other[x]) for x in two)


def test_times_are_spread_evenly_over_a_batch(tmp_path, watch):
    times = [t ** (1 / 1.4) for _, t, _ in watch(tmp_path, "--steps", "12")]  # more are near 0
    for t in times:
        assert 0 <= t.min() and t.max() < 1
        gaps = torch.full((15,), 1 / 16)
        torch.testing.assert_close(t.sort().values.diff(), gaps, rtol=0, atol=1e-5)
    starts = torch.stack([t.min() for t in times])  # new in each step, anywhere in a gap
    assert len(starts.unique()) == 12 and starts.max() - starts.min() > 0.5 / 16


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("region", ["full", "query"])
@pytest.mark.parametrize("objective", ["residual", "x0", "eps"])
def test_loss_and_where_it_is_taken(region, objective, C):
    config = small_config(loss_region=region, objective=objective)
    g = torch.Generator().manual_seed(0)
    target_mask = script.masks_of(torch.arange(3), 32, config)[1]
    x_start, t = torch.rand(3, C, 32, 32, generator=g) - 0.5, torch.tensor([0.1, 0.4, 0.8])
    noise = script.gp_noise(torch.randn(3, C, 32, 32, generator=g), 0.05)
    h, V = torch.full((1, 1, 32, 32), 0.1), 0.2 / (1 + torch.arange(32.0)) ** 2 + torch.zeros(32, 1)
    V = V * torch.linspace(1, 0.1, C).view(C, 1, 1)
    axes = torch.linalg.qr(torch.randn(C, C, generator=g))[0]
    std = 0.2 + 0.3 * torch.rand(1, 1, 32, 32, generator=g)
    points, off = no_points(3), torch.where(target_mask, 1.0, 2.0)
    r = torch.einsum("ij,bjyx->biyx", axes, (x_start - h) / std)
    modes, shown = script.dct, []
    z = script.q_sample(r, t, noise, config)

    alpha = torch.stack([at(s)[0] * torch.exp(-KK * at(s)[2] ** 2 / 2) for s in t.tolist()])
    sigma = torch.tensor([at(s)[1] for s in t.tolist()]).view(3, 1, 1, 1)
    N = sigma**2 * spectrum_of(32)[1] / 32**2 + 1e-12
    alpha, P = alpha[:, None], 1 / V + alpha[:, None] ** 2 / N
    guess = alpha * z / N / P  # float64, by its precision
    residual = script.idct(((modes(r) / 32 - guess) * P.sqrt()).float())
    e = (z - alpha * modes(r) / 32) / sigma
    goal = {"residual": residual, "x0": r, "eps": script.idct(e.float()) * 32}[objective]
    scale = ((1 / P).mean(1, True).sum((2, 3), keepdim=True) * std.square().mean()).sqrt()

    def loss_of(out):
        model = Stub(lambda inputs, t: shown.append((inputs, t)) or out, h, std, V, axes)
        return script.training_loss(
            model, model.guess, x_start, t, noise, (None, target_mask), points, config
        ).item()

    assert loss_of(goal) == pytest.approx(0, abs=1e-4)
    beside = {"residual": off * scale / std, "x0": off / std, "eps": off}[objective].float()
    if objective == "residual":  # what is that far off in x
        beside = script.idct((modes(beside) / 32 * P.sqrt()).float())
    expected = 1 if region == "query" else off.square().mean().item()
    rel = 1e-2 if objective == "residual" else 1e-4
    assert loss_of(goal + beside) == pytest.approx(expected, rel=rel)
    x, news, *rest = shown[0][0].split([C, C, 1, 1], dim=1)  # what the network is given
    time, known = shown[0][1], script.idct(guess.float()) * 32
    torch.testing.assert_close(x, h + std * torch.einsum("ji,bjyx->biyx", axes, known))
    white = script.idct((z * (alpha**2 * V + N).rsqrt()).float())
    torch.testing.assert_close(news, white, rtol=1e-4, atol=1e-4)
    off = std.square() * V.sum((1, 2)).mean()  # the guess's variance
    for part, expected in zip(rest, (h, off.log() / 4 + 1), strict=True):
        torch.testing.assert_close(part, expected.expand_as(part))
    assert torch.equal(time, t)


# -- whole runs ------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 1500, False: 40})  # enough to learn from
    flags = "--steps 120 --sample-every 60 --lr 5e-3 --dim 16 --sample-steps 8 --num-draws 3"
    run(tmp_path / "run", *flags.split())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    pictures = {"loss.png", "reconstructions.png", "resolutions.png", "step_000060.png"}
    pictures |= {"ranks.png"}
    arrays = {"reconstructions.npz", "samples.npy", "gaussian.npz"}
    assert files == pictures | arrays | {"last.pt", "config.json", "history.json", "metrics.json"}
    history = read_json(tmp_path / "run/history.json")
    assert history.pop("final")["images"].keys() >= {"val", "test"}
    assert len({len(v) for v in history.values()}) == 1 and history["steps"][-1] == 120
    assert history["val_loss"][-1] < 0.99 * history["val_loss"][0]
    arrays = np.load(tmp_path / "run/reconstructions.npz")
    draws, truth = arrays["draws"], arrays["truth"]
    assert draws.shape == (3, 4, 3, 16, 16) and truth.shape == (4, 3, 16, 16)
    seen = np.broadcast_to(arrays["cond_mask"], truth.shape)
    for draw in draws:
        assert np.array_equal(draw[seen], truth[seen])
    metrics = read_json(tmp_path / "run/metrics.json")
    for found, where in (
        (metrics, ~arrays["cond_mask"]),
        (metrics["query"], arrays["target_mask"]),
    ):
        tensors = [torch.from_numpy(x) for x in (draws.mean(0), truth, where)]
        named = {"draw", "mean", "regression", "linear", "convolution", "gaussian"}
        assert set(found["psnr"]) == set(found["ssim"]) == named
        assert found["psnr"]["mean"] == pytest.approx(psnr(*tensors), abs=1e-3)
        assert found["psnr"]["mean"] > psnr(0 * tensors[1] + 0.5, *tensors[1:]) + 1  # than grey

    again = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "finer")]
    script.main([*again, "--image-size", "24"])
    finer = np.load(tmp_path / "finer/reconstructions.npz")
    assert finer["draws"].shape == (3, 4, 3, 24, 24)
    assert np.array_equal(finer["cond_mask"], arrays["cond_mask"])
    assert np.array_equal(finer["truth"], truth)
    assert np.load(tmp_path / "finer/samples.npy").shape == (4, 24, 24, 3)
    measured = read_json(tmp_path / "finer/metrics.json")
    for name, score in metrics["psnr"].items():  # on the grid of the truth, the same function
        assert measured["psnr"][name] == pytest.approx(score, abs=0.3)


def test_images_wider_than_the_covariance_is(tmp_path, monkeypatch):
    monkeypatch.setattr(points, "LARGEST_SIDE", 8)
    run(tmp_path / "run", "--steps", "2")
    assert "linear" not in read_json(tmp_path / "run/metrics.json")["psnr"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image-size 6", "--image-size 6: must be at least --modes, 8"),
        ("--modes 10", "--modes 10: must be a multiple of 4"),
        ("--dim-mults", "--dim-mults: needs one level at least"),
        ("--blur-min 0.5", "--blur-min 0.5: must not exceed --blur-max, 0.25"),
        (
            "--sparsity 0.6",
            "--sparsity 0.6 and --target-sparsity 0.6: "
            "the masks are disjoint, so their sum must not exceed 1",
        ),
        ("--length-scale 0", "argument --length-scale: must lie in (0, 1), got 0"),
        ("--conditioning both", "argument --conditioning: invalid choice: 'both'"),
    ],
)
def test_bad_flags_exit_with_2(tmp_path, capsys, flags, message):
    call = lambda: run(tmp_path / "run", *flags.split())
    assert message in exits_with(2, capsys, call)
    assert not (tmp_path / "run").exists()
