"""--log: what TensorBoard reads back, an offline run of wandb, a stand-in for trackio, and none."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import ddpm
import sparse_ddpm
from fused_ddpm import tracking
from fused_ddpm.tracking import flat

import pytest
from helpers import exits_with, read_json, run_tiny
from test_runs import SCRIPTS, by_name, stop_after


class Log:
    """Stands in for the package trackio, and keeps what it is told."""

    def __init__(self):
        self.starts, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.starts.append(options)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, picture):
        return picture.size

    def steps(self, name):
        return [step for step, values in self.rows if name in values]


@pytest.fixture
def trackio(monkeypatch):
    log = Log()
    monkeypatch.setitem(sys.modules, "trackio", log)
    return log


def scalars(folder):
    """{name: [(step, value)]} and the names of pictures, as TensorBoard shows them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = events.Tags()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names["scalars"]}
    return found, {name: [e.step for e in events.Images(name)] for name in names["images"]}


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_each_script_keeps_figures_and_pictures(script, tmp_path, trackio):
    run_tiny(script, tmp_path, "--log", "trackio", "--sample-every", "4")
    history = read_json(tmp_path / "history.json")
    for name in history.keys() - {"steps", "final"}:
        kept = [(step, values[name]) for step, values in trackio.rows if name in values]
        assert kept == list(zip(history["steps"], history[name], strict=True))
    assert trackio.steps("lr") == [1, 2, 3, 4, 5, 6]
    assert trackio.steps("images_per_second") == [2, 3, 4, 5, 6]
    assert trackio.steps("pictures/step") == [4] and trackio.steps("pictures/loss") == [6]
    pictures = {path.stem for path in tmp_path.glob("*.png")} - {"step_000004"}
    assert {f"pictures/{name}" for name in pictures} <= {n for _, row in trackio.rows for n in row}
    if "sparse" in script.__name__:
        metrics = read_json(tmp_path / "metrics.json")
        kept = {name: x for _, row in trackio.rows for name, x in row.items()}
        assert kept["metrics/psnr/mean"] == metrics["psnr"]["mean"]
    assert trackio.finished == 1 and trackio.starts[0]["config"]["batch_size"] == 16
    assert trackio.starts[0]["project"] == "fused-ddpm"


def test_the_learning_rate_and_speed_are_right(tmp_path, trackio, monkeypatch):
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run_tiny(ddpm, tmp_path, "--log", "trackio")
    config = trackio.starts[0]["config"]
    for step, row in trackio.rows:
        if "lr" in row:
            assert row["lr"] == ddpm.learning_rate(step - 1, SimpleNamespace(**config))
            assert step == 1 or row["images_per_second"] == 16 / 4


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path, trackio, monkeypatch):
    with monkeypatch.context() as m:
        stop_after(ddpm, m, 3, signal.SIGTERM)
        with pytest.raises(SystemExit, match="stopped"):
            run_tiny(ddpm, tmp_path, "--log", "trackio")
    ddpm.main(["--resume", "--out-dir", str(tmp_path)])
    assert trackio.steps("train_loss") == [1, 2, 3, 4, 5, 6] and trackio.finished == 2
    first, second = trackio.starts
    assert first["name"] == second["name"] and second["resume"] == "allow"
    run_tiny(ddpm, tmp_path, "--log", "trackio", "--overwrite", "--steps", "1")
    assert trackio.starts[2]["name"] != first["name"]  # another run


def test_sampling_logs_only_where_asked(tmp_path, trackio):
    run_tiny(ddpm, tmp_path, "--log", "trackio", "--steps", "2")
    checkpoint = str(tmp_path / "last.pt")
    ddpm.main(["--sample", checkpoint])
    assert len(trackio.starts) == 1
    ddpm.main(["--sample", checkpoint, "--log", "trackio"])
    assert trackio.starts[1]["name"] != trackio.starts[0]["name"]
    assert trackio.rows[-1][0] == 2 and "pictures/samples" in trackio.rows[-1][1]


def test_only_the_first_process_logs(tmp_path, trackio, monkeypatch):
    monkeypatch.setattr(ddpm.Run, "leads", False)
    run_tiny(ddpm, tmp_path, "--log", "trackio", "--steps", "1")
    assert trackio.starts == trackio.rows == []


def test_tensorboard_reads_it_back(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as m:
        stop_after(sparse_ddpm, m, 3, signal.SIGTERM)
        with pytest.raises(SystemExit, match="stopped"):
            run_tiny(sparse_ddpm, tmp_path, "--log", "tensorboard")
    assert [step for step, _ in scalars(tmp_path)[0]["train_loss"]] == [1, 2, 3]
    sparse_ddpm.main(["--resume", "--out-dir", str(tmp_path)])
    found, pictures = scalars(tmp_path)
    history = read_json(tmp_path / "history.json")
    assert [step for step, _ in found["lr"]] == history["steps"]
    for name in ("train_loss", "val_loss", "test_loss"):
        steps, values = zip(*found[name], strict=True)
        assert list(steps) == history["steps"]
        assert list(values) == pytest.approx(history[name], rel=1e-6)
    psnr = read_json(tmp_path / "metrics.json")["psnr"]["mean"]
    assert found["metrics/psnr/mean"] == [(6, pytest.approx(psnr, rel=1e-6))]
    assert pictures["pictures/loss"] == pictures["pictures/reconstructions"] == [6]
    assert not (tmp_path / "log.json").exists()
    run_tiny(sparse_ddpm, tmp_path, "--log", "tensorboard", "--overwrite", "--steps", "2")
    found, _ = scalars(tmp_path)  # the old run's events are gone
    assert [step for step, _ in found["train_loss"]] == [1, 2]


def test_tensorboard_hides_what_a_killed_run_did_after_its_last_save(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as m:
        m.setattr(ddpm, "update_ema", lambda ema, model, step, decay: 1 / (step < 4))
        with pytest.raises(ZeroDivisionError):  # in the fifth step, the last save being at the 3rd
            run_tiny(ddpm, tmp_path, "--log", "tensorboard", "--save-every", "3")
    assert [step for step, _ in scalars(tmp_path)[0]["train_loss"]] == [1, 2, 3, 4]
    ddpm.main(["--resume", "--out-dir", str(tmp_path)])
    steps = [step for step, _ in scalars(tmp_path)[0]["train_loss"]]
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]


def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    if not hasattr(wandb, "init"):
        pytest.skip("a folder called wandb is no package")
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    run_tiny(ddpm, tmp_path, "--log", "wandb", "--steps", "2")
    wandb.teardown()  # its own process writes
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    name = read_json(tmp_path / "log.json")["name"]
    (kept,) = folder.glob("run-*.wandb")
    assert kept.name == f"run-{name}.wandb" and b"train_loss" in kept.read_bytes()
    assert len(list(folder.glob("files/media/images/pictures/*.png"))) == 3
    ddpm.main(["--resume", "--out-dir", str(tmp_path), "--steps", "3"])
    wandb.teardown()
    names = {path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert names == {kept.name}  # the same run, when it is synced


@pytest.mark.parametrize("kind", tracking.OPENERS)
def test_a_missing_package_ends_the_run_before_it_begins(kind, tmp_path, monkeypatch, capsys):
    module, _ = tracking.OPENERS[kind]
    monkeypatch.setitem(sys.modules, module, None)  # to Python, it is not there
    line = exits_with(1, capsys, lambda: run_tiny(ddpm, tmp_path / "run", "--log", kind))
    assert line.startswith(f"ddpm.py: error: --log {kind}: ")
    assert line.endswith(f"; pip install {kind}") and not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, module, SimpleNamespace())  # a folder of that name
    exits_with(1, capsys, lambda: run_tiny(ddpm, tmp_path / "run", "--log", kind))


def test_what_a_package_cannot_do_is_one_line(tmp_path, trackio, monkeypatch, capsys):
    def init(**options):
        raise RuntimeError("no login")

    monkeypatch.setattr(trackio, "init", init)
    line = exits_with(1, capsys, lambda: run_tiny(ddpm, tmp_path, "--log", "trackio"))
    assert line == "ddpm.py: error: --log trackio: no login"


def test_without_the_flag_nothing_is_imported():
    names = ["tensorboard", "torch.utils.tensorboard", "wandb", "trackio"]
    code = "import sys, ddpm, cfg_ddpm, sparse_ddpm, sparse_ddo; from fused_ddpm.runs import Run; "
    code += "Run(ddpm.Config, ['--device', 'cpu', '--out-dir', 'none']); "
    code += f"print([name for name in {names} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_flat_leaves_out_what_is_no_number():
    content = json.loads('{"psnr": {"mean": 20.5, "draw": 19}, "ranks": [1, 2], "of": "x"}')
    assert flat(content, "m") == {"m/psnr/mean": 20.5, "m/psnr/draw": 19}
