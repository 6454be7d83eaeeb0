"""The scripts repeat each other on purpose, so that each reads alone. This holds the copies together.

ddpm.py is the master copy: a top-level name that stands in it and in another script has the same text in both, comments
included, or is listed here with the reason. toy_diffusion.py stands apart: it is the page before, and shares nothing.
"""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["ddpm.py", "sparse_ddpm.py", "cfg_ddpm.py"]

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


def different(master, copy):
    """{name: unified diff} of the names that stand in both with different text."""
    a, b = top_level(master), top_level(copy)
    shared = [name for name in a if name in b and a[name] != b[name]]
    return {name: "\n".join(difflib.unified_diff(a[name], b[name], "ddpm.py", "copy", lineterm="")) for name in shared}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_copies_are_the_same_text(script):
    found = different((ROOT / "ddpm.py").read_text(), (ROOT / script).read_text())
    strangers = {name: text for name, text in found.items() if name not in DIVERGES[script]}
    assert not strangers, f"{script} differs from ddpm.py:\n\n" + "\n\n".join(strangers.values())
    assert DIVERGES[script].keys() <= found.keys(), "listed in DIVERGES, but the same by now"
    assert all(DIVERGES[script].values())
