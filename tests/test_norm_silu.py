"""norm_silu: the extension against the reference in float64, the reference against the formula."""

from fused_ddpm import ops
from fused_ddpm.ops import norm_silu, norm_silu_reference
from fused_ddpm.unet import NormSilu

import pytest
import torch

needs_extension = pytest.mark.skipif("cpu" not in ops.BACKENDS, reason=ops.REASON)
# One channel a group, or many; more channels than lanes; no multiple of any vector.
CASES = [((3, 16, 8, 8), 8), ((2, 6, 5, 3), 2), ((2, 320, 4, 4), 8), ((1, 1, 7, 7), 1)]


def inputs(shape, dtype=torch.float64, film=True, layout=torch.channels_last, seed=0):
    """x, weight, bias and scale, shift or nothing, all with a gradient; and a gradient of y."""
    g = torch.Generator().manual_seed(seed)
    B, C = shape[:2]
    x = (2 * torch.randn(shape, generator=g) + 1).to(dtype).contiguous(memory_format=layout)
    wide = torch.promote_types(dtype, torch.float32)
    rest = [torch.randn(C, generator=g).to(wide) for _ in range(2)]
    rest += [torch.randn(B, C, generator=g).to(dtype) for _ in range(2 * film)]
    grad = torch.randn(shape, generator=g).to(dtype)
    return [t.requires_grad_() for t in (x, *rest)], grad


def both(op, tensors, groups, grad):
    """y, and the gradients of all tensors."""
    x, weight, bias, *film = tensors
    y = op(x, weight, bias, groups, *film)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad)]


def test_the_reference_is_the_formula():
    (x, weight, bias, scale, shift), _ = inputs((3, 8, 5, 4))
    parts = x.unflatten(1, (4, 2))
    centred = parts - parts.mean((2, 3, 4), keepdim=True)
    normal = centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
    u = normal.flatten(1, 2) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    u = u * (1 + scale)[:, :, None, None] + shift[:, :, None, None]
    got = norm_silu_reference(x, weight, bias, 4, scale, shift)
    torch.testing.assert_close(got, u / (1 + (-u).exp()))


@needs_extension
@pytest.mark.parametrize("shape, groups", CASES)
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradients_match_the_reference(shape, groups, film, layout):
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for dtype, tolerance in close.items():
        tensors, grad = inputs(shape, dtype, film, layout)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        expected = both(norm_silu_reference, exact, groups, grad.double())
        got = both(norm_silu, tensors, groups, grad)
        assert got[0].dtype == dtype and got[1].dtype == dtype
        for a, b in zip(got, expected, strict=True):
            close = min(tolerance, 1e-5) if a.dtype == torch.float32 else tolerance
            size = b.abs().max().item()
            torch.testing.assert_close(a.double(), b, rtol=close, atol=close * size)


@needs_extension
def test_registered_as_torch_wants_it():
    for film in (False, True):
        (x, weight, bias, *rest), grad = inputs((2, 4, 3, 3), film=film)
        scale, shift = rest or (None, None)
        arguments = x, weight, bias, scale, shift, 2, 1e-5
        names = ["test_schema", "test_faketensor"]
        more = ["test_autograd_registration", "test_aot_dispatch_dynamic"] if film else []
        check = torch.library.opcheck
        check(torch.ops.fused_ddpm.norm_silu, arguments, test_utils=names + more)
        torch.autograd.gradcheck(lambda *t: both_values(t), (x, weight, bias, *rest))
        _, stats = torch.ops.fused_ddpm.norm_silu(*arguments)
        plain = [t if t is None else t.detach() for t in arguments[:5]]
        arguments = grad, *plain, stats, 2
        check(torch.ops.fused_ddpm.norm_silu_backward, arguments, test_utils=names)


def both_values(tensors):
    x, weight, bias, *film = tensors
    return norm_silu(x, weight, bias, 2, *film)


@needs_extension
def test_an_image_does_not_depend_on_batch_or_threads():
    for dtype in (torch.float32, torch.bfloat16):
        tensors, grad = inputs((5, 24, 9, 7), dtype)
        torch.set_num_threads(1)
        one = both(norm_silu, tensors, 8, grad)
        torch.set_num_threads(3)
        three = both(norm_silu, tensors, 8, grad)
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
        x, weight, bias, scale, shift = tensors
        alone = norm_silu(x[3:4], weight, bias, 8, scale[3:4], shift[3:4])
        assert torch.equal(alone, one[0][3:4])


@needs_extension
def test_a_large_mean_a_constant_image_and_values_without_bounds():
    x = 1000 + 0.1 * torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    one, nil = torch.ones(16), torch.zeros(16)
    exact = norm_silu_reference(x.double(), one.double(), nil.double(), 8)
    torch.testing.assert_close(norm_silu(x, one, nil, 8).double(), exact, rtol=1e-3, atol=2e-3)
    assert norm_silu(torch.full((1, 16, 128, 128), 10.1), one, nil, 8).abs().max() < 1e-3
    far = torch.tensor([-1e4, -200.0, 200.0, 1e4]).view(1, 1, 2, 2)
    wide = norm_silu(far, 1e3 * one[:1], nil[:1], 1)
    expected = norm_silu_reference(far.double(), 1e3 * one[:1].double(), nil[:1].double(), 1)
    torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-5)
    assert norm_silu(far, one[:1], torch.full((1,), -3e38), 1).abs().max() < 1e-30
    far[0, 0, 0, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        assert norm_silu(far.to(dtype), one[:1], nil[:1], 1).isnan().all()
    assert norm_silu(torch.zeros(0, 16, 4, 4), one, nil, 8).shape == (0, 16, 4, 4)


@pytest.mark.parametrize("extension", [pytest.param(True, marks=needs_extension), False])
def test_what_does_not_fit_is_refused(monkeypatch, extension):
    if not extension:
        monkeypatch.setattr(ops, "BACKENDS", ())
    (x, weight, bias, scale, shift), _ = inputs((2, 4, 3, 3))
    for wrong in (
        (x[0], weight, bias, 2),
        (x, weight[:2], bias, 2),
        (x, weight, bias, 3),
        (x, weight, bias, 0),
        (x, weight, bias, 2, scale),
        (x, weight, bias, 2, scale[:1], shift[:1]),
        (x, weight, bias, 2, scale.view(2, 4, 1, 1), shift.view(2, 4, 1, 1)),
        (x, weight.to("meta"), bias, 2),
    ):
        with pytest.raises(ValueError):
            norm_silu(*wrong)
    with pytest.raises(TypeError):
        norm_silu(x.long(), weight, bias, 2)
    y = norm_silu(x, weight, bias, 2)
    if extension:
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@needs_extension
def test_compiled_code_takes_any_batch():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    x = mode.from_tensor(torch.zeros(5, 8, 4, 4))
    with mode:
        norm_silu(x, torch.ones(8), torch.zeros(8), 2)
    assert not [guard for guard in shapes.guards if "5" in str(guard.expr)]


def test_the_reference_has_the_dtypes_of_the_extension(monkeypatch):
    monkeypatch.setattr(ops, "BACKENDS", ())
    (x, weight, bias, scale, shift), _ = inputs((2, 4, 3, 3), torch.bfloat16)
    assert norm_silu(x, weight, bias, 2, scale.float(), shift.float()).dtype == torch.bfloat16
    assert norm_silu(x.float(), weight.bfloat16(), bias.bfloat16(), 2).dtype == torch.float32
    assert norm_silu(x[:, :, :1, :1], weight, bias, 4).shape == (2, 4, 1, 1)


def test_a_layer_with_and_without_the_extension(monkeypatch):
    torch.manual_seed(0)
    layer, x = NormSilu(24), torch.randn(2, 24, 5, 5)
    scale, shift = torch.randn(2, 2, 24)
    layer.weight.data.normal_(), layer.bias.data.normal_()
    fused = layer(x), layer(x, scale, shift)
    monkeypatch.setattr(ops, "BACKENDS", ())
    torch.testing.assert_close(fused, (layer(x), layer(x, scale, shift)))
    plain = torch.nn.functional.silu(torch.nn.GroupNorm.forward(layer, x))
    torch.testing.assert_close(layer(x), plain)
