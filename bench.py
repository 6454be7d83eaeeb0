"""The fused ops against the same lines in eager PyTorch and under torch.compile.

    python bench.py                       # a table
    python bench.py --json results.json   # and the same as JSON, with the machine's name
    python bench.py --device cuda

Medians of many runs, in microseconds. PyTorch draws its noise with torch.randn_like, the fused step inside the kernel. The
last column is the floor: the time to move the bytes that the op must read and write, at the bandwidth of a large copy.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch
from tqdm import tqdm

import fused_ddpm
from fused_ddpm import masked_loss, posterior_step

SHAPES = [(1, 3, 32, 32), (16, 1, 32, 32), (64, 3, 32, 32), (256, 3, 32, 32), (64, 3, 64, 64), (16, 3, 256, 256)]


def median_seconds(call, device, budget=0.5):
    """Median over as many runs as fit into the budget (in seconds, 20 at least), after a warm-up."""

    def run():
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(5):
        run()
    times, end = [], time.perf_counter() + budget
    while len(times) < 20 or (time.perf_counter() < end and len(times) < 5000):
        times.append(run())
    return sorted(times)[len(times) // 2]


def eager_step(x_t, out, k_x, k_o, a, b, s):
    x0_hat = (k_x * x_t + k_o * out).clamp(-1, 1)
    return a * x0_hat + b * x_t + s * torch.randn_like(x_t)


def eager_loss(pred, target, target_mask, cond_mask):
    w = (target_mask.float() + 0.05 * cond_mask.float()).clamp(max=1).expand_as(pred)
    return (w * (pred - target) ** 2).sum() / w.sum()


def with_gradient(loss):
    """Loss and its gradient for the network's output, the part of a training step that is not the network."""
    return lambda pred, *rest: torch.autograd.grad(loss(pred, *rest), pred)


def cases(shape, device):
    """[(op, fused call, eager call, compiled call, bytes that must move)]."""
    x, out, target = (torch.randn(shape, device=device) for _ in range(3))
    score = torch.rand(shape[0], 1, *shape[2:], device=device)
    masks = score < 0.2, score > 0.8
    row = [1.7, -1.4, 0.31, 0.68, 0.11]
    table, step = torch.tensor([row], device=device), torch.zeros((), dtype=torch.int64, device=device)
    seeds = torch.arange(shape[0], device=device)
    pred = x.clone().requires_grad_()
    n, mask_bytes = x.numel(), 2 * score.numel()
    compiled_step, compiled_loss = torch.compile(eager_step), with_gradient(torch.compile(eager_loss))
    return [
        ("posterior_step", lambda: posterior_step(x, out, table, step, seeds), lambda: eager_step(x, out, *row),
         lambda: compiled_step(x, out, *row), 12 * n),
        ("masked_loss", lambda: with_gradient(masked_loss)(pred, target, *masks),
         lambda: with_gradient(eager_loss)(pred, target, *masks), lambda: compiled_loss(pred, target, *masks),
         20 * n + 2 * mask_bytes),
    ]  # fmt: skip


def machine(device):
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists() and not device.startswith("cuda"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} CPU threads"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute to start")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    device = args.device

    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)
    print(f"{machine(device)}, torch {torch.__version__}, {datetime.date.today()}")
    print(f"{fused_ddpm.status()}; a large copy moves {bandwidth / 1e9:.1f} GB/s\n")

    rows = []
    for shape in tqdm(SHAPES, unit="shape", leave=False):
        torch.compiler.reset()
        for op, fused, eager, compiled, moved in cases(shape, device):
            times = {"fused": median_seconds(fused, device), "eager": median_seconds(eager, device)}
            times["compile"] = None if args.no_compile else median_seconds(compiled, device)
            rows.append({"op": op, "shape": shape, "floor": moved / bandwidth, **times})
    print(f"{'op':16}{'shape':20}{'fused':>9}{'eager':>9}{'compile':>9}{'floor':>9}{'eager/fused':>13}{'compile/fused':>15}")
    for r in sorted(rows, key=lambda r: r["op"], reverse=True):
        us = "".join(f"{r[k] * 1e6:9.0f}" if r[k] else f"{'-':>9}" for k in ("fused", "eager", "compile", "floor"))
        ratios = f"{r['eager'] / r['fused']:12.1f}x" + (f"{r['compile'] / r['fused']:14.1f}x" if r["compile"] else f"{'-':>15}")
        print(f"{r['op']:16}{r['shape']!s:20}{us}{ratios}")
    if args.json:
        facts = {"machine": machine(device), "torch": torch.__version__, "date": str(datetime.date.today()), "unit": "s"}
        if device.startswith("cuda"):
            facts["cuda"] = torch.version.cuda
        Path(args.json).write_text(json.dumps({**facts, "bandwidth": bandwidth, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
