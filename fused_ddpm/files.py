"""Files that are the old one or the new one, whole; checkpoints; and the one-line error."""

import json
import os
import zipfile

import numpy as np
import torch

FORMAT = 2  # of checkpoints


class UserError(Exception):
    """Something only the user can mend; shown as one line, without a traceback."""


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
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from error


def load_checkpoint(path, script):
    """A checkpoint of this script as a dict of tensors and plain types, on the CPU.

    The file's own checksums are verified first: torch.load does not look at them.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by, version = checkpoint["script"], checkpoint.get("format", 1)
    except UserError:
        raise
    except Exception as error:  # torch.load raises whatever the bytes made it stumble over
        name = type(error).__name__
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({name})") from error
    if written_by != script:
        raise UserError(f"{path}: a checkpoint of {written_by}.py, not of {script}.py")
    if version != FORMAT:
        raise UserError(f"{path}: of another version of {script}.py; train anew, or use that one")
    return checkpoint
