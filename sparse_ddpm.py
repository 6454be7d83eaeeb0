"""Sparse diffusion: see 20% of the pixels of an image, learn from another 20%, return all of them.

A DDPM (Ho et al. 2020) whose network also sees a sparse image. Two disjoint pixel masks are drawn for each training
image, m_c (conditioning) and m_t (target), shared by all channels. With x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise,
a_t = alphas_cumprod[t], the network f takes [x_t, m_c x_0, m_c] and is scored on the target pixels, with a small weight
on the observed ones:

    loss = sum w (f(x_t, m_c x_0, m_c, t) - goal)^2 / sum w,    w = min(m_t + 0.05 m_c, 1)

The context/query partition is that of arXiv 2509.20098; learning from masked images is studied in Ambient Diffusion (Daras
et al. 2023, arXiv 2305.19256). Sampling runs the reverse process with the observed pixels as input at every step; K runs
from different noise are K draws from the posterior: their mean is the best guess, their spread says where it is one.

    python sparse_ddpm.py --sparsity 0.2                        # train, reconstruct test images, draw pictures
    python sparse_ddpm.py --data path/to/photos --preset full   # your own images, on a GPU
    python sparse_ddpm.py --sample out/sparse_ddpm/last.pt --num-draws 16 --out-dir out/more

Measured: the first command, on Fashion-MNIST, takes 6 min 42 s on two cores of a 2.8 GHz Xeon (torch 2.15.0). On 256 test
images, unseen pixels only, the mean of 8 draws has a PSNR of 20.2 dB, one draw 18.2, linear interpolation 17.0.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import fused_ddpm
from fused_ddpm import MASK_KEYS, masked_loss, posterior_step, random_words, reverse_process, seeded_normal
from images import DataError, SampleFile, choose_data, load_images

SCRIPT = Path(__file__).stem

# ---------------------------------------------------------------------------------------------------------------------
# Config. A flag on the command line wins over the preset. small suits two CPU cores, full is the configuration for a GPU.

MODEL_FLAGS = {"image_size", "dim", "dim_mults", "num_blocks", "attn_resolutions", "linear_attention"}
MODEL_FLAGS |= {"num_timesteps", "schedule", "objective"}
# What a resumed run may change; all else would make it another run.
FREE_FLAGS = {"steps", "epochs", "sampler", "sample_steps", "eta", "variance", "num_samples", "num_draws", "enforce_observed"}
FREE_FLAGS |= {"lr", "grad_clip", "amp"}  # what a loss that became nan calls for
FREE_FLAGS |= {"data_dir", "device", "compile", "out_dir", "save_every", "sample_every", "resume", "overwrite", "sample"}
# What a checkpoint does not pass on.
ONCE = {"sample": None, "resume": False, "overwrite": False}
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
    groups.append(parser.add_argument_group("sparsity"))
    flag("sparsity", number(float, 0, 1, "()"), 0.2, "fraction of the pixels that the network sees")
    flag("target-sparsity", number(float, 0, 1, "()"), None, "fraction the loss is taken on; by default the same")
    flag("cond-weight", share, 0.05, "weight of the observed pixels in the loss")
    flag("mask-mode", ["random_epoch", "fixed", "random"], "random_epoch", "masks are new in each epoch, never, or at each use")
    flag("mask-pattern", list(PATTERNS), "random", "how the pixels are scattered")
    groups.append(parser.add_argument_group("model"))
    flag("dim", count, 16, "channels at full resolution", full=128)
    flag("dim-mults", count, [1, 4, 6], "channels of each level, as multiples of dim", full=[1, 2, 2], nargs="+")
    flag("num-blocks", count, 1, "residual blocks of each level, going down and going up", full=2)
    flag("attn-resolutions", count, [], "sides of the feature maps that get attention", full=[16, 8], nargs="*")
    flag("linear-attention", bool, False, "attention at cost linear in the pixels for all other maps")
    flag("dropout", number(float, 0, 1, "[)"), 0.0, "inside the residual blocks", full=0.1)
    groups.append(parser.add_argument_group("diffusion"))
    flag("num-timesteps", count, 1000, "steps of the forward process")
    flag("schedule", ["linear", "cosine", "sigmoid"], "cosine", "of the noise variances beta", full="linear")
    flag("objective", ["eps", "v", "x0"], "x0", "what the network predicts: noise, velocity or image", full="eps")
    flag("loss", list(fused_ddpm.LOSS_KINDS), "l2", "distance to it")
    groups.append(parser.add_argument_group("training"))
    length = groups[-1].add_mutually_exclusive_group()
    flag("steps", count, 1600, "optimizer steps", full=0, into=length)
    flag("epochs", count, 0, "the same in passes over the data", full=50, into=length)
    flag("batch-size", count, 32, "images a step, over all processes; also that of sampling", full=128)
    flag("lr", number(float, 0, 1, "(]"), 2e-3, "peak learning rate of Adam", full=2e-4)
    flag("lr-schedule", ["constant", "cosine"], "cosine", "after the warm-up; cosine ends at 0", full="constant")
    flag("grad-clip", number(float, 0, math.inf, "(]"), 1.0, "largest norm of the gradient")
    flag("ema-decay", number(float, 0, 1, "[)"), 0.995, "of the averaged weights, those sampled from", full=0.9999)
    groups.append(parser.add_argument_group("sampling"))
    flag("sampler", ["ddpm", "ddim"], "ddim", "ancestral sampling or DDIM", full="ddpm")
    flag("sample-steps", count, 20, "network calls for an image, at most num-timesteps", full=1000)
    flag("eta", share, 0.0, "noise of DDIM: 0 none, 1 as much as DDPM")
    flag("variance", ["small", "large"], "small", "of DDPM's reverse steps: that of the posterior, or beta")
    flag("num-samples", number(int, 1, 2**20), 256, "test images to reconstruct")
    flag("num-draws", number(int, 1, 1000), 8, "K, reconstructions of each")
    flag("enforce-observed", bool, True, "put the observed pixels back at the end")
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
    flag("sample", str, None, "train nothing, reconstruct with the weights of this checkpoint", metavar="CHECKPOINT")
    return parser, presets


def check_flags(args, parser):
    """What argparse cannot see: flags that do not fit each other."""
    halvings = len(args.dim_mults) - 1
    if args.image_size % 2**halvings:
        parser.error(f"--image-size {args.image_size}: the U-Net halves it {halvings} times, so it must be a multiple of "
                     f"{2**halvings}")  # fmt: skip
    if args.sample_steps > args.num_timesteps:
        parser.error(f"--sample-steps {args.sample_steps}: at most --num-timesteps, {args.num_timesteps}")
    n, n_cond, n_target = mask_counts(args)
    if args.sparsity + (args.target_sparsity or args.sparsity) > 1:
        parser.error(f"--sparsity {args.sparsity} and --target-sparsity {args.target_sparsity or args.sparsity}: "
                     "the masks are disjoint, so their sum must not exceed 1")  # fmt: skip
    if not (n_cond and n_target and n_cond + n_target <= n):
        parser.error(f"--sparsity {args.sparsity}: that is {n_cond} pixels to see and {n_target} to score of the {n} there are")


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
# Masks. Pixels are ranked by a random score; the first are observed, the next are targets. So both counts are exact, the
# two are disjoint, and a pattern is a way to score. Scores come from counter-based random words: a function of (seed, image,
# epoch) and nothing else, so nothing is stored, and any process, batch or device makes the same masks.


def score_random(words, size, n):
    return words


def score_block(words, size, n):
    """Square blocks: every pixel of one has the score of its first."""
    side = max(size // 8, 2)
    row, column = torch.meshgrid(*[torch.arange(size, device=words.device) // side] * 2, indexing="ij")
    return words[:, (row * side * size + column * side).flatten()]


def score_grid(words, size, n):
    """Every p-th pixel of a row, p = 1 / fraction, each row shifted against the last; the phase is random."""
    period = max(round(size * size / n), 2)
    row, column = torch.meshgrid(*[torch.arange(size, device=words.device)] * 2, indexing="ij")
    lattice = (column + row * round(0.382 * period)).flatten()  # golden-section shift: no columns
    residue = (lattice + words[:, :1]) % period
    # Residue 0 is seen. The order of the others turns from image to image, so that each gets its share of targets.
    residue = torch.where(residue == 0, 0, 1 + (residue + words[:, 1:2]) % (period - 1))
    return (residue << 32) + words  # within a residue, pixels go at random


def score_walk(words, size, n):
    """Four random walks, reflected at the border: a pixel's score is the time of the first visit."""
    walkers = 4
    walks = F.pad(words, (0, -words.shape[1] % walkers)).unflatten(1, (walkers, -1))
    moves = ((walks[..., None] >> torch.tensor([0, 2, 4, 6], device=words.device)) & 3).flatten(2)  # four to a word
    start = walks[:, :, None, :2] >> 8
    step = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]], device=words.device)[moves]  # (B, walkers, time, 2)
    place = (start + step.cumsum(2)) % (2 * size)
    place = torch.minimum(place, 2 * size - 1 - place)
    visited = (place[..., 0] * size + place[..., 1]).flatten(1)
    time_of = torch.arange(moves.shape[2], device=words.device).expand_as(moves).flatten(1)
    never = (1 << 32) + words  # pixels without a visit come last, at random
    return never.scatter_reduce(1, visited, time_of, "amin")


PATTERNS = {"random": score_random, "block": score_block, "grid": score_grid, "walk": score_walk}


def mask_counts(args):
    """Pixels of an image, and how many of them are seen and scored."""
    n = args.image_size**2
    n_cond = round(args.sparsity * n)
    # At 0.3 and 0.7 both might be rounded up, one pixel too many.
    return n, n_cond, min(round((args.target_sparsity or args.sparsity) * n), n - n_cond)


def make_masks(index, epoch, args):
    """Masks for images `index` (B,) int64: (cond_mask, target_mask), bool (B, 1, H, W), disjoint, exact in their counts."""
    size, (n, n_cond, n_target) = args.image_size, mask_counts(args)
    words = random_words((args.seed << 32) + index, n, epoch, MASK_KEYS)
    score = PATTERNS[args.mask_pattern](words, size, n_cond)
    order = (score * n + torch.arange(n, device=index.device)).argsort(dim=1)  # no ties: the same order everywhere
    masks = torch.zeros(2, len(index), n, dtype=torch.bool, device=index.device)
    masks[0].scatter_(1, order[:, :n_cond], True)
    masks[1].scatter_(1, order[:, n_cond : n_cond + n_target], True)
    return masks.view(2, -1, 1, size, size).unbind(0)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion.

TEST_INDEX = 1 << 31  # held-out images have masks of their own


def q_sample(x_start, t, noise, scales):
    """x_t of the forward process, Ho et al. 2020, Eq. 4. x_start, noise: (B, C, H, W); t: (B,); scales: (T, 2)."""
    signal, spread = scales[t].view(-1, 2, 1, 1, 1).unbind(1)
    return signal * x_start + spread * noise


def predict(model, x_t, t, cond, cond_mask, args):
    """The network on the noised image, the sparse image (0 where nothing is seen) and its mask: (B, 3C, H, W) in."""
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=args.use_amp):
        return model(torch.cat([x_t, cond, cond_mask.expand_as(cond).to(cond.dtype)], dim=1), t)


def training_loss(model, x_start, t, noise, cond_mask, target_mask, scales, args):
    """The masked loss of a batch. x_start: (B, C, H, W) in [-1, 1]; masks: bool (B, 1, H, W); scales: see make_scales."""
    out = predict(model, q_sample(x_start, t, noise, scales), t, x_start * cond_mask, cond_mask, args)
    # v is q_sample with image and noise in each other's place, up to a sign (Salimans & Ho 2022)
    goal = {"eps": noise, "x0": x_start}.get(args.objective)
    goal = q_sample(noise, t, -x_start, scales) if goal is None else goal
    return masked_loss(out, goal, target_mask, cond_mask, args.cond_weight, args.loss)


@torch.no_grad()
def sample(model, cond, cond_mask, seeds, args, watch=None, graphs=None):
    """Reconstructions (B, C, H, W) in [-1, 1] of sparse images cond (B, C, H, W), zero outside cond_mask (B, 1, H, W).

    seeds: int64 (B,). An image depends on its own seed, pixels and mask alone. watch, graphs: see reverse_process.
    """
    _, alphas_cumprod = make_schedule(args.schedule, args.num_timesteps)
    timesteps, coefficients = (
        x.to(seeds.device)
        for x in sampling_table(alphas_cumprod, args.objective, args.sampler, args.sample_steps, args.eta, args.variance)
    )

    def reverse_step(x_t, step, cond, cond_mask, seeds):
        out = predict(model, x_t, timesteps[step].expand(len(x_t)), cond, cond_mask, args)
        return posterior_step(x_t, out, coefficients, step, seeds)

    start = seeded_normal(seeds, cond.shape[1:])
    x_t = reverse_process(reverse_step, start, args.sample_steps, [cond, cond_mask, seeds], watch, graphs)
    return torch.where(cond_mask, cond, x_t) if args.enforce_observed else x_t


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
    """The loss on fixed images (N, C, H, W) uint8 with fixed timesteps, noise and masks, so that it compares between steps."""
    index = torch.arange(len(images), device=images.device)
    t = torch.linspace(0, args.num_timesteps - 1, len(images), device=images.device).long()
    noise, masks = seeded_normal(index, images.shape[1:]), make_masks(TEST_INDEX + index, 0, args)
    return training_loss(model, to_device(images, args.device), t, noise, *masks, scales, args).item()


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
        mask_epoch = {"random_epoch": epoch, "fixed": 0, "random": step}[args.mask_mode]
        cond_mask, target_mask = make_masks(index, mask_epoch, args)

        warm_up = min((step + 1) / 100, 1)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / args.steps) if args.lr_schedule == "cosine" else 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_up * decay
        loss = training_loss(network, x_start, t, noise, cond_mask, target_mask, scales, args)
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
            draw_reconstructions(out_dir / f"step_{done:06d}.png", *reconstruct(ema, held_out["val"][:8], 2, args))
    progress.close()
    return not stop


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction, metrics, pictures.


def reconstruct(model, images, num_draws, args, file=None):
    """K draws for each test image, shared out over the processes: (truth, cond_mask, target_mask, draws) on the CPU.

    images: uint8 (N, C, H, W). truth: (N, C, H, W) and draws: (K, N, C, H, W), float32 in [0, 1]; masks: bool (N, 1, H, W).
    With a SampleFile for K N images, what that holds is not made again, and the draws stay in it, mapped into memory.
    """
    n, device = len(images), args.device
    truth, to_unit = to_device(images, device), lambda x: (x / 2 + 0.5).clamp(0, 1)
    cond_mask, target_mask = make_masks(TEST_INDEX + torch.arange(n, device=device), 0, args)
    draws = torch.zeros(num_draws * n, *images.shape[1:], device=device) if file is None else file
    batches, graphs = torch.arange(num_draws * n, device=device).split(args.batch_size), {}
    mine = (batches if file is None else file.missing(batches))[rank() :: world()]
    bar = tqdm(total=len(mine) * args.sample_steps, desc="sampling", unit="step", leave=False, disable=rank() > 0 or not file)
    for jobs in mine:
        i, draw = jobs % n, jobs // n
        seeds, cond = (args.seed << 32) + (draw << 20) + i, truth[i] * cond_mask[i]
        draws[jobs] = to_unit(sample(model, cond, cond_mask[i], seeds, args, lambda x_t: bar.update(), graphs))
    bar.close()
    if file is not None:
        draws = torch.from_numpy(file.array()).movedim(-1, 1)
    elif world() > 1:
        dist.all_reduce(draws)  # each process left the others' share at zero
    return to_unit(truth).cpu(), cond_mask.cpu(), target_mask.cpu(), draws.cpu().unflatten(0, (num_draws, n))


def gaussian_blur(x, sigma):
    """x (N, C, H, W), zero outside the image, with a Gaussian of sigma pixels cut off at 3 sigma."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(x, kernel, padding=(0, radius), groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(-1, -2), padding=(radius, 0), groups=x.shape[1])


def interpolate(truth, cond_mask, fraction):
    """The baseline: each unseen pixel is a Gaussian-weighted mean of the seen ones (normalised convolution)."""
    mask = cond_mask.float()
    seen, weight, value = truth * mask, 0, 0
    for sigma, share in [(0.5 / fraction**0.5, 1), (2 / fraction**0.5, 1e-4), (8 / fraction**0.5, 1e-8)]:  # where none is near
        weight = weight + share * gaussian_blur(mask, sigma)
        value = value + share * gaussian_blur(seen, sigma)
    return torch.where(cond_mask, truth, value / weight.clamp(min=1e-30))


def psnr(x, truth, where):
    """Decibels over the pixels of `where` (N, 1, H, W), each image by itself, then the mean. Values in [0, 1]."""
    where = where.expand_as(x)
    mse = ((x - truth) ** 2 * where).sum((1, 2, 3)) / where.sum((1, 2, 3))
    return (-10 * mse.clamp(min=1e-10).log10()).mean().item()


def ssim(x, truth, where):
    """Structural similarity (Wang et al. 2004; Gaussian window, sigma 1.5), the mean over the pixels of `where`."""
    mean = lambda image: gaussian_blur(image, 1.5) / gaussian_blur(torch.ones_like(image), 1.5)
    mx, my = mean(x), mean(truth)
    vx, vy, cov = mean(x * x) - mx * mx, mean(truth * truth) - my * my, mean(x * truth) - mx * my
    quality = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2) / ((mx * mx + my * my + 0.01**2) * (vx + vy + 0.03**2))
    return quality[where.expand_as(x)].mean().item()


def draw_reconstructions(path, truth, cond_mask, target_mask, draws):
    """A sheet with one row an image: original, what was seen, target mask, one draw, mean of the draws, their spread."""
    if rank() > 0:
        return
    rgb = lambda x: x.float().expand(-1, 3, -1, -1)
    spread = draws.std(0, correction=0).mean(1, keepdim=True)  # (N, 1, H, W)
    spread = torch.from_numpy(matplotlib.colormaps["magma"]((spread / spread.max().clamp(min=1e-6))[:, 0].numpy())[..., :3])
    seen = torch.where(cond_mask, rgb(truth), torch.tensor([0.25, 0.3, 0.45]).view(1, 3, 1, 1))  # blue-grey: not seen
    columns = {
        "original": rgb(truth), f"seen ({cond_mask.float().mean():.0%})": seen, "target mask": rgb(target_mask),
        "one draw": rgb(draws[0]), f"mean of {len(draws)}": rgb(draws.mean(0)), "spread": spread.permute(0, 3, 1, 2).float(),
    }  # fmt: skip
    draw_sheet(path, columns)


def draw_sheet(path, columns):
    """A PNG with one column of images for each entry: {heading: float (N, 3, H, W) in [0, 1]}."""
    sheet = F.pad(torch.stack(list(columns.values())), (1, 1, 1, 1), value=1.0)  # (k, N, 3, H, W)
    k, n, _, h, w = sheet.shape
    figure = Figure(figsize=(1.5 * k, 1.5 * n * h / w + 0.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet.permute(1, 3, 0, 4, 2).reshape(n * h, k * w, 3).numpy(), interpolation="nearest")
    axis.set_xticks([(i + 0.5) * w for i in range(k)], list(columns))
    axis.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, left=False, labelleft=False)
    axis.spines[:].set_visible(False)
    write(path, lambda p: figure.savefig(p, dpi=110))


def draw_losses(path, history):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name in HISTORY[2:]:
        axis.plot(history["steps"], history[name], label=name)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    write(path, lambda p: figure.savefig(p, dpi=110))


def evaluate(model, images, args):
    """Reconstruct test images, measure, and write metrics.json, reconstructions.npz, samples.npy and the final sheet."""
    out_dir, start = Path(args.out_dir), time.time()
    shape = (args.num_draws * len(images), *images.shape[1:])
    file = SampleFile(out_dir / "draws.npy", shape, np.float32, vars(args), [*model.state_dict().values(), images])
    truth, cond_mask, target_mask, draws = reconstruct(model, images, args.num_draws, args, file)
    if rank() > 0:
        return
    seconds = time.time() - start
    results = {"draw": draws[0], "mean": draws.mean(0), "baseline": interpolate(truth, cond_mask, args.sparsity)}
    metrics = {
        "psnr": {name: psnr(x, truth, ~cond_mask) for name, x in results.items()},
        "ssim": {name: ssim(x, truth, ~cond_mask) for name, x in results.items()},
        "num_images": len(truth), "num_draws": args.num_draws, "sparsity": args.sparsity, "seconds": round(seconds, 1),
    }  # fmt: skip
    arrays = {"truth": truth, "cond_mask": cond_mask, "target_mask": target_mask, "draws": draws}
    write(out_dir / "reconstructions.npz", lambda path: np.savez(path, **{k: v.numpy() for k, v in arrays.items()}))
    samples = (draws[0] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    write(out_dir / "samples.npy", lambda path: np.save(path, samples))
    write(out_dir / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))
    file.part.unlink()  # now that all is elsewhere
    draw_reconstructions(out_dir / "reconstructions.png", truth[:10], cond_mask[:10], target_mask[:10], draws[:, :10])
    names = {"draw": "one draw", "mean": f"mean of {args.num_draws}", "baseline": "interpolation"}
    print(f"{len(truth)} test images, unseen pixels only ({seconds:.0f} s):")
    for key, name in names.items():
        print(f"  {name:14} PSNR {metrics['psnr'][key]:5.2f} dB   SSIM {metrics['ssim'][key]:.3f}")


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
    test = shuffled(load_images(args.data, args.data_dir, args.image_size, train=False)[0])
    args.channels = test.shape[1]
    if not args.sample:
        images = shuffled(load_images(args.data, args.data_dir, args.image_size, train=True)[0])
        val, images = images.split([max(len(images) // 10, 1), len(images) - max(len(images) // 10, 1)])
        if len(images) < world():
            raise UserError(f"--data {args.data}: {len(images)} training images are too few for {world()} processes")
    shape = (args.channels, args.image_size, args.image_size)

    torch.manual_seed(args.seed)
    model = Unet(3 * args.channels, args.channels, args.image_size, args.dim, args.dim_mults, args.num_blocks,
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
    evaluate(ema, test[: args.num_samples], args)
    if rank() == 0:
        print(f"pictures, metrics.json and reconstructions.npz are in {out_dir}/")


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
