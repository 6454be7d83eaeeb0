"""The data set `shapes`: coloured shapes of ten classes, drawn here, so that no file is needed."""

import math

import torch

NAMES = [
    *("circle", "ring", "triangle", "square", "hexagon"),
    *("star", "cross", "crescent", "bar", "half disc"),
]


def draw_shapes(count, image_size, seed):
    """(images, labels): uint8 (count, 3, image_size, image_size), int64 (count,).

    Antialiased from signed distances: place, size, turn and colours are random; the distance of a
    pixel to the outline, in pixels, gives its coverage. The same for a seed.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=g)

    labels = torch.randint(len(NAMES), (count,), generator=g)
    size, turn = uniform(0.35, 0.7, 1, 1), uniform(0, 2 * math.pi, 1, 1)
    centre = uniform(-0.25, 0.25, 2, 1, 1)
    colour = uniform(0, 1, 2, 3)  # background, shape
    # Move the shape's brightness at least 0.4 away from the background's: there is to be a shape.
    dark = (colour[:, 0].mean(1) < 0.5)[:, None]
    colour[:, 1] = torch.where(dark, 0.6 + 0.4 * colour[:, 1], 0.4 * colour[:, 1])
    axis = (torch.arange(image_size) + 0.5) * 2 / image_size - 1
    images = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(0, count, 2048):
        part = slice(i, min(i + 2048, count))
        y, x = axis[:, None] - centre[part, 0], axis[None, :] - centre[part, 1]  # (B, H, W)
        cos, sin = turn[part].cos(), turn[part].sin()
        x, y = (cos * x + sin * y) / size[part], (cos * y - sin * x) / size[part]
        distance = torch.empty_like(x)
        for label, name in enumerate(NAMES):
            chosen = labels[part] == label
            distance[chosen] = shape_distance(name, x[chosen], y[chosen])
        coverage = (0.5 - distance * size[part] * image_size / 2).clamp(0, 1)[:, None]
        background, shape = colour[part, 0, :, None, None], colour[part, 1, :, None, None]
        images[part] = (255 * (background + coverage * (shape - background))).round().byte()
    return images, labels


def shape_distance(name, x, y):
    """Signed distance, negative inside, of points (x, y) to a shape of radius about 1."""
    r = torch.hypot(x, y)

    def polygon(n):  # fold the plane onto one edge
        half = math.pi / n
        angle = (torch.atan2(y, x) + half).remainder(2 * half) - half
        return r * angle.cos() - math.cos(half)

    def box(w, h):
        return torch.maximum(x.abs() - w, y.abs() - h)

    if name == "circle":
        return r - 0.9
    if name == "ring":
        return (r - 0.75).abs() - 0.2
    if name in ("triangle", "square", "hexagon"):
        return polygon({"triangle": 3, "square": 4, "hexagon": 6}[name])
    if name == "star":  # fold onto half an arm: from its tip (1, 0) to the notch between two arms
        fifth = math.pi / 5
        angle = ((torch.atan2(y, x) + fifth).remainder(2 * fifth) - fifth).abs()
        notch_x, notch_y = 0.45 * math.cos(fifth), 0.45 * math.sin(fifth)
        normal_x, normal_y = notch_y, 1 - notch_x
        along = (r * angle.cos() - 1) * normal_x + r * angle.sin() * normal_y
        return along / math.hypot(normal_x, normal_y)
    if name == "cross":
        return torch.minimum(box(0.95, 0.32), box(0.32, 0.95))
    if name == "crescent":
        return torch.maximum(r - 0.9, 0.75 - torch.hypot(x - 0.45, y))
    if name == "bar":
        return torch.hypot(x - x.clamp(-0.7, 0.7), y) - 0.28
    return torch.maximum(r - 0.9, y)  # half disc
