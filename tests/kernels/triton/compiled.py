"""Compile every kernel for an H200 that need not be there.

The host code runs on CPU tensors; Triton believes that the GPU is present, and each launch compiles
for it, down to the machine code, and runs nothing. One line per kernel and block shape: seconds of
compilation, shared memory, registers, and the local memory that registers spill to. The exit status
is 1 where a kernel needs more than the GPU has or spills much. With
`--quick`, a few dtypes and widths only. Needs Triton out of its interpreter:

    TRITON_INTERPRET=0 python -m tests.kernels.triton.compiled
"""

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from cosloss.criteria import CosineEmbedding, CrossEntropy, DecoupledCrossEntropy, SigmoidContrast
from cosloss.kernels.triton import cosine_similarity, in_batch, unit_rows
from cosloss.problem import Mask, PositiveMask, Problem

SHARED_LIMIT = 227 * 1024  # bytes that one program may have on an H200
SPILL_LIMIT = 256  # bytes per thread
ROWS = 8200  # a large batch
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

    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT and self.spilled <= SPILL_LIMIT

    def __str__(self) -> str:
        cores = "wgmma" if "wgmma" in self.ptx else "mma" if "mma.sync" in self.ptx else "no dot"
        return (
            f"{self.name:<28} {self.seconds:5.1f} s {self.shared / 1024:6.1f} KiB "
            f"{self.registers:4} registers {self.spilled:4} B spilled  {cores:<7}"
            f"{'' if self.fits() else 'TOO MUCH'} {self.config}"
        )


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
    kernels: list[object] = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **keywords):
        start = time.perf_counter()
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        shape = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_D", "ROWS", "COLUMNS", "num_warps", "WHOLE")
        config = {name: keywords[name] for name in shape if name in keywords}
        seconds = time.perf_counter() - start
        if not any(kernel is one for one in kernels):
            kernels.append(kernel)
            found.append(_described(kernel, str(config), seconds))

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


def compile_rows(dtype: torch.dtype, columns: int) -> None:
    x1, x2 = torch.zeros(2, 1000, columns, dtype=dtype)
    cosine_similarity.forward(x1, x2, 1e-8)
    cosine_similarity.distance_forward(x1, x2, 1e-8)
    cosine_similarity.backward(x1[:, 0], x1, x2, 1e-8, (True, True))


def compile_unit_rows(dtype: torch.dtype, columns: int) -> None:
    views = torch.zeros(2, 1000, columns, dtype=dtype).unbind()
    for scale in (3.0, torch.tensor(3.0)):
        _, norm, products = unit_rows.forward(views, scale, dtype)
        grads = torch.zeros(2, 1000, columns).unbind()
        unit_rows.backward(grads, products, views, norm, (True, True), scale)


def compile_engine(dtype: torch.dtype, columns: int, kind: str) -> None:
    """The engine as a criterion of this kind uses it."""
    r = c = torch.zeros(ROWS, columns, dtype=dtype)
    bias = None
    diagonals = Mask((0, ROWS // 2, -ROWS // 2))
    if kind == "exp":
        c, matrix = None, Problem(CrossEntropy(10.0), diagonals, True)
    elif kind == "hinge":
        c, matrix = None, Problem(CosineEmbedding(0.1, 3), diagonals, True)
    elif kind == "logsumexp":
        groups = torch.zeros(ROWS, dtype=torch.int64)
        pairs = Mask(groups=(groups, groups), classes=(groups, groups))
        positives = PositiveMask(groups, groups, torch.ones(ROWS))
        matrix = Problem(DecoupledCrossEntropy(), pairs, True, positives=positives)
    else:
        bias, matrix = torch.zeros(()), Problem(SigmoidContrast(), Mask((0,)), False)
    total = in_batch.forward(r, c, bias, matrix)
    needs = (True, c is not None, bias is not None)
    d_pos_logit = None if matrix.positives is None else total
    asked = {"needs": needs, "d_pos_logit": d_pos_logit}
    in_batch.backward(r, c, bias, matrix, d_stat=total, stat=total, **asked)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    dtypes = (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16, torch.float16)
    jobs: list[tuple[Callable[..., None], tuple]] = []
    for dtype in dtypes:
        for columns in (128,) if quick else (1, 128, 2048, 10000):
            jobs.append((compile_rows, (dtype, columns)))
            jobs.append((compile_unit_rows, (dtype, columns)))
        for columns in (128,) if quick else (64, 128, 256, 512, 1024):
            for kind in ("exp",) if quick else ("exp", "logsumexp", "softplus", "hinge"):
                jobs.append((compile_engine, (dtype, columns, kind)))
    bad = 0
    for job, arguments in jobs:
        with compiling() as found:
            job(*arguments)
        print(f"{job.__name__} {' '.join(map(str, arguments))}", flush=True)
        for one in found:
            bad += not one.fits()
            print(f"  {one}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
