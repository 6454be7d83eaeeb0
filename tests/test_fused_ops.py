"""The extension against its PyTorch reference, and the reference against known answers."""

import os
import subprocess
import sys

import pytest
import torch

import fused_ddpm
from fused_ddpm import masked_loss, masked_loss_reference, posterior_step, posterior_step_reference, seeded_normal

DEVICES = [d for d in fused_ddpm.BACKENDS if d == "cpu" or torch.cuda.is_available()]
needs_extension = pytest.mark.skipif(not DEVICES, reason=f"extension: {fused_ddpm.REASON}")
on_devices = pytest.mark.parametrize("device", DEVICES or [pytest.param("cpu", marks=needs_extension)])

SHAPES = [(2, 3, 32, 32), (3, 1, 28, 28), (5, 3, 7, 9), (2, 5, 1, 3), (1, 1, 1, 1), (2, 3, 65, 33), (4, 10), (7,)]
SHAPES += [(0, 3, 8, 8), (2, 0, 8, 8)]
COEFFICIENTS = torch.tensor(
    [
        [1.7, -1.4, 0.31, 0.68, 0.11],  # any step of eps-prediction
        [0.6, -0.8, 0.9, 0.05, 0.3],  # v
        [0.0, 1.0, 0.2, 0.8, 0.4],  # x0
        [1.2, -0.6, 1.0, 0.0, 0.0],  # the last step: no noise
    ]
)


def inputs(shape, device="cpu", dtype=torch.float32, layout="contiguous", seed=0):
    g = torch.Generator().manual_seed(seed)
    x, out, uncond = (torch.randn(shape, generator=g) for _ in range(3))
    if layout != "contiguous" and len(shape) == 4:
        out, uncond = (t.contiguous(memory_format=torch.channels_last) for t in (out, uncond))
        x = x if layout == "mixed" else x.contiguous(memory_format=torch.channels_last)
    seeds = torch.randint(-(2**62), 2**62, (shape[0],), generator=g)
    return x.to(device), out.to(device, dtype), uncond.to(device, dtype), seeds.to(device)


@pytest.mark.parametrize(
    "counter, key, expected",  # Random123's kat_vectors
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = fused_ddpm.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert " ".join(f"{w.item():08x}" for w in words) == expected


def test_noise_is_standard_normal():
    z = fused_ddpm.normal_reference(torch.arange(64), 16384, 3, 0, torch.float64)
    n = z.numel()
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - expected) < 4.5 * (variance / n) ** 0.5
    # Kolmogorov-Smirnov: sqrt(n) D is above 2.0 once in 1500
    cdf = torch.special.ndtr(z.flatten().sort().values)
    assert n**0.5 * (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 2.0
    for a, b in [(z[:, 1:], z[:, :-1]), (z[:, ::2], z[:, 1::2]), (z[1:], z[:-1])]:  # neighbours, pairs, images
        assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5
    for step, stream in [(4, 0), (3, 1)]:
        other = fused_ddpm.normal_reference(torch.arange(64), 16384, step, stream, torch.float64)
        assert abs((z * other).mean()) < 4.5 / n**0.5


@on_devices
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
def test_posterior_step_matches_reference(device, shape, layout):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, out, uncond, seeds = inputs(shape, device, dtype, layout)
        for step in range(len(COEFFICIENTS)):
            for options in ({}, {"clip": False}, {"out_uncond": uncond, "guidance_scale": 3.0}, {"stream": 1}):
                got = posterior_step(x, out, COEFFICIENTS.to(device), step, seeds, **options)
                expected = posterior_step_reference(x.double(), out, COEFFICIENTS.to(device), step, seeds, **options)
                assert got.dtype == torch.float32 and got.shape == x.shape and got.stride() == x.stride()
                torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@on_devices
def test_step_may_be_a_tensor_and_is_checked(device):
    x, out, _, seeds = inputs((2, 3, 8, 8), device)
    table = COEFFICIENTS.to(device)
    for step in range(len(table)):
        on_device = torch.tensor(step, device=device)
        assert torch.equal(posterior_step(x, out, table, step, seeds), posterior_step(x, out, table, on_device, seeds))
    for step in (-1, len(table)):
        with pytest.raises(IndexError):
            posterior_step(x, out, table, step, seeds)
    wrong = [("x_t", x.double()), ("out", out[:1]), ("out", out.double()), ("seeds", seeds[:1]), ("coefficients", table[:, :4])]
    for bad in [{name: value} for name, value in wrong]:
        arguments = dict(x_t=x, out=out, coefficients=table, step=0, seeds=seeds) | bad
        with pytest.raises((ValueError, TypeError)):
            posterior_step(**arguments)


@on_devices
def test_slices_and_nan(device):
    x, out, uncond, seeds = inputs((4, 3, 8, 12), device)
    sliced = posterior_step(x[:, :, :, ::2], out[:, :, :, ::2], COEFFICIENTS.to(device), 0, seeds)
    dense = posterior_step(x[:, :, :, ::2].contiguous(), out[:, :, :, ::2].contiguous(), COEFFICIENTS.to(device), 0, seeds)
    assert torch.equal(sliced, dense)
    doubled = torch.cat([out, uncond])  # guidance hands over the halves of one batch
    halves = posterior_step(x, doubled[:4], COEFFICIENTS.to(device), 0, seeds, doubled[4:], 2.0)
    assert torch.equal(halves, posterior_step(x, out, COEFFICIENTS.to(device), 0, seeds, uncond, 2.0))
    flat = torch.cat([x.flatten()[:1], x.flatten()])  # storage that starts off a vector's boundary
    shifted = posterior_step(flat[1:].view(x.shape), out, COEFFICIENTS.to(device), 0, seeds)
    assert torch.equal(shifted, posterior_step(x, out, COEFFICIENTS.to(device), 0, seeds))
    every_other = torch.stack([seeds, seeds], dim=1).flatten()[::2]
    assert torch.equal(shifted, posterior_step(x, out, COEFFICIENTS.to(device), 0, every_other))
    out[0, 0, 0, 0] = float("nan")  # a diverged network must show, not be clipped to -1
    assert posterior_step(x, out, COEFFICIENTS.to(device), 0, seeds).isnan().sum() == 1


@on_devices
def test_image_is_independent_of_batch_and_threads(device):
    x, out, _, seeds = inputs((64, 3, 32, 32), device)
    table = COEFFICIENTS.to(device)
    whole = posterior_step(x, out, table, 0, seeds)
    single = torch.cat([posterior_step(x[i : i + 1], out[i : i + 1], table, 0, seeds[i : i + 1]) for i in range(64)])
    assert torch.equal(whole, single)
    channels_last = posterior_step(x.contiguous(memory_format=torch.channels_last), out, table, 0, seeds)
    torch.testing.assert_close(whole, channels_last, rtol=1e-6, atol=1e-6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, posterior_step(x, out, table, 0, seeds))
    finally:
        torch.set_num_threads(threads)


@on_devices
@pytest.mark.parametrize("shape", [(1025, 1, 2, 2), (1, 1, 1025, 1031)])
def test_more_images_or_pixels_than_the_grid(device, shape):
    x, out, _, seeds = inputs(shape, device)
    expected = posterior_step_reference(x, out, COEFFICIENTS.to(device), 0, seeds)
    torch.testing.assert_close(posterior_step(x, out, COEFFICIENTS.to(device), 0, seeds), expected, rtol=2e-5, atol=2e-5)
    mask = x > 0.5
    expected = masked_loss_reference(out.double(), x.double(), mask)
    torch.testing.assert_close(masked_loss(out, x, mask).double(), expected, rtol=1e-5, atol=1e-6)


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
    expected = fused_ddpm.normal_reference(seeds, 105, 0, fused_ddpm.START_NOISE, torch.float64).view(4, 3, 5, 7)
    torch.testing.assert_close(z.double(), expected, rtol=1e-5, atol=1e-5)


# -- masked loss ------------------------------------------------------------------------------------------------------


def loss_inputs(shape, device="cpu", dtype=torch.float32, layout="contiguous", mask="bool", per_channel=False):
    g = torch.Generator().manual_seed(1)
    pred, target = 2 * torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    mask_shape = shape if per_channel else (shape[0], 1, *shape[2:])
    score = torch.rand(mask_shape, generator=g)
    masks = [score < 0.2, (score > 0.15) & (score < 0.4)]  # they overlap a little: the weight is capped at 1
    masks = [m.to({"bool": torch.bool, "uint8": torch.uint8, "float": torch.float32}[mask]).to(device) for m in masks]
    if mask == "float":
        masks = [m * 0.7 for m in masks]
    pred = pred.to(device, dtype)
    if layout == "channels_last":
        pred = pred.contiguous(memory_format=torch.channels_last)
    return pred, target.to(device, torch.float64 if dtype == torch.float64 else torch.float32), *masks


@on_devices
@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (3, 1, 28, 28), (5, 3, 7, 9), (2, 2, 65, 33), (1, 1, 1, 1)])
def test_masked_loss_matches_reference(device, kind, layout, shape):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for mask in ("bool", "uint8", "float"):
            for per_channel in (False, True):
                pred, target, target_mask, cond_mask = loss_inputs(shape, device, dtype, layout, mask, per_channel)
                for masks in [(target_mask, cond_mask), (target_mask, None), (None, None)]:
                    a, b = pred.detach().requires_grad_(), pred.detach().double().requires_grad_()
                    got = masked_loss(a, target, *masks, 0.3, kind)
                    expected = masked_loss_reference(b, target, *masks, 0.3, kind)
                    got.backward(torch.full_like(got, 3.0)), expected.backward(torch.full_like(expected, 3.0))
                    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
                    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
                    assert a.grad.dtype == dtype and a.grad.stride() == pred.stride()
                    torch.testing.assert_close(a.grad.double(), b.grad, rtol=rtol, atol=1e-6)


def test_reference_loss_is_the_formula():
    pred, target = torch.tensor([1.0, 4.0, 0.0, 2.0]).view(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    target_mask, cond_mask = torch.tensor([1, 0, 0, 1]).view(1, 1, 2, 2), torch.tensor([0, 1, 0, 1]).view(1, 1, 2, 2)
    for fn in (masked_loss, masked_loss_reference):  # weights 1, 0.5, 0, 1
        assert fn(pred, target, target_mask.bool(), cond_mask.bool(), 0.5) == pytest.approx((1 + 8 + 4) / 2.5)
        assert fn(pred, target, target_mask.bool(), cond_mask.bool(), 0.5, "l1") == pytest.approx((1 + 2 + 2) / 2.5)
        assert fn(pred, target, target_mask.bool(), cond_mask.bool(), 0.5, "huber") == pytest.approx((0.5 + 1.75 + 1.5) / 2.5)
        assert fn(pred, target) == pytest.approx(21 / 4)


@on_devices
def test_nothing_selected_gives_zero(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device)
    pred.requires_grad_()
    loss = masked_loss(pred, target, torch.zeros_like(mask), torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and torch.equal(pred.grad, torch.zeros_like(pred))
    empty = torch.zeros(0, 3, 8, 8, device=device, requires_grad=True)
    loss = masked_loss(empty, empty.detach(), torch.zeros(0, 1, 8, 8, dtype=torch.bool, device=device))
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape


@on_devices
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4, 5, 6)])
def test_any_shape_without_masks(device, shape):
    pred, target = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
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
    assert masked_loss(pred, target, torch.zeros_like(mask)).isnan() and masked_loss(pred, target, mask).isnan()


@on_devices
def test_one_mask_per_channel_and_the_other_not(device):
    pred, target, shared, _ = loss_inputs((2, 3, 8, 8), device)
    _, _, _, own = loss_inputs((2, 3, 8, 8), device, per_channel=True)
    for masks in [(shared, own), (own, shared)]:
        expected = masked_loss_reference(pred.double(), target.double(), *masks, 0.3)
        torch.testing.assert_close(masked_loss(pred, target, *masks, 0.3).double(), expected, rtol=1e-5, atol=1e-6)


@on_devices
def test_a_second_derivative_is_refused(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(masked_loss(pred.requires_grad_(), target, mask), pred, create_graph=True)


@on_devices
def test_loss_bits_are_the_same_each_run(device):
    pred, target, target_mask, cond_mask = loss_inputs((64, 3, 32, 32), device)
    first = masked_loss(pred, target, target_mask, cond_mask)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(first, masked_loss(pred, target, target_mask, cond_mask))
    finally:
        torch.set_num_threads(threads)


@on_devices
def test_gradient_of_target(device):
    pred, target, target_mask, cond_mask = loss_inputs((2, 3, 8, 8), device)
    target.requires_grad_(), pred.requires_grad_()
    masked_loss(pred, target, target_mask, cond_mask).backward()
    assert torch.equal(target.grad, -pred.grad)


@on_devices
def test_gradcheck(device):
    for layout in ("contiguous", "channels_last"):
        for kind in fused_ddpm.LOSS_KINDS:
            pred, target, target_mask, cond_mask = loss_inputs((2, 2, 5, 3), device, torch.float64, layout)
            pred.requires_grad_()
            assert torch.autograd.gradcheck(lambda p: masked_loss(p, target, target_mask, cond_mask, 0.3, kind), pred)  # noqa: B023


@on_devices
def test_opcheck(device):
    x, out, uncond, seeds = inputs((2, 3, 8, 8), device)
    step = torch.tensor(1, device=device)
    ops = torch.ops.fused_ddpm
    for layout in (lambda t: t, lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.transpose(2, 3)):
        images = layout(x), layout(out), layout(uncond)
        torch.library.opcheck(ops.posterior_step, (*images, 2.0, COEFFICIENTS.to(device), step, seeds, 0, True))
    pred, target, target_mask, cond_mask = loss_inputs((2, 3, 8, 8), device)
    for masks in [(target_mask, cond_mask), (None, None)]:
        torch.library.opcheck(ops.masked_loss, (pred.detach().requires_grad_(), target, *masks, 0.05, 0))
        _, total = ops.masked_loss(pred, target, *masks, 0.05, 0)
        grad = torch.ones((), device=device)
        torch.library.opcheck(ops.masked_loss_backward, (grad, pred, target, *masks, total, 0.05, 0))
    strided = pred.transpose(2, 3)
    torch.library.opcheck(ops.masked_loss_backward, (grad, strided, target, None, None, total, 0.05, 0))


@on_devices
def test_bad_arguments_are_named(device):
    pred, target, mask, _ = loss_inputs((2, 3, 8, 8), device)
    with pytest.raises(ValueError, match="kind must be one of"):
        masked_loss(pred, target, mask, kind="l3")
    with pytest.raises(ValueError, match="target has shape"):
        masked_loss(pred, target[:1], mask)
    with pytest.raises(ValueError, match="target_mask has shape"):
        masked_loss(pred, target, mask[..., :4])
    with pytest.raises(TypeError, match="target_mask must be"):
        masked_loss(pred, target, mask.long())


def test_reference_can_be_forced():
    command = [sys.executable, "-c", "import fused_ddpm; print(fused_ddpm.BACKENDS, fused_ddpm.status())"]
    result = subprocess.run(command, env=os.environ | {"FUSED_DDPM": "0"}, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "() PyTorch reference (extension: FUSED_DDPM=0 is set)"
