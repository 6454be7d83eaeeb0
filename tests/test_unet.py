"""The U-Net: shapes, gradients, attention against sums, times and classes told apart."""

import math

import cfg_ddpm
import ddpm
import sparse_ddpm
from fused_ddpm.config import preset_values
from fused_ddpm.devices import round_weights
from fused_ddpm.unet import (
    Attention,
    LinearAttention,
    NormSilu,
    ResBlock,
    TimeEmbedding,
    Unet,
    zero,
)

import pytest
import torch
import torch.nn.functional as F
from helpers import away_from_zero, make_config

CLASSES = 4


def small_unet(num_classes=0, channels=3, script=ddpm, **changes):
    torch.manual_seed(0)
    config = make_config(script, **dict(dim_mults=[1, 2, 4], attn_resolutions=[8]) | changes)
    return away_from_zero(Unet(channels, 3, config, num_classes))


@pytest.mark.parametrize(
    "mults, blocks, attention, linear",
    [
        ([1], 1, [], True),
        ([1, 2], 2, [16], False),
        ([1, 2, 2, 3], 1, [4, 2], True),
        ([3, 11], 1, [8], False),
    ],
)
@pytest.mark.parametrize("classes", [0, CLASSES])
def test_unet_shapes_and_gradients(mults, blocks, attention, linear, classes):
    changes = dict(dim_mults=mults, num_blocks=blocks, attn_resolutions=attention)
    net = small_unet(classes, linear_attention=linear, **changes)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 49])
    out = net(x, t, torch.tensor([0, classes])) if classes else net(x, t)
    assert out.shape == (2, 3, 16, 16)
    out.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_channels_in_and_out_may_differ():
    out = small_unet(channels=9)(torch.randn(2, 9, 16, 16), torch.arange(2))
    assert out.shape == (2, 3, 16, 16)


def test_it_starts_as_nothing_and_its_blocks_as_the_identity():
    torch.manual_seed(0)
    net = Unet(3, 3, make_config(ddpm, attn_resolutions=[16], linear_attention=True))
    assert (net(torch.randn(2, 3, 16, 16), torch.arange(2)) == 0).all()
    x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 128)
    for block in (ResBlock(16, 16, 128, 0.0), Attention(16), LinearAttention(16)):
        assert torch.equal(block(x, emb), x)
    layer = zero(torch.nn.Conv2d(2, 2, 1))
    assert not layer.weight.any() and not layer.bias.any()


@pytest.mark.parametrize("channels, groups", [(8, 8), (12, 4), (33, 1), (128, 8)])
def test_groups_divide_the_channels(channels, groups):
    assert NormSilu(channels).num_groups == Attention(channels).norm.num_groups == groups


def test_dropout_is_there_in_training_alone():
    net = small_unet(dropout=0.5)
    x, t = torch.randn(2, 3, 16, 16), torch.arange(2)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


def test_an_image_does_not_depend_on_the_batch_around_it():
    net, x, t = small_unet(), torch.randn(5, 3, 16, 16), torch.tensor([3, 40, 7, 20, 0])
    whole = net(x, t)
    for i in range(5):
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1])[0], whole[i], rtol=0, atol=1e-5)


# -- attention -------------------------------------------------------------------------------------


def test_linear_attention_is_where_it_is_asked_for():
    def kinds(net):
        return sorted(type(m).__name__ for m in net.modules() if isinstance(m, Attention))

    assert kinds(small_unet(attn_resolutions=[])) == ["Attention"]  # the bottleneck's
    # Side 8: once down, once up. At the others linear: twice at 16, before and behind the middle's.
    mixed = kinds(small_unet(linear_attention=True))
    assert mixed == ["Attention"] * 3 + ["LinearAttention"] * 4
    assert kinds(small_unet(attn_resolutions=[4])) == ["Attention"] * 2  # and no third in between


def test_attention_against_sums():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 9, 4, generator=g, dtype=torch.float64) for _ in range(3))
    weights = torch.exp(torch.einsum("bhic,bhjc->bhij", q, k) / 2)
    expected = torch.einsum("bhij,bhjc->bhic", weights / weights.sum(-1, True), v)
    torch.testing.assert_close(Attention(8).mix(q, k, v), expected)
    gather = torch.exp(k) / torch.exp(k).sum(2, True)  # over places
    spread = torch.exp(q) / torch.exp(q).sum(3, True)  # over features
    # As if by a matrix over all pairs of places.
    expected = torch.einsum("bhif,bhjf,bhjc->bhic", spread, gather, v)
    torch.testing.assert_close(LinearAttention(8).mix(q, k, v), expected)


@pytest.mark.parametrize("channels, heads", [(32, 1), (64, 1), (128, 2), (192, 3), (256, 4)])
def test_heads_are_64_channels_wide(channels, heads):
    assert Attention(channels).heads == heads


def test_heads_attend_each_to_its_own_channels():
    torch.manual_seed(0)
    block = away_from_zero(Attention(128)).double()
    x = torch.randn(2, 128, 3, 4, dtype=torch.float64)
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, dim=1)  # (2, 128, 12)
    heads = []
    for part in (slice(0, 64), slice(64, 128)):
        weights = torch.einsum("bci,bcj->bij", q[:, part], k[:, part]).div(8).softmax(-1)
        heads.append(torch.einsum("bij,bcj->bci", weights, v[:, part]))
    mixed = torch.cat(heads, dim=1).view(2, 128, 3, 4)
    torch.testing.assert_close(block(x, None), x + block.out(mixed))


def test_attention_in_bfloat16_is_the_same_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 12, 64).bfloat16()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(Attention(128).mix(q, k, v).float(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("classes", [0, CLASSES])
def test_rounding_the_weights_for_good_changes_nothing_in_bfloat16(classes):
    net, x = small_unet(classes, linear_attention=True), torch.randn(3, 3, 16, 16)
    kept = net.out[0].weight.dtype
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = net(x, torch.arange(3))
        round_weights(net)
        assert torch.equal(net(x, torch.arange(3)), before)
    assert net.stem.weight.dtype == torch.bfloat16 and net.out[0].weight.dtype == kept


# -- times and classes -----------------------------------------------------------------------------


def test_time_embedding_tells_times_apart():
    frequencies = TimeEmbedding(4).frequencies
    assert len(frequencies) == 64 and frequencies[0] == 1
    torch.testing.assert_close(frequencies[32].item(), 0.01)
    angle = torch.arange(1000)[:, None] * frequencies
    features = torch.cat([angle.sin(), angle.cos()], dim=1)
    distance = torch.cdist(features, features) + 10 * torch.eye(1000)
    assert distance.min() > 0.5


def test_time_embedding_is_sines_and_cosines_through_an_mlp():
    torch.manual_seed(0)
    embed = TimeEmbedding(6)
    t = torch.tensor([0, 7, 999])
    angle = torch.tensor([[s / 10000 ** (i / 64) for i in range(64)] for s in t.tolist()])
    expected = embed.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))
    torch.testing.assert_close(embed(t), expected, rtol=1e-4, atol=1e-4)
    assert "frequencies" not in embed.state_dict()


def test_times_reach_the_network():
    net, x = small_unet(), torch.randn(1, 3, 16, 16)
    outs = torch.cat([net(x, torch.tensor([t])) for t in (0, 1, 25, 49)])
    for i in range(3):
        assert (outs[i] - outs[i + 1]).abs().max() > 1e-3


def test_network_tells_classes_apart():
    net, x = small_unet(CLASSES, dim_mults=[1, 2]), torch.randn(5, 3, 16, 16)
    t = torch.tensor([3, 40, 7, 20, 0])
    whole = net(x, t, torch.arange(5))
    assert net.null_class == CLASSES
    for label in range(5):  # 4 is the null class
        other = net(x, t, torch.full((5,), label))
        torch.testing.assert_close(other[label], whole[label], rtol=0, atol=1e-5)
        assert all((other[i] - whole[i]).abs().max() > 1e-3 for i in range(5) if i != label)
    assert torch.equal(net(x, t), other)  # None is the null class


def test_every_class_gets_a_gradient():
    net = small_unet(CLASSES, dim_mults=[1, 2])
    out = net(torch.randn(5, 3, 16, 16), torch.arange(5), torch.arange(5))
    out.square().mean().backward()
    assert net.classes[0].weight.shape[0] == 5
    assert (net.classes[0].weight.grad.abs().sum(1) > 0).all()


def test_without_classes_there_is_no_table():
    net, x, t = small_unet(), torch.randn(2, 3, 16, 16), torch.arange(2)
    assert torch.equal(net(x, t, t), net(x, t))
    assert not any(name.startswith("classes") for name, _ in small_unet().named_parameters())


# -- presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, channels, classes, millions",
    [(ddpm, 3, 0, 30.2), (cfg_ddpm, 3, 10, 30.3), (sparse_ddpm, 9, 0, 15.57)],
    ids=["ddpm", "cfg_ddpm", "sparse_ddpm"],
)
def test_full_preset_counts_its_parameters(script, channels, classes, millions):
    config = script.Config(**preset_values(script.Config, "full"))
    with torch.device("meta"):
        net = Unet(channels, 3, config, classes)
    count = sum(math.prod(p.shape) for p in net.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
