"""Ctrl-C while a script still imports, torch for a second or two, ends it in one line.

Imported before torch, as fused_ddpm is in the scripts. Once these run, they see to it themselves.
"""

import sys
from pathlib import Path


def _one_line(kind, error, trace, usual=sys.excepthook):
    if not issubclass(kind, KeyboardInterrupt):
        return usual(kind, error, trace)
    print(f"{_program.name}: interrupted", file=sys.stderr)


_program = Path(sys.argv[0] or "-").resolve()
if _program.suffix == ".py" and _program.parent == Path(__file__).resolve().parents[1]:
    sys.excepthook = _one_line  # one of the project's own; a library leaves it alone
