"""Fill in the missing pixels of your own images with what sparse_ddpm.py has learnt.

K draws from the posterior are made of each image, given its observed pixels; their mean is the
filled image, their spread says how sure it is. An image of any size goes through the network in
overlapping tiles, but there is one reverse process for all of it: at each step every tile of x_t
gives its x0_hat, these are blended, and one posterior step takes the whole image on.

    python fill_images.py out/sparse_ddpm/last.pt photo.png           # missing where alpha is 0
    python fill_images.py out/sparse_ddpm/last.pt soundings/ --missing -9999 --next 50
    python fill_images.py out/sparse_ddpm/last.pt frames/ --num-draws 0   # the mean alone: one call

For each NAME.EXT, in out/filled: the same with its gaps filled, same type, units and size, observed
pixels bit for bit; NAME.std.npy; NAME.quantiles.npy, (3, H, W, C), of 5, 50 and 95%;
NAME.draws.npy, (K, H, W, C). For all: where_next.csv, the pixels to measure next; overview.png.
"""

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import sparse_ddpm
from fused_ddpm import posterior_step, seeded_normal
from fused_ddpm.checkpoints import load_parts
from fused_ddpm.config import ONCE, flag, make_parser, read_checkpoint
from fused_ddpm.devices import open_device, round_weights
from fused_ddpm.files import UserError, ends_in_one_line, occupied
from fused_ddpm.filled import (
    check,
    find,
    made_from,
    save_results,
    summarise,
    there_already,
    write_sheet,
    write_table,
)
from fused_ddpm.linear import where_next
from fused_ddpm.masks import in_parts
from fused_ddpm.pixels import DataError, Scale, read_picture, upright
from fused_ddpm.runs import mix
from fused_ddpm.tiles import Tiles
from sparse_ddpm import make_model, make_schedule, predict, sampling_table

import numpy as np
import torch
from tqdm import tqdm


@dataclass
class Filling:
    out_dir: str = flag("out/filled", "where the results go")
    missing: float | None = flag(None, "value of missing pixels in files", within="[-inf, inf]")
    num_draws: int | None = flag(None, "the run's by default; 0: a mean only", within="[0, 1000]")
    sample_steps: int | None = flag(None, "network calls for a draw; by default the run's")
    next: int = flag(20, "pixels to measure next, for each image", within="[0, 1000]")
    batch_size: int | None = flag(None, "tiles in a network call; by default the run's")
    seed: int = flag(0, "of the draws", within="[0, 2147483647]")
    device: str = flag("auto", "cuda, cpu, ...; auto takes the GPU if there is one")
    amp: str = flag("auto", "bfloat16 where the hardware multiplies it", ["auto", "on", "off"])


CHANGES = ("num_draws", "sample_steps", "batch_size", "seed")  # of the checkpoint's configuration


# --------------------------------------------------------------------------------------------------
# One image.


def load(path, device="auto", amp="auto", **changes):
    """(model, config, scale) of a checkpoint of sparse_ddpm.py.

    changes: of its configuration. scale: between the units of files and [-1, 1]. Raises UserError.
    The model is for `sample`: where it computes in bfloat16, its weights are so, too.
    """
    checkpoint = read_checkpoint(sparse_ddpm.Config, Path(path), "sparse_ddpm")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    changes |= ONCE | {"device": device, "amp": amp}
    config = sparse_ddpm.Config(**checkpoint["config"] | changes)
    if config.sample_steps > config.num_timesteps:
        raise UserError(f"--sample-steps {config.sample_steps}: at most {config.num_timesteps}")
    config.bfloat16 = open_device(device, amp)
    facts = checkpoint["facts"]
    model = make_model(facts["shape"], config, len(facts["class_names"]))
    model.requires_grad_(False).eval()
    try:
        load_parts({"ema": model}, checkpoint)
    except ValueError as error:
        raise UserError(f"{path}: of another version of the network; train anew") from error
    if config.bfloat16:
        round_weights(model)
    return model, config, Scale(*(facts.get("scale") or []))


@torch.no_grad()
def sample(model, image, observed, seeds, config):
    """x_t (K, C, H, W) after each reverse step, in the end K draws of the image.

    image: (C, H, W) in [-1, 1], of any size, read where observed, bool (H, W), is set. seeds: int64
    (K,), one a draw. After --observed-only the state is on some of the unseen pixels, never on all:
    each draw's are cut into parts at random, and each part is predicted as if there were no others.
    """
    tiles = Tiles(~observed, config.image_size)
    cond, seen = tiles.pad(torch.where(observed, image, 0)), tiles.pad(observed)[None]
    unseen = tiles.pad(~observed)[None]  # and in the image

    def cut(x):
        return torch.stack([x[(..., *at)] for at in tiles.at]).split(config.batch_size)

    batches = zip(cut(cond), cut(seen), strict=True)
    context = zip(*[model.fill(x, mask, mask) for x, mask in batches], strict=True)
    context = [torch.cat(x) for x in context]

    parts, part_of = 1, torch.zeros(len(seeds), *seen.shape, dtype=torch.int16, device=seen.device)
    if config.observed_only:
        around = torch.cat(cut(unseen)).float().mean((1, 2, 3))
        parts = model.fill.parts(((around**2).sum() / around.sum()).item())
        for of_draw, seed in zip(part_of, seeds, strict=True):
            of_parts = in_parts(seed[None], ~unseen[None], parts, 0.0, config)
            masks = torch.cat([state for state, _ in of_parts])  # (parts, 1, H, W)
            of_draw.copy_(torch.where(unseen, masks.int().argmax(0), -1))

    timesteps, coefficients = sampling_table(config)
    coefficients[:, :2] = torch.tensor([0.0, 1.0])  # predict gives x0_hat
    alphas_cumprod = make_schedule(config.schedule, config.num_timesteps).to(config.device)
    jobs = list(product(range(len(seeds)), range(parts), range(len(tiles.at))))
    x_t = seeded_normal(seeds, cond.shape)
    several = parts > 1 and config.sample_steps > 1 and len(model.fill.covariance)
    for i, at in enumerate(tiles.at if several else ()):  # in a tile's middle parts fit together
        place, mine = (..., *at), tiles.nearest[at] == i
        there, shape = seen[place], x_t[place].shape[1:]
        white = seeded_normal(seeds, shape, step=i, steps=len(tiles.at))
        for state in (mine & (part_of[place] == part) for part in range(parts)):
            if state.any():
                coupled = model.fill.couple(white, there.expand_as(state), state)
                x_t[place] = torch.where(state, coupled, x_t[place])
    for step in range(config.sample_steps):
        total = torch.zeros_like(x_t)
        for first in range(0, len(jobs), config.batch_size):
            draw, part, tile = zip(*jobs[first : first + config.batch_size], strict=True)
            places = [(k, slice(None), *tiles.at[i]) for k, i in zip(draw, tile, strict=True)]
            number = torch.tensor(part, device=seen.device).view(-1, 1, 1, 1)
            state = torch.stack([part_of[place] for place in places]) == number
            x = torch.stack([x_t[place] for place in places])
            t = timesteps[step].expand(len(places))
            given, mask, _, *guess = (x[list(tile)] for x in context)
            x0_hat, _ = predict(model, x, t, (given, mask, state, *guess), alphas_cumprod, config)
            for place, one in zip(places, tiles.window * (state * x0_hat), strict=True):
                total[place] += one
        x0_hat = torch.where(seen, cond, total / tiles.weight)
        x_t = posterior_step(x_t, x0_hat, coefficients, step, seeds)
        yield tiles.trim(x_t)


def draw(model, picture, config, scale, name=None, tick=lambda: None):
    """K draws of a Picture, (K, H, W, C), float32 in [-1, 1], in the grid of its file.

    They are a function of the picture, of name, by default its file's, and of config.seed. tick is
    called at each step. Raises DataError where the checkpoint is for other images.
    """
    channels = len(model.fill.mean)
    check(picture, channels, scale)
    values = upright(picture.values, picture.orientation)
    observed = torch.from_numpy(upright(picture.observed, picture.orientation).copy())
    image = torch.from_numpy(scale.to_unit_range(values)).movedim(-1, 0).expand(channels, -1, -1)
    text = int.from_bytes((name or picture.path.name).encode(), "big")
    seeds = [mix(config.seed, k, text) for k in range(config.num_draws)]
    inputs = (x.to(config.device) for x in (image, observed, torch.tensor(seeds)))
    for x_t in sample(model, *inputs, config):
        tick()
    back = {6: 8, 8: 6}.get(picture.orientation, picture.orientation)
    x_t = x_t if values.shape[-1] == channels else x_t.mean(1, keepdim=True)  # grey stays grey
    draws = x_t.movedim(1, -1).cpu().numpy()
    return np.stack([upright(x, back) for x in draws])


# --------------------------------------------------------------------------------------------------
# Files.


def fill_file(picture, name, loaded, flags, tick):
    """(values, {kind: array}, pixels to measure next) of a Picture, in its units."""
    model, config, scale = loaded
    draws = draw(model, picture, config, scale, name, tick)
    fitted = model.intervals if model.intervals.fit_to(config) else None
    values, arrays = summarise(draws, picture, scale, fitted)
    following = where_next(draws * scale.unit, picture.observed, flags.next) if arrays else []
    return values, arrays, following


def fill_all(files, out, loaded, flags, settings):
    """Fill files, [(path, name)]: (those that are done, how many in which way, what went wrong)."""
    _, config, _ = loaded
    done, how, failed, stems = [], Counter(), [], {out / "overview"}
    low, high, warned = config.sparsity[0], config.sparsity[-1], False
    if config.observed_only:  # of what there was a quarter at least was kept to be scored
        high /= 0.75
    bar = tqdm(total=len(files) * config.sample_steps, desc="filling", unit="step")
    for i, (path, name) in enumerate(files, 1):
        target = out / name
        try:
            if target.with_suffix("") in stems:
                raise DataError(f"{path}: its results would replace those of another; rename it")
            stems.add(target.with_suffix(""))
            key = made_from(path, name, settings)
            if there_already(target, key):
                how["from an earlier run"] += 1
            else:
                picture = read_picture(path, flags.missing)
                seen, results = picture.observed.mean(), ()
                if seen < 1 and not (warned or 0.8 * low <= seen <= 1.25 * high):
                    warned, learnt = True, " to ".join(f"{x:.0%}" for x in config.sparsity)
                    bar.write(f"warning: {name} shows {seen:.0%} of its pixels, the checkpoint has "
                              f"learnt from {learnt} by --sparsity; others may, too")  # fmt: skip
                if seen < 1:
                    results = fill_file(picture, name, loaded, flags, bar.update)
                save_results(target, key, picture, *results)
                how["filled" if seen < 1 else "whole, copied"] += 1
            done.append((path, name))
        except DataError as error:
            failed.append(str(error))
        bar.update(i * config.sample_steps - bar.n)
    bar.close()
    return done, how, failed


# --------------------------------------------------------------------------------------------------


def read_flags(argv):
    """(checkpoint, path, flags, changes to the checkpoint's configuration)."""
    parser = make_parser(Filling, "fill_images", __doc__.split("\n")[0])
    parser.usage = "%(prog)s CHECKPOINT PATH [flags]"
    parser.add_argument("checkpoint", type=Path, help="of sparse_ddpm.py")
    parser.add_argument("path", type=Path, help="an image, or a folder of them")
    given = vars(parser.parse_args(argv))
    checkpoint, path = given.pop("checkpoint"), given.pop("path")
    flags = Filling(**given)
    out, folder = Path(flags.out_dir).resolve(), path.resolve()
    if out == folder.parent or (path.is_dir() and folder in (out, *out.parents)):
        parser.error(f"--out-dir {flags.out_dir}: the images are in there; name another folder")
    changes = {name: given[name] for name in CHANGES if name in given}
    if flags.num_draws == 0:
        changes |= {"num_draws": 1, "sample_steps": 1}
    return checkpoint, path, flags, changes


def run(argv):
    """(how many files could not be filled, of how many)."""
    checkpoint, path, flags, changes = read_flags(argv)
    files, out = find(path), Path(flags.out_dir)
    loaded = model, config, scale = load(checkpoint, flags.device, flags.amp, **changes)
    draws = f"{config.num_draws} draws of {config.sample_steps} steps"
    limits = "learnt on held-out images" if model.intervals.fit_to(config) else "of the draws"
    what = f"{draws}, quantiles {limits}" if flags.num_draws != 0 else "the mean by one call"
    print(f"fill_images.py: {len(files)} images, {what}, device {config.device}")

    settings = [getattr(config, name) for name in CHANGES if name != "batch_size"]
    settings += [flags.num_draws == 0, flags.missing, flags.next]
    settings.append(hashlib.sha256(checkpoint.read_bytes()).hexdigest())
    with occupied(out):
        done, how, failed = fill_all(files, out, loaded, flags, settings)
        if done:
            write_table(done, out)
            write_sheet(done, out, flags.missing, scale)
            print(", ".join(f"{n} {way}" for way, n in how.items()) + f"; in {out}/")
    for line in failed:
        print(line, file=sys.stderr)
    return len(failed), len(files)


def main(argv=None):
    with ends_in_one_line("fill_images", "interrupted; the same command goes on"):
        failed, files = run(argv)
    if failed:
        sys.exit(f"fill_images.py: error: {failed} of {files} images are not filled, see above")


if __name__ == "__main__":
    main()
