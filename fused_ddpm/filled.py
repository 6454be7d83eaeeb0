"""The results of fill_images.py: for each file beside each other, and for all of them together.

The results for NAME.EXT are in the same sub-folder as it is, with NAME.json, which says what they
were made from: a run that is cut off goes on where it was.
"""

import csv
import functools
import hashlib
import json
import shutil
from itertools import islice
from types import SimpleNamespace

from fused_ddpm.files import UserError, write
from fused_ddpm.folders import all_below, images_of
from fused_ddpm.pictures import draw_of_any_size, rgb, show_heat, show_seen
from fused_ddpm.pixels import (
    DataError,
    Scale,
    mask_path,
    read_picture,
    with_one_line,
    write_picture,
)

import numpy as np
import torch

LARGEST = 2**24  # pixels of an image: all its draws are in memory
KINDS = ("draws", "std", "quantiles")
IN_SHEET = 10  # images in overview.png


def find(path):
    """[(path, its name from PATH on)] of an image, or of all in a folder and its sub-folders."""
    if path.is_file():
        return [(path, path.name)]
    try:
        files = images_of(all_below(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not files:
        raise UserError(f"{path}: no images in it or its sub-folders")
    return [(file, file.relative_to(path).as_posix()) for file in files]


def check(picture, channels, scale):
    """DataError unless a Picture has a checkpoint's channels, or grey, and values of its kind."""
    path, (height, width, here) = picture.path, picture.values.shape
    if here != channels and (here, channels) != (1, 3):  # grey among colours
        raise DataError(f"{path}: has {here} channels, the checkpoint is for {channels}")
    of_bytes = scale == Scale()
    if (picture.values.dtype == np.uint8) != of_bytes:
        made, here = ("8-bit images", "other values")[:: 1 if of_bytes else -1]
        raise DataError(f"{path}: the checkpoint is for {made}, this has {here}")
    if height * width > LARGEST:
        raise DataError(f"{path}: {height}x{width} pixels are too many; cut it into parts")


def summarise(draws, picture, scale, intervals=None):
    """(the filled image, {kind: array}) of draws (K, H, W, C) in [-1, 1], in a Picture's units.

    The image is their mean, float64 (H, W, C). Arrays, of K > 1: draws, of the picture's type; std;
    quantiles (3, H, W, C) of 5, 50 and 95%. Observed pixels are as they were, their std is 0. With
    intervals, fitted to such draws, quantiles are the mean and so much on either side: those of a
    few draws themselves are poor.
    """
    values, kept = picture.values, picture.observed[..., None]
    mean = draws.mean(0, dtype=np.float64)
    filled = scale.to_values(mean, np.float64)
    if len(draws) == 1:
        return filled, {}
    limits = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
    if intervals:
        width = 2 * intervals.half_width(torch.from_numpy(draws / 2)).numpy()
        limits = np.stack([mean - width, mean, mean + width]).clip(-1, 1)
    kind = np.result_type(values.dtype, np.float32)  # it holds the values
    return filled, {
        "draws": np.where(kept, values, scale.to_values(draws, values.dtype)),
        "std": np.where(kept, 0, draws.std(0, ddof=1) * scale.unit).astype(kind),
        "quantiles": np.where(kept, values, scale.to_values(limits, kind)),
    }


@with_one_line
def made_from(path, name, settings):
    """A hash of all that the results for a file depend on. Raises DataError."""
    key = hashlib.sha256(json.dumps([settings, name]).encode())
    for part in (path, mask_path(path)):
        if part.is_file():
            with open(part, "rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    key.update(block)
        key.update(b"end")
    return key.hexdigest()


def beside(target, kind):
    return target.with_name(f"{target.stem}.{kind}.npy")


def there_already(target, key):
    """Whether an earlier run left the results made from what key is a hash of."""
    try:
        about = json.loads(target.with_suffix(".json").read_text())
        files = [target.with_name(name) for name in about["files"]]
        return about["made_from"] == key and all(file.is_file() for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save_results(target, key, picture, values=None, arrays=None, following=()):
    """All results for a Picture; without values a copy of its file."""
    record = target.with_suffix(".json")
    for old in (record, *(beside(target, kind) for kind in KINDS)):  # none is to stay with the new
        old.unlink(missing_ok=True)
    if values is None:
        save = functools.partial(shutil.copyfile, picture.path)
        write(target, SimpleNamespace(save=save))
        files = [target]
    else:
        files = [write_picture(target, picture, values)]
    for kind, array in (arrays or {}).items():
        files.append(beside(target, kind))
        write(files[-1], array)
    names = [file.name for file in files]
    write(record, {"made_from": key, "files": names, "next": list(following)})


def records(files, out):
    """(path, target, what NAME.json says) of files that are done."""
    for path, name in files:
        target = out / name
        yield path, target, json.loads(target.with_suffix(".json").read_text())


def write_table(files, out):
    """where_next.csv, of all files [(path, name)]."""

    def save(temporary):
        with open(temporary, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "order", "row", "column", "variance_removed", "share"])
            for (_, name), (_, _, about) in zip(files, records(files, out), strict=True):
                table.writerows([name, i, *row] for i, row in enumerate(about["next"], 1))

    write(out / "where_next.csv", SimpleNamespace(save=save))


def write_sheet(files, out, missing, scale):
    """overview.png: the first files as given, filled, and if there are draws, one and their std."""
    columns, names = {}, []
    filled = ((path, target, about["files"]) for path, target, about in records(files, out))

    def unit(values):
        return rgb(torch.from_numpy(scale.to_unit_range(values)).movedim(-1, 0)[None] / 2 + 0.5)

    for path, target, made in islice(filled, IN_SHEET):
        picture = read_picture(path, missing)
        if picture.observed.all():
            continue
        shown = {
            "as given": show_seen(unit(picture.values), torch.from_numpy(picture.observed)),
            "filled": unit(read_picture(target.with_name(made[0])).values),
        }
        if len(made) > 1:
            std = torch.from_numpy(np.load(beside(target, "std"))).float()
            shown["one draw"] = unit(np.load(beside(target, "draws"), mmap_mode="r")[0])
            shown["std"] = show_heat(std.mean(-1)[None, None])
        for heading, image in shown.items():
            columns.setdefault(heading, []).append(image)
        names.append(target.name)
    if names:
        write(out / "overview.png", draw_of_any_size(columns, names))
