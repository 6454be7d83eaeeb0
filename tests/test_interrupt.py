"""Ctrl-C during the imports: one line. A torch that interrupts its own import stands for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import bench

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")
HERE = Path(__file__).resolve().parents[1]


def run(tmp_path, *arguments):
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    path = os.pathsep.join([str(tmp_path), str(HERE)])
    command = [sys.executable, *map(str, arguments)]
    heeded = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # also after nohup
    options = dict(env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    return subprocess.run(command, cwd=tmp_path, preexec_fn=heeded, **options)


OTHERS = "bench", "complete_images", "evaluate", "fill_images"


@pytest.mark.parametrize("script", [*bench.SCRIPTS, *OTHERS])
def test_one_line(tmp_path, script):
    done = run(tmp_path, HERE / f"{script}.py")
    assert (done.stdout, done.stderr) == ("", f"{script}.py: interrupted\n")
    assert done.returncode != 0


def test_other_programs_keep_their_traceback(tmp_path):
    (tmp_path / "other.py").write_text("import fused_ddpm")
    for arguments in (["-c", "import fused_ddpm"], ["other.py"]):
        done = run(tmp_path, *arguments)
        assert "Traceback" in done.stderr and "interrupted\n" not in done.stderr
