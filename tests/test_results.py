"""What the sparse scripts leave behind: which files, and on which grid they are measured."""

from types import SimpleNamespace

from fused_ddpm.grids import resize
from fused_ddpm.metrics import psnr
from fused_ddpm.results import write_results

import pytest
import torch


def test_draws_are_kept_as_they_are_and_measured_where_the_truth_is(tmp_path):
    g = torch.Generator().manual_seed(0)
    truth, score = torch.rand(3, 1, 8, 8, generator=g), torch.rand(3, 1, 8, 8, generator=g)
    found = {"truth": truth, "cond_mask": score < 0.2, "target_mask": score > 0.7}
    found["draws"], written, said = torch.rand(2, 3, 1, 16, 16, generator=g), {}, []
    at_truth = resize(found["draws"].flatten(0, 1), 8).view(2, 3, 1, 8, 8)
    config = SimpleNamespace(sparsity=[0.2], test_sparsity=None)
    called = dict(write=written.__setitem__, say=said.append)
    run = SimpleNamespace(leads=True, dir=tmp_path, config=config, **called)
    write_results(run, found, regions=("unseen", "query"))
    assert written["reconstructions.npz"] is found
    assert written["samples.npy"].shape == (3, 16, 16, 1)
    expected = psnr(at_truth.mean(0), truth, ~found["cond_mask"])
    assert written["metrics.json"]["psnr"]["mean"] == pytest.approx(expected)
    names = {"metrics.json", "reconstructions.npz", "samples.npy", "reconstructions.png"}
    assert written.keys() == names | {"ranks.png"} and len(said) == 3

    run.leads = False  # another process
    written.clear()
    write_results(run, found)
    assert not written
