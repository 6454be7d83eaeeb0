"""One process or several: what torch.distributed is asked for, and what they print."""

import os

import torch.distributed as dist


def rank():
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0)) if dist.is_torchelastic_launched() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value):
    """What the first process holds, in every process; the others' value is ignored."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def sum_over(tensor):
    """The tensor, summed over the processes in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


class Log:
    """sys.stdout or sys.stderr, of the first process alone; nothing that befalls it ends a run.

    What its encoding lacks is spelt out. After a full disk or a closed pipe nothing more is shown.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if rank() == 0:
            try:
                self.stream.write(text)
                self.stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        """Done by write."""
