"""Files that are the old one or the new one, whole; one process a folder; the one-line error."""

import contextlib
import json
import os
import sys

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None

import numpy as np
import torch


class UserError(Exception):
    """Something only the user can mend; shown as one line, without a traceback."""


def reason(error):
    """The first line of an error, or what it is called."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


NO_ROOM = "can't allocate memory", "not enough memory", "calculation overflowed"  # of torch


def in_one_line(error):
    """What there is to say of an error by the user's doing; None for one of the program's own."""
    if isinstance(error, UserError | OSError):
        return str(error)
    no_room = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if no_room or (isinstance(error, RuntimeError) and any(w in str(error) for w in NO_ROOM)):
        return "out of memory; a smaller --batch-size, --image-size or network needs less"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"--compile: {reason(error)}"
    return None


@contextlib.contextmanager
def ends_in_one_line(script, interrupted="interrupted"):
    """What goes wrong inside by the user's doing ends the script, with one line and status 1."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{script}.py: {interrupted}")
    except Exception as error:
        if (line := in_one_line(error)) is None:
            raise
        sys.exit(f"{script}.py: error: {line}")


def occupy(folder):
    """Make a folder ready for this process alone: what a killed one left half-written goes.

    Returns what holds it until it is closed by os.close or the process ends, however it ends; None
    where the system or a network disk knows no such lock. UserError if another process holds it.
    """
    held = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission")
        if fcntl:
            held = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(held)
                busy = "another process is at work in it; wait for its end, or write elsewhere"
                raise UserError(f"--out-dir {folder}: {busy}") from None
            except OSError:
                pass
        for stale in folder.glob(".*.tmp.*"):
            stale.unlink()
    except OSError as error:
        raise UserError(f"--out-dir {folder}: cannot be written ({error})") from error
    return held


@contextlib.contextmanager
def occupied(folder):
    """with occupied(folder): as occupy, until the end of it."""
    held = occupy(folder)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def write(path, content):
    """Write next to path, then move into place: path is the old file or the new one, whole.

    content: for .json what json takes, for .npy an array, for .npz a dict of arrays, for .pt what
    torch.save takes, for .png or .gif a matplotlib figure or frames; or what has a save(path), as a
    picture of PIL.
    """
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if hasattr(content, "save"):
            content.save(temporary)
        elif path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1))
        elif path.suffix == ".npy":
            np.save(temporary, content)
        elif path.suffix == ".npz":
            np.savez(temporary, **content)
        elif path.suffix == ".pt":
            torch.save(content, temporary)
        elif isinstance(content, list):  # frames of a film
            wait = [80] * (len(content) - 1) + [2000]  # milliseconds
            first, *rest = content
            first.save(temporary, save_all=True, append_images=rest, duration=wait, loop=0)
        else:
            content.savefig(temporary, dpi=110)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from error
