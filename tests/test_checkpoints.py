"""Checkpoints that are whole and fit, or are refused in one line."""

import copy
import os
import re
import warnings
import zipfile

from fused_ddpm.checkpoints import FORMAT, check_part, load_checkpoint
from fused_ddpm.files import UserError, write

import pytest
import torch

WEIGHT = torch.arange(40) * 0.37 - 5
CHECKPOINT = {"script": "ddpm", "format": FORMAT, "config": {}, "model": {"w": WEIGHT}}
CHECKPOINT |= {"step": 3, "history": {"steps": [2], "loss": [0.5]}, "losses": [0.25]}
CHECKPOINT |= {"facts": {"shape": [1, 8, 8], "class_names": ["a"]}}


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
        refused(path, f"{DAMAGED} (checksum)")


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


def test_what_unpacks_to_more_than_the_file_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("last/data.pkl", bytes(1 << 24))
    assert path.stat().st_size < 1 << 16
    refused(path, f"{DAMAGED} (packed)")


NAN = torch.tensor([1.0, float("nan")])


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"step": "3"}, "step"),
        ({"step": 4}, "history"),
        ({"step": -5, "history": {}, "losses": []}, "history"),
        ({"step": 10**9}, "history"),
        ({"config": None}, "config"),
        ({"history": {}}, "history"),
        ({"history": {"steps": [2], "loss": []}}, "history"),
        ({"history": {"steps": [2], "loss": ["0.5"]}}, "history"),
        ({"losses": [float("inf")]}, "history"),
        ({"losses": None}, "losses"),
        ({"facts": None}, "facts"),
        ({"facts": {"class_names": []}}, "KeyError"),
        ({"facts": {"shape": [1, 8], "class_names": []}}, "shape"),
        ({"facts": {"shape": [1, 8, "8"], "class_names": []}}, "shape"),
        ({"facts": {"shape": [0, 8, 8], "class_names": []}}, "shape"),
        ({"facts": {"shape": [1, 8, 9], "class_names": []}}, "shape"),
        ({"facts": {"shape": [1, 8, 8], "class_names": [], "scale": [1.0, 1.0]}}, "scale"),
        ({"facts": {"shape": [1, 8, 8], "class_names": [], "scale": 5}}, "TypeError"),
        ({"facts": {"shape": [1, 8, 8], "class_names": [5]}}, "class_names"),
        ({"model": {"w": NAN}}, "a number that is not finite"),
        ({"optimizer": {"state": {0: {"exp_avg": NAN * torch.inf}}}}, "a number that is not"),
        ({"model": {"w": torch.zeros(1).expand(10**12)}}, "a number that is not finite"),
    ],
)
def test_content_that_makes_no_sense_is_refused(path, changes, why):
    torch.save(CHECKPOINT | changes, path)
    refused(path, f"{DAMAGED} ({why}")


@pytest.mark.parametrize("name", ["step", "history", "losses", "facts", "config"])
def test_a_missing_part_is_named(path, name):
    torch.save({key: x for key, x in CHECKPOINT.items() if key != name}, path)
    refused(path, f"{DAMAGED} ({name})")


def test_torch_has_nothing_to_add(path):
    raw = path.read_bytes().replace(b"byteorder", b"byteordex")  # of which torch warns
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path.write_bytes(raw)
        try:
            load_checkpoint(path, "ddpm")
        except UserError:
            pass
    assert not said


# -- parts -----------------------------------------------------------------------------------------


def small_parts():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_its_own_state_fits():
    for part in small_parts():
        check_part(part, copy.deepcopy(part.state_dict()))
    fresh = torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
    check_part(fresh, small_parts()[1].state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("bias"), "bias is missing, or too much"),
        (lambda state: state.update(more=torch.ones(1)), "more is missing, or too much"),
        (lambda state: state.update(bias=torch.ones(3)), "bias is not torch.float32 of shape (2,)"),
        (lambda state: state.update(bias=torch.ones(2).long()), "bias is not torch.float32"),
        (lambda state: state.update(bias=torch.ones(2) + 1j), "bias is not torch.float32"),
        (lambda state: state.update(bias=[1.0, 2.0]), "bias is not torch.float32"),
    ],
)
def test_a_module_of_another_kind_does_not_fit(change, message):
    model, _ = small_parts()
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_part(model, state)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.clear(), "0 is missing, or too much"),
        (lambda state: state.pop(1), "1 is missing, or too much"),
        (lambda state: state[0].update(exp_avg=torch.ones(2, 1)), "0 is not torch.float32 of"),
        (lambda state: state[0].update(exp_avg_sq=torch.ones(2, 3).double()), "0 is not torch."),
    ],
)
def test_an_optimizer_of_another_kind_does_not_fit(change, message):
    _, optimizer = small_parts()
    state = copy.deepcopy(optimizer.state_dict())
    change(state["state"])
    with pytest.raises(ValueError, match=re.escape(message)):
        check_part(optimizer, state)
