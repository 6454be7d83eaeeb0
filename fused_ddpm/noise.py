"""Noise without state: Philox4x32-10 (Salmon et al. 2011), a keyed bijection on 128-bit counters.

The noise of an element is a function of (key, element, step, stream). The key belongs to one image,
so an image depends neither on the batch around it nor on the process that makes it.
"""

import torch

# Streams, so that no two uses ever share a counter.
STEP_NOISE, START_NOISE, MASK_KEYS = 0, 1, 2  # of sampling, and of masks
TRAIN_NOISE, TIMESTEP, MIRROR, DROP = 3, 4, 5, 6  # of a training step
FRACTION, PATTERN, HIDDEN, PARTS = 7, 8, 9, 10  # of masks
POINTS = 11  # places of points

LOW = 0xFFFFFFFF


def philox(counter, key):
    """Four words from four counter words and two key words, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around, all 64 bits stay right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & LOW) ^ c1 ^ k0,
            p1 & LOW,
            ((p0 >> 32) & LOW) ^ c3 ^ k1,
            p0 & LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def random_words(keys, n, step, stream):
    """Uniform words, (B, n) int64 in [0, 2^32), from keys (B,) int64.

    step and stream are 32-bit ints or tensors of one element.
    """
    group = torch.arange((n + 3) // 4, device=keys.device)
    zeros = torch.zeros_like(group)
    counter = group & LOW, group >> 32, zeros + step, zeros + stream
    key = (keys & LOW)[:, None], ((keys >> 32) & LOW)[:, None]
    return torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :n]  # (B, groups, 4) -> (B, n)


def normal_reference(keys, n, step, stream, dtype=torch.float32):
    """Standard normals (B, n) from keys (B,): Box & Muller (1958) on pairs of random_words."""
    words = random_words(keys, (n + 3) // 4 * 4, step, stream)
    radius, angle = words[:, ::2], words[:, 1::2]
    u = radius.to(dtype) * 2**-32 + 2**-33  # in (0, 1]: the logarithm is finite
    signed = angle - ((angle >> 31) << 32)  # the word as int32
    theta = signed.to(dtype) * (2**-31 * torch.pi)
    r = (-2 * u.log()).sqrt()
    return torch.stack([r * theta.cos(), r * theta.sin()], dim=-1).flatten(1)[:, :n]


def seeded_integers(keys, n, stream, step=0):
    """Uniform integers 0..n-1, int64 (B,), one for each of keys (B,); n below 2^31."""
    return (random_words(keys, 1, step, stream)[:, 0] * n) >> 32


def seeded_uniform(keys, stream, step=0):
    """Uniform numbers in [0, 1), float32 (B,), one for each of keys (B,)."""
    return (random_words(keys, 1, step, stream)[:, 0] >> 8).float() * 2**-24
