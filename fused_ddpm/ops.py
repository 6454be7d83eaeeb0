"""The fused operations in and around a diffusion network, each below its PyTorch reference.

    posterior_step   one reverse step, DDPM or DDIM, for any kind of prediction, guidance included
    masked_loss      a loss weighted by pixel masks, with its gradient
    norm_silu        what stands before each convolution: GroupNorm, scale and shift, SiLU

They run in the C++/CUDA extension (csrc/) where it is built for the tensor's device, else in the
reference here, and give the same numbers up to rounding. `status()` tells which and why;
FUSED_DDPM=0 in the environment forces the reference. (For a CPU it has one more, linear_weights:
see linear.py.)
"""

import json
import operator
import os
import sysconfig
from pathlib import Path

from fused_ddpm.noise import START_NOISE, STEP_NOISE, normal_reference

import torch
import torch.nn.functional as F


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
    built_for, reason = record["torch"], record["reason"]
    if not record["backends"]:
        return (), f"{reason}; after mending that: pip install -e ."
    if built_for != torch.__version__:
        versions = f"built for torch {built_for}, this is {torch.__version__}"
        return (), f"{versions}; to rebuild: pip install -e ."
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (), f"cannot be loaded ({error}); to rebuild: pip install -e ."
    if "SymInt row" not in str(torch.ops.fused_ddpm.posterior_step.default._schema):
        return (), "built from older sources; to rebuild: pip install -e ."
    return tuple(record["backends"]), reason


BACKENDS, REASON = _load_extension()


def status():
    """One line: which backend runs, and why."""
    if not BACKENDS:
        return f"PyTorch reference (extension: {REASON})"
    missing = "" if "cuda" in BACKENDS else f" (no CUDA kernels: {REASON})"
    return f"fused kernels for {' and '.join(BACKENDS)}{missing}"


def fused(device):
    """The one rule that picks the path: the extension where it was built for such a device."""
    return torch.device(device).type in BACKENDS


def check_devices(op, first, **tensors):
    """ValueError unless all are where the first is: mixed, torch might take a path of neither."""
    device = first.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")


def check_shapes(op, **given):
    """ValueError unless each of name=(tensor, shapes...), if there, has one of the shapes."""
    for name, (tensor, *shapes) in given.items():
        if tensor is not None and tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {expected}")


# --------------------------------------------------------------------------------------------------
# One reverse step.


def posterior_step_reference(
    x_t, out, coefficients, step, seeds, out_uncond=None, guidance_scale=1.0, stream=0, clip=True
):
    """posterior_step in PyTorch; x_t may also be float64 here, then so is all arithmetic."""
    outs = dict(out=(out, x_t.shape), out_uncond=(out_uncond, x_t.shape))
    check_shapes("posterior_step", **outs, seeds=(seeds, x_t.shape[:1]))
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


def posterior_step(
    x_t,
    out,
    coefficients,
    step,
    seeds,
    out_uncond=None,
    guidance_scale=1.0,
    stream=STEP_NOISE,
    clip=True,
):
    """x_{t-1} (or any earlier x_s) from x_t and the network's output, in one pass over memory:

        x0_hat = clamp(k_x x_t + k_o out, -1, 1)
        x_prev = a x0_hat + b x_t + s z,            z ~ N(0, I)
        out    = out_uncond + guidance_scale (out - out_uncond)      where out_uncond is given

    That is Ho et al. 2020, Eq. 7, and Song et al. 2021 (DDIM), Eq. 12, for any kind of prediction;
    which one is in the five coefficients. Guidance: Ho & Salimans 2022, with their w + 1 as scale,
    so that 0 is unconditional and 1 conditional.

    x_t: float32 (B, ...), contiguous or channels_last. out, out_uncond: the same shape, float32,
    bfloat16 or float16. coefficients: float32 (steps, 5), rows (k_x, k_o, a, b, s). step: the row,
    an int or an int64 tensor of one element on x_t's device, which lets a CUDA graph replay the
    call for every step. seeds: int64 (B,), one an image. stream: of the noise, 0..2^32-1. clip:
    whether x0_hat is clamped. Returns float32 like x_t; no gradient flows through. Raises
    ValueError, TypeError or IndexError where these do not fit.
    """
    row, on_device = step, None
    if isinstance(step, torch.Tensor):
        row, on_device = 0, step
    elif type(step) is not int:  # of which torch.compile can make a variable
        row = operator.index(step)  # TypeError if it is not whole
    if not 0 <= row < coefficients.shape[0]:
        raise IndexError(f"posterior_step: step {row} is outside 0..{len(coefficients) - 1}")
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"posterior_step: stream {stream} is outside 0..{(1 << 32) - 1}")
    others = dict(coefficients=coefficients, step=on_device, seeds=seeds, out_uncond=out_uncond)
    check_devices("posterior_step", x_t, out=out, **others)
    if fused(x_t.device):
        return torch.ops.fused_ddpm.posterior_step(
            x_t, out, out_uncond, guidance_scale, coefficients, row, on_device, seeds, stream, clip
        )
    step = row if on_device is None else on_device
    rest = out_uncond, guidance_scale, stream, clip
    return posterior_step_reference(x_t, out, coefficients, step, seeds, *rest)


def seeded_normal(seeds, shape, stream=START_NOISE, step=0, steps=1):
    """Standard normals, float32 (B, *shape): a function of seeds (B,) int64, stream and step alone.

    step: 0..steps-1, as an int or a tensor, as in posterior_step.
    """
    zeros = torch.zeros(len(seeds), *shape, device=seeds.device)
    only_noise = torch.eye(5, device=seeds.device)[4:]  # s = 1; made where a CUDA graph may hold it
    return posterior_step(zeros, zeros, only_noise.repeat(steps, 1), step, seeds, stream=stream)


# --------------------------------------------------------------------------------------------------
# The masked loss.

LOSS_KINDS = {"l2": 0, "l1": 1, "huber": 2}  # huber: smooth l1 with beta = 1


def masked_loss_reference(
    pred, target, target_mask=None, cond_mask=None, cond_weight=0.05, kind="l2"
):
    """masked_loss in PyTorch."""
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    shapes = (*pred.shape[:1], 1, *pred.shape[2:]), pred.shape
    masks = dict(target_mask=(target_mask, *shapes), cond_mask=(cond_mask, *shapes))
    check_shapes("masked_loss", target=(target, pred.shape), **masks)
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[kind]
    d = distance(pred.to(dtype), target.to(dtype), reduction="none")
    w = torch.ones_like(d) if target_mask is None else target_mask.to(dtype)
    if cond_mask is not None:
        w = w + cond_weight * cond_mask.to(dtype)
    w = w.clamp(max=1).expand_as(d)
    total = w.sum()
    return (w * d).sum() / torch.where(total > 0, total, 1)


def masked_loss(pred, target, target_mask=None, cond_mask=None, cond_weight=0.05, kind="l2"):
    """sum(w d(pred, target)) / sum(w), w = min(target_mask + cond_weight cond_mask, 1).

    w is broadcast over channels. The denominator is the total weight, not the number of pixels: the
    loss is a mean over what the masks select. Masks that select nothing give 0 with gradient 0.
    Without masks it is the plain mean.

    pred: (B, C, H, W), or any shape without masks; float32, float64, bfloat16 or float16. target:
    the same shape. target_mask, cond_mask: (B, 1, H, W) or (B, C, H, W), bool, uint8 or float in
    [0, 1]. kind: l2, l1 or huber (beta = 1). Returns a scalar, float64 for float64 and else
    float32, differentiable once by pred and target, backwards only, summed in a fixed order: the
    same bits each run. Raises ValueError or TypeError for arguments that do not fit.
    """
    if kind not in LOSS_KINDS:
        known = ", ".join(LOSS_KINDS)
        raise ValueError(f"masked_loss: kind must be one of {known}, got {kind!r}")
    if target_mask is None and cond_mask is not None:
        raise ValueError("masked_loss: cond_mask needs a target_mask")
    masks = dict(target_mask=target_mask, cond_mask=cond_mask)
    check_devices("masked_loss", pred, target=target, **masks)
    if not fused(pred.device):
        return masked_loss_reference(pred, target, target_mask, cond_mask, cond_weight, kind)
    loss, _ = torch.ops.fused_ddpm.masked_loss(
        pred, target, target_mask, cond_mask, cond_weight, LOSS_KINDS[kind], False
    )
    return loss


# --------------------------------------------------------------------------------------------------
# Normalise, scale and shift, SiLU.


def norm_silu_reference(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    """norm_silu in PyTorch."""
    one, each = x.shape[1:2], x.shape[:2]
    check_shapes("norm_silu", weight=(weight, one), bias=(bias, one))
    check_shapes("norm_silu", scale=(scale, each), shift=(shift, each))
    if (scale is None) != (shift is None):
        raise ValueError("norm_silu: scale and shift come together")
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"norm_silu: {groups} groups do not fit x of shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"norm_silu: x must be floating point, got {x.dtype}")
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias, *film = (t if t is None else t.to(wide) for t in (weight, bias, scale, shift))
    h = torch.group_norm(x.to(wide), groups, weight, bias, eps)
    if scale is not None:
        scale, shift = (t[:, :, None, None] for t in film)
        h = torch.addcmul(shift, h, 1 + scale)
    return F.silu(h).to(x.dtype)


def norm_silu(x, weight, bias, groups, scale=None, shift=None, eps=1e-5):
    """silu(GroupNorm(x) (1 + scale) + shift), Wu & He 2018 and FiLM (Perez et al. 2018), in one
    pass over memory, forward and back.

    x: (B, C, H, W), float32, float64, bfloat16 or float16; weight, bias: (C,); scale, shift:
    (B, C), or neither. Arithmetic is float32, of float64 float64. Returns x's shape and dtype,
    channels_last; differentiable once by all. Raises ValueError or TypeError for arguments that do
    not fit.
    """
    check_devices("norm_silu", x, weight=weight, bias=bias, scale=scale, shift=shift)
    if not fused(x.device):
        return norm_silu_reference(x, weight, bias, groups, scale, shift, eps)
    return torch.ops.fused_ddpm.norm_silu(x, weight, bias, scale, shift, groups, eps)[0]


def _register():
    """Shapes, strides and dtypes of the extension's operators, for torch.compile."""

    def dense(t):
        channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        return t if channels_last else t.contiguous()

    @torch.library.register_fake("fused_ddpm::posterior_step")
    def _(x_t, out, out_uncond, guidance_scale, coefficients, row, step, seeds, stream, clip):
        others = dict(out_uncond=out_uncond, coefficients=coefficients, step=step, seeds=seeds)
        check_devices("posterior_step", x_t, out=out, **others)
        return torch.empty_like(dense(x_t))

    @torch.library.register_fake("fused_ddpm::linear_weights")
    def _(covariance, mask, off):
        check_devices("linear_weights", off, covariance=covariance, mask=mask)
        return off.new_empty(off.shape)

    @torch.library.register_fake("fused_ddpm::masked_loss")
    def _(pred, target, target_mask, cond_mask, cond_weight, kind, gradient):
        masks = dict(target_mask=target_mask, cond_mask=cond_mask)
        check_devices("masked_loss", pred, target=target, **masks)
        double = pred.dtype == torch.float64
        loss = pred.new_empty((), dtype=torch.float64 if double else torch.float32)
        made = torch.empty_like(dense(pred), dtype=loss.dtype)
        return loss, made if gradient else loss.new_empty(0)

    def channels_last(x):
        return torch.empty_like(x, memory_format=torch.channels_last)

    def wide(x, *shape):
        return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))

    @torch.library.register_fake("fused_ddpm::norm_silu")
    def _(x, weight, bias, scale, shift, groups, eps):
        check_devices("norm_silu", x, weight=weight, bias=bias, scale=scale, shift=shift)
        return channels_last(x), wide(x, x.shape[0], groups, 2)

    @torch.library.register_fake("fused_ddpm::norm_silu_backward")
    def _(grad, x, weight, bias, scale, shift, stats, groups):
        B, C = x.shape[:2]
        film = [wide(x, 0), wide(x, 0)] if scale is None else [wide(x, B, C), wide(x, B, C)]
        return channels_last(x), wide(x, C), wide(x, C), *film


if BACKENDS:
    _register()
