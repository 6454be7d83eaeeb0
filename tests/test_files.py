"""Files that are the old one or the new one; folders of one process; errors in one line."""

import errno
import json
import os
import signal
import subprocess
import sys

from fused_ddpm import files
from fused_ddpm.files import UserError, in_one_line, occupy, write
from fused_ddpm.images import DataError

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image


def figure():
    made = Figure(figsize=(1, 1))
    made.subplots().plot([0, 1])
    return made


CONTENTS = {
    "history.json": {"loss": [1.5, 2]},
    "labels.npy": np.arange(6).reshape(2, 3),
    "found.npz": {"a": np.ones(3), "b": torch.zeros(2)},
    "last.pt": {"step": 3, "model": {"weight": torch.arange(4.0)}},
    "samples.png": Image.new("RGB", (3, 2), "red"),
    "loss.png": figure(),
    "film.gif": [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")],
}


def test_every_kind_is_written_and_read_back(tmp_path):
    folder = tmp_path / "new" / "folder"
    for name, content in CONTENTS.items():
        write(folder / name, content)
    assert {path.name for path in folder.iterdir()} == CONTENTS.keys()  # no temporary file stays
    assert json.loads((folder / "history.json").read_text()) == CONTENTS["history.json"]
    assert np.array_equal(np.load(folder / "labels.npy"), CONTENTS["labels.npy"])
    arrays = np.load(folder / "found.npz")
    assert arrays["a"].tolist() == [1, 1, 1] and arrays["b"].tolist() == [0, 0]
    loaded = torch.load(folder / "last.pt", weights_only=True)
    assert loaded["step"] == 3 and loaded["model"]["weight"].tolist() == [0, 1, 2, 3]
    assert Image.open(folder / "samples.png").getpixel((2, 1)) == (255, 0, 0)
    assert Image.open(folder / "loss.png").size == (110, 110)
    film = Image.open(folder / "film.gif")
    assert film.n_frames == 3 and film.info["duration"] == 80
    film.seek(2)
    assert film.info["duration"] == 2000 and film.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("name", CONTENTS)
def test_it_appears_in_one_move(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text("old")
    moves, replace = [], os.replace

    def watch(source, target):
        assert path.read_text() == "old" and source.stat().st_size > 0
        moves.append((source, target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", watch)
    write(path, CONTENTS[name])
    assert [target for _, target in moves] == [path] and list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() != b"old"
    assert moves[0][0].parent == tmp_path  # a move between disks would be a copy


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_text("old")
    for full_disk in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space")):

        def half(content, temporary):
            temporary.write_text("ne")
            raise full_disk  # noqa: B023

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(UserError, match=r"last.pt: cannot be written .*No space"):
            write(path, {"step": 1})
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match=r"below.json: cannot be written"):
        write(tmp_path / "text" / "below.json", {})
    assert (tmp_path / "text").read_text() == "hello"


def test_what_is_wrong_with_the_data_is_an_error_for_the_user():
    assert issubclass(DataError, UserError)


def test_it_is_on_disk_before_it_is_moved(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (calls.append("sync"), sync(file)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("move"), replace(*paths)))
    for name, content in CONTENTS.items():
        write(tmp_path / name, content)
    assert calls == ["sync", "move"] * len(CONTENTS)


# -- one process a folder --------------------------------------------------------------------------

HOLD = """import sys, time
from pathlib import Path
from fused_ddpm.files import occupy
held = occupy(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path):
    folder = tmp_path / "new" / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"--out-dir .*run: another process is at work in it"):
            occupy(folder)
        other.send_signal(signal.SIGKILL)
        other.wait()
        held = occupy(folder)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with pytest.raises(UserError, match="another process"):
        occupy(folder)
    os.close(held)
    os.close(occupy(folder))
    assert not any(folder.iterdir())  # no file is needed for it


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    whole = {"last.pt", ".hidden", "notes.tmp", "samples.npy.part"}
    for name in [*whole, ".last.pt.tmp.pt", ".history.json.tmp.json", ".loss.png.tmp.png"]:
        (tmp_path / name).write_text("x")
    os.close(occupy(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == whole


def test_where_there_are_no_locks_it_does_without(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as some network disks do

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    os.close(occupy(tmp_path))
    monkeypatch.setattr(files, "fcntl", None)
    assert occupy(tmp_path) is None


# -- what is said of an error ----------------------------------------------------------------------


def raised(call):
    with pytest.raises(BaseException) as error:
        call()
    return error.value


def test_errors_in_one_line():
    assert in_one_line(UserError("--lr: no")) == "--lr: no"
    assert "No such file" in in_one_line(raised(lambda: open("/nowhere/at/all")))
    for call in [
        lambda: torch.empty(1 << 50),
        lambda: torch.empty(1 << 31, 1 << 31, 1 << 31),
        lambda: np.empty(1 << 60, np.uint8),
    ]:
        assert in_one_line(raised(call)).startswith("out of memory; a smaller --batch-size")
    wrong = raised(lambda: torch.full((1,), 300, dtype=torch.uint8))  # "without overflow"
    for own in (wrong, RuntimeError("shapes"), ValueError("overflow"), KeyError("x"), None):
        assert in_one_line(own) is None  # a traceback serves better
