"""Images on disk: data sets by name or folder, each as one uint8 tensor, and the file that samples are written to.

    images, labels = load_images("fashion_mnist", train=True)    # (60000, 1, 32, 32) uint8, (60000,) int64

A data set of this size fits in memory many times over, so there is no loader: move the tensor to the device once, index it
for a batch, and scale there. Names: cifar10, fashion_mnist, mnist (torchvision's, downloaded at first use), shapes (drawn
here, needs no file), or the path of a folder of images.
"""

import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
TORCHVISION = {"cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST", "mnist": "MNIST"}  # its classes
CLASSES = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "fashion_mnist": ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"],
    "mnist": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
SHAPES = ["circle", "ring", "triangle", "square", "hexagon", "star", "cross", "crescent", "bar", "half disc"]
SHAPES_COUNT = {True: 30_000, False: 3_000}
GREY = ("1", "L", "I;16")  # modes of PIL
HELD_OUT = 10  # of a folder, the last tenth of each class is the test part


class DataError(Exception):
    """Data that is not there, or cannot be read or written; the message says which and what to do."""


def one_first(load):
    """Of several processes the first loads before the others, so that it alone downloads what is not there yet."""

    @functools.wraps(load)
    def wait_and_load(*args, **options):
        several = dist.is_initialized()
        if several and dist.get_rank() > 0:
            dist.barrier()
        loaded = load(*args, **options)
        if several and dist.get_rank() == 0:
            dist.barrier()
        return loaded

    return wait_and_load


@one_first
def load_images(name, data_dir="data", image_size=32, train=True):
    """A data set as (images, labels): uint8 (N, C, image_size, image_size) and int64 (N,), the latter -1 without classes.

    C is 1 for greyscale data, else 3. The 28x28 images of mnist and fashion_mnist are padded to 32x32 with black; any other
    difference in size is mended by cropping to the central square and resizing. `train` picks the part; of a folder, the
    last tenth of each class, by file name, is the test part. Raises DataError.
    """
    if image_size < 4:
        raise DataError(f"--image-size {image_size}: must be at least 4")
    if name == "shapes":
        return draw_shapes(SHAPES_COUNT[train], image_size, seed=0 if train else 1)
    if name in TORCHVISION:
        images, labels = load_named(name, data_dir, train)
        return resize(images, image_size), labels
    if Path(name).is_dir():
        return load_folder(Path(name), image_size, train)
    names = ", ".join([*TORCHVISION, "shapes"])
    raise DataError(f"--data {name}: neither a data set ({names}) nor a folder of images")


def class_names(name):
    """What the labels of a data set are called: a list, empty for a folder without sub-folders. Raises DataError."""
    if name == "shapes" or name in CLASSES:
        return SHAPES if name == "shapes" else CLASSES[name]
    return scan_folder(Path(name))[2]


def choose_data(name, full, data_dir="data"):
    """The data set that `auto` stands for: cifar10 (full) or fashion_mnist, or shapes where that cannot be had."""
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
    """One of torchvision's data sets in its own size, from disk or else downloaded into data_dir."""
    if name == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        part = DEBIAN_FASHION_MNIST / ("train" if train else "t10k")
        try:  # idx files: a header, then bytes
            images = np.frombuffer(gzip.open(f"{part}-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
            labels = np.frombuffer(gzip.open(f"{part}-labels-idx1-ubyte.gz").read(), np.uint8, offset=8)
        except (OSError, EOFError) as error:
            raise DataError(f"{part}-*.gz: cannot be read ({error}); reinstall the package dataset-fashion-mnist") from error
        return torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()), torch.from_numpy(labels.astype(np.int64))
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # offline behind a firewall, a connection attempt would otherwise hang for minutes
    try:
        data = download(name, data_dir, train)
    except Exception as error:  # URLError, RuntimeError, OSError: torchvision raises whatever its attempt met
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{name} is not in {data_dir} and cannot be downloaded ({reason}); put it there, or use --data shapes"
        raise DataError(message) from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = torch.as_tensor(data.data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)  # (N, H, W) or (N, H, W, 3)
    return images.contiguous(), torch.as_tensor(data.targets).long()


def download(name, data_dir, train):
    # Imported here: a torchvision that does not fit a CPU build of torch fails at import, and no other data needs it.
    from torchvision import datasets

    return getattr(datasets, TORCHVISION[name])(data_dir, train=train, download=True)


def resize(images, size):
    """uint8 (N, C, H, W) to (N, C, size, size); 28x28 is padded to 32x32 before anything else."""
    if images.shape[-1] == 28 and size != 28:
        images = F.pad(images, (2, 2, 2, 2))
    if images.shape[-1] == size:
        return images
    parts = [F.interpolate(p.float(), size=(size, size), mode="bilinear", antialias=True) for p in images.split(4096)]
    return torch.cat([p.round().clamp(0, 255).byte() for p in parts])


@functools.cache
def scan_folder(folder):
    """([(file, label)], whether all are greyscale, names of the classes), in order of class and file name."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def images_of(paths):
        return sorted(p for p in paths if p.is_file() and p.suffix.lower() in endings)

    direct = images_of(folder.iterdir())
    classes = {p.name: images_of(p.rglob("*")) for p in sorted(folder.iterdir()) if p.is_dir()}
    classes = {name: paths for name, paths in classes.items() if paths}
    if direct and classes:
        raise DataError(f"--data {folder}: holds images both directly and in sub-folders; keep one of the two")
    files = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    files = files or [(path, -1) for path in direct]
    if len(files) < 3:
        raise DataError(f"--data {folder}: {len(files) or 'no'} images in it or its sub-folders; at least 3 are needed")
    with ThreadPoolExecutor(8) as pool:
        return files, all(pool.map(lambda item: open_image(item[0]).mode in GREY, files)), list(classes)


def open_image(path):
    try:
        return Image.open(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); remove or replace it") from error


def load_folder(folder, image_size, train):
    """A folder with one sub-folder for each class, or with images directly in it; greyscale if every image is."""
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
                if image.mode == "I;16":  # convert would clip its 16 bits
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
                if image.size != (image_size, image_size):
                    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
        except OSError as error:  # a broken file may open, and fail only here
            raise DataError(f"{item[0]}: cannot be read as an image ({error}); remove or replace it") from error
        array = torch.from_numpy(np.array(image))
        return array[None] if grey else array.permute(2, 0, 1)

    chosen = parts[train]
    with ThreadPoolExecutor(8) as pool:
        images = list(tqdm(pool.map(read, chosen), total=len(chosen), desc="reading images", disable=len(chosen) < 2000))
    return torch.stack(images), torch.tensor([label for _, label in chosen])


def draw_shapes(count, image_size, seed):
    """`count` coloured shapes of ten classes as (images, labels): antialiased from signed distances, the same for a seed.

    Place, size, turn and colours are random; the distance of a pixel to the outline, in pixels, gives its coverage.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=g)

    labels = torch.randint(len(SHAPES), (count,), generator=g)
    size, turn, centre = uniform(0.35, 0.7, 1, 1), uniform(0, 2 * math.pi, 1, 1), uniform(-0.25, 0.25, 2, 1, 1)
    colour = uniform(0, 1, 2, 3)  # background, shape
    # Move the shape's brightness at least 0.4 away from the background's, so that there is something to see.
    colour[:, 1] = torch.where((colour[:, 0].mean(1) < 0.5)[:, None], 0.6 + 0.4 * colour[:, 1], 0.4 * colour[:, 1])
    axis = (torch.arange(image_size) + 0.5) * 2 / image_size - 1
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(0, count, 2048):
        part = slice(i, min(i + 2048, count))
        y, x = axis[:, None] - centre[part, 0], axis[None, :] - centre[part, 1]  # (B, H, W)
        cos, sin = turn[part].cos(), turn[part].sin()
        x, y = (cos * x + sin * y) / size[part], (cos * y - sin * x) / size[part]
        distance = torch.empty_like(x)
        for label in range(len(SHAPES)):
            chosen = labels[part] == label
            distance[chosen] = shape_distance(SHAPES[label], x[chosen], y[chosen])
        coverage = (0.5 - distance * size[part] * image_size / 2).clamp(0, 1)[:, None]  # (B, 1, H, W)
        background, shape = colour[part, 0, :, None, None], colour[part, 1, :, None, None]
        images[part] = (255 * (background + coverage * (shape - background))).round().byte()
    return images, labels


def shape_distance(name, x, y):
    """Signed distance, negative inside, of points (x, y) to a shape of radius about 1."""
    r = torch.hypot(x, y)

    def polygon(n):  # fold the plane onto one edge
        half = math.pi / n
        angle = (torch.atan2(y, x) + half).remainder(2 * half) - half
        return r * angle.cos() - math.cos(half)

    def box(w, h):
        return torch.maximum(x.abs() - w, y.abs() - h)

    if name == "circle":
        return r - 0.9
    if name == "ring":
        return (r - 0.75).abs() - 0.2
    if name in ("triangle", "square", "hexagon"):
        return polygon({"triangle": 3, "square": 4, "hexagon": 6}[name])
    if name == "star":  # fold onto half an arm: the line from its tip (1, 0) to the notch between two arms
        fifth = math.pi / 5
        angle = ((torch.atan2(y, x) + fifth).remainder(2 * fifth) - fifth).abs()
        notch_x, notch_y = 0.45 * math.cos(fifth), 0.45 * math.sin(fifth)
        normal_x, normal_y = notch_y, 1 - notch_x
        return ((r * angle.cos() - 1) * normal_x + r * angle.sin() * normal_y) / math.hypot(normal_x, normal_y)
    if name == "cross":
        return torch.minimum(box(0.95, 0.32), box(0.32, 0.95))
    if name == "crescent":
        return torch.maximum(r - 0.9, 0.75 - torch.hypot(x - 0.45, y))
    if name == "bar":
        return torch.hypot(x - x.clamp(-0.7, 0.7), y) - 0.28
    return torch.maximum(r - 0.9, y)  # half disc


# ---------------------------------------------------------------------------------------------------------------------
# Samples on their way to disk.

# Settings that leave the images as they are, up to rounding.
BESIDE_THE_POINT = {"batch_size", "device", "compile", "out_dir", "data_dir", "sample", "resume", "overwrite", "plots"}
BESIDE_THE_POINT |= {"steps", "epochs", "log_every", "save_every", "sample_every"}  # of these the weights tell


class SampleFile:
    """An .npy file (n, H, W, C), filled batch by batch in memory that does not grow, by any number of processes.

    `file[index] = images` puts images (B, C, H, W) in the places index (B,). Until finish() the file is called <path>.part and
    ends in one byte an image, 1 once it is on disk, and a hash of all that the images are made from. So a run that is cut off,
    at whatever moment, leaves what it has to the next one with the same settings and tensors. Of several processes each opens
    and finishes it, on one file system. Raises DataError where it cannot be written.
    """

    def __init__(self, path, shape, dtype, settings, tensors):
        """shape: (n, C, H, W). settings: a dict for JSON. tensors: what else the images depend on, weights for instance."""
        n, *image = shape
        self.path, self.part, self.dtype = path, path.with_name(f"{path.name}.part"), np.dtype(dtype)
        self.shape = n, *image[1:], image[0]
        header = io.BytesIO()
        layout = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(header, layout)
        settings = {name: value for name, value in settings.items() if name not in BESIDE_THE_POINT}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for tensor in tensors:
            key.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        header, key = header.getvalue(), key.digest()
        self.first, self.image_bytes = len(header), math.prod(image) * self.dtype.itemsize
        self.flags = self.first + n * self.image_bytes
        try:
            if self.leads():
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.part, "r+b" if self.part.exists() else "w+b") as file:
                    same = file.read(len(header)) == header and file.seek(self.flags + n) and file.read() == key
                    if not same:
                        file.truncate(0)
                        for at, data in (0, header), (self.flags + n, key):  # the system fills up with zeros
                            file.seek(at)
                            file.write(data)
            self.file = self.all_wait() or open(self.part, "r+b")
            self.file.seek(self.flags)
            self.done = np.frombuffer(self.file.read(n), dtype=np.bool_)
            self.all_wait()  # until all have read it: they share out the rest by it
            if self.done.any() and self.leads():
                print(f"{path.name}: {self.done.sum()} of {n} are there from an earlier run")
        except OSError as error:
            raise DataError(f"{self.part}: cannot be written ({error})") from error

    def leads(self):
        return not dist.is_initialized() or dist.get_rank() == 0

    def all_wait(self):
        if dist.is_initialized():
            dist.barrier()

    def write(self, index, size, data, start):
        for i, item in zip(index.tolist(), data, strict=True):
            self.file.seek(start + i * size)
            self.file.write(item)
        self.file.flush()
        os.fsync(self.file.fileno())

    def __setitem__(self, index, images):
        images = images.movedim(1, -1).cpu().numpy().astype(self.dtype, order="C", copy=False)
        try:
            self.write(index, self.image_bytes, images, self.first)
            self.write(index, 1, [b"\1"] * len(index), self.flags)  # later, so that no flag outlives its image
        except OSError as error:
            raise DataError(
                f"{self.part}: cannot be written ({error}); make room, then --resume or the same --sample goes on"
            ) from error

    def missing(self, batches):
        """Those of the batches, a list of indices (B,), that were not whole when the file was opened."""
        return [index for index in batches if not self.done[index.cpu().numpy()].all()]

    def array(self):
        """Once all processes have filled in their share: all of it, (n, H, W, C), mapped into memory."""
        self.all_wait()
        array = np.memmap(self.part, self.dtype, "c", self.first, self.shape)
        if not np.memmap(self.part, np.bool_, "r", self.flags, len(array)).all():
            raise DataError(f"{self.part}: some are missing, which another process was to write; run the same again")
        self.all_wait()
        return array

    def finish(self):
        """The same, and the file moves to its path."""
        self.array()
        self.file.close()
        self.all_wait()
        if self.leads():
            os.replace(self.part, self.path)  # a kill here leaves a good .npy, only with the flags behind it
            os.truncate(self.path, self.flags)
        self.all_wait()
        return np.load(self.path, mmap_mode="c")
