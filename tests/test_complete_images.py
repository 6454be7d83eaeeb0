"""complete_images.py: what was read stays, the rest is drawn, and one can learn from the result."""

import complete_images as script
import ddpm
import sparse_ddpm
from fused_ddpm.images import Data, load_images, to_bytes
from fused_ddpm.masks import observe
from fused_ddpm.pixels import read_picture

import numpy as np
import pytest
import torch
from helpers import exits_with, load, run_tiny
from PIL import Image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of drawn shapes, of which half was read."""
    folder = tmp_path_factory.mktemp("lap")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_ddpm.images.SHAPES_COUNT", {True: 240, False: 40})
        run_tiny(sparse_ddpm, folder / "run", "--observed-only", "0.5", "--no-baselines")
    return folder / "run" / "last.pt"


def complete(checkpoint, out, *flags):
    script.main([str(checkpoint), "--device", "cpu", "--out-dir", str(out), *map(str, flags)])
    return sorted(out.glob("*/*.png"))


def test_what_was_read_stays_and_the_rest_is_drawn(checkpoint, tmp_path):
    files = complete(checkpoint, tmp_path / "out", "--num-images", 50)
    config = sparse_ddpm.Config(**load(checkpoint)["config"] | {"device": "cpu"})
    data = Data(config)
    assert len(files) == 50 and sorted(int(path.stem) for path in files) == list(range(50))
    index, drawn = torch.arange(50), []
    x, observed = observe(data.train[index], index, 0.5)
    for path in files:
        i = int(path.stem)
        assert path.parent.name == data.class_names[data.train.labels[i]]
        image = np.asarray(Image.open(path))
        seen = observed[i, 0].numpy()
        assert seen.sum() == 128 and image.shape == (16, 16, 3)
        assert np.array_equal(image[seen], to_bytes(x[i]).movedim(0, -1).numpy()[seen])
        drawn.append(image[~seen])
    assert np.std(np.stack(drawn), axis=0).mean() > 5 and all(d.std() > 1 for d in drawn)
    run_tiny(sparse_ddpm, tmp_path / "lap", "--data", str(tmp_path / "out"), "--steps", "1")
    whole = load(tmp_path / "lap/last.pt")["config"]
    assert whole["observed_only"] is None  # of whole images


def test_it_goes_on_and_depends_on_the_seed_alone(checkpoint, tmp_path, capsys):
    files = complete(checkpoint, tmp_path / "all", "--num-images", 40)
    first = {path.name: path.read_bytes() for path in files}
    complete(checkpoint, tmp_path / "parts", "--num-images", 16)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*/*.png")}
    parts = complete(checkpoint, tmp_path / "parts", "--num-images", 40, "--batch-size", 8)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    difference = [
        np.abs(np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b))).max()
        for a, b in zip(files, parts, strict=True)
    ]
    assert [path.name for path in parts] == [path.name for path in files] and max(difference) <= 1
    call = lambda: complete(checkpoint, tmp_path / "all", "--num-images", 40, "--seed", 1)
    assert "holds images of another checkpoint or seed" in exits_with(1, capsys, call)
    other = complete(checkpoint, tmp_path / "other", "--num-images", 40, "--seed", 1)
    assert all(path.read_bytes() != first[path.name] for path in other)


def test_values_of_other_kinds_come_in_their_units(tmp_path):
    """Metres with gaps, as .npy files: tiles of them, without a gap."""
    rng, sea = np.random.default_rng(0), tmp_path / "sea"
    sea.mkdir()
    for i in range(6):
        metres = -1000 + 500 * rng.random((32, 32)).astype(np.float32)
        metres[rng.random(metres.shape) < 0.4] = np.nan
        np.save(sea / f"{i}.npy", metres)
    run_tiny(sparse_ddpm, tmp_path / "run", "--data", str(sea), "--no-baselines", "--steps", "2")
    script.main([str(tmp_path / "run/last.pt"), "--device", "cpu"])
    files = sorted((tmp_path / "run/completed").glob("*.npy"))
    assert len(files) > 10
    for path in files:
        values = read_picture(path).values
        assert values.shape == (16, 16, 1) and values.dtype == np.float32
        assert np.isfinite(values).all() and -1060 < values.min() and values.max() < -440
    images, _ = load_images(str(tmp_path / "run/completed"), image_size=16)
    assert images.dtype == torch.float32


def test_bad_arguments_end_in_one_line(checkpoint, tmp_path, capsys):
    run_tiny(sparse_ddpm, tmp_path / "whole", "--no-baselines", "--steps", "1")
    run_tiny(ddpm, tmp_path / "other", "--steps", "1")
    changed = load(checkpoint)
    changed["facts"]["images"] = "0"
    torch.save(changed, tmp_path / "changed.pt")
    for path, said in (
        (tmp_path / "whole/last.pt", "has learnt from whole images"),
        (tmp_path / "other/last.pt", "a checkpoint of ddpm.py, not of sparse_ddpm.py"),
        (tmp_path / "changed.pt", "other images than the run was made with"),
        (tmp_path / "none.pt", "no such checkpoint"),
    ):
        call = lambda: complete(path, tmp_path / "out")  # noqa: B023
        assert said in exits_with(1, capsys, call)
    assert not (tmp_path / "out").exists()
    call = lambda: complete(checkpoint, tmp_path / "out", "--num-images", 0)
    assert "--num-images" in exits_with(2, capsys, call)
