"""Toy diffusion: a network that removes noise, applied a few times, makes images out of noise.

The page to read before ddpm.py: no schedule of variances, no time input, no derivation. An image x
is spoilt by an amount a between 0 and 1, drawn at random for each,

    x_a = (1 - a) x + a noise,        noise ~ N(0, 1)

and a U-Net f learns to give back x itself, by least squares. It is not told a: it has to see for
itself how bad things are. Asked about pure noise it can only answer with an average of all images.
But a little of that answer among the noise is a hint to go on from, so sampling goes in n steps,
down the amounts 1, 1 - 1/n, ..., 1/n to 0. Two ways to take the i-th, from 0:

    move      x <- x + (f(x) - x) / (n - i)                  the rest of the way is n - i steps long
    renoise   x <- (1 - a) f(x) + a noise, a = 1 - (i+1)/n   the answer, spoilt again, a little less

Moving keeps the noise it began with. In many small steps it follows a flow from noise to the data
(Liu et al. 2022, rectified flow); in five it takes averages for images, which come out smoother,
and what was mistaken for texture early on stays. Fresh noise lets later steps mend earlier ones:
clean garments even from a small network, but each step goes on from an average, so that more steps
do not bring back the variety of the data. How much to move, how much noise to add and how to tell
the network where it stands, so that samples have its statistics, is what ddpm.py is about.

    python toy_diffusion.py                              # train and sample, into out/toy_diffusion/
    python toy_diffusion.py --sampler move --sample-steps 5 --out-dir out/toy_moving
    python toy_diffusion.py --data path/to/photos --steps 10000 --out-dir out/toy_photos

Measured: the first command, on Fashion-MNIST, takes 2 min 28 s on two cores of a Xeon.
"""

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_ddpm.config import flag, make_parser
from fused_ddpm.devices import check_device
from fused_ddpm.files import UserError, ends_in_one_line, occupy, write
from fused_ddpm.images import as_file, choose_data, load_images, to_bytes, to_float, to_unit
from fused_ddpm.pictures import draw_grid, draw_losses

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Config: a field is a flag.


@dataclass
class Settings:
    data: str = flag("auto", "fashion_mnist, mnist, cifar10, shapes, or a folder of images")
    data_dir: str = flag("data", "where downloaded data sets are kept")
    image_size: int = flag(32, "side in pixels", within="[4, 4096]")
    widths: list[int] = flag([16, 64, 128, 192], "channels at full size, half, a quarter, ...")
    steps: int = flag(2400, "optimizer steps")
    batch_size: int = flag(32, "images a step")
    lr: float = flag(2e-3, "peak learning rate of Adam", within="(0, 1]")
    sampler: str = flag("renoise", "see above", ["move", "renoise"])
    sample_steps: int = flag(20, "n, network calls for an image")
    num_samples: int = flag(64, "images to generate")
    seed: int = flag(0, "of everything random", within="[0, 2147483647]")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda, cpu, ...")
    out_dir: str = flag("out/toy_diffusion", "where everything is written")
    overwrite: bool = flag(False, "replace the run in out-dir")


def get_config(argv):
    """Command line -> Settings. Flags that do not fit exit with status 2."""
    parser = make_parser(Settings, "toy_diffusion", __doc__.split("\n")[0])
    config = Settings(**vars(parser.parse_args(argv)))
    n, factor = len(config.widths), 2 ** (len(config.widths) - 1)
    if not n or config.image_size % factor:
        parser.error(f"--image-size {config.image_size}: with {n} widths, a multiple of {factor}")
    if not config.overwrite and Path(config.out_dir, "last.pt").exists():
        parser.error(f"--out-dir {config.out_dir}: holds a run already; --overwrite replaces it")
    return config


# --------------------------------------------------------------------------------------------------
# U-Net: two convolutions a level; on the way up each level adds what it saw on the way down.
# Resampling has no parameters.


def convs(in_channels, channels):
    layers = []
    for width in (in_channels, channels):
        conv = nn.Conv2d(width, channels, 3, padding=1)
        layers += [conv, nn.GroupNorm(1, channels), nn.SiLU()]
    return nn.Sequential(*layers)


class Unet(nn.Module):
    """A spoilt image (B, C, H, W) -> the clean one, as far as it can be told.

    Each width but the last halves H and W.
    """

    def __init__(self, channels, widths):
        super().__init__()
        down = zip([channels, *widths[:-1]], widths, strict=True)
        up = zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True)
        self.down = nn.ModuleList(convs(i, o) for i, o in down)
        self.up = nn.ModuleList(convs(i, o) for i, o in up)
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


# --------------------------------------------------------------------------------------------------
# Diffusion.


def corrupt(x, noise, amount):
    """x, noise: (B, C, H, W); amount: (B,) from 0, nothing, to 1, pure noise."""
    amount = amount.view(-1, 1, 1, 1)
    return (1 - amount) * x + amount * noise


def training_loss(model, x, noise, amount):
    return F.mse_loss(model(corrupt(x, noise, amount)), x)


@torch.no_grad()
def sample(model, noise, sampler, n):
    """Images (B, C, H, W) in [-1, 1] in n steps from noise; what each step saw, and predicted."""
    x, seen, predicted = noise, [], []
    for i in range(n):
        prediction = model(x).clamp(-1, 1)
        seen.append(x)
        predicted.append(prediction)
        if sampler == "move":
            x = x + (prediction - x) / (n - i)
        else:
            amount = torch.full((len(x),), 1 - (i + 1) / n, device=x.device)
            x = corrupt(prediction, torch.randn_like(x), amount)
    return x, seen, predicted


# --------------------------------------------------------------------------------------------------
# Training.


def train(config, model, images, held_out):
    """Train model in place, on images, held_out: uint8 (N, C, H, W). Returns the history."""
    device, history = config.device, {"steps": [], "train_loss": [], "test_loss": []}
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    x_test = to_float(held_out)
    noise_test = torch.randn_like(x_test)  # always the same
    amount_test = torch.linspace(0, 1, len(x_test), device=device)
    total, last = torch.zeros((), device=device), 0
    progress = tqdm(range(1, config.steps + 1), desc="training", unit="step")
    for step in progress:
        index = torch.randint(len(images), (config.batch_size,), device=device)
        x, amount = to_float(images[index]), torch.rand(len(index), device=device)
        loss = training_loss(model, x, torch.randn_like(x), amount)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if step % 50 == 0 or step == config.steps:  # the only times the host waits for the device
            with torch.no_grad():
                test_loss = training_loss(model, x_test, noise_test, amount_test).item()
            train_loss = total.item() / (step - last)
            for key, value in zip(history, (step, train_loss, test_loss), strict=True):
                history[key].append(value)
            total, last = torch.zeros_like(total), step
            progress.set_postfix(train=f"{train_loss:.4f}", test=f"{test_loss:.4f}", refresh=False)
            if not math.isfinite(train_loss):
                cure = "try a smaller --lr"
                raise UserError(f"the loss is not finite by step {step}; {cure}")
    return history


# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_pictures(model, images, out_dir):
    """The three pictures: corruption at rising amounts, inputs beside predictions, five steps."""
    x = to_float(images[:8])
    noise = torch.randn_like(x)
    amounts = torch.linspace(0, 1, 6, device=x.device)
    spoilt = {f"a = {a:.1f}": corrupt(x, noise, a.expand(len(x))) for a in amounts}
    draw(out_dir / "corruption.png", spoilt)
    rows = {"original": x}
    for label, x_a in list(spoilt.items())[1:]:
        rows |= {label: x_a, f"predicted at {label[4:]}": model(x_a)}
    draw(out_dir / "predictions.png", rows)
    last, seen, predicted = sample(model, noise, "move", 5)
    rows = {}
    for i, (x, prediction) in enumerate(zip(seen, predicted, strict=True), 1):
        rows |= {f"step {i}": x, f"predicted in {i}": prediction}
    draw(out_dir / "steps.png", rows | {"sample": last})


def draw(path, rows):
    """A picture with a row of images for each entry of {label: (B, C, H, W) in [-1, 1]}."""
    images = to_bytes(torch.cat(list(rows.values())))
    write(path, draw_grid(images, len(images) // len(rows), list(rows)))


def run(config):
    check_device(config.device)
    out_dir = Path(config.out_dir)
    torch.manual_seed(config.seed)
    config.data = choose_data(config.data, False, config.data_dir)
    images, _ = load_images(config.data, config.data_dir, config.image_size, train=True)
    test, _ = load_images(config.data, config.data_dir, config.image_size, train=False)
    test = test[torch.randperm(len(test))]  # folders come sorted by class
    images, test = images.to(config.device), test.to(config.device)
    model = Unet(images.shape[1], config.widths)
    model = model.to(config.device, memory_format=torch.channels_last)
    size = "x".join(map(str, images.shape[1:]))
    count = sum(p.numel() for p in model.parameters())
    data = f"data {config.data} ({len(images)} images of {size})"
    print(f"toy_diffusion.py: {data}, device {config.device}")
    print(f"{count / 1e6:.2f}M parameters, output in {out_dir}/")
    held = occupy(out_dir)  # before the work, to know that it can be written

    history = train(config, model, images, test[:256])
    about = {"script": "toy_diffusion", "config": asdict(config)}
    write(out_dir / "last.pt", about | {"model": model.state_dict()})
    write(out_dir / "config.json", about["config"])
    write(out_dir / "history.json", history)
    write(out_dir / "loss.png", draw_losses(history))
    draw_pictures(model, test, out_dir)
    noise = torch.randn(config.num_samples, *images.shape[1:], device=config.device)
    parts = [sample(model, x, config.sampler, config.sample_steps)[0] for x in noise.split(256)]
    samples = torch.cat(parts).cpu()
    write(out_dir / "samples.png", draw_grid(to_bytes(samples[:64])))
    write(out_dir / "samples.npy", as_file(to_unit(samples)))
    print(f"test loss {history['test_loss'][-1]:.4f}; pictures and samples.npy are in {out_dir}/")
    if held is not None:
        os.close(held)


def main(argv=None):
    with ends_in_one_line("toy_diffusion", "interrupted, nothing is saved"):
        run(get_config(argv))


if __name__ == "__main__":
    main()
