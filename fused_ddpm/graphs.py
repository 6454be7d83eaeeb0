"""`graphed`: on a GPU a step of a sampler, network and all, is one launch of a CUDA graph."""

import ctypes
import functools
import os
import warnings

from fused_ddpm.files import reason

import torch


def graphed(reverse_step):
    """Decorate x_prev = reverse_step(x_t, step, *inputs), step an int and the rest tensors.

    It changes the cost of a call and nothing else. On a GPU the first call with tensors of some
    shapes is captured as a CUDA graph, with `step` as a tensor (1,) on the device, and later ones
    replay it. For that reverse_step must neither read a value on the host nor depend on any tensor
    that is made anew between calls, save its arguments. Where it cannot be captured, a warning says
    why and the steps run one by one.
    """
    graphs = {}

    @functools.wraps(reverse_step)
    def call(x_t, step, *inputs):
        device = x_t.device
        if device.type == "cpu":
            _keep_freed_memory()
        if not _captures(device):
            return reverse_step(x_t, step, *inputs)
        tensors = x_t, *inputs
        key = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        if key not in graphs:
            try:
                graphs[key] = _Graph(reverse_step, tensors)
            except RuntimeError as error:
                warnings.warn(f"sampling without a CUDA graph: {reason(error)}", stacklevel=2)
                _failed_captures.append(error)
                return reverse_step(x_t, step, *inputs)
        return graphs[key](step, tensors)

    return call


_failed_captures = []  # after one no other is tried: CUDA's allocator may be left in the middle


def _captures(device):
    return device.type == "cuda" and not _failed_captures


class _Graph:
    """reverse_step on tensors of its own, which are refilled before each replay."""

    def __init__(self, reverse_step, tensors):
        self.reverse_step = reverse_step  # keeps alive what it refers to: a graph holds addresses
        self.tensors = [t.clone() for t in tensors]
        self.filled = [(None, 0) for _ in tensors]  # with what, and its version
        self.step = torch.zeros(1, dtype=torch.int64, device=tensors[0].device)
        self.replay = _capture(self.body, tensors[0].device)

    def body(self):
        x_t, *inputs = self.tensors
        self.out = self.reverse_step(x_t, self.step, *inputs)

    def __call__(self, step, tensors):
        for i, (own, given) in enumerate(zip(self.tensors, tensors, strict=True)):
            last, version = self.filled[i]
            if last is not given or version != given._version:  # else it is there already
                own.copy_(given)
                self.filled[i] = given, given._version
        self.step.fill_(step)
        self.replay()
        return self.out.clone()


def _capture(body, device):
    """body(), work on fixed CUDA tensors, as a CUDA graph: its replay."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose algorithms and workspaces, which a capture forbids
            body()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, NCCL's for one, may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            body()
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # which torch leaves at the one it captured on
        raise (error.__context__ or error) from None  # what went wrong, not that it did not end
    return graph.replay


@functools.cache
def _keep_freed_memory():
    """Have glibc keep freed memory: mapping it anew is a tenth of a small network's time."""
    options = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if options:
        # M_MMAP_THRESHOLD (some stop at 32 MB) and M_TRIM_THRESHOLD
        for option, size in (-3, 1 << 25), (-3, 1 << 30), (-1, 2**31 - 1):
            options(option, size)
