"""Toy diffusion: a network that removes noise, applied a few times, makes images out of nothing but noise.

The page to read before ddpm.py: no schedule of variances, no time input, no derivation. An image x is spoilt by an amount a
between 0 and 1, drawn at random for each,

    x_a = (1 - a) x + a noise,        noise ~ N(0, 1)

and a U-Net f learns to give back x itself, by least squares. It is not told a: it has to see for itself how bad things are.
Asked about pure noise it can only answer with an average of all images. But a little of that answer among the noise is a hint
to go on from, so sampling goes in n steps, down the amounts 1, 1 - 1/n, ..., 1/n to 0. Two ways to take the i-th, from 0:

    move      x <- x + (f(x) - x) / (n - i)                                the rest of the way is n - i steps long
    renoise   x <- (1 - a) f(x) + a noise,   a = 1 - (i + 1) / n           the answer, spoilt again, a little less

Moving keeps the noise it began with. In many small steps it follows a flow that leads from noise to the data (Liu et al.
2022, rectified flow); in five it takes averages for images, which come out smoother than the data, and what was mistaken for
texture early on stays. Fresh noise lets later steps mend earlier ones, so garments come out clean even from a small network;
but it goes on from averages however many steps there are. How much to move, how much noise to add and how to tell the network
where it stands, so that samples have the statistics of the data, is what ddpm.py is about.

    python toy_diffusion.py                              # train and sample, into out/toy_diffusion/
    python toy_diffusion.py --sampler move --sample-steps 5 --out-dir out/toy_moving
    python toy_diffusion.py --data path/to/photos --steps 10000

Measured: the first command, on Fashion-MNIST, takes 2 min 40 s on two cores of a 2.6 GHz Xeon (torch 2.14.1).
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from images import DataError, choose_data, load_images

SCRIPT = Path(__file__).stem

# ---------------------------------------------------------------------------------------------------------------------
# Config.


def get_config(argv):
    """Command line -> namespace. Flags that do not fit exit with status 2."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", "%(prog)s [flags]", __doc__.split("\n")[0], formatter_class=formatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="auto", help="fashion_mnist, mnist, cifar10, shapes, or a folder of images")
    data.add_argument("--data-dir", default="data", help="where downloaded data sets are kept")
    data.add_argument("--image-size", type=int, default=32, help="side in pixels")
    training = parser.add_argument_group("model and training")
    training.add_argument("--widths", type=int, nargs="+", default=[16, 64, 128, 192], help="channels at full size, half...")
    training.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    training.add_argument("--batch-size", type=int, default=32, help="images a step")
    training.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of Adam")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sampler", choices=["move", "renoise"], default="renoise", help="see above")
    sampling.add_argument("--sample-steps", type=int, default=20, help="n, network calls for an image")
    sampling.add_argument("--num-samples", type=int, default=64, help="images to generate")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="of everything random")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, ...")
    run.add_argument("--out-dir", default=f"out/{SCRIPT}", help="where everything is written")
    run.add_argument("--overwrite", action="store_true", help="replace the run in out-dir")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "lr", "sample_steps", "num_samples"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be positive")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: must lie in [0, 2^63)")
    if min(args.widths) < 1:
        parser.error(f"--widths {args.widths}: must be positive")
    factor = 2 ** (len(args.widths) - 1)
    if args.image_size < 4 or args.image_size % factor:
        parser.error(f"--image-size {args.image_size}: with {len(args.widths)} widths, a multiple of {factor}")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if not args.overwrite and Path(args.out_dir, "last.pt").exists():
        parser.error(f"--out-dir {args.out_dir}: holds a run already; --overwrite replaces it")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# U-Net: two convolutions a level; on the way up each level adds what it saw on the way down. Resampling has no parameters.


def convs(in_channels, channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1), nn.GroupNorm(1, channels), nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(1, channels), nn.SiLU(),
    )  # fmt: skip


class Unet(nn.Module):
    """A spoilt image (B, C, H, W) -> the clean one, as far as it can be told. Each width but the last halves H and W."""

    def __init__(self, channels, widths):
        super().__init__()
        self.down = nn.ModuleList(convs(i, o) for i, o in zip([channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(convs(i, o) for i, o in zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True))
        self.out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x):
        skips = []
        for convs in self.down:
            x = convs(F.avg_pool2d(x, 2) if skips else x)
            skips.append(x)
        x = self.up[0](skips.pop())
        for convs in self.up[1:]:
            x = convs(F.interpolate(x, scale_factor=2, mode="bilinear") + skips.pop())
        return self.out(x)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion.


def corrupt(x, noise, amount):
    """x, noise: (B, C, H, W); amount: (B,) from 0, nothing, to 1, pure noise."""
    amount = amount.view(-1, 1, 1, 1)
    return (1 - amount) * x + amount * noise


def training_loss(model, x, noise, amount):
    return F.mse_loss(model(corrupt(x, noise, amount)), x)


@torch.no_grad()
def sample(model, noise, sampler, n):
    """Images (B, C, H, W) in [-1, 1] in n steps from noise; also the lists of what each step saw and predicted."""
    x, seen, predicted = noise, [], []
    for i in range(n):
        prediction = model(x).clamp(-1, 1)
        seen.append(x)
        predicted.append(prediction)
        if sampler == "move":
            x = x + (prediction - x) / (n - i)
        else:
            x = corrupt(prediction, torch.randn_like(x), torch.full((len(x),), 1 - (i + 1) / n, device=x.device))
    return x, seen, predicted


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def scaled(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def train(args, model, images, held_out):
    """Train model in place, on images, held_out: uint8 (N, C, H, W). Returns {"steps", "train_loss", "test_loss"}, lists."""
    device, history = args.device, {"steps": [], "train_loss": [], "test_loss": []}
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    x_test = scaled(held_out)
    noise_test, amount_test = torch.randn_like(x_test), torch.linspace(0, 1, len(x_test), device=device)  # always the same
    total, last = torch.zeros((), device=device), 0
    progress = tqdm(range(1, args.steps + 1), desc="training", unit="step")
    for step in progress:
        x = scaled(images[torch.randint(len(images), (args.batch_size,), device=device)])
        loss = training_loss(model, x, torch.randn_like(x), torch.rand(len(x), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % 50 == 0 or step == args.steps:  # the only times the host waits for the device
            with torch.no_grad():
                test_loss = training_loss(model, x_test, noise_test, amount_test).item()
            for key, value in zip(history, (step, total.item() / (step - last), test_loss), strict=True):
                history[key].append(value)
            total, last = torch.zeros_like(total), step
            progress.set_postfix(train=f"{history['train_loss'][-1]:.4f}", test=f"{test_loss:.4f}", refresh=False)
            if not math.isfinite(history["train_loss"][-1]):
                sys.exit(f"{SCRIPT}.py: error: the loss is not finite by step {step}; try a smaller --lr")
    return history


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


def draw_grid(path, rows, labels=None):
    """A PNG with one row of images for each tensor (B, C, H, W) in rows, values in [-1, 1]."""
    rows = [F.pad(row.cpu().expand(-1, 3, -1, -1), (1, 1, 1, 1), value=1.0) for row in rows]
    sheet = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1.0)  # the last row may be a short one
    n, k, _, h, w = sheet.shape
    sheet = (sheet.clamp(-1, 1) / 2 + 0.5).permute(0, 3, 1, 4, 2).reshape(n * h, k * w, 3)
    figure = Figure(figsize=(0.9 * k + 1.2 * bool(labels), 0.9 * n), layout="constrained")
    axis = figure.subplots()
    axis.imshow(sheet.numpy(), interpolation="nearest")
    axis.set_yticks([(i + 0.5) * h for i in range(n)] if labels else [], labels)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_pictures(model, images, args):
    """The three pictures: corruption at rising amounts, inputs beside predictions, five steps of `move`."""
    out_dir = Path(args.out_dir)
    x = scaled(images[:8])
    noise = torch.randn_like(x)
    amounts = torch.linspace(0, 1, 6, device=args.device)
    spoilt = [corrupt(x, noise, a.expand(len(x))) for a in amounts]
    labels = [f"a = {a:.1f}" for a in amounts]
    draw_grid(out_dir / "corruption.png", spoilt, labels)
    with torch.no_grad():
        rows = [row for x_a in spoilt[1:] for row in (x_a, model(x_a))]
    labels = [name for label in labels[1:] for name in (label, "predicted")]
    draw_grid(out_dir / "predictions.png", [x, *rows], ["original", *labels])
    last, seen, predicted = sample(model, noise, "move", 5)
    rows = [row for pair in zip(seen, predicted, strict=True) for row in pair]
    labels = [name for i in range(5) for name in (f"step {i + 1}", "predicted")]
    draw_grid(out_dir / "steps.png", [*rows, last], [*labels, "sample"])


def draw_losses(path, history):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(history["steps"], history["train_loss"], label="train")
    axis.plot(history["steps"], history["test_loss"], label="test")
    axis.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------------------------------------


def run(args):
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    args.data = choose_data(args.data, False, args.data_dir)
    images = load_images(args.data, args.data_dir, args.image_size, train=True)[0]
    test = load_images(args.data, args.data_dir, args.image_size, train=False)[0]
    test = test[torch.randperm(len(test))]  # folders come sorted by class
    images, test = images.to(args.device), test.to(args.device)  # they are few enough to stay there
    model = Unet(images.shape[1], args.widths).to(args.device, memory_format=torch.channels_last)
    size = "x".join(map(str, images.shape[1:]))
    print(f"{SCRIPT}.py: data {args.data} ({len(images)} images of {size}), device {args.device}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, output in {out_dir}/")

    history = train(args, model, images, test[:256])
    torch.save({"script": SCRIPT, "config": vars(args), "model": model.state_dict()}, out_dir / "last.pt")
    (out_dir / "history.json").write_text(json.dumps(history))
    draw_losses(out_dir / "loss.png", history)
    draw_pictures(model, test, args)
    noise = torch.randn(args.num_samples, *images.shape[1:], device=args.device)
    samples = torch.cat([sample(model, part, args.sampler, args.sample_steps)[0] for part in noise.split(256)]).cpu()
    draw_grid(out_dir / "samples.png", samples[:64].split(8))
    pixels = (samples * 127.5 + 127.5).round().clamp(0, 255).byte()
    np.save(out_dir / "samples.npy", pixels.permute(0, 2, 3, 1).numpy())
    print(f"test loss {history['test_loss'][-1]:.4f}; pictures and samples.npy ({len(samples)} images) are in {out_dir}/")


def main(argv=None):
    try:
        run(get_config(argv))
    except (DataError, OSError) as error:
        sys.exit(f"{SCRIPT}.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{SCRIPT}.py: interrupted, nothing is saved")


if __name__ == "__main__":
    main()
