"""Sparse reconstruction in function space: an image is a function on the unit square, on any grid.

Denoising diffusion operators (DDO, Lim et al. 2023, arXiv 2302.07400), conditioned on points of the
function: 10% of the pixels, or any places. State, noise and network are functions, kept as cosine
modes, and only the result is put on a grid: what is learnt at 32x32 reconstructs at 48x48 or 64x64.

The points alone give the best linear guess h by the covariance of the training images (kriging; see
points.py), off by a variance v(u) at a place u, more in an image whose points show more contrast.
What diffuses is what they leave open, scaled to one width at every place: r = A (x - h) / std with
std^2 = v / mean v, A's rows the channels' principal axes. In the DCT, k = (k1, k2), t from 0 to 1:

    z_t = alpha_k(t) r + sigma(t) e,    alpha_k = a exp(-|k|^2 b(t)^2 / 2)       blurred and noisy
    a^2 + sigma^2 = 1,    log(a^2 / sigma^2) = -2 ln tan(pi t' / 2), t' such that it is 10 to -10
    b = b_min + (b_max - b_min) sin^2(pi t / 2),    the width of the blur
    e: a Gaussian process with covariance exp(-(d / l)^2) at a distance d, mirrored at the edges

e is no white noise, which is no function; its variance is 1 inside, 2 at an edge, 4 in a corner.
The blur is a Gaussian of b / pi image widths (Hoogeboom & Salimans 2022, arXiv 2209.05557).

The network, an FNO U-Net, predicts the residual to the best linear guess g of r, as in
sparse_ddpm.py, but mode by mode. With V_k the variance of r in an axis's mode k, N_k of sigma e:

    g_k = alpha_k V_k z_k / D_k,    D_k = alpha_k^2 V_k + N_k, the variance of z_k
    r_k = g_k + f_k sqrt(V_k N_k / D_k)    so that f has to be white noise or so at every t

On every grid that holds a mode, its coefficient divided by the side is the same number. z is kept
as these numbers, for the modes of the training grid: of others no training image says anything.
x = h + std A^T r is made on that grid, has no others either, and can be shown on any.

A step t -> s is that of DDIM (Song et al. 2021) for r - g, and exact for the linear rest, whose
spread few steps would narrow:

    z_s = sqrt((D_s - w) / D_t) z_t + c (r - g) + sqrt(w) e'
    c = alpha_s - alpha_t sqrt((N_s - w) / N_t)

where w is eta^2 of the variance that the posterior of z_s given r and z_t has.

    python sparse_ddo.py                                                     # train, reconstruct
    python sparse_ddo.py --sample out/sparse_ddo/last.pt --image-size 64     # on a finer grid

Measured: 9 minutes or so on two cores. On 256 test images of Fashion-MNIST, unseen pixels, the mean
of 8 draws has 20.0 dB, one call 20.4, the best linear method 18.8.
"""

import copy
import math
from dataclasses import dataclass, replace

from fused_ddpm import graphed, grids, masked_loss, seeded_normal
from fused_ddpm.config import RunConfig, flag
from fused_ddpm.fill import baselines
from fused_ddpm.fno import FnoUnet
from fused_ddpm.grids import dct, gp_noise, idct, noise_scale, resize
from fused_ddpm.images import Data, mirror_half, to_float, to_unit
from fused_ddpm.linear import once_each
from fused_ddpm.masks import PATTERNS, TEST_INDEX, check_masks, make_masks
from fused_ddpm.metrics import Intervals
from fused_ddpm.noise import STEP_NOISE, TIMESTEP, TRAIN_NOISE, seeded_uniform
from fused_ddpm.optimizer import make_optimizer
from fused_ddpm.pictures import draw_losses, draw_reconstructions, draw_resolutions
from fused_ddpm.points import LinearGuess, Points, Seen, points_of, put_back, random_points
from fused_ddpm.results import draw_each, write_results
from fused_ddpm.runs import Run

import torch
import torch.nn as nn

# --------------------------------------------------------------------------------------------------
# Config: a field is a flag. The first value suits two CPU cores, full= is for a GPU.


@dataclass
class Model:  # what the weights are: fixed with a checkpoint
    dim: int = flag(16, "channels at full resolution", full=64, within="[1, 4096]")
    dim_mults: list[int] = flag([1, 4, 6], "channels of each level, times dim", full=[1, 2, 2])
    num_blocks: int = flag(1, "blocks of each level", full=2, within="[1, 100]")
    modes: int = flag(16, "cosine modes a direction, halved with each level", within="[4, 256]")
    spectral: int = flag(1, "how many of the coarsest levels use them", full=3, within="[0, 100]")
    conditioning: str = flag("setconv", "way in of the points", ["setconv", "encoder", "concat"])
    objective: str = flag("residual", "what the network predicts", ["residual", "eps", "x0"])
    length_scale: float = flag(0.05, "l of the noise, in image widths", within="(0, 1)")
    blur_min: float = flag(0.0, "b at t = 0; above 0 the last step undoes a blur", within="[0, 1]")
    blur_max: float = flag(0.25, "b at t = 1", within="[0, 1]")


@dataclass
class Training:  # how they are made: fixed with a run, but for what is marked later
    data: str = flag("auto", "fashion_mnist, mnist, cifar10, shapes, or a folder of images")
    flip: bool = flag(False, "mirror half of the training images", full=True)
    sparsity: list[float] = flag([0.1], "fraction of pixels seen; two: from .. to", within="(0, 1)")
    target_sparsity: float | None = flag(None, "of the query; None: as sparsity", within="(0, 1)")
    mask_seed: int = flag(42, "of all masks, whatever --seed is", within="[0, 2147483647]")
    mask_mode: str = flag("random_epoch", "when redrawn", ["random_epoch", "fixed"], full="fixed")
    mask_pattern: str = flag("random", f"{', '.join(PATTERNS)}, several, or FILE.npy")
    loss_region: str = flag("full", "the whole image, or the query pixels", ["full", "query"])
    loss: str = flag("l2", "distance to what is predicted", ["l2", "l1", "huber"])
    steps: int | None = flag(6500, "optimizer steps", full=None, later=True)
    epochs: int | None = flag(None, "the same in passes over the data", full=100, later=True)
    batch_size: int = flag(32, "images a step, over all processes; also of sampling", full=128)
    optimizer: str = flag("muon", "see optimizer.py", ["muon", "adam"], full="adam")
    lr: float = flag(3e-3, "peak learning rate", full=2e-4, within="(0, 1]", later=True)
    weight_decay: float = flag(0.0, "a step, times lr", within="[0, 1)")
    lr_schedule: str = flag("cosine", "after warming up", ["constant", "cosine"], full="constant")
    grad_clip: float = flag(1.0, "largest norm of the gradient", within="(0, inf]", later=True)
    ema_decay: float = flag(0.995, "of the weights sampled from", full=0.9999, within="[0, 1)")


@dataclass
class Sampling:  # how they are used: free
    image_size: int = flag(32, "side of the grid", within="[4, 4096]", later=False)
    sample_steps: int = flag(30, "network calls for an image", full=250, within="[1, 10000]")
    eta: float = flag(0.0, "noise of a step: 0 none, 1 the posterior's", within="[0, 1]")
    num_samples: int = flag(256, "test images to reconstruct", within="[1, 1048576]")
    num_draws: int = flag(8, "K, reconstructions of each", within="[1, 1000]")
    enforce_observed: bool = flag(True, "put the observed points back at the end")
    baselines: bool = flag(True, "also the Gaussian conditional mean; memory (C H W)^2")


@dataclass
class Config(RunConfig, Sampling, Training, Model):
    def check(self):
        """(wrong, message) of what no flag shows by itself."""
        factor = 2 ** len(self.dim_mults)
        yield not self.dim_mults, "--dim-mults: needs one level at least"
        small = f"--image-size {self.image_size}: must be at least --modes, {self.modes}"
        yield not self.sample and self.image_size < self.modes, small
        blur = f"--blur-min {self.blur_min}: must not exceed --blur-max, {self.blur_max}"
        yield self.blur_min > self.blur_max, blur
        yield self.modes % factor, f"--modes {self.modes}: must be a multiple of {factor}"
        yield from check_masks(self)


# --------------------------------------------------------------------------------------------------
# Schedule: time is continuous, from the image at t = 0 to noise at t = 1.

ROUNDING = 1e-12  # a variance: float32 leaves as much to modes that hardly have noise


def make_schedule(t, config):
    """(a, sigma, b), float64 like t: what x and noise are multiplied with, the blur's width."""
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
    """times (S,); (alpha_s^2, N_s - w, c, sqrt(w)), (S, 4, n, n): see above; modes divided by n."""
    times = torch.linspace(1, 0, config.sample_steps + 1, dtype=torch.float64) ** 1.5  # denser at 0
    log, sigma = log_alpha(times, n, config), make_schedule(times, config)[1][:, None, None]
    log[-1], sigma[-1] = 0, 0  # the last step ends at the clean image
    alpha, kept = log.exp(), (log[:-1] - log[1:]).exp() * sigma[1:] / sigma[:-1]
    w = config.eta**2 * sigma[1:] ** 2 * (1 - kept**2)
    left = (sigma[1:] ** 2 - w).clamp(min=0)
    c = alpha[1:] - alpha[:-1] * left.sqrt() / sigma[:-1]
    scale = noise_scale(n, config.length_scale, "cpu").double()
    rows = alpha[1:] ** 2, left * scale**2 + ROUNDING, c, w.sqrt() * scale
    return times[:-1].float().to(config.device), torch.stack(rows, 1).float().to(config.device)


# --------------------------------------------------------------------------------------------------
# Diffusion.


def q_sample(r, t, noise, config):
    """z_t, as modes divided by n; so is noise, see gp_noise. r: (B, C, n, n); t: (B,) in [0, 1]."""
    alpha = log_alpha(t, r.shape[-1], config).exp().float()[:, None]
    _, sigma, _ = make_schedule(t, config)
    return alpha * dct(r) / r.shape[-1] + sigma.float()[:, None, None, None] * noise


def predict(model, z, t, seen, config):
    """(g, r - g, white, k, f): modes (B, C, n, n), divided by n but for white, z / sqrt(D); k: how
    far off g is; f: what the network says, pixels along seen.axes. seen: of LinearGuess.see."""
    h, std, V, n = seen.h, seen.std, seen.V, z.shape[-1]
    alpha = log_alpha(t, n, config).exp().float()[:, None]
    sigma = make_schedule(t, config)[1].float()[:, None, None, None]
    noise = (sigma * noise_scale(n, config.length_scale, z.device)) ** 2 + ROUNDING
    D = alpha**2 * V + noise
    g, k, white = alpha * V * z / D, (V * noise / D).sqrt(), z * D.rsqrt()
    unsure = (std * V.mean(1, True).sum((2, 3), True).sqrt()).log() / 2 + 1  # -1 to 1, or so
    inputs = torch.cat([seen.restore(idct(g) * n), idct(white), h, unsure], dim=1)
    with torch.autocast(z.device.type, torch.bfloat16, enabled=config.bfloat16):
        f = model(inputs, t, seen.features).float()
    if config.objective == "residual":
        rest = k * dct(f)
    elif config.objective == "x0":
        rest = dct(f) / n - g
    else:  # eps; where alpha is nearly 0 that is but rounding
        rest = (z - sigma / n * dct(f)) * (alpha > 1e-3) / alpha.clamp(min=1e-3) - g
    return g, rest, white, k, f


def training_loss(model, guess, x_start, t, noise, masks, points, config):
    """The loss of a batch (B, C, n, n) in [-1, 1]. t, noise: see q_sample; masks: make_masks."""
    n = x_start.shape[-1]
    seen = guess.see(points, n, config.conditioning == "setconv")
    z = q_sample(seen.standardize(x_start), t, noise, config)
    g, rest, _, k, f = predict(model, z, t, seen, config)
    out, goal = f, idct(noise) * n
    if config.objective != "eps":
        out, goal = seen.restore(idct(g + rest) * n), x_start
    if config.objective == "residual":  # in units of how far off the guess is, in x
        square = seen.std.square().mean((2, 3), True) * k.square().mean(1, True).sum((2, 3), True)
        out, goal = (x * square.clamp(min=1e-5).rsqrt() for x in (out, goal))
    where = masks[1] if config.loss_region == "query" else None
    return masked_loss(out, goal, where, kind=config.loss)


def make_sampler(model, shape, config):
    """sample(seeds, points): z (B, C, n, n) after each reverse step, modes divided by n; in the end
    x (B, C, size, size), size = image_size, each a function of its own seed and points alone.

    shape: (C, n, n), of training. seeds: int64 (B,). points: Points, of values in [-1, 1].
    """
    n, size, steps = shape[-1], config.image_size, config.sample_steps
    times, table = sampling_table(n, config)

    @graphed  # on a GPU one launch a step, network and all
    def reverse_step(z, step, t, seeds, *seen):
        seen = Seen(*seen)
        g, rest, white, *_ = predict(model, z, t, seen, config)
        if steps == 1:  # from noise: the posterior mean
            return g + rest
        signal, noise, c, spread = table[step].view(4, n, n)
        D_s = torch.addcmul(noise, signal, seen.V)  # less w
        z = torch.addcmul(c * rest, D_s.sqrt(), white)
        if config.eta:
            z = z + spread * seeded_normal(seeds, shape, STEP_NOISE, step, steps)
        return z

    @torch.no_grad()
    def sample(seeds, points):
        see, as_points = model.guess.see, config.conditioning == "setconv"
        seen = Seen(*once_each(lambda *p: see(Points(*p), size, as_points), *points))
        z = gp_noise(seeded_normal(seeds, shape), config.length_scale)
        for step, t in enumerate(times.expand(len(seeds), -1).T):
            z = reverse_step(z, step, t, seeds, *seen)
            if step + 1 == steps:
                z = seen.restore(idct(z) * n)
                if config.enforce_observed:
                    z = put_back(z, points, config.length_scale)
                z = resize(z, size)
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


def masks_of(index, size, config, epoch=0):
    """Masks of images `index` (B,): of the context and of the query."""
    return make_masks((config.mask_seed << 32) + index, epoch, size, config)


@torch.no_grad()
def held_out_losses(model, held_out, config):
    """On fixed images with fixed times, noise and masks: they compare between steps."""
    losses = {}
    for name, (index, part) in held_out.items():
        t = torch.linspace(0, 1, len(index), device=index.device)
        noise = gp_noise(seeded_normal(index, part.images.shape[1:]), config.length_scale)
        x_start = to_float(part.images)
        masks = masks_of(TEST_INDEX + index, x_start.shape[-1], config)
        given = noise, masks, points_of(x_start, masks[0])
        losses[f"{name}_loss"] = training_loss(model, model.guess, x_start, t, *given, config)
    return losses


def train(run, model, ema, data, config):
    """Train model in place, ema behind it."""
    optimizer = make_optimizer(model, config)
    run.restore(model=model, ema=ema, optimizer=optimizer)
    if run.state["step"] == 0:
        model.guess.learn(data, config)
    network = run.parallel(model)  # over all processes; model itself where there is one

    for step in run.steps():
        index, keys = run.batch(step, len(data.images))  # a key to all that is random of an image
        x_start = to_float(data.images[index])
        epoch = 0 if config.mask_mode == "fixed" else run.epoch
        masks = masks_of(index, data.shape[-1], config, epoch)
        start = seeded_uniform(run.step_key, TIMESTEP)
        # Low discrepancy; more near 0: the blur soon leaves z nothing to say.
        t = ((start + run.places) % 1) ** 1.4
        noise = gp_noise(seeded_normal(keys, data.shape, TRAIN_NOISE), config.length_scale)
        if config.flip:
            x_start, *masks = mirror_half(keys, x_start, *masks)
        points = points_of(x_start, masks[0])
        if step % 16 == 15:  # now and then anywhere, half as many to twice
            points = random_points(x_start, keys, points.there.shape[1], run.step_key)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = training_loss(network, model.guess, x_start, t, noise, masks, points, config)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        update_ema(ema, model, step, config.ema_decay)
        run.log(loss, norm)

        if run.reports(step):  # with saving, the only time the host waits for the device
            run.report(step, **held_out_losses(ema, data.held_out, config))
        if run.draws(step):
            val = data.held_out["val"][1].images[:8]
            found = reconstruct(run, ema, val, replace(config, num_draws=2))
            run.write(f"step_{step + 1:06d}.png", draw_reconstructions(found))
        if run.saves(step):  # also when told to stop
            run.save(step)
    run.finish((x, held_out_losses(ema, x, config)) for x in run.whole_sets(data))


def reconstruct(run, model, images, config, file=None):
    """K draws for each test image, uint8 (N, C, m, m), as a dict, values in [0, 1], on the CPU.

    truth: (N, C, m, m); cond_mask, target_mask: bool (N, 1, m, m); draws: (K, N, C, n, n) with
    n = config.image_size.
    """
    truth, m, size = to_float(images), images.shape[-1], config.image_size
    index = torch.arange(len(images), device=images.device)
    cond_mask, target_mask = masks_of(TEST_INDEX + index, m, config)
    sample = make_sampler(model, truth.shape[1:], config)
    exact = config.enforce_observed and size == m  # to the last bit

    def of_points(seeds, x, mask):
        for step, z in enumerate(sample(seeds, points_of(x, mask)), 1):
            yield torch.where(mask, x, z) if exact and step == config.sample_steps else z

    inputs, shape = (truth, cond_mask), (truth.shape[1], size, size)
    draws = draw_each(run, model, of_points, inputs, shape, config, file)
    found = {"truth": to_unit(truth), "cond_mask": cond_mask, "target_mask": target_mask}
    return {name: x.cpu() for name, x in found.items()} | {"draws": draws}


def make_model(shape, config):
    """The network, and what is kept with it, for images of a shape (C, n, n)."""
    model = FnoUnet(3 * shape[0] + 1, shape, config)  # see predict
    model.guess, model.intervals = LinearGuess(shape, config.sparsity[-1]), Intervals()
    return model.to(config.device, memory_format=torch.channels_last)


def main(argv=None):
    with Run(Config, argv, tf32=False) as run:  # the transforms are matrix products
        config = run.config
        data = Data(config, run.facts)
        torch.manual_seed(config.seed)  # of the first weights
        model = make_model(data.shape, config)
        if config.compile:
            grids.prepare_to_compile()
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        ema.guess = model.guess
        run.introduce(model, data)

        if config.sample:
            run.restore(ema=ema)
        else:
            train(run, model, ema, data, config)
            run.write("loss.png", draw_losses(run.history))
            found = reconstruct(run, ema, data.held_out["val"][1].images[:64], config)
            ema.intervals.fit(found, config.sample_steps)
            run.save()  # with the intervals

        run.prepare(ema)
        images = data.test_part(config.num_samples).images
        found = reconstruct(run, ema, images, config, file="draws.npy")
        once, m, on = replace(config, num_draws=1), data.shape[-1], {}
        mean = reconstruct(run, ema, images, replace(once, sample_steps=1))
        found["regression"] = mean["draws"][0]
        for n in (m, m * 3 // 2, m * 2):  # the same images, points and noise
            on[n] = reconstruct(run, ema, images[:6], replace(once, image_size=n))
        run.write("resolutions.png", draw_resolutions(on))
        found |= baselines(found, data, config, ema.guess.linear)
        intervals = ema.intervals if ema.intervals.fit_to(config) else None
        write_results(run, found, intervals, regions=("unseen", "query"))


if __name__ == "__main__":
    main()
