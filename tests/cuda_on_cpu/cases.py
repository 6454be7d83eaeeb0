"""Run by test_cuda_on_cpu.py: cases.py LIBRARY [COUNT]. Random calls of the emulated kernels,
against the reference in float64."""

import ctypes
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from fused_ddpm import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole groups of four pixels and others; more than a block; more images than a small grid.
SHAPES = [(3, 3, 8, 8), (2, 3, 20, 32), (2, 1, 28, 28), (3, 3, 7, 9), (2, 5, 4, 3), (1, 1, 1, 1)]
SHAPES += [(9, 2, 4, 4), (7, 3, 2, 2), (1, 4, 16, 16)]
ROWS = [[1.7, -1.4, 0.31, 0.68, 0.11], [1.2, -0.6, 1.0, 0.0, 0.0]]


def laid_out(t):
    """The same values contiguous, channels_last, as every other column, or off the boundary."""
    kind = random.choice(["contiguous", "channels_last", "channels_last", "sliced", "shifted"])
    if kind == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2]
    if kind == "shifted":
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    return t.contiguous()


def posterior_case():
    shape = random.choice(SHAPES)
    x, out, uncond = (torch.randn(shape) for _ in range(3))
    dtype = random.choice(DTYPES)
    x, out, uncond = laid_out(x), laid_out(out.to(dtype)), laid_out(uncond.to(dtype))
    seeds = torch.randint(-(2**62), 2**62, shape[:1])
    guided = random.choice([{}, {"out_uncond": uncond, "guidance_scale": 3.0}])
    options = dict(stream=random.randrange(4), clip=random.random() < 0.5) | guided
    table, row = torch.tensor(ROWS), random.randrange(len(ROWS))
    step = random.choice([row, torch.tensor(row), torch.tensor([row])])
    got = ops.posterior_step(x, out, table, step, seeds, **options)
    expected = ops.posterior_step_reference(x.double(), out, table, step, seeds, **options)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def loss_case():
    shape, dtype = random.choice(SHAPES), random.choice([*DTYPES, torch.float64])
    pred, target = laid_out(torch.randn(shape).to(dtype)), laid_out(torch.randn(shape))
    masks = [None, None]
    for i in range(random.randrange(3)):
        mask = torch.rand(random.choice([shape, (shape[0], 1, *shape[2:])])) < 0.3
        masks[i] = mask.to(random.choice([torch.bool, torch.uint8, torch.float32]))
    kind = random.choice(list(ops.LOSS_KINDS))
    leaf = pred.double().requires_grad_()
    expected = ops.masked_loss_reference(leaf, target, *masks, 0.3, kind)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    rest = target, *masks, 0.3, ops.LOSS_KINDS[kind]
    loss, grad = torch.ops.fused_ddpm.masked_loss(pred, *rest, True)
    assert loss.dtype == grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)
    alone, _ = torch.ops.fused_ddpm.masked_loss(pred, *rest, False)
    assert torch.equal(alone, loss)


def norm_case():
    shape, groups = random.choice([((3, 16, 5, 4), 8), ((2, 6, 3, 3), 2), ((1, 80, 2, 3), 1)])
    dtype, (B, C, *_) = random.choice([*DTYPES, torch.float64]), shape
    x, grad = (laid_out(torch.randn(shape).to(dtype)) for _ in range(2))
    rest = [torch.randn(C), torch.randn(C)] + [torch.randn(B, C).to(dtype) for _ in range(2)]
    rest = rest[: random.choice([2, 4])]
    leaves = [t.double().requires_grad_() for t in (x, *rest)]
    expected = ops.norm_silu_reference(*leaves[:3], groups, *leaves[3:])
    expected = [expected.detach(), *torch.autograd.grad(expected, leaves, grad.double())]
    weight, bias, scale, shift = rest if len(rest) == 4 else (*rest, None, None)
    kernels = torch.ops.fused_ddpm
    y, stats = kernels.norm_silu(x, weight, bias, scale, shift, groups, 1e-5)
    grads = kernels.norm_silu_backward(grad, x, weight, bias, scale, shift, stats, groups)
    for got, exact in zip((y, *grads), expected, strict=len(rest) == 4):
        close = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(got.dtype, 2e-5)
        size = exact.abs().max().item()
        torch.testing.assert_close(got.double(), exact, rtol=close, atol=close * size)


def check_sectors(library):
    """Colour images, a mask for each and the gradient: hardly more than has to be moved is asked
    for, in either layout."""
    counts, count = (ctypes.c_uint64 * 2)(), ctypes.CDLL(library).count_sectors
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 32, 32)
        out = torch.randn(4, 3, 32, 32).bfloat16().contiguous(memory_format=layout)
        count(counts)
        ops.posterior_step(x, out, torch.tensor(ROWS), 0, torch.arange(4), out.clone())
        count(counts)
        asked, touched = counts
        assert asked < 1.3 * touched, (layout, asked, touched)
        torch.ops.fused_ddpm.masked_loss(out, x, x[:, :1] > 0, None, 0.05, 0, True)
        count(counts)
        asked, touched = counts
        assert asked < 1.3 * touched, (layout, asked, touched)


def main(library, count=400):
    torch.set_num_threads(1)
    torch.ops.load_library(library)  # tensors made from here on are checked
    ops.BACKENDS = ("cpu",)
    for i in range(int(count)):
        random.seed(i), torch.manual_seed(i)
        try:
            random.choice([posterior_case, loss_case, norm_case])()
        except Exception as error:
            raise SystemExit(f"case {i}: {error}") from error
    check_sectors(library)
    try:  # a step outside the table, known on the device only
        one = torch.zeros(1, 1, 1, 1)
        ops.posterior_step(
            one, one, torch.tensor(ROWS), torch.tensor(2), torch.zeros(1, dtype=torch.int64)
        )
    except RuntimeError as error:
        assert "row < steps" in str(error)
    else:
        raise SystemExit("a step outside the table went through")


if __name__ == "__main__":
    main(*sys.argv[1:])
