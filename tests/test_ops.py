"""The extension against its PyTorch reference, and the reference against known answers."""

import os
import subprocess
import sys

from fused_ddpm import masked_loss, ops, posterior_step, seeded_normal
from fused_ddpm.noise import START_NOISE, normal_reference
from fused_ddpm.ops import masked_loss_reference, posterior_step_reference

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

DEVICES = [d for d in ops.BACKENDS if d == "cpu" or torch.cuda.is_available()]
needs_extension = pytest.mark.skipif(not DEVICES, reason=f"extension: {ops.REASON}")
WHERE = DEVICES or [pytest.param("cpu", marks=needs_extension)]
on_devices = pytest.mark.parametrize("device", WHERE)

SHAPES = [(2, 3, 32, 32), (3, 1, 28, 28), (5, 3, 7, 9), (2, 5, 1, 3), (1, 1, 1, 1)]
SHAPES += [(2, 3, 65, 33), (4, 10), (7,), (0, 3, 8, 8), (2, 0, 8, 8)]
COEFFICIENTS = torch.tensor(
    [
        [1.7, -1.4, 0.31, 0.68, 0.11],  # any step of eps-prediction
        [0.6, -0.8, 0.9, 0.05, 0.3],  # v
        [0.0, 1.0, 0.2, 0.8, 0.4],  # x0
        [1.2, -0.6, 1.0, 0.0, 0.0],  # the last step: no noise
    ]
)
CLOSE = dict(rtol=2e-5, atol=2e-5)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def inputs(shape, device="cpu", dtype=torch.float32, layout="contiguous", seed=0):
    g = torch.Generator().manual_seed(seed)
    x, out, uncond = (torch.randn(shape, generator=g) for _ in range(3))
    if layout != "contiguous" and len(shape) == 4:
        out, uncond = channels_last(out), channels_last(uncond)
        x = x if layout == "mixed" else channels_last(x)
    seeds = torch.randint(-(2**62), 2**62, (shape[0],), generator=g)
    return x.to(device), out.to(device, dtype), uncond.to(device, dtype), seeds.to(device)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards by conftest.py."""
    return torch.set_num_threads


# -- posterior_step --------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
def test_posterior_step_matches_reference(device, shape, layout):
    table = COEFFICIENTS.to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, out, uncond, seeds = inputs(shape, device, dtype, layout)
        guided = {"out_uncond": uncond, "guidance_scale": 3.0}
        for step in range(len(table)):
            for options in ({}, {"clip": False}, guided, {"stream": 1}):
                got = posterior_step(x, out, table, step, seeds, **options)
                expected = posterior_step_reference(x.double(), out, table, step, seeds, **options)
                assert got.dtype == torch.float32
                assert got.shape == x.shape and got.stride() == x.stride()
                torch.testing.assert_close(got.double(), expected, **CLOSE)


def test_reference_step_is_the_formula():
    x, out, uncond, seeds = inputs((2, 3, 5, 4))
    z = normal_reference(seeds, 60, 1, 7, torch.float64).view(x.shape)
    k_x, k_o, a, b, s = COEFFICIENTS[1].double()
    x, out, uncond = x.double(), out.double(), uncond.double()
    guided = uncond + 3 * (out - uncond)
    for clip, far in [(True, 1.0), (False, float("inf"))]:
        expected = a * (k_x * x + k_o * guided).clamp(-far, far) + b * x + s * z
        got = posterior_step_reference(x, out, COEFFICIENTS, 1, seeds, uncond, 3.0, 7, clip)
        torch.testing.assert_close(got, expected)


@on_devices
def test_step_may_be_a_tensor_and_is_checked(device):
    x, out, _, seeds = inputs((2, 3, 8, 8), device)
    table = COEFFICIENTS.to(device)
    for step in range(len(table)):
        expected = posterior_step(x, out, table, step, seeds)
        for shape in ((), (1,)):
            on_device = torch.full(shape, step, device=device)
            assert torch.equal(expected, posterior_step(x, out, table, on_device, seeds))
    for step in (-1, len(table)):
        with pytest.raises(IndexError):
            posterior_step(x, out, table, step, seeds)
    wrong = [("x_t", x.double()), ("out", out[:1]), ("out", out.double()), ("seeds", seeds[:1])]
    wrong += [("coefficients", table[:, :4])]
    for name, value in wrong:
        arguments = dict(x_t=x, out=out, coefficients=table, step=0, seeds=seeds) | {name: value}
        with pytest.raises((ValueError, TypeError)):
            posterior_step(**arguments)


@on_devices
def test_slices_and_nan(device):
    x, out, uncond, seeds = inputs((4, 3, 8, 12), device)
    table = COEFFICIENTS.to(device)
    half, half_out = x[:, :, :, ::2], out[:, :, :, ::2]
    sliced = posterior_step(half, half_out, table, 0, seeds)
    dense = posterior_step(half.contiguous(), half_out.contiguous(), table, 0, seeds)
    assert torch.equal(sliced, dense)
    doubled = torch.cat([out, uncond])  # guidance hands over the halves of one batch
    halves = posterior_step(x, doubled[:4], table, 0, seeds, doubled[4:], 2.0)
    assert torch.equal(halves, posterior_step(x, out, table, 0, seeds, uncond, 2.0))
    flat = torch.cat([x.flatten()[:1], x.flatten()])  # storage that starts off a vector's boundary
    shifted = posterior_step(flat[1:].view(x.shape), out, table, 0, seeds)
    assert torch.equal(shifted, posterior_step(x, out, table, 0, seeds))
    every_other = torch.stack([seeds, seeds], dim=1).flatten()[::2]
    assert torch.equal(shifted, posterior_step(x, out, table, 0, every_other))
    out[0, 0, 0, 0] = float("nan")  # a diverged network must show, not be clipped to -1
    assert posterior_step(x, out, table, 0, seeds).isnan().sum() == 1


@on_devices
def test_image_is_independent_of_batch_and_threads(device, threads):
    x, out, _, seeds = inputs((64, 3, 32, 32), device)
    table = COEFFICIENTS.to(device)
    threads(2)
    whole = posterior_step(x, out, table, 0, seeds)
    ones = [slice(i, i + 1) for i in range(64)]
    single = torch.cat([posterior_step(x[i], out[i], table, 0, seeds[i]) for i in ones])
    assert torch.equal(whole, single)
    other_layout = posterior_step(channels_last(x), out, table, 0, seeds)
    torch.testing.assert_close(whole, other_layout, rtol=1e-6, atol=1e-6)
    threads(1)
    assert torch.equal(whole, posterior_step(x, out, table, 0, seeds))


@on_devices
@pytest.mark.parametrize("shape", [(1025, 1, 2, 2), (1, 1, 1025, 1031)])
def test_more_images_or_pixels_than_the_grid(device, shape):
    x, out, _, seeds = inputs(shape, device)
    table = COEFFICIENTS.to(device)
    expected = posterior_step_reference(x, out, table, 0, seeds)
    torch.testing.assert_close(posterior_step(x, out, table, 0, seeds), expected, **CLOSE)
    mask = x > 0.5
    expected = masked_loss_reference(out.double(), x.double(), mask)
    got = masked_loss(out, x, mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and the CUDA kernels")
def test_a_cuda_graph_replays_every_step():
    x, out, _, seeds = inputs((4, 3, 8, 8), "cuda")
    table, step = COEFFICIENTS.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    posterior_step(x, out, table, step, seeds)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = posterior_step(x, out, table, step, seeds)
    for i in range(len(table)):
        step.fill_(i)
        graph.replay()
        assert torch.equal(result, posterior_step(x, out, table, i, seeds))


@on_devices
def test_seeded_normal(device):
    seeds = torch.tensor([0, 1, -1, 2**40], device=device)
    z = seeded_normal(seeds, (3, 5, 7))
    expected = normal_reference(seeds, 105, 0, START_NOISE, torch.float64).view(4, 3, 5, 7)
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)
    expected = normal_reference(seeds, 105, 6, 3, torch.float64).view(4, 3, 5, 7)
    for step in (6, torch.tensor([6], device=device)):
        z = seeded_normal(seeds, (3, 5, 7), stream=3, step=step, steps=9)
        torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)


# -- masked_loss -----------------------------------------------------------------------------------

MASK_TYPES = {"bool": torch.bool, "uint8": torch.uint8, "float": torch.float32}


def loss_inputs(
    shape, device="cpu", dtype=torch.float32, layout="contiguous", mask="bool", per_channel=False
):
    g = torch.Generator().manual_seed(1)
    pred, target = 2 * torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    score = torch.rand(shape if per_channel else (shape[0], 1, *shape[2:]), generator=g)
    # They overlap a little: the weight is capped at 1.
    masks = [score < 0.2, (score > 0.15) & (score < 0.4)]
    masks = [m.to(MASK_TYPES[mask]).to(device) for m in masks]
    if mask == "float":
        masks = [m * 0.7 for m in masks]
    pred = pred.to(device, dtype)
    if layout == "channels_last":
        pred = channels_last(pred)
    double = dtype == torch.float64
    return pred, target.to(device, torch.float64 if double else torch.float32), *masks


def assert_loss_matches(pred, target, masks, kind):
    a, b = pred.detach().requires_grad_(), pred.detach().double().requires_grad_()
    got = masked_loss(a, target, *masks, 0.3, kind)
    expected = masked_loss_reference(b, target, *masks, 0.3, kind)
    got.backward(torch.full_like(got, 3.0))
    expected.backward(torch.full_like(expected, 3.0))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(pred.dtype, 1e-5)
    assert a.grad.dtype == pred.dtype and a.grad.stride() == pred.stride()
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=rtol, atol=1e-6)


@on_devices
@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 32, 32), (3, 1, 28, 28), (5, 3, 7, 9), (2, 2, 65, 33), (1, 1, 1, 1)]
)
def test_masked_loss_matches_reference(device, kind, layout, shape):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for mask in MASK_TYPES:
            for per_channel in (False, True):
                made = loss_inputs(shape, device, dtype, layout, mask, per_channel)
                pred, target, target_mask, cond_mask = made
                for masks in [(target_mask, cond_mask), (target_mask, None), (None, None)]:
                    assert_loss_matches(pred, target, masks, kind)


def test_reference_loss_is_the_formula():
    def image(*values):
        return torch.tensor(values).view(1, 1, 2, 2)

    pred, target = image(1.0, 4.0, 0.0, 2.0), torch.zeros(1, 1, 2, 2)
    masks = image(1, 0, 0, 1).bool(), image(0, 1, 0, 1).bool()
    for fn in (masked_loss, masked_loss_reference):  # weights 1, 0.5, 0, 1
        assert fn(pred, target, *masks, 0.5) == pytest.approx((1 + 8 + 4) / 2.5)
        assert fn(pred, target, *masks, 0.5, "l1") == pytest.approx((1 + 2 + 2) / 2.5)
        assert fn(pred, target, *masks, 0.5, "huber") == pytest.approx((0.5 + 1.75 + 1.5) / 2.5)
        assert fn(pred, target) == pytest.approx(21 / 4)


@on_devices
def test_nothing_selected_gives_zero(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device)
    pred.requires_grad_()
    loss = masked_loss(pred, target, torch.zeros_like(mask), torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and torch.equal(pred.grad, torch.zeros_like(pred))
    empty = torch.zeros(0, 3, 8, 8, device=device, requires_grad=True)
    no_mask = torch.zeros(0, 1, 8, 8, dtype=torch.bool, device=device)
    loss = masked_loss(empty, empty.detach(), no_mask)
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape


@on_devices
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5, 6)])
def test_any_shape_without_masks(device, shape):
    g = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    pred.requires_grad_()
    loss = masked_loss(pred, target)
    loss.backward()
    assert loss.item() == pytest.approx(((pred - target) ** 2).mean().item(), rel=1e-5)
    torch.testing.assert_close(pred.grad, (2 * (pred - target) / pred.numel()).detach())


@on_devices
def test_what_is_not_a_number_shows(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device, mask="float")
    bad_mask = mask.clone()
    bad_mask[0, 0, 0, 0] = float("nan")
    assert masked_loss(pred, target, bad_mask).isnan()
    pred[0, 0, 0, 0] = float("nan")
    assert masked_loss(pred, target, torch.zeros_like(mask)).isnan()
    assert masked_loss(pred, target, mask).isnan()


@on_devices
def test_one_mask_per_channel_and_the_other_not(device):
    pred, target, shared, _ = loss_inputs((2, 3, 8, 8), device)
    _, _, _, own = loss_inputs((2, 3, 8, 8), device, per_channel=True)
    for masks in [(shared, own), (own, shared)]:
        expected = masked_loss_reference(pred.double(), target.double(), *masks, 0.3)
        got = masked_loss(pred, target, *masks, 0.3).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@on_devices
def test_a_second_derivative_is_refused(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device)
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss = masked_loss(pred.requires_grad_(), target, mask)
        torch.autograd.grad(loss, pred, create_graph=True)


@on_devices
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own
def test_a_forward_mode_derivative_is_refused(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(pred, target)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            masked_loss(dual, target, mask)


@on_devices
def test_loss_bits_are_the_same_each_run(device, threads):
    made = loss_inputs((64, 3, 32, 32), device)
    first = masked_loss(*made)
    for n in (1, 2, 3):
        threads(n)
        assert torch.equal(first, masked_loss(*made))


@on_devices
def test_backward_may_run_again_and_leaves_what_it_gave_alone(device):
    pred, *rest = loss_inputs((2, 3, 8, 8), device)
    pred.requires_grad_()
    (once,) = torch.autograd.grad(masked_loss(pred, *rest), pred)
    loss = masked_loss(pred, *rest)
    for scale in (1.0, -2.5):
        upstream = torch.tensor(scale, device=device)
        (grad,) = torch.autograd.grad(loss, pred, upstream, retain_graph=True)
        torch.testing.assert_close(grad, scale * once)
        grad.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, pred)[0], once)
    with torch.no_grad():
        assert not masked_loss(pred, *rest).requires_grad


@on_devices
def test_a_compiled_loss_and_a_loss_under_autocast(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device, torch.bfloat16)
    pred.requires_grad_()
    expected = masked_loss(pred, target, mask)
    (expected_grad,) = torch.autograd.grad(expected, pred)
    compiled = torch.compile(masked_loss, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, torch.bfloat16):
        under_autocast = masked_loss(pred, target, mask)
    for loss in (compiled(pred, target, mask), under_autocast):
        assert loss.dtype == torch.float32 and torch.equal(loss, expected)
        assert torch.equal(torch.autograd.grad(loss, pred)[0], expected_grad)


@on_devices
def test_gradient_of_target(device):
    pred, target, target_mask, cond_mask = loss_inputs((2, 3, 8, 8), device)
    target.requires_grad_(), pred.requires_grad_()
    masked_loss(pred, target, target_mask, cond_mask).backward()
    assert pred.grad.abs().sum() > 0 and torch.equal(target.grad, -pred.grad)


@on_devices
@pytest.mark.parametrize("kind", ops.LOSS_KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(device, layout, kind):
    pred, *rest = loss_inputs((2, 2, 5, 3), device, torch.float64, layout)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_loss(p, *rest, 0.3, kind), pred)


@on_devices
def test_opcheck(device):
    x, out, uncond, seeds = inputs((2, 3, 8, 8), device)
    step, table = torch.tensor(1, device=device), COEFFICIENTS.to(device)
    operators, check = torch.ops.fused_ddpm, torch.library.opcheck
    for layout in (lambda t: t, channels_last, lambda t: t.transpose(2, 3)):
        images = layout(x), layout(out), layout(uncond)
        check(operators.posterior_step, (*images, 2.0, table, 0, step, seeds, 0, True))
        check(operators.posterior_step, (*images, 2.0, table, 1, None, seeds, 0, True))
    pred, target, target_mask, cond_mask = loss_inputs((2, 3, 8, 8), device)
    for masks in [(target_mask, cond_mask), (None, None)]:
        for layout in (lambda t: t, channels_last, lambda t: t.transpose(2, 3).contiguous().mT):
            for leaf in (layout(pred), layout(pred).bfloat16().requires_grad_()):
                for gradient in (False, True):
                    check(operators.masked_loss, (leaf, target, *masks, 0.05, 0, gradient))


@on_devices
def test_bad_arguments_are_named(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device)
    with pytest.raises(ValueError, match="kind must be one of"):
        masked_loss(pred, target, mask, kind="l3")
    with pytest.raises(ValueError, match="cond_mask needs a target_mask"):
        masked_loss(pred, target, cond_mask=mask)
    with pytest.raises(ValueError, match="target has shape"):
        masked_loss(pred, target[:1], mask)
    with pytest.raises(ValueError, match="target_mask has shape"):
        masked_loss(pred, target, mask[..., :4])
    with pytest.raises(TypeError, match="target_mask must be"):
        masked_loss(pred, target, mask.long())


@pytest.fixture(params=["extension", "reference"])
def either(request, monkeypatch):
    """The calls by the extension and by the reference."""
    if request.param == "reference":
        monkeypatch.setattr(ops, "BACKENDS", ())
    elif "cpu" not in ops.BACKENDS:
        pytest.skip(ops.REASON)


def test_shapes_that_differ_are_named(either):
    x, out, _, seeds = inputs((2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"out has shape \[1, 3, 8, 8\], expected \[2, 3, 8, 8\]"):
        posterior_step(x, out[:1], COEFFICIENTS, 0, seeds)
    with pytest.raises(ValueError, match=r"out_uncond has shape \[1, 3, 8, 8\]"):
        posterior_step(x, out, COEFFICIENTS, 0, seeds, out[:1], 2.0)
    with pytest.raises(ValueError, match=r"seeds .*shape"):
        posterior_step(x, out, COEFFICIENTS, 0, seeds[:1])
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"target has shape \[1, 3, 8, 8\], expected \[2, 3, 8"):
        masked_loss(pred, target[:1], mask)
    for wrong in (mask[0, 0], mask[:1], mask[..., :4]):
        for masks in ((wrong,), (mask, wrong)):
            with pytest.raises(ValueError, match=r"mask has shape .*, expected .* or .*"):
                masked_loss(pred, target, *masks)


def test_tensors_elsewhere_are_named(either):
    x, out, uncond, seeds = inputs((2, 3, 8, 8))
    given = dict(x_t=x, out=out, coefficients=COEFFICIENTS, seeds=seeds, out_uncond=uncond)
    given |= dict(step=torch.tensor(1))
    for name in given:
        with pytest.raises(ValueError, match=r"posterior_step: .* is on .*, expected"):
            posterior_step(**given | {name: given[name].to("meta")})
    names = ("pred", "target", "target_mask", "cond_mask")
    given = dict(zip(names, loss_inputs((2, 3, 8, 8)), strict=True))
    for name in given:
        with pytest.raises(ValueError, match=r"masked_loss: .* is on .*, expected"):
            masked_loss(**given | {name: given[name].to("meta")})


@pytest.mark.parametrize("step, error", [(0.0, TypeError), (1.5, TypeError), (None, TypeError)])
def test_a_step_that_is_not_whole_is_refused(either, step, error):
    x, out, _, seeds = inputs((2, 3, 8, 8))
    with pytest.raises(error):
        posterior_step(x, out, COEFFICIENTS, step, seeds)


def test_a_step_may_be_any_whole_number_of_the_table(either):
    x, out, _, seeds = inputs((2, 3, 8, 8))
    expected = posterior_step(x, out, COEFFICIENTS, 1, seeds)
    for step in (True, np.int64(1), torch.tensor([1])):
        assert torch.equal(posterior_step(x, out, COEFFICIENTS, step, seeds), expected)
    for step in (-1, len(COEFFICIENTS), 1 << 63):
        with pytest.raises(IndexError, match=r"step .* is outside 0\.\.3"):
            posterior_step(x, out, COEFFICIENTS, step, seeds)


def test_compiled_it_is_not_compiled_anew_for_each_step(either):
    x, out, _, seeds = inputs((2, 3, 8, 8))
    frames, table = CompileCounter(), COEFFICIENTS.repeat(5, 1)
    compiled = torch.compile(posterior_step, backend=frames, fullgraph=True)
    torch.compiler.reset()
    for step in range(len(table)):
        expected = posterior_step(x, out, table, step, seeds)
        assert torch.equal(compiled(x, out, table, step, seeds), expected)
    assert frames.frame_count <= 3  # 0, 1, any


@on_devices
def test_a_step_of_no_or_many_numbers_is_refused(device):
    x, out, _, seeds = inputs((2, 3, 8, 8), device)
    for step in (torch.tensor([], dtype=torch.int64), torch.tensor([0, 1]), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="step must be one int64"):
            posterior_step(x, out, COEFFICIENTS.to(device), step.to(device), seeds)


def test_streams_are_words_of_32_bits(either):
    x, out, _, seeds = inputs((2, 3, 8, 8))
    for stream in (-1, 1 << 32):
        with pytest.raises(ValueError, match=r"stream .* is outside 0..4294967295"):
            posterior_step(x, out, COEFFICIENTS, 0, seeds, stream=stream)
    last = posterior_step(x, out, COEFFICIENTS, 0, seeds, stream=(1 << 32) - 1)
    z = normal_reference(seeds, x[0].numel(), 0, (1 << 32) - 1, torch.float64).view(x.shape)
    k_x, k_o, a, b, s = COEFFICIENTS[0].double()
    expected = a * (k_x * x + k_o * out).clamp(-1, 1) + b * x + s * z
    torch.testing.assert_close(last.double(), expected, **CLOSE)


@on_devices
def test_the_operators_themselves_check_what_the_calls_do(device):
    x, out, _, seeds = inputs((2, 3, 8, 8), device)
    step, table = torch.tensor(1, device=device), COEFFICIENTS.to(device)
    operators = torch.ops.fused_ddpm
    for stream in (-1, 1 << 32):
        with pytest.raises(ValueError, match=r"outside 0\.\.4294967295"):
            operators.posterior_step(x, out, None, 1.0, table, 0, step, seeds, stream, True)
    with pytest.raises(ValueError, match="out is on meta"):
        operators.posterior_step(x, out.to("meta"), None, 1.0, table, 0, step, seeds, 0, True)
    pred, target, *_ = loss_inputs((2, 3, 8, 8), device)
    with pytest.raises(ValueError, match="target is on"):
        operators.masked_loss(pred, target.to("meta"), None, None, 0.05, 0, False)


@on_devices
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_bool_of_any_byte_counts_as_one(device, per_channel):
    pred, target, *masks = loss_inputs((2, 3, 8, 8), device, per_channel=per_channel)
    bytes_of = [m.byte() * 255 for m in masks]
    odd = [m.view(torch.bool) for m in bytes_of]
    assert torch.equal(masked_loss(pred, target, *odd, 0.3), masked_loss(pred, target, *masks, 0.3))
    capped = masked_loss(pred, target, *bytes_of, 0.3)  # of uint8 the values count
    either = masked_loss(pred, target, masks[0] | masks[1])
    torch.testing.assert_close(capped, either)


# -- which of the two runs -------------------------------------------------------------------------


def test_reference_can_be_forced():
    program = "from fused_ddpm import ops, status; print(ops.BACKENDS, status())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"FUSED_DDPM": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "() PyTorch reference (extension: FUSED_DDPM=0 is set)"


@pytest.mark.parametrize(
    "backends, reason, expected",
    [
        ((), "not built", "PyTorch reference (extension: not built)"),
        (("cpu",), "no nvcc", "fused kernels for cpu (no CUDA kernels: no nvcc)"),
        (("cpu", "cuda"), "", "fused kernels for cpu and cuda"),
    ],
)
def test_status_says_what_runs_and_why(monkeypatch, backends, reason, expected):
    monkeypatch.setattr(ops, "BACKENDS", backends)
    monkeypatch.setattr(ops, "REASON", reason)
    assert ops.status() == expected
    assert [ops.fused(d) for d in ("cpu", "cuda:1")] == ["cpu" in backends, "cuda" in backends]
