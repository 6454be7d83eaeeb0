"""sparse_ddpm.py: what the network sees and is scored on, masks over time, reconstruction."""

import functools
import math
from dataclasses import replace

import fill_images
import fused_ddpm.ops
import sparse_ddpm as script
from fused_ddpm.fill import gaussian_blur
from fused_ddpm.images import Data, load_images, to_float
from fused_ddpm.linear import LinearFill
from fused_ddpm.masks import TEST_INDEX, hide, make_masks
from fused_ddpm.metrics import psnr

import numpy as np
import pytest
import torch
from helpers import away_from_zero, exits_with, make_config, read_json
from PIL import Image

TINY = """--data shapes --device cpu --image-size 16 --dim 8 --dim-mults 1 2 --steps 6
--batch-size 16 --num-timesteps 50 --sample-steps 4 --num-samples 4 --num-draws 2 --lr 1e-3
--save-every 2""".split()
SHAPE = (3, 16, 16)
T = torch.tensor([0, 10, 30, 49])


def run(out_dir, *flags):
    torch.set_num_threads(1)  # two would wait for each other where a core is all there is
    script.main([*TINY, "--out-dir", str(out_dir), *flags])


def small_unet():
    torch.manual_seed(0)
    config = make_config(script, dim_mults=[1, 2, 4], attn_resolutions=[8])
    net = away_from_zero(script.make_model(SHAPE, config))
    net.fill = fill_with()
    return net


def fill_with(variance=0.3):
    """A LinearFill of smooth images, that says it is off by this variance anywhere."""
    fill = LinearFill(SHAPE, 0.2)
    place = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    fill.covariance.copy_(0.1 * torch.exp(-torch.cdist(place, place) / 4))
    fill.log_variance.fill_(math.log(variance))
    fill.load_state_dict(fill.state_dict())
    fill.scored.fill_(0.2)
    return fill


def batch(n=4):
    """Images and noise of a training step."""
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, *SHAPE, generator=g) - 0.5, torch.randn(n, *SHAPE, generator=g)


# -- the network and the loss ----------------------------------------------------------------------


@pytest.mark.parametrize("observed_only", [None, 0.4])
def test_network_sees_observed_pixels_only_and_loss_the_target_only(observed_only):
    options = dict(cond_weight=0.0, objective="x0", observed_only=observed_only)
    config, net, (x_start, noise) = make_config(script, **options), small_unet(), batch()
    cond_mask, target_mask = masks = make_masks(torch.arange(4), 0, 16, config)
    alphas_cumprod, fill = script.make_schedule("cosine", 50), net.fill
    state = target_mask if observed_only else torch.ones_like(target_mask)

    def out_of(x):
        context = fill(x * cond_mask, cond_mask, state)
        return script.predict(net, noise, T, context, alphas_cumprod, config)[0]

    unseen = torch.where(cond_mask, x_start, torch.randn_like(x_start))
    assert torch.equal(out_of(x_start), out_of(unseen))
    assert not torch.equal(out_of(x_start), out_of(x_start + 0.1))

    x_start.requires_grad_()
    shown = []
    ignoring = lambda x, t, labels: shown.append(x) or 0 * x[:, :3]
    rest = masks, None, alphas_cumprod, config
    script.training_loss(ignoring, fill, x_start, T, noise, *rest).backward()
    assert torch.equal(x_start.grad != 0, target_mask.expand_as(x_start) & (x_start != 0))
    a = alphas_cumprod.float()[T].view(-1, 1, 1, 1)
    x_t = torch.where(state, a.sqrt() * x_start + (1 - a).sqrt() * noise, 0)
    filled = fill(x_start * cond_mask, cond_mask, state)[3]
    news = state * (x_t / a.sqrt() - filled) / (0.3 + (1 - a) / a).sqrt()
    unsure = torch.full_like(filled[:, :1], math.log(0.3) / 4 + 1)
    which = cond_mask.float(), state.float(), unsure
    expected = torch.cat([x_t, news, x_start * cond_mask, filled, *which], dim=1)
    torch.testing.assert_close(shown[0], expected)


def test_with_observed_only_nothing_else_gets_into_the_loss():
    """Whatever stands in the other pixels: not even into a bit of it, or of a gradient."""
    config, (x_start, noise) = make_config(script, observed_only=0.4), batch()
    net, losses, alphas_cumprod = small_unet(), [], script.make_schedule("cosine", 50)
    masks = make_masks(torch.arange(4), 0, 16, config)
    for x in (x_start, torch.where(masks[0] | masks[1], x_start, 7.0)):
        net.zero_grad()
        rest = masks, None, alphas_cumprod, config
        loss = script.training_loss(net, net.fill, x, T, noise, *rest)
        loss.backward()
        losses.append([loss, *(p.grad for p in net.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))
    config.observed_only = None  # as x_t is all of it
    assert losses[0][0] != script.training_loss(net, net.fill, x, T, noise, *rest)


@pytest.mark.parametrize("cond_weight", [0.0, 0.05, 1.0])
def test_observed_pixels_weigh_as_asked(cond_weight):
    config = make_config(script, cond_weight=cond_weight, objective="x0")
    x_start, noise = batch()
    cond_mask, target_mask = masks = make_masks(torch.arange(4), 0, 16, config)
    error = 1.0 * target_mask + 2.0 * cond_mask + 100.0 * ~(target_mask | cond_mask)
    off = lambda x, t, labels: x_start + error
    rest = masks, None, script.make_schedule("cosine", 50), config
    loss = script.training_loss(off, fill_with(), x_start, T, noise, *rest)
    expected = (1 + cond_weight * 4) / (1 + cond_weight)  # as many of the one as of the other
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "objective, observed_only",
    [("residual", None), ("eps", None), ("v", None), ("x0", None), ("residual", 0.4), ("x0", 0.4)],
)
def test_a_perfect_network_has_no_loss(objective, observed_only):
    config = make_config(script, objective=objective, observed_only=observed_only)
    (x_start, noise), fill = batch(), fill_with()
    alphas_cumprod = script.make_schedule("cosine", 50)
    a = alphas_cumprod[T].view(-1, 1, 1, 1)
    masks = make_masks(torch.arange(4), 0, 16, config)
    filled = fill(x_start * masks[0], masks[0], masks[1])[3]
    # The docstring's formulas, in float64, for a filled image that is off by a variance of 0.3.
    x_t = a.sqrt() * x_start + (1 - a).sqrt() * noise
    of_x = a / (1 - a) * (masks[1] if observed_only else 1)  # where there is no x_t, none of it
    precision = 1 / 0.3 + of_x
    g = (filled / 0.3 + x_t / a.sqrt() * of_x) / precision
    perfect = {
        "residual": (x_start - g) * precision.sqrt(),
        "eps": noise,
        "x0": x_start,
        "v": a.sqrt() * noise - (1 - a).sqrt() * x_start,
    }[objective].float()

    def loss_of(out):
        rest = masks, None, alphas_cumprod, config
        return script.training_loss(lambda x, t, labels: out, fill, x_start, T, noise, *rest)

    assert loss_of(perfect) < 1e-9
    assert loss_of(perfect + 1).item() == pytest.approx(1, rel=1e-4)


def test_the_residual_has_variance_one_at_every_t():
    """If the filled image is off by what LinearFill says; so one weight does for all t."""
    g, variance = torch.Generator().manual_seed(0), 0.05
    config, alphas_cumprod = make_config(script), script.make_schedule("cosine", 50)
    x_start = torch.rand(1, 3, 16, 16, generator=g) - 0.5
    filled = x_start + variance**0.5 * torch.randn(x_start.shape, generator=g)
    for t in T:
        noise = torch.randn(x_start.shape, generator=g)
        x_t = script.q_sample(x_start, t[None], noise, alphas_cumprod)
        everywhere = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        context = x_start, everywhere, everywhere, filled, variance * everywhere
        nothing = lambda x, t: 0 * x[:, :3]
        guess, k = script.predict(nothing, x_t, t[None], context, alphas_cumprod, config)
        residual = (x_start - guess) / k
        assert residual.square().mean().item() == pytest.approx(1, abs=4.5 * (2 / 768) ** 0.5)


# -- a Gaussian posterior in closed form -----------------------------------------------------------

SIDE, COUNT = 4, 20_000


class PoorGuess:
    """A LinearFill that knows little, and couples nothing unless it is given one that does."""

    def __init__(self, filled, variance):
        self.filled, self.variance = filled, variance
        self.couple = lambda white, seen, state: white

    def __call__(self, cond, mask, state):
        like = torch.ones_like(cond)
        mask, state = mask.to(cond.dtype), state.to(cond.dtype)
        return cond, mask, state, self.filled * like, self.variance * like


class LinearDenoiser:
    """E[x_0 | x_t, x_O] of data N(mean, covariance), as the network whose residual leads to it."""

    def __init__(self, alphas_cumprod):
        g = torch.Generator().manual_seed(3)
        place = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
        self.covariance = 0.04 * torch.exp(-torch.cdist(place, place) / 2)
        self.mean = 0.2 * torch.rand(SIDE**2, generator=g, dtype=torch.float64) - 0.1
        self.seen = torch.zeros(SIDE**2, dtype=torch.bool)
        self.seen[[1, 6, 11, 12]] = True
        self.value = torch.tensor([0.3, -0.2, 0.1, 0.25], dtype=torch.float64)
        self.alphas_cumprod, self.variance, self.filled = alphas_cumprod, 0.07, 0.15
        self.fill = PoorGuess(self.filled, self.variance)

    def posterior(self):
        """(mean, covariance) of x_0 given the seen pixels."""
        o, (m, c) = self.seen, (self.mean, self.covariance)
        gain = c[:, o] @ c[o][:, o].inverse()
        return m + gain @ (self.value - m[o]), c - gain @ c[o]

    def of(self, t):
        """(gain, offset) of E[x_0 | x_t, x_O] = gain x_t + offset."""
        a = self.alphas_cumprod[t].item()
        m, c = self.posterior()
        gain = a**0.5 * c @ (a * c + (1 - a) * torch.eye(len(m))).inverse()
        return gain, m - a**0.5 * gain @ m

    def __call__(self, inputs, t):
        a, b = self.alphas_cumprod[t[0]].item(), inputs[:, 0].flatten(1).double()
        precision = 1 / self.variance + a / (1 - a)
        x_t = (b * precision - self.filled / self.variance) * (1 - a) / a**0.5
        gain, offset = self.of(t[0])
        residual = (x_t @ gain.T + offset - b) * precision**0.5
        return residual.float().view(-1, 1, SIDE, SIDE)


def closed_form(net, config):
    """(mean, covariance) of what the sampler returns: each of its steps is linear."""
    timesteps, table = script.sampling_table(config)
    m, c = torch.zeros(SIDE**2).double(), torch.eye(SIDE**2).double()
    for t, (_, _, a, b, s) in zip(timesteps, table.double(), strict=True):
        gain, offset = net.of(t)
        gain[net.seen] = 0
        offset[net.seen] = net.value
        step = a * gain + b * torch.eye(SIDE**2)
        m, c = step @ m + a * offset, step @ c @ step.T + s**2 * torch.eye(SIDE**2)
    return m, c


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0)])
def test_a_gaussian_posterior_comes_back(sampler, eta):
    """At 20 of 1000 steps, with the spacing and clipping that ship: mean and covariance."""
    options = dict(image_size=SIDE, num_timesteps=1000, sampler=sampler, eta=eta)
    config = make_config(script, **options, sample_steps=20)
    net = LinearDenoiser(script.make_schedule("cosine", 1000))
    mask = net.seen.view(1, 1, SIDE, SIDE).expand(COUNT, -1, -1, -1)
    cond = torch.zeros(SIDE**2)
    cond[net.seen] = net.value.float()
    cond = cond.view(1, 1, SIDE, SIDE).expand(COUNT, -1, -1, -1).contiguous()
    *_, x = script.make_sampler(net, (1, SIDE, SIDE), config)(torch.arange(COUNT), cond, mask)
    x = x.flatten(1).double()
    assert torch.equal(x[:, net.seen].float(), cond.flatten(1)[:, net.seen])

    m, c = closed_form(net, config)  # what these steps lead to, by the papers' formulas
    u = ~net.seen
    std = c.diagonal().clamp(min=0).sqrt()[u]
    assert ((x.mean(0) - m)[u].abs() < 4.5 * std / COUNT**0.5).all()
    sampled, c = torch.cov(x.T)[u][:, u], c[u][:, u]
    error = (std[:, None] ** 2 * std**2 + c**2).sqrt() / COUNT**0.5
    assert ((sampled - c).abs() < 5 * error).all()

    exact_mean, exact = net.posterior()  # and that is near the posterior
    assert (m - exact_mean).abs().max() < 0.01
    narrow = (std**2 / exact.diagonal()[u]).sqrt()
    assert 0.8 < narrow.min() and narrow.max() < 1.05
    many = replace(config, sample_steps=1000, spacing=1.0)
    m, c = closed_form(net, many)
    torch.testing.assert_close(m, exact_mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(c, exact, rtol=0, atol=2e-3)


class BlockDenoiser(LinearDenoiser):
    """E[x_0 | x_t on a block, x_O] for the blocks of a partition, as the network."""

    def of_blocks(self, t, blocks):
        """(gain (N, D, D), offset (N, D)) of blocks, bool (N, D)."""
        a, (m, c) = self.alphas_cumprod[t].item(), self.posterior()
        block = blocks.double()[:, :, None]
        there = a * block * c * block.mT + (1 - a) * torch.eye(len(m))
        gain = a**0.5 * (c * block.mT) @ there.inverse() * block.mT
        return gain, m - a**0.5 * gain @ m

    def __call__(self, inputs, t):
        a, b = self.alphas_cumprod[t[0]].item(), inputs[:, 0].flatten(1).double()
        blocks, which = inputs[:, 5].flatten(1).bool().unique(dim=0, return_inverse=True)
        precision = 1 / self.variance + inputs[:, 5].flatten(1) * a / (1 - a)
        x_t = (b * precision - self.filled / self.variance) * (1 - a) / a**0.5
        gain, offset = (x[which] for x in self.of_blocks(t[0], blocks))
        residual = ((gain @ x_t[:, :, None])[:, :, 0] + offset - b) * precision**0.5
        return residual.float().view(-1, 1, SIDE, SIDE)


@pytest.mark.parametrize("sampler, narrow", [("ddim", 0.92), ("ddpm", 0.85)])
def test_in_parts_the_marginals_are_the_posteriors(sampler, narrow):
    """Of images of which nothing but the observed pixels was ever read; 25 of 1000 steps.

    Each pixel's moments are the mean over all the blocks that it can be in: as sampled, and by the
    papers' formulas. Parts know nothing of each other, where training has shown no more than is
    seen and their noise is not coupled.
    """
    options = dict(image_size=SIDE, num_timesteps=1000, sampler=sampler, observed_only=0.4)
    config, n, parts = make_config(script, **options, sample_steps=25), 6000, 3
    net = BlockDenoiser(script.make_schedule("cosine", 1000))
    mask = net.seen.view(1, 1, SIDE, SIDE).expand(n, -1, -1, -1)
    cond = torch.zeros(SIDE**2)
    cond[net.seen] = net.value.float()
    cond = cond.view(1, 1, SIDE, SIDE).expand(n, -1, -1, -1).contiguous()
    *_, x = script.make_sampler(net, (1, SIDE, SIDE), config, parts)(torch.arange(n), cond, mask)
    x, u = x.flatten(1).double(), ~net.seen
    assert torch.equal(x[:, net.seen].float(), cond.flatten(1)[:, net.seen])

    def moments(config):
        """Mean and covariance over all blocks of 4 of the 12 unseen pixels."""
        blocks = torch.zeros(495, SIDE**2, dtype=torch.bool)
        fours = torch.combinations(u.nonzero()[:, 0], 4)
        blocks.scatter_(1, fours, torch.ones_like(fours, dtype=torch.bool))
        m, c = torch.zeros(495, SIDE**2, 1).double(), torch.eye(SIDE**2).double()
        timesteps, table = script.sampling_table(config)
        for t, (_, _, a, b, s) in zip(timesteps, table.double(), strict=True):
            gain, offset = net.of_blocks(t, blocks)
            step = a * gain + b * torch.eye(SIDE**2)
            m = step @ m + a * offset[:, :, None]
            c = step @ c @ step.mT + s**2 * torch.eye(SIDE**2)
        inside, m = blocks.double(), m[:, :, 0]
        pairs = torch.einsum("ni,nj->nij", inside, inside)
        mean = (m * inside).sum(0) / inside.sum(0)
        off = m - mean
        second = ((c + off[:, :, None] * off[:, None]) * pairs).sum(0) / 495 * parts
        return mean[u], second[u][:, u]

    m, c = moments(config)
    std = c.diagonal().sqrt()
    assert ((x.mean(0)[u] - m).abs() < 4.5 * std / n**0.5).all()
    error = (std[:, None] ** 2 * std**2 + c**2).sqrt() / n**0.5
    assert ((torch.cov(x.T)[u][:, u] - c).abs() < 5 * error).all()

    exact_mean, exact = net.posterior()  # and those are the posterior's, but that few steps,
    exact_std = exact.diagonal()[u].sqrt()  # which take E[x_0 | x_t] for x_0, are narrow
    assert (m - exact_mean[u]).abs().max() < 1e-4
    assert narrow < (std / exact_std).min() and (std / exact_std).max() < 1
    m, c = moments(replace(config, sample_steps=300))
    torch.testing.assert_close(m, exact_mean[u], rtol=0, atol=1e-4)
    torch.testing.assert_close(c.diagonal().sqrt(), exact_std, rtol=0.02, atol=0)


@pytest.mark.parametrize("blind", [True, False])
def test_coupled_parts_that_do_not_see_each_other_are_drawn_from_the_posterior(blind):
    """All pixels together; of independent noise they are not."""
    options = dict(image_size=SIDE, num_timesteps=1000, observed_only=0.4)
    config, n = make_config(script, **options, sample_steps=60), 6000
    net = BlockDenoiser(script.make_schedule("cosine", 1000))
    if not blind:
        known = LinearFill((1, SIDE, SIDE), 0.2)
        known.covariance.copy_(net.covariance)
        known.load_state_dict(known.state_dict())
        net.fill.couple = known.couple
    mask = net.seen.view(1, 1, SIDE, SIDE).expand(n, -1, -1, -1)
    cond = torch.zeros(SIDE**2)
    cond[net.seen] = net.value.float()
    cond = cond.view(1, 1, SIDE, SIDE).expand(n, -1, -1, -1).contiguous()
    *_, x = script.make_sampler(net, (1, SIDE, SIDE), config, 3)(torch.arange(n), cond, mask)
    x, u = x.flatten(1).double()[:, ~net.seen], ~net.seen
    m, c = (moment[u] for moment in net.posterior())
    std = c[:, u].diagonal().sqrt()
    assert ((x.mean(0) - m).abs() < 4.5 * std / n**0.5).all()
    ratio = x.std(0) / std
    assert 0.94 < ratio.min() and ratio.max() < 1.04
    expected = c[:, u] / std / std[:, None]
    off = (torch.corrcoef(x.T) - expected).abs().max()
    sums = x.sum(1).var() / c[:, u].sum()  # of the mean of the whole image
    assert (off > 0.2 and sums < 0.7) if blind else (off < 0.07 and 0.9 < sums < 1.06)


class JointDenoiser(LinearDenoiser):
    """The same where a part also sees pixels drawn before, each image others."""

    def start(self, seen, state):
        """(gain, block, values, vectors): of a part given what is seen, in a base for all t."""
        c = self.covariance
        o, b = seen.flatten(1).double(), state.flatten(1).double()
        among = o[:, :, None] * c * o[:, None] + torch.diag_embed(1 - o)
        gain = c * o[:, None] @ among.inverse() * o[:, None]
        left = b[:, :, None] * (c - gain @ c) * b[:, None]
        return gain, b, *torch.linalg.eigh(left)

    def __call__(self, inputs, t):
        a = self.alphas_cumprod[t[0]].item()
        b, cond, seen, state = inputs[:, [0, 2, 4, 5]].flatten(2).double().unbind(1)
        if t[0] == 999:  # a new part
            self.kept = self.start(seen, state)
        gain, block, values, vectors = self.kept
        m = self.mean + (gain @ (cond - seen * self.mean)[:, :, None])[:, :, 0]
        precision = 1 / self.variance + state * a / (1 - a)
        x_t = (b * precision - self.filled / self.variance) * (1 - a) / a**0.5
        shrunk = a**0.5 * values / (a * values + 1 - a)
        off = vectors.mT @ (block * (x_t - a**0.5 * m))[:, :, None]
        x_0 = m + (vectors @ (shrunk[:, :, None] * off))[:, :, 0]
        return ((x_0 - b) * precision**0.5).float().view(-1, 1, SIDE, SIDE)


def test_parts_that_see_those_before_them_are_drawn_from_the_posterior():
    """Where training has shown as much as is there by then, all pixels together."""
    options = dict(image_size=SIDE, num_timesteps=1000, observed_only=1.0, sparsity=[0.9])
    config, n = make_config(script, **options, sample_steps=60), 4000
    net = JointDenoiser(script.make_schedule("cosine", 1000))
    mask = net.seen.view(1, 1, SIDE, SIDE).expand(n, -1, -1, -1)
    cond = torch.zeros(SIDE**2)
    cond[net.seen] = net.value.float()
    cond = cond.view(1, 1, SIDE, SIDE).expand(n, -1, -1, -1).contiguous()
    *_, x = script.make_sampler(net, (1, SIDE, SIDE), config, 3)(torch.arange(n), cond, mask)
    x, u = x.flatten(1).double(), ~net.seen
    m, c = net.posterior()
    std = c.diagonal().clamp(min=0).sqrt()[u]
    assert ((x.mean(0) - m)[u].abs() < 4.5 * std / n**0.5).all()
    ratio = x.std(0)[u] / std
    assert 0.94 < ratio.min() and ratio.max() < 1.02  # 60 steps: 3% narrow; 4.5 errors: 5%
    correlation = torch.corrcoef(x[:, u].T) - c[u][:, u] / std / std[:, None]
    assert correlation.abs().max() < 0.08


def test_one_call_from_noise_is_the_posterior_mean():
    config = make_config(script, image_size=SIDE, num_timesteps=1000, sample_steps=1)
    net = LinearDenoiser(script.make_schedule("cosine", 1000))
    mask = net.seen.view(1, 1, SIDE, SIDE)
    cond = torch.zeros(1, 1, SIDE, SIDE)
    cond[mask] = net.value.float()
    *_, x = script.make_sampler(net, (1, SIDE, SIDE), config)(torch.arange(1), cond, mask)
    expected, _ = net.posterior()
    torch.testing.assert_close(x.flatten().double(), expected, rtol=0, atol=1e-3)


def test_two_steps_with_one_answer_are_one_skip():
    """DDIM without noise is a path: with the same x0_hat, over any timestep or past it."""
    config = make_config(script, num_timesteps=1000, sampler="ddim", eta=0.0, sample_steps=30)
    timesteps, table = script.sampling_table(config)
    alphas_cumprod = script.make_schedule("cosine", 1000)
    g = torch.Generator().manual_seed(0)
    x_0, x = torch.rand(50, generator=g).double(), torch.randn(50, generator=g).double()
    start = x
    for row in table[:-1].double():
        x = row[2] * x_0 + row[3] * x
    at, a_s = alphas_cumprod[timesteps[0]], alphas_cumprod[timesteps[-1]]
    noise = (start - at.sqrt() * x_0) / (1 - at).sqrt()
    torch.testing.assert_close(x, a_s.sqrt() * x_0 + (1 - a_s).sqrt() * noise, rtol=0, atol=1e-5)


# -- masks while training --------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch):
    """watch(out_dir, *flags): [(image, pair of masks)] of a run, as they come to the loss.

    Images are told apart by their bytes; the masks of a mirrored one are mirrored back.
    """
    images, _ = load_images("shapes", image_size=16)
    own = {to_float(x).numpy().tobytes(): (i, False) for i, x in enumerate(images)}
    own |= {to_float(x.flip(-1)).numpy().tobytes(): (i, True) for i, x in enumerate(images)}
    assert len(own) == 2 * len(images)

    def watched(out_dir, *flags):
        steps, watched.timesteps = [], []

        def record(model, fill, x_start, t, noise, masks, *rest):  # the loss: steps cost nothing
            if model.training:
                steps.append((x_start, torch.cat(list(masks), dim=1)))
                watched.timesteps.append(t)
            return 1 + 0 * sum(p.sum() for p in model.parameters())

        with monkeypatch.context() as m:
            m.setattr(script, "training_loss", record)
            few = "--num-samples 1 --num-draws 1 --sample-steps 1 --sample-every 99 --save-every 99"
            run(out_dir, *flags, *few.split())
        found = []
        for x_start, masks in steps:
            assert (masks.sum((2, 3)) == 51).all() and not masks.all(1).any()
            keys = [own[x.numpy().tobytes()] for x in x_start]
            pairs = zip(keys, masks, strict=True)
            found.append([(i, turned, m.flip(-1) if turned else m) for (i, turned), m in pairs])
        return found

    return watched


def by_image(steps):
    """{image: its masks, in the order of time}"""
    masks = {}
    for image, _, pair in (item for step in steps for item in step):
        masks.setdefault(image, []).append(pair)
    return masks


def different(pairs):
    """How many pairs of masks are not the same as another one before them."""
    return len({pair.numpy().tobytes() for pair in pairs})


def test_fixed_masks_never_change(tmp_path, watch):
    masks = by_image(watch(tmp_path, "--mask-mode", "fixed", "--steps", "39"))  # three epochs
    assert len(masks) > 150 and max(map(len, masks.values())) == 3
    assert all(different(pairs) == 1 for pairs in masks.values())
    assert different([pairs[0] for pairs in masks.values()]) == len(masks)  # each image its own


@pytest.mark.parametrize("flags, power", [([], 2), (["--time-spacing", "1"], 1)])
def test_timesteps_are_closer_near_0(tmp_path, watch, flags, power):
    """T u^2, u uniform: as in sampling with a spacing of 2."""
    watch(tmp_path, "--steps", "60", "--num-timesteps", "1000", *flags)
    t = torch.cat(watch.timesteps)
    assert len(t) == 960 and t.min() >= 0 and t.max() < 1000 and len(t.unique()) > 400
    for share in (0.1, 0.5, 0.9):
        below = (t < 1000 * share**power).double().mean().item()
        assert below == pytest.approx(share, abs=4.5 * (share * (1 - share) / 960) ** 0.5)


@pytest.mark.parametrize("mode", ["random_epoch", "random"])
def test_masks_are_new_in_each_epoch(tmp_path, watch, mode):
    """In an epoch they follow from the image, or else from the step at which it comes."""
    flags = f"--mask-mode {mode} --steps".split()
    steps = watch(tmp_path / "16", *flags, "39")
    masks = by_image(steps)
    assert max(map(len, masks.values())) == 3
    assert all(different(pairs) == len(pairs) for pairs in masks.values())
    assert different([pairs[0] for pairs in masks.values()]) == len(masks)
    of_24 = watch(tmp_path / "24", *flags, "9", "--batch-size", "24")  # one epoch, in other steps
    other, same, later = by_image(of_24), 0, 0
    for step, items in enumerate(steps[:9]):
        for image, _, pair in items:
            at = next(i for i, found in enumerate(of_24) if image in [item[0] for item in found])
            if at != step:
                later += 1
                same += torch.equal(pair, other[image][0])
    assert later > 50 and same == (later if mode == "random_epoch" else 0)


def test_a_mirrored_image_has_mirrored_masks(tmp_path, watch):
    """So that with fixed masks an image only ever shows one set of pixels."""
    steps = watch(tmp_path, "--mask-mode", "fixed", "--steps", "78", "--flip")  # six epochs
    masks = by_image(steps)
    assert len(masks) > 150 and max(map(len, masks.values())) == 6
    assert all(different(pairs) == 1 for pairs in masks.values())
    turned = [turned for step in steps for _, turned, _ in step]
    assert abs(np.mean(turned) - 0.5) < 4.5 * 0.5 / len(turned) ** 0.5
    both = {(image, turned) for step in steps for image, turned, _ in step}
    assert len(both) > 1.9 * len(masks)  # each way now and then
    straight = watch(tmp_path / "not", "--mask-mode", "fixed", "--steps", "13")
    assert not any(turned for step in straight for _, turned, _ in step)
    for image, pairs in by_image(straight).items():  # the same set as without --flip
        assert torch.equal(pairs[0], masks[image][0])


# -- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, eta, objective, observed_only",
    [("ddpm", 0.0, "v", None), ("ddim", 0.0, "residual", None), ("ddim", 0.7, "v", None),
     ("ddim", 0.0, "residual", 0.4), ("ddpm", 0.0, "v", 0.4)],
)  # fmt: skip
def test_same_seed_same_image(sampler, eta, objective, observed_only, monkeypatch):
    """Extension and reference, batch 1 and 64, one thread and two: equal to 1e-4."""
    options = dict(sampler=sampler, eta=eta, objective=objective, observed_only=observed_only)
    config = make_config(script, **options)
    net, index = small_unet().eval(), torch.arange(64)
    cond_mask, _ = make_masks(index, 0, 16, config)
    truth = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sample = script.make_sampler(net, SHAPE, config, 4 if observed_only else None)

    def last(part=slice(None)):
        *_, x = sample(index[part], (truth * cond_mask)[part], cond_mask[part])
        return x

    torch.set_num_threads(2)
    whole = last()
    assert torch.equal(torch.where(cond_mask, whole, truth), truth)
    assert whole.std() > 0.1 and not torch.allclose(whole[0], whole[1], atol=0.1)
    for i in (0, 17):
        torch.testing.assert_close(last(slice(i, i + 1)), whole[i : i + 1], rtol=0, atol=1e-4)
    torch.set_num_threads(1)
    torch.testing.assert_close(last(), whole, rtol=0, atol=1e-4)
    monkeypatch.setattr(fused_ddpm.ops, "BACKENDS", ())
    torch.testing.assert_close(last(), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", ["residual", "v"])
def test_observed_pixels_are_kept_at_every_step(objective):
    net, index = small_unet().eval(), torch.arange(4)
    cond_mask, _ = make_masks(index, 0, 16, make_config(script))
    cond = batch()[0] * cond_mask
    config = make_config(script, objective=objective)
    kept = list(script.make_sampler(net, SHAPE, config)(index, cond, cond_mask))
    assert len(kept) == 10
    _, table = script.sampling_table(config)
    seen, x_t = cond_mask.expand_as(cond), fused_ddpm.seeded_normal(index, SHAPE)
    for (_, _, a, b, s), x in zip(table, kept, strict=True):  # as if the network had known them
        assert s == 0
        torch.testing.assert_close(x[seen], (a * cond + b * x_t)[seen], rtol=0, atol=1e-5)
        x_t = x
    assert torch.equal(kept[-1][seen], cond[seen])


# -- classes ---------------------------------------------------------------------------------------


def told_classes(**changes):
    config = make_config(script, class_labels=True, sample_steps=1, **changes)
    torch.manual_seed(0)
    net = away_from_zero(script.make_model(SHAPE, config, 10)).eval()
    net.fill = fill_with()
    return net, config


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_goes_on_from_the_null_class_through_the_class(sampler):
    """One step returns x0_hat: that of w is null + w (class - null), and what is seen is kept."""
    index, labels = torch.arange(4), torch.tensor([0, 3, 9, 3])
    found = {}
    for w in (0.0, 1.0, 3.0):
        net, config = told_classes(guidance_scale=w, sampler=sampler)
        mask, _ = make_masks(index, 0, 16, config)
        cond = batch()[0] * mask
        (found[w],) = script.make_sampler(net, SHAPE, config)(index, cond, mask, labels)
        assert torch.equal(found[w][mask.expand_as(cond)], cond[mask.expand_as(cond)])
    net, config = told_classes(sampler=sampler)
    sample = script.make_sampler(net, SHAPE, config)
    (null,) = sample(index, cond, mask, torch.full((4,), 10))
    (without,) = sample(index, cond, mask)  # as fill_images.py asks, which knows no class
    torch.testing.assert_close(found[0.0], null)
    assert torch.equal(null, without) and (found[1.0] - null).abs().max() > 1e-3
    inside = (found[3.0].abs() < 1) & (found[1.0].abs() < 1) & (null.abs() < 1)  # not clipped
    assert inside.float().mean() > 0.5
    expected = null + 3 * (found[1.0] - null)
    torch.testing.assert_close(found[3.0][inside], expected[inside], rtol=0, atol=1e-5)


def test_without_class_labels_a_label_says_nothing():
    net, config, index = small_unet().eval(), make_config(script), torch.arange(4)
    mask, _ = make_masks(index, 0, 16, config)
    sample, cond = script.make_sampler(net, SHAPE, config), batch()[0] * mask
    *_, one = sample(index, cond, mask, torch.tensor([0, 1, 2, 3]))
    *_, other = sample(index, cond, mask)
    assert torch.equal(one, other)


def test_one_image_in_ten_is_trained_without_its_class(tmp_path, monkeypatch):
    images, labels = load_images("shapes", image_size=16)
    own = {to_float(x).numpy().tobytes(): int(y) for x, y in zip(images, labels, strict=True)}
    seen = []

    def record(model, fill, x_start, t, noise, masks, labels, *rest):
        if model.training:
            right = torch.tensor([own[x.numpy().tobytes()] for x in x_start])
            assert ((labels == right) | (labels == 10)).all()
            seen.append(labels)
        return 1 + 0 * sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(script, "training_loss", record)
    run(tmp_path, "--class-labels", "--steps", "40", "--sample-every", "99", "--save-every", "99")
    dropped = (torch.cat(seen) == 10).float().mean().item()
    assert abs(dropped - 0.1) < 4 * (0.1 * 0.9 / (40 * 16)) ** 0.5


def test_a_run_with_classes_completes_images_as_each(tmp_path, capsys):
    run(tmp_path / "run", "--class-labels", "--classes", "0,square,3")
    history = read_json(tmp_path / "run/history.json")
    assert "val_uncond_loss" in history and (tmp_path / "run/classes.png").exists()
    checkpoint = str(tmp_path / "run/last.pt")
    script.main(["--sample", checkpoint, "--guidance-scale", "3", "--out-dir", f"{tmp_path}/w"])
    one, other = (np.load(tmp_path / x / "reconstructions.npz")["draws"] for x in ("run", "w"))
    assert one.shape == other.shape and not np.array_equal(one, other)
    model, config, _ = fill_images.load(checkpoint, "cpu", "off")
    assert config.class_labels and model.null_class == 10
    for flags in ("--classes", "1"), ("--guidance-scale", "2"):
        line = exits_with(2, capsys, lambda flags=flags: run(tmp_path / "none", *flags))
        assert line.endswith("--classes, --guidance-scale: need --class-labels")
    line = exits_with(1, capsys, lambda: run(tmp_path / "none", "--class-labels", "--classes", "x"))
    assert "'x' is none of the classes" in line and not (tmp_path / "none").exists()


# -- whole runs ------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_everything(tmp_path):
    flags = """--steps 80 --sample-every 40 --save-every 40 --lr 5e-3 --dim 16 --num-timesteps 1000
    --sample-steps 8 --num-draws 4 --num-samples 40"""
    run(tmp_path / "run", *flags.split())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    pictures = {"loss.png", "reconstructions.png", "step_000040.png", "ranks.png"}
    arrays = {"reconstructions.npz", "samples.npy", "gaussian.npz"}
    about = {"last.pt", "config.json", "history.json", "metrics.json"}
    assert files == pictures | arrays | about
    history = read_json(tmp_path / "run/history.json")
    assert history.pop("final")["images"].keys() >= {"val", "test"}
    assert len({len(v) for v in history.values()}) == 1 and history["steps"][-1] == 80
    arrays = np.load(tmp_path / "run/reconstructions.npz")
    draws, truth = arrays["draws"], arrays["truth"]
    assert draws.shape == (4, 40, *SHAPE) and draws.dtype == np.float32
    assert truth.shape == (40, *SHAPE) and 0 <= draws.min() <= draws.max() <= 1
    seen = np.broadcast_to(arrays["cond_mask"], truth.shape)
    assert (seen.sum((2, 3)) == 51).all()
    assert not (arrays["cond_mask"] & arrays["target_mask"]).any()
    for draw in draws:
        assert np.array_equal(draw[seen], truth[seen])
    metrics = read_json(tmp_path / "run/metrics.json")
    named = {"num_images": 40, "num_draws": 4, "sparsity": pytest.approx(51 / 256)}
    parts = {"psnr", "ssim", "query", "calibration", "foreground", "gaussian_interval_90%"}
    guesses = {"draw", "mean", "regression", "gaussian", "linear", "convolution"}
    assert set(metrics["psnr"]) == guesses
    assert metrics == metrics | named and set(metrics) == {*parts, *named}
    for name in ("regression", "gaussian", "linear", "convolution"):
        x = torch.from_numpy(arrays[name])
        at = psnr(x, torch.from_numpy(truth), torch.from_numpy(~arrays["cond_mask"]))
        assert metrics["psnr"][name] == pytest.approx(at, abs=1e-3)
    where = {"psnr": ~arrays["cond_mask"], "query": arrays["target_mask"]}
    for found, region in ((metrics, "psnr"), (metrics["query"], "query")):
        tensors = (torch.from_numpy(x) for x in (draws.mean(0), truth, where[region]))
        assert found["psnr"]["mean"] == pytest.approx(psnr(*tensors), abs=1e-3)
    # The convolution is what an untrained network makes of it.
    assert metrics["psnr"]["regression"] > metrics["psnr"]["convolution"] + 0.25
    samples = np.load(tmp_path / "run/samples.npy")
    assert samples.shape == (40, 16, 16, 3) and samples.dtype == np.uint8
    expected = np.round(draws[0].transpose(0, 2, 3, 1) * 255)
    assert np.abs(samples - expected).max() <= 1e-3


def test_a_run_beats_interpolation(tmp_path):
    """Checkerboards of random greys: what is around a pixel misleads, and a network can know."""
    (tmp_path / "boards").mkdir()
    place = np.arange(16)
    sign = (-1.0) ** (place[:, None] + place)
    for i, (grey, height) in enumerate(np.random.default_rng(0).uniform(-1, 1, (200, 2))):
        pixels = np.round(127.5 + 50 * grey + 70 * height * sign).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "boards" / f"{i:03}.png")
    flags = """--steps 20 --sample-every 999 --save-every 999 --lr 1e-2 --num-timesteps 1000
    --sample-steps 8 --num-draws 4 --num-samples 20"""
    run(tmp_path / "run", "--data", str(tmp_path / "boards"), *flags.split())
    metrics = read_json(tmp_path / "run/metrics.json")
    for found in (metrics, metrics["query"]):
        assert found["psnr"]["mean"] > found["psnr"]["convolution"] + 3
        assert found["ssim"]["mean"] > found["ssim"]["convolution"] + 0.4


def save_blobs(folder, n):
    """Fields in black and white: between the two a linear guess is grey, and a network knows."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for i, field in enumerate(gaussian_blur(torch.randn(n, 1, 16, 16, generator=g), 3.0)):
        Image.fromarray(np.where(field[0] > 0, 228, 28).astype(np.uint8)).save(folder / f"{i}.png")


def test_a_run_learns_what_is_not_linear(tmp_path):
    save_blobs(tmp_path / "blobs", 600)
    flags = """--steps 120 --sample-every 999 --save-every 999 --lr 1e-2 --num-timesteps 1000
    --dim 16 --sample-steps 8 --num-draws 4 --num-samples 30 --no-baselines"""
    run(tmp_path / "run", "--data", str(tmp_path / "blobs"), *flags.split())
    history = read_json(tmp_path / "run/history.json")["val_loss"]
    assert 0.7 < history[0] < 1.15 and history[-1] < 0.9 * history[0]  # from near 1, by design
    metrics = read_json(tmp_path / "run/metrics.json")
    for found in (metrics, metrics["query"]):
        decibels = found["psnr"]
        assert decibels["regression"] > decibels["linear"] - 0.1
        assert decibels["mean"] > decibels["draw"] + 0.5


def test_more_draws_from_a_checkpoint(tmp_path, monkeypatch):
    run(tmp_path / "run", "--objective", "v")  # from the start another image for another noise
    again = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "again")]
    script.main([*again, "--num-draws", "3", "--num-samples", "5"])
    draws = np.load(tmp_path / "again/reconstructions.npz")["draws"]
    before = np.load(tmp_path / "run/reconstructions.npz")["draws"]
    assert draws.shape == (3, 5, *SHAPE)
    np.testing.assert_allclose(draws[:2, :4], before, atol=1e-4)
    assert np.abs(draws[2] - draws[:2]).max((2, 3, 4)).min() > 0.1  # a new draw is another one

    monkeypatch.setattr(fused_ddpm.ops, "BACKENDS", ())  # as FUSED_DDPM=0 has it
    again[-1] = str(tmp_path / "reference")
    script.main([*again, "--num-draws", "3", "--num-samples", "5"])
    reference = np.load(tmp_path / "reference/reconstructions.npz")
    np.testing.assert_allclose(reference["draws"], draws, rtol=0, atol=1e-4)


# -- incomplete images -----------------------------------------------------------------------------


def same_bits(one, other):
    """Of two runs: all tensors of their checkpoints, histories; facts but for the data's hash."""
    one, other = (torch.load(path / "last.pt", weights_only=True) for path in (one, other))
    facts = ({**run["facts"], "images": None} for run in (one, other))
    assert one["history"] == other["history"] and next(facts) == next(facts)
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        for name, x in one[part].items():
            assert torch.equal(x, other[part][name]), name
            assert x.isfinite().all(), name
    moments = [part["optimizer"]["state"].values() for part in (one, other)]
    for kept in zip(*moments, strict=True):
        assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    return one


def save_half_images(folder, garbage):
    """Smooth images of 24x24 with holes, the same in every folder, and garbage in them."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    fields = 50 + 10 * gaussian_blur(torch.randn(8, 1, 24, 24, generator=g), 1.5)[:, 0].numpy()
    masks = (torch.rand(8, 24, 24, generator=g) < 0.4).numpy()
    for i, (field, mask) in enumerate(zip(fields, masks, strict=True)):
        np.savez(folder / f"{i}.npz", image=np.where(mask, field, garbage(field)), mask=mask)


@pytest.mark.parametrize("flags", ["", "--observed-only 0.6 --flip --mask-pattern random,block"])
def test_no_bit_of_a_run_is_of_what_is_missing(tmp_path, flags):
    """NaN there, or noise: checkpoint, history and reconstructions are the same."""
    rng = np.random.default_rng(1)
    save_half_images(tmp_path / "nan", lambda field: np.full_like(field, np.nan))
    save_half_images(tmp_path / "noise", lambda field: rng.normal(0, 1e4, field.shape))
    for name in ("nan", "noise"):
        more = f"--data {tmp_path / name} --sample-every 3 {flags}"
        run(tmp_path / f"run_{name}", *more.split())
    checkpoint = same_bits(tmp_path / "run_nan", tmp_path / "run_noise")
    assert checkpoint["config"]["observed_only"] == (0.6 if flags else 1.0)
    one, other = (np.load(tmp_path / f"run_{x}/reconstructions.npz") for x in ("nan", "noise"))
    assert one.files == other.files and "observed" in one.files
    assert all(np.array_equal(one[name], other[name]) for name in one.files)
    seen, there = one["cond_mask"], one["observed"]
    assert not (seen & ~there).any() and np.array_equal(one["target_mask"], there & ~seen)
    assert np.isfinite(one["draws"]).all() and one["draws"].std() > 0.05


def test_no_bit_of_a_run_is_of_what_is_not_read(tmp_path, monkeypatch):
    """--observed-only 0.4 of complete images: noise in all other pixels, wherever they are used."""
    flags = "--observed-only 0.4 --sparsity 0.1 0.2 --flip --sample-every 3 --no-baselines"
    run(tmp_path / "whole", *flags.split())
    read, changed = Data._train.func, []

    def with_noise(part, keys):
        noise = (255 * torch.rand(part.images.shape)).byte()
        images = torch.where(hide(keys, 16, 0.4), part.images, noise)
        changed.append((images != part.images).double().mean().item())
        return replace(part, images=images)

    @functools.cache
    def corrupted(data):
        val, train = read(data)  # of a seed of 0, so keys are indices
        keys = TEST_INDEX * (torch.arange(len(val)) < 128) + torch.arange(len(val))
        return with_noise(val, keys), with_noise(train, torch.arange(len(train)))

    monkeypatch.setattr(Data, "_train", property(corrupted))
    run(tmp_path / "noise", *flags.split())
    assert len(changed) == 2 and min(changed) > 0.55
    same_bits(tmp_path / "whole", tmp_path / "noise")
    one, other = (np.load(tmp_path / x / "reconstructions.npz") for x in ("whole", "noise"))
    assert all(np.array_equal(one[name], other[name]) for name in one.files)
    assert "observed" not in one.files  # what is measured is measured on whole images


def test_a_learned_mask_shows_what_tells_most(tmp_path):
    """The order is made of the training images, and kept by name for what comes after."""
    run(tmp_path / "run", "--mask-pattern", "learned", "--no-baselines")
    order = np.load(tmp_path / "run/mask.npy")
    assert sorted(order.ravel()) == list(range(256))
    config = torch.load(tmp_path / "run/last.pt", weights_only=True)["config"]
    assert config["mask_pattern"] == str(tmp_path / "run/mask.npy")
    again = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "again")]
    script.main([*again, "--test-sparsity", "0.3", "--no-baselines"])
    for name, count in [("run", 51), ("again", 77)]:
        seen = np.load(tmp_path / name / "reconstructions.npz")["cond_mask"]
        assert (seen[:, 0] == (order < count)).all()
    script.main([*again, "--test-pattern", "grid", "--no-baselines", "--overwrite"])
    seen = np.load(tmp_path / "again/reconstructions.npz")["cond_mask"]
    assert (seen.sum((1, 2, 3)) == 51).all() and not (seen[:, 0] == (order < 51)).all()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--sparsity 0", "argument --sparsity: must lie in (0, 1), got 0"),
        ("--sparsity 1", "argument --sparsity: must lie in (0, 1), got 1"),
        ("--sparsity -0.1", "argument --sparsity: must lie in (0, 1), got -0.1"),
        ("--sparsity much", "argument --sparsity: invalid float value: 'much'"),
        (
            "--sparsity 0.6",
            "--sparsity 0.6 and --target-sparsity 0.6: "
            "the masks are disjoint, so their sum must not exceed 1",
        ),
        (
            "--image-size 30 --dim-mults 1 2 4",
            "--image-size 30: the U-Net halves it 2 times, so it must be a multiple of 4",
        ),
        (
            "--sparsity 0.001",
            "--sparsity 0.001: that is 0 pixels to see and 0 to score of the 256 there are",
        ),
        ("--sample-steps 100", "--sample-steps 100: at most --num-timesteps, 50"),
        ("--epochs 1", "argument --epochs: not allowed with argument --steps"),
        (
            "--mask-pattern stripes",
            "--mask-pattern stripes: choose from random, block, grid, walk, learned, or a .npy",
        ),
        ("--observed-only 0", "argument --observed-only: must lie in (0, 1], got 0"),
        ("--test-sparsity 1", "argument --test-sparsity: must lie in (0, 1), got 1"),
        ("--sparsity 0.3 0.1", "--sparsity 0.3 0.1: is a fraction, or two, the smaller first"),
        ("--mask-mode never", "argument --mask-mode: invalid choice: 'never'"),
        ("--num-draws 1001", "argument --num-draws: must lie in [1, 1000], got 1001"),
        ("--batch-size 0", "argument --batch-size: must lie in [1,"),
    ],
)
def test_bad_flags_exit_with_2(tmp_path, capsys, flags, message):
    call = lambda: run(tmp_path / "run", *flags.split())
    assert message in exits_with(2, capsys, call)
    assert not (tmp_path / "run").exists()
