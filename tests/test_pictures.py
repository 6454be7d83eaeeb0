"""Pictures: every image in its place, and what the colours say."""

from fused_ddpm import pictures
from fused_ddpm.files import write
from fused_ddpm.pictures import (
    UNSEEN,
    draw_columns,
    draw_grid,
    draw_losses,
    draw_reconstructions,
    draw_rows,
    draw_sheet,
    show_heat,
    show_seen,
    tile,
)

import numpy as np
import pytest
import torch

SIDE = 18  # of an image of 4x4 in a grid: with its line three times the size


def plain(*values):
    """uint8 images 4x4, each of one value."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def values(sheet, columns, rows):
    """The value in the middle of each image of a grid, whatever labels stand beside it."""
    page = np.asarray(sheet)
    page = page[page.shape[0] - rows * SIDE :, page.shape[1] - columns * SIDE :, 0]
    return page[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].tolist()


def test_grids_put_images_in_rows():
    images = plain(0, 40, 80, 120, 160)
    sheet = np.asarray(tile(images, 3))
    assert sheet.shape == (36, 54, 3)
    assert values(sheet, 3, 2) == [[0, 40, 80], [120, 160, 255]]
    assert (sheet[:3] == 255).all() and (sheet[:, :3] == 255).all()  # a white line
    assert (sheet[3:15, 3:15] == 0).all()
    assert np.array_equal(np.asarray(draw_grid(images, 3)), sheet)
    labelled = np.asarray(draw_grid(images, 3, ["first", "second"], ["a", "b", "c"]))
    left, top = labelled.shape[1] - 54, labelled.shape[0] - 36
    assert left > 20 and top > 20 and np.array_equal(labelled[top:, left:], sheet)
    assert (labelled[top:, :left] < 100).any() and (labelled[:top, left:] < 100).any()


def test_colours_stay_colours():
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[0, 1], image[0, 2] = 100, 200
    assert np.asarray(tile(image, 1))[9, 9].tolist() == [0, 100, 200]
    four = torch.cat([image, image[:, 1:2]], dim=1)
    assert np.asarray(tile(four, 1))[9, 9].tolist() == [0, 100, 200]
    assert np.asarray(tile(image[:, 1:], 1))[9, 9].tolist() == [100, 100, 100]


def test_rows_are_classes():
    images, labels = plain(*range(10, 120, 10)), torch.tensor([2, 0, 2, 0, 2, 2, 2, 2, 2, 2, 2])
    page = draw_rows(images, labels, ["a", "b", "c"])
    twos = [10, 30, 50, 60, 70, 80, 90, 100]  # eight of nine
    assert values(page, 8, 2) == [twos, [20, 40] + [255] * 6]
    assert page.width > 8 * SIDE and page.height == 2 * SIDE
    few = draw_rows(plain(1, 2, 3), torch.tensor([0, 1, 1]), ["a", "b"])
    assert values(few, 2, 2) == [[1, 255], [2, 3]]


def test_columns_are_side_by_side():
    page = draw_columns({"w = 0": plain(1, 2, 3), "w = 1": plain(11, 12, 13)}, ["x", "y", "z"])
    assert values(page, 2, 3) == [[1, 11], [2, 12], [3, 13]]
    assert page.width > 2 * SIDE and page.height > 3 * SIDE
    assert values(draw_columns({"a": plain(1), "b": plain(2)}), 2, 1) == [[1, 2]]


def pixels(figure):
    """The image that a sheet shows."""
    (shown,) = figure.axes[0].get_images()
    return torch.from_numpy(np.asarray(shown.get_array()))


def test_a_sheet_has_a_column_for_each_entry():
    a = torch.tensor([0.1, 0.2]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    colour = torch.stack([torch.full((2, 4, 4), c) for c in (0.3, 0.5, 0.7)], dim=1)
    figure = draw_sheet({"first": a, "second": colour})
    shown = pixels(figure)
    assert shown.shape == (12, 12, 3)
    torch.testing.assert_close(shown[3, 3].float(), torch.full((3,), 0.1))
    torch.testing.assert_close(shown[9, 3].float(), torch.full((3,), 0.2))
    torch.testing.assert_close(shown[9, 9].float(), torch.tensor([0.3, 0.5, 0.7]))
    assert (shown[0] == 1).all() and (shown[:, 5:7] == 1).all()  # a white line
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["first", "second"]


def test_what_is_not_seen_is_blue_grey():
    truth = torch.rand(2, 1, 4, 4)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1] = True
    shown = show_seen(truth, mask)
    assert shown.shape == (2, 3, 4, 4)
    assert torch.equal(shown[:, :, 1], truth[:, :, 1].expand(-1, 3, -1))
    assert torch.equal(shown[:, :, 2:], UNSEEN.expand(2, 3, 2, 4))


def test_heat_runs_from_zero_to_the_largest():
    values = torch.zeros(2, 1, 4, 4)
    values[0, 0, 0, 0], values[1, 0, 3, 3] = 0.4, 0.2
    shown = show_heat(values)
    assert shown.shape == (2, 3, 4, 4) and shown.dtype == torch.float32
    brightness = shown.mean(1)
    assert brightness[0, 0, 0] > brightness[1, 3, 3] > brightness[0, 1, 1]
    dark = show_heat(torch.zeros(1, 1, 4, 4))  # nothing to divide by
    assert torch.equal(dark[0, :, 0, 0], shown[0, :, 1, 1])


def test_reconstructions_are_shown_beside_the_original(monkeypatch):
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(12, 1, 4, 4, generator=g)
    draws = torch.rand(3, 12, 1, 4, 4, generator=g)
    score = torch.rand(12, 1, 4, 4, generator=g)
    seen, target = score < 0.25, score > 0.75
    found = dict(truth=truth, draws=draws, cond_mask=seen, target_mask=target)
    sheets, draw = [], pictures.draw_sheet
    keep = lambda columns: sheets.append(columns) or draw(columns)
    monkeypatch.setattr(pictures, "draw_sheet", keep)
    figure = draw_reconstructions(found)
    (columns,) = sheets
    share = f"{seen[:10].float().mean():.0%}"
    titles = ["original", f"seen ({share})", "target mask", "one draw", "mean of 3", "spread"]
    assert list(columns) == titles and all(len(x) == 10 for x in columns.values())
    assert torch.equal(columns["original"], truth[:10].expand(-1, 3, -1, -1))
    assert torch.equal(columns["one draw"], draws[0, :10])
    torch.testing.assert_close(columns["mean of 3"], draws[:, :10].mean(0))
    spread = draws[:, :10].var(0, correction=0).sqrt()
    torch.testing.assert_close(columns["spread"], show_heat(spread))
    assert pixels(figure).shape == (10 * 6, 6 * 6, 3)
    assert len(draw_reconstructions(found, rows=2).axes) == 1
    assert sheets[1]["original"].shape[0] == 2
    draw_reconstructions(found | {"observed": ~target})  # what is missing in the file
    assert torch.equal(sheets[2]["original"], show_seen(truth, ~target)[:10])


def test_a_single_draw_has_no_spread():
    truth, mask = torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    found = dict(truth=truth, draws=truth[None], cond_mask=mask, target_mask=~mask)
    shown = pixels(draw_reconstructions(found))[:, 5 * 6 :]  # the last column
    dark = show_heat(torch.zeros(1, 1, 1, 1)).flatten()
    for row in (slice(1, 5), slice(7, 11)):
        torch.testing.assert_close(shown[row, 1:5].float(), dark.expand(4, 4, 3))


def test_curves_are_the_losses_of_a_history():
    history = {"steps": [1, 2, 3], "train_loss": [3.0, 2.0, 1.0], "val_loss": [4.0, 3.0, 2.0]}
    axis = draw_losses(history | {"epochs": [0.1, 0.2, 0.3]}).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines.keys() == {"train_loss", "val_loss"} and axis.get_yscale() == "log"
    for name, line in lines.items():
        assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == history[name]


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_all_of_them_can_be_written(tmp_path, device):
    history = {"steps": [1, 2], "train_loss": [3.0, 2.0]}
    drawn = {
        "grid.png": draw_grid(plain(1, 2, 3).to(device), 2),
        "losses.png": draw_losses(history),
        "sheet.png": draw_sheet({"a": torch.rand(2, 1, 4, 4)}),
    }
    for name, picture in drawn.items():
        write(tmp_path / name, picture)
    assert {path.name for path in tmp_path.iterdir()} == drawn.keys()


def test_images_of_any_size_share_a_sheet():
    small, wide = torch.zeros(1, 3, 5, 10), torch.full((1, 3, 100, 200), 0.5)
    sheet = pictures.draw_of_any_size({"a": [small, wide], "b": [wide, small]}, side=50)
    assert sheet.size == (2 * 3 * 52, 30 + 2 * 3 * 27)  # as high as the highest, no square
    pixels = np.asarray(sheet)[30:].reshape(2, 27, 3, 2, 52, 3, 3)[:, 1:26, 1, :, 1:51, 1]
    assert (pixels[0, :, 0] == 0).all() and (pixels[0, :, 1] == 128).all()
    high = torch.zeros(1, 3, 40, 10)
    sheet = pictures.draw_of_any_size({"a": [small, high]}, side=50)
    pixels = np.asarray(sheet)[30:].reshape(2, 42, 3, 42, 3, 3)[:, 1:41, 1, 1:41, 1]
    assert (pixels[0, :20] == 0).all() and (pixels[0, 20:] == 255).all()
    assert (pixels[1, :, :10] == 0).all() and (pixels[1, :, 10:] == 255).all()


def test_two_and_four_channels_are_shown_too():
    for channels, shown in ((1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])):
        images = torch.arange(channels).view(1, -1, 1, 1).expand(2, -1, 4, 4)
        assert pictures.rgb(images)[0, :, 0, 0].tolist() == shown
