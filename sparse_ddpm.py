"""Sparse diffusion: see 20% of the pixels of an image, take the loss on another 20%, return it all.

A DDPM (see ddpm.py) whose network also sees a sparse image. Two disjoint pixel masks are drawn for
each training image, m_c (conditioning) and m_t (target), shared by all channels:

    loss = sum w (x0_hat - x_0)^2 P / sum w,    w = m_t + 0.05 m_c

What the network f predicts is the residual to a linear guess (preconditioning, Karras et al. 2022,
with a mean). The seen pixels alone give the best one, h, by the covariance of the training images
(kriging), off by a variance v; x_t / sqrt(a_t) is off by (1 - a_t) / a_t. Pixel by pixel they are
weighted by their precisions to a guess g, of precision P:

    P = 1 / v + a_t / (1 - a_t),    g = (h / v + x_t sqrt(a_t) / (1 - a_t)) / P
    x0_hat = g + f / sqrt(P)        so that f has to have variance 1 or so at every t

K draws from different noise differ on the unseen pixels: their mean is off by less than any, their
spread says where the network is guessing. One call from pure noise is the posterior mean at once.

x_t is made from all pixels: so far this is training on complete images with a masked loss. With
--observed-only x_t is on the target pixels alone; a pixel in neither mask is never read, and need
not exist. The minimiser is E[x_target | x_t, x_seen] all the same, unless what is missing depends
on the content. Sampling cuts the unseen pixels into parts of the target's size, each drawn by
itself, from noises such that the parts fit together.

    python sparse_ddpm.py --sparsity 0.2                         # train, reconstruct, draw
    python sparse_ddpm.py --observed-only 0.4 --out-dir out/part # of each image 60% is never read
    python sparse_ddpm.py --sample out/sparse_ddpm/last.pt --num-draws 16 --out-dir out/more

Measured: the first command, on Fashion-MNIST, takes 5 min 21 s on two cores of a Xeon. On 256 test
images, unseen pixels, the mean of 8 draws has 21.6 dB, one call 21.8, the best linear method 20.3.
"""

import copy
import math
from dataclasses import dataclass, replace

from fused_ddpm import graphed, masked_loss, posterior_step, seeded_normal
from fused_ddpm.config import RunConfig, flag
from fused_ddpm.fill import baselines
from fused_ddpm.images import Data, mirror_half
from fused_ddpm.linear import LinearFill, once_each
from fused_ddpm.masks import check_masks, held_out_keys, in_parts, mask_held_out, mask_images
from fused_ddpm.metrics import Intervals
from fused_ddpm.noise import DROP, TIMESTEP, TRAIN_NOISE, seeded_uniform
from fused_ddpm.optimizer import make_optimizer
from fused_ddpm.pictures import draw_losses, draw_reconstructions
from fused_ddpm.results import draw_as_classes, draw_each, write_results
from fused_ddpm.runs import Run
from fused_ddpm.unet import Unet, check_sizes

import torch

# --------------------------------------------------------------------------------------------------
# Config: a field is a flag. The first value suits two CPU cores, full= is for a GPU.


@dataclass
class Model:  # what the weights are: fixed with a checkpoint
    image_size: int = flag(32, "side in pixels", within="[4, 4096]")
    dim: int = flag(16, "channels at full resolution", full=128, within="[1, 4096]")
    dim_mults: list[int] = flag([1, 4, 6], "channels of each level, times dim", full=[1, 2, 2])
    num_blocks: int = flag(1, "residual blocks of each level", full=2, within="[1, 100]")
    attn_resolutions: list[int] = flag([], "sides with attention beside the coarsest", full=[16, 8])
    linear_attention: bool = flag(False, "attention at cost linear in the pixels elsewhere")
    num_timesteps: int = flag(1000, "T, steps of the forward process")
    schedule: str = flag("cosine", "of beta", ["linear", "cosine", "sigmoid"], full="linear")
    objective: str = flag("residual", "what the network predicts", ["residual", "eps", "v", "x0"])
    class_labels: bool = flag(False, "it is told the class, too, in nine of ten images")


@dataclass
class Training:  # how they are made: fixed with a run, but for what is marked later
    data: str = flag("auto", "fashion_mnist, mnist, cifar10, shapes, or a folder of images")
    sparsity: list[float] = flag([0.2], "fraction of pixels seen; two: from .. to", within="(0, 1)")
    missing: float | None = flag(None, "value of missing pixels in files", within="[-inf, inf]")
    crop: bool = flag(False, "cut files into tiles instead of scaling them")
    observed_only: float | None = flag(None, "read but this fraction of an image", within="(0, 1]")
    flip: bool = flag(False, "mirror half of the training images", full=True)
    dropout: float = flag(0.0, "inside the residual blocks", full=0.1, within="[0, 1)")
    target_sparsity: float | None = flag(None, "the loss is on; None: as sparsity", within="(0, 1)")
    cond_weight: float = flag(0.05, "weight of the seen pixels in the loss", within="[0, 1]")
    mask_mode: str = flag("random_epoch", "when they change", ["random_epoch", "fixed", "random"])
    mask_pattern: str = flag("random", "random, block, grid, walk, several, learned, FILE.npy")
    time_spacing: float = flag(2.0, "of timesteps: 1 even, 2 closer near 0", within="[1, 4]")
    loss: str = flag("l2", "distance to what is predicted", ["l2", "l1", "huber"])
    steps: int | None = flag(4000, "optimizer steps", full=None, later=True)
    epochs: int | None = flag(None, "the same in passes over the data", full=50, later=True)
    batch_size: int = flag(32, "images a step, over all processes; also of sampling", full=128)
    optimizer: str = flag("muon", "see optimizer.py", ["muon", "adam"], full="adam")
    lr: float = flag(2e-3, "peak learning rate", full=2e-4, within="(0, 1]", later=True)
    weight_decay: float = flag(0.0, "a step, times lr", within="[0, 1)")
    lr_schedule: str = flag("cosine", "after warming up", ["constant", "cosine"], full="constant")
    grad_clip: float = flag(1.0, "largest norm of the gradient", within="(0, inf]", later=True)
    ema_decay: float = flag(0.995, "of the weights sampled from", full=0.9999, within="[0, 1)")


@dataclass
class Sampling:  # how they are used: free
    sampler: str = flag("ddim", "ancestral sampling or DDIM", ["ddpm", "ddim"], full="ddpm")
    sample_steps: int = flag(40, "network calls for an image, at most T", full=1000)
    spacing: float = flag(2.0, "of steps: 1 even, 2 closer near 0", full=1.0, within="[1, 4]")
    eta: float = flag(0.0, "noise of DDIM: 0 none, 1 as much as DDPM", within="[0, 1]")
    variance: str = flag("small", "of DDPM's steps: the posterior's, or beta", ["small", "large"])
    guidance_scale: float = flag(1.0, "w of class labels, see cfg_ddpm.py", within="[0, inf)")
    classes: str | None = flag(None, "names or numbers, with commas, to complete classes.png as")
    num_samples: int = flag(256, "test images to reconstruct", within="[1, 1048576]")
    num_draws: int = flag(8, "K, reconstructions of each", within="[1, 1000]")
    test_sparsity: float | None = flag(None, "seen of test images; as in training", within="(0, 1)")
    test_pattern: str | None = flag(None, "of test masks; as in training")
    baselines: bool = flag(True, "also the Gaussian conditional mean; memory (C H W)^2")


@dataclass
class Config(RunConfig, Sampling, Training, Model):
    def check(self):
        """(wrong, message) of what no flag shows by itself."""
        yield from check_sizes(self)
        yield from check_masks(self)
        asked = self.classes or self.guidance_scale != 1
        yield asked and not self.class_labels, "--classes, --guidance-scale: need --class-labels"


# --------------------------------------------------------------------------------------------------
# Schedule. Timesteps are 0..T-1, and t = 0 is an image after one noising step.


def make_schedule(name, T):
    """alphas_cumprod, float64 (T,), call it a: q(x_t | x_0) = N(sqrt(a_t) x_0, 1 - a_t).

    linear: Ho et al. 2020. cosine: Nichol & Dhariwal 2021, Eq. 17. sigmoid: beta along a sigmoid
    between linear's ends. Linear and sigmoid are meant for T = 1000: for any other beta is scaled.
    """
    if name == "cosine":
        t = torch.arange(T + 1, dtype=torch.float64) / T
        signal = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - signal[1:] / signal[:-1]
    else:
        ramp = torch.linspace(0, 1, T, dtype=torch.float64)
        if name == "sigmoid":
            ramp = torch.sigmoid(12 * ramp - 6)
        betas = (1e-4 + ramp * (0.02 - 1e-4)) * 1000 / T
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


def x0_from_output(objective, at):
    """(k_x, k_o) such that x0_hat = k_x x_t + k_o out, at noise level `at` = alphas_cumprod[t]."""
    if objective == "eps":
        return 1 / at.sqrt(), -(1 / at - 1).sqrt()
    if objective == "v":
        return at.sqrt(), -(1 - at).sqrt()
    return torch.zeros_like(at), torch.ones_like(at)  # x0


def reverse_mean_and_noise(at, a_prev, config):
    """(a, b, s): x_prev = a x0_hat + b x_t + s z. at, a_prev: alphas_cumprod of t and prev."""
    alpha = at / a_prev  # of the whole step; of a single one it is 1 - beta_t
    variance = (1 - a_prev) / (1 - at) * (1 - alpha)  # of the posterior
    if config.sampler == "ddpm":  # Ho et al. 2020, Eq. 7
        a = a_prev.sqrt() * (1 - alpha) / (1 - at)  # posterior_mean_coef1, of x_start
        b = alpha.sqrt() * (1 - a_prev) / (1 - at)  # posterior_mean_coef2, of x_t
        if config.variance == "large":
            variance = (1 - alpha) * (a_prev < 1)  # beta, but no noise in the last step
        return a, b, variance.sqrt()
    # Song et al. 2021, Eq. 12 and 16: sqrt(a_prev) x0_hat + sqrt(1 - a_prev - s^2) eps_hat + s z
    s = config.eta * variance.sqrt()
    b = (1 - a_prev - s**2).clamp(min=0).sqrt() / (1 - at).sqrt()
    return a_prev.sqrt() - b * at.sqrt(), b, s


def sampling_table(config):
    """Timesteps (S,), descending to 0, and for each (k_x, k_o, a, b, s), float32 (S, 5)."""
    alphas_cumprod = make_schedule(config.schedule, config.num_timesteps)
    first = config.num_timesteps - 1
    if config.objective == "eps":  # cosine ends at 2e-9, where k_o = -2e4 blows up any error of eps
        first = int((alphas_cumprod > 1e-5).sum()) - 1
    times = torch.linspace(1, 0, config.sample_steps, dtype=torch.float64) ** config.spacing
    timesteps = (first * times).round().long()
    at = alphas_cumprod[timesteps]
    a_prev = torch.cat([at[1:], torch.ones_like(at[:1])])  # the last step ends at the clean image
    rows = x0_from_output(config.objective, at) + reverse_mean_and_noise(at, a_prev, config)
    return timesteps.to(config.device), torch.stack(rows, dim=1).float().to(config.device)


# --------------------------------------------------------------------------------------------------
# Diffusion.


def q_sample(x_start, t, noise, alphas_cumprod):
    """x_t of the forward process, Ho et al. 2020, Eq. 4. x_start, noise: (B, C, H, W); t: (B,)."""
    a_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a_t.sqrt().float() * x_start + (1 - a_t).sqrt().float() * noise


def predict(model, x_t, t, context, alphas_cumprod, config):
    """(x0_hat, scale): x0_hat = known + k f, whatever the objective; the loss is in units of scale.

    context: of LinearFill (x_t is read where its mask state is set), and labels (B,) if known.
    """
    cond, seen, state, filled, variance, *labels = context
    a_t = alphas_cumprod[t].view(-1, 1, 1, 1)
    x = x_t = state * x_t
    noise = ((1 - a_t) / a_t).float()  # the variance of x_t / sqrt(a_t) around x_0
    news = state * (x_t / a_t.sqrt().float() - filled)
    if config.objective == "residual":
        precision = 1 / variance + state / noise
        x = known = filled + news / noise / precision
        k = precision.rsqrt()
        # k, but where v is tiny: there a few surprising pixels would make up the loss.
        scale = (1 / variance.clamp(min=3e-3) + state / noise).rsqrt()
    else:
        k_x, k = (number.float() for number in x0_from_output(config.objective, a_t))
        known, scale = k_x * x_t, k
    news = news * (variance + noise).rsqrt()  # of size 1: bfloat16 would lose it in x
    unsure = variance.log() / 4 + 1  # -1 to 1, or so
    inputs = torch.cat([x, news, cond, filled, seen, state, unsure], dim=1)
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=config.bfloat16):
        out = model(inputs, t, *labels)
    return known + k * out, scale


def training_loss(model, fill, x_start, t, noise, masks, labels, alphas_cumprod, config):
    """Of a batch (B, C, H, W) in [-1, 1], on masks of make_masks, in units of predict's scale."""
    cond_mask, target_mask = masks
    x_t = q_sample(x_start, t, noise, alphas_cumprod)
    state = target_mask if config.observed_only else torch.ones_like(cond_mask)
    context = *fill(x_start * cond_mask, cond_mask, state), labels
    x0_hat, scale = predict(model, x_t, t, context, alphas_cumprod, config)
    w = 0.0 if config.observed_only else config.cond_weight  # there x_t is on no seen pixel
    return masked_loss(x0_hat / scale, x_start / scale, target_mask, cond_mask, w, config.loss)


def make_sampler(model, shape, config, parts=None):
    """sample(seeds, cond, cond_mask, labels): x_t (B, *shape) after each reverse step, of the part
    at hand; in the end images, each a function of its own seed, pixels, mask and label alone.

    seeds, labels: int64 (B,). cond: (B, *shape), 0 outside cond_mask (B, 1, H, W). parts: in how
    many the unseen pixels are drawn, each seeing what training could have seen; None: at once.
    """
    timesteps, coefficients = sampling_table(config)
    coefficients[:, :2] = torch.tensor([0.0, 1.0])  # k_x, k_o: posterior_step gets x0_hat, clips it
    alphas_cumprod = make_schedule(config.schedule, config.num_timesteps).to(config.device)

    @graphed  # on a GPU one launch a step, network and all
    def reverse_step(x_t, step, t, seeds, *context):
        x0_hat, _ = predict(model, x_t, t, context, alphas_cumprod, config)
        if config.class_labels and config.guidance_scale != 1:  # see cfg_ddpm.py
            x0_null, _ = predict(model, x_t, t, context[:-1], alphas_cumprod, config)
            x0_hat = torch.lerp(x0_null, x0_hat, config.guidance_scale)
        cond, seen, *_ = context
        return posterior_step(x_t, x0_hat.lerp_(cond, seen), coefficients, step, seeds)

    @torch.no_grad()
    def sample(seeds, cond, cond_mask, *labels):
        whole, most = cond, config.sparsity[-1] if config.sample_steps > 1 else 0.0
        white = seeded_normal(seeds, shape)
        for state, seen in in_parts(seeds, cond_mask, parts, most, config):
            context = *once_each(model.fill, whole * seen, seen, state), *labels
            x_t = model.fill.couple(white, seen, state) if parts and most else white
            for step, t in enumerate(timesteps.expand(len(seeds), -1).T):
                x_t = reverse_step(x_t, step, t, seeds, *context)
                if step + 1 == config.sample_steps:
                    x_t = whole = torch.where(state, x_t, whole)
                yield x_t

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


@torch.no_grad()
def held_out_losses(model, held_out, alphas_cumprod, config):
    """On fixed images with fixed timesteps, noise and masks: they compare between steps."""
    losses = {}
    for name, (index, part) in held_out.items():
        t = torch.linspace(0, config.num_timesteps - 1, len(index), device=config.device).long()
        x_start, masks, _ = mask_images(part, held_out_keys(index, config), 0, config)
        batch = x_start, t, seeded_normal(index, x_start.shape[1:]), masks, part.labels
        losses[f"{name}_loss"] = training_loss(model, model.fill, *batch, alphas_cumprod, config)
    return losses


def train(run, model, ema, data, config):
    """Train model in place, ema behind it."""
    alphas_cumprod = make_schedule(config.schedule, config.num_timesteps).to(config.device)
    optimizer = make_optimizer(model, config)
    run.restore(model=model, ema=ema, optimizer=optimizer)
    if run.state["step"] == 0:
        model.fill.learn(run, data, config)
    network = run.parallel(model)  # over all processes; model itself where there is one

    for step in run.steps():
        index, keys = run.batch(step, len(data.images))  # a key to all that is random of an image
        part, own = data.train[index], run.seeds(index)  # the image's, in every epoch
        mask_epoch = {"random_epoch": run.epoch, "fixed": 0, "random": step}[config.mask_mode]
        x_start, masks, _ = mask_images(part, own, mask_epoch, config)
        # Most are near 0: far from it x_t adds little to the seen pixels.
        t = (config.num_timesteps * seeded_uniform(keys, TIMESTEP) ** config.time_spacing).long()
        noise = seeded_normal(keys, data.shape, TRAIN_NOISE)
        if config.flip:
            x_start, *masks = mirror_half(keys, x_start, *masks)
        dropped = seeded_uniform(keys, DROP) < 0.1
        batch = x_start, t, noise, masks, torch.where(dropped, model.null_class, part.labels)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = training_loss(network, model.fill, *batch, alphas_cumprod, config)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        update_ema(ema, model, step, config.ema_decay)
        run.log(loss, norm)

        if run.reports(step):
            run.report(step, **held_out_losses(ema, data.held_out, alphas_cumprod, config))
        if run.draws(step):
            found = reconstruct(run, ema, data.held_out["val"][1][:8], replace(config, num_draws=2))
            run.write(f"step_{step + 1:06d}.png", draw_reconstructions(found))
        if run.saves(step):  # also when told to stop
            run.save(step)
    run.finish((x, held_out_losses(ema, x, alphas_cumprod, config)) for x in run.whole_sets(data))


def reconstruct(run, model, part, config, file=None, fraction=None):
    """K draws for each of a Part's images, as a dict, values in [0, 1], on the CPU.

    fraction: of the pixels, the only ones to be read. truth: (N, C, H, W); cond_mask, target_mask,
    and observed if that is not all: bool (N, 1, H, W); draws: (K, N, C, H, W).
    """
    x, found = mask_held_out(part, config, fraction)
    cond_mask, shape = found["cond_mask"], x.shape[1:]
    unseen = 1 - cond_mask.float().mean().item()
    parts = model.fill.parts(unseen) if config.observed_only else None
    sample = make_sampler(model, shape, config, parts)
    inputs = x * cond_mask, cond_mask, part.labels
    draws = draw_each(run, model, sample, inputs, shape, config, file, parts or 1)
    return {name: x.cpu() for name, x in found.items()} | {"draws": draws}


def make_model(shape, config, num_classes=0):
    """The network, and what is kept with it, for images of a shape (C, H, W)."""
    model = Unet(4 * shape[0] + 3, shape[0], config, num_classes if config.class_labels else 0)
    model.fill, model.intervals = LinearFill(shape, config.sparsity[-1]), Intervals()
    return model.to(config.device, memory_format=torch.channels_last)


def main(argv=None):
    with Run(Config, argv) as run:
        config = run.config
        data = Data(config, run.facts, labelled=config.class_labels)
        if not config.sample and data.train.observed is not None:
            config.observed_only = config.observed_only or 1.0  # of what there is
        torch.manual_seed(config.seed)  # of the first weights
        model = make_model(data.shape, config, len(data.class_names))
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        ema.fill = model.fill
        run.introduce(model, data)

        if config.sample:
            run.restore(ema=ema)
        else:
            train(run, model, ema, data, config)
            run.write("loss.png", draw_losses(run.history))
            val = data.held_out["val"][1][:64]
            found = reconstruct(run, ema, val, config, fraction=config.observed_only)
            ema.intervals.fit(found, config.sample_steps)
            run.save()  # with the intervals

        run.prepare(ema)
        test = data.test_part(config.num_samples)
        found = reconstruct(run, ema, test, config, file="draws.npy")
        once = replace(config, sample_steps=1, num_draws=1)  # from noise: the posterior mean
        found["regression"] = reconstruct(run, ema, test, once)["draws"][0]
        found |= baselines(found, data, config, ema.fill)
        if config.class_labels:
            complete = lambda part: reconstruct(run, ema, part, replace(config, num_draws=1))
            run.write("classes.png", draw_as_classes(complete, test[:8], data))
        write_results(run, found, ema.intervals if ema.intervals.fit_to(config) else None)


if __name__ == "__main__":
    main()
