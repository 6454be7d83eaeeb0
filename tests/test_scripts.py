"""What all scripts have in common: training, exact resume, several processes, checkpoints, messages."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cfg_ddpm
import ddpm
import sparse_ddo
import sparse_ddpm

TINY = """--data shapes --image-size 16 --dim 8 --dim-mults 1 2 --batch-size 16 --sample-steps 4 --num-samples 4 --lr 1e-3
--save-every 2""".split()
OF_ITS_OWN = {
    "ddpm": "--num-timesteps 50",
    "sparse_ddpm": "--num-timesteps 50 --num-draws 2",
    "cfg_ddpm": "--num-timesteps 50 --guidance-sweep 2",
    "sparse_ddo": "--modes 8 --num-draws 2",
}


@pytest.fixture(params=[ddpm, sparse_ddpm, cfg_ddpm, sparse_ddo], ids=lambda module: module.__name__)
def script(request):
    return request.param


def tiny(script):
    return [*TINY, *OF_ITS_OWN[script.__name__].split()]


def run(script, out_dir, *flags):
    length = [] if "--epochs" in flags or "--steps" in flags else ["--steps", "6"]
    script.main([*tiny(script), *length, "--out-dir", str(out_dir), *flags])


def stop_after(script, monkeypatch, step, number=signal.SIGTERM):
    update = script.update_ema

    def update_and_stop(ema, model, at, decay):
        update(ema, model, at, decay)
        if at + 1 == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(script, "update_ema", update_and_stop)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("step, number", [(1, signal.SIGTERM), (4, signal.SIGINT)])
def test_resume_equals_uninterrupted(script, tmp_path, monkeypatch, step, number):
    flags = "--flip --epochs 1 --batch-size 24".split()  # 9 steps
    flags += ["--dropout", "0.2"] if script is not sparse_ddo else []  # it has none
    run(script, tmp_path / "whole", *flags)
    with monkeypatch.context() as m:
        stop_after(script, m, step, number)
        with pytest.raises(SystemExit) as stopped:
            run(script, tmp_path / "parts", *flags)
    assert "--resume" in str(stopped.value)
    assert torch.load(tmp_path / "parts/last.pt", weights_only=True)["step"] == step
    script.main(["--resume", "--out-dir", str(tmp_path / "parts")])
    whole, parts = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    for key in ("step", "history", "model", "ema", "optimizer", "losses"):
        assert_same(whole[key], parts[key])
    assert np.array_equal(np.load(tmp_path / "whole/samples.npy"), np.load(tmp_path / "parts/samples.npy"))


def test_two_processes_equal_one(script, tmp_path):
    torch.set_num_threads(1)
    run(script, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tests/launch.py"]
    flags = [script.__name__, *tiny(script), "--steps", "6", "--out-dir", str(tmp_path / "two")]
    root = Path(__file__).parent.parent
    subprocess.run([*command, *flags], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], rtol=1e-4)
    one, two = (np.load(tmp_path / name / "samples.npy").astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1  # of 255


def test_sampling_from_a_checkpoint(script, tmp_path):
    run(script, tmp_path / "run")
    flags = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "again")]
    script.main(flags)
    assert np.array_equal(np.load(tmp_path / "run/samples.npy"), np.load(tmp_path / "again/samples.npy"))
    sampler = ["--sampler", "ddpm", "--variance", "large"] if script is not sparse_ddo else []
    script.main([*flags, *sampler, "--sample-steps", "7", "--num-samples", "5"])
    assert np.load(tmp_path / "again/samples.npy").shape == (5, 16, 16, 3)
    with pytest.raises(SystemExit):  # what is part of the model cannot be changed
        script.main([*flags, "--dim", "24"])


def test_interrupted_sampling_goes_on_where_it_stopped(script, tmp_path, monkeypatch, capsys):
    run(script, tmp_path / "run")
    flags = ["--sample", str(tmp_path / "run/last.pt"), "--num-samples", "20", "--batch-size", "4", "--out-dir"]
    script.main([*flags, str(tmp_path / "whole")])
    sample, calls = script.sample, []

    def count_or_stop(*args):
        calls.append(1)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(script, "sample", count_or_stop)
    stop_after = 3
    with pytest.raises(SystemExit):
        script.main([*flags, str(tmp_path / "parts")])
    assert not (tmp_path / "parts/samples.npy").exists() and list((tmp_path / "parts").glob("*.npy.part"))
    stop_after, calls = math.inf, []
    capsys.readouterr()
    script.main([*flags, str(tmp_path / "parts")])
    batches = {ddpm: 5, cfg_ddpm: 5 + 1, sparse_ddpm: 10, sparse_ddo: 10 + 3 * 2}[script]  # with the pictures beside them
    assert len(calls) == batches - 3 and "12 of" in capsys.readouterr().out
    for file in ("samples.npy", "reconstructions.npz", "labels.npy"):
        if (tmp_path / "whole" / file).exists():
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, monkeypatch, capsys):
    loss = script.masked_loss
    calls = []

    def diverging(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (math.nan if len(calls) > 12 else 1)

    monkeypatch.setattr(script, "masked_loss", diverging)
    with pytest.raises(SystemExit, match="the loss became nan by step"):
        run(script, tmp_path, "--save-every", "1")
    checkpoint = script.load_checkpoint(tmp_path / "last.pt")
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


def test_a_gradient_that_is_not_finite_is_not_saved(script, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def exploding(parameters, largest):
        calls.append(1)
        return clip(parameters, largest) * (math.inf if len(calls) == 4 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", exploding)
    with pytest.raises(SystemExit, match="the loss became nan by step 4"):
        run(script, tmp_path)
    assert script.load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_seeds_differ_in_batches_timesteps_and_noise(script, tmp_path, monkeypatch):
    loss, seen = script.training_loss, {}

    def record(model, x_start, t, noise, *rest):
        seen[seed].append((x_start, t, noise))
        return loss(model, x_start, t, noise, *rest)

    monkeypatch.setattr(script, "training_loss", record)
    for seed in (0, 1):
        seen[seed] = []
        run(script, tmp_path / str(seed), "--seed", str(seed), "--steps", "1")
    for a, b in zip(seen[0][0], seen[1][0], strict=True):
        assert not torch.equal(a, b)


def test_a_failed_write_leaves_the_old_file(script, tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(script.UserError, match=r"last.pt: cannot be written .*No space left"):
        script.write(path, full_disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_bad_files_exit_with_1(script, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"script": "other"}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    run(script, tmp_path / "run")
    whole = (tmp_path / "run/last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    sample = ["--sample", None, "--out-dir", str(tmp_path / "out")]
    for flags, message in [
        (["--data", "cifar"], "--data cifar: neither a data set"),
        (["--data", str(tmp_path / "empty")], "no images in it"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--out-dir", str(tmp_path / "text.pt" / "below")], "below/config.json: cannot be written"),
    ]:
        with pytest.raises(SystemExit) as error:
            run(script, tmp_path / "new", *flags)
        assert message in error.value.code and "\n" not in error.value.code and not (tmp_path / "new").exists()
    for name, message in [
        ("missing.pt", "no such checkpoint"),
        ("text.pt", "not a checkpoint, or a damaged one"),
        ("half.pt", "not a checkpoint, or a damaged one"),
        ("list.pt", "not a checkpoint, or a damaged one"),
        ("foreign.pt", f"a checkpoint of other.py, not of {script.__name__}.py"),
    ]:
        sample[1] = str(tmp_path / name)
        with pytest.raises(SystemExit) as error:
            script.main(sample)
        assert f"{tmp_path / name}: {message}" in error.value.code and not (tmp_path / "out").exists()
    assert (tmp_path / "run/last.pt").read_bytes() == whole


def test_a_run_is_not_overwritten_or_resumed_as_another(script, tmp_path, capsys):
    run(script, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    for flags, message in [
        ([*tiny(script)], "holds a run already; --resume continues it, --overwrite replaces it"),
        (["--resume", "--flip"], "--flip True: the checkpoint was made with False"),
        (["--resume", "--dim", "16"], "--dim 16: the checkpoint was made with 8"),
    ]:
        with pytest.raises(SystemExit) as error:
            script.main([*flags, "--out-dir", str(tmp_path)])
        assert error.value.code == 2 and message in capsys.readouterr().err
        assert (tmp_path / "last.pt").read_bytes() == before
    script.main(["--resume", "--out-dir", str(tmp_path)])  # nothing is left to train, all the rest is done again
    assert script.load_checkpoint(tmp_path / "last.pt")["step"] == 6
    script.main(["--resume", "--steps", "8", "--out-dir", str(tmp_path)])  # a longer run is still the same run
    assert script.load_checkpoint(tmp_path / "last.pt")["step"] == 8
    run(script, tmp_path, "--overwrite", "--flip")
    assert script.load_checkpoint(tmp_path / "last.pt")["config"]["flip"]
