"""Which pixels are seen, and which are scored: two disjoint masks an image, exact in their counts.

Pixels are ranked by a random score; the first are seen, the next are targets. A pattern is a way to
score. Scores come from counter-based random words, a function of (key of the image, epoch) and
nothing else: nothing is stored, and any process, batch or device makes the same masks.
"""

import torch
import torch.nn.functional as F

from fused_ddpm.noise import MASK_KEYS, random_words

TEST_INDEX = 1 << 31  # held-out images have masks of their own


def score_random(words, size, n):
    return words


def score_block(words, size, n):
    """Square blocks: every pixel of one has the score of its first."""
    side = max(size // 8, 2)
    block = torch.arange(size, device=words.device) // side
    row, column = torch.meshgrid(block, block, indexing="ij")
    return words[:, (row * side * size + column * side).flatten()]


def score_grid(words, size, n):
    """Every p-th pixel of a row, p = 1 / fraction, each row shifted; the phase is random."""
    period = max(round(size * size / n), 2)
    place = torch.arange(size, device=words.device)
    row, column = torch.meshgrid(place, place, indexing="ij")
    lattice = (column + row * round(0.382 * period)).flatten()  # golden section: no columns
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


def mask_counts(size, config):
    """Pixels of an image, and how many of them are seen and scored."""
    n = size**2
    seen = round(config.sparsity * n)
    # At 0.3 and 0.7 both might be rounded up, one pixel too many.
    return n, seen, min(round((config.target_sparsity or config.sparsity) * n), n - seen)


def check_masks(config):
    """For a config's check: (wrong, message) of what is asked of the masks."""
    target = config.target_sparsity or config.sparsity
    n, seen, scored = mask_counts(config.image_size, config)
    yield config.sparsity + target > 1, (
        f"--sparsity {config.sparsity} and --target-sparsity {target}: "
        "the masks are disjoint, so their sum must not exceed 1"
    )
    yield not seen or not scored, (
        f"--sparsity {config.sparsity}: that is {seen} pixels to see and {scored} to score "
        f"of the {n} there are"
    )


def make_masks(keys, epoch, size, config):
    """(cond_mask, target_mask), bool (B, 1, size, size), of images with keys (B,) int64.

    config: sparsity, target_sparsity (None: the same), mask_pattern.
    """
    n, seen, scored = mask_counts(size, config)
    words = random_words(keys, n, epoch, MASK_KEYS)
    score = PATTERNS[config.mask_pattern](words, size, seen)
    # With the pixel's number as the last digits there are no ties: the same order everywhere.
    order = (score * n + torch.arange(n, device=keys.device)).argsort(dim=1)
    masks = torch.zeros(2, len(keys), n, dtype=torch.bool, device=keys.device)
    masks[0].scatter_(1, order[:, :seen], True)
    masks[1].scatter_(1, order[:, seen : seen + scored], True)
    return masks.view(2, -1, 1, size, size).unbind(0)
