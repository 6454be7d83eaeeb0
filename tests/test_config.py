"""Flags from dataclasses: presets, bounds, messages, and what a checkpoint fixes."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import cfg_ddpm
import ddpm
import sparse_ddo
import sparse_ddpm
from fused_ddpm.checkpoints import FORMAT
from fused_ddpm.config import (
    RunConfig,
    check_saved,
    fixed_flags,
    flag,
    flags_of,
    kind_of,
    make_parser,
    preset_values,
    read_checkpoint,
    read_command_line,
)
from fused_ddpm.files import UserError

import pytest
import torch
from helpers import exits_with, make_config

SCRIPTS = pytest.mark.parametrize(
    "script", [ddpm, cfg_ddpm, sparse_ddpm, sparse_ddo], ids=lambda script: script.__name__
)


@dataclass
class Model:
    width: int = flag(8, "of it", full=64)
    levels: list[int] = flag([1, 2], "of it")
    kind: str = flag("a", "which", ["a", "b"])
    linear: bool = flag(False, "or not")


@dataclass
class Training:
    data: str = flag("auto", "which")
    steps: int | None = flag(10, "how many", full=None, later=True)
    epochs: int | None = flag(None, "the same in epochs", full=5, later=True)
    rate: float = flag(0.5, "100% of it", within="(0, 1]")
    drop: float = flag(0.0, "share", within="[0, 1)")


@dataclass
class Sampling:
    num_timesteps: int = flag(100, "in training")
    sample_steps: int = flag(20, "in sampling")
    sweep: list[float] = flag([0, 1], "to compare", within="[0, inf)")
    side: int = flag(4, "of the grid", later=False)


@dataclass
class Config(RunConfig, Sampling, Training, Model):
    def check(self):
        yield self.width % 2, f"--width {self.width}: must be even"


def read(*argv):
    return read_command_line(Config, "script", "About it.", list(argv))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


# -- presets and values ----------------------------------------------------------------------------


def test_the_preset_goes_by_the_device(monkeypatch):
    config, checkpoint = read()
    assert checkpoint is None and (config.preset, config.device) == ("small", "cpu")
    assert (config.width, config.steps, config.epochs) == (8, 10, None)
    assert config.out_dir == "out/script" and config.levels == [1, 2] and config.bfloat16 is False
    assert read("--device", "cuda:1")[0].preset == "full"
    assert read("--device", "cuda:1", "--preset", "small")[0].width == 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config, _ = read()
    assert (config.preset, config.device) == ("full", "cuda")
    assert (config.width, config.steps, config.epochs) == (64, None, 5)
    assert read("--device", "cpu")[0].preset == "small"


def test_a_flag_beats_the_preset():
    argv = "--preset full --width 6 --levels 3 4 5 --kind b --linear --rate 1 --sweep --side 9"
    config, _ = read(*argv.split())
    assert (config.width, config.levels, config.kind, config.linear) == (6, [3, 4, 5], "b", True)
    assert (config.rate, config.sweep, config.side, config.epochs) == (1.0, [], 9, 5)
    assert read("--no-linear")[0].linear is False


def test_steps_and_epochs_take_each_other_out():
    assert (lambda c: (c.steps, c.epochs))(read("--preset", "full", "--steps", "7")[0]) == (7, None)
    assert (lambda c: (c.steps, c.epochs))(read("--epochs", "3")[0]) == (None, 3)


def test_fewer_timesteps_bring_the_sampling_steps_down():
    assert read("--num-timesteps", "7")[0].sample_steps == 7
    assert read("--num-timesteps", "70")[0].sample_steps == 20
    assert read("--num-timesteps", "7", "--sample-steps", "9")[0].sample_steps == 9


def test_lists_of_two_configurations_are_two():
    values = preset_values(Config, "small")
    values["levels"].append(9)
    assert preset_values(Config, "small")["levels"] == [1, 2] == read()[0].levels
    full = preset_values(Config, "full")
    full["levels"].append(9)
    assert preset_values(Config, "full")["levels"] == [1, 2]


@SCRIPTS
def test_presets_of_the_scripts_are_what_flags_could_give(script):
    for preset in ("small", "full"):
        values = preset_values(script.Config, preset)
        assert values.keys() == flags_of(script.Config).keys()
        check_saved(script.Config, values | {"preset": preset})
        config = script.Config(**values | {"preset": preset})
        assert not [message for wrong, message in config.check() if wrong]
        assert (config.steps is None) != (config.epochs is None)


@SCRIPTS
def test_every_field_is_a_flag_with_a_word_of_help(script, capsys):
    parser = make_parser(script.Config, script.__name__, "About it.")
    text = parser.format_help()
    for name, (field, _) in flags_of(script.Config).items():
        assert f"--{name.replace('_', '-')}" in text and field.metadata["help"]
    names = {f.name for f in dataclasses.fields(script.Config)} - {"bfloat16"}
    assert names == flags_of(script.Config).keys()
    with pytest.raises(SystemExit) as ended:
        read_command_line(script.Config, script.__name__, "About it.", ["--help"])
    assert ended.value.code == 0 and "About it." in capsys.readouterr().out


def test_help_shows_the_values():
    text = " ".join(make_parser(Config, "script", "About it.").format_help().split())
    assert "of it (small 8, full 64)" in text and "100% of it (0.5)" in text
    assert "--linear, --no-linear" in text and "{a,b}" in text
    assert text.index("model:") < text.index("training:") < text.index("sampling:")
    assert text.index("sampling:") < text.index("run:") < text.index("--preset")


def test_kinds_of_fields():
    kinds = {name: kind_of(field) for name, (field, _) in flags_of(Config).items()}
    assert kinds["width"] == (int, False, False) and kinds["levels"] == (int, True, False)
    assert kinds["steps"] == (int, False, True) and kinds["sample"] == (str, False, True)
    assert kinds["sweep"] == (float, True, False) and kinds["linear"] == (bool, False, False)


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--width 0", "argument --width: must lie in [1, 10000000], got 0"),
        ("--width -3", "argument --width: must lie in [1, 10000000], got -3"),
        ("--width 10000001", "argument --width: must lie in [1, 10000000], got 10000001"),
        ("--width 1.5", "argument --width: invalid int value: '1.5'"),
        ("--width wide", "argument --width: invalid int value: 'wide'"),
        ("--width 7", "--width 7: must be even"),
        ("--levels 1 0", "argument --levels: must lie in [1, 10000000], got 0"),
        ("--kind c", "argument --kind: invalid choice: 'c'"),
        ("--rate 0", "argument --rate: must lie in (0, 1], got 0"),
        ("--rate 1.01", "argument --rate: must lie in (0, 1], got 1.01"),
        ("--rate nan", "argument --rate: must lie in (0, 1], got nan"),
        ("--rate fast", "argument --rate: invalid float value: 'fast'"),
        ("--drop 1", "argument --drop: must lie in [0, 1), got 1"),
        ("--drop -0.1", "argument --drop: must lie in [0, 1), got -0.1"),
        ("--sweep 1 inf", "argument --sweep: must lie in [0, inf), got inf"),
        ("--seed -1", "argument --seed: must lie in [0, 2147483647], got -1"),
        ("--steps 5 --epochs 1", "argument --epochs: not allowed with argument --steps"),
        ("--unknown 1", "unrecognized arguments: --unknown 1"),
        ("--data=", "argument --data: must not be empty"),
        ("--sample=", "argument --sample: must not be empty"),
        ("--out-dir=", "argument --out-dir: must not be empty"),
        ("--sample x.pt --resume", "argument --resume: not allowed with argument --sample"),
    ],
)
def test_flags_that_do_not_fit_exit_with_2(here, capsys, flags, message):
    said = exits_with(2, capsys, lambda: read(*flags.split()))
    assert said.startswith(f"script.py: error: {message}") and not any(here.iterdir())


@pytest.mark.parametrize(
    "flags", ["--rate 1", "--rate 1e-9", "--drop 0", "--drop 0.999", "--seed 0"]
)
def test_bounds_themselves_are_in_or_out_as_written(flags):
    name, value = flags.removeprefix("--").split()
    assert getattr(read(*flags.split())[0], name) == float(value)


@SCRIPTS
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 5 --epochs 1", "argument --epochs: not allowed with argument --steps"),
        ("--batch-size 0", "argument --batch-size: must lie in [1, 10000000], got 0"),
        ("--lr 0", "argument --lr: must lie in (0, 1], got 0"),
        ("--ema-decay 1", "argument --ema-decay: must lie in [0, 1), got 1"),
        ("--amp perhaps", "argument --amp: invalid choice: 'perhaps'"),
        ("--dim-mults", "--dim-mults: needs one level at least"),
    ],
)
def test_scripts_exit_with_2(script, here, capsys, flags, message):
    said = exits_with(2, capsys, lambda: script.main(flags.split()))
    assert said.startswith(f"{script.__name__}.py: error: {message}") and not any(here.iterdir())


def test_a_folder_with_a_run_is_not_started_in(here, capsys):
    (here / "out/script").mkdir(parents=True)
    (here / "out/script/last.pt").touch()
    both = "holds a run already; --resume continues it, --overwrite replaces it"
    assert f"--out-dir out/script: {both}" in exits_with(2, capsys, read)
    assert read("--overwrite")[0].overwrite and read("--out-dir", "other")[0].out_dir == "other"


# -- what a checkpoint fixes -----------------------------------------------------------------------


def test_auto_is_a_value_like_others_with_a_checkpoint(checkpoint):
    path = str(checkpoint(amp="off", data="mine"))
    config, _ = read("--sample", path, "--amp", "auto", "--data", "auto")
    assert config.amp == "auto" and config.data == "mine"


def test_fixed_flags():
    model = {"width", "levels", "kind", "linear"}
    assert fixed_flags(Config, sampling=True) == model
    training = {"data", "rate", "drop", "side", "preset", "seed"}
    assert fixed_flags(Config, sampling=False) == model | training


@SCRIPTS
def test_fixed_flags_of_the_scripts(script):
    sampling, resuming = (fixed_flags(script.Config, sampling) for sampling in (True, False))
    assert sampling < resuming and {"dim", "dim_mults", "objective"} <= sampling
    assert ("image_size" in sampling) == (script is not sparse_ddo) and "image_size" in resuming
    assert {"data", "flip", "batch_size", "seed", "preset", "ema_decay"} <= resuming - sampling
    free = {"steps", "epochs", "lr", "grad_clip", "device", "out_dir", "num_samples"}
    assert not (free | {"sample_steps", "save_every", "data_dir"}) & resuming


def saved(**changes):
    return preset_values(Config, "small") | {"preset": "small", "out_dir": "gone"} | changes


@pytest.fixture
def checkpoint(here):
    """Writes last.pt with a configuration into a folder; returns its path."""

    def make(folder="run", **changes):
        path = here / folder / "last.pt"
        path.parent.mkdir(exist_ok=True, parents=True)
        content = {"script": "script", "format": FORMAT, "config": saved(**changes), "step": 0}
        content |= {"history": {}, "losses": []}
        torch.save(content | {"facts": {"shape": [1, 8, 8], "class_names": []}}, path)
        return str(path)

    return make


def test_a_run_goes_on_as_it_was_made(checkpoint):
    checkpoint(width=12, steps=50, rate=0.25, device="cuda", overwrite=True)
    config, found = read("--resume", "--out-dir", "run")
    assert found["config"]["width"] == config.width == 12 and config.out_dir == "run"
    assert (config.steps, config.epochs, config.rate) == (50, None, 0.25)
    assert config.device == "cpu" and config.resume and not config.overwrite
    config, _ = read("--resume", "--out-dir", "run", "--epochs", "9", "--width", "12")
    assert (config.steps, config.epochs) == (None, 9)


def test_a_resumed_run_is_in_the_folder_it_was_found_in(checkpoint):
    checkpoint("out/script", out_dir="elsewhere")
    assert read("--resume")[0].out_dir == "out/script"


def test_samples_go_into_a_folder_beside_the_checkpoint_or_where_it_is_said(checkpoint):
    path = checkpoint(width=12, resume=True, sample="old.pt")
    config, _ = read("--sample", path)
    assert config.out_dir == os.path.join(os.path.dirname(path), "sample")
    assert config.width == 12
    assert config.sample == path and not config.resume
    config, _ = read("--sample", path, "--out-dir", "new", "--seed", "5", "--sample-steps", "3")
    assert (config.out_dir, config.seed, config.sample_steps) == ("new", 5, 3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--resume --width 10", "--width 10: the checkpoint was made with 8; leave it out"),
        ("--resume --linear", "--linear True: the checkpoint was made with False"),
        ("--resume --levels 1 3", "--levels [1, 3]: the checkpoint was made with [1, 2]"),
        ("--resume --rate 0.6", "--rate 0.6: the checkpoint was made with 0.5"),
        ("--resume --preset full", "--preset full: the checkpoint was made with small"),
        ("--resume --seed 1", "--seed 1: the checkpoint was made with 0"),
        ("--resume --side 5", "--side 5: the checkpoint was made with 4"),
        ("--sample run/last.pt --kind b", "--kind b: the checkpoint was made with a"),
    ],
)
def test_what_a_checkpoint_fixes_exits_with_2(checkpoint, capsys, flags, message):
    checkpoint()
    argv = [*flags.split(), "--out-dir", "run"]
    assert message in exits_with(2, capsys, lambda: read(*argv))


@pytest.mark.parametrize(
    "flags",
    ["--resume --width 8 --seed 0 --rate 0.5 --data auto --preset auto", "--resume --steps 3"],
)
def test_saying_the_same_again_is_allowed(checkpoint, flags):
    checkpoint(data="shapes")
    config, _ = read(*flags.split(), "--out-dir", "run")
    assert (config.width, config.data, config.preset) == (8, "shapes", "small")


def test_no_checkpoint_is_an_error_for_the_user():
    with pytest.raises(UserError, match=r"out/script/last.pt: no such checkpoint"):
        read("--resume")
    with pytest.raises(UserError, match=r"gone.pt: no such checkpoint"):
        read("--sample", "gone.pt")


# -- a checkpoint's configuration ------------------------------------------------------------------


@SCRIPTS
def test_what_a_script_saves_can_be_used(script):
    config = dataclasses.asdict(make_config(script))
    check_saved(script.Config, {k: v for k, v in config.items() if k != "bfloat16"})


def test_missing_and_unknown_fields_are_named():
    values = saved()
    del values["width"]
    with pytest.raises(ValueError, match=r"^of another version: depth, width$"):
        check_saved(Config, values | {"depth": 3})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": "8"}, "width is '8'"),
        ({"width": 8.0}, "width is 8.0"),
        ({"width": None}, "width is None"),
        ({"width": [8]}, "width is [8]"),
        ({"width": 0}, "width must lie in [1, 10000000], got 0"),
        ({"levels": 3}, "levels is 3"),
        ({"levels": [1, "2"]}, "levels is [1, '2']"),
        ({"levels": [1, -2]}, "levels must lie in [1, 10000000], got -2"),
        ({"kind": "c"}, "kind is 'c'"),
        ({"kind": 1}, "kind is 1"),
        ({"linear": "yes"}, "linear is 'yes'"),
        ({"linear": 1}, "linear is 1"),
        ({"rate": 2.0}, "rate must lie in (0, 1], got 2.0"),
        ({"rate": "0.5"}, "rate is '0.5'"),
        ({"rate": float("nan")}, "rate must lie in (0, 1], got nan"),
        ({"data": 7}, "data is 7"),
        ({"steps": None}, "steps and epochs are None"),
        ({"sweep": [0.5, None]}, "sweep is [0.5, None]"),
    ],
)
def test_what_no_flag_could_have_given_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        check_saved(Config, saved(**changes))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 1},
        {"steps": None, "epochs": 3},
        {"sweep": [0, 2.5]},
        {"levels": []},
        {"data_dir": "else"},
    ],
)
def test_what_flags_could_have_given_is_taken(changes):
    check_saved(Config, saved(**changes))


def test_a_damaged_configuration_is_an_error_for_the_user(checkpoint):
    path = checkpoint(width="wide")
    cure = r"last.pt: its configuration cannot be used \(width is 'wide'\)$"
    with pytest.raises(UserError, match=cure):
        read("--sample", path)


def test_the_size_of_images_is_that_of_the_data(checkpoint):
    @dataclass
    class Sized(Config):
        image_size: int = flag(16, "side in pixels")

    with pytest.raises(UserError, match=r"\(image_size is not 8\)$"):
        read_checkpoint(Sized, Path(checkpoint()), "script")


def test_a_checkpoint_from_before_a_free_flag_takes_its_value(checkpoint, capsys):
    """sweep, sample_steps and log change nothing that is learnt; side and width do."""
    path = checkpoint(preset="full", width=12)
    content = torch.load(path, weights_only=True)
    for name in ("sweep", "sample_steps", "log"):
        del content["config"][name]
    torch.save(content, path)
    config, _ = read("--resume", "--out-dir", "run")
    assert (config.sweep, config.sample_steps, config.width) == ([0, 1], 20, 12)
    assert config.log == "none"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[1] == "warning: the checkpoint is from before --sample-steps, which is 20 now"
    del content["config"]["side"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"\(of another version: side\)"):
        read("--resume", "--out-dir", "run")
