"""Denoising diffusion (DDPM, Ho et al. 2020): learn to undo a little noise, then make images from nothing else.

Forward: a fixed process adds noise in T steps, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise. All steps up to t are one
step (Eq. 4), with a_t = alphas_cumprod[t], the product of the 1 - beta:

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise

Training: a U-Net sees x_t and t and predicts the noise by least squares (Eq. 14). Equivalently it predicts x_0, or
v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans & Ho 2022): any of them with x_t gives the others.
Reverse: given x_0, x_{t-1} is Gaussian around a mix of x_0 and x_t (Eq. 7). Put in the network's guess of x_0, draw, go on:

    x_{t-1} = mean(x0_hat, x_t) + sqrt(posterior_variance_t) noise        from x_T = noise down to x_0

DDIM (Song et al. 2021) takes the same network with less noise on the way or none, and steps over most of the t.

    python ddpm.py                                                    # train and sample, into out/ddpm/
    python ddpm.py --plots                                            # also picture schedules, processes, variances
    python ddpm.py --sample out/ddpm/last.pt --num-samples 512        # no training
    torchrun --nproc_per_node=8 ddpm.py --preset full                 # CIFAR-10, 30M parameters, on GPUs

Measured: the first command, on Fashion-MNIST, takes 5 min 31 s on two cores of a 2.6 GHz Xeon with AMX (torch 2.15.0):
350 training images/s, 64 images by 50 DDIM steps in 2.4 s.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from tqdm import tqdm

import fused_ddpm
from fused_ddpm import masked_loss, posterior_step, reverse_process, seeded_normal
from images import DataError, SampleFile, choose_data, load_images

SCRIPT = Path(__file__).stem

# ---------------------------------------------------------------------------------------------------------------------
# Config. A flag on the command line wins over the preset. small suits two CPU cores, full is the configuration for a GPU.

MODEL_FLAGS = {"image_size", "dim", "dim_mults", "num_blocks", "attn_resolutions", "linear_attention"}
MODEL_FLAGS |= {"num_timesteps", "schedule", "objective"}
# What a resumed run may change; all else would make it another run.
FREE_FLAGS = {"steps", "epochs", "sampler", "sample_steps", "eta", "variance", "num_samples", "plots"}
FREE_FLAGS |= {"lr", "grad_clip", "amp"}  # what a loss that became nan calls for
FREE_FLAGS |= {"data_dir", "device", "compile", "out_dir", "save_every", "sample_every", "resume", "overwrite", "sample"}
# What a checkpoint does not pass on.
ONCE = {"sample": None, "resume": False, "overwrite": False, "plots": False}
HISTORY = ("steps", "epochs", "train_loss", "val_loss", "test_loss")  # the columns of history.json


class UserError(Exception):
    """Something only the user can mend; shown as one line, without a traceback."""


def number(kind, low, high, ends="[]"):
    """An argparse type: a number within bounds, each included ([ ]) or not (( ))."""

    def parse(text):
        value = kind(text)
        if not (low < value < high or (value == low and ends[0] == "[") or (value == high and ends[1] == "]")):
            raise argparse.ArgumentTypeError(f"must lie in {ends[0]}{low}, {high}{ends[1]}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def build_parser():
    """The parser, which leaves out what is not given, and the values of every flag under each preset."""
    title = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", "%(prog)s [flags]", title, argument_default=argparse.SUPPRESS)
    presets = {"small": {}, "full": {}}
    count, share, groups = number(int, 1, 2**31), number(float, 0, 1), []

    def flag(name, kind, small, text, full=None, into=None, **more):
        """kind: a type, the choices, or bool. small: the value under that preset, full: under the other if it differs."""
        full = small if full is None else full
        presets["small"][name.replace("-", "_")], presets["full"][name.replace("-", "_")] = small, full
        shown = f" ({small})" if small == full else f" (small {small}, full {full})"
        kinds = {bool: {"action": argparse.BooleanOptionalAction}, list: {"choices": kind}}
        more |= kinds.get(kind if kind is bool else type(kind), {"type": kind})
        (into or groups[-1]).add_argument(f"--{name}", help=text + shown * (small is not None or full is not None), **more)

    groups.append(parser.add_argument_group("data"))
    flag("data", str, "auto", "cifar10, fashion_mnist, mnist, shapes, a folder; auto: fashion_mnist if small, cifar10 if full")
    flag("data-dir", str, "data", "where downloaded data sets are kept")
    flag("image-size", count, 32, "side in pixels")
    flag("flip", bool, False, "mirror half of the training images", full=True)
    groups.append(parser.add_argument_group("model"))
    flag("dim", count, 16, "channels at full resolution", full=128)
    flag("dim-mults", count, [1, 4, 8], "channels of each level, as multiples of dim", full=[1, 2, 2, 2], nargs="+")
    flag("num-blocks", count, 1, "residual blocks of each level, going down and going up", full=3)
    flag("attn-resolutions", count, [], "sides of the feature maps that get attention", full=[16], nargs="*")
    flag("linear-attention", bool, False, "attention at cost linear in the pixels for all other maps")
    flag("dropout", number(float, 0, 1, "[)"), 0.0, "inside the residual blocks", full=0.1)
    groups.append(parser.add_argument_group("diffusion"))
    flag("num-timesteps", count, 1000, "steps of the forward process")
    flag("schedule", ["linear", "cosine", "sigmoid"], "cosine", "of the noise variances beta", full="linear")
    flag("objective", ["eps", "v", "x0"], "v", "what the network predicts: noise, velocity or image", full="eps")
    flag("loss", list(fused_ddpm.LOSS_KINDS), "l2", "distance to it")
    groups.append(parser.add_argument_group("training"))
    length = groups[-1].add_mutually_exclusive_group()
    flag("steps", count, 3600, "optimizer steps", full=0, into=length)
    flag("epochs", count, 0, "the same in passes over the data", full=500, into=length)
    flag("batch-size", count, 32, "images a step, over all processes; also that of sampling", full=128)
    flag("lr", number(float, 0, 1, "(]"), 2e-3, "peak learning rate of Adam", full=2e-4)
    flag("lr-schedule", ["constant", "cosine"], "cosine", "after the warm-up; cosine ends at 0", full="constant")
    flag("grad-clip", number(float, 0, math.inf, "(]"), 1.0, "largest norm of the gradient")
    flag("ema-decay", number(float, 0, 1, "[)"), 0.995, "of the averaged weights, those sampled from", full=0.9999)
    groups.append(parser.add_argument_group("sampling"))
    flag("sampler", ["ddpm", "ddim"], "ddpm", "ancestral sampling or DDIM")
    flag("sample-steps", count, 100, "network calls for an image, at most num-timesteps", full=1000)
    flag("eta", share, 0.0, "noise of DDIM: 0 none, 1 as much as DDPM")
    flag("variance", ["small", "large"], "small", "of DDPM's reverse steps: that of the posterior, or beta")
    flag("num-samples", number(int, 1, 2**31), 64, "images to generate")
    flag("plots", bool, False, "also draw schedules, forward and reverse process, reverse variances")
    groups.append(parser.add_argument_group("run"))
    flag("preset", ["auto", *presets], "auto", "auto: full on a GPU, small on a CPU")
    flag("seed", number(int, 0, 2**31 - 1), 0, "of everything random")
    flag("device", str, "auto", "cuda, cpu, ...; auto takes the GPU if there is one")
    flag("amp", ["auto", "on", "off"], "auto", "bfloat16 autocast; auto: where the hardware multiplies it")
    flag("compile", bool, False, "torch.compile the network: a slow start, then faster steps")
    flag("out-dir", str, f"out/{SCRIPT}", "where everything is written; with --sample, by default beside the checkpoint")
    flag("save-every", count, 500, "steps between checkpoints")
    flag("sample-every", count, None, "steps between pictures; by default a fifth of the run")
    flag("resume", bool, False, "continue the run in out-dir")
    flag("overwrite", bool, False, "replace the run in out-dir")
    flag("sample", str, None, "train nothing, generate with the weights of this checkpoint", metavar="CHECKPOINT")
    return parser, presets


def check_flags(args, parser):
    """What argparse cannot see: flags that do not fit each other."""
    halvings = len(args.dim_mults) - 1
    if args.image_size % 2**halvings:
        parser.error(f"--image-size {args.image_size}: the U-Net halves it {halvings} times, so it must be a multiple of "
                     f"{2**halvings}")  # fmt: skip
    if args.sample_steps > args.num_timesteps:
        parser.error(f"--sample-steps {args.sample_steps}: at most --num-timesteps, {args.num_timesteps}")


def get_config(argv):
    """Command line -> (namespace, checkpoint or None). Flags that do not fit exit with status 2, files with UserError."""
    parser, presets = build_parser()
    given = vars(parser.parse_args(argv))
    run, checkpoint = presets["small"] | given, None
    device = run["device"] if run["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if run["sample"] or run["resume"]:
        checkpoint = load_checkpoint(Path(run["sample"] or Path(run["out_dir"], "last.pt")))
        saved, given = checkpoint["config"], {name: value for name, value in given.items() if value != "auto"}
        for name in sorted(given.keys() & (MODEL_FLAGS if run["sample"] else saved.keys() - FREE_FLAGS)):
            if given[name] != saved[name]:
                flag = "--" + name.replace("_", "-")
                parser.error(f"{flag} {given[name]}: the checkpoint was made with {saved[name]}; leave it out or start anew")
        folder = str(Path(run["sample"]).parent) if run["sample"] else run["out_dir"]
        config = presets[saved["preset"]] | saved | ONCE | {"out_dir": folder}
        if "steps" in given or "epochs" in given:  # another length, so other intervals
            config |= {"log_every": None, "sample_every": None}
    else:
        preset = run["preset"] if run["preset"] != "auto" else "full" if device.startswith("cuda") else "small"
        config = presets[preset]
        config |= {"preset": preset, "sample_steps": min(config["sample_steps"], run["num_timesteps"]), "log_every": None}
        if not run["overwrite"] and Path(run["out_dir"], "last.pt").exists():
            parser.error(f"--out-dir {run['out_dir']}: holds a run already; --resume continues it, --overwrite replaces it")
    if "steps" in given or "epochs" in given:
        config |= {"steps": 0, "epochs": 0}
    args = argparse.Namespace(**(config | given | {"device": device, "preset": config["preset"]}))
    check_flags(args, parser)
    return args, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Schedule. Timesteps are 0..T-1, and t = 0 is an image after one noising step.


def make_schedule(name, num_timesteps):
    """(betas, alphas_cumprod), each float64 (T,): q(x_t | x_0) = N(sqrt(alphas_cumprod[t]) x_0, 1 - alphas_cumprod[t]).

    linear: Ho et al. 2020. cosine: Nichol & Dhariwal 2021, Eq. 17. sigmoid: beta along a sigmoid between linear's ends.
    """
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    scale = 1000 / num_timesteps  # the betas of linear and sigmoid are meant for T = 1000: keep their sum
    if name == "linear":
        betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    elif name == "sigmoid":
        ramp = torch.sigmoid(torch.linspace(-6, 6, num_timesteps, dtype=torch.float64))
        betas = scale * (1e-4 + ramp * (0.02 - 1e-4))
    else:
        signal = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - signal[1:] / signal[:-1]
    betas = betas.clamp(max=0.999)
    return betas, torch.cumprod(1 - betas, dim=0)


def make_scales(alphas_cumprod):
    """(T, 2) float32: what x_start and the noise are multiplied with in x_t."""
    return torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()], dim=1).float()


def sampling_table(alphas_cumprod, objective, sampler, sample_steps, eta=0.0, variance="small"):
    """Timesteps (S,) int64, from T-1 down to 0, and for each the row (k_x, k_o, a, b, s) of posterior_step, float32 (S, 5).

    A step may skip timesteps: it goes from t to any s < t, and the last one ends at the clean image, alphas_cumprod = 1.
    """
    timesteps = torch.linspace(len(alphas_cumprod) - 1, 0, sample_steps, dtype=torch.float64).round().long()
    at = alphas_cumprod[timesteps]
    a_s = torch.cat([at[1:], torch.ones(1, dtype=torch.float64)])  # of the timestep each step goes to
    k_x, k_o = {  # x0_hat = k_x x_t + k_o out
        "eps": (1 / at.sqrt(), -(1 / at - 1).sqrt()),
        "v": (at.sqrt(), -(1 - at).sqrt()),  # Salimans & Ho 2022
        "x0": (torch.zeros_like(at), torch.ones_like(at)),
    }[objective]
    alpha = at / a_s  # of the whole step; for s = t-1 it is 1 - beta_t
    posterior_variance = (1 - a_s) / (1 - at) * (1 - alpha)
    if sampler == "ddpm":  # Ho et al. 2020, Eq. 7
        a = a_s.sqrt() * (1 - alpha) / (1 - at)  # posterior_mean_coef1, of x_start
        b = alpha.sqrt() * (1 - a_s) / (1 - at)  # posterior_mean_coef2, of x_t
        s = (posterior_variance if variance == "small" else (1 - alpha) * (a_s < 1)).sqrt()  # no noise in the last step
    else:  # Song et al. 2021, Eq. 12: sqrt(a_s) x0_hat + sqrt(1 - a_s - s^2) eps_hat, eps_hat from the clipped x0_hat
        s = eta * posterior_variance.sqrt()
        b = (1 - a_s - s**2).clamp(min=0).sqrt() / (1 - at).sqrt()
        a = a_s.sqrt() - b * at.sqrt()
    return timesteps, torch.stack([k_x, k_o, a, b, s], dim=1).float()


# ---------------------------------------------------------------------------------------------------------------------
# U-Net.


def group_norm(channels):
    return nn.GroupNorm(math.gcd(8, channels), channels)


def zero(layer):
    """Start a residual branch at nothing, so that the network starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, out): sines and cosines of 64 frequencies from 1 to 1/10000, then an MLP."""

    def __init__(self, out):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(64) / 64), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(128, out), nn.SiLU(), nn.Linear(out, out), nn.SiLU())

    def forward(self, t):
        angle = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))


class ResBlock(nn.Module):
    def __init__(self, in_channels, channels, emb_dim, dropout):
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), nn.Conv2d(in_channels, channels, 3, padding=1)
        self.scale_shift = nn.Linear(emb_dim, 2 * channels)
        self.norm2, self.dropout = group_norm(channels), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 64))
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        h = self.mix(*qkv.unbind(1))  # (B, heads, H*W, C/heads)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class LinearAttention(Attention):
    """Keys sum the values up to a (C/heads, C/heads) matrix first (Shen et al. 2021): cost H*W, not (H*W)^2."""

    def mix(self, q, k, v):
        return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


class Unet(nn.Module):
    """x (B, in_channels, H, W), t (B,) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels, out_channels, image_size, dim, dim_mults, num_blocks, attn_resolutions, linear_attention,
                 dropout):  # fmt: skip
        super().__init__()
        dims, emb_dim = [dim * m for m in dim_mults], 2 * max(dim, 64)
        size = [image_size // 2**level for level in range(len(dims))]

        def stage(level, in_channels):
            blocks = []
            for i in range(num_blocks):
                blocks += [ResBlock(dims[level] if i else in_channels, dims[level], emb_dim, dropout)]
                if size[level] in attn_resolutions or linear_attention:
                    blocks.append((Attention if size[level] in attn_resolutions else LinearAttention)(dims[level]))
            return nn.ModuleList(blocks)

        self.time = TimeEmbedding(emb_dim)
        self.stem = nn.Conv2d(in_channels, dims[0], 3, padding=1)
        self.down, self.downsample, self.up, self.upsample = (nn.ModuleList() for _ in range(4))
        for level in range(len(dims) - 1):
            self.down.append(stage(level, dims[level]))
            self.downsample.append(nn.Conv2d(4 * dims[level], dims[level + 1], 1))  # after space-to-depth
            self.upsample.append(nn.Conv2d(dims[level + 1], dims[level], 1))  # before nearest-neighbour
            self.up.append(stage(level, 2 * dims[level]))
        bottom = len(dims) - 1
        attention = [] if size[bottom] in attn_resolutions else [Attention(dims[bottom])]  # the bottleneck always has some
        self.mid = nn.ModuleList([*stage(bottom, dims[bottom]), *attention, *stage(bottom, dims[bottom])])
        self.out = nn.Sequential(group_norm(dims[0]), nn.SiLU(), zero(nn.Conv2d(dims[0], out_channels, 3, padding=1)))

    def forward(self, x, t):
        emb = self.time(t)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for blocks, downsample in zip(self.down, self.downsample, strict=True):
            for block in blocks:
                x = block(x, emb)
            skips.append(x)
            x = downsample(F.pixel_unshuffle(x, 2))
        for block in self.mid:
            x = block(x, emb)
        for blocks, upsample in zip(reversed(self.up), reversed(self.upsample), strict=True):
            x = F.interpolate(upsample(x), scale_factor=2.0, mode="nearest")
            x = torch.cat([x, skips.pop()], dim=1)
            for block in blocks:
                x = block(x, emb)
        return self.out(x)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion.


def q_sample(x_start, t, noise, scales):
    """x_t of the forward process, Ho et al. 2020, Eq. 4. x_start, noise: (B, C, H, W); t: (B,); scales: (T, 2)."""
    signal, spread = scales[t].view(-1, 2, 1, 1, 1).unbind(1)
    return signal * x_start + spread * noise


def predict(model, x_t, t, args):
    """The network's output, shaped like x_t (B, C, H, W): what args.objective says."""
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=args.use_amp):
        return model(x_t, t)


def training_loss(model, x_start, t, noise, scales, args):
    """The loss of a batch, for eps and l2 Ho et al. 2020, Eq. 14. x_start: (B, C, H, W) in [-1, 1]; scales: see make_scales."""
    out = predict(model, q_sample(x_start, t, noise, scales), t, args)
    # v is q_sample with image and noise in each other's place, up to a sign (Salimans & Ho 2022)
    goal = {"eps": noise, "x0": x_start}.get(args.objective)
    goal = q_sample(noise, t, -x_start, scales) if goal is None else goal
    return masked_loss(out, goal, kind=args.loss)


@torch.no_grad()
def sample(model, shape, seeds, args, watch=None, graphs=None):
    """Images (B, *shape) in [-1, 1] by the reverse process from pure noise.

    seeds: int64 (B,) on the device. An image depends on its own seed alone. watch, graphs: see reverse_process.
    """
    _, alphas_cumprod = make_schedule(args.schedule, args.num_timesteps)
    timesteps, coefficients = (
        x.to(seeds.device)
        for x in sampling_table(alphas_cumprod, args.objective, args.sampler, args.sample_steps, args.eta, args.variance)
    )

    def reverse_step(x_t, step, seeds):
        out = predict(model, x_t, timesteps[step].expand(len(x_t)), args)
        return posterior_step(x_t, out, coefficients, step, seeds)

    return reverse_process(reverse_step, seeded_normal(seeds, shape), args.sample_steps, [seeds], watch, graphs)


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def load_checkpoint(path):
    """A checkpoint of this script as a dict of tensors and plain types, on the CPU; else UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch.load raises whatever the bytes made it stumble over
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
    if script != SCRIPT:
        raise UserError(f"{path}: a checkpoint of {script}.py, not of {SCRIPT}.py")
    return checkpoint


def load_weights(model, weights, args):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        wrong = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the checkpoint does not fit --data {args.data} or this version of the network: {wrong}") from error


def write(path, save):
    """Write by save(temporary path), then move into place: whatever happens, path is the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from error


def to_device(images, device):
    """uint8 [0, 255] -> float32 [-1, 1] on the device."""
    return images.to(device).float() / 127.5 - 1


def mix(*numbers):
    """One 63-bit seed from several whole numbers. (torch's CPU generator heeds no more than 32 bits, so shifting won't do.)"""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def stop_signals():
    """A list in which Ctrl-C and SIGTERM leave a mark instead of ending the program."""
    caught = []
    before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- decay ema + (1 - decay) model, with less memory while there is little to remember."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def held_out_loss(model, images, scales, args):
    """The loss on fixed images (N, C, H, W) uint8 with fixed timesteps and noise, so that it compares between steps."""
    index = torch.arange(len(images), device=images.device)
    t = torch.linspace(0, args.num_timesteps - 1, len(images), device=images.device).long()
    noise = seeded_normal(index, images.shape[1:])
    return training_loss(model, to_device(images, args.device), t, noise, scales, args).item()


def train(args, model, ema, optimizer, images, held_out, state, stopped):
    """Train model in place, up to args.steps; True when done, False when stopped by a signal, saved in either case.

    images: uint8 (N, C, H, W) on the device; held_out: {"val": images, "test": images}; stopped: see stop_signals.
    state: {"step", "history", "losses"}, where to go on from. Everything random in a step is a function of (seed, step), so a
    resumed run is the uninterrupted one, and each process of several takes its share of the same batch.
    """
    out_dir, device, n, config = Path(args.out_dir), args.device, len(images), dict(vars(args))
    batch_size = min(args.batch_size, n) // world() * world()
    steps_an_epoch = max(n // batch_size, 1)
    share = slice(rank() * batch_size // world(), (rank() + 1) * batch_size // world())
    scales = make_scales(make_schedule(args.schedule, args.num_timesteps)[1]).to(device)
    parallel = nn.parallel.DistributedDataParallel(model) if world() > 1 else model
    network = torch.compile(parallel) if args.compile else parallel
    history, epoch, stop = state["history"], -1, False
    losses = list(torch.tensor(state["losses"], device=device))  # since the last entry of the history
    progress = tqdm(total=args.steps, initial=state["step"], unit="step", desc="training", disable=rank() > 0)

    for step in range(state["step"], args.steps):
        if step // steps_an_epoch != epoch:
            epoch = step // steps_an_epoch
            order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(args.seed, epoch, 1))).to(device)
        torch.manual_seed(mix(args.seed, step, 0))
        index = order[step % steps_an_epoch * batch_size :][:batch_size]
        t = torch.randint(args.num_timesteps, (batch_size,), device=device)
        noise = torch.randn(batch_size, *images.shape[1:], device=device)
        mirror = torch.rand(batch_size, device=device) < 0.5 * args.flip
        index, t, noise, mirror = index[share], t[share], noise[share], mirror[share]
        if rank():
            torch.manual_seed(mix(args.seed, step, 2, rank()))  # for dropout of its own
        x_start = to_device(images[index], device)
        x_start = torch.where(mirror[:, None, None, None], x_start.flip(-1), x_start)

        warm_up = min((step + 1) / 100, 1)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / args.steps) if args.lr_schedule == "cosine" else 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_up * decay
        loss = training_loss(network, x_start, t, noise, scales, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        update_ema(ema, model, step, args.ema_decay)
        losses.append(loss.detach() + 0 * norm)  # a gradient that is not finite counts as a loss that is not
        progress.update()

        done, last = step + 1, step + 1 == args.steps
        point, saving = done % args.log_every == 0 or last, done % args.save_every == 0 or last
        if point or saving or (stopped if world() == 1 else done % 10 == 0):  # the only times the host waits for the device
            report = torch.stack([*losses, torch.tensor(float(bool(stopped)), device=device)])
            if world() > 1:
                dist.all_reduce(report)
            *losses, stops = (report / world()).tolist()
            stop, mean = stops > 0, sum(losses) / len(losses)
            saving = saving or stop
            if not math.isfinite(mean):
                kept = "the last good checkpoint is kept" if (out_dir / "last.pt").exists() else "there is no checkpoint yet"
                raise UserError(f"the loss became {mean} by step {done}; {kept}. Try a smaller --lr, or --amp off")
            if point:
                history["steps"].append(done)
                history["epochs"].append(done / steps_an_epoch)
                history["train_loss"].append(mean)
                for part, part_images in held_out.items():
                    history[f"{part}_loss"].append(held_out_loss(ema, part_images, scales, args))
                losses = []
                progress.set_postfix(loss=f"{mean:.4f}", val=f"{history['val_loss'][-1]:.4f}", refresh=False)
            if saving and rank() == 0:
                checkpoint = {"script": SCRIPT, "config": config, "step": done, "history": history, "losses": losses}
                checkpoint |= {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
                write(out_dir / "last.pt", lambda path: torch.save(checkpoint, path))  # noqa: B023
                write(out_dir / "history.json", lambda path: path.write_text(json.dumps(history)))
            losses = list(torch.tensor(losses, device=device))
        if stop:
            break
        if done % args.sample_every == 0 and not last:
            draw_grid(out_dir / f"step_{done:06d}.png", generate(ema, images.shape[1:], 64, args))
    progress.close()
    return not stop


# ---------------------------------------------------------------------------------------------------------------------
# Samples, pictures.


def generate(model, shape, n, args, file=None):
    """n images, shared out over the processes: the same ones for any number of them and any batch size, up to rounding.

    Returns uint8 (n, C, H, W) on the CPU; or, with a SampleFile, adds what that does not hold yet and returns nothing.
    """
    images = torch.zeros(n, *shape, dtype=torch.uint8, device=args.device) if file is None else file
    batches, graphs = torch.arange(n, device=args.device).split(args.batch_size), {}
    mine = (batches if file is None else file.missing(batches))[rank() :: world()]
    bar = tqdm(total=len(mine) * args.sample_steps, desc="sampling", unit="step", leave=False, disable=rank() > 0 or not file)
    for index in mine:
        seeds = (args.seed << 32) + index
        images[index] = to_bytes(sample(model, shape, seeds, args, lambda x_t: bar.update(), graphs))
    bar.close()
    if file is None and world() > 1:
        dist.all_reduce(images)  # each process left the others' share at zero
    return images.cpu() if file is None else None


def to_bytes(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).byte()


def draw_grid(path, images, columns=8, rows=(), heads=()):
    """uint8 images (N, C, H, W) as a PNG, row by row, at three times their size; rows, heads: labels at the left, on top."""
    if rank() > 0:
        return
    sheet = tile(images, columns)
    left = 12 + max(int(ImageDraw.Draw(sheet).textlength(text, font_size=20)) for text in rows) if rows else 0
    page = Image.new("RGB", (left + sheet.width, 30 * bool(heads) + sheet.height), "white")
    page.paste(sheet, (left, 30 * bool(heads)))
    high, wide = sheet.height // max(len(rows), 1), sheet.width // columns
    for i, text in enumerate(rows):
        ImageDraw.Draw(page).text((left - 6, 30 * bool(heads) + (i + 0.5) * high), text, "black", anchor="rm", font_size=20)
    for i, text in enumerate(heads):
        ImageDraw.Draw(page).text((left + (i + 0.5) * wide, 15), text, "black", anchor="mm", font_size=20)
    write(path, page.save)


def tile(images, columns):
    """uint8 (N, C, H, W) -> PIL image: row by row, three times the size, a white line between."""
    images = F.pad(images.cpu().expand(-1, 3, -1, -1), (1, 1, 1, 1), value=255)
    images = torch.cat([images, images.new_full((-len(images) % columns, *images.shape[1:]), 255)])
    n, _, h, w = images.shape
    sheet = images.view(n // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(n // columns * h, columns * w, 3)
    return Image.fromarray(sheet.numpy()).resize((3 * columns * w, 3 * h * n // columns), Image.Resampling.NEAREST)


def draw_losses(path, history):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name in HISTORY[2:]:
        axis.plot(history["steps"], history[name], label=name)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    write(path, lambda p: figure.savefig(p, dpi=110))


def draw_schedules(path, num_timesteps):
    """beta and alphas_cumprod of the three schedules."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("linear", "cosine", "sigmoid"):
        betas, alphas_cumprod = make_schedule(name, num_timesteps)
        left.plot(betas, label=name)
        right.plot(alphas_cumprod, label=f"{name}, ends at {alphas_cumprod[-1]:.1e}")
    left.set(xlabel="t", title="beta: variance added by a step", ylim=(0, 30 / num_timesteps))
    right.set(xlabel="t", title="alphas_cumprod: share of the image left")
    left.legend(), right.legend()
    write(path, lambda p: figure.savefig(p, dpi=110))


def draw_time_embedding(path, num_timesteps):
    embedding = TimeEmbedding(1)
    angle = torch.arange(num_timesteps)[:, None] * embedding.frequencies
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(torch.cat([angle.sin(), angle.cos()], dim=1).T.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu")
    axis.set(xlabel="t", ylabel="feature", title="time embedding: 64 sines above 64 cosines, from fast to slow")
    write(path, lambda p: figure.savefig(p, dpi=110))


@torch.no_grad()
def draw_process(model, images, args):
    """Schedules, time embedding, forward and reverse process, reverse variances: as pictures in out_dir. images: uint8."""
    out_dir, device, shape, T = Path(args.out_dir), args.device, images.shape[1:], args.num_timesteps
    draw_schedules(out_dir / "schedules.png", T)
    draw_time_embedding(out_dir / "time_embedding.png", T)

    x_start = to_device(images[:6], device)
    index = torch.arange(len(x_start), device=device)
    noise = seeded_normal(index, shape)
    scales = make_scales(make_schedule(args.schedule, T)[1]).to(device)
    times = torch.linspace(0, T - 1, 10).round().long().tolist()
    columns = [q_sample(x_start, torch.full_like(index, t), noise, scales) for t in times]
    heads = [f"t = {t}" for t in times]
    draw_grid(out_dir / "forward.png", to_bytes(torch.stack(columns, dim=1).flatten(0, 1)), len(heads), heads=heads)

    seeds = (args.seed << 32) + torch.arange(9, device=device)
    frames = [seeded_normal(seeds, shape)]
    sample(model, shape, seeds, args, lambda x_t: frames.append(x_t.clone()))
    steps = [round(i) for i in np.linspace(0, len(frames) - 1, 10)]
    heads = [f"{i} steps" for i in steps]
    columns = [frames[i][:6] for i in steps]
    draw_grid(out_dir / "reverse.png", to_bytes(torch.stack(columns, dim=1).flatten(0, 1)), len(heads), heads=heads)
    movie = [tile(to_bytes(frames[round(i)]), 3) for i in np.linspace(0, len(frames) - 1, min(len(frames), 40))]
    wait = [80] * (len(movie) - 1) + [2000]  # milliseconds
    write(out_dir / "reverse.gif", lambda p: movie[0].save(p, save_all=True, append_images=movie[1:], duration=wait, loop=0))

    few, rows = max(T // 20, 1), {}
    kinds = [("ddpm", "small", T), ("ddpm", "large", T), ("ddpm", "small", few), ("ddpm", "large", few), ("ddim", "eta 0", few)]
    for sampler, variance, steps in tqdm(kinds, desc="reverse variances", leave=False):
        options = {"sampler": sampler, "variance": variance, "sample_steps": steps, "eta": 0.0}
        changed = argparse.Namespace(**vars(args) | options)
        rows[f"{sampler}, {variance}, {steps}"] = to_bytes(sample(model, shape, torch.arange(10, device=device), changed))
    draw_grid(out_dir / "variances.png", torch.cat(list(rows.values())), 10, list(rows))


# ---------------------------------------------------------------------------------------------------------------------


def run(args, checkpoint):
    if dist.is_torchelastic_launched() and args.device == "cuda":  # by torchrun: one process a GPU, or several on a CPU
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device, out_dir = args.device, Path(args.out_dir)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if args.batch_size % world():
            raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {world()} processes")

    name = [choose_data(args.data, args.preset == "full", args.data_dir) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(name)  # after the first process has downloaded it
    args.data = name[0]
    shuffled = lambda x: x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]  # folders come sorted by class
    if args.plots or not args.sample:
        test = shuffled(load_images(args.data, args.data_dir, args.image_size, train=False)[0])
        args.channels = test.shape[1]
    if not args.sample:
        images = shuffled(load_images(args.data, args.data_dir, args.image_size, train=True)[0])
        val, images = images.split([max(len(images) // 10, 1), len(images) - max(len(images) // 10, 1)])
        if len(images) < world():
            raise UserError(f"--data {args.data}: {len(images)} training images are too few for {world()} processes")
    shape = (args.channels, args.image_size, args.image_size)

    torch.manual_seed(args.seed)
    model = Unet(args.channels, args.channels, args.image_size, args.dim, args.dim_mults, args.num_blocks,
                 args.attn_resolutions, args.linear_attention, args.dropout)  # fmt: skip
    model = model.to(device=device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    state = {"step": 0, "history": {k: [] for k in HISTORY}, "losses": []}
    if checkpoint:
        load_weights(model, checkpoint["model"], args)
        load_weights(ema, checkpoint["ema"], args)
        state = {key: checkpoint[key] for key in state}

    # bfloat16 pays where the hardware multiplies it: a GPU since Ampere, a CPU with AMX. Else it is emulated, at 0.4 the speed.
    cpu_features = getattr(torch.cpu, "get_capabilities", dict)()
    native = cpu_features.get("amx_bf16", False) if device == "cpu" else False
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    args.use_amp = args.amp == "on" or (args.amp == "auto" and native)
    if not args.sample:
        args.steps, args.epochs = args.steps or args.epochs * max(len(images) // args.batch_size, 1), 0
        args.log_every = args.log_every or max(args.steps // 40, 1)
        args.sample_every = args.sample_every or max(args.steps // 5, 1)
    if rank() == 0:
        count = "" if args.sample else f"{len(images)} images of "
        print(f"{SCRIPT}.py: preset {args.preset}, data {args.data} ({count}{'x'.join(map(str, shape))}), device {device}"
              f"{' (bfloat16)' if args.use_amp else ''}")  # fmt: skip
        print(f"extension: {fused_ddpm.status()}")
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, output in {out_dir}/")

    if not args.sample:
        if rank() == 0:
            for old in [*out_dir.glob("last.pt"), *out_dir.glob("step_*.png")] if not checkpoint else []:
                old.unlink()  # --overwrite: none of these to be mistaken for the new run's
            write(out_dir / "config.json", lambda path: path.write_text(json.dumps(vars(args), indent=1)))
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
        if checkpoint:
            optimizer.load_state_dict(checkpoint["optimizer"])
        held_out = {"val": val[:128].to(device), "test": test[:128].to(device)}
        with stop_signals() as stopped:
            finished = train(args, model, ema, optimizer, images.to(device), held_out, state, stopped)
        if not finished:
            raise UserError(f"stopped; the run is saved, go on with --resume --out-dir {out_dir}")
        if rank() == 0:
            draw_losses(out_dir / "loss.png", state["history"])
    if args.compile:
        ema.compile()
    file = SampleFile(out_dir / "samples.npy", (args.num_samples, *shape), np.uint8, vars(args), ema.state_dict().values())
    generate(ema, shape, args.num_samples, args, file)
    samples = torch.from_numpy(file.finish()).movedim(-1, 1)
    draw_grid(out_dir / "samples.png", samples[:64])
    if rank() == 0:
        if args.plots:
            draw_process(ema, test, args)
        print(f"samples.npy ({len(samples)} images) and pictures are in {out_dir}/")


def main(argv=None):
    try:
        run(*get_config(argv))
    except (UserError, DataError) as error:
        sys.exit(f"{SCRIPT}.py: error: {error}" if rank() == 0 or isinstance(error, DataError) else 1)
    except KeyboardInterrupt:  # in training it is caught, and the run saved
        sys.exit(f"{SCRIPT}.py: interrupted")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
