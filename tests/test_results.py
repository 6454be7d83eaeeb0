"""What the sparse scripts leave behind: which files, and on which grid they are measured."""

from types import SimpleNamespace

import sparse_ddpm
from fused_ddpm.grids import resize
from fused_ddpm.metrics import psnr
from fused_ddpm.results import draw_each, write_results
from fused_ddpm.samples import Samples

import pytest
import torch
from helpers import make_config


def test_draws_are_kept_as_they_are_and_measured_where_the_truth_is(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    truth, score = torch.rand(3, 1, 8, 8, generator=g), torch.rand(3, 1, 8, 8, generator=g)
    found = {"truth": truth, "cond_mask": score < 0.2, "target_mask": score > 0.7}
    found["draws"], written = torch.rand(2, 3, 1, 16, 16, generator=g), {}
    at_truth = resize(found["draws"].flatten(0, 1), 8).clamp(0, 1).view(2, 3, 1, 8, 8)
    config = SimpleNamespace(sparsity=[0.2], test_sparsity=None)
    run = SimpleNamespace(leads=True, dir=tmp_path, config=config, write=written.__setitem__)
    write_results(run, found, regions=("unseen", "query"))
    assert written["reconstructions.npz"] is found
    assert written["samples.npy"].shape == (3, 16, 16, 1)
    expected = psnr(at_truth.mean(0), truth, ~found["cond_mask"])
    assert written["metrics.json"]["psnr"]["mean"] == pytest.approx(expected)
    names = {"metrics.json", "reconstructions.npz", "samples.npy", "reconstructions.png"}
    assert written.keys() == names | {"ranks.png"}
    said = capsys.readouterr().out
    assert "unseen pixels only:" in said and "query pixels only:" in said
    assert said.endswith(f"metrics.json and reconstructions.npz are in {tmp_path}/\n")

    run.leads = False  # another process
    written.clear()
    write_results(run, found)
    assert not written


def test_the_draws_of_an_image_come_together(tmp_path):
    """Each has its own seed and its image's inputs, and is where it belongs."""
    config = make_config(sparse_ddpm, num_draws=3, batch_size=4, sample_steps=1)
    drawn, inputs = [], torch.arange(5.0).view(5, 1, 1, 1) / 8

    def sample(seeds, x):
        drawn.extend(x.flatten().mul(8).tolist())
        yield 2 * x - 1 + (seeds >> 20).view(-1, 1, 1, 1) / 4  # in [-1, 1]; draw_each halves

    run = SimpleNamespace(seeds=lambda i: i)
    run.samples = lambda n, shape, dtype, *_, **__: Samples(config, n, shape, dtype)
    draws = draw_each(run, torch.nn.Identity(), sample, (inputs,), (1, 1, 1), config)
    assert drawn == [i for i in range(5) for _ in range(3)]
    assert torch.equal(draws.flatten(1), inputs.flatten() + torch.arange(3)[:, None] / 8)
