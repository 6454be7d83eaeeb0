"""sparse_ddpm.py: masks, what the network sees, reconstruction, metrics and messages."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

import fused_ddpm
import sparse_ddpm as script

TINY = """--data shapes --image-size 16 --dim 8 --dim-mults 1 2 --steps 6 --batch-size 16 --num-timesteps 50 --sample-steps 4
--num-samples 4 --num-draws 2 --lr 1e-3 --save-every 2""".split()


def run(out_dir, *flags):
    script.main([*TINY, "--out-dir", str(out_dir), *flags])


def mask_args(**changes):
    more = dict(target_sparsity=None, seed=0, use_amp=False)
    return argparse.Namespace(**dict(image_size=32, sparsity=0.2, mask_pattern="random", **more) | changes)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", list(script.PATTERNS))
@pytest.mark.parametrize("sparsity, target", [(0.2, 0.2), (0.1, 0.4), (0.5, 0.5), (0.003, 0.7)])
@pytest.mark.parametrize("size", [32, 15])
def test_masks_are_exact_and_disjoint(pattern, sparsity, target, size):
    args = mask_args(mask_pattern=pattern, sparsity=sparsity, target_sparsity=target, image_size=size)
    cond_mask, target_mask = script.make_masks(torch.arange(50), 3, args)
    assert cond_mask.shape == target_mask.shape == (50, 1, size, size) and cond_mask.dtype == torch.bool
    assert (cond_mask.sum((1, 2, 3)) == round(sparsity * size * size)).all()
    assert (target_mask.sum((1, 2, 3)) == min(round(target * size * size), size**2 - round(sparsity * size * size))).all()
    assert not (cond_mask & target_mask).any()


@pytest.mark.parametrize("pattern", list(script.PATTERNS))
def test_masks_depend_on_seed_image_and_epoch_alone(pattern):
    args, index = mask_args(mask_pattern=pattern), torch.arange(40)
    whole = torch.stack(script.make_masks(index, 5, args))
    assert torch.equal(whole, torch.stack(script.make_masks(index, 5, args)))
    assert torch.equal(whole[:, 7:9], torch.stack(script.make_masks(index[7:9], 5, args)))
    assert torch.equal(whole[:, [9, 7]], torch.stack(script.make_masks(torch.tensor([9, 7]), 5, args)))
    for other in [
        script.make_masks(index, 6, args),
        script.make_masks(index + 40, 5, args),
        script.make_masks(index, 5, mask_args(mask_pattern=pattern, seed=1)),
    ]:
        same = (whole == torch.stack(other)).all(dim=(2, 3, 4))
        assert same.float().mean() < 0.3  # grid has five phases, so some coincide


def test_random_masks_cover_all_pixels_alike():
    cond_mask, target_mask = script.make_masks(torch.arange(4000), 0, mask_args())
    for mask in (cond_mask, target_mask):
        rate = mask.float().mean(0)
        error = math.sqrt(0.2 * 0.8 / 4000)
        assert (rate - 0.2).abs().max() < 5 * error and abs(rate.std() - error) < 0.1 * error


@pytest.mark.parametrize("pattern", list(script.PATTERNS))
@pytest.mark.parametrize("sparsity", [0.05, 0.2])
def test_every_pixel_beside_the_seen_ones_is_a_target_now_and_then(pattern, sparsity):
    cond_mask, target_mask = script.make_masks(torch.arange(2000), 0, mask_args(mask_pattern=pattern, sparsity=sparsity))
    expected = sparsity / (1 - sparsity)
    for offset in [(0, 1), (1, 1), (2, 0), (0, 3), (5, 4)]:  # from a seen pixel
        there = cond_mask.roll(offset, (2, 3)) & ~cond_mask
        rate = (target_mask & there).sum() / there.sum()
        assert rate > 0.1 * expected, offset  # walks favour what is near, no pattern leaves a place out


def test_patterns_look_as_they_are_called():
    index = torch.arange(64)
    neighbours = {}
    for pattern in script.PATTERNS:
        cond_mask, _ = script.make_masks(index, 0, mask_args(mask_pattern=pattern))
        right = (cond_mask[..., :-1] & cond_mask[..., 1:]).sum().item()
        below = (cond_mask[:, :, :-1] & cond_mask[:, :, 1:]).sum().item()
        neighbours[pattern] = (right + below) / cond_mask.sum().item()
    assert neighbours["grid"] < 1 / 205  # 205 pixels, but the lattice has 204 or 205
    assert neighbours["random"] == pytest.approx(2 * 0.2 * 31 / 32, rel=0.1)
    assert neighbours["block"] > 1.4  # 1.5 inside a 4x4 block
    assert neighbours["walk"] > 0.9  # a path of n pixels has at least n - 1 neighbours


# -- the network and the loss -------------------------------------------------------------------------------------------


def small_unet(channels=3, size=16, **changes):
    torch.manual_seed(0)
    options = dict(dim=8, dim_mults=[1, 2, 4], num_blocks=1, attn_resolutions=[8], linear_attention=False, dropout=0.0)
    net = script.Unet(3 * channels, channels, size, **options | changes)
    for p in net.parameters():  # away from the zero initialisation, which would hide everything
        p.data += 0.05 * torch.randn_like(p)
    return net


def test_full_preset_has_about_15_million_parameters():
    full = script.build_parser()[1]["full"]
    names = ("dim", "dim_mults", "num_blocks", "attn_resolutions", "linear_attention", "dropout")
    count = sum(p.numel() for p in script.Unet(9, 3, 32, **{k: full[k] for k in names}).parameters())
    assert 14.5e6 < count < 16e6


def test_network_sees_observed_pixels_only_and_loss_the_target_only():
    args = mask_args(image_size=16, cond_weight=0.0, loss="l2", objective="x0")
    scales = script.make_scales(script.make_schedule("cosine", 50)[1])
    net, index = small_unet(), torch.arange(4)
    cond_mask, target_mask = script.make_masks(index, 0, args)
    x_start, noise, t = torch.rand(4, 3, 16, 16) - 0.5, torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 30, 49])
    cond = x_start * cond_mask
    out = script.predict(net, noise, t, cond, cond_mask, args)
    unseen = torch.where(cond_mask, x_start, torch.randn_like(x_start))
    assert torch.equal(out, script.predict(net, noise, t, unseen * cond_mask, cond_mask, args))
    assert not torch.equal(out, script.predict(net, noise, t, cond + 0.1 * cond_mask, cond_mask, args))

    x_start.requires_grad_()
    script.training_loss(lambda x, t: 0 * x[:, :3], x_start, t, noise, cond_mask, target_mask, scales, args).backward()
    assert torch.equal(x_start.grad != 0, target_mask.expand_as(x_start) & (x_start != 0))


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_a_perfect_network_has_no_loss(objective):
    args = mask_args(image_size=16, cond_weight=0.05, loss="l2", objective=objective)
    _, alphas_cumprod = script.make_schedule("cosine", 50)
    scales = script.make_scales(alphas_cumprod)
    x_start, noise, t = torch.rand(4, 3, 16, 16) - 0.5, torch.randn(4, 3, 16, 16), torch.tensor([0, 10, 30, 49])
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    perfect = {"eps": noise, "x0": x_start, "v": (a.sqrt() * noise - (1 - a).sqrt() * x_start).float()}[objective]
    masks = script.make_masks(torch.arange(4), 0, args)
    assert script.training_loss(lambda x, t: perfect, x_start, t, noise, *masks, scales, args) < 1e-12
    assert script.training_loss(lambda x, t: perfect + 1, x_start, t, noise, *masks, scales, args) == pytest.approx(1)


# -- sampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_same_seed_same_image(sampler, eta, monkeypatch):
    """Extension and reference, batch 1 and 64, one thread and two: equal to 1e-4."""
    args = mask_args(image_size=16, num_timesteps=50, sample_steps=10, schedule="cosine", objective="v", sampler=sampler,
                     eta=eta, variance="small", enforce_observed=True)  # fmt: skip
    net, index = small_unet().eval(), torch.arange(64)
    cond_mask, _ = script.make_masks(index, 0, args)
    truth = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cond = truth * cond_mask
    whole = script.sample(net, cond, cond_mask, index, args)
    assert torch.equal(torch.where(cond_mask, whole, truth), torch.where(cond_mask, truth, truth))
    assert whole.std() > 0.1 and not torch.allclose(whole[0], whole[1], atol=0.1)
    for i in (0, 17):
        one = script.sample(net, cond[i : i + 1], cond_mask[i : i + 1], index[i : i + 1], args)
        torch.testing.assert_close(one, whole[i : i + 1], rtol=0, atol=1e-4)
    torch.set_num_threads(1)
    torch.testing.assert_close(script.sample(net, cond, cond_mask, index, args), whole, rtol=0, atol=1e-4)
    monkeypatch.setattr(fused_ddpm, "BACKENDS", ())
    torch.testing.assert_close(script.sample(net, cond, cond_mask, index, args), whole, rtol=0, atol=1e-4)


def test_metrics_against_direct_sums():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 3, 16, 16, generator=g)
    where = torch.rand(3, 1, 16, 16, generator=g) < 0.6
    noisy = truth + 0.1 * torch.randn(truth.shape, generator=g)
    direct = [-10 * math.log10(((noisy[i] - truth[i]) ** 2)[where[i].expand(3, -1, -1)].mean()) for i in range(3)]
    assert script.psnr(noisy, truth, where) == pytest.approx(np.mean(direct), rel=1e-5)
    assert script.psnr(truth + 0.1, truth, where) == pytest.approx(20, abs=1e-3)
    assert script.psnr(torch.where(where, truth, 9.0), truth, where) == pytest.approx(100)

    assert script.ssim(truth, truth, where) == pytest.approx(1, abs=1e-5)
    # Constant images: the structure term is 1, the luminance term is left.
    a, b = torch.full_like(truth, 0.4), torch.full_like(truth, 0.6)
    assert script.ssim(a, b, where) == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4), rel=1e-3)
    # One pixel far from the border, by the definition.
    axis = torch.arange(-5, 6, dtype=torch.float64)
    w = torch.exp(-(axis[:, None] ** 2 + axis**2) / 4.5)
    w /= w.sum()
    x, y = noisy[0, 0, 3:14, 3:14].double(), truth[0, 0, 3:14, 3:14].double()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    direct = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    only = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    only[0, 0, 8, 8] = True
    assert script.ssim(noisy[:1, :1], truth[:1, :1], only) == pytest.approx(direct.item(), abs=2e-4)


def test_interpolation_keeps_a_constant_and_what_is_seen():
    truth = torch.full((2, 3, 32, 32), 0.7)
    cond_mask, _ = script.make_masks(torch.arange(2), 0, mask_args(sparsity=0.01))
    torch.testing.assert_close(script.interpolate(truth, cond_mask, 0.01), truth, rtol=1e-3, atol=1e-3)
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    cond_mask, _ = script.make_masks(torch.arange(2), 0, mask_args())
    result = script.interpolate(ramp, cond_mask, 0.2)
    assert torch.equal(torch.where(cond_mask, result, ramp), ramp) and script.psnr(result, ramp, ~cond_mask) > 25


# -- whole runs ---------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_everything(tmp_path):
    flags = "--steps 120 --sample-every 60 --lr 5e-3 --dim 16 --num-timesteps 1000 --sample-steps 8 --num-draws 3"
    run(tmp_path / "run", *flags.split())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"last.pt", "config.json", "history.json", "loss.png", "metrics.json", "reconstructions.npz",
                     "reconstructions.png", "samples.npy", "step_000060.png"}  # fmt: skip
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert len({len(v) for v in history.values()}) == 1 and history["steps"][-1] == 120
    assert history["val_loss"][-1] < 0.5 * history["val_loss"][0] and history["train_loss"][-1] < history["train_loss"][0]
    arrays = np.load(tmp_path / "run/reconstructions.npz")
    assert arrays["draws"].shape == (3, 4, 3, 16, 16) and arrays["draws"].dtype == np.float32
    assert arrays["truth"].shape == (4, 3, 16, 16) and 0 <= arrays["draws"].min() <= arrays["draws"].max() <= 1
    seen = np.broadcast_to(arrays["cond_mask"], arrays["truth"].shape)
    assert (seen.mean() * 256).round() == 51 and not (arrays["cond_mask"] & arrays["target_mask"]).any()
    for draw in arrays["draws"]:
        assert np.array_equal(draw[seen], arrays["truth"][seen])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    for name in ("draw", "mean", "baseline"):
        assert set(metrics) >= {"psnr", "ssim", "num_images", "num_draws", "seconds"} and 5 < metrics["psnr"][name] < 40
    unseen = ~seen[:, :1]
    direct = script.psnr(*(torch.from_numpy(x) for x in (arrays["draws"].mean(0), arrays["truth"], unseen)))
    assert metrics["psnr"]["mean"] == pytest.approx(direct, abs=1e-3)
    samples = np.load(tmp_path / "run/samples.npy")
    assert samples.shape == (4, 16, 16, 3) and samples.dtype == np.uint8


def test_more_draws_from_a_checkpoint(tmp_path):
    run(tmp_path / "run")
    run_again = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "again")]
    script.main([*run_again, "--num-draws", "3", "--num-samples", "5"])
    draws = np.load(tmp_path / "again/reconstructions.npz")["draws"]
    assert draws.shape == (3, 5, 3, 16, 16)
    np.testing.assert_allclose(draws[:2, :4], np.load(tmp_path / "run/reconstructions.npz")["draws"], atol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--sparsity 0", "argument --sparsity: must lie in (0, 1), got 0"),
        ("--sparsity 1", "argument --sparsity: must lie in (0, 1), got 1"),
        ("--sparsity -0.1", "argument --sparsity: must lie in (0, 1), got -0.1"),
        ("--sparsity much", "argument --sparsity: invalid float value: 'much'"),
        ("--sparsity 0.6", "--sparsity 0.6 and --target-sparsity 0.6: the masks are disjoint, so their sum must not exceed 1"),
        ("--image-size 30 --dim-mults 1 2 4", "--image-size 30: the U-Net halves it 2 times, so it must be a multiple of 4"),
        ("--sparsity 0.001", "--sparsity 0.001: that is 0 pixels to see and 0 to score of the 256 there are"),
        ("--sample-steps 100", "--sample-steps 100: at most --num-timesteps, 50"),
        ("--steps 5 --epochs 1", "argument --epochs: not allowed with argument --steps"),
        ("--mask-pattern stripes", "argument --mask-pattern: invalid choice: 'stripes'"),
        ("--batch-size 0", "argument --batch-size: must lie in [1,"),
    ],
)
def test_bad_flags_exit_with_2(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "run", *flags.split())
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and message in last_line and not (tmp_path / "run").exists()
