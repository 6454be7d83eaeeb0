"""fill_images.py: images of any size and type, in tiles, from a checkpoint of a second's run."""

import csv
from dataclasses import replace

import fill_images
import sparse_ddpm
from fused_ddpm import seeded_normal
from fused_ddpm.files import occupied
from fused_ddpm.linear import where_next
from fused_ddpm.masks import in_parts
from fused_ddpm.pixels import read_picture, upright
from fused_ddpm.tiles import Tiles

import numpy as np
import pytest
import torch
from helpers import away_from_zero, exits_with, make_config, run_tiny
from PIL import Image

SHAPE = 3, 16, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fill")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """Of 8-bit colour, trained on incomplete images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_ddpm.images.SHAPES_COUNT", {True: 240, False: 40})
        run_tiny(sparse_ddpm, folder / "run", "--observed-only", "0.5", "--no-baselines")
    return folder / "run" / "last.pt"


@pytest.fixture(scope="module")
def deep_checkpoint(folder, checkpoint):
    """Of one channel of depths, from -4000 to 100 metres."""
    config = make_config(sparse_ddpm)
    model = sparse_ddpm.make_model((1, 16, 16), config)
    saved = torch.load(checkpoint, weights_only=True)
    facts = {"shape": [1, 16, 16], "class_names": [], "scale": [-4000.0, 100.0]}
    saved |= {"ema": model.state_dict(), "facts": facts}
    torch.save(saved, folder / "deep.pt")
    return folder / "deep.pt"


def fill(checkpoint, path, out, *flags):
    fill_images.main([str(checkpoint), str(path), "--out-dir", str(out), *flags])
    return out


def rgba(path, height=29, width=37, seen=0.2, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(rng.random((height, width)) < seen, rng.integers(1, 256), 0)
    Image.fromarray(pixels).save(path)
    return pixels


# -- one reverse process over all tiles ------------------------------------------------------------


@pytest.mark.parametrize("observed_only", [None, 0.5])
def test_an_image_of_one_tile_is_what_the_script_draws(observed_only):
    config = make_config(sparse_ddpm, observed_only=observed_only, batch_size=4)
    model = away_from_zero(sparse_ddpm.make_model(SHAPE, config)).eval()
    model.fill.scored.fill_(0.3)
    image, observed = 2 * torch.rand(SHAPE) - 1, torch.rand(16, 16) < 0.3
    seeds = torch.tensor([5, 6])
    unread = torch.where(observed, image, torch.nan)
    *_, draws = fill_images.sample(model, unread, observed, seeds, config)
    parts = model.fill.parts((~observed).float().mean().item())
    sample = sparse_ddpm.make_sampler(model, SHAPE, config, parts if observed_only else None)
    cond, mask = (image * observed).expand(2, -1, -1, -1), observed.expand(2, 1, -1, -1)
    *_, expected = sample(seeds, cond, mask)
    assert torch.equal(draws[:, :, observed], image[:, observed].expand(2, -1, -1))
    torch.testing.assert_close(draws, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("observed_only", [None, 0.5])
def test_a_prediction_pixel_by_pixel_has_no_seams(monkeypatch, observed_only):
    """A network that looks at a pixel alone must give the same in tiles as in one piece."""

    def predict(model, x_t, t, context, alphas_cumprod, config):
        state = context[2]
        return torch.where(state, torch.tanh(2 * x_t) / 2 + 0.1 * x_t**2, 9.0), None

    def nobodys(wanted, side):  # no noise is coupled: it would be other noise in other tiles
        tiles = Tiles(wanted, side)
        tiles.nearest.fill_(-1)
        return tiles

    monkeypatch.setattr(fill_images, "predict", predict)
    monkeypatch.setattr(fill_images, "Tiles", nobodys)
    image, observed = 2 * torch.rand(3, 34, 34) - 1, torch.rand(34, 34) < 0.3
    results = []
    for side in (16, 34):
        config = make_config(sparse_ddpm, observed_only=observed_only, image_size=side)
        model = sparse_ddpm.make_model((3, side, side), config)
        model.fill.scored.fill_(0.25)
        *_, draws = fill_images.sample(model, image, observed, torch.tensor([1, 2]), config)
        results.append(draws)
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    assert results[0][:, :, ~observed].abs().max() < 1  # and never the 9


def test_noise_that_makes_parts_fit_together_is_white_over_all_tiles(monkeypatch):
    """Within a part, that is: there values have variance 1, and neighbours do not hang together."""
    config = make_config(sparse_ddpm, observed_only=0.5, batch_size=64, sample_steps=2)
    model, place = sparse_ddpm.make_model((1, 16, 16), config), torch.arange(16.0)
    place, started = torch.cartesian_prod(place, place), []
    near = (-((torch.cdist(place, place) / 2) ** 2)).exp()
    model.fill.covariance.copy_(near + 0.01 * torch.eye(256))
    model.fill.load_state_dict(model.fill.state_dict())
    model.fill.scored.fill_(0.3)

    def step(x_t, *rest):
        started.append(x_t)
        return x_t

    monkeypatch.setattr(fill_images, "posterior_step", step)
    observed = torch.rand(27, 38, generator=torch.Generator().manual_seed(0)) < 0.2
    seeds = torch.arange(40) * 999
    list(fill_images.sample(model, torch.zeros(1, 27, 38), observed, seeds, config))
    x, there = started[0][:, 0], ~observed
    assert (x == seeded_normal(seeds, (1, 27, 38))[:, 0])[:, there].float().mean() < 0.01
    n = 40 * int(there.sum())
    assert x[:, there].mean().abs() < 4 / n**0.5 and (x[:, there].var() - 1).abs() < 6 / n**0.5
    seen = observed.expand(40, 1, 27, 38)
    parts = model.fill.parts((~observed).float().mean().item())
    parts = torch.cat([state for state, _ in in_parts(seeds, seen, parts, 0.0, config)], dim=1)
    for down, right in (0, 1), (1, 0), (1, 1), (0, 2), (2, 0):
        product = x[:, None, : 27 - down, : 38 - right] * x[:, None, down:, right:]
        same = (parts[:, :, : 27 - down, : 38 - right] & parts[:, :, down:, right:]).any(1)[:, None]
        both = there[: 27 - down, : 38 - right] & there[down:, right:]
        assert product[same].mean().abs() < 4 / same.sum() ** 0.5
        if down + right == 1:  # what it is for
            assert product[both & ~same].mean() > 0.3


def test_tiles_cover_what_is_wanted_and_no_more():
    wanted = torch.zeros(20, 70, dtype=torch.bool)
    wanted[5:9, 40:44] = True
    tiles = Tiles(wanted, 32)
    assert tiles.pad(wanted).shape == (32, 70) and tiles.trim(tiles.pad(wanted)).equal(wanted)
    assert tiles.at == [(slice(0, 32), slice(x, x + 32)) for x in (16, 32, 38)]
    total = torch.zeros(32, 70)
    for at in tiles.at:
        total[at] += tiles.window
    torch.testing.assert_close((total / tiles.weight)[tiles.pad(wanted)], torch.ones(16))
    assert tiles.nearest[0, 30:].tolist() == [0] * 10 + [1] * 11 + [2] * 19


def test_draws_of_a_large_image_hang_on_neither_batch_nor_other_files(folder, checkpoint):
    (folder / "some").mkdir()
    rgba(folder / "some" / "b.png")
    fill(checkpoint, folder / "some" / "b.png", folder / "alone", "--batch-size", "3")
    rgba(folder / "some" / "a.png", 16, 16, seed=1)
    fill(checkpoint, folder / "some", folder / "both", "--batch-size", "64")
    one, other = (np.load(folder / out / "b.draws.npy") for out in ("alone", "both"))
    assert one.shape == (2, 29, 37, 3)
    np.testing.assert_allclose(one.astype(int), other.astype(int), atol=1)
    fill(checkpoint, folder / "some" / "b.png", folder / "seed", "--seed", "1")
    assert (np.load(folder / "seed" / "b.draws.npy") != one).mean() > 0.3


# -- where to measure next -------------------------------------------------------------------------


def test_where_next_is_pivoted_cholesky_of_the_covariance_it_says():
    """Against conditioning a Gaussian anew on all that is chosen, in closed form."""
    rng = np.random.default_rng(0)
    observed = rng.random((6, 7)) < 0.3
    draws = rng.normal(size=(5, 6, 7, 1)) * rng.random((6, 7, 1))
    std = np.where(observed, 0, draws.std(0, ddof=1)[..., 0]).ravel()
    y, x = np.unravel_index(np.arange(42), (6, 7))
    square = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    width = 1 / observed.mean() ** 0.5 / 3
    cov = std[:, None] * std * np.exp(-square / (2 * width**2))
    chosen, left = [], cov
    for row, column, removed, share in where_next(draws, observed, 6):
        assert row * 7 + column == left.diagonal().argmax()
        chosen.append(row * 7 + column)
        given = cov[:, chosen] @ np.linalg.inv(cov[np.ix_(chosen, chosen)]) @ cov[chosen]
        assert removed == pytest.approx(left.trace() - (cov - given).trace(), rel=1e-4)
        left = cov - given
        assert share == pytest.approx(1 - left.trace() / cov.trace(), rel=1e-4)
    assert len(chosen) == len(set(chosen)) == 6
    assert len(where_next(draws, observed, 100)) <= (~observed).sum()


# -- files -----------------------------------------------------------------------------------------


def test_a_photo_with_alpha(folder, checkpoint, capsys):
    pixels = rgba(folder / "photo.png")
    out = fill(checkpoint, folder / "photo.png", folder / "photo")
    with Image.open(out / "photo.png") as image:
        filled = np.asarray(image)
        assert image.mode == "RGBA" and image.size == (37, 29)
    seen = pixels[..., 3] > 0
    assert (filled[seen] == pixels[seen]).all() and (filled[~seen, 3] == 255).all()
    draws, std, limits = (np.load(out / f"photo.{k}.npy") for k in ("draws", "std", "quantiles"))
    assert draws.dtype == np.uint8 and (draws[:, seen] == pixels[seen, :3]).all()
    assert std.shape == (29, 37, 3) and (std[seen] == 0).all() and (std[~seen] > 0).mean() > 0.9
    np.testing.assert_allclose(draws.mean(0), filled[..., :3], atol=1.01)
    np.testing.assert_allclose(draws.std(0, ddof=1), std, atol=1.01)
    assert limits.shape == (3, 29, 37, 3) and (np.diff(limits, axis=0) >= 0).all()
    assert (limits[:, seen] == pixels[seen, :3]).all()
    with open(out / "where_next.csv") as file:
        rows = list(csv.DictReader(file))
    places = [(int(row["row"]), int(row["column"])) for row in rows]
    assert len(set(places)) == 20 and not any(seen[place] for place in places)
    shares = [float(row["share"]) for row in rows]
    assert rows[0]["file"] == "photo.png" and shares == sorted(shares) and shares[-1] <= 1
    said = capsys.readouterr().out
    assert (out / "overview.png").exists() and "2 draws of 4 steps, quantiles learnt" in said


def test_the_mean_alone(folder, checkpoint):
    pixels = rgba(folder / "once.png")
    out = fill(checkpoint, folder / "once.png", folder / "once", "--num-draws", "0")
    names = {"once.png", "once.json", "where_next.csv", "overview.png"}
    assert {path.name for path in out.iterdir()} == names
    seen = pixels[..., 3] > 0
    assert (read_picture(out / "once.png").values[seen] == pixels[seen, :3]).all()


def test_files_of_other_types_keep_them(folder, deep_checkpoint):
    rng = np.random.default_rng(0)
    (folder / "deep" / "sub").mkdir(parents=True)
    metres = rng.uniform(-3900, 90, (20, 13)).astype(np.float32)
    metres[rng.random(metres.shape) < 0.8] = np.nan
    Image.fromarray(metres).save(folder / "deep" / "sub" / "sea.tif")
    counts = rng.integers(1, 90, (16, 16)).astype(np.uint16)
    counts[rng.random(counts.shape) < 0.8] = 0
    Image.fromarray(counts).save(folder / "deep" / "counts.png")
    out = fill(deep_checkpoint, folder / "deep", folder / "deep-out", "--missing", "0")
    for name, given in (("sub/sea.tif", metres), ("counts.png", counts)):
        picture, seen = read_picture(out / name), (given > 0) | (given < 0)
        values = picture.values[..., 0]
        assert values.dtype == given.dtype and values.shape == given.shape
        assert (values[seen] == given[seen]).all() and np.isfinite(values).all()
        assert values.min() >= -4000 and values.max() <= 100
        draws = np.load((out / name).with_suffix(".draws.npy"))
        assert draws.dtype == given.dtype and (draws[..., 0][:, seen] == given[seen]).all()
    std = np.load(out / "sub" / "sea.std.npy")[..., 0]
    assert std.dtype == np.float32 and 100 < std[np.isnan(metres)].mean() < 4000  # metres


def test_grey_among_colours_stays_grey(folder, checkpoint):
    """It is filled as the same in colours would be, and the draws' channels are averaged."""
    pixels = rgba(folder / "ink.png", 16, 16)
    pixels[..., :3] = pixels[..., :1]
    (folder / "grey").mkdir()
    Image.fromarray(pixels[..., [0, 3]]).save(folder / "grey" / "ink.png")
    Image.fromarray(pixels).save(folder / "ink.png")
    grey = fill(checkpoint, folder / "grey", folder / "grey-out")
    colour = fill(checkpoint, folder / "ink.png", folder / "ink-out")
    assert Image.open(grey / "ink.png").mode == "LA"
    one, three = (np.load(out / "ink.draws.npy").astype(int) for out in (grey, colour))
    assert one.shape == (*three.shape[:3], 1) and np.ptp(three, axis=-1).max() > 20
    assert abs(one - three.mean(-1, keepdims=True)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_on_its_side_is_filled_upright(checkpoint, folder, orientation):
    """Whatever EXIF says: the network sees the same, and the draws lie as the file does."""
    model, config, scale = fill_images.load(checkpoint, device="cpu")
    rgba(folder / "up.png", 12, 16)
    up = read_picture(folder / "up.png")
    back = {6: 8, 8: 6}.get(orientation, orientation)
    values, observed = upright(up.values, back), upright(up.observed, back)
    lying = replace(up, values=values, observed=observed, orientation=orientation)
    expected = fill_images.draw(model, up, config, scale)
    draws = fill_images.draw(model, lying, config, scale)
    assert (upright(values, orientation) == up.values).all()
    assert draws.shape[1:] == values.shape
    for one, other in zip(draws, expected, strict=True):
        np.testing.assert_array_equal(upright(one, orientation), other)


def test_what_is_whole_is_copied(folder, checkpoint):
    (folder / "whole").mkdir()
    Image.new("RGB", (9, 9), "red").save(folder / "whole" / "a.jpg", quality=30, comment="kept")
    np.save(folder / "whole" / "b.npy", np.ones((4, 4, 3), np.uint8))
    out = fill(checkpoint, folder / "whole", folder / "whole-out")
    for name in ("a.jpg", "b.npy"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_what_is_there_is_not_made_again(folder, checkpoint, capsys, monkeypatch):
    (folder / "many" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/a.png")):
        rgba(folder / "many" / name, 16, 16, seed=i)
    out = fill(checkpoint, folder / "many", folder / "many-out")
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    (out / "b.std.npy").unlink()  # cut off before it was written
    capsys.readouterr()

    drawn, draw = [], fill_images.draw
    monkeypatch.setattr(fill_images, "draw", lambda *args: drawn.append(args[4]) or draw(*args))
    fill(checkpoint, folder / "many", out)
    assert drawn == ["b.png"] and "2 from an earlier run, 1 filled" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before

    rgba(folder / "many" / "a.png", 16, 16, seed=9)  # another image under the same name
    fill(checkpoint, folder / "many", out)
    assert drawn == ["b.png", "a.png"]
    fill(checkpoint, folder / "many", out, "--num-draws", "0")  # other settings: all anew
    assert len(drawn) == 5 and not (out / "a.draws.npy").exists()


def test_ctrl_c_leaves_what_is_done(folder, checkpoint, capsys, monkeypatch):
    (folder / "stopped").mkdir()
    for name in ("a.png", "b.png"):
        rgba(folder / "stopped" / name, 16, 16)

    def read(path, missing):
        if path.name == "b.png":
            raise KeyboardInterrupt
        return read_picture(path, missing)

    monkeypatch.setattr(fill_images, "read_picture", read)
    call = lambda: fill(checkpoint, folder / "stopped", folder / "stopped-out")
    assert "interrupted" in exits_with(1, capsys, call)
    assert (folder / "stopped-out" / "a.png").exists()


def test_bad_files_among_good_ones(folder, checkpoint, capsys):
    mixed, out = folder / "mixed", folder / "mixed-out"
    mixed.mkdir()
    rgba(mixed / "good.png", 16, 16)
    rgba(mixed / "none.png", seen=0)
    (mixed / "bad.png").write_bytes(b"not a PNG")
    Image.new("RGB", (9, 9), "red").save(mixed / "good.bmp")  # its results would be good.json, too
    np.save(mixed / "two.npy", np.eye(16, dtype=np.uint8)[..., None].repeat(2, 2))
    np.save(mixed / "deep.npy", np.eye(16, dtype=np.uint16)[..., None].repeat(3, 2))
    with pytest.raises(SystemExit) as end:
        fill(checkpoint, mixed, out, "--missing", "0")
    assert end.value.code == "fill_images.py: error: 5 of 6 images are not filled, see above"
    said = [line for line in capsys.readouterr().err.splitlines() if str(mixed) in line]
    for name, why in (
        ("bad.png", "cannot be read"),
        ("deep.npy", "the checkpoint is for 8-bit images, this has other values"),
        ("good.png", "would replace those of another"),
        ("none.png", "no observed pixel"),
        ("two.npy", "has 2 channels, the checkpoint is for 3"),
    ):
        [line] = [line for line in said if line.startswith(f"{mixed / name}: ")]
        assert why in line
    assert len(said) == 5


@pytest.mark.parametrize("inside", [".", "in", "in/sub"])
def test_results_do_not_go_where_the_images_are(folder, checkpoint, capsys, inside):
    path = folder / "in"
    path.mkdir(exist_ok=True)
    rgba(path / "x.png")
    image = path if inside != "." else path / "x.png"
    out = path if inside == "." else folder / inside
    last = exits_with(2, capsys, lambda: fill(checkpoint, image, out))
    assert "--out-dir" in last and "the images are in there" in last


def test_bad_arguments_end_in_one_line(folder, checkpoint, tmp_path, capsys):
    rgba(tmp_path / "x.png")
    for wrong, said in (
        ([tmp_path / "no.pt", tmp_path / "x.png"], "no such checkpoint"),
        ([tmp_path / "x.png", tmp_path / "x.png"], "not a checkpoint"),
        ([checkpoint, tmp_path / "y.png"], "cannot be read"),
        ([checkpoint, tmp_path / "x.png", "--sample-steps", "51"], "at most 50"),
    ):
        flags = [*map(str, wrong), "--out-dir", str(tmp_path / "out")]
        assert said in exits_with(1, capsys, lambda: fill_images.main(flags))  # noqa: B023
    flags = [str(checkpoint), str(tmp_path / "x.png"), "--num-draws", "-1"]
    assert "--num-draws" in exits_with(2, capsys, lambda: fill_images.main(flags))


def test_a_checkpoint_that_does_not_fit_ends_in_one_line(checkpoint, tmp_path, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    for ema in ([1], saved["ema"] | {"stem.weight": [1.0]}, {}):
        torch.save(saved | {"ema": ema}, tmp_path / "other.pt")
        call = lambda: fill(tmp_path / "other.pt", checkpoint, tmp_path / "out")
        assert "of another version of the network" in exits_with(1, capsys, call)
    (tmp_path / "file").touch()
    rgba(tmp_path / "x.png", 16, 16)
    call = lambda: fill(checkpoint, tmp_path / "x.png", tmp_path / "file", "--num-draws", "0")
    assert f"--out-dir {tmp_path / 'file'}: cannot be written" in exits_with(1, capsys, call)
    (tmp_path / "file").unlink()
    with occupied(tmp_path / "file"):
        assert "another process is at work in it" in exits_with(1, capsys, call)
    assert (call() / "x.png").exists()


def test_a_file_too_large_is_one_line(checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setattr("fused_ddpm.filled.LARGEST", 900)
    rgba(folder / "huge.png")
    with pytest.raises(SystemExit):
        fill(checkpoint, folder / "huge.png", folder / "huge")
    assert "29x37 pixels are too many" in capsys.readouterr().err


def test_it_warns_once_of_more_seen_than_was_learnt_from(checkpoint, folder, capsys):
    (folder / "much").mkdir()
    for name in ("a.png", "b.png"):
        rgba(folder / "much" / name, 16, 16, seen=0.9)
    fill(checkpoint, folder / "much", folder / "much-out", "--num-draws", "0")
    assert capsys.readouterr().out.count("the checkpoint has learnt from 20%") == 1
