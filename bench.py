"""How fast, and how good, against what one would otherwise run.

    python bench.py                                # all of it: two hours on two CPU cores
    python bench.py --only ops peers               # or some of its parts, see below
    python bench.py --only fill --checkpoint out/sparse_ddpm/last.pt
    python bench.py --json results.json            # also as JSON, with the machine's name
    python bench.py --device cuda --preset full

Ops: medians of many runs against the same lines in eager PyTorch and under torch.compile. PyTorch
draws its noise with torch.randn_like, the fused step inside the kernel. The floor is the bytes that
must move at the bandwidth of a large copy.

Scripts: each runs as a user would run it, in a process of its own, with a clock in its training
loop and its sampler: medians a step, the peak memory of the whole process (of the device, on a
GPU), the share of a sampling step and of all of sampling (with the linear guess and putting back
what was seen) spent outside the network, that is predict, and the floor of a sampling step: its
FLOPs at the rate of a large matrix product. Growth: the same of ddpm.py, with more images, larger
ones, more channels. Startup: from nothing to the help, and to the first training step.

Peers (denoising-diffusion-pytorch, diffusers; pip install -e '.[peers]') get the same batch, image
size and precision, and the width that comes nearest in parameters. They and ddpm.py take turns, in
five rounds, so that a machine that slows down slows all of them.

Quality: the Fréchet distance (see evaluate.py) to Fashion-MNIST, or --data, after 1, 2, 5 and 10
minutes of training, of ddpm.py and the peers.

Fill: ways to fill in unseen pixels (pip install -e '.[fill]'), on the test images of sparse_ddpm.py
and under the same masks: how near they come, over the unseen pixels, and mean milliseconds an
image.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from fused_ddpm import graphs, images, masked_loss, metrics, norm_silu, posterior_step, status
from fused_ddpm.fill import LARGEST, GaussianFill, interpolate
from fused_ddpm.linear import linear_weights, linear_weights_reference
from fused_ddpm.masks import as_tested, held_out_keys, make_masks
from fused_ddpm.ops import norm_silu_reference

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

SHAPES = [(1, 3, 32, 32), (16, 1, 32, 32), (64, 3, 32, 32), (256, 3, 32, 32)]
SHAPES += [(64, 3, 64, 64), (16, 3, 256, 256)]
NORM_SHAPES = [(32, 16, 32, 32), (32, 64, 16, 16), (32, 96, 8, 8)]  # inside the small presets
GUESSES = [(32, 10, 10), (32, 20, 20), (32, 20, 30), (32, 5, 50)]  # images, % seen: from .. to
SCRIPTS = ["toy_diffusion", "ddpm", "sparse_ddpm", "cfg_ddpm", "sparse_ddo"]
PEERS = ["denoising_diffusion_pytorch", "diffusers"]
HERE = Path(__file__).parent
BATCH = {"small": 32, "full": 128}  # of the presets
ROUNDS = 5  # of what takes turns
MINUTES, NUM_QUALITY, PEER_LR = [1, 2, 5, 10], 512, 1e-3  # of quality


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
    table = torch.tensor([row], device=device)
    seeds = torch.arange(shape[0], device=device)
    pred = x.clone().requires_grad_()
    n, mask_bytes = x.numel(), 2 * score.numel()
    compiled_step = torch.compile(eager_step)
    compiled_loss = with_gradient(torch.compile(eager_loss))
    step_calls = (
        lambda: posterior_step(x, out, table, 0, seeds),
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
        ("masked_loss", *loss_calls, 12 * n + mask_bytes),
    ]


def norm_cases(shape, device):
    """The same of norm_silu and its gradients."""
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    B, C, groups = *shape[:2], math.gcd(8, shape[1])
    weight, bias, scale, shift = (torch.randn(n, device=device) for n in (C, C, (B, C), (B, C)))
    inputs = [t.requires_grad_() for t in (x, weight, bias, scale, shift)]
    compiled = torch.compile(norm_silu_reference)

    def call(op):
        y = op(x, weight, bias, groups, scale, shift)
        return torch.autograd.grad(y, inputs, x.detach())

    calls = [functools.partial(call, op) for op in (norm_silu, norm_silu_reference, compiled)]
    return [("norm_silu", *calls, 20 * x.numel())]


def guess_cases(shape, device):
    """The same of linear_weights, of 32x32 pixels; what LAPACK does is not to be compiled."""
    images, least, most = shape
    place = torch.cartesian_prod(*[torch.arange(32.0)] * 2)
    covariance = torch.exp(-torch.cdist(place, place) / 8) + 1e-4 * torch.eye(1024)
    percent = least * (most / least) ** torch.linspace(0, 1, images)[:, None]
    mask = torch.rand(images, 1024).argsort(1).argsort(1) < 1024 * percent / 100
    inputs = covariance, mask, torch.randn(images, 1, 1024) * mask[:, None]
    calls = [functools.partial(op, *inputs) for op in (linear_weights, linear_weights_reference)]
    moved = 4 * mask.sum(1).square().sum().item()  # the matrices, read once
    return [("linear_weights", *calls, None, moved)]


def bench_ops(args, job):
    """A dict for each op and shape: seconds of "fused", "eager", "compile", "floor"."""
    source = torch.empty(2**26, device=args.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), args.device)
    print(f"\nops, in microseconds; a large copy moves {bandwidth / 1e9:.1f} GB/s\n")
    rows = []
    shapes = [(cases, s) for s in SHAPES] + [(norm_cases, s) for s in NORM_SHAPES]
    shapes += [(guess_cases, s) for s in GUESSES if args.device == "cpu"]  # a CPU's kernel
    for make, shape in tqdm(shapes, unit="shape", leave=False):
        torch.compiler.reset()
        for op, fused, eager, compiled, moved in make(shape, args.device):
            calls = {"fused": fused, "eager": eager}
            calls |= {} if args.no_compile or not compiled else {"compile": compiled}
            times = {name: median_seconds(call, args.device) for name, call in calls.items()}
            rows.append({"op": op, "shape": shape, "floor": moved / bandwidth, **times})
    columns, ratios = ["fused", "eager", "compile", "floor"], ["eager", "compile"]
    heads = [f"{name:>9}" for name in columns] + [f"{name + '/fused':>15}" for name in ratios]
    print(f"{'op':16}{'shape':20}" + "".join(heads))
    for r in sorted(rows, key=lambda r: r["op"], reverse=True):
        cells = [f"{r[k] * 1e6:9.0f}" if k in r else f"{'-':>9}" for k in columns]
        cells += [f"{r[k] / r['fused']:14.1f}x" if k in r else f"{'-':>15}" for k in ratios]
        print(f"{r['op']:16}{r['shape']!s:20}" + "".join(cells))
    return rows


# --------------------------------------------------------------------------------------------------
# Whole programs. A job is a dict; each runs in a process of its own, which prints a row, also a
# dict, as JSON.


class Clock:
    """Wraps functions to note when they were called, with what, and how long it took."""

    def __init__(self, device):
        self.device, self.starts, self.seconds = device, {}, {}
        self.arguments = {}  # of the second call

    def watch(self, owner, name):
        function, now = getattr(owner, name), time.perf_counter
        starts, seconds = self.starts[name], self.seconds[name] = [], []
        on_gpu = self.device.startswith("cuda")

        def call(*args, **options):  # as little as can be beside the function: it counts as outside
            if on_gpu:
                synchronize(self.device)
            start = now()
            out = function(*args, **options)
            if on_gpu:
                synchronize(self.device)
            seconds.append(now() - start)
            starts.append(start)
            if len(starts) == 2:
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
    n = 4096 if device.startswith("cuda") else 2048
    a, b = (torch.randn(n, 4096, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**2 * 4096 / median_seconds(lambda: a @ b.T, device, budget=1)


def count_flops(call):
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know all fused attentions
    with FlopCounterMode(display=False) as counter, plain:
        call()
    return counter.get_total_flops()


def watch_sampler(script, clock):
    """Note seconds of whole samples and when each of their steps was done; the second time also
    (model, config, sample, its inputs). Of samples of a model that is ready for it, as in use; not
    those made while training."""
    make, prepare = script.make_sampler, script.Run.prepare
    clock.seconds["sample"], clock.starts["sample"], clock.steps = [], [], []

    def prepare_watched(run, model):
        prepare(run, model)
        for times in (clock.seconds["sample"], clock.starts["sample"], clock.steps):
            times.clear()

    script.Run.prepare = prepare_watched

    def make_watched(model, shape, config, *parts):
        sample = make(model, shape, config, *parts)

        def watched(*inputs):
            synchronize(clock.device)
            start = time.perf_counter()
            clock.steps.append([])
            for x_t in sample(*inputs):
                clock.steps[-1].append(time.perf_counter())
                yield x_t
            synchronize(clock.device)
            clock.starts["sample"].append(start)
            clock.seconds["sample"].append(time.perf_counter() - start)
            if len(clock.starts["sample"]) == 2:
                again = make(model, shape, config, *parts)
                clock.arguments["sample"] = model, config, again, inputs

        return watched

    script.make_sampler = make_watched


def outside(clock, spans):
    """The share of these times, from .. to, in which the network did not run; None without any."""
    calls = list(zip(clock.starts["predict"], clock.seconds["predict"], strict=True))
    network = sum(s for start, s in calls for a, b in spans if a <= start < b)
    return 1 - network / sum(b - a for a, b in spans) if spans else None


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
        flags += ["--compile"] if job["mode"] == "compile" else []
        script.held_out_losses = lambda *args: {}  # it calls training_loss, too
        watch_sampler(script, clock)
        if device == "cpu":
            clock.watch(script, "predict")
    clock.watch(script, "training_loss")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.main([*map(str, flags), "--out-dir", folder, "--overwrite"])

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
        if "predict" in clock.starts:
            whole = zip(clock.starts["sample"][1:3], seconds, strict=True)
            row["outside"] = outside(clock, [(start, start + s) for start, s in whole])
            # The first step has what comes before all steps, the last what comes after them.
            row["outside_step"] = outside(clock, [(s[0], s[-2]) for s in clock.steps[1:3] if s[2:]])
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
        some = contextlib.suppress(ValueError)  # they do not divide into groups
        with torch.device("meta"), some:
            sizes[width] = sum(p.numel() for p in make(width).parameters())
            if sizes[width] > 2 * parameters:
                break
    return make(min(sizes, key=lambda width: abs(sizes[width] - parameters)))


def make_peer(job, channels=3):
    """(network, loss(x), sample()) of another library, as its documentation shows.

    x and what sample returns: images (batch, channels, size, size) in [-1, 1].
    """
    device, batch, steps, size = job["device"], job["batch"], job["sample_steps"], job["size"]
    if device.startswith("cuda"):  # as the scripts do
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    mults = {"small": (1, 2, 4), "full": (1, 2, 2, 2)}[job["preset"]]
    if job["name"] == "denoising_diffusion_pytorch":
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        options = dict(dim_mults=mults, channels=channels, flash_attn=device != "cpu")
        net = nearest_width(lambda width: Unet(dim=width, **options), job["parameters"])
        # It has DDPM with all timesteps, and DDIM.
        few = None if job["sampler"] == "ddpm" else steps
        process = GaussianDiffusion(
            net, image_size=size, timesteps=steps if few is None else 1000, sampling_timesteps=few
        )
        process = process.to(device)
        sample = lambda: 2 * process.sample(batch_size=batch) - 1
        return net, lambda x: process(x / 2 + 0.5), sample

    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

    down = ["DownBlock2D"] + ["AttnDownBlock2D"] * (len(mults) - 1)
    up = [name.replace("Down", "Up") for name in reversed(down)]
    make = lambda width: UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=[m * width for m in mults],
        norm_num_groups=8,
        down_block_types=down,
        up_block_types=up,
    )
    net = nearest_width(make, job["parameters"]).to(device)
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[job["sampler"]]
    scheduler = kind(num_train_timesteps=1000)

    def loss_of(x):
        noise, t = torch.randn_like(x), torch.randint(1000, (batch,), device=device)
        return F.mse_loss(net(scheduler.add_noise(x, noise, t), t).sample, noise)

    def sample():
        scheduler.set_timesteps(steps)
        x = torch.randn(batch, channels, size, size, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
        return x

    return net, loss_of, sample


def peer_step(net, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


def run_peer(job):
    """Train and sample with another library: Adam, clipped gradients, no averaged weights."""
    device, batch, steps, size = job["device"], job["batch"], job["sample_steps"], job["size"]
    net, loss_of, sample = make_peer(job)
    optimizer, clock = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True), Clock(device)
    bf16 = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=job["bf16"])
    clock.watch(optimizer, "step")
    for _ in range(job["train_steps"]):
        x = torch.rand(batch, 3, size, size, device=device)
        with bf16:
            loss = loss_of(x)
        peer_step(net, optimizer, loss)
    seconds = []
    net.eval()
    with torch.no_grad(), bf16, contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        for _ in range(3):
            synchronize(device)
            start = time.perf_counter()
            sample()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # without bf16: plain
        flops = count_flops(sample) / steps  # attention does not take it from the library
    parameters = sum(p.numel() for p in net.parameters())
    row = {"batch": batch, "sample_batch": batch, "parameters": parameters, "flops": flops}
    return row | {"train": clock.between("step"), "sample": statistics.mean(seconds[1:]) / steps}


def run_quality(job):
    """How good the images are after so many minutes of training on real ones.

    "distances": evaluate.py's, by its classifier, of NUM_QUALITY images of DDIM; "seconds" of
    training. ddpm.py starts anew for each, as its learning rate falls over the steps asked for;
    a peer trains on, at a constant rate, and samples from averaged weights.
    """
    import evaluate
    from fused_ddpm import features, samples

    device, batch, name = job["device"], job["batch"], job["data"]
    parts = [images.load_images(name, "data", job["size"], train) for train in (True, False)]
    classes = len(images.class_names(name))
    classifier, _ = features.get_classifier("data", *parts, classes, device)
    see = lambda x: classifier.features(images.to_float(x))
    real = features.extract(see, parts[0][0][:10_000], device)
    row = {"distances": [], "seconds": []}

    def add(some, seconds):
        found = features.extract(see, some[:NUM_QUALITY], device)
        row["distances"].append(evaluate.frechet_distance(found, real))
        row["seconds"].append(seconds)

    if job["name"] == "ddpm":
        script, flags = importlib.import_module("ddpm"), ["--data", name, "--device", device]
        script.held_out_losses = lambda *args: {}  # the clock is for training
        flags += ["--preset", job["preset"], "--image-size", job["size"], "--sampler", "ddim"]
        flags += ["--sample-steps", job["sample_steps"], "--num-samples", NUM_QUALITY]
        for minutes in MINUTES:
            clock = Clock(device)
            loss = clock.watch(script, "training_loss")
            steps = ["--steps", int(60 * minutes / job["step"]), "--sample-every", 10**6]
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                script.main([*map(str, flags + steps), "--out-dir", folder])
                found = samples.read_samples(Path(folder, "samples.npy"))
            times, script.training_loss = clock.starts["training_loss"], loss
            add(found, times[-1] - times[0])
        return row

    torch.manual_seed(0)
    x_start, (net, loss_of, sample) = parts[0][0].to(device), make_peer(job, parts[0][0].shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=PEER_LR, fused=True)
    bf16 = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=job["bf16"])
    mean, trained, step = copy.deepcopy(net), 0, 0
    for minutes in MINUTES:
        net.train()
        while trained < 60 * minutes:
            start = time.perf_counter()
            x = images.to_float(x_start[torch.randint(len(x_start), (batch,), device=device)])
            with bf16:
                loss = loss_of(x)
            peer_step(net, optimizer, loss)
            step += 1
            keep = min(0.995, step / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_([*mean.parameters()], [*net.parameters()], 1 - keep)
            synchronize(device)
            trained += time.perf_counter() - start
        last = copy.deepcopy(net.state_dict())
        net.load_state_dict(mean.state_dict())
        net.eval()
        with torch.no_grad(), bf16, contextlib.redirect_stderr(io.StringIO()):
            found = [sample().float() for _ in range(-(-NUM_QUALITY // batch))]
        add(images.to_bytes(torch.cat(found)).cpu(), trained)
        net.load_state_dict(last)
    return row | {"steps": step}


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
    return [row for job in tqdm(jobs, title, leave=False, unit="run") if (row := run_job(job))]


def peak_memory(device):
    """Bytes: of the device, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


COLUMNS = {  # heading: (width, what stands there)
    "params M": (10, lambda r: f"{r['parameters'] / 1e6:.2f}"),
    "train ms": (10, lambda r: f"{r['train'] * 1e3:.1f}"),
    "images/s": (10, lambda r: f"{r['batch'] / r['train']:.1f}"),
    "sample ms": (11, lambda r: f"{r['sample'] * 1e3:.1f}"),
    "samples/s": (11, lambda r: f"{r['sample_batch'] / r['sample'] / r['sample_steps']:.2f}"),
    "floor ms": (10, lambda r: f"{r['floor'] * 1e3:.1f}" if "floor" in r else ""),
    "outside": (9, lambda r: f"{r['outside_step']:.2%}" if r.get("outside_step") else ""),
    "in all": (8, lambda r: f"{r['outside']:.2%}" if r.get("outside") else ""),
    "MiB": (7, lambda r: f"{r['memory'] / 2**20:.0f}"),
}


def print_table(title, rows):
    """The last columns: FLOPs at the rate of a matrix product; share of a step, and of all, outside
    the network; peak."""
    print(f"\n{title}\n\n{'':52}" + "".join(f"{head:>{COLUMNS[head][0]}}" for head in COLUMNS))
    for r in rows:
        what = f"{r['name']} {r['preset']} {r['sampler'] or ''} {r['mode']}"
        name = f"{what}, {r['batch']} of {r['size']}x{r['size']}"
        print(f"{name:52}" + "".join(f"{show(r):>{width}}" for width, show in COLUMNS.values()))


def bench_scripts(args, job):
    modes = ["eager"]
    modes += ["graph"] if args.device.startswith("cuda") else []
    modes += [] if args.no_compile else ["compile"]
    pairs = [(name, mode) for name in SCRIPTS for mode in modes]
    pairs = [pair for pair in pairs if pair[0] != "toy_diffusion" or pair[1] == "eager"]
    rows = run_jobs([job | {"name": name, "mode": mode} for name, mode in pairs], "scripts")
    print_table("the scripts (a guided step of cfg_ddpm.py is two; the toy samples 256)", rows)
    return rows


def peers_installed():
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    for name in missing:
        print(f"{name} is not installed, left out: pip install -e '.[peers]'")
    return [name for name in PEERS if name not in missing]


def bench_peers(args, job):
    """Each sampler with ddpm.py and with the peers, in turns: medians of the rounds.

    "rounds": the seconds of each; "ratios" of a peer: its figures over ours, round by round.
    """
    peers = peers_installed()
    job |= {"sample_steps": max(args.sample_steps // 2, 1)}  # short, as there are rounds
    rows = []
    for sampler in ("ddpm", "ddim"):
        job |= {"sampler": sampler, "mode": "eager"}
        mode = "graph" if args.device.startswith("cuda") else "eager"
        our_job = job | {"name": "ddpm", "mode": mode, "flags": ["--sampler", sampler]}
        rounds = {name: [] for name in ["ddpm", *PEERS]}  # of [ours, theirs]
        for n in range(ROUNDS):
            if not (ours := run_job(our_job)):
                continue
            job |= {"parameters": ours["parameters"], "bf16": ours["bf16"]}
            jobs = [job | {"name": name} for name in peers]
            for row in [ours, *run_jobs(jobs, f"peers, {sampler}, round {n + 1} of {ROUNDS}")]:
                rounds[row["name"]].append([ours, row])
        for name, pairs in rounds.items():
            if pairs:
                row = pairs[-1][1]
                times = {key: [their[key] for _, their in pairs] for key in ("train", "sample")}
                row |= {key: statistics.median(values) for key, values in times.items()}
                row["rounds"] = times
                if name != "ddpm":
                    keys = ("parameters", "flops", "train", "sample")
                    ratios = {key: [their[key] / our[key] for our, their in pairs] for key in keys}
                    row["ratios"] = ratios
                rows.append(row)
    print_table(f"ddpm.py and other libraries, medians of {ROUNDS} rounds", rows)
    for r in rows:
        shown = [f"{key} ms {spread(r['rounds'][key], 1e3)}" for key in r["rounds"]]
        shown += [f"{key} x {spread(values)}" for key, values in r.get("ratios", {}).items()]
        print(f"{r['name']} {r['sampler']}: {', '.join(shown)}")
    return rows


def spread(values, unit=1):
    """Median and range, as text."""
    middle, low, high = (unit * of(values) for of in (statistics.median, min, max))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def bench_growth(args, job):
    """ddpm.py with more images at once, larger images, more channels."""
    job |= {"name": "ddpm", "mode": "graph" if args.device.startswith("cuda") else "eager"}
    changes = [{"batch": batch} for batch in (1, 8, 32, 128, 512)]
    changes += [{"batch": 8, "size": size} for size in (32, 64, 128)]
    changes += [{"flags": ["--dim", dim]} for dim in (8, 16, 32, 64)]
    rows = run_jobs([job | change for change in changes], "growth")
    print_table("ddpm.py as batch, images and parameters grow", rows)
    return rows


def bench_quality(args, job):
    """ddpm.py and the peers after MINUTES of training."""
    name = images.choose_data(args.data, args.preset == "full")
    job |= {"sampler": "ddim", "mode": "eager"}
    if not (ours := run_job(job | {"name": "ddpm", "flags": ["--sampler", "ddim"]})):
        return []
    job |= {"kind": "quality", "data": name, "step": ours["train"], "bf16": ours["bf16"]}
    job |= {"parameters": ours["parameters"]}
    there = ["ddpm", *peers_installed()]
    rows = run_jobs([job | {"name": name} for name in there], "quality")
    print(f"\nFréchet distance of {NUM_QUALITY} images, {name}, by minutes of training\n")
    print(f"(ddpm.py anew for each; a peer trains on: Adam, lr {PEER_LR}, averaged weights)\n")
    for r in rows:
        figures = zip(MINUTES, r["seconds"], r["distances"], strict=True)
        shown = [f"{m} min ({s:.0f} s) {d:.2f}" for m, s, d in figures]
        print(f"{r['name']}: {', '.join(shown)}")
    return rows


FIRST_STEP = """
import os, {0} as script
script.training_loss = lambda *args: os._exit(0)
script.main(["--data", "shapes", "--device", "{1}", "--out-dir", "{2}"])
"""


def bench_startup(args, job):
    """Of each script, seconds from nothing to its help, and to its first training step."""
    rows = [{"name": name, "help": [], "first_step": []} for name in SCRIPTS]
    with tempfile.TemporaryDirectory() as folder:
        for row in tqdm(rows * ROUNDS, "startup", leave=False, unit="script"):
            code = FIRST_STEP.format(row["name"], args.device, folder)
            commands = {"help": [f"{row['name']}.py", "--help"], "first_step": ["-c", code]}
            for key, command in commands.items():
                start = time.perf_counter()
                command = [sys.executable, *command]
                subprocess.run(command, cwd=HERE, capture_output=True, check=True)
                row[key].append(time.perf_counter() - start)
    print(f"\nstart, in seconds: medians of {ROUNDS}\n")
    for r in rows:
        help, first = spread(r["help"]), spread(r["first_step"])
        print(f"{r['name']:16}--help {help:24}first training step {first}")
    return rows


# --------------------------------------------------------------------------------------------------
# Filling in. Ways of other libraries take an image (H, W, C), float64 in [0, 1], 0 where the mask
# `seen`, bool (H, W), is not set, and return it filled.


def griddata(image, seen):
    from scipy.interpolate import griddata

    at, wanted, filled = np.argwhere(seen), np.argwhere(~seen), image.copy()
    linear, nearest = (griddata(at, image[seen], wanted, how) for how in ("linear", "nearest"))
    filled[~seen] = np.where(np.isnan(linear), nearest, linear)  # outside of the convex hull
    return filled


def biharmonic(image, seen):
    from skimage.restoration import inpaint_biharmonic

    return inpaint_biharmonic(image, ~seen, channel_axis=-1)


def telea(image, seen):
    import cv2

    filled = cv2.inpaint(np.uint8(image * 255 + 0.5), np.uint8(~seen), 3, cv2.INPAINT_TELEA)
    return filled.reshape(image.shape) / 255


def kriging(image, seen, **options):
    from pykrige.ok import OrdinaryKriging

    at, wanted, filled = np.argwhere(seen) * 1.0, np.argwhere(~seen) * 1.0, image.copy()
    for channel in np.moveaxis(filled, 2, 0):  # views
        values = channel[seen]
        if np.ptp(values) == 0:  # it has no variogram
            channel[~seen] = values[0]
        else:
            fitted = OrdinaryKriging(*at.T, values, **options)
            channel[~seen] = fitted.execute("points", *wanted.T)[0]
    return filled


def total_variation(image, seen):
    from deepinv.optim import ADMM, L2, TVPrior
    from deepinv.physics import Inpainting

    y = torch.from_numpy(image).float().movedim(-1, 0)[None]
    physics = Inpainting(y.shape[1:], mask=torch.from_numpy(seen).float()[None])
    solver = ADMM(L2(), TVPrior(n_it_max=50), lambda_reg=0.003, stepsize=300.0, max_iter=50)
    return solver(y, physics)[0].movedim(0, -1).double().numpy()


no_nugget = functools.partial(kriging, variogram_parameters=[1.0, 0.0])  # slope, nugget
WAYS = {  # name: (package, way, of how many images at most, as some take long)
    "scipy griddata, linear": ("scipy", griddata, None),
    "skimage biharmonic": ("scikit-image", biharmonic, None),
    "OpenCV Telea": ("opencv-python-headless", telea, None),
    "pykrige kriging, default": ("pykrige", kriging, 32),  # fits a nugget, and smooths much
    "pykrige kriging, no nugget": ("pykrige", no_nugget, 32),
    "deepinv total variation": ("deepinv", total_variation, 32),
}


def fill_singly(way, truth, seen):
    """By a library's way, image by image as one calls it: like truth (N, C, H, W), in [0, 1]."""
    given = torch.where(seen, truth, 0).movedim(1, -1).double().numpy()
    pairs = zip(given, seen[:, 0].numpy(), strict=True)
    filled = torch.stack([torch.from_numpy(way(*pair)) for pair in pairs])
    filled = filled.movedim(-1, 1).clamp(0, 1).to(truth.dtype)
    return torch.where(seen, truth, filled)


def normal_crps(mean, std, truth, where):
    """CRPS of a normal distribution at each pixel (Gneiting et al. 2005), mean over `where`."""
    std = std.clamp(min=1e-6)
    z = (truth - mean) / std
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    score = std * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))
    return score[where.expand_as(truth)].mean().item()


@torch.no_grad()
def bench_fill(args, job):
    """A dict for each way: images, psnr, ssim, seconds an image, and crps where it has spread."""
    script, rows = importlib.import_module("sparse_ddpm"), []
    flags = ["--data", args.data, "--num-samples", args.num_images, "--device", args.device]
    flags += ["--sample", args.checkpoint] if args.checkpoint else ["--overwrite"]

    def timed(call):
        synchronize(args.device)
        start = time.perf_counter()
        out = call()
        synchronize(args.device)
        return out, time.perf_counter() - start

    def add(name, filled, seconds, **more):
        n = len(filled)
        three = filled, truth[:n], unseen[:n]
        near = {"psnr": metrics.psnr(*three), "ssim": metrics.ssim(*three)}
        rows.append({"name": name, "images": n, "seconds": seconds / n} | near | more)

    with script.Run(script.Config, [*map(str, flags)]) as run:  # it writes nothing
        config = replace(run.config, batch_size=32, num_draws=8)
        data = images.Data(config, run.facts)
        shown = data.test_part(args.num_images)
        x, index = images.to_float(shown.images), torch.arange(len(shown), device=config.device)
        keys = held_out_keys(index, config)
        mask, _ = make_masks(keys, 0, x.shape[-1], as_tested(config))
        truth, seen = images.to_unit(x).cpu(), mask.cpu()
        unseen = ~seen
        for name, (package, way, most) in tqdm(WAYS.items(), "fill", leave=False, unit="way"):
            try:
                fill_singly(way, truth[:1], seen[:1])  # imports it, too
            except ImportError:
                tqdm.write(f"{package} is not installed, left out: pip install -e '.[fill]'")
                continue
            add(name, *timed(lambda: fill_singly(way, truth[:most], seen[:most])))  # noqa: B023

        batches = [*zip(x.split(32), mask.split(32), strict=True)]
        share = seen.float().mean().item()
        filled, seconds = timed(lambda: [interpolate(*b, share) for b in batches])
        add("normalised convolution", images.to_unit(torch.cat(filled)).cpu(), seconds)
        if x[0].numel() <= LARGEST:
            gaussian = GaussianFill.fit(data.images)
            (mean, std), seconds = timed(lambda: gaussian.fill(x, mask))
            crps = normal_crps(mean.cpu() / 2 + 0.5, std.cpu() / 2, truth, unseen)
            add("Gaussian conditional mean", images.to_unit(mean).cpu(), seconds, crps=crps)
        if args.checkpoint:
            model = script.make_model(data.shape, config, len(data.class_names)).eval()
            run.restore(ema=model)
            run.prepare(model)
            draw = lambda config: script.reconstruct(run, model, shown, config)["draws"]
            once, seconds = timed(lambda: draw(replace(config, sample_steps=1, num_draws=1)))
            add("sparse_ddpm.py, one call", once[0], seconds)
            draws, seconds = timed(lambda: draw(config))
            add("sparse_ddpm.py, one draw", draws[0], seconds / 8)
            crps = metrics.crps(draws, truth, unseen)
            add("sparse_ddpm.py, mean of 8", draws.mean(0), seconds, crps=crps)
        else:
            print("sparse_ddpm.py is left out: train it, then --checkpoint out/sparse_ddpm/last.pt")
    print(f"\nfilling in {data.name}, {seen.float().mean():.0%} of the pixels seen: the others\n")
    print(f"{'':28}{'images':>8}{'PSNR dB':>10}{'SSIM':>8}{'CRPS':>9}{'ms':>10}")
    for r in rows:
        crps = f"{r['crps']:9.4f}" if "crps" in r else f"{'-':>9}"
        near = f"{r['images']:8}{r['psnr']:10.2f}{r['ssim']:8.3f}{crps}"
        print(f"{r['name']:28}{near}{r['seconds'] * 1e3:10.2f}")
    return rows


# --------------------------------------------------------------------------------------------------


def machine(device):
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        if (cpu := Path("/proc/cpuinfo")).exists():
            models = [line for line in cpu.read_text().splitlines() if line[:10] == "model name"]
            name = models[0].split(": ")[1] if models else name
    return f"{name}, {torch.get_num_threads()} CPU threads"


def main():
    parts = {"ops": bench_ops, "scripts": bench_scripts, "peers": bench_peers}
    parts |= {"growth": bench_growth, "startup": bench_startup, "quality": bench_quality}
    parts |= {"fill": bench_fill}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, names = parser.add_argument, list(parts)
    add("--only", nargs="+", choices=names, default=names, help="parts to run")
    add("--device", default="cpu")
    add("--preset", choices=list(BATCH), default="small", help="of the scripts")
    steps = "network calls for an image, timed and then divided by"
    add("--sample-steps", type=int, default=20, help=steps)
    add("--train-steps", type=int, default=14, help="steps to train")
    slow = "leave out torch.compile, which takes minutes to start"
    add("--no-compile", action="store_true", help=slow)
    add("--checkpoint", metavar="FILE", help="of sparse_ddpm.py, for fill")
    add("--data", default="auto", help="for quality and fill; auto: the default, the checkpoint's")
    add("--num-images", type=int, default=256, help="for fill")
    add("--json", metavar="FILE", help="write the results there too")
    add("--job", type=json.loads, help=argparse.SUPPRESS)  # of a process that main() starts
    args = parser.parse_args()
    if args.job:
        run = run_peer if args.job["name"] in PEERS else run_script
        row = (run_quality if args.job.get("kind") == "quality" else run)(args.job)
        print(json.dumps(row | {"memory": peak_memory(args.job["device"])}))
        return

    facts = {"machine": machine(args.device), "torch": torch.__version__}
    facts["date"] = str(datetime.date.today())
    facts |= {"cuda": torch.version.cuda} if args.device.startswith("cuda") else {}
    print(f"{facts['machine']}, torch {facts['torch']}, {facts['date']}\n{status()}")
    job = {"device": args.device, "preset": args.preset, "batch": BATCH[args.preset], "size": 32}
    job |= {"sampler": None, "flags": []}
    job |= {"sample_steps": args.sample_steps, "train_steps": args.train_steps}
    for part in args.only:
        facts[part] = parts[part](args, dict(job))
        if args.json:  # after each, as they take long
            Path(args.json).write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
