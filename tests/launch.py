"""Run by torchrun in test_sparse_ddpm.py: the script on the tests' small data set."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import images
import sparse_ddpm

images.SHAPES_COUNT = {True: 240, False: 40}
sparse_ddpm.main()
