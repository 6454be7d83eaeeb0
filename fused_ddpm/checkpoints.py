"""A checkpoint proves itself: it is whole, of this script, and fits the network, or is refused.

That is found out before anything else happens. No pickled code runs, and nothing unpacks to more
than the file's own size.
"""

import math
import warnings
import zipfile

from fused_ddpm.files import UserError

import torch
import torch.nn as nn

FORMAT = 3  # of checkpoints


def tensors_of(content):
    """All tensors in nested dicts and lists."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from tensors_of(item)


def _look_through(checkpoint):
    """ValueError unless all that a run saves besides its configuration is there and fits."""
    kinds = {"config": dict, "step": int, "history": dict, "losses": list, "facts": dict}
    for name, kind in kinds.items():
        if type(checkpoint.get(name)) is not kind:
            raise ValueError(name)
    step, history, losses, facts = (checkpoint[name] for name in list(kinds)[1:])
    rows = {len(column) for column in history.values()}
    numbers = [x for column in history.values() for x in column] + losses
    reported = sum(history.get("steps", [])[-1:])  # the losses are those since then
    if len(rows) > 1 or reported + len(losses) != step or not all(map(math.isfinite, losses)):
        raise ValueError("history")
    if not all(type(x) in (int, float) for x in numbers):
        raise ValueError("history")
    sides = facts["shape"]
    if len(sides) != 3 or not all(type(n) is int and n > 0 for n in sides) or sides[1] != sides[2]:
        raise ValueError("shape")
    low, high = facts.get("scale") or (-1, 1)
    if not -math.inf < low < high < math.inf:
        raise ValueError("scale")
    if not all(type(name) is str for name in facts["class_names"]):
        raise ValueError("class_names")


def load_checkpoint(path, script, look_through=_look_through):
    """A checkpoint of this script as a dict of tensors and plain types, on the CPU.

    The file's own checksums are verified first: torch.load does not look at them. So is that it is
    no smaller than what it unpacks to, and that its content makes sense and has no NaN.
    look_through(checkpoint) raises where something else is wrong with it.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        with zipfile.ZipFile(path) as file:
            if sum(item.file_size for item in file.infolist()) > path.stat().st_size:
                raise ValueError("packed")  # torch.save does not, and it could unpack to anything
            if file.testzip():
                raise ValueError("checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by, version = checkpoint["script"], checkpoint.get("format", 1)
        if (written_by, version) == (script, FORMAT):
            look_through(checkpoint)
        for tensor in tensors_of(checkpoint):
            size, there = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
            if size > there or not tensor.isfinite().all():  # expanded, it could be of any size
                raise ValueError("a number that is not finite")
    except (UserError, PermissionError):
        raise
    except Exception as error:  # torch.load raises whatever the bytes made it stumble over
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({why})") from error
    if written_by != script:
        raise UserError(f"{path}: a checkpoint of {written_by}.py, not of {script}.py")
    if version != FORMAT:
        raise UserError(f"{path}: of another version of {script}.py; train anew, or use that one")
    return checkpoint


def load_parts(parts, saved):
    """Load {name: module or optimizer} from what is saved, all or none; ValueError, of one line,
    where that does not fit."""
    try:
        for name, part in parts.items():
            check_part(part, saved[name])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error).strip().splitlines()[-1].strip()) from error


def check_part(part, saved):
    """ValueError unless saved is what a module or an optimizer like this one would have saved."""
    if isinstance(part, nn.Module):
        mine = {name: [x] for name, x in part.state_dict().items()}
        there = {name: [x] for name, x in saved.items()}
    else:
        params = [p for group in part.param_groups for p in group["params"]]
        there = {i: [x for x in state.values() if x.dim()] for i, state in saved["state"].items()}
        mine = {i: [p] * len(there.get(i, ())) for i, p in enumerate(params)}
    if mine.keys() != there.keys():
        raise ValueError(f"{min(map(str, mine.keys() ^ there.keys()))} is missing, or too much")
    for name, tensors in mine.items():
        for x, y in zip(tensors, there[name], strict=True):
            if not isinstance(y, torch.Tensor) or (x.shape, x.dtype) != (y.shape, y.dtype):
                raise ValueError(f"{name} is not {x.dtype} of shape {tuple(x.shape)}")
