"""--log: figures and pictures of a run also for TensorBoard, Weights & Biases or Trackio.

Rows of history.json with the learning rate and images a second, metrics.json, every picture. The
packages are optional, imported only if asked for, and need no network: wandb is offline unless
WANDB_MODE says otherwise. A resumed run goes on in the same log.
"""

import importlib
import json
import os
import re
import secrets
import time
from dataclasses import asdict

from fused_ddpm.files import UserError

import numpy as np
from PIL import Image

# A module and what in it opens a log: a mere folder that is called wandb can be imported, too.
OPENERS = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter"),
    "wandb": ("wandb", "init"),
    "trackio": ("trackio", "init"),
}


class Tracker:
    """Of one kind, a key of OPENERS or "none". Mute until one process calls start."""

    def __init__(self, kind):
        """UserError where the package is not there."""
        self.kind, self.log, self.last = kind, None, None
        if kind != "none":
            try:
                self.module = importlib.import_module(OPENERS[kind][0])
                self.open = getattr(self.module, OPENERS[kind][1])
            except (ImportError, AttributeError) as error:
                raise UserError(f"--log {kind}: {error}; pip install {kind}") from error

    def start(self, run):
        """Open the run's log, or go on with it; UserError where the package cannot."""
        try:
            if self.kind == "tensorboard":  # purge: what a killed run did after its last save
                step = run.state["step"]
                self.log = self.open(run.dir / "tensorboard", purge_step=step + 1 if step else None)
            elif self.kind != "none":
                self.log = self._open_by_name(run, run.dir / "log.json")
        except Exception as error:  # no login, no permission, a damaged file, ...
            raise UserError(f"--log {self.kind}: {error}") from error

    def _open_by_name(self, run, path):
        name = {"name": f"{run.script}-{secrets.token_hex(4)}"}
        if run.config.resume and path.exists():
            name = json.loads(path.read_text())
        run.write(path.name, name)
        if self.kind == "wandb":
            name |= {"id": name["name"], "dir": run.dir, "settings": {"console": "off"}}
            name |= {"mode": os.environ.get("WANDB_MODE", "offline")}
        project = os.environ.get(f"{self.kind.upper()}_PROJECT", "fused-ddpm")
        return self.open(project=project, config=asdict(run.config), resume="allow", **name)

    def report(self, run, row):
        """A row of the history."""
        if self.log:
            last, self.last = self.last, (row["steps"], time.monotonic())
            row = row | {"lr": run.parts["optimizer"].param_groups[0]["lr"]}
            if last:
                steps, seconds = (now - then for now, then in zip(self.last, last, strict=True))
                row["images_per_second"] = steps * run.images_a_step / seconds
            self.figures(row.pop("steps"), row)

    def file(self, path, content, step):
        """What the run has written to path, if it is a picture or metrics.json."""
        if self.log and path.name == "metrics.json":
            self.figures(step, flat(content, "metrics"))
        elif self.log and path.suffix == ".png":
            name = f"pictures/{re.sub('_[0-9]+$', '', path.stem)}"
            image = Image.open(path).convert("RGB")
            if self.kind == "tensorboard":
                self.log.add_image(name, np.asarray(image), step, dataformats="HWC")
            else:
                self.log.log({name: self.module.Image(image)}, step=step)

    def figures(self, step, values):
        """{name: number} at a step."""
        if self.log and self.kind == "tensorboard":
            for name, value in values.items():
                self.log.add_scalar(name, value, step)
        elif self.log:
            self.log.log(values, step=step)

    def close(self):
        if self.log:
            self.log.close() if self.kind == "tensorboard" else self.log.finish()


def flat(content, name):
    """{"name/key/...": number} of nested dicts; what is no number is left out."""
    if not isinstance(content, dict):
        return {name: content} if isinstance(content, int | float) else {}
    parts = [flat(item, f"{name}/{key}") for key, item in content.items()]
    return {key: value for part in parts for key, value in part.items()}
