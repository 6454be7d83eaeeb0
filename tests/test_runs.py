"""Runs: exact resume, several processes, checkpoints, signals, and what ends a run in one line."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import cfg_ddpm
import ddpm
import sparse_ddo
import sparse_ddpm
from fused_ddpm import folders, images, runs, seeded_normal
from fused_ddpm.files import UserError
from fused_ddpm.images import Data, to_float
from fused_ddpm.processes import Log
from fused_ddpm.runs import Run, mix
from fused_ddpm.unet import Unet

import numpy as np
import pytest
import torch
from helpers import (
    assert_same,
    exits_with,
    load,
    make_config,
    read_json,
    run_tiny,
    tiny_flags,
)
from PIL import Image

SCRIPTS = [ddpm, cfg_ddpm, sparse_ddpm, sparse_ddo]


def by_name(script):
    return script.__name__


def stop_after(script, monkeypatch, step, number=signal.SIGTERM):
    update = script.update_ema

    def update_and_stop(ema, model, at, decay):
        update(ema, model, at, decay)
        if at + 1 == step:
            signal.raise_signal(number)

    monkeypatch.setattr(script, "update_ema", update_and_stop)


# -- stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, step, number",
    [(ddpm, 1, signal.SIGTERM), *((script, 5, signal.SIGINT) for script in SCRIPTS)],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_resume_equals_uninterrupted(script, tmp_path, monkeypatch, step, number):
    flags = "--flip --epochs 2 --batch-size 64 --dim 4".split()  # three steps an epoch
    flags += ["--dropout", "0.2"] if script is not sparse_ddo else []  # it has none
    run_tiny(script, tmp_path / "whole", *flags)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as m:
        stop_after(script, m, step, number)
        with pytest.raises(SystemExit, match=r"stopped; the run is saved, .*--resume --out-dir"):
            run_tiny(script, tmp_path / "parts", *flags)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load(tmp_path / "parts/last.pt")["step"] == step
    script.main(["--resume", "--out-dir", str(tmp_path / "parts")])
    whole, parts = (load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole["step"] == 6 and whole.keys() == parts.keys()
    for key in whole.keys() - {"config"}:
        assert_same(whole[key], parts[key])
    whole, parts = (np.load(tmp_path / name / "samples.npy") for name in ("whole", "parts"))
    assert np.array_equal(whole, parts)


def test_losses_between_reports_survive_a_stop(tmp_path, monkeypatch):
    # 80 steps are reported every second one: a stop after an odd one leaves a loss over.
    flags = "--steps 80 --save-every 3 --batch-size 4 --dim 4 --sample-every 100".split()

    with monkeypatch.context() as m:
        stop_after(ddpm, m, 5)
        with pytest.raises(SystemExit, match="stopped"):
            run_tiny(ddpm, tmp_path / "parts", *flags)
    kept = load(tmp_path / "parts/last.pt")
    assert kept["step"] == 5 and len(kept["losses"]) == 1
    assert kept["history"]["steps"] == [2, 4]

    seen, log = [], Run.log

    def log_and_keep(run, loss, norm):
        seen.append(loss.item())
        log(run, loss, norm)

    monkeypatch.setattr(Run, "log", log_and_keep)
    stop_after(ddpm, monkeypatch, 6)
    with pytest.raises(SystemExit, match="stopped"):
        ddpm.main(["--resume", "--out-dir", str(tmp_path / "parts")])
    resumed = load(tmp_path / "parts/last.pt")
    mean = (kept["losses"][0] + seen[0]) / 2
    assert len(seen) == 1 and resumed["history"]["train_loss"][-1] == pytest.approx(mean, rel=1e-6)


def test_a_signal_outside_training_ends_the_run_at_once(tmp_path):
    with pytest.raises(SystemExit, match=r"^ddpm.py: interrupted$"):
        with Run(ddpm.Config, ["--device", "cpu", "--out-dir", str(tmp_path)]):
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", [ddpm, sparse_ddo], ids=by_name)
def test_interrupted_sampling_goes_on_where_it_stopped(script, tmp_path, monkeypatch, capsys):
    run_tiny(script, tmp_path / "run", "--steps", "2")
    checkpoint = str(tmp_path / "run/last.pt")
    flags = ["--sample", checkpoint, "--num-samples", "20", "--batch-size", "4", "--out-dir"]
    script.main([*flags, str(tmp_path / "whole")])
    make, calls = script.make_sampler, []

    def make_and_count(*args):
        sample = make(*args)

        def count_or_stop(*inputs):
            calls.append(1)
            if len(calls) > most:
                signal.raise_signal(signal.SIGTERM)
            return sample(*inputs)

        return count_or_stop

    monkeypatch.setattr(script, "make_sampler", make_and_count)
    most = 3
    with pytest.raises(SystemExit, match="interrupted"):
        script.main([*flags, str(tmp_path / "parts")])
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == {"samples.npy.part" if script is ddpm else "draws.npy.part"}
    most, calls = math.inf, []
    capsys.readouterr()
    script.main([*flags, str(tmp_path / "parts")])
    batches = {ddpm: 5, sparse_ddo: 10 + 5 + 3 * 2}[script]  # regression, pictures on three grids
    assert len(calls) == batches - 3 and "12 of" in capsys.readouterr().out
    for path in (tmp_path / "whole").iterdir():
        if path.suffix in (".npy", ".npz"):
            assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    whole, parts = ({p.name for p in (tmp_path / d).iterdir()} for d in ("whole", "parts"))
    assert whole == parts and "config.json" in whole  # of samples that are there, not before


def test_an_end_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    """The samples are whole by then, and stay."""
    run_tiny(ddpm, tmp_path / "run", "--steps", "1")
    write = runs.write

    def full(path, content):
        if path.name == "config.json":
            raise UserError(f"{path}: cannot be written (No space left on device)")
        write(path, content)

    monkeypatch.setattr(runs, "write", full)
    before = signal.getsignal(signal.SIGINT)
    call = lambda: ddpm.main(["--sample", str(tmp_path / "run/last.pt"), "--num-samples", "3"])
    assert "config.json: cannot be written" in exits_with(1, capsys, call)
    assert np.load(tmp_path / "run/sample/samples.npy").shape == (3, 16, 16, 3)
    assert signal.getsignal(signal.SIGINT) is before


# -- several processes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory):
    """A folder with a run of each script, all by one start of torchrun, which takes seconds."""
    folder = tmp_path_factory.mktemp("two")
    flags = {s.__name__: ["--steps", "6", "--out-dir", str(folder / s.__name__)] for s in SCRIPTS}
    flags = {s.__name__: [*tiny_flags(s), *flags[s.__name__]] for s in SCRIPTS}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launcher, "tests/launch.py", json.dumps(flags)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_two_processes_equal_one(script, tmp_path, by_two_processes):
    run_tiny(script, tmp_path)
    folders = tmp_path, by_two_processes / script.__name__
    one, two = (read_json(folder / "history.json") for folder in folders)
    assert one.keys() == two.keys() and one["steps"] == two["steps"] == [1, 2, 3, 4, 5, 6]
    final = one.pop("final"), two.pop("final")
    counts = [x.pop("images") for x in final]
    assert counts[0] == counts[1] and final[0] == pytest.approx(final[1], rel=1e-4)
    for key in one:
        np.testing.assert_allclose(one[key], two[key], rtol=1e-4)
    one, two = (np.load(folder / "samples.npy").astype(int) for folder in folders)
    assert one.shape == two.shape and np.abs(one - two).max() <= 1  # of 255


@pytest.fixture
def tiny_run(tmp_path):
    """A run of ddpm.py that has not started to train."""

    def make(*flags):
        return Run(ddpm.Config, [*tiny_flags(ddpm), "--out-dir", str(tmp_path / "run"), *flags])

    return make


def processes(monkeypatch, world, rank=0):
    monkeypatch.setattr(runs, "world", lambda: world)
    monkeypatch.setattr(runs, "rank", lambda: rank)
    monkeypatch.setattr(runs, "sum_over", lambda tensor: tensor)


def test_processes_share_out_the_same_batch(tiny_run, monkeypatch):
    with tiny_run() as run:
        for step in (0, 7):
            index, keys = run.batch(step, 100)
            parts = []
            for rank in range(4):
                processes(monkeypatch, 4, rank)
                parts.append((*run.batch(step, 100), run.places))
                assert len(parts[-1][0]) == 4
            monkeypatch.undo()
            shared_index, shared_keys, places = (torch.cat(x) for x in zip(*parts, strict=True))
            assert torch.equal(shared_index, index) and torch.equal(shared_keys, keys)
            assert torch.equal(places, torch.arange(16) / 16)


def test_several_processes_stop_at_the_same_step(tiny_run, monkeypatch):
    with tiny_run("--steps", "100", "--save-every", "50") as run:
        assert not run.saves(3)
        run.signals.append(signal.SIGTERM)
        assert run.saves(3) and run.stopping  # one process stops at once
        run.stopping = False
        processes(monkeypatch, 2)
        told = {step for step in range(25) if run.saves(step)}
        assert min(told) == 9 and run.stopping


# -- steps, batches, keys --------------------------------------------------------------------------


def test_every_image_comes_once_an_epoch(tiny_run):
    with tiny_run() as run:
        orders, all_keys = [], []
        for epoch in range(3):
            steps = [run.batch(6 * epoch + i, 100) for i in range(6)]  # 100 // 16
            assert run.epoch == epoch and run.steps_an_epoch == 6
            orders.append(torch.cat([index for index, _ in steps]))
            all_keys.append(torch.cat([keys for _, keys in steps]))
            assert len(orders[-1].unique()) == 96
        # The rest of one epoch is in another.
        assert torch.cat(orders).unique().tolist() == list(range(100))
        assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
        keys = torch.cat(all_keys)
        assert len(keys.unique()) == len(keys) == 288 and (keys >= 0).all()
        again, again_keys = run.batch(8, 100)  # of any step, without those before
        assert torch.equal(again, orders[1][32:48]) and torch.equal(again_keys, all_keys[1][32:48])


def test_a_batch_of_fewer_images_than_asked_for_is_all_there_are(tiny_run):
    with tiny_run() as run:
        for step in range(3):
            index, keys = run.batch(step, 10)
            assert index.sort().values.tolist() == list(range(10)) and len(keys) == 10
            assert run.epoch == step and torch.equal(run.places, torch.arange(10) / 10)


def test_seeds_differ_in_batches_timesteps_and_noise(tmp_path, monkeypatch):
    loss, seen = ddpm.training_loss, {}

    def record(model, x_start, t, noise, *rest):
        seen[seed].append((x_start, t, noise))
        return loss(model, x_start, t, noise, *rest)

    monkeypatch.setattr(ddpm, "training_loss", record)
    for seed in (0, 1):
        seen[seed] = []
        run_tiny(ddpm, tmp_path / str(seed), "--seed", str(seed), "--steps", "1")
    for a, b in zip(seen[0][0], seen[1][0], strict=True):
        assert a.shape == b.shape and not torch.equal(a, b)
    samples = [np.load(tmp_path / str(seed) / "samples.npy").astype(int) for seed in (0, 1)]
    assert np.abs(samples[0] - samples[1]).mean() > 10
    weights = [load(tmp_path / str(seed) / "last.pt")["model"]["stem.weight"] for seed in (0, 1)]
    assert (weights[0] - weights[1]).abs().mean() > 1e-2


def test_mixed_seeds_are_63_bits_and_heed_every_number():
    seeds = {mix(*numbers) for numbers in [(0,), (0, 1), (1, 0), (0, 0, 1), (1 << 40,), (1 << 8,)]}
    assert len(seeds) == 6 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert max(mix(i) for i in range(50)) > 1 << 62 and mix(3, 4) == mix(3, 4)


def test_sample_seeds_are_apart_for_every_seed_of_a_run(tiny_run):
    with tiny_run("--seed", "3") as run:
        index = torch.tensor([0, 1, (1 << 32) - 1])
        assert run.seeds(index).tolist() == [3 << 32, (3 << 32) + 1, (4 << 32) - 1]


def test_when_it_reports_saves_and_draws(tiny_run):
    with tiny_run("--steps", "100", "--save-every", "30", "--sample-every", "40") as run:
        run.introduce(torch.nn.Linear(2, 2), Data(run.config))
        assert [s + 1 for s in range(100) if run.saves(s)] == [30, 60, 90, 100]
        assert [s + 1 for s in range(100) if run.draws(s)] == [40, 80]
        assert [s + 1 for s in range(100) if run.reports(s)] == list(range(2, 101, 2))
        assert [s + 1 for s in range(100) if run.last(s)] == [100]


@pytest.mark.parametrize("epochs, batch, steps", [(3, 16, 39), (1, 100, 2), (2, 500, 2)])
def test_epochs_are_so_many_steps(tiny_run, epochs, batch, steps):
    with tiny_run("--epochs", str(epochs), "--batch-size", str(batch)) as run:
        run.introduce(torch.nn.Linear(2, 2), Data(run.config))  # 216 images to train on
        assert run.config.steps == steps and run.config.epochs is None
        assert run.sample_every == max(steps // 5, 1) and run.log_every == 1


# -- checkpoints -----------------------------------------------------------------------------------


def test_sampling_from_a_checkpoint(tmp_path):
    run_tiny(ddpm, tmp_path / "run")
    flags = ["--sample", str(tmp_path / "run/last.pt"), "--out-dir", str(tmp_path / "again")]
    ddpm.main(flags)
    first, again = (np.load(tmp_path / name / "samples.npy") for name in ("run", "again"))
    assert np.array_equal(first, again)
    more = "--sampler ddpm --variance large --sample-steps 7 --num-samples 5"
    ddpm.main([*flags, *more.split()])
    assert np.load(tmp_path / "again/samples.npy").shape == (5, 16, 16, 3)
    files = {p.name for p in (tmp_path / "again").iterdir()}
    assert files == {"config.json", "samples.npy", "samples.png"}


def test_what_is_part_of_the_model_cannot_be_changed(tmp_path, capsys):
    run_tiny(ddpm, tmp_path, "--steps", "1")
    for flag, value, saved in [("dim", "24", "8"), ("schedule", "linear", "cosine")]:
        flags = ["--sample", str(tmp_path / "last.pt"), f"--{flag}", value]
        said = exits_with(2, capsys, lambda: ddpm.main(flags))  # noqa: B023
        assert f"--{flag} {value}: the checkpoint was made with {saved}" in said


def test_a_run_is_not_overwritten_or_resumed_as_another(tmp_path, capsys):
    run_tiny(ddpm, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    both = "holds a run already; --resume continues it, --overwrite replaces it"
    for flags, message in [
        (tiny_flags(ddpm), both),
        (["--resume", "--flip"], "--flip True: the checkpoint was made with False"),
        (["--resume", "--dim", "16"], "--dim 16: the checkpoint was made with 8"),
        (["--resume", "--seed", "1"], "--seed 1: the checkpoint was made with 0"),
    ]:
        flags = [*flags, "--out-dir", str(tmp_path)]
        assert message in exits_with(2, capsys, lambda: ddpm.main(flags))  # noqa: B023
        assert (tmp_path / "last.pt").read_bytes() == before
    # Nothing is left to train, all the rest is done again.
    (tmp_path / "samples.npy").unlink()
    ddpm.main(["--resume", "--out-dir", str(tmp_path)])
    assert load(tmp_path / "last.pt")["step"] == 6 and (tmp_path / "samples.npy").exists()
    # A longer run is still the same run.
    ddpm.main(["--resume", "--steps", "8", "--out-dir", str(tmp_path)])
    assert load(tmp_path / "last.pt")["step"] == 8
    (tmp_path / "step_000004.png").write_text("of the old run")
    run_tiny(ddpm, tmp_path, "--overwrite", "--flip", "--sample-every", "100", "--steps", "1")
    replaced = load(tmp_path / "last.pt")
    assert replaced["config"]["flip"] and replaced["step"] == 1
    assert not list(tmp_path.glob("step_*.png"))


def test_a_checkpoint_holds_what_a_reader_needs(tmp_path):
    run_tiny(ddpm, tmp_path, "--steps", "1")
    checkpoint = load(tmp_path / "last.pt")  # with weights_only: plain types and tensors
    states = {"model", "ema", "optimizer"}
    about = {"script", "format", "config", "step", "history", "losses", "facts"}
    assert checkpoint.keys() == about | states and checkpoint["script"] == "ddpm"
    assert checkpoint["facts"]["shape"] == [3, 16, 16]
    assert len(checkpoint["facts"]["class_names"]) == 10
    config = read_json(tmp_path / "config.json")
    assert checkpoint["config"] == {k: v for k, v in config.items() if k != "bfloat16"}
    assert config.keys() == vars(make_config(ddpm)).keys()
    written = read_json(tmp_path / "history.json")
    assert written.pop("final")["images"] == {"val": 24, "test": 40}
    assert checkpoint["history"] == written


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_sets_of_one_batch_have_the_same_loss_in_the_end(script, tmp_path, capsys):
    run_tiny(script, tmp_path, "--steps", "2")
    history = read_json(tmp_path / "history.json")
    final = history.pop("final")
    assert final.pop("images").items() >= {"val": 24, "test": 40}.items()
    assert final == {name: pytest.approx(history[name][-1], rel=1e-6) for name in final}
    shown = f"over whole sets: val_loss {final['val_loss']:.4f} (24 images), test_loss "
    assert shown in capsys.readouterr().out


def test_the_last_losses_are_of_all_images_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHAPES_COUNT", {True: 3000, False: 140})
    monkeypatch.setitem(runs.WHOLE, "small", 200)
    run_tiny(ddpm, tmp_path, "--steps", "1", "--amp", "off")
    final = read_json(tmp_path / "history.json")["final"]
    assert final["images"] == {"val": 200, "test": 140}
    checkpoint = load(tmp_path / "last.pt")
    config = ddpm.Config(**checkpoint["config"])
    model = Unet(3, 3, config)
    model.load_state_dict(checkpoint["ema"])
    alphas_cumprod = ddpm.make_schedule(config.schedule, config.num_timesteps)
    sets = {"val": Data(config)._train[0], "test": Data(config).test_part(140)}
    for name, part in sets.items():
        losses = []
        for i in range(final["images"][name]):
            batch = min(final["images"][name] - i // 128 * 128, 128)  # this image's
            t = torch.linspace(0, 49, batch).long()[i % 128].view(1)
            x_start = to_float(part.images[i : i + 1])
            noise = seeded_normal(torch.tensor([i]), (3, 16, 16))
            with torch.no_grad():
                losses += [ddpm.training_loss(model, x_start, t, noise, alphas_cumprod, config)]
        assert final[f"{name}_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


# -- what belongs together -------------------------------------------------------------------------


class Killed(BaseException):
    """In place of a kill: nothing catches it."""


def kill_at(monkeypatch, name, step):
    """The run dies instead of writing a file of this name, from a step of training on."""
    write = Run.write

    def write_or_die(run, file, content):
        if file == name and (run.state["step"] >= step or "step_" in name):
            raise Killed
        write(run, file, content)

    monkeypatch.setattr(Run, "write", write_or_die)


@pytest.mark.parametrize("name", ["last.pt", "config.json", "history.json", "step_000004.png"])
def test_a_kill_between_two_files_leaves_nothing_undone(tmp_path, monkeypatch, name):
    flags = ["--sample-every", "4"]  # a step that is also saved
    run_tiny(ddpm, tmp_path / "whole", *flags)
    with monkeypatch.context() as m:
        kill_at(m, name, 4)
        with pytest.raises(Killed):
            run_tiny(ddpm, tmp_path / "parts", *flags)
    (tmp_path / "parts" / ".last.pt.tmp.pt").write_text("half")
    ddpm.main(["--resume", "--out-dir", str(tmp_path / "parts")])
    whole, parts = ({p.name: p for p in (tmp_path / x).iterdir()} for x in ("whole", "parts"))
    assert whole.keys() == parts.keys() and "step_000004.png" in whole
    for name in whole.keys() - {"last.pt", "config.json"}:
        assert whole[name].read_bytes() == parts[name].read_bytes()


def test_history_is_mended_though_nothing_is_left_to_train(tmp_path):
    run_tiny(ddpm, tmp_path)
    right = read_json(tmp_path / "history.json")
    (tmp_path / "history.json").write_text("{}")
    ddpm.main(["--resume", "--out-dir", str(tmp_path)])
    assert read_json(tmp_path / "history.json") == right


def test_an_overwritten_run_stays_until_the_new_one_is_saved(tmp_path, monkeypatch):
    run_tiny(ddpm, tmp_path, "--sample-every", "2")
    (tmp_path / "gaussian.npz").write_text("of the old run")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    new = ["--overwrite", "--seed", "1", "--sample-every", "3"]
    with monkeypatch.context() as m:
        kill_at(m, "last.pt", 0)
        with pytest.raises(Killed):
            run_tiny(ddpm, tmp_path, *new)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    ddpm.main(["--resume", "--out-dir", str(tmp_path)])  # the old one, as good as ever
    assert (tmp_path / "last.pt").read_bytes() == before[tmp_path / "last.pt"]
    run_tiny(ddpm, tmp_path, *new)
    assert load(tmp_path / "last.pt")["config"]["seed"] == 1
    assert {p.name for p in tmp_path.glob("step_*.png")} == {"step_000003.png"}
    assert not (tmp_path / "gaussian.npz").exists()


def test_samples_do_not_replace_the_runs_own(tmp_path):
    run_tiny(ddpm, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    ddpm.main(["--sample", str(tmp_path / "last.pt"), "--num-samples", "3"])
    assert np.load(tmp_path / "sample/samples.npy").shape == (3, 16, 16, 3)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_two_runs_in_one_folder_are_one_too_many(tiny_run, tmp_path, capsys):
    with tiny_run() as run:
        run.introduce(torch.nn.Linear(2, 2), Data(run.config))
        run.restore()
        for call in [
            lambda: run_tiny(ddpm, tmp_path / "run"),
            lambda: run_tiny(ddpm, tmp_path / "run", "--overwrite"),
        ]:
            assert "another process is at work in it" in exits_with(1, capsys, call)
        (tmp_path / "run/last.pt").touch()  # by one that was quicker, since this one began
    with tiny_run("--overwrite") as late:
        late.config.overwrite = False
        late.introduce(torch.nn.Linear(2, 2), Data(late.config))
        with pytest.raises(UserError, match="holds a run already"):
            late.restore()


# -- the data of a run -----------------------------------------------------------------------------


def folder_of_images(folder):
    for i in range(12):
        colour = (20 * i, 255 - 20 * i, 7 * i)
        path = folder / ("left" if i % 2 else "right") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(path)
    return folder


def replace_one(data):
    Image.new("RGB", (16, 16), "red").save(data / "left" / "1.png")


def add_one(data):
    Image.new("RGB", (16, 16), "red").save(data / "left" / "new.png")


def move_one(data):
    (data / "right" / "8.png").rename(data / "left" / "08.png")


def rename(data):
    (data / "left").rename(data / "links")


def make_grey(data):
    for path in data.rglob("*.png"):
        Image.open(path).convert("L").save(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (replace_one, "other images than the run was made with"),
        (add_one, "other images than the run was made with"),
        (move_one, "other images than the run was made with"),
        (rename, "other class names than the run was made with"),
        (make_grey, "the checkpoint is for 3x16x16, this is 1x16x16"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(tmp_path, capsys, change, message):
    data, out = folder_of_images(tmp_path / "data"), tmp_path / "run"
    run_tiny(ddpm, out, "--data", str(data), "--steps", "2", "--batch-size", "4")
    before = {path: path.read_bytes() for path in out.iterdir()}
    change(data)
    folders.list_folder.cache_clear()  # a new process would read it anew
    folders.survey.cache_clear()
    call = lambda: ddpm.main(["--resume", "--out-dir", str(out), "--steps", "4"])
    said = exits_with(1, capsys, call)
    assert said.startswith(f"ddpm.py: error: --data {data}: ") and message in said
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    ddpm.main(["--sample", str(out / "last.pt"), "--num-samples", "2"])  # needs no data


def test_labels_count_too():
    x, y = torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2])
    assert images.hash_of([x, y]) == images.hash_of([x.clone(), y.clone()])
    assert images.hash_of([x, y]) != images.hash_of([x, y.flip(0)])
    assert images.hash_of([y[::2]]) == images.hash_of([torch.tensor([0, 2])])


def test_a_run_that_does_not_say_what_its_data_were_is_not_resumed(tmp_path, capsys):
    run_tiny(ddpm, tmp_path, "--steps", "2")
    whole, path = load(tmp_path / "last.pt"), tmp_path / "last.pt"
    for fact in ("images", "labels"):
        facts = {name: x for name, x in whole["facts"].items() if name != fact}
        torch.save(whole | {"facts": facts}, path)
        before = path.read_bytes()
        call = lambda: ddpm.main(["--resume", "--out-dir", str(tmp_path), "--steps", "3"])
        assert f"other {fact} than the run was made with" in exits_with(1, capsys, call)
        assert path.read_bytes() == before


# -- signals, logs ---------------------------------------------------------------------------------


def test_a_second_signal_ends_the_run_at_once(tiny_run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    with pytest.raises(SystemExit, match="interrupted"):
        with tiny_run() as run:
            run.training = True
            for later in (0, 0.2, 0.7):  # torchrun passes on what the terminal has sent already
                now[0] = 100 + later
                signal.raise_signal(signal.SIGINT)
            assert len(run.signals) == 3
            now[0] = 101.1  # a second after the first, whatever came in between
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")


def test_a_signal_while_the_checkpoint_is_read(tmp_path, monkeypatch):
    def slow(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runs, "read_command_line", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # "&" of a shell ignores it
    try:
        with pytest.raises(SystemExit, match=r"^ddpm.py: interrupted$"):
            with Run(ddpm.Config, ["--sample", "x.pt"]):
                pytest.fail("started")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_log_that_is_full_or_not_utf8_stops_nothing(tmp_path):
    code = """if True:
        import os, sys
        from fused_ddpm.processes import Log
        sys.stdout = Log(sys.stdout)
        for _ in range(3):
            print("späces 漢字", chr(0xDCFF))
        os.write(2, b"done")"""
    for encoding, target, shown in [
        ("ascii", subprocess.PIPE, rb"sp\xe4ces \u6f22\u5b57 \udcff"),
        ("utf-8", subprocess.PIPE, "späces 漢字 \\udcff".encode()),
        ("utf-8", open("/dev/full", "wb"), None),
    ]:
        env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        end = subprocess.run(
            [sys.executable, "-c", code], env=env, stdout=target, stderr=subprocess.PIPE
        )
        assert end.returncode == 0 and end.stderr == b"done"
        assert shown is None or end.stdout.splitlines() == [shown] * 3


def test_only_the_first_process_is_heard(monkeypatch, capsys):
    log = Log(sys.stdout)
    monkeypatch.setenv("RANK", "1")
    log.write("alone")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")  # as torchrun sets it
    log.write(" and not twice")
    assert capsys.readouterr().out == "alone"


# -- what ends a run in one line -------------------------------------------------------------------


@pytest.mark.parametrize(
    "good, message",
    [
        (0, "the loss became nan by step 1; there is no checkpoint yet. Try a smaller --lr"),
        (12, "the loss became nan by step 5; the last good checkpoint is kept. Try a smaller"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, good, message):
    loss, calls = ddpm.masked_loss, []

    def diverging(*args, **kwargs):  # three calls a step: of training, val and test
        calls.append(1)
        return loss(*args, **kwargs) * (math.nan if len(calls) > good else 1)

    monkeypatch.setattr(ddpm, "masked_loss", diverging)
    with pytest.raises(SystemExit, match=message):
        run_tiny(ddpm, tmp_path, "--save-every", "1")
    if good:
        checkpoint = load(tmp_path / "last.pt")
        assert checkpoint["step"] == 4
        assert all(p.isfinite().all() for p in checkpoint["model"].values())
    else:
        assert not (tmp_path / "last.pt").exists()


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def exploding(parameters, largest):
        calls.append(1)
        return clip(parameters, largest) * (math.inf if len(calls) == 4 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", exploding)
    with pytest.raises(SystemExit, match="the loss became nan by step 4"):
        run_tiny(ddpm, tmp_path)
    assert load(tmp_path / "last.pt")["step"] == 2


def test_nor_is_a_loss_between_two_reports(tmp_path, monkeypatch):
    loss, calls = ddpm.masked_loss, []

    def diverging(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(ddpm, "held_out_losses", lambda *args: {})
    monkeypatch.setattr(ddpm, "masked_loss", diverging)
    with pytest.raises(SystemExit, match="the loss became nan by step 3"):
        run_tiny(ddpm, tmp_path, "--steps", "80", "--save-every", "3")  # reports every second step
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "cifar"], "--data cifar: neither a data set"),
        (["--data", "{here}/empty"], "no images in it"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "meta"], "--device meta: "),
        (["--device", "hpu"], "--device hpu: "),
        (["--device", "mkldnn"], "--device mkldnn: "),
        (["--out-dir", "{here}/" + 300 * "x"], "File name too long"),
        (["--out-dir", "{here}/text.pt/below"], "below: cannot be written"),
    ],
)
def test_bad_input_exits_with_1(tmp_path, capsys, flags, message):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    flags = [flag.format(here=tmp_path) for flag in flags]
    said = exits_with(1, capsys, lambda: run_tiny(ddpm, tmp_path / "new", *flags))
    assert said.startswith("ddpm.py: error: ") and message in said
    assert not (tmp_path / "new").exists()


def test_what_does_not_fit_into_memory_ends_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ddpm, "Unet", lambda *args: torch.nn.Linear(1 << 24, 1 << 24))
    said = exits_with(1, capsys, lambda: run_tiny(ddpm, tmp_path / "new"))
    assert said.startswith("ddpm.py: error: out of memory; a smaller --batch-size")
    assert not (tmp_path / "new").exists()


def edited(checkpoint, path, **changes):
    torch.save(checkpoint | changes, path)


def test_bad_checkpoints_exit_with_1(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"script": "other"}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    run_tiny(ddpm, tmp_path / "run", "--steps", "1")
    whole = (tmp_path / "run/last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    good = load(tmp_path / "run/last.pt")
    edited(good, tmp_path / "old.pt", format=1)
    edited(good, tmp_path / "config.pt", config=good["config"] | {"dim": "wide"})
    without = {k: v for k, v in good["ema"].items() if k != "stem.weight"}
    edited(good, tmp_path / "weights.pt", ema=without)
    edited(good, tmp_path / "nan.pt", ema=good["ema"] | {"stem.bias": torch.full((8,), math.nan)})
    for name, message in [
        ("missing.pt", "{path}: no such checkpoint"),
        ("text.pt", "{path}: not a checkpoint, or a damaged one"),
        ("half.pt", "{path}: not a checkpoint, or a damaged one"),
        ("list.pt", "{path}: not a checkpoint, or a damaged one"),
        ("foreign.pt", "{path}: a checkpoint of other.py, not of ddpm.py"),
        ("old.pt", "{path}: of another version of ddpm.py"),
        ("config.pt", "{path}: its configuration cannot be used (dim is 'wide')"),
        ("weights.pt", "the checkpoint does not fit --data shapes or this version of the network"),
        ("nan.pt", "{path}: not a checkpoint, or a damaged one (a number that is not finite)"),
    ]:
        flags = ["--sample", str(tmp_path / name), "--out-dir", str(tmp_path / "out")]
        said = exits_with(1, capsys, lambda: ddpm.main(flags))  # noqa: B023
        assert message.format(path=tmp_path / name) in said and not (tmp_path / "out").exists()
    assert (tmp_path / "run/last.pt").read_bytes() == whole


def test_a_shell_sees_one_line_and_status_1(tmp_path):
    program = "import sys, ddpm; ddpm.main(sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", program, "--sample", "missing.pt"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and not any(tmp_path.iterdir())
    assert result.stderr == "ddpm.py: error: missing.pt: no such checkpoint\n"


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(tiny_run, monkeypatch):
    monkeypatch.setattr(runs.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(runs.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(runs, "world", lambda: 3)
    with pytest.raises(SystemExit, match=r"--batch-size 16: must be a multiple of the 3 processes"):
        with tiny_run():
            pytest.fail("started")
