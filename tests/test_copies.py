"""The scripts repeat each other on purpose, so that each reads alone. This holds the copies together.

A top-level name that stands in two scripts has the same text in both, comments included, or is listed here with the reason.
The master copy is the one in the first script that has it, which for most is ddpm.py. toy_diffusion.py stands apart: it is the
page before, and shares nothing.
"""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["ddpm.py", "sparse_ddpm.py", "cfg_ddpm.py", "sparse_ddo.py"]

DIVERGES = {
    "sparse_ddpm.py": {
        "FREE_FLAGS": "its own sampling flags",
        "ONCE": "no --plots",
        "build_parser": "flags for the masks, presets of its own",
        "check_flags": "the two masks have to fit",
        "predict": "the network also sees the sparse image and its mask",
        "training_loss": "masked",
        "sample": "conditioned on the observed pixels",
        "held_out_loss": "with masks",
        "train": "draws masks, shows reconstructions",
        "run": "a network with three times the input channels; reconstructs test images",
    },
    "cfg_ddpm.py": {
        "FREE_FLAGS": "its own sampling flags",
        "ONCE": "no --plots",
        "HISTORY": "also the loss without the class",
        "check_flags": "a network that never saw a label, or never none, cannot be guided",
        "build_parser": "flags for classes and guidance",
        "Unet": "takes the class",
        "predict": "with the class",
        "training_loss": "with the class",
        "sample": "guided",
        "held_out_loss": "with the class",
        "train": "drops labels, shows a row for each class",
        "generate": "classes in turn",
        "run": "labels and their names; the sweep in place of the plots",
    },
    "sparse_ddo.py": {
        "MODEL_FLAGS": "of another network and another process",
        "FREE_FLAGS": "its own sampling flags",
        "ONCE": "no --plots",
        "build_parser": "flags for functions, masks and another network",
        "check_flags": "modes and masks have to fit",
        "get_config": "continuous time has no number of steps to be bounded by",
        "make_schedule": "continuous time, with a blur",
        "Unet": "spectral",
        "mask_counts": "of the training grid",
        "make_masks": "fixed for an image",
        "q_sample": "mode by mode",
        "predict": "sparse image and mask are arguments of their own",
        "training_loss": "of a function; on the whole image or the query",
        "sample": "mode by mode, on any grid",
        "held_out_loss": "continuous time, smooth noise",
        "train": "continuous time, smooth noise, fixed masks",
        "reconstruct": "draws on a grid of their own",
        "evaluate": "on query and unseen pixels, and on three grids",
        "run": "another network; the grid of the draws",
    },
}


def top_level(source):
    """{name: its source text}, with the comment lines directly above; all statements of a name that has several."""
    lines, parts = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name, first = ast.unparse(target), node.lineno
        else:
            continue
        while lines[first - 2].startswith("#") and not lines[first - 2].startswith("# ---"):
            first -= 1
        parts.setdefault(name, []).extend(lines[first - 1 : node.end_lineno])
    return parts


def different(script, sources):
    """{name: unified diff} of what stands in `script` otherwise than in the first of the scripts that has it."""
    parts = {name: top_level(source) for name, source in sources.items()}
    diffs = {}
    for name, lines in parts[script].items():
        master = next(other for other in sources if name in parts[other])
        if parts[master][name] != lines:
            diffs[name] = "\n".join(difflib.unified_diff(parts[master][name], lines, master, script, lineterm=""))
    return diffs


@pytest.fixture
def sources():
    return {script: (ROOT / script).read_text() for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_copies_are_the_same_text(script, sources):
    found = different(script, sources)
    strangers = {name: text for name, text in found.items() if name not in DIVERGES[script]}
    assert not strangers, "copies that differ:\n\n" + "\n\n".join(strangers.values())
    assert DIVERGES[script].keys() <= found.keys(), "listed in DIVERGES, but the same by now"
    assert all(DIVERGES[script].values())


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize(
    "name, text", [("write", "os.replace"), ("mix", "won't do"), ("TimeEmbedding", "10000"), ("stop_signals", "SIGTERM")]
)
def test_one_changed_character_is_found(script, name, text, sources):
    before = different(script, sources)
    assert text in sources[script] and name not in before
    sources[script] = sources[script].replace(text, text[:-1] + chr(ord(text[-1]) + 1))
    found = different(script, sources)
    assert found.keys() - before.keys() == {name} and "-" in found[name] and "+" in found[name]
