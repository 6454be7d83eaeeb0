"""ddpm.py: schedules and samplers against closed forms, the loss, generation, whole runs."""

import itertools
import math
from types import SimpleNamespace

import ddpm as script
import fused_ddpm.ops
from fused_ddpm import posterior_step, seeded_normal
from fused_ddpm.folders import Part
from fused_ddpm.images import load_images, to_float
from fused_ddpm.runs import Run
from fused_ddpm.unet import Unet

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import away_from_zero, exits_with, load, make_config, read_json

SCHEDULES = ["linear", "cosine", "sigmoid"]
OBJECTIVES = ["eps", "v", "x0"]
SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)]
SHAPE = (3, 16, 16)
TINY = """--data shapes --device cpu --image-size 16 --dim 8 --dim-mults 1 2 --batch-size 16
--num-timesteps 50""".split()


def small_config(**changes):
    options = dict(sampler="ddim", dim_mults=[1, 2, 4], attn_resolutions=[8])
    return make_config(script, **options | changes)


def small_unet(config):
    torch.manual_seed(0)
    return away_from_zero(Unet(3, 3, config)).eval()


def run(out_dir, *flags):
    torch.set_num_threads(1)  # two would wait for each other where a core is all there is
    script.main([*TINY, "--out-dir", str(out_dir), *flags])


def betas_of(alphas_cumprod):
    return 1 - alphas_cumprod / torch.cat([torch.ones(1).double(), alphas_cumprod[:-1]])


def published_betas(name, T):
    """By the papers' formulas, in Python's floats: for linear and sigmoid scaled to T steps."""
    if name == "cosine":
        signal = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        return [min(1 - b / a, 0.999) for a, b in itertools.pairwise(signal)]
    ramp = [t / (T - 1) for t in range(T)]
    if name == "sigmoid":
        ramp = [1 / (1 + math.exp(6 - 12 * r)) for r in ramp]
    return [min((1e-4 + r * (0.02 - 1e-4)) * 1000 / T, 0.999) for r in ramp]


# -- schedules and tables --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [10, 100, 1000])
def test_schedule(name, T):
    alphas_cumprod = script.make_schedule(name, T)
    betas = betas_of(alphas_cumprod)
    assert alphas_cumprod.dtype == torch.float64 and alphas_cumprod.shape == (T,)
    assert (betas > 0).all() and (betas <= 0.999 + 1e-12).all()
    product = 1.0
    for t, beta in enumerate(published_betas(name, T)):  # t = 0 is one noising step
        product *= 1 - beta
        assert alphas_cumprod[t].item() == pytest.approx(product, rel=1e-9)
    assert alphas_cumprod[-1] < 2e-3  # sampling may start from pure noise, whatever T


def test_schedules_are_the_published_ones():
    alphas_cumprod = script.make_schedule("linear", 1000)
    betas = betas_of(alphas_cumprod)
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    assert alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)  # Ho et al.'s
    t = torch.arange(1001, dtype=torch.float64) / 1000
    signal = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    cosine, expected = script.make_schedule("cosine", 1000), signal[1:] / signal[0]
    torch.testing.assert_close(cosine[:-1], expected[:-1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_full_ddpm_table_is_ho_et_al(name, objective):
    a = script.make_schedule(name, 50)
    T = int((a > 1e-5).sum()) if objective == "eps" else 50  # as many as sampling goes through
    a, betas = a[:T], betas_of(a)[:T]
    options = dict(schedule=name, objective=objective, sampler="ddpm", sample_steps=T)
    timesteps, table = script.sampling_table(small_config(**options))
    assert timesteps.tolist() == list(range(T - 1, -1, -1)) and timesteps.dtype == torch.int64
    previous = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])
    of_x0 = {"eps": (a**-0.5, -((1 / a - 1) ** 0.5)), "v": (a.sqrt(), -(1 - a).sqrt())}[objective]
    expected = torch.stack(
        [
            *of_x0,
            betas * previous.sqrt() / (1 - a),  # posterior_mean_coef1
            (1 - previous) * (1 - betas).sqrt() / (1 - a),  # posterior_mean_coef2
            (betas * (1 - previous) / (1 - a)).sqrt(),  # posterior_variance, its root
        ],
        dim=1,
    ).flip(0)
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-6)
    assert table[-1].tolist()[2:] == [1, 0, 0]  # the last step returns x0_hat itself


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_with_eta_1_has_the_noise_of_ddpm(steps):
    def table(**changes):
        return script.sampling_table(small_config(sample_steps=steps, **changes))[1]

    ddpm, ddim = table(sampler="ddpm"), table(sampler="ddim", eta=1.0)
    torch.testing.assert_close(ddpm, ddim, rtol=1e-4, atol=1e-5)
    assert (table(sampler="ddim", eta=0.0)[:, 4] == 0).all()


def test_large_variance_is_beta():
    options = dict(schedule="linear", sampler="ddpm", sample_steps=50)
    large, small = (
        script.sampling_table(small_config(variance=variance, **options))[1]
        for variance in ("large", "small")
    )
    betas = betas_of(script.make_schedule("linear", 50)).flip(0)
    torch.testing.assert_close(large[:-1, 4].double(), betas[:-1].sqrt(), rtol=1e-5, atol=0)
    assert large[-1].tolist()[2:] == [1, 0, 0]
    assert torch.equal(large[:, :4], small[:, :4]) and (large[:-1, 4] > small[:-1, 4]).all()


@pytest.mark.parametrize("steps", [1000, 50, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampling_by_eps_starts_where_the_image_is_not_lost(schedule, steps):
    """Dividing by sqrt(a_t) magnifies the network's error; other objectives do not divide."""
    alphas_cumprod = script.make_schedule(schedule, 1000)
    for objective in OBJECTIVES:
        options = dict(schedule=schedule, objective=objective, sample_steps=steps)
        timesteps, table = script.sampling_table(small_config(num_timesteps=1000, **options))
        first = timesteps[0].item()
        assert len(timesteps) == len(table) == steps and (timesteps.diff() <= 0).all()
        assert steps == 1 or timesteps[-1] == 0
        if objective == "eps" and schedule == "cosine":
            assert first < 999 and alphas_cumprod[first] > 1e-5 >= alphas_cumprod[first + 1]
            assert table[:, :2].abs().max() < 1e-5**-0.5
        else:
            assert first == 999
        again = (timesteps.diff() == 0).nonzero()[:, 0]  # more steps than there are timesteps
        rest = torch.tensor([0.0, 1.0, 0.0]).expand(len(again), 3)
        torch.testing.assert_close(table[again, 2:], rest, rtol=0, atol=1e-6)  # such a step rests


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_prediction_is_turned_back_into_the_image(objective):
    config = small_config(num_timesteps=20, schedule="linear", objective=objective, sample_steps=20)
    alphas_cumprod = script.make_schedule("linear", 20)
    timesteps, table = script.sampling_table(config)
    g = torch.Generator().manual_seed(0)
    x_start = 0.3 * torch.randn(20, 1, 4, 4, generator=g)
    noise = torch.randn(20, 1, 4, 4, generator=g)
    x_t = script.q_sample(x_start, timesteps, noise, alphas_cumprod)
    a = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, (a.sqrt() * x_start + (1 - a).sqrt() * noise).float())
    velocity = a.sqrt() * noise - (1 - a).sqrt() * x_start
    out = {"eps": noise, "x0": x_start, "v": velocity}[objective]
    k_x, k_o = table[:, :2].T.reshape(2, -1, 1, 1, 1)
    error = (k_x * x_t + k_o * out).float() - x_start
    assert (error.abs() * a.sqrt()).max() < 1e-6  # eps divides rounding by sqrt(a)
    assert error[-1].abs().max() < 1e-6


# -- data with a closed form -----------------------------------------------------------------------

MEAN, STD = 0.1, 0.15  # of every pixel, N(MEAN, STD^2); far from where clipping would show


def gaussian_sampler(schedule, T, objective, sampler, eta, n, shift=0):
    """(mean, std) of n samples by the best network there is, E[x_0 | x_t], linear in x_t.

    shift: what the network takes for t is t + shift, the classic mistake.
    """
    alphas_cumprod = script.make_schedule(schedule, T)
    options = dict(objective=objective, sampler=sampler, eta=eta, sample_steps=T)
    timesteps, table = script.sampling_table(
        small_config(schedule=schedule, num_timesteps=T, **options)
    )
    seeds = torch.arange(4)
    x = seeded_normal(seeds, (1, n // 400, 100))
    for step, t in enumerate(timesteps.tolist()):
        a = alphas_cumprod[min(max(t + shift, 0), T - 1)].item()
        slope = STD**2 * a**0.5 / (a * STD**2 + 1 - a)
        x_start = slope * x + MEAN * (1 - slope * a**0.5)
        if objective == "x0":
            out = x_start
        else:
            out = (x - a**0.5 * x_start) / (1 - a) ** 0.5
            if objective == "v":
                out = a**0.5 * out - (1 - a) ** 0.5 * x_start
        x = posterior_step(x, out, table, step, seeds)
    return x.mean().item(), x.std().item()


def gaussian_closed_form(schedule, T, objective, sampler, eta):
    """The same by the papers' formulas alone: each step is linear, so two moments say it all."""
    betas = published_betas(schedule, T)
    alphas_cumprod = [1.0]
    for beta in betas:
        alphas_cumprod.append(alphas_cumprod[-1] * (1 - beta))
    mean, variance = 0.0, 1.0
    for t in range(T, 0, -1):  # Ho et al.'s numbering, 1..T
        a, a_s, beta = alphas_cumprod[t], alphas_cumprod[t - 1], betas[t - 1]
        if objective == "eps" and a <= 1e-5:
            continue
        slope = STD**2 * a**0.5 / (a * STD**2 + 1 - a)  # E[x_0 | x] = slope x + offset
        offset = MEAN * (1 - slope * a**0.5)
        if sampler == "ddpm":
            of_x0, of_x = a_s**0.5 * beta / (1 - a), (1 - beta) ** 0.5 * (1 - a_s) / (1 - a)
            noise = beta * (1 - a_s) / (1 - a)
        else:
            noise = eta**2 * (1 - a_s) / (1 - a) * (1 - a / a_s)
            direction = ((1 - a_s - noise) / (1 - a)) ** 0.5
            of_x0, of_x = a_s**0.5 - direction * a**0.5, direction
        gain = of_x0 * slope + of_x
        mean, variance = gain * mean + of_x0 * offset, gain**2 * variance + noise
    return mean, variance**0.5


def errors(n):
    """4.5 standard errors of the mean and of the standard deviation of n samples."""
    return 4.5 * STD / n**0.5, 4.5 * STD / (2 * n) ** 0.5


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_gaussian_data_come_back(schedule, T, sampler, eta):
    n = 200_000 if T == 100 else 40_000
    for objective in OBJECTIVES:
        mean, std = gaussian_closed_form(schedule, T, objective, sampler, eta)
        assert mean == pytest.approx(MEAN, abs=1e-3)
        assert std == pytest.approx(STD, rel=30 / T)  # the steps' own error, first order in 1 / T
        sampled = gaussian_sampler(schedule, T, objective, sampler, eta, n)
        assert sampled[0] == pytest.approx(mean, abs=errors(n)[0])
        assert sampled[1] == pytest.approx(std, abs=errors(n)[1])


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("sampler, eta", SAMPLERS)
def test_a_timestep_off_by_one_is_noticed(sampler, eta, shift):
    _, expected = gaussian_closed_form("linear", 100, "v", sampler, eta)
    _, std = gaussian_sampler("linear", 100, "v", sampler, eta, 200_000, shift)
    assert abs(std - expected) > 2 * errors(200_000)[1]


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l2", "l1", "huber"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_distance_to_the_goal(objective, kind):
    config = small_config(objective=objective, loss=kind)
    alphas_cumprod = script.make_schedule("cosine", 50)
    torch.manual_seed(0)
    x_start, noise = torch.rand(4, *SHAPE) - 0.5, torch.randn(4, *SHAPE)
    t = torch.tensor([0, 10, 30, 49])
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    velocity = (a.sqrt() * noise - (1 - a).sqrt() * x_start).float()
    goal = {"eps": noise, "x0": x_start, "v": velocity}[objective]
    guess, shown = torch.randn_like(goal), []

    def loss_of(out):
        net = lambda x, given: shown.append((x, given)) or out
        return script.training_loss(net, x_start, t, noise, alphas_cumprod, config)

    assert loss_of(goal) < 1e-6
    torch.testing.assert_close(shown[0][0], (a.sqrt() * x_start + (1 - a).sqrt() * noise).float())
    assert torch.equal(shown[0][1], t)
    expected = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[kind](guess, goal)
    torch.testing.assert_close(loss_of(guess), expected)


def test_held_out_losses_compare_between_steps():
    """The same each time for the same weights, whatever was drawn before: over all timesteps."""
    config, (images, labels) = small_config(), load_images("shapes", image_size=16)
    index, parts = torch.arange(50), (Part(images[:50], labels[:50]), Part(images, labels)[50:90])
    held_out = {"val": (index, parts[0]), "test": (index[:40], parts[1])}
    net, alphas_cumprod = small_unet(config), script.make_schedule("cosine", 50)
    first = script.held_out_losses(net, held_out, alphas_cumprod, config)
    torch.randn(7)
    again = script.held_out_losses(net, held_out, alphas_cumprod, config)
    assert first == again and first.keys() == {"val_loss", "test_loss"}
    times = []
    watching = lambda x, t: times.extend(t.tolist()) or x
    script.held_out_losses(watching, held_out, alphas_cumprod, config)
    assert times[:50] == list(range(50)) and times[50] == 0 and times[-1] == 49


def test_ema_warms_up():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0), ema.weight.data.fill_(0.0)
    expected = 0.0
    for step in range(50):
        script.update_ema(ema, model, step, 0.7)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5)


def test_learning_rate_warms_up_and_comes_down():
    constant = small_config(lr=0.01, lr_schedule="constant", steps=1000)
    cosine = small_config(lr=0.01, lr_schedule="cosine", steps=1000)
    rates = [script.learning_rate(step, constant) for step in (0, 49, 99, 100, 999)]
    assert rates == pytest.approx([1e-4, 5e-3, 0.01, 0.01, 0.01])
    rates = [script.learning_rate(step, cosine) for step in (0, 250, 500, 750, 1000)]
    half = 0.5**0.5
    expected = [1e-4, 0.005 * (1 + half), 0.005, 0.005 * (1 - half), 0]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_what_is_drawn_for_a_step_is_uniform_normal_and_new(tmp_path, monkeypatch):
    """Timesteps and noise in every step, and which images are mirrored: half of them."""
    seen = []

    def record(model, *rest):  # in place of the loss, so that steps cost nothing
        if model.training:
            seen.append(rest[:3])
        return 1 + 0 * sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(script, "training_loss", record)
    flags = "--flip --steps 60 --batch-size 72 --sample-steps 1 --num-samples 1 --sample-every 99"
    run(tmp_path, *flags.split())
    x_start, t, noise = map(torch.cat, zip(*seen, strict=True))
    n = 60 * 72
    assert len(t) == n and t.min() == 0 and t.max() == 49
    counts = t.bincount(minlength=50)
    chi_square = (counts - n / 50).square().sum().item() / (n / 50)
    assert abs(chi_square - 49) < 4.5 * (2 * 49) ** 0.5
    assert noise.mean().abs() < 4.5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4.5 * (2 / noise.numel()) ** 0.5
    alike = noise.flatten(1) @ noise.flatten(1).T / 768 - torch.eye(n)
    alike.fill_diagonal_(0)
    assert alike.abs().max() < 8 / 768**0.5  # 9 million pairs of images: none twice, nor opposed
    images, _ = load_images("shapes", image_size=16)
    known = {to_float(image).numpy().tobytes() for image in images}
    straight = torch.tensor([x.numpy().tobytes() in known for x in x_start])
    assert all(x.flip(-1).contiguous().numpy().tobytes() in known for x in x_start[~straight])
    assert abs(straight.float().mean() - 0.5) < 4.5 * 0.5 / n**0.5
    of_steps = straight.view(60, 72).float().sum(1)  # each image by itself, not a batch at once
    assert of_steps.var().item() == pytest.approx(72 / 4, rel=4.5 * (2 / 59) ** 0.5)
    late = (t > 24).float()  # mirroring says nothing of time
    assert abs(late[straight].mean() - late[~straight].mean()) < 4.5 / n**0.5


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_same_seed_same_image(sampler, eta, monkeypatch, tmp_path):
    """Extension and reference, batches of 16 and of 7, one thread and two: equal but for rounding.

    That is, to one of 255 levels.
    """
    flags = "--dim-mults 1 2 4 --attn-resolutions 8 --sample-steps 10 --batch-size 16"
    flags += f" --sampler {sampler} --eta {eta} --out-dir {tmp_path}"
    asked, data = Run(script.Config, [*TINY, *flags.split()]), SimpleNamespace(shape=SHAPE)
    config, net = asked.config, small_unet(asked.config)

    def images(n=40):
        return script.generate(asked, net, n, data, config).int()

    torch.set_num_threads(2)
    whole = images()
    assert whole.shape == (40, *SHAPE)
    assert whole.float().std() > 10 and (whole[0] - whole[1]).abs().float().mean() > 10
    assert (images(5) - whole[:5]).abs().max() <= 1
    config.batch_size = 7
    assert (images() - whole).abs().max() <= 1
    config.batch_size = 16
    torch.set_num_threads(1)
    assert (images() - whole).abs().max() <= 1
    monkeypatch.setattr(fused_ddpm.ops, "BACKENDS", ())
    assert (images() - whole).abs().max() <= 1
    config.seed = 1
    assert (images() - whole).abs().float().mean() > 10


def test_sampler_yields_every_step_in_tensors_that_stay():
    config = small_config(sampler="ddpm", variance="large")
    sample = script.make_sampler(small_unet(config), SHAPE, config)
    kept, copies, seeds = [], [], torch.arange(4)
    for x_t in sample(seeds):
        kept.append(x_t)
        copies.append(x_t.clone())
    assert len(kept) == 10 and kept[-1].shape == (4, *SHAPE) and kept[-1].abs().max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(kept))
    again = list(sample(seeds))  # a sampler may be used many times
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert torch.equal(seeds, torch.arange(4)) and not kept[-1].requires_grad


# -- whole runs ------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_everything(tmp_path):
    flags = """--dim 16 --steps 120 --sample-every 60 --lr 5e-3 --sample-steps 8 --num-samples 10
    --num-timesteps 100"""
    run(tmp_path / "run", *flags.split())
    files = {p.name for p in (tmp_path / "run").iterdir()}
    pictures = {"loss.png", "samples.png", "step_000060.png"}
    assert files == pictures | {"last.pt", "config.json", "history.json", "samples.npy"}
    history = read_json(tmp_path / "run/history.json")
    assert history.pop("final")["images"].keys() >= {"val", "test"}
    assert len({len(v) for v in history.values()}) == 1 and history["steps"][-1] == 120
    for part in ("train", "val", "test"):
        assert history[f"{part}_loss"][-1] < 0.8 * history[f"{part}_loss"][0]
    samples = np.load(tmp_path / "run/samples.npy")
    assert samples.shape == (10, 16, 16, 3) and samples.dtype == np.uint8
    # A checkpoint is enough to generate: the data set may be gone.
    changed = load(tmp_path / "run/last.pt")
    changed["config"]["data"] = str(tmp_path / "gone")
    torch.save(changed, tmp_path / "copy.pt")
    script.main(["--sample", str(tmp_path / "copy.pt"), "--out-dir", str(tmp_path / "again")])
    assert np.array_equal(np.load(tmp_path / "again/samples.npy"), samples)
    files = {p.name for p in (tmp_path / "again").iterdir()}
    assert files == {"config.json", "samples.npy", "samples.png"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--image-size 30 --dim-mults 1 2 4",
            "--image-size 30: the U-Net halves it 2 times, so it must be a multiple of 4",
        ),
        ("--dim-mults", "--dim-mults: needs one level at least"),
        ("--sample-steps 2000", "--sample-steps 2000: at most --num-timesteps, 1000"),
        ("--steps 5 --epochs 1", "argument --epochs: not allowed with argument --steps"),
        ("--schedule quadratic", "argument --schedule: invalid choice: 'quadratic'"),
        ("--lr 0", "argument --lr: must lie in (0, 1], got 0"),
        ("--ema-decay 1", "argument --ema-decay: must lie in [0, 1), got 1"),
        ("--batch-size 0", "argument --batch-size: must lie in [1,"),
        ("--plots", "unrecognized arguments: --plots"),
    ],
)
def test_bad_flags_exit_with_2(tmp_path, capsys, flags, message):
    flags = ["--data", "shapes", "--out-dir", str(tmp_path / "run"), *flags.split()]
    assert message in exits_with(2, capsys, lambda: script.main(flags))
    assert not (tmp_path / "run").exists()
