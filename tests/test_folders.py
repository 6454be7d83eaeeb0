"""Folders with incomplete or deep images: tiles, parts, scale, nothing read behind holes."""

import ast
import os
import time

import ddpm
import sparse_ddpm
import toy_diffusion
from fused_ddpm import folders
from fused_ddpm.files import UserError
from fused_ddpm.folders import load_folder, starts
from fused_ddpm.images import Data, DataError, load_images, load_part, to_float
from fused_ddpm.pixels import Scale

import numpy as np
import pytest
import torch
from helpers import make_config
from PIL import Image

RNG = np.random.default_rng(0)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)
    return path


def holed(height=40, width=50, channels=3, share=0.3):
    """uint8 with alpha, and garbage under the holes."""
    array = RNG.integers(0, 256, (height, width, channels + 1), dtype=np.uint8)
    array[..., -1] = np.where(RNG.random((height, width)) < share, 0, 255)
    return array


def both_parts(folder, size, **options):
    return [load_folder(folder, size, train, **options) for train in (True, False)]


def test_starts():
    assert starts(32, 32, 16) == [0] and starts(20, 32, 16) == [0]
    assert starts(33, 32, 16) == [0, 1] and starts(64, 32, 16) == [0, 16, 32]
    assert starts(70, 32, 32) == [0, 32, 38]
    for length in range(1, 100):
        covered = {i for start in starts(length, 8, 4) for i in range(start, start + 8)}
        assert covered >= set(range(length)) and len(set(starts(length, 8, 4))) == len(
            starts(length, 8, 4)
        )


def test_tiles_are_the_files_pixels(tmp_path):
    y, x = np.mgrid[:40, :50]
    array = (1000.0 * y + x).astype(np.float32)  # a value says where it is from
    holes = RNG.random(array.shape) < 0.3
    save(tmp_path / "a.npy", np.where(holes, np.nan, array).astype(np.float32))
    parts, places = both_parts(tmp_path, 16), {}
    scale = parts[0].scale
    for train, part in zip((True, False), parts, strict=True):
        assert part.images.shape[1:] == part.observed.shape[1:] == (1, 16, 16)
        assert part.images.dtype == torch.float32 and part.observed.dtype == torch.bool
        assert (part.images[~part.observed] == 0).all() and part.scale == scale
        places[train] = []
        for tile, seen in zip(part.images[:, 0].numpy(), part.observed[:, 0].numpy(), strict=True):
            inside = seen & (np.abs(tile) < 1)
            values = scale.to_values(tile, np.float64).round()
            row, column = np.argwhere(inside)[0]
            row, column = divmod(values[row, column], 1000) - np.array([row, column])
            at = slice(int(row), int(row) + 16), slice(int(column), int(column) + 16)
            assert np.array_equal(seen, ~holes[at])
            assert np.array_equal(values[inside], array[at][inside])
            places[train].append((int(row), int(column)))
    grid = [(row, column) for row in (0, 8, 16, 24) for column in (0, 8, 16, 24, 32, 34)]
    assert places[False] == grid[-2:]
    apart = [(r, c) for r, c in grid if r <= 8 or c <= 16]  # no pixel of the test part
    assert places[True] == apart


def test_validation_tiles_share_no_pixel_with_those_trained_on(tmp_path):
    """And are not mixed with them where images are shuffled; of few tiles any will do."""
    y, x = np.mgrid[:200, :64]
    save(tmp_path / "a.npy", (y / 4 + 100 * (x // 8)).astype(np.float32))  # two numbers in one
    place = lambda tile, scale: divmod(scale.to_values(tile, np.float64)[0].min(), 100)
    train, _ = both_parts(tmp_path, 16)
    at = [place(tile, train.scale) for tile in train.images.numpy()]
    assert len(train) // 12 <= train.validation <= len(train) // 5
    for column, row in at[: train.validation]:
        for c, r in at[train.validation :]:
            assert abs(column - c) >= 2 or abs(row - r) >= 4 - 1e-3
    data = Data(make_config(sparse_ddpm, data=str(tmp_path), image_size=16))
    held_out = data.held_out["val"][1].images
    first = {tile.numpy().tobytes() for tile in train.images[: train.validation]}
    assert {tile.numpy().tobytes() for tile in held_out} == first
    assert len(data.images) == len(train) - train.validation
    save(tmp_path / "a.npy", RNG.random((40, 20), np.float32))
    for kept in (folders.list_folder, folders.survey, folders.plan_tiles):
        kept.cache_clear()
    assert both_parts(tmp_path, 16)[0].validation == 0


def test_the_last_row_and_column_of_tiles_end_at_the_border_and_small_images_are_padded(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", np.full((10, 20), 50 + i, np.uint8))
    train, test = both_parts(tmp_path, 16, crop=True)
    assert len(train) == 6 and len(test) == 1 and train.images.dtype == torch.uint8
    assert train.scale is None and train.observed[:, :, :10].all()
    assert not train.observed[:, :, 10:].any() and (train.images[:, :, 10:] == 0).all()
    assert train.images[:, 0, 0, 0].tolist() == [50, 50, 51, 51, 52, 52]  # 0 and 4 along 20
    whole, _ = both_parts(tmp_path, 8, crop=True)
    assert whole.observed is None and (whole.images >= 50).all()


def test_parts_by_class_and_empty_tiles(tmp_path):
    for label, name in enumerate(["ant", "bee"]):
        for i in range(20):
            array = np.full((8, 16, 4), 100 * label + i, np.uint8)
            array[..., 3] = 255
            array[:, 8:, 3] = 0
            array[0, 8 : 8 + i % 3, 3] = 255  # 0, 1 or 2 pixels of the second half
            save(tmp_path / name / f"{i:02d}.png", array)
    train, test = both_parts(tmp_path, 8)
    count = 20 + 20 + 6  # of a class: first and middle tiles of 20 images, 6 that have 2 pixels
    assert len(train) + len(test) <= 2 * count and test.labels.tolist() == [0] * 4 + [1] * 4
    assert train.observed.flatten(1).sum(1).min() == 2
    assert train.labels.bincount()[0] == train.labels.bincount()[1] > 35
    shown = lambda part: {int(image.max()) for image in part.images}
    assert not shown(train) & shown(test)


def test_tiles_lie_side_by_side_where_there_are_many(tmp_path, monkeypatch):
    save(tmp_path / "a.npy", RNG.normal(size=(64, 64)).astype(np.float32))
    overlapping = sum(map(len, both_parts(tmp_path, 8)))
    folders.plan_tiles.cache_clear()
    monkeypatch.setattr(folders, "MANY_TILES", 15 * 15)
    assert sum(map(len, both_parts(tmp_path, 8))) == 64 < overlapping


def test_headers_of_arrays_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """Files are read in several threads; CPython 3.11 may fail where two of them parse."""
    for i in range(12):
        values, mask = RNG.random((8, 8), np.float32), RNG.random((8, 8)) < 0.5
        np.savez(tmp_path / f"{i}.npz", image=values, mask=mask)
    parse, inside, most, calls = ast.literal_eval, [], [], []

    def slow(text):
        inside.append(text)
        calls.append(text)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", slow)
    assert sum(map(len, both_parts(tmp_path, 8))) == 12
    assert len(calls) >= 36 and max(most) == 1  # of 12 headers alone, of images and of masks


def test_nothing_behind_the_holes_is_read(tmp_path):
    names = {"clean": lambda hidden: 0 * hidden, "garbage": lambda hidden: hidden}
    found = {}
    y, x = np.mgrid[:60, :60]
    for name, make in names.items():
        rng = np.random.default_rng(1)
        for i in range(3):
            noise = rng.normal(size=(60, 60, 2)) * 1e6
            holes = rng.random((60, 60, 1)) < 0.5
            array = np.stack([np.sin(y / 9 + i), np.cos(x / 7)], axis=-1)
            array = np.where(holes, make(noise), array).astype(np.float32)
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            np.savez(folder / f"{i}.npz", image=array, mask=~holes[..., 0])
        found[name] = both_parts(tmp_path / name, 16)
    nans = tmp_path / "nan"
    nans.mkdir()
    for i in range(3):
        with np.load(tmp_path / "garbage" / f"{i}.npz") as file:
            array = np.where(file["mask"][..., None], file["image"], np.nan)
            np.save(nans / f"{i}.npy", array.astype(np.float32))
    found["nan"] = both_parts(nans, 16)
    for name in ("garbage", "nan"):
        for one, other in zip(found["clean"], found[name], strict=True):
            assert torch.equal(one.images, other.images) and one.scale == other.scale
            assert torch.equal(one.observed, other.observed)
    train, _ = found["clean"]
    assert -1.2 < train.scale.low < -1 and 1 < train.scale.high < 1.2


def test_channels_of_a_folder(tmp_path):
    for i in range(3):
        save(tmp_path / "mixed" / f"{i}.png", holed())
        save(tmp_path / "two" / f"{i}.npy", RNG.normal(size=(20, 20, 2 + i // 2)))
        save(tmp_path / "bytes" / f"{i}.png", RNG.integers(0, 255, (20, 20)).astype(np.uint8))
    save(tmp_path / "mixed" / "grey.png", RNG.integers(0, 255, (40, 40), dtype=np.uint8))
    mixed = load_folder(tmp_path / "mixed", 16, True)
    assert mixed.images.shape[1] == 3 and mixed.images.dtype == torch.uint8
    with pytest.raises(DataError, match=r"as many channels, but 1\.npy has 2, 2\.npy has 3"):
        load_folder(tmp_path / "two", 16, True)
    save(tmp_path / "bytes" / "deep.tif", RNG.integers(0, 9999, (20, 20)).astype(np.uint16))
    with pytest.raises(DataError, match=r"0\.png has 8 bits and deep\.tif has not"):
        load_folder(tmp_path / "bytes", 16, True)


def test_opaque_alpha_is_no_hole(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", np.full((40, 60, 4), 10 * i + 1, np.uint8))
        save(tmp_path / f"{i}.mask.png", np.ones((40, 60), np.uint8))  # no image of the folder
    images, _ = load_images(str(tmp_path), image_size=16)
    assert images.shape == (3, 3, 16, 16) and images[:, 0, 0, 0].tolist() == [1, 11, 21]
    part = load_folder(tmp_path, 16, True, missing=50)
    assert part.observed is None and torch.equal(part.images, images)
    with pytest.raises(DataError, match=r"1\.png: has no observed pixel"):
        load_folder(tmp_path, 16, True, missing=11)


def test_a_turned_photo_is_upright_in_its_tiles(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    array = holed(16, 32)
    for i in range(3):
        Image.fromarray(array).save(tmp_path / f"{i}.png", exif=exif)
    part = load_folder(tmp_path, 16, True)
    upright = np.rot90(array, -1)[:16]
    seen = upright[..., 3] > 0
    assert np.array_equal(part.observed[0, 0].numpy(), seen)
    assert np.array_equal(part.images[0].permute(1, 2, 0).numpy()[seen], upright[seen][:, :3])


def test_a_folder_that_cannot_be_read_to_the_end(tmp_path, monkeypatch):
    for name in "ab":
        for i in range(3):
            save(tmp_path / name / "deeper" / f"{i}.png", np.zeros((8, 8), np.uint8))
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("a/deeper"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"cannot be read .*Permission denied.*a/deeper"):
        load_images(str(tmp_path), image_size=8)


def test_too_small_a_folder(tmp_path):
    save(tmp_path / "a.png", holed(16, 16))
    said = "gives 0 tiles of 16x16 that share no pixel with a test tile; at least 2"
    with pytest.raises(DataError, match=said):
        load_folder(tmp_path, 16, True)


# -- Data ------------------------------------------------------------------------------------------


def config_for(folder, **more):
    return make_config(sparse_ddpm, data=str(folder), **more)


@pytest.fixture
def metres(tmp_path):
    y, x = np.mgrid[:96, :96]
    depth = (-3000 + 20 * y + 9 * x).astype(np.float32)
    depth[RNG.random(depth.shape) < 0.4] = -9999
    save(tmp_path / "sea" / "a.npy", depth)
    return tmp_path / "sea"


def test_data_of_incomplete_images(metres):
    data = Data(config_for(metres, missing=-9999.0))
    assert data.shape == (1, 16, 16) and data.images.dtype == torch.float32
    seen = data.train.observed
    assert seen.shape == data.images.shape and seen.dtype == torch.bool
    assert 0.5 < seen.float().mean() < 0.7
    assert (data.images[~seen] == 0).all() and to_float(data.images) is data.images
    few = data.test_part(5)
    assert len(few) == 5 and few.observed.shape == few.images.shape
    assert (few.images[~few.observed] == 0).all()
    for _, part in data.held_out.values():
        assert len(part.observed) == len(part) and (part.images[~part.observed] == 0).all()
        assert (part.images[part.observed] != 0).float().mean() > 0.99
    low, high = data.facts["scale"]
    assert -3150 < low < -3000 and -800 < high < -500  # the test part, to -245, is not asked
    later = Data(config_for(metres, missing=-9999.0), data.facts)
    assert torch.equal(later.test_part(9).images, data.test_part(9).images)
    assert later.facts == data.facts and later.test_part(9).scale == data.test_part(9).scale


def test_a_checkpoints_scale_is_used(metres):
    facts = {"shape": [1, 16, 16], "class_names": [], "scale": [-10_000.0, 10_000.0]}
    data = Data(config_for(metres, missing=-9999.0), facts)
    assert data.facts == facts and data.test_part(9).scale == Scale(-10_000.0, 10_000.0)
    seen = data.test_part(9).observed
    values = data.test_part(9).images[seen]
    assert values.min() > -0.3 and values.max() < 0
    said = "the checkpoint is for 8-bit images, this has other values"
    with pytest.raises(UserError, match=said):
        Data(config_for(metres, missing=-9999.0), facts | {"scale": None}).test_part(1)
    facts["shape"][0] = 3
    with pytest.raises(UserError, match="the checkpoint is for other values, this has 8-bit"):
        Data(config_for("shapes"), facts).test_part(1)


def test_scripts_that_do_not_learn_from_incomplete_images_say_so(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", holed())
    said = r"has missing pixels; only sparse_ddpm.py learns from such images"
    with pytest.raises(UserError, match=said):
        Data(make_config(ddpm, data=str(tmp_path))).shape  # noqa: B018
    with pytest.raises(UserError, match=said):
        toy_diffusion.load_images(str(tmp_path), image_size=16)


def test_flags_of_folders_only():
    with pytest.raises(DataError, match="--missing -1: is for folders of images"):
        load_part("shapes", "data", 16, True, missing=-1.0)
    with pytest.raises(DataError, match="--crop: is for folders of images"):
        load_part("shapes", "data", 16, True, crop=True)
