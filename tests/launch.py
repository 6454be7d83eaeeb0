"""Run by torchrun in test_runs.py: scripts, by name, one after the other, on the tests' data set.

    torchrun tests/launch.py '{"ddpm": ["--steps", "6"], ...}'
"""

import functools
import importlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from fused_ddpm import images

images.SHAPES_COUNT = {True: 240, False: 40}
start = dist.init_process_group
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
place = dict(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))

for script, flags in json.loads(sys.argv[1]).items():
    importlib.import_module(script).main(flags)
    # The launcher's store still knows the processes under their old addresses: each further script
    # gets a corner of its own.
    store = dist.PrefixStore(script, dist.TCPStore(*address, is_master=False))
    dist.init_process_group = functools.partial(start, store=store, **place)
