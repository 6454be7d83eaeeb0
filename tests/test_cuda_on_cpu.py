"""The CUDA kernels of csrc/ on a CPU: rewritten into C++, run by cuda_on_cpu/emulator.cpp, which
checks each access to memory, and held to the reference in cases.py."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
SOURCE, SOURCES = HERE.parent.parent / "csrc", ["block_sum.cuh", "ops_cuda.cu", "norm_cuda.cu"]
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no C++ compiler ({COMPILER})"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="the emulation is for Linux on x86-64",
    ),
]

# Accesses stay as they are written; as by nvcc, multiplications and additions are fused.
KERNEL_FLAGS = """-O1 -g1 -mfma -ffp-contract=fast -fsanitize=thread -fno-tree-sra -fno-tree-fre
-fno-tree-pre -fno-tree-forwprop -fno-tree-dominator-opts""".split()


def as_cpp(text):
    """A .cu file as C++ for emulator.h; its sizes may come from the environment."""
    text = re.sub(r"#include (<c10/cuda/\w+\.h>|\"\w+\.cuh\")|#pragma once", "", text)
    text = re.sub(
        r"(\w+<[^<>]*>|\w+)<<<(.*?)>>>\(\s*", r"emulator::Launch(\2)(\1, ", text, flags=re.S
    )
    text = re.sub(
        r"__shared__ ([^;]+) (\w+)\[([^\]]+)\];",
        r"alignas(16) static \1 \2[4096]; emulator::shared(\2, (\3) * sizeof *\2);",
        text,
    )
    text = re.sub(r"(?m)^constexpr (int\w* (THREADS|MAX_GRID_X) =)", r"static const \1", text)
    text = re.sub(r"(THREADS|MAX_GRID_[XY]) = (\d+)", r'\1 = emulator::setting("\1", \2)', text)
    return text.replace("IMPL(fused_ddpm, CUDA", "IMPL(fused_ddpm, CPU")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    work = tmp_path_factory.mktemp("cuda_on_cpu")
    schemas = re.search(r"^TORCH_LIBRARY\(.*?^}", (SOURCE / "ops.cpp").read_text(), re.S | re.M)
    kernels = "".join(as_cpp((SOURCE / name).read_text()) for name in SOURCES)
    kernels = f'#include "emulator.h"\n{kernels}'
    (work / "kernels.cpp").write_text(kernels + schemas[0])
    common = [COMPILER, "-std=c++20", "-fPIC", "-w", "-fvisibility=hidden", "-c"]
    common += [f"-I{path}" for path in (HERE, SOURCE, *include_paths())]
    sources = {work / "kernels.cpp": KERNEL_FLAGS, HERE / "emulator.cpp": ["-O2"]}
    objects = [work / f"{source.stem}.o" for source in sources]
    for (source, flags), object_ in zip(sources.items(), objects, strict=True):
        subprocess.run([*common, *flags, source, "-o", object_], check=True)
    paths = [f"-L{path}" for path in library_paths()]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    made = work / "cuda_on_cpu.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", made, *paths, *libraries], check=True)
    return made


@pytest.mark.parametrize(
    "sizes", [{}, {"THREADS": "32", "MAX_GRID_X": "2", "MAX_GRID_Y": "3"}], ids=["", "small_grid"]
)
def test_kernels_match_the_reference_and_touch_no_other_memory(library, sizes):
    # In a process of its own: the library takes over how storage is allocated.
    result = subprocess.run(
        [sys.executable, HERE / "cases.py", library],
        env=os.environ | sizes | {"FUSED_DDPM": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
