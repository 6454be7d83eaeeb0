"""The pictures of docs/diffusion.md, drawn from a checkpoint of ddpm.py.

    python docs/figures.py out/ddpm/last.pt                            # into assets/
    python docs/figures.py out/ddpm/last.pt --out-dir out/figures

schedules.png, time_embedding.png, forward.png, reverse.png, reverse.gif, variances.png. The last
one takes most of the time: ten images by three times T steps, and three times T/20.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ddpm  # noqa: E402
from fused_ddpm import posterior_step, seeded_normal  # noqa: E402
from fused_ddpm.checkpoints import load_checkpoint  # noqa: E402
from fused_ddpm.files import UserError, write  # noqa: E402
from fused_ddpm.images import Data, to_bytes, to_float  # noqa: E402
from fused_ddpm.pictures import draw_columns, draw_grid, tile  # noqa: E402
from fused_ddpm.unet import TimeEmbedding, Unet  # noqa: E402


def evenly(last, count):
    """Up to `count` whole numbers from 0 to `last`, evenly spaced, without repetition."""
    places = torch.linspace(0, last, min(count, last + 1), dtype=torch.float64)
    return places.round().long().tolist()


def draw_schedules(T):
    """beta and alphas_cumprod of the three schedules."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("linear", "cosine", "sigmoid"):
        alphas_cumprod = ddpm.make_schedule(name, T)
        before = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
        left.plot(1 - alphas_cumprod / before, label=name)
        right.plot(alphas_cumprod, label=f"{name}, ends at {alphas_cumprod[-1]:.1e}")
    left.set(xlabel="t", title="beta: variance added by a step", ylim=(0, 30 / T))
    right.set(xlabel="t", title="alphas_cumprod: variance left of the image")
    left.legend()
    right.legend()
    return figure


def draw_time_embedding(T):
    """The 128 features that the network is told t by."""
    angle = torch.arange(T)[:, None] * TimeEmbedding(1).frequencies
    features = torch.cat([angle.sin(), angle.cos()], dim=1).T
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(features.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu")
    title = "time embedding: 64 sines above 64 cosines, from fast to slow"
    axis.set(xlabel="t", ylabel="feature", title=title)
    return figure


def draw_forward(images, config):
    """Images uint8 (N, C, H, W), more and more noised: a row each."""
    x_start, index = to_float(images), torch.arange(len(images), device=images.device)
    noise = seeded_normal(index, images.shape[1:])
    alphas_cumprod = ddpm.make_schedule(config.schedule, config.num_timesteps).to(images.device)
    columns = {}
    for t in evenly(config.num_timesteps - 1, 10):
        x_t = ddpm.q_sample(x_start, torch.full_like(index, t), noise, alphas_cumprod)
        columns[f"t = {t}"] = to_bytes(x_t)
    return draw_columns(columns)


def draw_reverse(model, shape, config):
    """Nine images on their way out of noise: six of them as a picture, and all as a film."""
    seeds = (config.seed << 32) + torch.arange(9, device=config.device)
    steps = ddpm.make_sampler(model, shape, config)(seeds)
    frames = [to_bytes(x) for x in (seeded_normal(seeds, shape), *steps)]
    columns = {f"{i} steps": frames[i][:6] for i in evenly(len(frames) - 1, 10)}
    film = [tile(frames[i], 3) for i in evenly(len(frames) - 1, 40)]
    return draw_columns(columns), film


@torch.no_grad()
def sample_without_noise(model, seeds, shape, config):
    """ddpm.py's sampler with s = 0: the means of DDPM's steps and nothing else."""
    timesteps, coefficients = ddpm.sampling_table(config)
    coefficients[:, 4] = 0
    x_t = seeded_normal(seeds, shape)
    for step in range(config.sample_steps):
        out = ddpm.predict(model, x_t, timesteps[step].expand(len(x_t)), config)
        x_t = posterior_step(x_t, out, coefficients, step, seeds)
    return x_t


def draw_variances(model, shape, config):
    """The same ten seeds under three reverse variances and DDIM, with many steps and few."""
    seeds, rows = torch.arange(10, device=config.device), {}
    for steps in (config.num_timesteps, max(config.num_timesteps // 20, 1)):
        for variance in ("small", "large", "none"):
            kind = "small" if variance == "none" else variance
            changed = replace(config, sampler="ddpm", variance=kind, sample_steps=steps)
            if variance == "none":
                x_t = sample_without_noise(model, seeds, shape, changed)
            else:
                *_, x_t = ddpm.make_sampler(model, shape, changed)(seeds)
            rows[f"DDPM, {variance}, {steps}"] = to_bytes(x_t)
    changed = replace(config, sampler="ddim", eta=0.0, sample_steps=steps)
    *_, x_t = ddpm.make_sampler(model, shape, changed)(seeds)
    rows[f"DDIM, eta 0, {steps}"] = to_bytes(x_t)
    return draw_grid(torch.cat(list(rows.values())), 10, list(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="last.pt of ddpm.py")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "assets", help="(assets)")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint, "ddpm")
    config = ddpm.Config(**checkpoint["config"])
    config.device = "cuda" if torch.cuda.is_available() else "cpu"
    data = Data(config, checkpoint["facts"])
    model = Unet(data.shape[0], data.shape[0], config).eval()
    model.load_state_dict(checkpoint["ema"])
    model = model.to(config.device, memory_format=torch.channels_last)

    write(args.out_dir / "schedules.png", draw_schedules(config.num_timesteps))
    write(args.out_dir / "time_embedding.png", draw_time_embedding(config.num_timesteps))
    write(args.out_dir / "forward.png", draw_forward(data.test_part(6).images, config))
    picture, film = draw_reverse(model, data.shape, config)
    write(args.out_dir / "reverse.png", picture)
    write(args.out_dir / "reverse.gif", film)
    write(args.out_dir / "variances.png", draw_variances(model, data.shape, config))
    print(f"six pictures are in {args.out_dir}/")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"figures.py: error: {error}")
