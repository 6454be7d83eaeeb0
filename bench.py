"""How fast, against what one would otherwise run: ops, whole scripts, other libraries.

    python bench.py                                # all of it: half an hour on two CPU cores
    python bench.py --only ops peers               # or a part: ops, scripts, peers, growth
    python bench.py --json results.json            # also as JSON, with the machine's name
    python bench.py --device cuda --preset full

Ops: medians of many runs against the same lines in eager PyTorch and under torch.compile. PyTorch
draws its noise with torch.randn_like, the fused step inside the kernel. The floor is the bytes that
must move at the bandwidth of a large copy.

Scripts: each runs as a user would run it, in a process of its own, with a clock in its training
loop and its sampler: medians a step, the peak memory of the whole process (of the device, on a
GPU), the share of sampling spent outside the network, and the floor of a sampling step: its FLOPs
at the rate of a large matrix product (loose for sparse_ddo.py, whose complex products count as real
ones). Peers (denoising-diffusion-pytorch, diffusers; pip install -e '.[peers]') get the same batch,
image size and precision, and the width that comes nearest in parameters.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.util
import io
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fused_ddpm import graphs, images, masked_loss, posterior_step, status

SHAPES = [
    (1, 3, 32, 32),
    (16, 1, 32, 32),
    (64, 3, 32, 32),
    (256, 3, 32, 32),
    (64, 3, 64, 64),
    (16, 3, 256, 256),
]
SCRIPTS = ["toy_diffusion", "ddpm", "sparse_ddpm", "cfg_ddpm", "sparse_ddo"]
PEERS = ["denoising_diffusion_pytorch", "diffusers"]
BATCH = {"small": 32, "full": 128}  # of the presets


# --------------------------------------------------------------------------------------------------
# Ops.


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def median_seconds(call, device, budget=0.5):
    """Median over as many runs as fit into the budget (seconds; 20 at least), after a warm-up."""

    def run():
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    for _ in range(5):
        run()
    times, end = [], time.perf_counter() + budget
    while len(times) < 20 or (time.perf_counter() < end and len(times) < 5000):
        times.append(run())
    return statistics.median(times)


def eager_step(x_t, out, k_x, k_o, a, b, s):
    x0_hat = (k_x * x_t + k_o * out).clamp(-1, 1)
    return a * x0_hat + b * x_t + s * torch.randn_like(x_t)


def eager_loss(pred, target, target_mask, cond_mask):
    w = (target_mask.float() + 0.05 * cond_mask.float()).clamp(max=1).expand_as(pred)
    return (w * (pred - target) ** 2).sum() / w.sum()


def with_gradient(loss):
    """Loss and its gradient for the network's output: of a training step what is not network."""
    return lambda pred, *rest: torch.autograd.grad(loss(pred, *rest), pred)


def cases(shape, device):
    """[(op, fused call, eager call, compiled call, bytes that must move)]."""
    x, out, target = (torch.randn(shape, device=device) for _ in range(3))
    score = torch.rand(shape[0], 1, *shape[2:], device=device)
    masks = score < 0.2, score > 0.8
    row = [1.7, -1.4, 0.31, 0.68, 0.11]
    table, step = (
        torch.tensor([row], device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    seeds = torch.arange(shape[0], device=device)
    pred = x.clone().requires_grad_()
    n, mask_bytes = x.numel(), 2 * score.numel()
    compiled_step, compiled_loss = (
        torch.compile(eager_step),
        with_gradient(torch.compile(eager_loss)),
    )
    step_calls = (
        lambda: posterior_step(x, out, table, step, seeds),
        lambda: eager_step(x, out, *row),
        lambda: compiled_step(x, out, *row),
    )
    loss_calls = (
        lambda: with_gradient(masked_loss)(pred, target, *masks),
        lambda: with_gradient(eager_loss)(pred, target, *masks),
        lambda: compiled_loss(pred, target, *masks),
    )
    return [
        ("posterior_step", *step_calls, 12 * n),
        ("masked_loss", *loss_calls, 20 * n + 2 * mask_bytes),
    ]


def bench_ops(args):
    """A dict for each op and shape: seconds of "fused", "eager", "compile", "floor"."""
    source = torch.empty(2**26, device=args.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), args.device)
    print(f"\nops, in microseconds; a large copy moves {bandwidth / 1e9:.1f} GB/s\n")
    rows = []
    for shape in tqdm(SHAPES, unit="shape", leave=False):
        torch.compiler.reset()
        for op, fused, eager, compiled, moved in cases(shape, args.device):
            times = {
                "fused": median_seconds(fused, args.device),
                "eager": median_seconds(eager, args.device),
            }
            times["compile"] = None if args.no_compile else median_seconds(compiled, args.device)
            rows.append({"op": op, "shape": shape, "floor": moved / bandwidth, **times})
    print(
        f"{'op':16}{'shape':20}{'fused':>9}{'eager':>9}{'compile':>9}{'floor':>9}"
        f"{'eager/fused':>13}{'compile/fused':>15}"
    )
    for r in sorted(rows, key=lambda r: r["op"], reverse=True):
        us = "".join(
            f"{r[k] * 1e6:9.0f}" if r[k] else f"{'-':>9}"
            for k in ("fused", "eager", "compile", "floor")
        )
        ratios = f"{r['eager'] / r['fused']:12.1f}x" + (
            f"{r['compile'] / r['fused']:14.1f}x" if r["compile"] else f"{'-':>15}"
        )
        print(f"{r['op']:16}{r['shape']!s:20}{us}{ratios}")
    return rows


# --------------------------------------------------------------------------------------------------
# Whole programs. A job is a dict; each runs in a process of its own, which prints a row, also a
# dict, as JSON.


class Clock:
    """Wraps functions to note when they were called, with what, and how long it took."""

    def __init__(self, device):
        self.device, self.starts, self.seconds, self.arguments = (
            device,
            {},
            {},
            {},
        )  # arguments: of the second call

    def watch(self, owner, name):
        function = getattr(owner, name)
        self.starts[name], self.seconds[name] = [], []

        def call(*args, **options):
            synchronize(self.device)
            self.starts[name].append(time.perf_counter())
            out = function(*args, **options)
            synchronize(self.device)
            self.seconds[name].append(time.perf_counter() - self.starts[name][-1])
            if len(self.starts[name]) == 2:
                self.arguments[name] = args
            return out

        setattr(owner, name, call)
        return function

    def between(self, name):
        """Median seconds from one call to the next, without the first three."""
        starts = self.starts[name][3:]
        return statistics.median(after - before for before, after in itertools.pairwise(starts))


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product."""
    a, b = (
        torch.randn(4096 if device.startswith("cuda") else 2048, 4096, device=device, dtype=dtype)
        for _ in range(2)
    )
    return 2 * len(a) ** 2 * 4096 / median_seconds(lambda: a @ b.T, device, budget=1)


def count_flops(call):
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # it does not know all fused attentions
        call()
    return counter.get_total_flops()


def watch_sampler(script, clock):
    """Note seconds of whole samples; the second time also (model, config, sample, its inputs)."""
    make = script.make_sampler
    clock.seconds["sample"], clock.starts["sample"] = [], []

    def make_watched(model, shape, config):
        sample = make(model, shape, config)

        def watched(*inputs):
            synchronize(clock.device)
            start = time.perf_counter()
            yield from sample(*inputs)
            synchronize(clock.device)
            clock.starts["sample"].append(start)
            clock.seconds["sample"].append(time.perf_counter() - start)
            if len(clock.starts["sample"]) == 2:
                clock.arguments["sample"] = model, config, make(model, shape, config), inputs

        return watched

    script.make_sampler = make_watched


def run_script(job):
    """Train and sample with one of the scripts, by its main()."""
    device, batch, steps = job["device"], job["batch"], job["sample_steps"]
    script, clock = importlib.import_module(job["name"]), Clock(device)
    toy = job["name"] == "toy_diffusion"
    sample_batch = 256 if toy else batch
    images.SHAPES_COUNT = {True: 4 * max(batch, 100), False: 4 * max(batch, 100)}
    if job["mode"] == "eager":
        graphs._captures = lambda device: False
    flags = ["--data", "shapes", "--image-size", job["size"], "--batch-size", batch]
    flags += ["--steps", job["train_steps"], "--sample-steps", steps, "--device", device]
    flags += ["--num-samples", 3 * sample_batch, *job["flags"]]
    if toy:
        clock.watch(script, "sample")
    else:
        flags += ["--preset", job["preset"], "--sample-every", 10**6, "--save-every", 10**6]
        flags += ["--num-draws", 1] if job["name"].startswith("sparse") else []
        flags += ["--compile"] if job["mode"] == "compile" else []
        script.held_out_losses = lambda *args: {}  # it calls training_loss, too
        watch_sampler(script, clock)
        if device == "cpu":
            clock.watch(script, "predict")
    clock.watch(script, "training_loss")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.main([*map(str, flags), "--out-dir", folder, "--overwrite"])

    second = clock.starts["sample"][1]
    seconds = clock.seconds["sample"][1:3]  # the first warms up, the fourth may be for a picture
    if toy:
        model, *_ = arguments = clock.arguments["sample"]
        bf16, call = False, lambda: script.sample(*arguments)
    else:
        model, config, sample, inputs = clock.arguments["sample"]
        bf16, call = config.bfloat16, lambda: list(sample(*inputs))
    parameters = sum(p.numel() for p in model.parameters())
    row = {"batch": batch, "parameters": parameters, "bf16": bf16, "sample_batch": sample_batch}
    row["train"] = clock.between("training_loss")
    row["sample"] = statistics.mean(seconds) / steps
    if job["mode"] != "compile":
        calls = zip(clock.starts.get("predict", []), clock.seconds.get("predict", []), strict=True)
        network = [s for start, s in calls if second <= start][: 2 * steps]
        row["outside"] = 1 - sum(network) / sum(seconds) if network else None
        graphs._captures = lambda device: False
        with torch.no_grad():
            row["flops"] = count_flops(call) / steps
        rate = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32)
        row["floor"] = row["flops"] / rate
    return row


def nearest_width(make, parameters):
    """make(width) for the width whose network comes nearest to so many parameters."""
    sizes = {}
    for width in range(8, 257, 4):
        with (
            torch.device("meta"),
            contextlib.suppress(ValueError),
        ):  # some widths do not divide into groups
            sizes[width] = sum(p.numel() for p in make(width).parameters())
            if sizes[width] > 2 * parameters:
                break
    return make(min(sizes, key=lambda width: abs(sizes[width] - parameters)))


def run_peer(job):
    """Train and sample with another library as its documentation shows.

    Adam, clipped gradients, no averaged weights.
    """
    device, batch, steps, size = job["device"], job["batch"], job["sample_steps"], job["size"]
    if device.startswith("cuda"):  # as the scripts do
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    mults = {"small": (1, 2, 4), "full": (1, 2, 2, 2)}[job["preset"]]
    if job["name"] == "denoising_diffusion_pytorch":
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        net = nearest_width(
            lambda width: Unet(dim=width, dim_mults=mults, flash_attn=device != "cpu"),
            job["parameters"],
        )
        # It has DDPM with all timesteps, and DDIM.
        few = None if job["sampler"] == "ddpm" else steps
        process = GaussianDiffusion(
            net, image_size=size, timesteps=steps if few is None else 1000, sampling_timesteps=few
        )
        process = process.to(device)
        loss_of, sample = process, lambda: process.sample(batch_size=batch)
    else:
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

        down = ["DownBlock2D"] + ["AttnDownBlock2D"] * (len(mults) - 1)
        up = [name.replace("Down", "Up") for name in reversed(down)]
        make = lambda width: UNet2DModel(
            sample_size=size,
            block_out_channels=[m * width for m in mults],
            norm_num_groups=8,
            down_block_types=down,
            up_block_types=up,
        )
        net = nearest_width(make, job["parameters"]).to(device)
        scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[job["sampler"]](
            num_train_timesteps=1000
        )

        def loss_of(x):
            noise, t = torch.randn_like(x), torch.randint(1000, (batch,), device=device)
            return F.mse_loss(net(scheduler.add_noise(x, noise, t), t).sample, noise)

        def sample():
            scheduler.set_timesteps(steps)
            x = torch.randn(batch, 3, size, size, device=device)
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t).sample, t, x).prev_sample
            return x

    optimizer, clock = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True), Clock(device)
    bf16 = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=job["bf16"])
    clock.watch(optimizer, "step")
    for _ in range(job["train_steps"]):
        x = torch.rand(batch, 3, size, size, device=device)
        with bf16:
            loss = loss_of(x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    seconds = []
    net.eval()
    with torch.no_grad(), bf16, contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            sample()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        flops = count_flops(sample) / steps
    row = {
        "batch": batch,
        "parameters": sum(p.numel() for p in net.parameters()),
        "bf16": job["bf16"],
        "flops": flops,
    }
    return row | {
        "train": clock.between("step"),
        "sample": statistics.mean(seconds[1:]) / steps,
        "sample_batch": batch,
    }


def run_job(job):
    """Job -> job and row in one dict, by a process of its own; None, and a line, if it fails."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        tqdm.write(f"{job['name']}, {job['mode']}: failed ({reason})")
        return None
    return job | json.loads(done.stdout.splitlines()[-1])


def run_jobs(jobs, title):
    """The rows of the jobs, without those that failed."""
    return [
        row
        for row in (run_job(job) for job in tqdm(jobs, desc=title, unit="run", leave=False))
        if row
    ]


def peak_memory(device):
    """Bytes: of the device, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


COLUMNS = {  # heading: (width, what stands there)
    "params M": (10, lambda r: f"{r['parameters'] / 1e6:.2f}"),
    "train ms": (10, lambda r: f"{r['train'] * 1e3:.1f}"),
    "images/s": (10, lambda r: f"{r['batch'] / r['train']:.1f}"),
    "sample ms": (11, lambda r: f"{r['sample'] * 1e3:.1f}"),
    "samples/s": (11, lambda r: f"{r['sample_batch'] / r['sample'] / r['sample_steps']:.2f}"),
    "floor ms": (10, lambda r: f"{r['floor'] * 1e3:.1f}" if "floor" in r else ""),
    "outside": (9, lambda r: f"{r['outside']:.2%}" if r.get("outside") is not None else ""),
    "MiB": (7, lambda r: f"{r['memory'] / 2**20:.0f}"),
}


def print_table(title, rows):
    """The last columns: FLOPs at the rate of a matrix product; share outside the network; peak."""
    print(f"\n{title}\n\n{'':52}" + "".join(f"{head:>{COLUMNS[head][0]}}" for head in COLUMNS))
    for r in rows:
        what = f"{r['name']} {r['preset']} {r['sampler'] or ''} {r['mode']}"
        name = f"{what}, {r['batch']} of {r['size']}x{r['size']}"
        print(f"{name:52}" + "".join(f"{show(r):>{width}}" for width, show in COLUMNS.values()))


def bench_scripts(args, job):
    modes = ["eager"]
    modes += ["graph"] if args.device.startswith("cuda") else []
    modes += [] if args.no_compile else ["compile"]
    jobs = [
        job | {"name": name, "mode": mode}
        for name in SCRIPTS
        for mode in modes
        if name != "toy_diffusion" or mode == "eager"
    ]
    rows = run_jobs(jobs, "scripts")
    print_table("the scripts (a guided step of cfg_ddpm.py is two; the toy samples 256)", rows)
    return rows


def bench_peers(args, job):
    """Each sampler with ddpm.py and with the peers; "ratios" of a peer: its time over ours."""
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    for name in missing:
        print(f"{name} is not installed, left out: pip install -e '.[peers]'")
    rows = []
    for sampler in ("ddpm", "ddim"):
        job = job | {
            "mode": "graph" if args.device.startswith("cuda") else "eager",
            "sampler": sampler,
        }
        ours = run_job(job | {"name": "ddpm", "flags": ["--sampler", sampler]})
        if ours is None:
            continue
        job = job | {"mode": "eager", "parameters": ours["parameters"], "bf16": ours["bf16"]}
        theirs = run_jobs(
            [job | {"name": name} for name in PEERS if name not in missing], f"peers, {sampler}"
        )
        for row in theirs:
            row["ratios"] = {
                key: row[key] / ours[key] for key in ("parameters", "flops", "train", "sample")
            }
        rows += [ours, *theirs]
    print_table("ddpm.py and other libraries", rows)
    for r in rows:
        if "ratios" in r:
            shown = ", ".join(f"{key} {ratio:.2f}" for key, ratio in r["ratios"].items())
            print(f"{r['name']} {r['sampler']}, times those of ddpm.py: {shown}")
    return rows


def bench_growth(args, job):
    """ddpm.py with more images at once, larger images, more channels."""
    job |= {"name": "ddpm", "mode": "graph" if args.device.startswith("cuda") else "eager"}
    changes = [{"batch": batch} for batch in (1, 8, 32, 128, 512)] + [
        {"batch": 8, "size": size} for size in (32, 64, 128)
    ]
    changes += [{"flags": ["--dim", dim]} for dim in (8, 16, 32, 64)]
    rows = run_jobs([job | change for change in changes], "growth")
    print_table("ddpm.py as batch, images and parameters grow", rows)
    return rows


# --------------------------------------------------------------------------------------------------


def machine(device):
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else platform.processor() or platform.machine()
    )
    if Path("/proc/cpuinfo").exists() and not device.startswith("cuda"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} CPU threads"


def main():
    parts = {
        "ops": bench_ops,
        "scripts": bench_scripts,
        "peers": bench_peers,
        "growth": bench_growth,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(parts), default=list(parts), help="parts to run"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=list(BATCH), default="small", help="of the scripts")
    parser.add_argument(
        "--sample-steps",
        type=int,
        default=20,
        help="network calls for an image, timed and then divided by",
    )
    parser.add_argument("--train-steps", type=int, default=14, help="steps to train")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, which takes minutes to start",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--job", type=json.loads, help=argparse.SUPPRESS
    )  # of a process that main() starts
    args = parser.parse_args()
    if args.job:
        row = (run_peer if args.job["name"] in PEERS else run_script)(args.job)
        print(json.dumps(row | {"memory": peak_memory(args.job["device"])}))
        return

    facts = {
        "machine": machine(args.device),
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
    }
    facts |= {"cuda": torch.version.cuda} if args.device.startswith("cuda") else {}
    print(f"{facts['machine']}, torch {facts['torch']}, {facts['date']}\n{status()}")
    job = {
        "device": args.device,
        "preset": args.preset,
        "batch": BATCH[args.preset],
        "size": 32,
        "sampler": None,
        "flags": [],
    }
    job |= {"sample_steps": args.sample_steps, "train_steps": args.train_steps}
    for part in args.only:
        facts[part] = parts[part](args) if part == "ops" else parts[part](args, dict(job))
        if args.json:  # after each, as they take long
            Path(args.json).write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
