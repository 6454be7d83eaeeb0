"""ddpm.py: network, loss, reverse variance, generation and pictures."""

import argparse
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ddpm as script
import fused_ddpm


def make_args(**changes):
    options = dict(num_timesteps=50, schedule="cosine", objective="v", loss="l2", sampler="ddim", sample_steps=10, eta=0.0)
    options |= dict(variance="small", seed=0, batch_size=16, use_amp=False, device="cpu")
    return argparse.Namespace(**options | changes)


def small_unet(channels=3, size=16, **changes):
    torch.manual_seed(0)
    options = dict(dim=8, dim_mults=[1, 2, 4], num_blocks=1, attn_resolutions=[8], linear_attention=False, dropout=0.0)
    net = script.Unet(channels, channels, size, **options | changes)
    for p in net.parameters():  # away from the zero initialisation, which would hide everything
        p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.mark.parametrize(
    "mults, blocks, attention, linear",
    [([1], 1, [], True), ([1, 2], 2, [16], False), ([1, 2, 2, 3], 1, [4, 2], True), ([3, 11], 1, [8], False)],
)
def test_unet_shapes_and_gradients(mults, blocks, attention, linear):
    net = small_unet(dim_mults=mults, num_blocks=blocks, attn_resolutions=attention, linear_attention=linear)
    out = net(torch.randn(2, 3, 16, 16), torch.tensor([0, 49]))
    assert out.shape == (2, 3, 16, 16)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_linear_attention_is_where_it_is_asked_for():
    kinds = lambda net: [type(m).__name__ for m in net.modules() if isinstance(m, script.Attention)]
    assert kinds(small_unet(attn_resolutions=[])) == ["Attention"]  # the bottleneck's
    assert sorted(kinds(small_unet(linear_attention=True))) == ["Attention"] * 3 + ["LinearAttention"] * 4


def test_attention_against_sums():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 9, 4, generator=g, dtype=torch.float64) for _ in range(3))
    attention = script.Attention(8)
    weights = torch.exp(torch.einsum("bhic,bhjc->bhij", q, k) / 2)
    torch.testing.assert_close(attention.mix(q, k, v), torch.einsum("bhij,bhjc->bhic", weights / weights.sum(-1, True), v))
    linear = script.LinearAttention(8)
    gather = torch.exp(k) / torch.exp(k).sum(2, True)  # over places
    spread = torch.exp(q) / torch.exp(q).sum(3, True)  # over features
    expected = torch.einsum("bhif,bhjf,bhjc->bhic", spread, gather, v)  # as if by a matrix over all pairs of places
    torch.testing.assert_close(linear.mix(q, k, v), expected)


def test_full_preset_counts_about_30_million_parameters():
    full = script.build_parser()[1]["full"]
    names = ("dim", "dim_mults", "num_blocks", "attn_resolutions", "linear_attention", "dropout")
    count = sum(p.numel() for p in script.Unet(3, 3, 32, **{k: full[k] for k in names}).parameters())
    assert count / 1e6 == pytest.approx(30.2, abs=0.1)


def test_time_embedding_tells_times_apart():
    frequencies = script.TimeEmbedding(4).frequencies
    assert len(frequencies) == 64 and frequencies[0] == 1
    torch.testing.assert_close(frequencies[32].item(), 0.01)
    angle = torch.arange(1000)[:, None] * frequencies
    features = torch.cat([angle.sin(), angle.cos()], dim=1)
    distance = torch.cdist(features, features) + 10 * torch.eye(1000)
    assert distance.min() > 0.5


def test_ema_warms_up():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0), ema.weight.data.fill_(0.0)
    expected = 0.0
    for step in range(50):
        script.update_ema(ema, model, step, 0.7)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_loss_is_the_distance_to_the_goal(objective, kind):
    args = make_args(objective=objective, loss=kind)
    _, alphas_cumprod = script.make_schedule("cosine", 50)
    scales = script.make_scales(alphas_cumprod)
    x_start, noise, t = torch.rand(4, 3, 16, 16) - 0.5, torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 30, 49])
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    goal = {"eps": noise, "x0": x_start, "v": (a.sqrt() * noise - (1 - a).sqrt() * x_start).float()}[objective]
    shown = []
    assert script.training_loss(lambda x, t: shown.append(x) or goal, x_start, t, noise, scales, args) < 1e-6
    torch.testing.assert_close(shown[0], (a.sqrt() * x_start + (1 - a).sqrt() * noise).float())
    guess = torch.randn_like(goal)
    expected = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[kind](guess, goal)
    torch.testing.assert_close(script.training_loss(lambda x, t: guess, x_start, t, noise, scales, args), expected)


def test_large_variance_is_beta():
    betas, alphas_cumprod = script.make_schedule("linear", 50)
    _, table = script.sampling_table(alphas_cumprod, "eps", "ddpm", 50, variance="large")
    torch.testing.assert_close(table[:-1, 4].double(), betas.flip(0)[:-1].sqrt(), rtol=1e-5, atol=0)
    assert table[-1].tolist()[2:] == [1, 0, 0]
    _, small = script.sampling_table(alphas_cumprod, "eps", "ddpm", 50)
    assert torch.equal(table[:, :4], small[:, :4]) and (table[:-1, 4] > small[:-1, 4]).all()


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_same_seed_same_image(sampler, eta, monkeypatch):
    """Extension and reference, batches of 16 and of 7, one thread and two: the same bytes but for rounding."""
    net, args = small_unet().eval(), make_args(sampler=sampler, eta=eta)
    whole = script.generate(net, (3, 16, 16), 40, args).int()
    assert whole.float().std() > 10 and (whole[0] - whole[1]).abs().float().mean() > 10
    assert (script.generate(net, (3, 16, 16), 40, make_args(sampler=sampler, eta=eta, batch_size=7)) - whole).abs().max() <= 1
    assert (script.generate(net, (3, 16, 16), 5, args) - whole[:5]).abs().max() <= 1
    torch.set_num_threads(1)
    assert (script.generate(net, (3, 16, 16), 40, args) - whole).abs().max() <= 1
    monkeypatch.setattr(fused_ddpm, "BACKENDS", ())
    assert (script.generate(net, (3, 16, 16), 40, args) - whole).abs().max() <= 1


def test_watch_sees_every_step():
    seen = []
    args = make_args(variance="large")
    x = script.sample(small_unet().eval(), (3, 16, 16), torch.arange(4), args, lambda x_t: seen.append(x_t.clone()))
    assert len(seen) == 10 and torch.equal(seen[-1], x) and x.abs().max() <= 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_grids_put_images_in_rows(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 4) * 40
    sheet = np.asarray(script.tile(images, 3))
    assert sheet.shape == (36, 54, 3)
    assert [sheet[9 + 18 * (i // 3), 9 + 18 * (i % 3), 0] for i in range(6)] == [0, 40, 80, 120, 160, 255]
    script.draw_grid(tmp_path / "plain.png", images, 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "plain.png")), sheet)
    script.draw_grid(tmp_path / "labelled.png", images, 3, ["first", "second"], ["a", "b", "c"])
    labelled = np.asarray(Image.open(tmp_path / "labelled.png"))
    left, top = labelled.shape[1] - 54, labelled.shape[0] - 36
    assert left > 20 and top > 20 and np.array_equal(labelled[top:, left:], sheet)
    assert (labelled[top:, :left] < 100).any() and (labelled[:top, left:] < 100).any()


def test_a_run_learns_and_writes_everything(tmp_path):
    flags = """--data shapes --image-size 16 --dim 16 --dim-mults 1 2 --batch-size 16 --steps 120 --sample-every 60 --lr 5e-3
    --sample-steps 8 --num-samples 10 --num-timesteps 100 --plots"""
    script.main([*flags.split(), "--out-dir", str(tmp_path / "run")])
    pictures = {"loss.png", "samples.png", "step_000060.png", "schedules.png", "time_embedding.png"}
    pictures |= {"forward.png", "reverse.png", "reverse.gif", "variances.png"}
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == pictures | {"last.pt", "config.json", "history.json", "samples.npy"}
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert len({len(v) for v in history.values()}) == 1 and history["steps"][-1] == 120
    for part in ("train", "val", "test"):
        assert history[f"{part}_loss"][-1] < 0.8 * history[f"{part}_loss"][0]
    samples = np.load(tmp_path / "run/samples.npy")
    assert samples.shape == (10, 16, 16, 3) and samples.dtype == np.uint8
    assert Image.open(tmp_path / "run/reverse.gif").n_frames == 9
    assert Image.open(tmp_path / "run/forward.png").size == (540, 354)
    # A checkpoint is enough to generate: the data set may be gone.
    changed = torch.load(tmp_path / "run/last.pt", weights_only=True)
    changed["config"]["data"] = str(tmp_path / "gone")
    torch.save(changed, tmp_path / "copy.pt")
    script.main(["--sample", str(tmp_path / "copy.pt"), "--out-dir", str(tmp_path / "again")])
    assert np.array_equal(np.load(tmp_path / "again/samples.npy"), samples)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image-size 30 --dim-mults 1 2 4", "--image-size 30: the U-Net halves it 2 times, so it must be a multiple of 4"),
        ("--sample-steps 2000", "--sample-steps 2000: at most --num-timesteps, 1000"),
        ("--steps 5 --epochs 1", "argument --epochs: not allowed with argument --steps"),
        ("--schedule quadratic", "argument --schedule: invalid choice: 'quadratic'"),
        ("--lr 0", "argument --lr: must lie in (0, 1], got 0"),
        ("--ema-decay 1", "argument --ema-decay: must lie in [0, 1), got 1"),
        ("--batch-size 0", "argument --batch-size: must lie in [1,"),
    ],
)
def test_bad_flags_exit_with_2(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        script.main(["--data", "shapes", "--out-dir", str(tmp_path / "run"), *flags.split()])
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and message in last_line and not (tmp_path / "run").exists()
