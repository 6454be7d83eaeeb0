"""A folder of image files as training data: whole images scaled, incomplete ones cut into tiles.

Complete 8-bit images are cropped to the central square and resized. Where a pixel is missing that
would mix what is seen with what is not, so all images of such a folder, and of one whose values are
not bytes, are cut into tiles at their own resolution.
"""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fused_ddpm.pixels import (
    ARRAYS,
    MASK,
    DataError,
    Scale,
    open_image,
    read_header,
    read_picture,
    upright,
    with_one_line,
)

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

HELD_OUT = 10  # the last tenth of each class is the test part
MANY_TILES = 20_000  # from here on they do not overlap
MANY_VALUES = 10_000_000  # enough to find their quantiles


@dataclass
class Part:
    """Images to train on or to test with; part[index] picks some.

    images: uint8, or float32 in [-1, 1] (N, C, H, W); labels: int64 (N,), -1 without classes.
    observed: bool (N, 1, H, W), or None if nothing is missing; images are 0 outside it. scale: of
    float32, from the files' units. validation: how many at the front are to be held out, sharing no
    pixel with the others; 0: any are as good.
    """

    images: torch.Tensor
    labels: torch.Tensor
    observed: torch.Tensor | None = None
    scale: Scale | None = None
    validation: int = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self._each(lambda x: x[index])

    def to(self, device):
        return self._each(lambda x: x.to(device))

    def _each(self, change):
        observed = None if self.observed is None else change(self.observed)
        return Part(change(self.images), change(self.labels), observed, self.scale)


def load_folder(folder, image_size, train, missing=None, crop=False, scale=None):
    """The training or the test Part of a folder: the test part is the last tenth of each class.

    missing: a value that stands for missing pixels. crop: tiles, even of complete 8-bit images.
    scale: of a checkpoint; by default it is found from the training part. Raises DataError.
    """
    files, _ = list_folder(folder)
    _, channels, plain = survey(folder, missing)
    if crop or not plain:
        return load_tiles(folder, image_size, train, missing, scale)
    if len(files) < 3:
        raise DataError(f"--data {folder}: {len(files)} images in it; at least 3 are needed")
    chosen = [files[i] for i in split([label for _, label in files])[train]]
    images = read_all(lambda item: read_whole(item[0], channels == 1, image_size), chosen)
    return Part(torch.stack(images), torch.tensor([label for _, label in chosen]))


@functools.cache
def list_folder(folder):
    """([(path, label)], names of the classes), in order of names: of sub-folders, or no classes."""
    try:
        here = sorted(folder.iterdir())
        direct = images_of(here)
        classes = {p.name: images_of(all_below(p)) for p in here if p.is_dir()}
    except OSError as error:
        raise DataError(f"--data {folder}: cannot be read ({error})") from error
    classes = {name: paths for name, paths in classes.items() if paths}
    if direct and classes:
        two = "holds images both directly and in sub-folders; keep one of the two"
        raise DataError(f"--data {folder}: {two}")
    files = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    files = files or [(path, -1) for path in direct]
    if not files:
        none = "no images in it or its sub-folders; at least 3 are needed"
        raise DataError(f"--data {folder}: {none}")
    return files, list(classes)


def images_of(paths):
    """Those that are files of images, sorted; masks are not."""
    endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    endings.update(ARRAYS)
    named = (p for p in paths if p.suffix.lower() in endings and not p.name.endswith(MASK))
    return sorted(p for p in named if p.is_file())


def all_below(folder):
    """Every path below, as rglob has them; but what cannot be read is an error."""

    def stop(error):
        raise error

    for at, _, names in os.walk(folder, onerror=stop):
        yield from (Path(at, name) for name in names)


@functools.cache
def survey(folder, missing):
    """([Header] of the files, channels of all, whether they are complete images of 8 bits)."""
    paths = [path for path, _ in list_folder(folder)[0]]
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda path: read_header(path, missing), paths))
        channels = common_channels(folder, paths, headers)
        plain = all(header.dtype == np.uint8 for header in headers)
        if not plain:
            refuse_bytes_among_others(folder, paths, headers)
        if plain and not any(path.suffix.lower() in ARRAYS for path in paths):
            doubtful = [path for path, h in zip(paths, headers, strict=True) if not h.whole]
            looked = pool.map(lambda path: read_picture(path, missing).observed.all(), doubtful)
            plain = all(looked)  # as far as the first with a hole
            pool.shutdown(cancel_futures=True)
        else:
            plain = False
    return headers, channels, plain


def common_channels(folder, paths, headers):
    """Of all files; 3 where some are greyscale and some have 3."""
    by_count = {header.channels: path for path, header in zip(paths, headers, strict=True)}
    if len(by_count) > 1 and by_count.keys() != {1, 3}:
        counts = ", ".join(f"{path.name} has {n}" for n, path in sorted(by_count.items()))
        raise DataError(f"--data {folder}: all must have as many channels, but {counts}")
    return max(by_count)


def refuse_bytes_among_others(folder, paths, headers):
    for path, header in zip(paths, headers, strict=True):
        if header.dtype == np.uint8:
            other = next(p for p, h in zip(paths, headers, strict=True) if h.dtype != np.uint8)
            two = f"{path.name} has 8 bits and {other.name} has not"
            raise DataError(f"--data {folder}: {two}; bring them to one scale, or keep one kind")


def split(labels):
    """{True: indices to train on, False: to test with}, of labels in order."""
    parts = {True: [], False: []}
    for _, group in itertools.groupby(range(len(labels)), key=labels.__getitem__):
        group = list(group)
        cut = len(group) - len(group) // HELD_OUT
        parts[True] += group[:cut]
        parts[False] += group[cut:]
    if labels and not parts[False]:  # a handful of images
        parts[False] = [parts[True].pop()]
    return parts


def read_all(read, items, at_once=8):
    """[read(item)], some at a time, with a progress bar if they are many."""
    few = len(items) < 2000
    with ThreadPoolExecutor(at_once) as pool:
        return list(tqdm(pool.map(read, items), total=len(items), desc="images", disable=few))


@with_one_line
def read_whole(path, grey, size):
    with open_image(path) as image:
        image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    array = torch.from_numpy(np.array(image))
    return array[None] if grey else array.permute(2, 0, 1)


# -- tiles -----------------------------------------------------------------------------------------


class Tile(NamedTuple):
    file: int  # its number in list_folder
    y: int
    x: int
    complete: bool
    some: np.ndarray | None  # of its values, for the scale


def load_tiles(folder, size, train, missing, scale):
    """See load_folder."""
    files, _ = list_folder(folder)
    headers, channels, _ = survey(folder, missing)
    places, own_scale, incomplete, validation = plan_tiles(folder, size, missing)
    scale = own_scale and (scale or own_scale)
    places = places[train]
    shape = len(places), channels, size, size
    images = torch.empty(shape, dtype=torch.float32 if scale else torch.uint8)
    observed = torch.empty(len(places), 1, size, size, dtype=torch.bool)

    def cut(numbers):  # of the tiles of one file
        path, _ = files[places[numbers[0]][0]]
        values, seen = read_padded(path, size, missing)
        for n in numbers:
            at = square(*places[n][1:], size)
            tile = scale.to_unit_range(values[at]) if scale else values[at]
            tile = np.where(seen[at][..., None], tile, tile.dtype.type(0))
            images[n] = torch.from_numpy(tile).permute(2, 0, 1)  # grey among colours: repeated
            observed[n, 0] = torch.from_numpy(seen[at].copy())

    groups = itertools.groupby(range(len(places)), key=lambda n: places[n][0])
    read_all(cut, [list(numbers) for _, numbers in groups], at_once(headers))
    labels = torch.tensor([files[i][1] for i, _, _ in places])
    held_out = validation if train else 0
    return Part(images, labels, observed if incomplete else None, scale, held_out)


@functools.cache
def plan_tiles(folder, size, missing):
    """({train: [(file, y, x)]}, the Scale or None for bytes, whether pixels are missing, and how
    many of those to train on are for validation; see Part)."""
    files, _ = list_folder(folder)
    headers, _, _ = survey(folder, missing)
    deep = headers[0].dtype != np.uint8
    half, sizes = max(size // 2, 1), [header.size for header in headers]
    step = half if count_tiles(sizes, size, half) < MANY_TILES else size
    thin = count_tiles(sizes, size, step) * size**2 // MANY_VALUES + 1

    def look(i):
        """The tiles of file i that are of use."""
        values, observed = read_padded(files[i][0], size, missing)
        found = []
        for y, x in itertools.product(*(starts(n, size, step) for n in observed.shape)):
            at = square(y, x, size)
            seen = np.count_nonzero(observed[at])
            some = values[at][observed[at]][::thin].copy() if deep else None
            if seen >= 2:  # one to show, one to ask for
                found.append(Tile(i, y, x, seen == size**2, some))
        return found

    found = read_all(look, range(len(files)), at_once(headers))
    tiles = list(itertools.chain.from_iterable(found))
    parts = split_tiles(tiles, files, size)
    validation = split_tiles(parts[True], files, size)
    enough = len(validation[True]) > max(3 * HELD_OUT, len(parts[True]) // 2)
    if enough:
        parts[True] = validation[False] + validation[True]
    if len(parts[True]) < 2:
        few = f"{len(parts[True])} tiles of {size}x{size} that share no pixel with a test tile"
        cure = "at least 2 are needed: more or larger images, or a smaller --image-size"
        raise DataError(f"--data {folder}: gives {few}; {cure}")
    scale = Scale.of(np.concatenate([tile.some.ravel() for tile in parts[True]])) if deep else None
    places = {train: [tile[:3] for tile in part] for train, part in parts.items()}
    complete = all(tile.complete for tile in tiles)
    return places, scale, not complete, len(validation[False]) if enough else 0


def split_tiles(tiles, files, size):
    """As split; to train on are those that share no pixel with the others."""
    parts = split([files[tile.file][1] for tile in tiles])
    parts = {train: [tiles[n] for n in numbers] for train, numbers in parts.items()}
    return {True: apart(parts[True], parts[False], size), False: parts[False]}


def apart(tiles, test, size):
    """Those of tiles that share no pixel with one of the test part."""
    by_file = {i: list(group) for i, group in itertools.groupby(test, key=lambda tile: tile.file)}

    def overlaps(tile):
        near = by_file.get(tile.file, [])
        return any(abs(tile.y - t.y) < size and abs(tile.x - t.x) < size for t in near)

    return [tile for tile in tiles if not overlaps(tile)]


def starts(length, size, step):
    """Where tiles begin along a side: the last is shifted inwards to end at the border."""
    last = max(length - size, 0)
    return [*range(0, last, step), last]


def count_tiles(sizes, size, step):
    return sum(len(starts(h, size, step)) * len(starts(w, size, step)) for h, w in sizes)


def square(y, x, size):
    return slice(y, y + size), slice(x, x + size)


def read_padded(path, size, missing):
    """(values (H, W, C), observed (H, W)), upright, and at least a tile wide and high."""
    picture = read_picture(path, missing)
    values = upright(picture.values, picture.orientation)
    observed = upright(picture.observed, picture.orientation)
    below, right = (max(size - n, 0) for n in observed.shape)
    if below or right:
        observed = np.pad(observed, [(0, below), (0, right)])
        values = np.pad(values, [(0, below), (0, right), (0, 0)])
    return values, observed


def at_once(headers):
    """How many files to read at a time: eight, if they are not large."""
    largest = max(header.size[0] * header.size[1] for header in headers)
    return max(1, min(8, 32_000_000 // max(largest, 1)))
