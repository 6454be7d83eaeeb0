"""Samples on their way to disk: what numpy saves, gone on with only where all is the same."""

import os
import shutil

import cfg_ddpm
import ddpm
from fused_ddpm import samples as module
from fused_ddpm.images import DataError
from fused_ddpm.samples import Samples, read_labels, read_samples

import numpy as np
import pytest
import torch
from helpers import make_config
from PIL import Image

SHAPE = (3, 4, 5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "samples.npy"


def open_samples(path, n=10, dtype=torch.uint8, depends_on=(), script=ddpm, **changes):
    config = make_config(script, **dict(batch_size=4) | changes)
    return Samples(config, n, SHAPE, dtype, path, depends_on)


def some(n=10, dtype=torch.uint8):
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0))
    return (255 * x).byte() if dtype == torch.uint8 else x


def fill(samples, x, most=99):
    for index in list(samples.missing())[:most]:
        samples.put(index, x[index])


def first_of_each(samples):
    return [index[0].item() for index in samples.missing()]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_file_is_what_numpy_saves(tmp_path, path, dtype):
    x, samples = some(dtype=dtype), open_samples(path, dtype=dtype)
    for index in torch.randperm(10, generator=torch.Generator().manual_seed(0)).split(4):
        samples.put(index, x[index])
    assert not path.exists()
    gathered = samples.gather()
    assert gathered.dtype == dtype and torch.equal(gathered, x)
    samples.keep()
    np.save(tmp_path / "expected.npy", x.movedim(1, -1).numpy())
    assert path.read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert os.listdir(path.parent) == ["samples.npy"]
    assert torch.equal(gathered, x)  # also after the file has moved


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_in_memory_it_is_the_same(dtype):
    x, samples = some(dtype=dtype), open_samples(None, dtype=dtype)
    assert first_of_each(samples) == [0, 4, 8]
    fill(samples, x)
    assert samples.gather().dtype == dtype and torch.equal(samples.gather(), x)


def test_what_was_gathered_can_be_changed_without_the_file(path):
    samples, x = open_samples(path), some()
    fill(samples, x)
    samples.gather().fill_(0)
    assert torch.equal(samples.gather(), x)


def test_layout_of_memory_does_not_matter(path):
    x, samples = some(), open_samples(path)
    for index in samples.missing():
        samples.put(index, x[index].contiguous(memory_format=torch.channels_last))
    assert torch.equal(samples.gather(), x)


def test_it_goes_on_with_what_is_there(path, capsys):
    x, weights = some(), [torch.randn(3), torch.tensor(True), torch.tensor(2.0)]
    samples = open_samples(path, depends_on=weights)
    samples.put(torch.arange(4, 8), x[4:8])
    same = dict(out_dir="elsewhere", steps=99, epochs=None, resume=True, data_dir="gone")
    again = open_samples(path, depends_on=[w.clone() for w in weights], **same)
    assert "samples.npy: 4 of 10 are there from an earlier run" in capsys.readouterr().out
    assert first_of_each(again) == [0, 8]
    with pytest.raises(DataError, match="some are missing"):
        again.gather()
    by_three = open_samples(path, depends_on=weights, batch_size=3)
    assert first_of_each(by_three) == [0, 3, 6, 9]  # 3 and 6 lack a part
    fill(again, x)
    assert torch.equal(again.gather(), x)
    assert first_of_each(open_samples(path, depends_on=weights)) == []


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(sample_steps=7),
        dict(eta=0.5),
        dict(data="mnist"),
        dict(n=9),
        dict(bfloat16=True),
        dict(dtype=torch.float32),
        dict(depends_on=[torch.ones(3) + 1e-6]),
        dict(depends_on=[torch.ones(3), torch.ones(1)]),
        dict(script=cfg_ddpm),
        dict(script=cfg_ddpm, guidance_scale=2.0),
    ],
    ids="+".join,
)
def test_of_anything_else_nothing_remains(path, change):
    first = dict(depends_on=[torch.ones(3)])
    samples = open_samples(path, **first)
    fill(samples, some())
    other = open_samples(path, **first | change)
    assert not other.done.any() and len(other.done) == change.get("n", 10)
    back = open_samples(path, **first)  # nor of the other
    assert not back.done.any() and first_of_each(back) == [0, 4, 8]


def test_a_file_of_another_kind_in_its_place_is_replaced(path):
    path.parent.mkdir()
    for content in (b"", b"hello", b"\x93NUMPY" + bytes(2000)):
        path.with_name("samples.npy.part").write_bytes(content)
        samples = open_samples(path)
        assert not samples.done.any()
        fill(samples, some())
        assert torch.equal(samples.gather(), some())


def test_a_sample_counts_only_once_it_is_on_disk(path, monkeypatch):
    synced, samples = [], open_samples(path)
    sync = os.fsync

    def watch(file):
        flags = path.with_name("samples.npy.part").read_bytes()[samples.flags :][:10]
        synced.append(flags.count(1))
        sync(file)

    monkeypatch.setattr(module.os, "fsync", watch)
    fill(samples, some(), most=1)
    assert synced == [0, 4]  # the images, then their flags


def test_a_run_cut_off_while_it_writes_leaves_no_flag(path, monkeypatch):
    samples = open_samples(path)
    fill(samples, some(), most=1)

    def cut_off(file):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(module.os, "fsync", cut_off)
        with pytest.raises(KeyboardInterrupt):
            samples.put(torch.arange(4, 8), some()[4:8])
    assert first_of_each(open_samples(path)) == [4, 8]


def test_a_kill_between_the_moves_leaves_a_good_file(path, monkeypatch):
    samples, x = open_samples(path), some()
    fill(samples, x)
    samples.gather()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "truncate", killed)
    with pytest.raises(KeyboardInterrupt):
        samples.keep()
    assert np.array_equal(np.load(path), x.movedim(1, -1).numpy())


def test_what_is_no_longer_wanted_is_gone(path):
    samples = open_samples(path)
    fill(samples, some())
    gathered = samples.gather()
    samples.discard()
    assert not os.listdir(path.parent) and torch.equal(gathered, some())


@pytest.mark.parametrize("on_disk", [True, False])
def test_processes_share_the_batches_out(path, monkeypatch, on_disk):
    monkeypatch.setattr(module, "world", lambda: 3)
    open_samples(path if on_disk else None, n=30)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(module, "rank", lambda: rank)  # noqa: B023
        share = list(open_samples(path if on_disk else None, n=30).missing())
        assert 2 <= len(share) <= 3  # of eight batches
        shares += share
    assert torch.cat(shares).sort().values.tolist() == list(range(30))


def test_only_the_first_process_touches_the_file(path, monkeypatch):
    samples, x = open_samples(path), some()
    fill(samples, x, most=2)
    monkeypatch.setattr(module, "rank", lambda: 1)
    other = open_samples(path)
    other.put(torch.arange(8, 10), x[8:])  # its share
    gathered = other.gather()
    other.keep()
    assert os.listdir(path.parent) == ["samples.npy.part"] and torch.equal(gathered, x)


def test_a_full_disk_or_no_folder_is_an_error_for_the_user(tmp_path, path):
    samples = open_samples(path)
    samples.file.close()
    samples.file = open("/dev/full", "r+b", buffering=0)
    cure = r"part: cannot be written .*No space left.*--resume or the same --sample"
    with pytest.raises(DataError, match=cure):
        samples.put(torch.arange(2), some()[:2])
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="cannot be written"):
        open_samples(tmp_path / "text" / "samples.npy")


def test_labels_and_samples_of_a_folder_by_class_keep_their_order(tmp_path):
    """Each class's last tenth, which load_images calls the test part, stays with its class."""
    for i in range(24):
        path = tmp_path / "pngs" / "ab"[i // 12] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i).save(path)
    samples = read_samples(tmp_path / "pngs")
    assert samples.shape == (24, 1, 8, 8)
    assert samples[:, 0, 0, 0].tolist() == [10 * i for i in range(24)]
    np.save(tmp_path / "labels.npy", np.arange(24) // 12)
    assert read_labels(tmp_path / "labels.npy", 24, 2).tolist() == [0] * 12 + [1] * 12


def test_images_of_a_folder_are_square_complete_and_of_bytes(tmp_path):
    holes = np.full((8, 8, 2), 100, np.uint8)
    holes[:4, :, 1] = 0
    for name, image in {
        "wide": Image.new("L", (16, 8)),
        "deep": Image.fromarray(np.full((8, 8), 1000, np.uint16)),
        "holes": Image.fromarray(holes),
    }.items():
        (tmp_path / name).mkdir()
        for i in range(3):
            image.save(tmp_path / name / f"{i}.png")
        said = f"{name}: its images must be square, complete, of 8 bits and no arrays"
        with pytest.raises(DataError, match=said):
            read_samples(tmp_path / name)


def test_a_folder_in_its_place_is_found_at_the_start(path):
    path.mkdir(parents=True)
    with pytest.raises(DataError, match=r"samples.npy: is a folder"):
        open_samples(path)


def test_more_than_the_disk_holds_is_found_at_the_start(path, monkeypatch):
    usage = shutil.disk_usage(path.parent.parent)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=700))
    with pytest.raises(DataError, match=r"part: takes 7\.28e-07 GB, and 7e-07 GB are free; make"):
        open_samples(path)
    assert not os.listdir(path.parent)
