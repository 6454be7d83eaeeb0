"""Data sets by name or folder, each as one tensor.

    images, labels = load_images("fashion_mnist", train=True)    # uint8 (60000, 1, 32, 32), int64

A data set of this size fits in memory many times over, so there is no loader: move the tensor to
the device once, index it for a batch, and scale there. Names: cifar10, fashion_mnist, mnist
(torchvision's, downloaded at first use), shapes (drawn here, needs no file), or a folder of images.
"""

import functools
import gzip
import hashlib
import socket
import zlib
from dataclasses import replace
from pathlib import Path

from fused_ddpm import shapes
from fused_ddpm.files import UserError
from fused_ddpm.folders import Part, list_folder, load_folder
from fused_ddpm.noise import MIRROR, seeded_integers
from fused_ddpm.pixels import DataError, Scale
from fused_ddpm.processes import from_first, rank, wait, world

import numpy as np
import torch
import torch.nn.functional as F

# Debian's package dataset-fashion-mnist
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION = {"cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST", "mnist": "MNIST"}
CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "fashion_mnist": [
        *("T-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ],
    "mnist": "zero one two three four five six seven eight nine".split(),
    "shapes": shapes.NAMES,
}
SHAPES_COUNT = {True: 30_000, False: 3_000}


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]; float32 is there already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_bytes(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).byte()


def to_unit(x):
    """float [-1, 1] -> float [0, 1], clipped."""
    return (x / 2 + 0.5).clamp(0, 1)


def as_file(x):
    """float [0, 1], (N, C, H, W) -> a uint8 array (N, H, W, C), as samples.npy has it."""
    return (x * 255).round().byte().movedim(1, -1).numpy()


def mirror_half(keys, *images):
    """Images (B, C, H, W), and what goes with them, half of the B mirrored: at random by keys."""
    mirrored = seeded_integers(keys, 2, MIRROR).bool().view(-1, 1, 1, 1)
    return [torch.where(mirrored, x.flip(-1), x) for x in images]


def hash_of(tensors):
    """A hash, as text, of tensors as they lie in memory."""
    known = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        known.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return known.hexdigest()


class Data:
    """A data set in three parts, each read when first asked for, shuffled, and on the device.

    name, facts: what it is; shape: (C, H, W) of an image; class_names. train, test_part(n): Parts,
    and images those of train; held_out: {"val": (index (B,), Part), "test": ...}, the first 128 of
    each, if labelled also "val_uncond" with the null class; classes: int64 (c,), of --classes.
    """

    def __init__(self, config, facts=None, labelled=False):
        """facts: of a checkpoint that is to be used, not trained. labelled: needs classes."""
        self.config, self.known, self.labelled = config, facts, labelled
        self.size = facts["shape"][1] if facts else config.image_size
        full = config.preset == "full"
        name = choose_data(config.data, full, config.data_dir) if rank() == 0 else None
        self.name = config.data = from_first(name)  # after the first process has downloaded it
        if labelled:
            if not facts:
                self.shape  # noqa: B018  read it, so that what is no data set says so
            if not self.class_names:
                cure = "sort its images into one sub-folder for each"
                raise UserError(f"--data {self.name}: has no classes; {cure}")
            self.classes = torch.tensor(class_numbers(config.classes, self.class_names))

    def _read(self, train):
        config, known = self.config, self.known and self.known.get("scale")
        if rank() > 0:
            wait()  # for the first, which alone downloads
        part = load_part(
            *(self.name, config.data_dir, self.size, train),
            missing=getattr(config, "missing", None),
            crop=getattr(config, "crop", False),
            scale=Scale(*known) if known else None,
            incomplete=hasattr(config, "observed_only"),
        )
        if rank() == 0:
            wait()
        if self.known:
            self._check(tuple(part.images.shape[1:]), part.scale)
        g, n = torch.Generator().manual_seed(0), part.validation
        order = torch.randperm(n, generator=g), n + torch.randperm(len(part) - n, generator=g)
        return replace(part[torch.cat(order)], validation=n)  # folders come sorted by class

    def _check(self, shape, scale):
        """The checkpoint's network is for images and classes like these."""
        if shape != self.shape:
            made, here = ("x".join(map(str, s)) for s in (self.shape, shape))
            raise UserError(f"--data {self.name}: the checkpoint is for {made}, this is {here}")
        if (scale is None) != (self.known.get("scale") is None):
            made, here = ("8-bit images", "other values")[:: 1 if scale else -1]
            raise UserError(f"--data {self.name}: the checkpoint is for {made}, this has {here}")
        if self.labelled and class_names(self.name) != self.class_names:
            known = ", ".join(self.class_names)
            raise UserError(f"--data {self.name}: the checkpoint is for the classes {known}")

    @functools.cached_property
    def _test(self):
        return self._read(train=False)

    @functools.cached_property
    def _train(self):
        """(validation, training), two Parts."""
        part = self._read(train=True)
        n = part.validation or max(len(part) // 10, 1)
        if len(part) - n < world():
            few = f"{len(part) - n} training images are too few for {world()} processes"
            raise UserError(f"--data {self.name}: {few}")
        return part[:n], part[n:].to(self.config.device)

    @property
    def shape(self):
        return tuple(self.known["shape"]) if self.known else tuple(self._test.images.shape[1:])

    @property
    def class_names(self):
        return self.known["class_names"] if self.known else class_names(self.name)

    @property
    def facts(self):
        if self.known:
            return {"scale": None} | self.known
        scale = self._test.scale
        limits = scale and [scale.low, scale.high]
        return {"shape": list(self.shape), "class_names": list(self.class_names), "scale": limits}

    @property
    def fingerprint(self):
        """What a run knows its data by again: classes, hashes of all images and of their labels."""
        parts = *self._train, self._test
        observed = [part.observed for part in parts if part.observed is not None]
        images = hash_of([part.images for part in parts] + observed)
        labels = hash_of([part.labels for part in parts])
        return {"class_names": list(class_names(self.name)), "images": images, "labels": labels}

    def check_same(self, known):
        """Facts and fingerprint; UserError unless they are those known of a run, if any are."""
        facts = self.facts | self.fingerprint
        for name in facts:
            if known and facts[name] != known.get(name):
                other = f"other {name.replace('_', ' ')} than the run was made with"
                raise UserError(f"--data {self.name}: {other}; bring them back, or start anew")
        return facts

    @property
    def images(self):
        return self._train[1].images

    @property
    def train(self):
        """The training images as a Part, with what is observed of them."""
        return self._train[1]

    def test_part(self, n):
        return self._test[:n].to(self.config.device)

    @functools.cached_property
    def held_out(self):
        return self.held_out_batch(0)

    def held_out_batch(self, first, size=128):
        """What held_out is, of the images from this one on; without the sets that end before."""
        sets = {"val": self._train[0], "test": self._test}
        if self.labelled:
            null = torch.full_like(sets["val"].labels, len(self.class_names))
            sets["val_uncond"] = replace(sets["val"], labels=null)
        batch = {}
        for name, part in sets.items():
            part = part[first : first + size].to(self.config.device)
            if len(part):
                batch[name] = first + torch.arange(len(part), device=self.config.device), part
        return batch

    @property
    def most_held_out(self):
        """Images in the larger of the two sets."""
        return max(len(self._train[0]), len(self._test))


def load_images(name, data_dir="data", image_size=32, train=True):
    """A data set as (images, labels): uint8 (N, C, image_size, image_size) and int64 (N,).

    C is 1 for greyscale data, else as the files have it; without classes labels are -1. The 28x28
    images of mnist and fashion_mnist are padded to 32x32 with black; any other difference in size
    is mended by cropping to the central square and resizing. `train` picks the part; of a folder,
    the last tenth of each class, by file name, is the test part. A folder of other values than
    bytes is cut into tiles, float32 in [-1, 1]. Raises DataError, also where pixels are missing.
    """
    part = load_part(name, data_dir, image_size, train)
    return part.images, part.labels


def load_part(
    name, data_dir, image_size, train, missing=None, crop=False, scale=None, incomplete=False
):
    """load_images as a Part. For missing, crop, scale see load_folder; incomplete: may it be so."""
    if image_size < 4:
        raise DataError(f"--image-size {image_size}: must be at least 4")
    if Path(name).is_dir() and name not in CLASSES:
        part = load_folder(Path(name), image_size, train, missing, crop, scale)
        if part.observed is not None and not incomplete:
            who = "only sparse_ddpm.py learns from such images"
            raise DataError(f"--data {name}: has missing pixels; {who}")
        return part
    if missing is not None or crop:
        flag = "--crop" if crop else f"--missing {missing:g}"
        raise DataError(f"{flag}: is for folders of images, and --data is {name}")
    if name == "shapes":
        return Part(*shapes.draw_shapes(SHAPES_COUNT[train], image_size, seed=0 if train else 1))
    if name in TORCHVISION:
        images, labels = load_named(name, data_dir, train)
        return Part(resize(images, image_size), labels)
    known = f"neither a data set ({', '.join(CLASSES)}) nor a folder of images"
    raise DataError(f"--data {name}: {known}")


def class_names(name):
    """What the labels are called: a list, empty for a folder without sub-folders."""
    return CLASSES[name] if name in CLASSES else list_folder(Path(name))[1]


def class_numbers(text, names):
    """Labels for numbers or names, in any case, separated by commas; all for None."""
    if text is None:
        return list(range(len(names)))
    known, labels = [name.strip().lower() for name in names], []
    for item in text.lower().split(","):
        item = item.strip()
        if item in known:
            labels.append(known.index(item))
        elif item.isdecimal() and int(item) < len(names):
            labels.append(int(item))
        else:
            there = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            raise UserError(f"--classes {text}: {item!r} is none of the classes: {there}")
    return labels


def choose_data(name, full, data_dir="data"):
    """What `auto` stands for: cifar10 (full) or fashion_mnist, or shapes where that is not here."""
    if name != "auto":
        return name
    wanted = "cifar10" if full else "fashion_mnist"
    try:
        load_named(wanted, data_dir, train=True)
        return wanted
    except DataError as error:
        print(f"data: shapes, drawn here, instead of {wanted} ({error})")
        return "shapes"


def load_named(name, data_dir, train):
    """One of torchvision's data sets in its own size, from disk or downloaded into data_dir."""
    if name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        part = DEBIAN_FASHION_MNIST / ("train" if train else "t10k")
        try:  # idx files: a header, then bytes
            images = gzip.open(f"{part}-images-idx3-ubyte.gz").read()
            labels = gzip.open(f"{part}-labels-idx1-ubyte.gz").read()
        except (OSError, EOFError, zlib.error) as error:
            cure = "reinstall the package dataset-fashion-mnist"
            raise DataError(f"{part}-*.gz: cannot be read ({error}); {cure}") from error
        images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        labels = np.frombuffer(labels, np.uint8, offset=8)
        return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # behind a firewall an attempt would otherwise hang for minutes
    try:
        data = download(name, data_dir, train)
    except Exception as error:  # URLError, RuntimeError, OSError: whatever the attempt met
        lines = str(error).strip().splitlines()  # what was tried first, why the last try failed
        reason = lines[-1].strip() if lines else type(error).__name__
        cure = "put it there, or use --data shapes"
        message = f"{name} is not in {data_dir} and cannot be downloaded ({reason}); {cure}"
        raise DataError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = torch.as_tensor(data.data)  # (N, H, W) or (N, H, W, 3)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(data.targets).long()


def download(name, data_dir, train):
    # Imported here: a torchvision that does not fit torch fails at import, and only this needs it.
    from torchvision import datasets

    return getattr(datasets, TORCHVISION[name])(data_dir, train=train, download=True)


def resize(images, size):
    """uint8 (N, C, H, W) to (N, C, size, size); 28x28 is padded to 32x32 before anything else."""
    if images.shape[-1] == 28 and size != 28:
        images = F.pad(images, (2, 2, 2, 2))
    if images.shape[-1] == size:
        return images
    parts = []
    for part in images.split(4096):
        x = F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        parts.append(x.round().clamp(0, 255).byte())
    return torch.cat(parts)
