"""The places in memory of the rows of tensors of any strides, and how a kernel is launched on them.

Rows are numbered over up to three leading dimensions: row i is at (a, b, c) with
i = (a * sizes[1] + b) * sizes[2] + c, from which the strides give its offset.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

DIMENSIONS = 3
BLOCK = 2048  # elements of a program's block of each tensor, at least a row: 8 for each thread
LARGEST_WIDTH = 4096
WARPS = 8


def launch_rows(
    kernel: Any, matrices: Sequence[Tensor | None], vector: Tensor, **constants: Any
) -> None:
    """Run `kernel` on the rows of matrices (..., D) and the numbers of a vector (...).

    The kernel's parameters: the tensors; their strides, a matrix's last one along its rows; the
    numbers of rows and columns, the sizes; `constants`, and a block's shape.
    """
    columns = next(matrix for matrix in matrices if matrix is not None).shape[-1]
    rows = vector.numel()
    if rows == 0:
        return
    tensors = [*matrices, vector]
    sizes, strides = merged_dimensions(vector.shape, tensors)
    if len(sizes) > DIMENSIONS:
        for parts in zip(*([None] * len(vector) if x is None else x for x in tensors), strict=True):
            launch_rows(kernel, parts[:-1], parts[-1], **constants)
        return
    width = min(triton.next_power_of_2(max(columns, 1)), LARGEST_WIDTH)
    height = min(max(BLOCK // width, 1), triton.next_power_of_2(rows))
    with torch.cuda.device_of(vector):
        kernel[(triton.cdiv(rows, height),)](
            *tensors,
            *strides,
            rows,
            columns,
            sizes,
            **constants,
            WHOLE=columns <= width,
            ROWS=height,
            COLUMNS=width,
            NARROW=max(1, width // 8),
            num_warps=WARPS,
        )


def merged_dimensions(
    shape: Sequence[int], tensors: Sequence[Tensor | None]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes of three leading dimensions or more, and each tensor's strides.

    Neighbours are merged where every tensor steps evenly over both. A stride along a matrix's rows
    comes last.
    """
    given = [tensor.stride() for tensor in tensors if tensor is not None]
    sizes = [1]
    steps = [[0] for _ in given]
    for dimension, size in enumerate(shape):
        if size == 1:
            continue
        here = [strides[dimension] for strides in given]
        if sizes[-1] == 1 or all(s[-1] == h * size for s, h in zip(steps, here, strict=True)):
            sizes[-1] *= size
            for own, step in zip(steps, here, strict=True):
                own[-1] = step
        else:
            sizes.append(size)
            for own, step in zip(steps, here, strict=True):
                own.append(step)
    missing = max(0, DIMENSIONS - len(sizes))
    along_rows = (strides[len(shape) :] for strides in given)
    found = (((0,) * missing + (*own, *last)) for own, last in zip(steps, along_rows, strict=True))
    strides = [(0,) if tensor is None else next(found) for tensor in tensors]
    return (1,) * missing + tuple(sizes), strides
