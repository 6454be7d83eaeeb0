"""One process or several: the few things that torch.distributed is asked for."""

import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


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
