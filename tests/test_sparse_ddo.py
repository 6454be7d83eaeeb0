"""sparse_ddo.py: transforms, noise, forward process, sampler, network, masks and messages."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

import sparse_ddo as script

TINY = """--data shapes --image-size 16 --modes 8 --dim 8 --dim-mults 1 2 --steps 6 --batch-size 16 --sample-steps 4
--num-samples 4 --num-draws 2 --lr 1e-3 --save-every 2""".split()


def run(out_dir, *flags):
    script.main([*TINY, "--out-dir", str(out_dir), *flags])


def make_args(**changes):
    options = dict(length_scale=0.05, blur_min=0.0, blur_max=0.25, objective="x0", loss="l2", loss_region="full", seed=0)
    options |= dict(image_size=32, grid_size=32, sparsity=0.1, target_sparsity=None, mask_pattern="random", mask_seed=42)
    options |= dict(sample_steps=20, enforce_observed=True, use_amp=False, device="cpu", batch_size=16)
    return argparse.Namespace(**options | changes)


def small_unet(channels=1, conditioning="encoder"):
    torch.manual_seed(0)
    net = script.Unet(channels, 16, [1, 2, 3], 1, 16, conditioning)
    for p in net.parameters():  # away from the zero initialisation, which would hide everything
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def waves(n, highest, channels=1, seed=0):
    """A periodic function of Fourier modes up to `highest`, variance about 1, at n x n pixel centres: (1, C, n, n)."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    f = torch.zeros(1, channels, n, n, dtype=torch.float64)
    for k in range(-highest, highest + 1):
        for m in range(-highest, highest + 1):
            a, b = torch.randn(2, 1, channels, 1, 1, generator=g, dtype=torch.float64)
            angle = 2 * math.pi * (k * x[:, None] + m * x)
            f += a * angle.cos() + b * angle.sin()
    return (f / (2 * highest + 1)).float()


# -- transforms, noise, forward process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 32, 48])
def test_dct_is_the_orthonormal_one(n):
    x = torch.randn(2, 1, n, n, generator=torch.Generator().manual_seed(0))
    u = script.dct(x)
    torch.testing.assert_close(script.idct(u), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(u.square().sum(), x.square().sum())
    place = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for k1, k2 in [(0, 0), (0, 3), (5, 2), (n - 1, n - 1)]:  # by the definition, one sum a mode
        norm = (1 if k1 == 0 else 2) ** 0.5 * (1 if k2 == 0 else 2) ** 0.5 / n
        wave = torch.cos(math.pi * k1 * place)[:, None] * torch.cos(math.pi * k2 * place)
        torch.testing.assert_close(u[:, 0, k1, k2].double(), norm * (x[:, 0].double() * wave).sum((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [32, 48])
def test_noise_has_the_covariance_of_its_kernel(n):
    args, count = make_args(length_scale=0.08), 4000
    noise = script.gp_noise(script.seeded_white(torch.arange(count), 1, n, 3, 9), args)[:, 0]
    middle = noise[:, n // 3 : n // 3 + 8, n // 3 : n // 3 + 8]  # away from the edges, which mirror it
    for dy, dx in [(0, 0), (0, 1), (2, 0), (2, 3), (0, 5)]:
        moved = noise[:, n // 3 + dy : n // 3 + dy + 8, n // 3 + dx : n // 3 + dx + 8]
        expected = math.exp(-(dy**2 + dx**2) / (n * 0.08) ** 2)
        assert (middle * moved).mean().item() == pytest.approx(expected, abs=0.03)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)


def test_noise_is_the_same_function_on_any_grid():
    args, seeds = make_args(length_scale=0.15), torch.arange(4)  # long enough that 32 points a side miss nothing
    coarse, fine = (script.gp_noise(script.seeded_white(seeds, 1, n, 7, 9), args) for n in (32, 64))
    modes = slice(0, 32)
    torch.testing.assert_close(script.dct(fine)[..., modes, modes] / 2, script.dct(coarse), rtol=0, atol=1e-4)
    between = (coarse[..., :-1, :-1] + coarse[..., 1:, 1:]) / 2  # two ways to a point between grid points
    assert (fine[..., 2::2, 2::2][..., :31, :31] - between).abs().mean() < 0.1


def test_schedule_runs_from_image_to_noise():
    t = torch.linspace(0, 1, 101)
    a, sigma, blur = script.make_schedule(t, make_args())
    torch.testing.assert_close(a**2 + sigma**2, torch.ones_like(a))
    assert (a.diff() < 0).all() and (sigma.diff() > 0).all() and (blur.diff() > 0).all()
    log_snr = (a**2 / sigma**2).log()
    assert log_snr[0].item() == pytest.approx(10) and log_snr[-1].item() == pytest.approx(-10)
    assert log_snr[50].item() == pytest.approx(0, abs=1e-6) and blur[0] == 0 and blur[-1].item() == pytest.approx(0.25)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_forward_marginals_mode_by_mode(t):
    args, count = make_args(), 3000
    x = waves(32, 6) / 3
    noise = script.gp_noise(torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(1)), args)
    z = script.dct(script.q_sample(x.expand(count, -1, -1, -1), torch.full((count,), t), noise, args))[:, 0]
    end = 2 / math.pi * math.atan(math.exp(-5))
    angle = math.pi / 2 * (end + (1 - 2 * end) * t)
    blur = 0.25 * math.sin(math.pi * t / 2) ** 2
    u = script.dct(x)[0, 0]
    for k1, k2 in [(0, 0), (1, 0), (3, 2), (0, 9), (14, 14)]:
        alpha = math.cos(angle) * math.exp(-(k1**2 + k2**2) * blur**2 / 2)
        spectrum = 0.05**2 * math.pi * math.exp(-(math.pi**2) * (k1**2 + k2**2) * 0.05**2 / 4)
        std = math.sin(angle) * 32 * spectrum**0.5
        assert z[:, k1, k2].mean().item() == pytest.approx(alpha * u[k1, k2].item(), abs=5 * std / count**0.5 + 1e-4)
        assert z[:, k1, k2].std().item() == pytest.approx(std, rel=5 / (2 * count) ** 0.5)


MEAN, STD = 0.1, 0.15  # the data of the closed form: a Gaussian process of this mean and deviation


@pytest.mark.parametrize("n, steps", [(32, 40), (48, 40), (64, 20)])
@pytest.mark.parametrize("objective", ["x0", "eps"])
def test_gaussian_data_come_back(n, steps, objective):
    """With the best network there is, each mode's mean and variance follow the sampler's formulas, and those of the data."""
    args, count = make_args(grid_size=n, objective=objective, sample_steps=steps, enforce_observed=False), 1500
    k = torch.arange(n, dtype=torch.float64)
    k2 = k[:, None] ** 2 + k**2
    spectrum = n**2 * 0.05**2 * math.pi * torch.exp(-(math.pi**2) * k2 * 0.05**2 / 4)
    mean = torch.zeros(n, n, dtype=torch.float64)
    mean[0, 0] = n * MEAN

    def at(t):  # alpha_k, sigma, by the definition
        end = 2 / math.pi * math.atan(math.exp(-5))
        angle, blur = math.pi / 2 * (end + (1 - 2 * end) * t), 0.25 * math.sin(math.pi * t / 2) ** 2
        return math.cos(angle) * torch.exp(-k2 * blur**2 / 2), math.sin(angle)

    def gain(alpha, sigma):  # E[x | z] = mean + gain (z - alpha mean)
        return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)

    def best(z, t, cond, cond_mask):
        alpha, sigma = at(t[0].item())
        u = script.dct(z)
        x = mean.float() + gain(alpha, sigma).float() * (u - (alpha * mean).float())
        return script.idct(x if objective == "x0" else (u - alpha.float() * x) / sigma)

    def closed_form(steps):  # each step is linear, so mean and variance follow mode by mode
        m, v = torch.zeros_like(mean), spectrum.clone()
        for i in range(steps):
            (alpha, sigma), (alpha_s, sigma_s) = at(1 - i / steps), at(1 - (i + 1) / steps)
            ratio = alpha / alpha_s
            fresh = sigma**2 - ratio**2 * sigma_s**2
            of_z, of_x, g = ratio * sigma_s**2 / sigma**2, alpha_s * fresh / sigma**2, gain(alpha, sigma)
            m = (of_z + of_x * g) * m + of_x * (1 - g * alpha) * mean
            v = (of_z + of_x * g) ** 2 * v + (fresh * sigma_s**2 / sigma**2 * spectrum if i < steps - 1 else 0)
        return m, v

    m, v = closed_form(1000)  # with enough steps the data come back; noise at t = 0 is 5e-5 of them
    assert m[0, 0].item() == pytest.approx(n * MEAN, rel=1e-3)
    torch.testing.assert_close((v / spectrum)[:12, :12], torch.full((12, 12), STD**2, dtype=torch.float64), rtol=0.05, atol=0)

    cond = torch.zeros(count, 1, 32, 32)
    z = script.dct(script.sample(best, cond, cond > 0, torch.arange(count), args))[:, 0].double()
    m, v = closed_form(args.sample_steps)
    big = spectrum > 1e-3 * spectrum[0, 0]
    error = ((z.mean(0) - m) / (v / count).sqrt())[big]
    assert len(error) > 400 and error.abs().max() < 5 and error.square().mean().item() == pytest.approx(1, abs=0.25)
    ratio = (z.var(0) / v)[big]
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    assert ratio.std().item() == pytest.approx((2 / count) ** 0.5, rel=0.25)


# -- network ----------------------------------------------------------------------------------------------------------------


def test_spectral_convolution_against_fft():
    torch.manual_seed(0)
    conv = script.SpectralConv(3, 5, 8)
    x = torch.randn(2, 3, 32, 32)
    f = torch.fft.rfft2(x.double())
    weight = torch.view_as_complex(conv.weight.detach()).to(torch.complex128).view(8, 4, 3, 5)  # rows -4..3, columns 0..3
    out = torch.zeros(2, 5, 32, 17, dtype=torch.complex128)
    for row in range(-4, 4):
        for column in range(4):
            out[:, :, row, column] = f[:, :, row, column] @ weight[row + 4, column]
    expected = torch.fft.irfft2(out) + conv.point(x).double()  # the half pixel turns into and out of the transform cancel
    torch.testing.assert_close(conv(x).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels_in, channels", [(32, 32), (64, 32)])
def test_block_keeps_the_variance(channels_in, channels):
    torch.manual_seed(0)
    block, emb = script.Block(channels_in, channels, 128, 16), torch.zeros(4, 128)
    smooth = torch.cat([waves(32, 3, channels_in, seed) for seed in range(4)])
    for x in (smooth, torch.randn(4, channels_in, 32, 32)):
        expected = x.var().item() if channels_in == channels else block.skip(x).var().item()
        assert block(x, emb).var().item() == pytest.approx(expected, rel=0.2 if channels_in == channels else 0.3)
    conv = script.SpectralConv(channels_in, channels, 16)
    assert conv(smooth).var().item() == pytest.approx(smooth.var().item(), rel=0.2)


@pytest.mark.parametrize("conditioning", ["encoder", "concat"])
@pytest.mark.parametrize("n", [48, 64])
def test_the_same_function_on_another_grid(conditioning, n):
    net, t, cond = small_unet(conditioning=conditioning), torch.tensor([0.4]), torch.zeros(1, 1, 32, 32)
    coarse, fine = (net(waves(m, 2), t, cond, cond > 0) for m in (32, n))
    assert coarse.std() > 0.05
    torch.testing.assert_close(script.resize(fine, 32), coarse, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size, n", [(32, 64), (64, 32), (32, 48), (16, 12)])
def test_resizing_is_exact_for_what_both_grids_can_hold(size, n):
    torch.testing.assert_close(script.resize(waves(size, 4), n), waves(n, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("conditioning", ["encoder", "concat"])
def test_context_reaches_the_network(conditioning):
    net, args = small_unet(conditioning=conditioning), make_args()
    cond_mask, _ = script.make_masks(torch.arange(1), args)
    cond = torch.rand(1, 1, 32, 32) * cond_mask
    z, t = torch.randn(1, 1, 32, 32), torch.tensor([0.7])
    before = net(z, t, cond, cond_mask)
    row, column = cond_mask[0, 0].nonzero()[5].tolist()
    changed = cond.clone()
    changed[0, 0, row, column] += 0.5
    assert (net(z, t, changed, cond_mask) - before).abs().max() > 1e-3
    assert (net(z, t, cond, cond_mask & False) - before).abs().max() > 1e-3


@pytest.mark.parametrize("conditioning", ["encoder", "concat"])
@pytest.mark.parametrize("channels", [1, 3])
def test_unet_shapes_and_gradients(conditioning, channels):
    net = small_unet(channels, conditioning)
    cond = torch.randn(2, channels, 32, 32)
    out = net(torch.randn(2, channels, 48, 48), torch.tensor([0.1, 0.9]), cond, cond[:, :1] > 0)
    assert out.shape == (2, channels, 48, 48)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


# -- masks, loss, runs --------------------------------------------------------------------------------------------------------


def test_masks_are_the_same_in_every_epoch(tmp_path, monkeypatch):
    loss, seen = script.training_loss, []

    def record(model, x_start, t, noise, cond_mask, target_mask, args):
        if args.grid_size == 16 and model.training:
            seen.extend(zip(x_start, cond_mask, target_mask, strict=True))
        return loss(model, x_start, t, noise, cond_mask, target_mask, args)

    monkeypatch.setattr(script, "training_loss", record)
    run(tmp_path, "--steps", "39", "--seed", "3")  # three epochs of 13 batches
    masks = {}
    for image, cond_mask, target_mask in seen:
        assert cond_mask.sum() == target_mask.sum() == 26 and not (cond_mask & target_mask).any()
        masks.setdefault(image.numpy().tobytes(), []).append(torch.cat([cond_mask, target_mask]))
    assert len(masks) > 150 and max(map(len, masks.values())) == 3
    assert all(torch.equal(m, same[0]) for same in masks.values() for m in same)
    first = [same[0] for same in masks.values()]
    assert not torch.equal(first[0], first[1])
    other = script.make_masks(torch.arange(5), make_args(mask_seed=43))
    assert not torch.equal(script.make_masks(torch.arange(5), make_args())[0], other[0])


@pytest.mark.parametrize("region", ["full", "query"])
@pytest.mark.parametrize("objective", ["x0", "eps"])
def test_loss_and_where_it_is_taken(region, objective):
    args = make_args(loss_region=region, objective=objective)
    cond_mask, target_mask = script.make_masks(torch.arange(3), args)
    x_start, t = torch.rand(3, 1, 32, 32) - 0.5, torch.tensor([0.1, 0.5, 0.9])
    noise = script.gp_noise(torch.randn(3, 1, 32, 32), args)
    goal = x_start if objective == "x0" else noise
    off = torch.where(target_mask, 1.0, 2.0)
    loss = script.training_loss(lambda *inputs: goal + off, x_start, t, noise, cond_mask, target_mask, args)
    assert loss.item() == pytest.approx(1 if region == "query" else off.square().mean().item(), rel=1e-4)


def test_times_are_spread_evenly(tmp_path, monkeypatch):
    loss, seen = script.training_loss, []

    def record(model, x_start, t, *rest):
        if model.training:
            seen.append(t)
        return loss(model, x_start, t, *rest)

    monkeypatch.setattr(script, "training_loss", record)
    run(tmp_path, "--steps", "4")
    for t in seen:
        assert 0 <= t.min() and t.max() < 1
        torch.testing.assert_close(t.sort().values.diff(), torch.full((15,), 1 / 16), rtol=0, atol=1e-5)
    assert not torch.equal(seen[0], seen[1])


def test_a_run_learns_and_writes_everything(tmp_path):
    flags = "--steps 120 --sample-every 60 --lr 5e-3 --dim 16 --sample-steps 8 --num-draws 3"
    run(tmp_path / "run", *flags.split())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"last.pt", "config.json", "history.json", "loss.png", "metrics.json", "reconstructions.npz",
                     "reconstructions.png", "resolutions.png", "samples.npy", "step_000060.png"}  # fmt: skip
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert history["val_loss"][-1] < 0.8 * history["val_loss"][0]
    arrays = np.load(tmp_path / "run/reconstructions.npz")
    assert arrays["draws"].shape == (3, 4, 3, 16, 16) and arrays["truth"].shape == (4, 3, 16, 16)
    seen = np.broadcast_to(arrays["cond_mask"], arrays["truth"].shape)
    for draw in arrays["draws"]:
        assert np.array_equal(draw[seen], arrays["truth"][seen])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    for key in ("psnr_unseen", "psnr_query", "ssim_unseen", "ssim_query"):
        assert set(metrics[key]) == {"draw", "mean", "baseline"}
    direct = script.psnr(*(torch.from_numpy(x) for x in (arrays["draws"].mean(0), arrays["truth"], arrays["target_mask"])))
    assert metrics["psnr_query"]["mean"] == pytest.approx(direct, abs=1e-3)

    again = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "finer"), "--image-size", "24"]
    script.main(again)
    finer = np.load(tmp_path / "finer/reconstructions.npz")
    assert finer["draws"].shape == (3, 4, 3, 24, 24) and np.array_equal(finer["cond_mask"], arrays["cond_mask"])
    assert json.loads((tmp_path / "finer/metrics.json").read_text())["grid_size"] == 24
    assert np.load(tmp_path / "finer/samples.npy").shape == (4, 24, 24, 3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image-size 6", "--image-size 6: must be at least --modes, 8"),
        ("--modes 10", "--modes 10: must be a multiple of 4"),
        ("--sparsity 0.6", "--sparsity 0.6 and --target-sparsity 0.6: the masks are disjoint, so their sum must not exceed 1"),
        ("--length-scale 0", "argument --length-scale: must lie in (0, 1), got 0"),
        ("--conditioning both", "argument --conditioning: invalid choice: 'both'"),
    ],
)
def test_bad_flags_exit_with_2(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "run", *flags.split())
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and message in last_line and not (tmp_path / "run").exists()
