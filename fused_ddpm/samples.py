"""Samples while they are made: shared out over the processes, in memory or on disk.

    samples = run.samples(n, shape, file="samples.npy")
    for index in samples.missing():       # batches of those not there yet, this process's
        ...                               # samples.tick() at each step moves the progress bar
        samples.put(index, images)
    images = samples.gather()             # all of them, in every process

On disk it is an .npy file, (n, H, W, C), filled batch by batch in memory that does not grow. Until
it is whole it is called <path>.part and ends in one byte a sample, 1 once that is on disk, and in a
hash of all that the samples are made from: so a run that is cut off, at whatever moment, leaves
what it has to the next one with the same settings and tensors.
"""

import hashlib
import io
import json
import math
import os
import shutil
from dataclasses import asdict

from fused_ddpm.config import flags_of
from fused_ddpm.folders import list_folder, read_all, read_whole, survey
from fused_ddpm.images import DataError, hash_of
from fused_ddpm.processes import rank, sum_over, wait, world

import numpy as np
import torch
from tqdm import tqdm


class Samples:
    """See above. Raises DataError where the file cannot be written."""

    def __init__(self, config, n, shape, dtype, path=None, depends_on=()):
        """shape: (C, H, W). dtype: torch's. depends_on: tensors the samples are made from."""
        self.config, self.n, self.shape, self.path = config, n, tuple(shape), path
        self.bar, self.file = None, None
        self.done = np.zeros(n, dtype=bool)
        if path is None:
            self.memory = torch.zeros(n, *shape, dtype=dtype, device=config.device)
        else:
            self.part = path.with_name(f"{path.name}.part")
            self.dtype = np.dtype(str(dtype).removeprefix("torch."))
            if path.is_dir():
                raise DataError(f"{path}: is a folder; move it, or write elsewhere")
            try:
                self._open(depends_on)
            except OSError as error:
                raise DataError(f"{self.part}: cannot be written ({error})") from error

    def _open(self, depends_on):
        channels, height, width = self.shape
        header, layout = io.BytesIO(), (self.n, height, width, channels)
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": layout}
        np.lib.format.write_array_header_1_0(header, about)
        self.layout, header = layout, header.getvalue()
        self.first, self.bytes = len(header), math.prod(self.shape) * self.dtype.itemsize
        self.flags = self.first + self.n * self.bytes  # where they begin
        key = self._key(depends_on)
        if rank() == 0:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._find_room()
            with open(self.part, "r+b" if self.part.exists() else "w+b") as file:
                same = file.read(len(header)) == header
                same = same and file.seek(self.flags + self.n) and file.read() == key
                if not same:
                    file.truncate(0)
                    for place, data in (0, header), (self.flags + self.n, key):
                        file.seek(place)  # the system fills up with zeros
                        file.write(data)
        wait()
        self.file = open(self.part, "r+b")
        self.file.seek(self.flags)
        self.done = np.frombuffer(self.file.read(self.n), dtype=bool)
        wait()  # until all have read it: they share out the rest by it
        if self.done.any() and rank() == 0:
            print(f"{self.path.name}: {self.done.sum()} of {self.n} are there from an earlier run")

    def _find_room(self):
        there = self.part.stat() if self.part.exists() else None
        free = shutil.disk_usage(self.part.parent).free + 512 * getattr(there, "st_blocks", 0)
        if self.flags > free:
            need, free = (f"{size / 1e9:.3g} GB" for size in (self.flags, free))
            cure = "make room, or ask for fewer or smaller samples"
            raise DataError(f"{self.part}: takes {need}, and {free} are free; {cure}")

    def _key(self, depends_on):
        """A hash of the tensors and of all settings but those that leave the samples the same."""
        flags = flags_of(type(self.config)).items()
        beside = {name for name, (_, part) in flags if part == "RunConfig"} - {"seed"}
        beside |= {"batch_size", "steps", "epochs"}
        settings = {k: v for k, v in asdict(self.config).items() if k not in beside}
        about = json.dumps(settings, sort_keys=True) + hash_of(depends_on)
        return hashlib.sha256(about.encode()).digest()

    def missing(self, steps=None, order=None):
        """Indices (B,) of batches that are not whole yet, this process's share of them. steps: of a
        sample, for the progress bar; sample_steps. order: the indices (n,) in another one."""
        index = torch.arange(self.n, device=self.config.device) if order is None else order
        batches = index.split(self.config.batch_size)
        batches = [i for i in batches if not self.done[i.cpu().numpy()].all()][rank() :: world()]
        total = len(batches) * (steps or self.config.sample_steps)
        hidden = rank() > 0 or (self.path is None and total < 1000)  # a few seconds
        about = {"desc": "sampling", "unit": "step", "mininterval": 0.5}  # drawing it costs 0.2 ms
        self.bar = tqdm(total=total, leave=False, disable=hidden, **about)
        yield from batches
        self.bar.close()

    def tick(self):
        self.bar.update()

    def put(self, index, images):
        """images (B, C, H, W) in the places index (B,)."""
        if self.path is None:
            self.memory[index] = images
            return
        data = images.movedim(1, -1).cpu().numpy().astype(self.dtype, order="C", copy=False)
        try:
            self._write(index, self.bytes, data, self.first)
            # Later, so that no flag outlives its sample.
            self._write(index, 1, [b"\1"] * len(index), self.flags)
        except OSError as error:
            cure = "make room, then --resume or the same --sample goes on"
            raise DataError(f"{self.part}: cannot be written ({error}); {cure}") from error

    def _write(self, index, size, data, start):
        for i, item in zip(index.tolist(), data, strict=True):
            self.file.seek(start + i * size)
            self.file.write(item)
        self.file.flush()
        os.fsync(self.file.fileno())

    def gather(self):
        """All of them (n, C, H, W) on the CPU, from disk mapped into memory."""
        if self.path is None:
            return sum_over(self.memory).cpu()  # each process left the others' share at zero
        wait()
        if not np.memmap(self.part, bool, "r", self.flags, self.n).all():
            again = "which another process was to write; run the same again"
            raise DataError(f"{self.part}: some are missing, {again}")
        array = np.memmap(self.part, self.dtype, "c", self.first, self.layout)
        wait()
        return torch.from_numpy(array).movedim(-1, 1)

    def keep(self):
        """After gather: the file, whole, moves to its path."""
        self.file.close()
        if rank() == 0:  # a kill in between leaves a good .npy, only with the flags behind it
            os.replace(self.part, self.path)
            os.truncate(self.path, self.flags)

    def discard(self):
        """The file, now that all is elsewhere."""
        self.file.close()
        if rank() == 0:
            self.part.unlink(missing_ok=True)


def read_samples(path):
    """uint8 (N, C, H, W) from a samples.npy or a folder of images, those in order of their names.

    Raises DataError.
    """
    if path.is_dir():
        try:
            headers, channels, plain = survey(path, None)
            sizes = {header.size for header in headers}
            if len(sizes) > 1:
                raise DataError(f"{path}: its images are of {len(sizes)} sizes; make them one")
            height, width = sizes.pop()
            if not plain or height != width:
                wanted = "its images must be square, complete, of 8 bits and no arrays"
                raise DataError(f"{path}: {wanted}")
            read = lambda file: read_whole(file[0], channels == 1, width)
            return torch.stack(read_all(read, list_folder(path)[0]))
        except DataError as error:  # of folders.py, which knows folders as --data
            raise DataError(str(error).removeprefix("--data ")) from error
    try:
        samples = np.load(path)
        if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[3] not in (1, 3):
            raise ValueError(f"it is {samples.dtype} {samples.shape}")
    except Exception as error:  # numpy raises all sorts: BadZipFile, TokenError, MemoryError, ...
        wanted = "neither an .npy, uint8 (N, H, W, 1 or 3), nor a folder of images"
        raise DataError(f"{path}: {wanted} ({error})") from error
    return torch.from_numpy(samples).movedim(3, 1)


def read_labels(path, n, classes):
    """The classes of n samples, int64 (n,), from an .npy. Raises DataError."""
    try:
        labels = torch.from_numpy(np.load(path)).long()
        if labels.shape != (n,) or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"they are not {n} numbers from 0 to {classes - 1}")
    except Exception as error:
        raise DataError(f"{path}: not the classes of these samples ({error})") from error
    return labels
