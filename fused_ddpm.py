"""The two fused operations around a diffusion network, each directly below its PyTorch reference.

    posterior_step   one reverse step, DDPM or DDIM, for noise-, v- or image-prediction, noise and guidance included
    masked_loss      a loss weighted by pixel masks, with its gradient

Both run in the C++/CUDA extension (csrc/) where it is built for the tensor's device, else in the reference here, and give
the same numbers up to rounding. `status()` tells which and why; FUSED_DDPM=0 in the environment forces the reference.
`reverse_process` runs network and step over and over, on a GPU as one CUDA graph.
"""

import ctypes
import functools
import json
import os
import sysconfig
import warnings
from pathlib import Path

import torch


def _load_extension():
    """(device types the extension serves, why not more)."""
    if os.environ.get("FUSED_DDPM") == "0":
        return (), "FUSED_DDPM=0 is set"
    here = Path(__file__).resolve().parent
    record_file = here / "_fused_ddpm_build.json"
    library = here / f"_fused_ddpm{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not record_file.exists():
        return (), "not built; to build it: pip install -e ."
    record = json.loads(record_file.read_text())
    if not record["backends"]:
        return (), f"{record['reason']}; after mending that: pip install -e ."
    if record["torch"] != torch.__version__:
        return (), f"built for torch {record['torch']}, this is {torch.__version__}; to rebuild: pip install -e ."
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (), f"cannot be loaded ({error}); to rebuild: pip install -e ."
    return tuple(record["backends"]), record["reason"]


BACKENDS, REASON = _load_extension()


def status():
    """One line: which backend runs, and why."""
    if not BACKENDS:
        return f"PyTorch reference (extension: {REASON})"
    return f"fused kernels for {' and '.join(BACKENDS)}" + (f" (no CUDA kernels: {REASON})" if "cuda" not in BACKENDS else "")


def fused(device):
    """The one rule that picks the path: the extension where it was built for this kind of device."""
    return torch.device(device).type in BACKENDS


# ---------------------------------------------------------------------------------------------------------------------
# Noise: Philox4x32-10 (Salmon et al. 2011), a keyed bijection on 128-bit counters. No state: the noise of an element is a
# function of (seed of its image, element, step, stream), so an image does not depend on the batch around it.

STEP_NOISE, START_NOISE, MASK_KEYS = 0, 1, 2  # streams, so that no two uses ever share a counter


def philox(counter, key):
    """Four words from four counter words and two key words, all int64 in [0, 2^32), of shapes that broadcast."""
    low, (c0, c1, c2, c3), (k0, k1) = 0xFFFFFFFF, counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around, which leaves all 64 bits right
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def random_words(seeds, n, step, stream):
    """Uniform words, (B, n) int64 in [0, 2^32), from seeds (B,) int64; step and stream are 32-bit ints or 0-dim tensors."""
    low = 0xFFFFFFFF
    group = torch.arange((n + 3) // 4, device=seeds.device)
    counter = group & low, group >> 32, torch.zeros_like(group) + step, torch.zeros_like(group) + stream
    key = (seeds & low)[:, None], ((seeds >> 32) & low)[:, None]
    return torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :n]  # (B, groups, 4) -> (B, n)


def normal_reference(seeds, n, step, stream, dtype=torch.float32):
    """Standard normals (B, n) from seeds (B,): Box & Muller (1958) on pairs of random_words."""
    words = random_words(seeds, (n + 3) // 4 * 4, step, stream)
    radius, angle = words[:, ::2], words[:, 1::2]
    u = radius.to(dtype) * 2**-32 + 2**-33  # in (0, 1]: the logarithm is finite
    signed = angle - ((angle >> 31) << 32)  # the word as int32
    theta = signed.to(dtype) * (2**-31 * torch.pi)
    r = (-2 * u.log()).sqrt()
    return torch.stack([r * theta.cos(), r * theta.sin()], dim=-1).flatten(1)[:, :n]


# ---------------------------------------------------------------------------------------------------------------------
# One reverse step.


def posterior_step_reference(x_t, out, coefficients, step, seeds, out_uncond=None, guidance_scale=1.0, stream=0, clip=True):
    """posterior_step in PyTorch; x_t may also be float64 here, then so is all arithmetic."""
    k_x, k_o, a, b, s = coefficients[step].to(x_t.dtype).reshape(5).unbind()
    out = out.to(x_t.dtype)
    if out_uncond is not None:
        uncond = out_uncond.to(x_t.dtype)
        out = uncond + guidance_scale * (out - uncond)
    x0_hat = k_x * x_t + k_o * out
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    z = normal_reference(seeds, x_t[:1].numel(), step, stream, x_t.dtype).view(x_t.shape)
    return a * x0_hat + b * x_t + s * z


def posterior_step(x_t, out, coefficients, step, seeds, out_uncond=None, guidance_scale=1.0, stream=STEP_NOISE, clip=True):
    """x_{t-1} (or any earlier x_s) from x_t and the network's output, in one pass over memory:

        x0_hat = clamp(k_x x_t + k_o out, -1, 1)        out = out_uncond + guidance_scale (out - out_uncond), if given
        x_prev = a x0_hat + b x_t + s z                  z ~ N(0, I)

    That is Ho et al. 2020, Eq. 7, and Song et al. 2021 (DDIM), Eq. 12, for either kind of prediction; which one is in the
    five coefficients. Guidance: Ho & Salimans 2022, with w = 0 unconditional and w = 1 conditional.

    x_t: float32 (B, ...), contiguous or channels_last. out, out_uncond: the same shape, float32, bfloat16 or float16.
    coefficients: float32 (steps, 5), rows (k_x, k_o, a, b, s). step: the row, an int or an int64 tensor of one element on
    x_t's device, which lets a CUDA graph replay the call for every step. seeds: int64 (B,), one an image.
    Returns float32 like x_t; no gradient flows through. Raises ValueError, TypeError or IndexError where these do not fit.
    """
    if not isinstance(step, torch.Tensor) and not 0 <= step < len(coefficients):
        raise IndexError(f"posterior_step: step {step} is outside 0..{len(coefficients) - 1}")
    if not fused(x_t.device):
        return posterior_step_reference(x_t, out, coefficients, step, seeds, out_uncond, guidance_scale, stream, clip)
    if not isinstance(step, torch.Tensor):
        step = torch.full((), step, dtype=torch.int64, device=x_t.device)
    return torch.ops.fused_ddpm.posterior_step(x_t, out, out_uncond, guidance_scale, coefficients, step, seeds, stream, clip)


def seeded_normal(seeds, shape):
    """The start of a reverse process: standard normals, float32 (B, *shape), a function of seeds (B,) int64 alone."""
    zeros = torch.zeros(len(seeds), *shape, device=seeds.device)
    only_noise = torch.eye(5, device=seeds.device)[4:]  # s = 1; made on the device, so that a CUDA graph may hold it
    return posterior_step(zeros, zeros, only_noise, 0, seeds, stream=START_NOISE)


_failed_captures = []  # after one no other is tried: it may leave CUDA's allocator and generator in the middle of a capture


def _capture(body, warm_up, device):
    """body(), work on fixed CUDA tensors, as a CUDA graph: its replay, one launch whatever body launches. Else body itself."""
    if device.type != "cuda" or _failed_captures:
        return body
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their algorithms and take their workspaces, which they cannot while captured
            warm_up()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, NCCL's, may call CUDA meanwhile
            body()
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # which torch leaves at the one it captured on
        raise (error.__context__ or error) from None  # what went wrong, rather than that the capture could not be ended
    return graph.replay


@functools.cache
def _keep_freed_memory():
    """Have glibc keep freed memory for the next tensor: mapping it anew in each step is a tenth of a small network's time."""
    malloc_options = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if malloc_options:
        for option, size in (-3, 1 << 25), (-3, 1 << 30), (-1, 2**31 - 1):  # M_MMAP_THRESHOLD (some stop at 32 MB), M_TRIM_
            malloc_options(option, size)


def reverse_process(reverse_step, x_t, num_steps, inputs=(), watch=None, graphs=None):
    """x_t after num_steps times x_t = reverse_step(x_t, step, *inputs), step = 0, 1, ... as an int64 tensor (1,).

    On a GPU a step, network and all, is one replay of a CUDA graph. For that reverse_step must neither read a value on the
    host nor depend on any tensor made anew between calls, save x_t and the tensors `inputs`. Where it cannot be captured, a
    warning says why and the steps run one by one.

    watch: called with x_t after each step; the next overwrites it, so clone what is to be kept. graphs: a dict, empty at first,
    that passes the graph on to later calls of the same reverse_step with other values.
    """
    if x_t.device.type == "cpu":
        _keep_freed_memory()
    graphs = {} if graphs is None else graphs
    key = tuple((t.shape, t.stride(), t.dtype) for t in (x_t, *inputs))
    if key not in graphs:
        fixed, step = [t.clone() for t in (x_t, *inputs)], torch.zeros(1, dtype=torch.int64, device=x_t.device)

        def body():
            fixed[0].copy_(reverse_step(fixed[0], step, *fixed[1:]))
            step.add_(1)

        try:
            replay = _capture(body, lambda: reverse_step(fixed[0], step, *fixed[1:]), x_t.device)
        except RuntimeError as error:
            warnings.warn(f"sampling without a CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)
            _failed_captures.append(error)
            replay = body
        graphs[key] = fixed, step, replay, body  # body, as it keeps alive what reverse_step refers to: the graph has addresses
    fixed, step, replay, _ = graphs[key]
    for to, value in zip(fixed, (x_t, *inputs), strict=True):
        to.copy_(value)
    step.zero_()
    for _ in range(num_steps):
        replay()
        if watch:
            watch(fixed[0])
    return fixed[0].clone()


# ---------------------------------------------------------------------------------------------------------------------
# The masked loss.

LOSS_KINDS = {"l2": 0, "l1": 1, "huber": 2}  # huber: smooth l1 with beta = 1


def masked_loss_reference(pred, target, target_mask=None, cond_mask=None, cond_weight=0.05, kind="l2"):
    """masked_loss in PyTorch."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    diff = pred.to(dtype) - target.to(dtype)
    size = diff.abs()
    d = {"l2": diff**2, "l1": size, "huber": torch.where(size < 1, 0.5 * diff**2, size - 0.5)}[kind]
    w = torch.ones_like(d) if target_mask is None else target_mask.to(dtype)
    if cond_mask is not None:
        w = w + cond_weight * cond_mask.to(dtype)
    w = w.clamp(max=1).expand_as(d)
    total = w.sum()
    return (w * d).sum() / torch.where(total > 0, total, 1)


def masked_loss(pred, target, target_mask=None, cond_mask=None, cond_weight=0.05, kind="l2"):
    """sum(w d(pred, target)) / sum(w), with w = min(target_mask + cond_weight cond_mask, 1) broadcast over channels.

    The denominator is the total weight, not the number of pixels: the loss is a mean over what the masks select. Masks
    that select nothing give 0 with gradient 0. Without masks it is the plain mean.

    pred: (B, C, H, W), or any shape without masks; float32, float64, bfloat16 or float16. target: the same shape.
    target_mask, cond_mask: (B, 1, H, W) or (B, C, H, W), bool, uint8 or float in [0, 1]. kind: l2, l1 or huber (beta = 1).
    Returns a scalar, float64 for float64 and else float32, differentiable once by pred and target. Summed in a fixed order:
    the same bits each run.
    Raises ValueError or TypeError for arguments that do not fit.
    """
    if kind not in LOSS_KINDS:
        raise ValueError(f"masked_loss: kind must be one of {', '.join(LOSS_KINDS)}, got {kind!r}")
    if target_mask is None and cond_mask is not None:
        raise ValueError("masked_loss: cond_mask needs a target_mask")
    if not fused(pred.device):
        return masked_loss_reference(pred, target, target_mask, cond_mask, cond_weight, kind)
    loss, _ = torch.ops.fused_ddpm.masked_loss(pred, target, target_mask, cond_mask, cond_weight, LOSS_KINDS[kind])
    return loss


def _register():
    """Shapes, strides and dtypes of the extension's operators, for torch.compile."""

    def dense(t):
        channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        return t if channels_last else t.contiguous()

    @torch.library.register_fake("fused_ddpm::posterior_step")
    def _(x_t, out, out_uncond, guidance_scale, coefficients, step, seeds, stream, clip):
        return torch.empty_like(dense(x_t))

    @torch.library.register_fake("fused_ddpm::masked_loss")
    def _(pred, target, target_mask, cond_mask, cond_weight, kind):
        scalar = pred.new_empty((), dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32)
        return scalar, torch.empty_like(scalar)

    @torch.library.register_fake("fused_ddpm::masked_loss_backward")
    def _(grad, pred, target, target_mask, cond_mask, total, cond_weight, kind):
        return torch.empty_like(dense(pred))


if BACKENDS:
    _register()
