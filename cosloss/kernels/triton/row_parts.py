"""Parts of rows in registers, in float64, and how kernels take rows and their scale."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a program's block of each tensor: 8 for each of its threads
WARPS = 8


def along_rows(x: Tensor) -> Tensor:
    """The same matrix with its rows one number after the other in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def scale_of(scale: float | Tensor, rows: Tensor) -> tuple[float, Tensor | None]:
    """A number as a kernel takes it: from the host, or where it lies on the rows' device."""
    if isinstance(scale, Tensor) and scale.device == rows.device:
        return 1.0, scale
    return float(scale), None


@triton.jit
def inverse_of(norm, scale):
    """scale / norm, and 0 of a zero row."""
    return tl.where(norm == 0, 0.0, scale / norm)


@triton.jit
def load_part(rows, start, inside, D, COLUMNS: tl.constexpr):
    """COLUMNS columns from `start` of the rows that begin at these pointers, in float64."""
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    values = tl.load(rows[:, None] + column[None, :], mask=mask, other=0)
    return values.to(tl.float32).to(tl.float64)


@triton.jit
def store_part(rows, start, values, inside, D, COLUMNS: tl.constexpr):
    """Write such columns."""
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(rows[:, None] + column[None, :], values.to(tl.float32), mask=mask)
