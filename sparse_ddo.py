"""Sparse reconstruction in function space: an image is a function on the unit square, on any grid.

Denoising diffusion operators (DDO, Lim et al. 2023, arXiv 2302.07400), conditioned on 10% of the
pixels. State, noise and network are defined for functions and only then sampled, so that one
network trained at 32x32 also reconstructs at 48x48 or 64x64. (The context is an image that enters
through convolutions on the training grid: that path is tied to it.) In the orthonormal cosine
transform (DCT), mode k = (k1, k2), integers, with t from 0 to 1:

    z_t = alpha_k(t) x + sigma(t) e,    alpha_k = a exp(-|k|^2 s(t)^2 / 2)       blurred and noisy
    a^2 + sigma^2 = 1,    log(a^2 / sigma^2) = -2 ln tan(pi t' / 2), t' such that it is 10 to -10
    e: a Gaussian process with covariance exp(-(r / l)^2), mirrored at the edges

e is no white noise, which is no function; its variance is 1 inside, 2 at an edge, 4 in a corner.
The blur is a Gaussian of s / pi image widths (blurring diffusion: Hoogeboom & Salimans 2022,
arXiv 2209.05557). The network is an FNO U-Net. The paper predicts e; on a small budget that learns
slowly, so the small preset predicts x. Given e, alpha_t x = z_t - sigma_t e. A step t -> s draws
from the posterior of z_s given x and z_t, mode by mode, with alpha_ts = alpha_t / alpha_s,
r = sigma_s / sigma_t and v = sigma_t^2 - alpha_ts^2 sigma_s^2:

    z_s = alpha_ts r^2 z_t + (v / sigma_t^2) alpha_s x + r sqrt(v) e'

With x from the network nothing is divided by alpha_t, nearly 0 for the modes blurred away.

    python sparse_ddo.py                                                     # train, reconstruct
    python sparse_ddo.py --sample out/sparse_ddo/last.pt --image-size 64     # on a finer grid

Measured: the first command, on Fashion-MNIST, takes 7 min 26 s on two cores of a Zen 5. On 256 test
images, unseen pixels, the mean of 8 draws has 18.8 dB as has the best linear method, one draw 17.0.
"""

import copy
import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from fused_ddpm import graphed, masked_loss, seeded_normal, seeded_uniform
from fused_ddpm.config import RunConfig, flag
from fused_ddpm.fill import baselines
from fused_ddpm.fno import FnoUnet, places_in_shells, prepare_to_compile, resize
from fused_ddpm.images import Data, mirror_half, to_float, to_unit
from fused_ddpm.masks import PATTERNS, TEST_INDEX, check_masks, make_masks
from fused_ddpm.noise import STEP_NOISE, TIMESTEP, TRAIN_NOISE
from fused_ddpm.optimizer import make_optimizer
from fused_ddpm.pictures import draw_losses, draw_reconstructions, draw_sheet, show_seen
from fused_ddpm.results import draw_each, write_results
from fused_ddpm.runs import Run

# --------------------------------------------------------------------------------------------------
# Config: a field is a flag. The first value suits two CPU cores, full= is for a GPU.


@dataclass
class Model:  # what the weights are: fixed with a checkpoint
    dim: int = flag(32, "channels at full resolution", full=64, within="[1, 4096]")
    dim_mults: list[int] = flag([1, 2, 3], "channels of each level, times dim", full=[1, 2, 4])
    num_blocks: int = flag(1, "blocks of each level", full=2, within="[1, 100]")
    modes: int = flag(16, "Fourier modes a direction, halved with each level", within="[4, 256]")
    conditioning: str = flag("encoder", "of the sparse image", ["encoder", "concat"])
    objective: str = flag("x0", "what the network predicts", ["eps", "x0"], full="eps")
    length_scale: float = flag(0.05, "l of the noise, in image widths", within="(0, 1)")
    blur_min: float = flag(0.0, "s at t = 0; above 0 all stays a little blurred", within="[0, 1]")
    blur_max: float = flag(0.25, "s at t = 1", within="[0, 1]")


@dataclass
class Training:  # how they are made: fixed with a run, but for what is marked later
    data: str = flag("auto", "fashion_mnist, mnist, cifar10, shapes, or a folder of images")
    flip: bool = flag(False, "mirror half of the training images", full=True)
    sparsity: list[float] = flag([0.1], "fraction of pixels seen; two: from .. to", within="(0, 1)")
    target_sparsity: float | None = flag(None, "of the query; the same", within="(0, 1)")
    mask_seed: int = flag(42, "masks are the same in every epoch", within="[0, 2147483647]")
    mask_pattern: str = flag("random", f"{', '.join(PATTERNS)}, several, or FILE.npy")
    loss_region: str = flag("full", "the whole image, or the query pixels", ["full", "query"])
    loss: str = flag("l2", "distance to what is predicted", ["l2", "l1", "huber"])
    steps: int | None = flag(1200, "optimizer steps", full=None, later=True)
    epochs: int | None = flag(None, "the same in passes over the data", full=100, later=True)
    batch_size: int = flag(32, "images a step, over all processes; also of sampling", full=128)
    optimizer: str = flag("adam", "see optimizer.py", ["muon", "adam"])
    lr: float = flag(2e-3, "peak learning rate", full=2e-4, within="(0, 1]", later=True)
    weight_decay: float = flag(0.0, "a step, times lr", within="[0, 1)")
    lr_schedule: str = flag("cosine", "after warming up", ["constant", "cosine"], full="constant")
    grad_clip: float = flag(1.0, "largest norm of the gradient", within="(0, inf]", later=True)
    ema_decay: float = flag(0.995, "of the weights sampled from", full=0.9999, within="[0, 1)")


@dataclass
class Sampling:  # how they are used: free
    image_size: int = flag(32, "side of the grid", within="[4, 4096]", later=False)
    sample_steps: int = flag(20, "network calls for an image", full=250)
    num_samples: int = flag(256, "test images to reconstruct", within="[1, 1048576]")
    num_draws: int = flag(8, "K, reconstructions of each", within="[1, 1000]")
    enforce_observed: bool = flag(True, "put the observed pixels back at the end")
    baselines: bool = flag(True, "also the Gaussian conditional mean; memory (C H W)^2")


@dataclass
class Config(RunConfig, Sampling, Training, Model):
    def check(self):
        """(wrong, message) of what no flag shows by itself."""
        factor = 2 ** len(self.dim_mults)
        yield not self.dim_mults, "--dim-mults: needs one level at least"
        yield self.image_size < self.modes, (
            f"--image-size {self.image_size}: must be at least --modes, {self.modes}"
        )
        yield self.blur_min > self.blur_max, (
            f"--blur-min {self.blur_min}: must not exceed --blur-max, {self.blur_max}"
        )
        yield self.modes % factor, f"--modes {self.modes}: must be a multiple of {factor}"
        yield from check_masks(self)


# --------------------------------------------------------------------------------------------------
# Schedule: time is continuous, from the image at t = 0 to noise at t = 1.


def make_schedule(t, config):
    """(a, sigma, s), float64 like t: what x and noise are multiplied with, the blur's width."""
    end = 2 / math.pi * math.atan(math.exp(-5))  # where log(a^2 / sigma^2) is 10
    angle = math.pi / 2 * (end + (1 - 2 * end) * t.double())
    rise = torch.sin(math.pi / 2 * t.double()) ** 2
    return angle.cos(), angle.sin(), config.blur_min + (config.blur_max - config.blur_min) * rise


def log_alpha(t, n, config):
    """ln alpha_k, float64 (len(t), n, n)."""
    a, _, blur = make_schedule(t, config)
    k = torch.arange(n, dtype=torch.float64, device=t.device)
    return a.log()[:, None, None] - (k[:, None] ** 2 + k**2) * blur[:, None, None] ** 2 / 2


def sampling_table(n, config):
    """Of each of S steps its time, and what multiplies z_t, x and white noise, (S, n, n); sigma_t.

    All float32. Of times and sigma_t there is one more, that of the end at t = 0.
    """
    times = torch.linspace(1, 0, config.sample_steps + 1, dtype=torch.float64)
    log, sigma = log_alpha(times, n, config), make_schedule(times, config)[1][:, None, None]
    alpha_ts = (log[:-1] - log[1:]).exp()
    share = (sigma[1:] / sigma[:-1]) ** 2  # sigma_s^2 / sigma_t^2
    fresh = 1 - alpha_ts**2 * share  # v / sigma_t^2
    if config.objective == "x0":
        of_x = fresh * log[1:].exp()
    else:  # eps leads to alpha_t x; where alpha_t is nearly 0 that is but rounding
        of_x = fresh * (log[1:] - log[:-1]).exp() * (log[:-1] > math.log(1e-3))
    spread = (fresh * sigma[1:] ** 2).sqrt() * noise_scale(n, config.length_scale, "cpu")
    spread[-1] = 0  # end on the mean
    rows = times, alpha_ts * share, of_x, spread, sigma
    return [x.float().to(config.device) for x in rows]


# --------------------------------------------------------------------------------------------------
# Functions on a grid: cosine modes, and noise that is the same function on any grid.


@functools.cache
def dct_matrix(n, device):
    """The orthonormal DCT-II: its rows are cosines. At these sizes two products beat an FFT."""
    k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    scale = torch.where(k == 0, 1 / n, 2 / n).sqrt()
    return (torch.cos(math.pi * k * ((x + 0.5) / n)) * scale).float().to(device)


def dct(x):
    """Cosine coefficients (..., n, n) of images (..., n, n), proportional to n."""
    matrix = dct_matrix(x.shape[-1], x.device)
    return matrix @ x @ matrix.T


def idct(u):
    matrix = dct_matrix(u.shape[-1], u.device)
    return matrix.T @ u @ matrix


@functools.cache
def noise_scale(n, length, device):
    """Standard deviations (n, n) of the noise's modes: covariance exp(-(r / length)^2)."""
    k = torch.arange(n, dtype=torch.float64)
    spectrum = length * math.pi**0.5 * torch.exp(-((math.pi * k * length) ** 2) / 4)
    return (n * (spectrum[:, None] * spectrum).sqrt()).float().to(device)


def gp_noise(white, config):
    """A Gaussian process (B, C, n, n) from white noise; of variance 1 inside, if resolved."""
    return idct(noise_scale(white.shape[-1], config.length_scale, white.device) * white)


def white_noise(seeds, channels, n, step, steps):
    """Normals (B, channels, n, n), one a mode, for a step 0..steps: the same on any grid."""
    white = seeded_normal(seeds, (n * n * channels,), STEP_NOISE, step, steps + 1)
    return white[:, places_in_shells(n, channels, seeds.device)]


# --------------------------------------------------------------------------------------------------
# Diffusion.


def q_sample(x_start, t, noise, config):
    """z_t of the forward process. x_start, noise: (B, C, n, n); t: (B,) in [0, 1]."""
    alpha = log_alpha(t, x_start.shape[-1], config).exp().float()[:, None]
    _, sigma, _ = make_schedule(t, config)
    return idct(alpha * dct(x_start)) + sigma.float()[:, None, None, None] * noise


def predict(model, z_t, t, cond, cond_mask, config):
    """The network on the noised function, the sparse image (0 where unseen) and its mask."""
    with torch.autocast(z_t.device.type, torch.bfloat16, enabled=config.bfloat16):
        return model(z_t, t, cond, cond_mask)


def training_loss(model, x_start, t, noise, masks, config):
    """The loss of a batch (B, C, n, n) in [-1, 1]. t: (B,) in [0, 1]; masks: see make_masks."""
    cond_mask, target_mask = masks
    z_t = q_sample(x_start, t, noise, config)
    out = predict(model, z_t, t, x_start * cond_mask, cond_mask, config)
    goal = noise if config.objective == "eps" else x_start
    where = target_mask if config.loss_region == "query" else None
    return masked_loss(out, goal, where, kind=config.loss)


def make_sampler(model, channels, config):
    """sample(seeds, cond, cond_mask): z (B, C, n, n) after each reverse step, n = image_size.

    seeds: int64 (B,). cond: (B, C, m, m) in [-1, 1], 0 outside cond_mask (B, 1, m, m). An image
    depends on its own seed, pixels and mask alone.
    """
    n, steps = config.image_size, config.sample_steps
    times, of_z, of_x, spread, sigma = sampling_table(n, config)

    @graphed  # on a GPU one launch a step, network and all
    def reverse_step(z, step, seeds, cond, cond_mask):
        t = times[step].expand(len(z))
        out = predict(model, z, t, cond, cond_mask, config).float()
        z = dct(z)
        if config.objective == "x0":
            x = dct(out.clamp(-1, 1))
        else:  # alpha_t x
            x = z - sigma[step] * dct(out)
        noise = spread[step] * white_noise(seeds, channels, n, step + 1, steps)
        return idct(of_z[step] * z + of_x[step] * x + noise)

    @torch.no_grad()
    def sample(seeds, cond, cond_mask):
        z = gp_noise(white_noise(seeds, channels, n, 0, steps), config)
        for step in range(steps):
            z = reverse_step(z, step, seeds, cond, cond_mask)
            if config.enforce_observed and step + 1 == steps and z.shape == cond.shape:
                z = torch.where(cond_mask, cond, z)
            yield z

    return sample


# --------------------------------------------------------------------------------------------------
# Training.


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- decay ema + (1 - decay) model, with less memory while there is little to remember."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(step, config):
    warm_up = min((step + 1) / 100, 1)
    if config.lr_schedule == "constant":
        return config.lr * warm_up
    return config.lr * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))


def masks_of(index, size, config):
    """Fixed masks of images `index` (B,): of the context and of the query."""
    return make_masks((config.mask_seed << 32) + index, 0, size, config)


@torch.no_grad()
def held_out_losses(model, held_out, config):
    """On fixed images with fixed times, noise and masks: they compare between steps."""
    losses = {}
    for name, (index, part) in held_out.items():
        t = torch.linspace(0, 1, len(index), device=index.device)
        noise = gp_noise(seeded_normal(index, part.images.shape[1:]), config)
        masks = masks_of(TEST_INDEX + index, part.images.shape[-1], config)
        loss = training_loss(model, to_float(part.images), t, noise, masks, config)
        losses[f"{name}_loss"] = loss
    return losses


def train(run, model, ema, data, config):
    """Train model in place, ema behind it."""
    optimizer = make_optimizer(model, config)
    run.restore(model=model, ema=ema, optimizer=optimizer)
    network = run.parallel(model)  # over all processes; model itself where there is one

    for step in run.steps():
        index, keys = run.batch(step, len(data.images))  # a key to all that is random of an image
        x_start = to_float(data.images[index])
        masks = masks_of(index, x_start.shape[-1], config)
        start = seeded_uniform(run.step_key, TIMESTEP)
        t = (start + run.places) % 1  # low discrepancy: evenly over the batch
        noise = gp_noise(seeded_normal(keys, data.shape, TRAIN_NOISE), config)
        if config.flip:
            x_start, *masks = mirror_half(keys, x_start, *masks)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = training_loss(network, x_start, t, noise, masks, config)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        update_ema(ema, model, step, config.ema_decay)
        run.log(loss, norm)

        if run.reports(step):  # with saving, the only time the host waits for the device
            run.report(step, **held_out_losses(ema, data.held_out, config))
        if run.draws(step):
            found = reconstruct(run, ema, data.held_out["val"][1].images[:8], 2, config)
            run.write(f"step_{step + 1:06d}.png", draw_reconstructions(found))
        if run.saves(step):  # also when told to stop
            run.save(step, model=model, ema=ema, optimizer=optimizer)
    run.finish(data, lambda part: held_out_losses(ema, part, config))


# --------------------------------------------------------------------------------------------------


def reconstruct(run, model, images, num_draws, config, file=None):
    """K draws for each test image, uint8 (N, C, m, m), as a dict, values in [0, 1], on the CPU.

    truth: (N, C, m, m); cond_mask, target_mask: bool (N, 1, m, m); draws: (K, N, C, n, n) with
    n = config.image_size.
    """
    channels, size, truth = images.shape[1], config.image_size, to_float(images)
    index = torch.arange(len(images), device=images.device)
    cond_mask, target_mask = masks_of(TEST_INDEX + index, images.shape[-1], config)
    sample = make_sampler(model, channels, config)
    inputs, config = (truth * cond_mask, cond_mask), replace(config, num_draws=num_draws)
    draws = draw_each(run, model, sample, inputs, (channels, size, size), config, file)
    found = {"truth": to_unit(truth), "cond_mask": cond_mask, "target_mask": target_mask}
    return {name: x.cpu() for name, x in found.items()} | {"draws": draws}


def draw_resolutions(run, model, images, config):
    """The same images, pixels and noise, reconstructed on three grids."""
    m, columns = images.shape[-1], {}
    for n in (m, m * 3 // 2, m * 2):
        changed = replace(config, image_size=n, enforce_observed=False)
        found = reconstruct(run, model, images, 1, changed)
        columns[f"at {n}x{n}"] = found["draws"][0]
    seen = show_seen(found["truth"], found["cond_mask"])
    columns = {"original": found["truth"], "seen": seen} | columns
    return draw_sheet({name: F.interpolate(x, size=6 * m) for name, x in columns.items()})


def main(argv=None):
    with Run(Config, argv, tf32=False) as run:  # the transforms are matrix products
        config = run.config
        data = Data(config, run.facts)
        torch.manual_seed(config.seed)  # of the first weights
        model = FnoUnet(data.shape[0], config).to(config.device)
        if config.compile:
            prepare_to_compile()
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        run.introduce(model, data)

        if config.sample:
            run.restore(ema=ema)
        else:
            train(run, model, ema, data, config)
            run.write("loss.png", draw_losses(run.history))

        if config.compile:
            ema.compile()
        images = data.test(config.num_samples)
        found = reconstruct(run, ema, images, config.num_draws, config, file="draws.npy")
        run.write("resolutions.png", draw_resolutions(run, ema, data.test(6), config))
        found |= baselines(found, data, config)
        draws = resize(found["draws"], data.shape[-1])  # of another grid, what both can hold
        write_results(run, found, draws=draws, regions=("unseen", "query"))


if __name__ == "__main__":
    main()
