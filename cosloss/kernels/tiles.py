"""The tiles of a logit matrix X = R C^T, which of them are kept, and the memory for those.

Shapes: rows R (N, D), columns C (M, D); a tile is X[I, J] for two slices I and J.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cosloss.kernels.scratch import workspace

Tile = tuple[slice, slice]

LARGEST_SIDE = 1024  # two tiles of this size fit a CPU's last-level cache
BAND = 1 << 22  # elements of a band of tiles, which fits there too
BLOCK = 64  # rows that the compiled kernels take at once, at least
KEPT_BYTES = 256 * 2**20  # a larger logit matrix is computed again for its gradients


def tiles(rows: int, columns: int, device: torch.device) -> list[Tile]:
    """The tiles of a whole matrix, row blocks first."""
    side = _largest_side(device)
    return list(_rectangle(slice(0, rows), slice(0, columns), side, side))


def bands(rows: int, columns: int, device: torch.device, depth: int = 1) -> list[list[Tile]]:
    """The tiles of a whole matrix, those of the same rows together, in about BAND elements.

    depth: how many numbers a tile has at each place.
    """
    side = _largest_side(device)
    height = min(max(BAND // (depth * columns), side // 4), side)
    height = _divided(rows, height)
    blocks = (slice(start, min(start + height, rows)) for start in range(0, rows, height))
    return [list(_rectangle(i, slice(0, columns), height, side)) for i in blocks]


def triangle(rows: int, device: torch.device) -> list[Tile]:
    """The tiles of a symmetric matrix on and above its diagonal, halved towards the diagonal.

    Only the smallest tiles, on the diagonal, hold pairs twice.
    """
    side = _largest_side(device)

    def halves(block: slice) -> Iterator[Tile]:
        if block.stop - block.start <= side // 2:
            yield block, block
            return
        middle = (block.start + block.stop) // 2
        upper, lower = slice(block.start, middle), slice(middle, block.stop)
        yield from halves(upper)
        yield from _rectangle(upper, lower, side, side)
        yield from halves(lower)

    return list(halves(slice(0, rows)))


def kept_tiles(elements: int, like: Tensor) -> Tensor | None:
    """Memory for so many numbers of like's dtype; None where they are too many to be kept."""
    if elements * like.element_size() > KEPT_BYTES:
        workspace.release("tiles")
        return None
    return workspace.scratch("tiles", (elements,), like, largest=KEPT_BYTES)


def _rectangle(rows: slice, columns: slice, height: int, width: int) -> Iterator[Tile]:
    for i in range(rows.start, rows.stop, height):
        for j in range(columns.start, columns.stop, width):
            yield slice(i, min(i + height, rows.stop)), slice(j, min(j + width, columns.stop))


def _divided(rows: int, height: int) -> int:
    """The height of as many bands of alike height, of whole blocks where there are several."""
    count = -(-rows // height)
    return height if count == 1 else -(-rows // (count * BLOCK)) * BLOCK


def _largest_side(device: torch.device) -> int:
    # on an accelerator there is no such cache, and launches are the cost
    return LARGEST_SIDE if device.type == "cpu" else 4 * LARGEST_SIDE
