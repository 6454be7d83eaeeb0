"""A dataclass is a command line: a field is a flag, with its value, its reason and its bounds.

    @dataclass
    class Training:
        lr: float = flag(2e-3, "peak learning rate of Adam", full=2e-4, within="(0, 1]")

A script's Config joins such classes. Fields of Model are fixed with a checkpoint; so are, for a run
that is resumed, those of Training; all others are free. `later` marks what differs from that.
"""

import argparse
import copy
import dataclasses
import inspect
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

from fused_ddpm.checkpoints import load_checkpoint
from fused_ddpm.files import UserError
from fused_ddpm.tracking import OPENERS

import torch

SAME = object()
ANY_COUNT = "[1, 10000000]"


def flag(default, help, choices=None, *, full=SAME, within=None, later=None):
    """A field that is a flag. `default` is its value under the preset small, `full` under full.

    within: bounds of a number, "(0, 1]" for 0 < x <= 1; of an int, by default from 1 to ten
    million. later: whether a resumed run may change it.
    """
    full = default if full is SAME else full
    metadata = dict(help=help, choices=choices, full=full, within=within, later=later)
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)


@dataclass
class RunConfig:  # where and how: the same for every script
    preset: str = flag("auto", "auto: full on a GPU", ["auto", "small", "full"], later=False)
    seed: int = flag(0, "of everything random", within="[0, 2147483647]", later=False)
    device: str = flag("auto", "cuda, cpu, ...; auto takes the GPU if there is one")
    amp: str = flag("auto", "bfloat16 where the hardware multiplies it", ["auto", "on", "off"])
    compile: bool = flag(False, "torch.compile the network: a slow start, then faster steps")
    data_dir: str = flag("data", "where downloaded data sets are kept")
    out_dir: str | None = flag(None, "out/<script>; with --sample, sample/ beside the checkpoint")
    save_every: int = flag(500, "steps between checkpoints")
    sample_every: int | None = flag(None, "steps between pictures; a fifth of the run")
    resume: bool = flag(False, "continue the run in out-dir")
    overwrite: bool = flag(False, "replace the run in out-dir")
    sample: str | None = flag(None, "CHECKPOINT: train nothing, only sample")
    log: str = flag("none", "curves and pictures also for", ["none", *OPENERS])

    bfloat16: bool = False  # what amp comes down to on this machine


ONCE = {"sample": None, "resume": False, "overwrite": False}  # what a checkpoint does not pass on


def flags_of(Config):
    """{name: (field, the class it stands in)} in the order of the classes."""
    found, known = {}, {f.name: f for f in dataclasses.fields(Config)}
    for part in reversed(Config.__mro__):
        for name in inspect.get_annotations(part):
            if known[name].metadata:
                found[name] = known[name], part.__name__
    return found


def kind_of(field):
    """(type of a value, whether there is a list of them, whether it may be None)."""
    kind, optional = field.type, type(None) in typing.get_args(field.type)
    if optional:
        kind = typing.get_args(kind)[0]
    many = typing.get_origin(kind) is list
    return typing.get_args(kind)[0] if many else kind, many, optional


def parser_of(field):
    """Text -> a value of the field; ArgumentTypeError or ValueError where it is none."""
    kind, _, _ = kind_of(field)
    within = field.metadata["within"] or (ANY_COUNT if kind is int else None)

    def parse(text):
        value = kind(text)
        if value == "":
            raise argparse.ArgumentTypeError("must not be empty")
        if within:
            low, high = map(float, within[1:-1].split(","))
            above = value > low or (within[0] == "[" and value == low)
            below = value < high or (within[-1] == "]" and value == high)
            if not (above and below):
                raise argparse.ArgumentTypeError(f"must lie in {within}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def make_parser(Config, script, about):
    """The parser; it leaves out what is not given."""
    parser = argparse.ArgumentParser(
        f"{script}.py", "%(prog)s [flags]", about, argument_default=argparse.SUPPRESS
    )
    groups = {}
    for name, (field, part) in flags_of(Config).items():
        title = part.removesuffix("Config").lower()
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, many, _ = kind_of(field)
        small, full = field.default_factory(), field.metadata["full"]
        value = f" ({small})" if small == full else f" (small {small}, full {full})"
        text = field.metadata["help"] + value * (small is not None or full is not None)
        options = {"type": parser_of(field), "nargs": "*" if many else None}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif field.metadata["choices"]:
            options = {"choices": field.metadata["choices"]}
        dashed = name.replace("_", "-")
        groups[title].add_argument(f"--{dashed}", help=text.replace("%", "%%"), **options)
    return parser


def preset_values(Config, preset):
    """{name: value} of every flag under a preset."""
    flags = flags_of(Config).items()
    if preset == "full":
        return {name: copy.copy(field.metadata["full"]) for name, (field, _) in flags}
    return {name: field.default_factory() for name, (field, _) in flags}


def fixed_flags(Config, sampling):
    """Names of the flags that a checkpoint fixes: for sampling those of Model, for a run more."""
    fixed = set()
    for name, (field, part) in flags_of(Config).items():
        later = field.metadata["later"]
        if later is None:
            later = part not in ("Model", "Training")
        if part == "Model" or not (sampling or later):
            fixed.add(name)
    return fixed


def complete(Config, saved):
    """A checkpoint's {name: value}, with the preset's for free flags that it is too old for.

    But not of Training: with any other value the run would not be the same.
    """
    flags, fixed = flags_of(Config).items(), fixed_flags(Config, sampling=False)
    free = {name for name, (_, part) in flags if part != "Training"} - fixed
    values = preset_values(Config, saved.get("preset"))
    for name in sorted(free - saved.keys()):
        given = f"is from before --{name.replace('_', '-')}, which is {values[name]} now"
        print(f"warning: the checkpoint {given}", file=sys.stderr)
    return {name: values[name] for name in free} | saved


def check_saved(Config, values):
    """Raise ValueError unless a checkpoint's {name: value} is what flags could have given."""
    flags = flags_of(Config)
    if values.keys() != flags.keys():
        names = ", ".join(sorted(values.keys() ^ flags.keys()))
        raise ValueError(f"of another version: {names}")
    if "steps" in values and values["steps"] is None and values["epochs"] is None:
        raise ValueError("steps and epochs are None")
    for name, (field, _) in flags.items():
        kind, many, optional = kind_of(field)
        value, choices = values[name], field.metadata["choices"]
        if value is None and optional:
            continue
        items = value if many and isinstance(value, list) else [value]
        for item in items:
            right = type(item) is kind or (kind is float and type(item) is int)
            if not right or isinstance(value, list) != many or (choices and item not in choices):
                raise ValueError(f"{name} is {value!r}")
            try:
                parser_of(field)(item)
            except (argparse.ArgumentTypeError, ValueError) as error:
                raise ValueError(f"{name} {error}") from error


def read_command_line(Config, script, about, argv=None):
    """(config, checkpoint or None). Flags that do not fit exit with status 2, files: UserError."""
    parser = make_parser(Config, script, about)
    given = vars(parser.parse_args(argv))
    if "steps" in given and "epochs" in given:
        parser.error("argument --epochs: not allowed with argument --steps")
    if "sample" in given and given.get("resume"):
        parser.error("argument --resume: not allowed with argument --sample")
    device = given.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "sample" in given or given.get("resume"):
        values, checkpoint = _continued(Config, script, given, parser)
        if given.get("data") == "auto":
            del given["data"]
    else:
        values, checkpoint = _started(Config, script, given, parser, device), None
    if "steps" in given or "epochs" in given:
        values |= {"steps": None, "epochs": None}
    fixed = {name: values[name] for name in ("preset", "out_dir")}
    config = Config(**values | given | fixed | {"device": device})
    for wrong, message in config.check():
        if wrong:
            parser.error(message)
    return config, checkpoint


def read_checkpoint(Config, path, script):
    """load_checkpoint, with a configuration that fits; else UserError."""
    checkpoint = load_checkpoint(path, script)
    checkpoint["config"] = complete(Config, checkpoint["config"])
    try:
        check_saved(Config, checkpoint["config"])
        side = checkpoint["facts"]["shape"][1]
        if checkpoint["config"].get("image_size", side) != side:
            raise ValueError(f"image_size is not {side}")
    except ValueError as error:
        raise UserError(f"{path}: its configuration cannot be used ({error})") from error
    return checkpoint


def _started(Config, script, given, parser, device):
    """The values of a new run's preset."""
    preset = given.get("preset", "auto")
    if preset == "auto":
        preset = "full" if device.startswith("cuda") else "small"
    folder = given.get("out_dir", f"out/{script}")
    if not given.get("overwrite") and Path(folder, "last.pt").exists():
        both = "--resume continues it, --overwrite replaces it"
        parser.error(f"--out-dir {folder}: holds a run already; {both}")
    values = preset_values(Config, preset) | {"preset": preset, "out_dir": folder}
    if "num_timesteps" in given:  # at most as many sampling steps as there are
        values["sample_steps"] = min(values["sample_steps"], given["num_timesteps"])
    return values


def _continued(Config, script, given, parser):
    """The values of a checkpoint, and itself; what it fixes cannot be given otherwise."""
    sampling, folder = "sample" in given, given.get("out_dir", f"out/{script}")
    path = Path(given["sample"]) if sampling else Path(folder, "last.pt")
    if sampling:
        folder = given.get("out_dir", str(path.parent / "sample"))  # a run's own results stay
    checkpoint = read_checkpoint(Config, path, script)
    saved = checkpoint["config"]
    for name in sorted(given.keys() & fixed_flags(Config, sampling)):
        if given[name] not in (saved[name], "auto"):
            dashed = name.replace("_", "-")
            parser.error(
                f"--{dashed} {given[name]}: the checkpoint was made with {saved[name]}; "
                "leave it out or start anew"
            )
    once = ONCE | {"log": "none"} if sampling else ONCE  # what is sampled is no part of its log
    return saved | once | {"out_dir": folder}, checkpoint
