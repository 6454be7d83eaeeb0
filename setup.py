"""Builds the extension in csrc/ against the torch that will run it. The rest is in pyproject.toml.

A failure to build is not a failure to install: the scripts then run in plain PyTorch, and the
reason, which pip hides, is recorded for `fused_ddpm.status()`. FUSED_DDPM_BUILD=1 in the
environment makes it an error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

NAME = "fused_ddpm._fused_ddpm"
REQUIRED = os.environ.get("FUSED_DDPM_BUILD") == "1"
DEPENDENCIES = ["torchvision", "numpy", "tqdm", "matplotlib"]
LINUX = sys.platform.startswith("linux")
CXX_FLAGS = (
    ["/O2", "/openmp"]
    if os.name == "nt"
    # Neither flag changes a result: they let sqrtf and rintf become instructions in vector loops.
    else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp" if LINUX else "-fopenmp-simd"]
)

try:
    import torch
except (ImportError, OSError):
    # pip builds in an environment of its own. The torch of the one it installs into is still within
    # reach, and building against any other would give a file that cannot be loaded there.
    sys.path += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    try:
        import torch
    except (ImportError, OSError):
        torch = None  # none there: ask pip for one, by setup_requires below


def find_cuda():
    """(CUDA_HOME, '') if nvcc can build for this torch, else ('', the reason)."""
    if not torch.version.cuda:
        return "", "torch is a CPU build"
    major = torch.version.cuda.split(".")[0]
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [nvcc and Path(nvcc).resolve().parent.parent]
    homes += ["/usr/local/cuda", f"/usr/local/cuda-{torch.version.cuda}", "/opt/cuda"]
    found = ""
    for home in filter(None, homes):  # nvcc on PATH may be a wrapper script far from the headers
        compiler = Path(home, "bin", "nvcc.exe" if os.name == "nt" else "nvcc")
        if not compiler.exists() or not Path(home, "include", "cuda_runtime.h").exists():
            continue
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release ([\d.]+)", answer)
        if version and version[1].split(".")[0] == major:
            return str(home), ""
        found = f"nvcc in {home} is of CUDA {version[1] if version else '?'}, torch needs {major}.x"
    return "", found or f"no CUDA {major} toolkit found (nvcc and cuda_runtime.h; set CUDA_HOME)"


def extensions(cuda_home):
    """[(extension, its backends)], the one to try first in front; all are the same module."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = [f"csrc/{name}_cpu.cpp" for name in ("ops", "norm", "linear")] + ["csrc/ops.cpp"]
    options = {"extra_link_args": ["-fopenmp"] if LINUX else []}
    cpu = CppExtension(NAME, sources, extra_compile_args={"cxx": CXX_FLAGS}, **options)
    if not cuda_home:
        return [(cpu, ["cpu"])]
    options["extra_compile_args"] = {"cxx": CXX_FLAGS, "nvcc": ["-O3"]}
    cuda = CUDAExtension(NAME, [*sources, "csrc/ops_cuda.cu", "csrc/norm_cuda.cu"], **options)
    return [(cuda, ["cpu", "cuda"]), (cpu, ["cpu"])]


def build_command(choices, no_cuda):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self):
            built, reason, start = [], no_cuda, (self.inplace, self.compiler)
            for extension, backends in choices:
                self.extensions = [extension]
                try:
                    super().run()
                    built = backends
                    break
                # torch raises RuntimeError, setuptools errors of its own
                except (Exception, SystemExit) as error:
                    if REQUIRED:
                        raise
                    problem = (str(error).strip() or type(error).__name__).splitlines()[0]
                    if os.name != "nt" and not shutil.which(os.environ.get("CXX", "c++")):
                        problem = "no C++ compiler found"
                    reason = f"building for {' and '.join(backends)} failed: {problem}"
                    print(f"fused_ddpm: {reason}", file=sys.stderr)
                    # run() leaves these changed when it fails
                    self.extensions, (self.inplace, self.compiler) = [], start
            path = Path(self.get_ext_fullpath(NAME)).with_name("_fused_ddpm_build.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not built:
                Path(self.get_ext_fullpath(NAME)).unlink(missing_ok=True)  # of an earlier build
            record = {"torch": torch.__version__, "backends": built, "reason": reason}
            path.write_text(json.dumps(record))

    return Build


if torch is None:  # with torchvision, which decides on the version of torch that will be installed
    required = ["torch>=2.4", *DEPENDENCIES]
    setup(setup_requires=["torch>=2.4", "torchvision"], install_requires=required)
else:
    # Without this pin pip would take the newest torchvision, and exchange torch for its own.
    pin = "torch==" + torch.__version__.split("+")[0]
    cuda_home, no_cuda = find_cuda()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # torch.utils.cpp_extension reads it when imported
        if not torch.cuda.is_available():  # none to ask: Ampere, Hopper, and PTX for later ones
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    choices = extensions(cuda_home)
    setup(
        ext_modules=[extension for extension, _ in choices],
        cmdclass={"build_ext": build_command(choices, no_cuda)},
        install_requires=[pin, *DEPENDENCIES],
    )
