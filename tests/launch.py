"""Run by torchrun in test_scripts.py: a script, by name, on the tests' small data set."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import images

images.SHAPES_COUNT = {True: 240, False: 40}
importlib.import_module(sys.argv[1]).main(sys.argv[2:])
