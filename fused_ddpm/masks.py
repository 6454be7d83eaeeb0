"""Which pixels are seen, and which are scored: two disjoint masks an image, exact in their counts.

Pixels are ranked by a random score; the first are seen, the next are targets. A pattern is a way to
score. Scores come from counter-based random words, a function of (key of the image, epoch) and
nothing else: nothing is stored, and any process, batch or device makes the same masks.
"""

import functools
from dataclasses import replace

from fused_ddpm.files import UserError
from fused_ddpm.images import to_float, to_unit
from fused_ddpm.noise import (
    FRACTION,
    HIDDEN,
    MASK_KEYS,
    PARTS,
    PATTERN,
    random_words,
    seeded_integers,
    seeded_uniform,
)

import numpy as np
import torch
import torch.nn.functional as F

TEST_INDEX = 1 << 31  # held-out images have masks of their own


def score_random(words, size, n):
    return words


def by_block(words, size):
    """words (B, H, W); all of a square block, an eighth of size wide, get that of its first."""
    side = max(size // 8, 2)
    row, column = (torch.arange(m, device=words.device) // side * side for m in words.shape[1:])
    return words[:, row[:, None], column]


def score_block(words, size, n):
    return by_block(words.view(-1, size, size), size).flatten(1)


def score_grid(words, size, n):
    """Every p-th pixel of a row, p = 1 / fraction, each row shifted; the phase is random."""
    period = (size * size / n).round().long().clamp(min=2)
    place = torch.arange(size, device=words.device)
    row, column = torch.meshgrid(place, place, indexing="ij")
    shift = (0.382 * period).round().long()  # golden section: no columns
    lattice = column.flatten() + row.flatten() * shift
    residue = (lattice + words[:, :1]) % period
    # Residue 0 is seen. The order of the others turns from image to image, so that each gets its
    # share of targets; within a residue, pixels go at random.
    turned = 1 + (residue + words[:, 1:2]) % (period - 1)
    return (torch.where(residue == 0, 0, turned) << 32) + words


def score_walk(words, size, n):
    """Four random walks, reflected at the border: the score is the time of the first visit."""
    walkers, device = 4, words.device
    walks = F.pad(words, (0, -words.shape[1] % walkers)).unflatten(1, (walkers, -1))
    bits = torch.tensor([0, 2, 4, 6], device=device)
    moves = ((walks[..., None] >> bits) & 3).flatten(2)  # four to a word
    start = walks[:, :, None, :2] >> 8
    directions = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]], device=device)
    place = (start + directions[moves].cumsum(2)) % (2 * size)  # (B, walkers, time, 2)
    place = torch.minimum(place, 2 * size - 1 - place)
    visited = (place[..., 0] * size + place[..., 1]).flatten(1)
    time_of = torch.arange(moves.shape[2], device=device).expand_as(moves).flatten(1)
    never = (1 << 32) + words  # pixels without a visit come last, at random
    return never.scatter_reduce(1, visited, time_of, "amin")


PATTERNS = {
    "random": score_random,  # pixels
    "block": score_block,  # squares, an eighth of the image wide
    "grid": score_grid,  # a lattice
    "walk": score_walk,  # paths
}


@functools.cache
def read_order(path, size):
    """Ranks int64 (size^2,), the pixel to see first has 0, of a user's .npy file (size, size).

    It holds a boolean mask of the seen pixels, or any numbers, least for what is seen first.
    """
    try:
        array = np.load(path, allow_pickle=False)
        score = torch.from_numpy(~array if array.dtype == bool else array.astype(np.float64))
    except Exception as error:  # numpy raises all sorts: BadZipFile, EOFError, ...
        raise UserError(f"--mask-pattern {path}: cannot be read ({error})") from error
    if score.shape != (size, size):
        made = "x".join(map(str, score.shape))
        raise UserError(f"--mask-pattern {path}: is {made}, the images are {size}x{size}")
    return score.flatten().argsort(stable=True).argsort()


def score_file(words, size, n, path):
    return read_order(path, size).to(words.device).expand(len(words), -1)


def pattern_names(config):
    return config.mask_pattern.split(",")


def mask_counts(size, config):
    """Pixels of an image; how many are seen, at least and at most; how many of them scored."""
    n = size**2
    seen = [round(fraction * n) for fraction in (config.sparsity[0], config.sparsity[-1])]
    # At 0.3 and 0.7 both might be rounded up, one pixel too many.
    target = config.target_sparsity or config.sparsity[-1]
    return n, *seen, min(round(target * n), n - seen[1])


def check_masks(config):
    """For a config's check: (wrong, message) of what is asked of the masks."""
    shown = " ".join(map(str, config.sparsity))
    yield not 1 <= len(config.sparsity) <= 2 or config.sparsity[0] > config.sparsity[-1], (
        f"--sparsity {shown}: is a fraction, or two, the smaller first, to draw it from"
    )
    observed = getattr(config, "observed_only", None)
    learns = hasattr(config, "observed_only") and config.image_size <= 64
    for name in pattern_names(config):
        yield name == "learned" and not learns, (
            f"--mask-pattern {name}: for sparse_ddpm.py and images of at most 64 pixels a side"
        )
        yield name not in PATTERNS and name != "learned" and not name.endswith(".npy"), (
            f"--mask-pattern {name}: choose from {', '.join(PATTERNS)}, learned, or a .npy file"
        )
    target = config.target_sparsity or config.sparsity[-1]
    n, seen, _, scored = mask_counts(config.image_size, config)
    yield config.sparsity[-1] + target > 1, (
        f"--sparsity {shown} and --target-sparsity {target}: "
        "the masks are disjoint, so their sum must not exceed 1"
    )
    yield not seen or not scored, (
        f"--sparsity {shown}: that is {seen} pixels to see and {scored} to score "
        f"of the {n} there are"
    )
    few = f"--observed-only {observed}: leaves less than two of the {n} pixels of an image"
    yield observed and round(observed * n) < 2, few
    test_pattern = getattr(config, "test_pattern", None)
    learned = "learned" in (test_pattern or "").split(",")
    yield learned, "--test-pattern learned: give the run's mask.npy"
    if getattr(config, "test_sparsity", None) or test_pattern:
        tested = replace(as_tested(config), test_sparsity=None, test_pattern=None)
        for wrong, message in check_masks(tested):
            message = message.replace("--mask-pattern", "--test-pattern")
            yield wrong, message.replace("--sparsity", "--test-sparsity")


def as_tested(config):
    """The settings of masks as --test-sparsity and --test-pattern change them."""
    sparsity = config.sparsity if config.test_sparsity is None else [config.test_sparsity]
    target = min(config.target_sparsity or sparsity[-1], 1 - sparsity[-1])
    pattern = config.test_pattern or config.mask_pattern
    return replace(config, sparsity=sparsity, target_sparsity=target, mask_pattern=pattern)


def held_out_keys(index, config):
    """Of held-out images, int64 (B,): apart from those of training, the same for a seed."""
    return (config.seed << 32) + TEST_INDEX + index


def make_masks(keys, epoch, size, config, observed=None):
    """(cond_mask, target_mask), bool (B, 1, size, size), of images with keys (B,) int64.

    config: sparsity, one fraction or two to draw one from for each image; target_sparsity (None:
    the same); mask_pattern, or several with commas between, one for each image. observed: bool
    (B, 1, size, size), the pixels there are; then the seen ones are at most three quarters of
    these, and all others of them are scored.
    """
    n, least, most, scored = mask_counts(size, config)
    device = keys.device
    seen = torch.full_like(keys, least)
    if most > least:  # evenly on a logarithmic scale
        drawn = least * (most / least) ** seeded_uniform(keys, FRACTION, epoch).double()
        seen = drawn.round().long()
        if config.target_sparsity is None:
            scored = torch.minimum(seen, n - seen)
    if observed is not None:
        there = observed.flatten(1).sum(1)
        seen = torch.minimum(seen, (there * 3 // 4).clamp(min=1))
        scored = there - seen
    words = random_words(keys, n, epoch, MASK_KEYS)
    score = pattern_scores(words, keys, epoch, size, seen[:, None], config)
    if observed is not None:
        score = torch.where(observed.flatten(1), score, 1 << 45)
    # With the pixel's number as the last digits there are no ties: the same order everywhere.
    order = argsort(score * n + torch.arange(n, device=device))
    rank, seen = torch.arange(n, device=device), seen[:, None]
    end = seen + torch.as_tensor(scored, device=device).view(-1, 1)
    masks = torch.zeros(2, len(keys), n, dtype=torch.bool, device=device)
    masks[0].scatter_(1, order, rank < seen)
    masks[1].scatter_(1, order, (rank >= seen) & (rank < end))
    if observed is not None:  # of some images perhaps nothing
        masks &= observed.flatten(1)
    return masks.view(2, -1, 1, size, size).unbind(0)


def argsort(x):
    """Of the rows of x, which has no equal ones. On a CPU numpy's is four times as fast."""
    return torch.from_numpy(x.numpy().argsort(axis=1)) if x.is_cpu else x.argsort(dim=1)


def pattern_scores(words, keys, epoch, size, seen, config):
    """(B, size^2) int64, below 2^45: of the pattern, or of that drawn for each image."""
    scores = []
    for name in pattern_names(config):
        of_file = functools.partial(score_file, path=name)
        scores.append(PATTERNS.get(name, of_file)(words, size, seen))
    if len(scores) == 1:
        return scores[0]
    choice = seeded_integers(keys, len(scores), PATTERN, epoch)
    return torch.stack(scores)[choice, torch.arange(len(keys), device=keys.device)]


def places_of(mask):
    """(places int64 (N, M), whether there is one, bool) of the pixels set in a mask (N, H W), in
    order; M: the most that any image has."""
    most = int(mask.sum(1).max())
    there, places = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    return places[:, :most], there[:, :most].bool()


def hide(keys, size, fraction):
    """bool (B, 1, size, size): the fraction of the pixels that are ever read, for good."""
    n = size**2
    order = random_words(keys, n, 0, HIDDEN).argsort(dim=1, stable=True)
    there = torch.zeros(len(keys), n, dtype=torch.bool, device=keys.device)
    there.scatter_(1, order[:, : round(fraction * n)], True)
    return there.view(-1, 1, size, size)


def observe(part, keys, fraction=None):
    """(x_start, observed): images in [-1, 1]; bool (B, 1, H, W), what of them is read, None: all.

    part: images, and which of their pixels are observed. The fraction that is read belongs to an
    image, by its key, for good; what is beside becomes 0 before anything else, whatever it was.
    """
    x_start, observed = to_float(part.images), part.observed
    if fraction:
        kept = hide(keys, x_start.shape[-1], fraction)
        observed = kept if observed is None else kept & observed
    if observed is not None:
        x_start = torch.where(observed, x_start, 0)
    return x_start, observed


def mask_images(part, keys, epoch, config):
    """(x_start, (cond_mask, target_mask), observed) of a part's images: see observe, make_masks."""
    x_start, observed = observe(part, keys, config.observed_only)
    return x_start, make_masks(keys, epoch, x_start.shape[-1], config, observed), observed


def mask_held_out(part, config, fraction=None):
    """(x, found): a part's images (N, C, H, W) in [-1, 1], and what is known of them beforehand.

    fraction: of the pixels, the only ones to be read. found: truth, x in [0, 1]; cond_mask,
    target_mask, and observed if that is not all, bool (N, 1, H, W).
    """
    keys = held_out_keys(torch.arange(len(part), device=config.device), config)
    tested = replace(as_tested(config), observed_only=fraction)
    x, (cond_mask, target_mask), observed = mask_images(part, keys, 0, tested)
    found = {"truth": to_unit(x), "cond_mask": cond_mask, "target_mask": target_mask}
    return x, found if observed is None else found | {"observed": observed}


def in_parts(keys, cond_mask, parts, fraction, config):
    """Yield (state, seen), bool (B, 1, H, W), of a sampler that draws the unseen pixels in parts.

    state: the part, one of equal ones, at random, in squares if training scored such; seen: the
    pixels of cond_mask, and of the parts before at random so many that they are the fraction.
    parts None: at once, state is everywhere.
    """
    if parts is None:
        yield torch.ones_like(cond_mask), cond_mask
        return
    flat = cond_mask.flatten(1)
    n, place = flat.shape[1], torch.arange(flat.shape[1], device=keys.device)
    words = random_words(keys, n, 0, PARTS)
    if config.mask_pattern == "block":
        words = by_block(words.view_as(cond_mask[:, 0]), config.image_size).flatten(1)
    rank = torch.where(flat, 1 << 33, words)
    rank = rank.argsort(dim=1, stable=True).argsort(dim=1)
    unseen = (~flat).sum(1, keepdim=True).clamp(min=1)
    part = rank * parts // unseen  # the seen ones come last, and after all
    words = random_words(keys, n, 1, PARTS)
    for i in range(parts):
        drawn = (part < i) & ~flat
        order = torch.where(flat, 0, torch.where(drawn, words, 1 << 33) + 1)
        order = order.argsort(dim=1, stable=True)
        there = flat.sum(1, keepdim=True)
        most = torch.clamp(there, min=round(fraction * n)).minimum(there + drawn.sum(1, True))
        seen = torch.zeros_like(flat).scatter_(1, order, place < most)
        yield ((part == i) & ~flat).view_as(cond_mask), seen.view_as(cond_mask)
