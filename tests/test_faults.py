"""A short campaign of faults, the same in every run: kills, damaged checkpoints, broken images.

What must hold after each: the run goes on to the same bytes, or one line says what is wrong. Never
another result in silence.
"""

import io
import os
import random
import signal
import sys

import ddpm
import sparse_ddpm
from fused_ddpm import files, folders, images
from fused_ddpm.checkpoints import load_checkpoint
from fused_ddpm.files import UserError
from fused_ddpm.images import DataError

import numpy as np
import pytest
from helpers import assert_same, load, run_tiny
from PIL import Image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
FLAGS = ["--sample-every", "4"]


# -- kills -----------------------------------------------------------------------------------------


def killed_at(k, call):
    """call() in a process that is killed at its k-th move to or from the disk.

    Returns how many there were, if it lived.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, moves = 1, []

        def counted(function):
            def count(*args):
                moves.append(1)
                if len(moves) == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)

            return count

        try:
            sys.stdout = sys.stderr = io.StringIO()
            for name in ("fsync", "replace", "truncate"):
                setattr(files.os, name, counted(getattr(os, name)))
            call()
            os.write(write, str(len(moves)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return int(said or 0)


def assert_equal(a, b):
    """Two folders of a run hold the same, but for what names the folder."""
    names = {path.name for path in a.iterdir()}
    assert names == {path.name for path in b.iterdir()}
    for name in names - {"config.json", "last.pt"}:
        if name.endswith(".npz"):
            x, y = np.load(a / name), np.load(b / name)
            assert all(np.array_equal(x[key], y[key]) for key in x.files + y.files)
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    x, y = load(a / "last.pt"), load(b / "last.pt")
    x.pop("config"), y.pop("config")
    assert_same(x, y)


@pytest.mark.parametrize("script, kills", [(ddpm, 6), (sparse_ddpm, 2)], ids=["ddpm", "sparse"])
def test_no_kill_loses_a_run_or_changes_it(script, kills, tmp_path):
    moves = killed_at(0, lambda: run_tiny(script, tmp_path / "whole", *FLAGS))
    for k in sorted(random.Random(0).sample(range(1, moves + 1), kills)):
        folder = tmp_path / str(k)
        assert killed_at(k, lambda: run_tiny(script, folder, *FLAGS)) == 0  # noqa: B023
        if (folder / "last.pt").exists():
            script.main(["--resume", "--out-dir", str(folder)])
        else:
            run_tiny(script, folder, *FLAGS)
        assert_equal(folder, tmp_path / "whole")


# -- damage ----------------------------------------------------------------------------------------


def damage(whole, rng):
    """One flipped bit, a page of zeros, a cut, or a piece of it in another place."""
    data, at = bytearray(whole), rng.randrange(len(whole))
    kind = rng.randrange(4)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        page = at // 512 * 512
        data[page : page + 512] = bytes(len(data[page : page + 512]))
    elif kind == 2:
        del data[at:]
    else:
        to = rng.randrange(len(whole) - 64)
        data[to : to + 64] = data[at : at + 64].ljust(64, b"\0")
    return bytes(data)


def test_a_damaged_checkpoint_is_refused_or_the_same(tmp_path):
    run_tiny(ddpm, tmp_path / "run", "--steps", "1")
    path = tmp_path / "run" / "last.pt"
    whole, good = path.read_bytes(), load(path)
    rng, refusals = random.Random(1), 0
    for _ in range(100):
        path.write_bytes(damage(whole, rng))
        try:
            loaded = load_checkpoint(path, "ddpm")
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refusals += 1
            continue
        assert_same(loaded, good)
    assert refusals > 60  # the rest lay in padding


# -- broken images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_broken_image_is_named_or_read(tmp_path, ending):
    rng = random.Random(2)
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    bad = tmp_path / f"bad.{ending}"
    Image.fromarray(values).resize((32, 32)).save(bad)
    whole = bad.read_bytes()
    for _ in range(30):
        bad.write_bytes(damage(whole, rng))
        for scanned in (folders.list_folder, folders.survey):
            scanned.cache_clear()
        try:
            found, _ = images.load_images(str(tmp_path), image_size=8)
        except DataError as error:
            assert bad.name in str(error) and "\n" not in str(error)
        else:
            assert found.shape[1:] == (3, 8, 8)
