"""Denoising diffusion (DDPM, Ho et al. 2020): learn to undo a little noise, then make images.

Forward: a fixed process adds noise in T steps, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise.
All steps up to t are one (Eq. 4), a_t the product of their 1 - beta (the code counts t from 0):

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise

Training: a U-Net sees x_t and t and predicts the noise by least squares (Eq. 14); or x_0, or
v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022): with x_t any of them gives the others.

Reverse: given x_0, x_{t-1} is Gaussian around a mix of x_0 and x_t (Eq. 7). Put in the network's
guess of x_0, draw, go on, from x_T = noise down to x_0:

    x_{t-1} = mean(x0_hat, x_t) + sqrt(posterior_variance_t) noise

DDIM (Song et al. 2021): the same network with less noise on the way or none, and fewer steps.

    python ddpm.py                                                 # train and sample, out/ddpm/
    python ddpm.py --sample out/ddpm/last.pt --num-samples 512     # no training
    torchrun --nproc_per_node=8 ddpm.py --preset full              # CIFAR-10, 30M parameters

Measured: the first command, on Fashion-MNIST, takes 7 min 2 s on two cores of a Xeon with AMX.
"""

import copy
import math
from dataclasses import dataclass

from fused_ddpm import graphed, masked_loss, posterior_step, seeded_normal
from fused_ddpm.config import RunConfig, flag
from fused_ddpm.images import Data, mirror_half, to_bytes, to_float
from fused_ddpm.noise import TIMESTEP, TRAIN_NOISE, seeded_integers
from fused_ddpm.optimizer import make_optimizer
from fused_ddpm.pictures import draw_grid, draw_losses
from fused_ddpm.runs import Run
from fused_ddpm.unet import Unet, check_sizes

import torch
import torch.nn as nn

# --------------------------------------------------------------------------------------------------
# Config: a field is a flag. The first value suits two CPU cores, full= follows the paper.


@dataclass
class Model:  # what the weights are: fixed with a checkpoint
    image_size: int = flag(32, "side in pixels", within="[4, 4096]")
    dim: int = flag(16, "channels at full resolution", full=128, within="[1, 4096]")
    dim_mults: list[int] = flag([1, 4, 8], "channels of each level, times dim", full=[1, 2, 2, 2])
    num_blocks: int = flag(1, "residual blocks of each level", full=3, within="[1, 100]")
    attn_resolutions: list[int] = flag([], "sides with attention beside the coarsest", full=[16])
    linear_attention: bool = flag(False, "attention at cost linear in the pixels elsewhere")
    num_timesteps: int = flag(1000, "T, steps of the forward process")
    schedule: str = flag("cosine", "of beta", ["linear", "cosine", "sigmoid"], full="linear")
    objective: str = flag("v", "what the network predicts", ["eps", "v", "x0"], full="eps")


@dataclass
class Training:  # how they are made: fixed with a run, but for what is marked later
    data: str = flag("auto", "fashion_mnist, mnist, cifar10, shapes, or a folder of images")
    flip: bool = flag(False, "mirror half of the training images", full=True)
    dropout: float = flag(0.0, "inside the residual blocks", full=0.1, within="[0, 1)")
    loss: str = flag("l2", "distance to what is predicted", ["l2", "l1", "huber"])
    steps: int | None = flag(6500, "optimizer steps", full=None, later=True)
    epochs: int | None = flag(None, "the same in passes over the data", full=500, later=True)
    batch_size: int = flag(32, "images a step, over all processes; also of sampling", full=128)
    optimizer: str = flag("muon", "see optimizer.py", ["muon", "adam"], full="adam")
    lr: float = flag(2e-3, "peak learning rate", full=2e-4, within="(0, 1]", later=True)
    weight_decay: float = flag(0.0, "a step, times lr", within="[0, 1)")
    lr_schedule: str = flag("cosine", "after warming up", ["constant", "cosine"], full="constant")
    grad_clip: float = flag(1.0, "largest norm of the gradient", within="(0, inf]", later=True)
    ema_decay: float = flag(0.995, "of the weights sampled from", full=0.9999, within="[0, 1)")


@dataclass
class Sampling:  # how they are used: free
    sampler: str = flag("ddpm", "ancestral sampling or DDIM", ["ddpm", "ddim"])
    sample_steps: int = flag(100, "network calls for an image, at most T", full=1000)
    spacing: float = flag(1.0, "of steps: 1 even, 2 closer near 0", within="[1, 4]")
    eta: float = flag(0.0, "noise of DDIM: 0 none, 1 as much as DDPM", within="[0, 1]")
    variance: str = flag("small", "of DDPM's steps: the posterior's, or beta", ["small", "large"])
    num_samples: int = flag(64, "images to generate")


@dataclass
class Config(RunConfig, Sampling, Training, Model):
    def check(self):
        """(wrong, message) of what no flag shows by itself."""
        yield from check_sizes(self)


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


def predict(model, x_t, t, config):
    """The network's output, shaped like x_t (B, C, H, W): what config.objective says."""
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=config.bfloat16):
        return model(x_t, t)


def training_loss(model, x_start, t, noise, alphas_cumprod, config):
    """The loss of a batch (B, C, H, W) in [-1, 1]; for eps and l2 Ho et al. 2020, Eq. 14."""
    out = predict(model, q_sample(x_start, t, noise, alphas_cumprod), t, config)
    if config.objective == "eps":
        goal = noise
    elif config.objective == "x0":
        goal = x_start
    else:  # v = sqrt(a_t) noise - sqrt(1 - a_t) x_0
        goal = q_sample(noise, t, -x_start, alphas_cumprod)
    return masked_loss(out, goal, kind=config.loss)


def make_sampler(model, shape, config):
    """sample(seeds): x_t (B, *shape) after each reverse step, the last of them images.

    seeds: int64 (B,) on the device. An image is a function of its seed alone.
    """
    timesteps, coefficients = sampling_table(config)

    @graphed  # on a GPU one launch a step, network and all
    def reverse_step(x_t, step, t, seeds):
        out = predict(model, x_t, t, config)
        return posterior_step(x_t, out, coefficients, step, seeds)

    @torch.no_grad()
    def sample(seeds):
        x_t = seeded_normal(seeds, shape)
        for step, t in enumerate(timesteps.expand(len(seeds), -1).T):
            x_t = reverse_step(x_t, step, t, seeds)
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
    """On fixed images with fixed timesteps and noise, so that they compare between steps."""
    losses = {}
    for name, (index, part) in held_out.items():
        t = torch.linspace(0, config.num_timesteps - 1, len(index), device=index.device).long()
        noise, x_start = seeded_normal(index, part.images.shape[1:]), to_float(part.images)
        loss = training_loss(model, x_start, t, noise, alphas_cumprod, config)
        losses[f"{name}_loss"] = loss
    return losses


def train(run, model, ema, data, config):
    """Train model in place, ema behind it."""
    alphas_cumprod = make_schedule(config.schedule, config.num_timesteps).to(config.device)
    optimizer = make_optimizer(model, config)
    run.restore(model=model, ema=ema, optimizer=optimizer)
    network = run.parallel(model)  # over all processes; model itself where there is one

    for step in run.steps():
        index, keys = run.batch(step, len(data.images))  # a key to all that is random of an image
        x_start = to_float(data.images[index])
        t = seeded_integers(keys, config.num_timesteps, TIMESTEP)
        noise = seeded_normal(keys, data.shape, TRAIN_NOISE)
        if config.flip:
            (x_start,) = mirror_half(keys, x_start)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = training_loss(network, x_start, t, noise, alphas_cumprod, config)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        update_ema(ema, model, step, config.ema_decay)
        run.log(loss, norm)

        if run.reports(step):  # with saving, the only time the host waits for the device
            run.report(step, **held_out_losses(ema, data.held_out, alphas_cumprod, config))
        if run.draws(step):
            drawn = generate(run, ema, 64, data, config)
            run.write(f"step_{step + 1:06d}.png", draw_grid(drawn))
        if run.saves(step):  # also when told to stop
            run.save(step)
    run.finish((x, held_out_losses(ema, x, alphas_cumprod, config)) for x in run.whole_sets(data))


# --------------------------------------------------------------------------------------------------


def generate(run, model, n, data, config, file=None):
    """n images, uint8 (n, C, H, W): the same for any number of processes and any batch size."""
    sample = make_sampler(model, data.shape, config)
    samples = run.samples(n, data.shape, torch.uint8, file, model.state_dict().values())
    for index in samples.missing():  # of those not there yet this process's, in batches
        for x_t in sample(run.seeds(index)):
            samples.tick()
        samples.put(index, to_bytes(x_t))
    return samples.gather()


def main(argv=None):
    with Run(Config, argv) as run:
        config = run.config
        data = Data(config, run.facts)
        torch.manual_seed(config.seed)  # of the first weights
        model = Unet(data.shape[0], data.shape[0], config)
        model = model.to(config.device, memory_format=torch.channels_last)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        run.introduce(model, data)

        if config.sample:
            run.restore(ema=ema)
        else:
            train(run, model, ema, data, config)
            run.write("loss.png", draw_losses(run.history))

        run.prepare(ema)
        n = config.num_samples
        samples = generate(run, ema, n, data, config, file="samples.npy")
        run.write("samples.png", draw_grid(samples[:64]))
        print(f"samples.npy ({n} images) and pictures are in {run.dir}/")


if __name__ == "__main__":
    main()
