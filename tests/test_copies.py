"""The scripts repeat their diffusion, so that each reads alone; the copies are the same text."""

import ast
from pathlib import Path

import pytest

OF_ALL = ["update_ema", "learning_rate"]
SCHEDULE = ["make_schedule", "x0_from_output", "reverse_mean_and_noise", "sampling_table"]
OF_DDPM = [*SCHEDULE, "q_sample", *OF_ALL]
COPIES = {"cfg_ddpm": OF_DDPM, "sparse_ddpm": OF_DDPM, "sparse_ddo": OF_ALL}


def source_of(script):
    return Path(__file__).parent.parent.joinpath(f"{script}.py").read_text()


def functions(source):
    """{name: its lines} of the functions of a module, decorators and comments included."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = lines[first - 1 : node.end_lineno]
    return found


def different(source, script):
    master, copy = functions(source_of("ddpm")), functions(source)
    return [name for name in COPIES[script] if copy[name] != master[name]]


@pytest.mark.parametrize("script", COPIES)
def test_copies_are_the_same_text(script):
    source = source_of(script)
    assert different(source, script) == []
    for old, new in ("step + 1) / 100", "step + 1) / 101"), ("less memory", "less memorx"):
        name = "learning_rate" if "100" in old else "update_ema"
        assert different(source.replace(old, new), script) == [name]  # one character is found
