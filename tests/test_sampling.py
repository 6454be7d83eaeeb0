"""Schedules and samplers against identities and a case with a closed form."""

import pytest
import torch

import ddpm as script
from fused_ddpm import posterior_step, seeded_normal

SCHEDULES = ["linear", "cosine", "sigmoid"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [10, 100, 1000])
def test_schedule(name, T):
    betas, alphas_cumprod = script.make_schedule(name, T)
    assert betas.dtype == alphas_cumprod.dtype == torch.float64 and betas.shape == (T,)
    assert (betas > 0).all() and (betas <= 0.999).all()
    product = 1.0
    for t in range(T):  # t = 0 is one noising step
        product *= 1 - betas[t].item()
        assert alphas_cumprod[t].item() == pytest.approx(product, rel=1e-9)
    assert alphas_cumprod[-1] < 2e-3  # sampling may start from pure noise, whatever T


def test_schedules_are_the_published_ones():
    betas, alphas_cumprod = script.make_schedule("linear", 1000)
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    assert alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)  # Ho et al.'s
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    cosine = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2 / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)) ** 2
    torch.testing.assert_close(script.make_schedule("cosine", 1000)[1][:-1], cosine[:-1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_full_ddpm_table_is_ho_et_al(name):
    T = 50
    betas, alphas_cumprod = script.make_schedule(name, T)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    timesteps, table = script.sampling_table(alphas_cumprod, "eps", "ddpm", T)
    assert timesteps.tolist() == list(range(T - 1, -1, -1))
    expected = torch.stack(
        [
            alphas_cumprod**-0.5,
            -((1 / alphas_cumprod - 1) ** 0.5),
            betas * previous.sqrt() / (1 - alphas_cumprod),  # posterior_mean_coef1
            (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),  # posterior_mean_coef2
            (betas * (1 - previous) / (1 - alphas_cumprod)).sqrt(),  # posterior_variance, its root
        ],
        dim=1,
    ).flip(0)
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-6)
    assert table[-1].tolist()[2:] == [1, 0, 0]  # the last step returns x0_hat itself


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_with_eta_1_has_the_noise_of_ddpm(steps):
    _, alphas_cumprod = script.make_schedule("cosine", 50)
    ddpm, ddim = (script.sampling_table(alphas_cumprod, "v", sampler, steps, 1.0)[1] for sampler in ("ddpm", "ddim"))
    torch.testing.assert_close(ddpm, ddim, rtol=1e-4, atol=1e-5)
    assert (script.sampling_table(alphas_cumprod, "v", "ddim", steps, 0.0)[1][:, 4] == 0).all()


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_prediction_is_turned_back_into_the_image(objective):
    _, alphas_cumprod = script.make_schedule("linear", 20)
    timesteps, table = script.sampling_table(alphas_cumprod, objective, "ddim", 20)
    g = torch.Generator().manual_seed(0)
    x_start, noise = 0.3 * torch.randn(20, 1, 4, 4, generator=g), torch.randn(20, 1, 4, 4, generator=g)
    x_t = script.q_sample(x_start, timesteps, noise, script.make_scales(alphas_cumprod))
    a = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    out = {"eps": noise, "x0": x_start, "v": a.sqrt() * noise - (1 - a).sqrt() * x_start}[objective]
    k_x, k_o = table[:, 0].view(-1, 1, 1, 1), table[:, 1].view(-1, 1, 1, 1)
    error = (k_x * x_t + k_o * out).float() - x_start
    assert (error.abs() * a.sqrt()).max() < 1e-6 and error[-1].abs().max() < 1e-6  # eps divides rounding by sqrt(a)


MEAN, STD = 0.1, 0.15  # the data: N(MEAN, STD^2) in every pixel; far from where clipping would show


def gaussian_sampler(schedule, T, objective, sampler, eta, n, shift=0):
    """(mean, std) of n samples drawn with the best network there is, E[x_0 | x_t], which here is linear in x_t.

    shift: what the network takes for t is t + shift, the classic mistake.
    """
    _, alphas_cumprod = script.make_schedule(schedule, T)
    timesteps, table = script.sampling_table(alphas_cumprod, objective, sampler, T, eta)
    seeds = torch.arange(4)
    x = seeded_normal(seeds, (1, n // 400, 100))
    for step, t in enumerate(timesteps.tolist()):
        a = alphas_cumprod[min(max(t + shift, 0), T - 1)].item()
        x_start = MEAN + STD**2 * a**0.5 / (a * STD**2 + 1 - a) * (x - a**0.5 * MEAN)
        noise = (x - a**0.5 * x_start) / (1 - a) ** 0.5
        out = {"x0": x_start, "eps": noise, "v": a**0.5 * noise - (1 - a) ** 0.5 * x_start}[objective]
        x = posterior_step(x, out, table, step, seeds)
    return x.mean().item(), x.std().item()


def gaussian_closed_form(schedule, T, sampler, eta):
    """The same in closed form: each step is linear, so mean and variance follow from the papers' formulas alone."""
    betas = script.make_schedule(schedule, T)[0].tolist()
    alphas_cumprod = [1.0]
    for beta in betas:
        alphas_cumprod.append(alphas_cumprod[-1] * (1 - beta))
    mean, variance = 0.0, 1.0
    for t in range(T, 0, -1):  # Ho et al.'s numbering, 1..T
        a, a_s, beta = alphas_cumprod[t], alphas_cumprod[t - 1], betas[t - 1]
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
    """Four and a half standard errors of the mean and of the standard deviation of n samples."""
    return 4.5 * STD / n**0.5, 4.5 * STD / (2 * n) ** 0.5


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1)])
def test_gaussian_data_come_back(schedule, T, sampler, eta):
    mean, std = gaussian_closed_form(schedule, T, sampler, eta)
    assert mean == pytest.approx(MEAN, abs=1e-3)
    assert std == pytest.approx(STD, rel=30 / T)  # the steps' own error, of first order in 1 / T
    n = 200_000 if T == 100 else 40_000
    for objective in ("eps", "v", "x0"):
        sampled_mean, sampled_std = gaussian_sampler(schedule, T, objective, sampler, eta, n)
        assert sampled_mean == pytest.approx(mean, abs=errors(n)[0]) and sampled_std == pytest.approx(std, abs=errors(n)[1])


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1)])
def test_a_timestep_off_by_one_is_noticed(sampler, eta, shift):
    _, expected = gaussian_closed_form("linear", 100, sampler, eta)
    _, std = gaussian_sampler("linear", 100, "v", sampler, eta, 200_000, shift)
    assert abs(std - expected) > 2 * errors(200_000)[1]
