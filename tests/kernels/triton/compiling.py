"""Compiling kernels for a card that need not be there, down to machine code, without running them.

The host code runs on CPU tensors; Triton believes that the card is present, and each launch
compiles for it, in every configuration where there are several. Needs Triton out of its
interpreter: TRITON_INTERPRET=0.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from cosloss.kernels.triton import card as cards
from cosloss.kernels.triton import tuning
from cosloss.kernels.triton.card import Card

# by NVIDIA's compute capability: A100; A10, RTX 30; L4, RTX 40; H100; B200; RTX 50
CARDS = {
    80: Card("sm_80", "mma", 163 * 1024, 108),
    86: Card("sm_86", "mma", 99 * 1024, 84),
    89: Card("sm_89", "mma", 99 * 1024, 128),
    90: Card("sm_90", "wgmma", 227 * 1024, 132),
    100: Card("sm_100", "tcgen05", 227 * 1024, 148),
    120: Card("sm_120", "mma", 99 * 1024, 170),
}
SHAPE = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_D", "ROWS", "COLUMNS", "WHOLE", "POLYNOMIAL")
PRODUCT = re.compile("HGMMA|HMMA|UTC.*MMA")
SELECT = re.compile("FSEL|FSETP|SEL|ISETP")
LOAD = re.compile(r"LDG\b")
EXPONENTIAL = re.compile(r"MUFU\.EX2")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Loop(NamedTuple):
    """A loop in machine code: its instructions, and how many of them compare, or wait for memory.

    selects: that compare or select. loads: of global memory, other than what is copied ahead.
    exponentials: of the special units.
    """

    instructions: int
    selects: int
    loads: int
    exponentials: int


class Launch(NamedTuple):
    """A kernel that was compiled: the launch's constants, and the seconds that it took."""

    kernel: Any
    constants: Mapping[str, Any]
    seconds: float

    @property
    def name(self) -> str:
        return self.kernel.metadata.name

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program takes."""
        return self.kernel.metadata.shared

    @property
    def cores(self) -> str:
        """What multiplies matrices, or that nothing does."""
        ptx = self.kernel.asm["ptx"]
        return next((name for name in ("wgmma", "tcgen05", "mma.sync") if name in ptx), "no dot")

    def usage(self) -> tuple[int, int]:
        """The registers of a thread, and the bytes of local memory that they spill to."""
        found = re.search(r"REG:(\d+) STACK:(\d+)", self._listing("cuobjdump", "-res-usage"))
        registers, spilled = map(int, found.groups())
        return registers, spilled

    def serialised(self) -> bool:
        """Whether ptxas has wgmmas wait for one another: C7510, a wait after each of them."""
        listing = self._listing("nvdisasm", "-c") if self.cores == "wgmma" else ""
        return 0 < listing.count("HGMMA") <= listing.count("WARPGROUP.DEPBAR")

    def main_loop(self) -> Loop | None:
        """The shortest of the innermost loops with matrix products; None without products."""
        code, labels, jumps = [], {}, []
        for line in self._listing("nvdisasm", "-c").splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)", line):
                code.append(instruction[1])
                target = re.search(r"`\((\.L_\w+)\)", line)
                if instruction[1].startswith("BRA") and target and target[1] in labels:
                    jumps.append((labels[target[1]], len(code)))

        def products(begin: int, end: int) -> bool:
            return any(PRODUCT.match(x) for x in code[begin:end])

        loops = [loop for loop in jumps if products(*loop)]
        inner = [
            (begin, end)
            for begin, end in loops
            if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
        ]
        found = (code[begin:end] for begin, end in inner)
        return min(
            (
                Loop(
                    len(x), *(sum(map(bool, map(y.match, x))) for y in (SELECT, LOAD, EXPONENTIAL))
                )
                for x in found
            ),
            default=None,
        )

    def shape(self) -> str:
        """The block's shape, warps and stages."""
        metadata = self.kernel.metadata
        block = " ".join(f"{k}={self.constants[k]}" for k in SHAPE if k in self.constants)
        return f"{block} warps={metadata.num_warps} stages={metadata.num_stages}"

    def _listing(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.kernel.asm["cubin"])
            command = [TOOLS / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _Driver:
    """What Triton asks of a GPU's driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a device's kernels are kept by its number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Launch]]:
    """Inside, a launch compiles its kernel for a card of CARDS into the list, once each."""
    found: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **constants):
        start = time.perf_counter()
        kernel = run(self, *arguments, grid=grid, warmup=True, **constants)
        if not any(kernel is launch.kernel for launch in found):
            found.append(Launch(kernel, constants, time.perf_counter() - start))

    with (
        patch.object(driver, "_active", _Driver(capability)),
        patch.object(JITFunction, "run", compile_only),
        patch.object(cards, "INTERPRETER", CARDS[capability]),
        patch.object(tuning, "_milliseconds", lambda call: call() or 0.0),
        patch.dict(tuning._chosen, clear=True),
    ):
        yield found
