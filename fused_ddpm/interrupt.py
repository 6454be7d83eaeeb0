"""Ctrl-C while a script still imports, torch for a second or two, ends it in one line.

Imported before torch, as fused_ddpm is in the scripts. Once these run, they see to it themselves.
"""

import os
import signal
import sys
import threading
from pathlib import Path

_program = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
# One of the project's own: as a library it leaves signals alone.
_ours = (
    _program.suffix == ".py"
    and _program.parent == Path(__file__).resolve().parents[1]
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    and threading.current_thread() is threading.main_thread()
)


def _end(number, frame):
    """At once, as there is nothing to lose: raised in an import, numpy's for one, it may vanish."""
    os.write(2, f"{_program.name}: interrupted\n".encode())
    os._exit(1)


def _in_one_line(kind, error, trace, usual=sys.excepthook):
    if not issubclass(kind, KeyboardInterrupt):
        return usual(kind, error, trace)
    print(f"{_program.name}: interrupted", file=sys.stderr)


def imported():
    """torch is there: from here on Ctrl-C raises KeyboardInterrupt again."""
    if _ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _ours:
    sys.excepthook = _in_one_line
    signal.signal(signal.SIGINT, _end)
