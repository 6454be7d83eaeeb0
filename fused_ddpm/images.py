"""Data sets by name or folder, each as one uint8 tensor.

    images, labels = load_images("fashion_mnist", train=True)    # uint8 (60000, 1, 32, 32), int64

A data set of this size fits in memory many times over, so there is no loader: move the tensor to
the device once, index it for a batch, and scale there. Names: cifar10, fashion_mnist, mnist
(torchvision's, downloaded at first use), shapes (drawn here, needs no file), or a folder of images.
"""

import functools
import gzip
import itertools
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from fused_ddpm import shapes
from fused_ddpm.files import UserError
from fused_ddpm.processes import from_first, rank, wait, world

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
GREY = ("1", "L", "LA", "I;16", "I;16B")  # modes of PIL
HELD_OUT = 10  # of a folder, the last tenth of each class is the test part


class DataError(UserError):
    """Data that is not there, or cannot be read or written: the message says what to do."""


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).byte()


def to_unit(x):
    """float [-1, 1] -> float [0, 1], clipped."""
    return (x / 2 + 0.5).clamp(0, 1)


def as_file(x):
    """float [0, 1], (N, C, H, W) -> a uint8 array (N, H, W, C), as samples.npy has it."""
    return (x * 255).round().byte().movedim(1, -1).numpy()


class Data:
    """A data set in three parts, each read when first asked for, shuffled, and on the device.

    name, facts: what it is; shape: (C, H, W) of an image; class_names. images: uint8 (N, C, H, W)
    and labels: int64 (N,) to train on; held_out: {"val": (images, labels), "test": ...}, 128 of
    each, if labelled also "val_uncond" with the null class; classes: int64 (c,), those of
    --classes.
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
        data_dir = self.config.data_dir
        images, labels = load_images(self.name, data_dir, self.size, train)
        if self.known:
            self._check(tuple(images.shape[1:]))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[order], labels[order]  # folders come sorted by class

    def _check(self, shape):
        """The checkpoint's network is for images and classes like these."""
        if shape != self.shape:
            made, here = ("x".join(map(str, s)) for s in (self.shape, shape))
            raise UserError(f"--data {self.name}: the checkpoint is for {made}, this is {here}")
        if self.labelled and class_names(self.name) != self.class_names:
            known = ", ".join(self.class_names)
            raise UserError(f"--data {self.name}: the checkpoint is for the classes {known}")

    @functools.cached_property
    def _test(self):
        return self._read(train=False)

    @functools.cached_property
    def _train(self):
        """(validation, training), each (images, labels)."""
        images, labels = self._read(train=True)
        n = max(len(images) // 10, 1)
        if len(images) - n < world():
            few = f"{len(images) - n} training images are too few for {world()} processes"
            raise UserError(f"--data {self.name}: {few}")
        device = self.config.device
        return (images[:n], labels[:n]), (images[n:].to(device), labels[n:].to(device))

    @property
    def shape(self):
        return tuple(self.known["shape"]) if self.known else tuple(self._test[0].shape[1:])

    @property
    def class_names(self):
        return self.known["class_names"] if self.known else class_names(self.name)

    @property
    def facts(self):
        return {"shape": list(self.shape), "class_names": list(self.class_names)}

    @property
    def images(self):
        return self._train[1][0]

    @property
    def labels(self):
        return self._train[1][1]

    def test(self, n):
        """The first n test images."""
        return self._test[0][:n].to(self.config.device)

    @functools.cached_property
    def held_out(self):
        parts = {"val": self._train[0], "test": self._test}
        if self.labelled:
            images, labels = parts["val"]
            null_class = len(self.class_names)
            parts["val_uncond"] = images, torch.full_like(labels, null_class)
        device = self.config.device
        return {name: [x[:128].to(device) for x in part] for name, part in parts.items()}


def one_first(load):
    """Of several processes the first loads before the others: it alone downloads."""

    @functools.wraps(load)
    def wait_and_load(*args, **options):
        if rank() > 0:
            wait()
        loaded = load(*args, **options)
        if rank() == 0:
            wait()
        return loaded

    return wait_and_load


@one_first
def load_images(name, data_dir="data", image_size=32, train=True):
    """A data set as (images, labels): uint8 (N, C, image_size, image_size) and int64 (N,).

    C is 1 for greyscale data, else 3; without classes labels are -1. The 28x28 images of mnist and
    fashion_mnist are padded to 32x32 with black; any other difference in size is mended by cropping
    to the central square and resizing. `train` picks the part; of a folder, the last tenth of each
    class, by file name, is the test part. Raises DataError.
    """
    if image_size < 4:
        raise DataError(f"--image-size {image_size}: must be at least 4")
    if name == "shapes":
        return shapes.draw_shapes(SHAPES_COUNT[train], image_size, seed=0 if train else 1)
    if name in TORCHVISION:
        images, labels = load_named(name, data_dir, train)
        return resize(images, image_size), labels
    if Path(name).is_dir():
        return load_folder(Path(name), image_size, train)
    names = ", ".join([*TORCHVISION, "shapes"])
    raise DataError(f"--data {name}: neither a data set ({names}) nor a folder of images")


def class_names(name):
    """What the labels are called: a list, empty for a folder without sub-folders."""
    return CLASSES[name] if name in CLASSES else scan_folder(Path(name))[2]


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
        except (OSError, EOFError) as error:
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


@functools.cache
def scan_folder(folder):
    """([(file, label)], whether all are greyscale, names of the classes), in order of names."""
    endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def images_of(paths):
        return sorted(p for p in paths if p.is_file() and p.suffix.lower() in endings)

    direct = images_of(folder.iterdir())
    classes = {p.name: images_of(p.rglob("*")) for p in sorted(folder.iterdir()) if p.is_dir()}
    classes = {name: paths for name, paths in classes.items() if paths}
    if direct and classes:
        two = "holds images both directly and in sub-folders; keep one of the two"
        raise DataError(f"--data {folder}: {two}")
    files = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    files = files or [(path, -1) for path in direct]
    if len(files) < 3:
        few = f"{len(files) or 'no'} images in it or its sub-folders; at least 3 are needed"
        raise DataError(f"--data {folder}: {few}")
    with ThreadPoolExecutor(8) as pool:
        grey = all(pool.map(lambda item: open_image(item[0]).mode in GREY, files))
    return files, grey, list(classes)


def unreadable(path, error):
    return DataError(f"{path}: cannot be read as an image ({error}); remove or replace it")


def open_image(path):
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from error


def load_folder(folder, image_size, train):
    """A folder with one sub-folder a class, or with images in it; greyscale if every image is."""
    try:
        files, grey, _ = scan_folder(folder)
    except OSError as error:
        raise DataError(f"--data {folder}: cannot be read ({error})") from error
    parts = {True: [], False: []}
    for _, group in itertools.groupby(files, key=lambda item: item[1]):
        group = list(group)
        cut = len(group) - len(group) // HELD_OUT
        parts[True] += group[:cut]
        parts[False] += group[cut:]
    if not parts[False]:  # a handful of images
        parts[False] = [parts[True].pop()]

    def read(item):
        try:
            with open_image(item[0]) as image:
                if image.mode in ("I;16", "I;16B"):  # convert would clip its 16 bits
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
                if image.size != (image_size, image_size):
                    size = (image_size, image_size)
                    image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        except OSError as error:  # a broken file may open, and fail only here
            raise unreadable(item[0], error) from error
        array = torch.from_numpy(np.array(image))
        return array[None] if grey else array.permute(2, 0, 1)

    chosen, few = parts[train], len(parts[train]) < 2000
    with ThreadPoolExecutor(8) as pool:
        read_all = pool.map(read, chosen)
        images = list(tqdm(read_all, total=len(chosen), desc="reading images", disable=few))
    return torch.stack(images), torch.tensor([label for _, label in chosen])
