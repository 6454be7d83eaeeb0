"""Files that are the old one or the new one; checkpoints that are whole, or refused."""

import errno
import json
import os
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fused_ddpm import files
from fused_ddpm.files import FORMAT, UserError, load_checkpoint, write
from fused_ddpm.images import DataError


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


# -- checkpoints -----------------------------------------------------------------------------------

WEIGHT = torch.arange(40) * 0.37 - 5
CHECKPOINT = {"script": "ddpm", "format": FORMAT, "step": 3, "model": {"w": WEIGHT}}


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "last.pt", CHECKPOINT)
    return tmp_path / "last.pt"


def refused(path, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_checkpoint(path, "ddpm")
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


DAMAGED = "not a checkpoint, or a damaged one"


def test_a_checkpoint_comes_back(path):
    loaded = load_checkpoint(path, "ddpm")
    assert loaded.keys() == CHECKPOINT.keys() and loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], WEIGHT)


def test_one_flipped_bit_never_changes_what_is_loaded(path):
    """Anywhere in the file: it is refused, or no content depends on that byte."""
    whole = path.read_bytes()
    refusals = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path, "ddpm")
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
            continue
        assert loaded["step"] == 3 and loaded["script"] == "ddpm"
        assert torch.equal(loaded["model"]["w"], WEIGHT)
    assert refusals > len(whole) / 3 / 2  # the rest is padding, and a second table of contents


def test_a_flipped_bit_of_a_weight_is_found(path):
    whole = path.read_bytes()
    start = whole.index(WEIGHT.numpy().tobytes())
    for place in range(start, start + 160, 9):
        damaged = bytearray(whole)
        damaged[place] ^= 1  # for torch.load a number like any other
        path.write_bytes(damaged)
        refused(path, f"{DAMAGED} (ValueError)")


def test_a_truncated_file_is_refused(path):
    whole = path.read_bytes()
    for length in [0, 1, 10, *range(50, len(whole), 101), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, DAMAGED)


@pytest.mark.parametrize("content", ["hello", [1, 2], {"step": 1}, 5])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    refused(path, DAMAGED)
    path.write_text("hello")
    refused(path, DAMAGED)


def test_pickled_code_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "harmful.pt"
    torch.save(CHECKPOINT | {"step": Harmful()}, path)
    refused(path, DAMAGED)
    assert not (tmp_path / "harm").exists()


def test_a_missing_or_foreign_one_is_named(tmp_path, path):
    refused(tmp_path / "missing.pt", "no such checkpoint")
    refused(tmp_path, "no such checkpoint")  # a folder
    for changes, message in [
        ({"script": "other"}, "a checkpoint of other.py, not of ddpm.py"),
        ({"format": FORMAT + 1}, "of another version of ddpm.py; train anew, or use that one"),
    ]:
        write(path, CHECKPOINT | changes)
        refused(path, message)
    unnumbered = {name: x for name, x in CHECKPOINT.items() if name != "format"}  # the first format
    write(path, unnumbered)
    refused(path, "of another version of ddpm.py")
