"""Compile every kernel for a GPU that need not be there: `python -m tests.kernels.triton.compiled`.

The host code runs on CPU tensors; Triton believes that an H200 is present, and each launch compiles
for it, down to the machine code, and runs nothing.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_LIMIT = 227 * 1024  # bytes that one program may have on an H200
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiled(NamedTuple):
    """One compiled launch: shared memory and local memory (spills) in bytes, registers a thread."""

    name: str
    config: str
    seconds: float
    shared: int
    registers: int
    spilled: int
    ptx: str


class _Hopper:
    """What Triton asks of a GPU's driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(call: Callable[[], object], quantiles: object) -> list[float]:
            call()
            return [1.0, 1.0, 1.0]

        return once


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Inside, a launch compiles its kernel, all its configurations when tuned, into the list."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **keywords):
        start = time.perf_counter()
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        config = {k: v for k, v in keywords.items() if k.isupper() or k.startswith("num_")}
        found.append(_described(kernel, str(config), time.perf_counter() - start))

    before, driver._active = driver._active, _Hopper()
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = before


def _described(kernel, config: str, seconds: float) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        listing = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", listing).groups())
    return Compiled(
        kernel.metadata.name,
        config,
        seconds,
        kernel.metadata.shared,
        registers,
        stack,
        kernel.asm["ptx"],
    )
