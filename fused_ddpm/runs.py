"""A run: it has a folder and a configuration, starts, is saved, stops and goes on.

    with Run(Config, argv) as run:          # reads the command line, opens the device
        for step in run.steps():            # those still to do
            ...
            run.log(loss, norm)
            if run.saves(step):
                run.save(step)

Over one process or many (torchrun). It calls nothing of the script's. What goes wrong by the user's
doing ends in one line: of the command line with exit status 2, of all else with 1.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from fused_ddpm.checkpoints import FORMAT, load_parts
from fused_ddpm.config import read_command_line
from fused_ddpm.devices import open_device, round_weights
from fused_ddpm.files import UserError, in_one_line, occupy, write
from fused_ddpm.images import DataError
from fused_ddpm.ops import status
from fused_ddpm.processes import Log, rank, sum_over, world
from fused_ddpm.samples import Samples
from fused_ddpm.tracking import Tracker, flat

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm


def mix(*numbers):
    """One 63-bit seed from several whole numbers.

    torch's CPU generator heeds no more than 32 bits, so shifting them together won't do.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


WHOLE = {"small": 4000, "full": 10_000}  # images of a whole set, at most: 20 s on two cores


class Run:
    """What a script asks of the machine: see above, and the methods in their order of use."""

    def __init__(self, Config, argv=None, tf32=True):
        """Config: a dataclass, see config.py. tf32: whether a GPU may round matrix products."""
        module = sys.modules[Config.__module__]
        self.script, self.tf32 = Path(module.__file__).stem, tf32
        self.signals, self.training, self.stopping = [], False, False
        self.losses, self.epoch, self.bar, self.files = [], -1, None, []
        self.folder, self.old = None, set()  # what holds dir; what an older run left there
        self.final = {}  # what history.json has beside the history
        self.state = {"step": 0, "history": {}, "losses": [], "facts": None}
        try:
            about = module.__doc__.split("\n")[0]
            with contextlib.redirect_stderr(Log(sys.stderr)):
                self.config, found = read_command_line(Config, self.script, about, argv)
                self.tracker = Tracker(self.config.log)
        except (Exception, KeyboardInterrupt) as error:
            self._end(error)
            raise
        self.checkpoint = found
        if found:
            self.state = {key: found[key] for key in self.state}

    def __enter__(self):
        self.streams = sys.stdout, sys.stderr
        self.handlers = {s: signal.signal(s, self._signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            sys.stdout, sys.stderr = map(Log, self.streams)
            self._start()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _start(self):
        config, self.dir = self.config, Path(self.config.out_dir)
        several = dist.is_torchelastic_launched()
        if several and config.device == "cuda":  # one process a GPU, or several on a CPU
            config.device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = config.device
        config.bfloat16 = open_device(config.device, config.amp, self.tf32)
        if several:
            dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo")
            if config.batch_size % world():
                size = f"--batch-size {config.batch_size}"
                raise UserError(f"{size}: must be a multiple of the {world()} processes")

    def _signal(self, number, frame):
        """Ctrl-C and SIGTERM: training saves first, all else ends at once.

        So does training at a second one; not within a second, when torchrun passes on the first.
        """
        now = time.monotonic()
        if not self.training or (self.signals and now - self.signals[0] > 1):
            raise KeyboardInterrupt
        self.signals.append(now)

    def __exit__(self, kind, error, traceback):
        try:
            for samples, scratch in self.files if error is None else []:
                samples.discard() if scratch else samples.keep()
            if error is None and self.files and not (self.dir / "last.pt").exists():
                self.write("config.json", asdict(self.config))  # for evaluate.py: of what data
        except (OSError, UserError) as failed:
            error = failed
        if self.bar is not None:
            self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        sys.stdout, sys.stderr = self.streams
        self.tracker.close()
        if self.folder is not None:
            os.close(self.folder)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._end(error)

    def _end(self, error):
        """Exit, with one line of one process, if an error is by the user's doing."""
        line = in_one_line(error)
        line = f"error: {line}" if line else None
        if isinstance(error, KeyboardInterrupt):
            line = "interrupted"
        left = isinstance(error, RuntimeError) and "by peer" in str(error)  # by one that says why
        speaks = (self.leads or isinstance(error, DataError)) and not left
        if line or left:
            sys.exit(f"{self.script}.py: {line}" if speaks else 1)

    # -- before training ---------------------------------------------------------------------------

    @property
    def facts(self):
        """Of the data, {"shape": [C, H, W], "class_names": [...]}: a checkpoint's; else None."""
        return self.state["facts"]

    @property
    def leads(self):
        """Whether this is the first process, or the only one."""
        return rank() == 0

    @property
    def history(self):
        return self.state["history"]

    def introduce(self, model, data):
        """Print what is going to run on what."""
        config = self.config
        size, count = "x".join(map(str, data.shape)), ""
        if not config.sample:
            self.state["facts"] = data.check_same(self.facts)
            n = len(data.images)
            count = f"{n} images of "
            if config.steps is None:
                config.steps, config.epochs = config.epochs * max(n // config.batch_size, 1), None
            self.log_every = max(config.steps // 40, 1)
            self.sample_every = config.sample_every or max(config.steps // 5, 1)
        precision = " (bfloat16)" if config.bfloat16 else ""
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{self.script}.py: preset {config.preset}, data {data.name} ({count}{size}), "
              f"device {self.device}{precision}")  # fmt: skip
        print(f"extension: {status()}")
        print(f"{millions:.2f}M parameters, output in {self.dir}/")

    def restore(self, **parts):
        """Load each part, name=module or optimizer, from the checkpoint if the run has one."""
        self.parts = parts
        try:
            if self.checkpoint:
                load_parts(parts, self.checkpoint)
        except ValueError as error:
            fits = f"does not fit --data {self.config.data} or this version of the network"
            raise UserError(f"the checkpoint {fits}: {error}") from error
        if self.leads:
            self._take_folder()

    def _take_folder(self):
        """From here on the run writes; until now nothing on disk has changed."""
        self.folder, config = occupy(self.dir), self.config
        there = (self.dir / "last.pt").exists()
        if not self.checkpoint:
            if there and not config.overwrite:  # it was not, when this run began
                raise UserError(f"--out-dir {self.dir}: holds a run already")
            # Not to be taken for the new run's.
            for name in "gaussian.npz", "step_*.png", "tensorboard/*":
                self.old.update(self.dir.glob(name))
        if not config.sample and (self.checkpoint or not there):
            self._write_beside()
        self.tracker.start(self)

    def _write_beside(self):
        """What goes with last.pt; also what a kill right after last.pt has left undone."""
        self.write("config.json", asdict(self.config))
        self.write("history.json", self.history | self.final)
        while self.old:
            self.old.pop().unlink()

    def parallel(self, model):
        """The model as training calls it: over all processes, compiled with --compile."""
        network = model
        if world() > 1:  # buffers are the same everywhere, and large
            network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        return torch.compile(network) if self.config.compile else network

    def prepare(self, model):
        """Make a model ready for sampling, for good: nothing is trained or saved after that."""
        if self.config.bfloat16:
            round_weights(model)
        if self.config.compile:
            model.compile()

    # -- training ----------------------------------------------------------------------------------

    def steps(self):
        """The steps still to do; ends early, with the run saved, when told to stop."""
        first, total = self.state["step"], self.config.steps
        self.losses = list(torch.tensor(self.state["losses"], device=self.device))
        hidden = rank() > 0
        self.bar = tqdm(total=total, initial=first, unit="step", desc="training", disable=hidden)
        self.training = True
        for step in range(first, total):
            torch.manual_seed(mix(self.config.seed, step, rank()))  # for dropout
            yield step
            if self.stopping:
                go_on = f"--resume --out-dir {self.dir}"
                raise UserError(f"stopped; the run is saved, go on with {go_on}")
        self.training = False
        self.bar.close()
        if self.signals:  # after the last save
            raise KeyboardInterrupt

    def batch(self, step, n):
        """(index, keys), int64 (b,): this process's share of the step's images, of n.

        keys: one for each, to everything random about it. Also set: step_key (1,), the same for the
        whole batch; places (b,), where in the batch each stands, in [0, 1); epoch.
        """
        size = min(self.config.batch_size, n) // world() * world()
        epoch, place = divmod(step, n // size)
        if epoch != self.epoch:
            order = torch.Generator().manual_seed(mix(self.config.seed, epoch, 1))
            self.order = torch.randperm(n, generator=order).to(self.device)
            self.epoch, self.steps_an_epoch = epoch, n // size
        slots = torch.arange(size, device=self.device).chunk(world())[rank()]
        key = mix(self.config.seed, step) >> 1
        key = torch.full((1,), key, dtype=torch.int64, device=self.device)
        self.step_key, self.places, self.images_a_step = key, slots / size, size
        return self.order[place * size + slots], key + slots

    def log(self, loss, norm):
        """Keep a loss, on the device. A gradient that is not finite counts as such a loss."""
        self.losses.append(loss.detach() + 0 * norm)
        self.bar.update()

    def last(self, step):
        return step + 1 == self.config.steps

    def reports(self, step):
        return (step + 1) % self.log_every == 0 or self.last(step)

    def saves(self, step):
        if world() == 1:
            self.stopping = bool(self.signals)
        elif (step + 1) % 10 == 0:  # so that all processes stop at the same step
            told = torch.tensor(float(bool(self.signals)), device=self.device)
            self.stopping = sum_over(told).item() > 0
        return self.stopping or (step + 1) % self.config.save_every == 0 or self.last(step)

    def draws(self, step):
        return (step + 1) % self.sample_every == 0 and not self.last(step)

    def _mean_loss(self, step):
        """Over all processes and the losses kept; UserError if that is not finite."""
        mean = sum_over(torch.stack(self.losses)) / world()
        self.losses = list(mean)
        values = mean.tolist()
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            kept = "there is no checkpoint yet"
            if (self.dir / "last.pt").exists():
                kept = "the last good checkpoint is kept"
            cure = "Try a smaller --lr, or --amp off"
            raise UserError(f"the loss became {mean} by step {step + 1}; {kept}. {cure}")
        return mean

    def report(self, step, **measured):
        """A row of the history: the mean loss since the last one, and what the script measured."""
        row = {"steps": step + 1, "epochs": (step + 1) / self.steps_an_epoch}
        row |= {"train_loss": self._mean_loss(step)}
        row |= {name: float(value) for name, value in measured.items()}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        self.losses = []
        self.tracker.report(self, row)
        shown = {"loss": f"{row['train_loss']:.4f}", "val": f"{row.get('val_loss', math.nan):.4f}"}
        self.bar.set_postfix(shown, refresh=False)

    def save(self, step=None):
        """last.pt, in one move: what restore was given, configuration, history, and where to go on.

        Without a step, once more after the last one.
        """
        if step is not None:
            if self.losses:
                self._mean_loss(step)
            self.state |= {"step": step + 1, "losses": [loss.item() for loss in self.losses]}
        if self.leads:
            about = {"script": self.script, "format": FORMAT}
            config = {k: v for k, v in asdict(self.config).items() if k != "bfloat16"}
            states = {name: part.state_dict() for name, part in self.parts.items()}
            self.write("last.pt", about | {"config": config} | self.state | states)
            self._write_beside()

    def whole_sets(self, data):
        """All of the validation and test sets, or the first images: this process's batches."""
        self.sets = data.held_out.keys()
        most = min(data.most_held_out, WHOLE[self.config.preset])
        first = range(0, most, 128)[rank() :: world()]
        for i in tqdm(first, "whole sets", unit="batch", leave=False, disable=rank() > 0):
            yield data.held_out_batch(i, min(128, most - i))

    def finish(self, measured):
        """After training: the mean losses over whole_sets, as "final" in history.json, and printed.
        measured: (a batch of these, its {"val_loss": (), ...}), one after the other."""
        totals = defaultdict(lambda: torch.zeros(2, device=self.device))
        for batch, losses in measured:
            for name, loss in losses.items():
                n = len(batch[name.removesuffix("_loss")][1])
                totals[name] += torch.stack([n * loss, torch.full_like(loss, n)])
        final, shown = {"images": {}}, []
        for name in (f"{name}_loss" for name in self.sets):
            loss, n = sum_over(totals[name]).tolist()
            if n:
                final[name], final["images"][name.removesuffix("_loss")] = loss / n, int(n)
                shown.append(f"{name} {loss / n:.4f} ({n:.0f} images)")
        self.final = {"final": final}
        self.write("history.json", self.history | self.final)
        self.tracker.figures(self.bar.n, flat(final, "final"))
        print(f"over whole sets: {', '.join(shown)}")

    # -- sampling ----------------------------------------------------------------------------------

    def seeds(self, index):
        """Seeds of samples, int64 like index (B,); index below 2^32."""
        return (self.config.seed << 32) + index

    def samples(self, n, shape, dtype=torch.uint8, file=None, depends_on=(), scratch=False):
        """Where n samples of a shape (C, H, W) are gathered: see Samples.

        file: a name in dir; scratch: that it is not wanted any more once the run has ended well.
        """
        path = self.dir / file if file else None
        samples = Samples(self.config, n, shape, dtype, path, depends_on)
        if file:
            self.files.append((samples, scratch))
        return samples

    def write(self, name, content):
        """A file in dir, of the kind its ending says, by the first process, in one move."""
        if self.leads:
            write(self.dir / name, content)
            self.old.discard(self.dir / name)
            done = self.state["step"] if self.bar is None else self.bar.n
            self.tracker.file(self.dir / name, content, done)
