"""Pictures: grids and sheets of images, and curves. Each returns what run.write can write."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

UNSEEN = torch.tensor([0.25, 0.3, 0.45]).view(1, 3, 1, 1)  # blue-grey


def tile(images, columns):
    """uint8 (N, C, H, W) -> PIL image: row by row, three times the size, a white line between."""
    images = F.pad(rgb(images.cpu()).byte(), (1, 1, 1, 1), value=255)
    empty = images.new_full((-len(images) % columns, *images.shape[1:]), 255)
    images = torch.cat([images, empty])
    n, _, h, w = images.shape
    rows = n // columns
    sheet = images.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2)
    sheet = Image.fromarray(sheet.reshape(rows * h, columns * w, 3).numpy())
    return sheet.resize((3 * columns * w, 3 * rows * h), Image.Resampling.NEAREST)


def draw_grid(images, columns=8, rows=(), heads=()):
    """uint8 (N, C, H, W), row by row; rows, heads: labels at the left and on top."""
    sheet = tile(images, columns)
    pen = ImageDraw.Draw(sheet)
    left = 12 + int(max(pen.textlength(text, font_size=20) for text in rows)) if rows else 0
    top = 30 if heads else 0
    page = Image.new("RGB", (left + sheet.width, top + sheet.height), "white")
    page.paste(sheet, (left, top))
    pen = ImageDraw.Draw(page)
    for i, text in enumerate(rows):
        y = top + (i + 0.5) * sheet.height / len(rows)
        pen.text((left - 6, y), text, "black", anchor="rm", font_size=20)
    for i, text in enumerate(heads):
        x = left + (i + 0.5) * sheet.width / columns
        pen.text((x, 15), text, "black", anchor="mm", font_size=20)
    return page


def draw_rows(images, labels, names):
    """A row of up to eight images for each class. labels: int64 (N,), into names."""
    classes = list(dict.fromkeys(labels.tolist()))
    rows = [images[labels == label][:8] for label in classes]
    columns = max(len(row) for row in rows)
    blank = images.new_full((columns, *images.shape[1:]), 255)
    rows = [torch.cat([row, blank[len(row) :]]) for row in rows]
    return draw_grid(torch.cat(rows), columns, [names[label] for label in classes])


def draw_columns(columns, rows=()):
    """A column for each entry of {heading: uint8 (N, C, H, W)}; rows: labels at the left."""
    images = torch.stack(list(columns.values()), dim=1).flatten(0, 1)
    return draw_grid(images, len(columns), rows, list(columns))


def draw_of_any_size(columns, rows=(), side=128):
    """The same of {heading: [float (1, 3, H, W) in [0, 1]]}, the longer side of each at most so."""
    sizes = [image.shape[-2:] for images in columns.values() for image in images]
    side = min(side, max(map(max, sizes)))

    def shrunk(h, w):
        return tuple(max(round(n * side / max(h, w)), 1) for n in (h, w))

    height, width = (max(shrunk(*size)[i] for size in sizes) for i in (0, 1))

    def fit(image):
        h, w = shrunk(*image.shape[-2:])
        mode = "area" if h <= image.shape[-2] else "nearest"
        image = F.interpolate(image, (h, w), mode=mode)
        return F.pad(image, (0, width - w, 0, height - h), value=1.0)

    sheets = {name: torch.cat([fit(image) for image in images]) for name, images in columns.items()}
    return draw_columns({name: (255 * x).round().byte() for name, x in sheets.items()}, rows)


def rgb(images):
    """As float (N, 3, H, W): of two channels the first is shown, of four the first three."""
    return images[:, : 3 if images.shape[1] > 2 else 1].float().expand(-1, 3, -1, -1)


def make_figure(width, height):
    """A figure of width by height inches."""
    from matplotlib.figure import Figure  # here, so that --help need not wait for it

    return Figure(figsize=(width, height), layout="constrained")


def draw_sheet(columns):
    """A column of images for each entry of {heading: float (N, C, H, W) in [0, 1]}."""
    sheet = torch.stack([F.pad(rgb(x), (1, 1, 1, 1), value=1.0) for x in columns.values()])
    k, n, _, h, w = sheet.shape
    figure = make_figure(1.5 * k, 1.5 * n * h / w + 0.4)
    axis = figure.subplots()
    pixels = sheet.permute(1, 3, 0, 4, 2).reshape(n * h, k * w, 3)
    axis.imshow(pixels.numpy(), interpolation="nearest")
    axis.set_xticks([(i + 0.5) * w for i in range(k)], list(columns))
    axis.set_yticks([])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    return figure


def show_seen(truth, mask):
    """Images (N, C, H, W) in [0, 1] with what mask (N, 1, H, W) leaves out in blue-grey."""
    return torch.where(mask, rgb(truth), UNSEEN)


def show_heat(values):
    """(N, 1, H, W), from 0 to the largest of them all, in colours: (N, 3, H, W)."""
    from matplotlib import colormaps

    shade = (values / values.max().clamp(min=1e-6))[:, 0].numpy()
    colours = torch.from_numpy(colormaps["magma"](shade)[..., :3])
    return colours.permute(0, 3, 1, 2).float()


def draw_reconstructions(found, intervals=None, rows=10):
    """A row an image: original, what was seen, target mask, one draw, mean of the draws, spread.

    found: truth (N, C, H, W) and draws (K, N, C, H, W), float in [0, 1]; cond_mask and target_mask,
    bool (N, 1, H, W); where there, regression and gaussian. With intervals their width, too.
    """
    truth, draws = found["truth"][:rows], found["draws"][:, :rows]
    cond_mask, target_mask = found["cond_mask"][:rows], found["target_mask"][:rows]
    spread = draws.std(0, correction=0).mean(1, keepdim=True)
    there = found["observed"][:rows] if "observed" in found else torch.ones_like(cond_mask)
    columns = {
        "original": show_seen(truth, there),
        f"seen ({cond_mask.float().mean():.0%})": show_seen(truth, cond_mask),
        "target mask": target_mask,
        "one draw": draws[0],
        f"mean of {len(draws)}": draws.mean(0),
        "spread": show_heat(spread),
    }
    if intervals and len(draws) > 1:
        width = 2 * intervals.half_width(draws.cpu(), 0.9).mean(1, keepdim=True)
        columns["90% interval"] = show_heat(torch.where(cond_mask, 0, width))
    for name in ("regression", "gaussian"):
        if name in found:
            columns[name] = found[name][:rows]
    return draw_sheet(columns)


def draw_resolutions(grids):
    """Of each image a draw on several grids. grids: {n: what a script's reconstruct found}."""
    found = grids[min(grids)]
    columns = {"original": found["truth"], "seen": show_seen(found["truth"], found["cond_mask"])}
    columns |= {f"at {n}x{n}": found["draws"][0] for n, found in grids.items()}
    return draw_sheet({name: F.interpolate(x, size=3 * max(grids)) for name, x in columns.items()})


def draw_ranks(metrics):
    """The rank of the truth among the draws: flat if it is one of them."""
    figure = make_figure(6, 3)
    axis = figure.subplots()
    for name in ("calibration", "foreground"):
        if name in metrics:
            ranks = metrics[name]["rank_histogram"]
            axis.step(range(len(ranks)), ranks, where="mid", label=name)
            axis.axhline(1 / len(ranks), color="grey", linewidth=0.5)
    axis.set(xlabel="draws below the truth", ylabel="share of the unseen pixels", ylim=(0, None))
    axis.legend()
    return figure


def draw_losses(history):
    """The curves of a history: all its columns that end in _loss."""
    figure = make_figure(6, 4)
    axis = figure.subplots()
    for name, values in history.items():
        if name.endswith("_loss"):
            axis.plot(history["steps"], values, label=name)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend()
    return figure
