"""The statistics of a logit matrix and the gradients through it, by the compiled kernels.

Shapes and functions as in `cosloss.kernels.eager.in_batch`: rows R (N, D); columns C (M, D), or
None where they are the rows; statistics (N,) in float64, or (N + M,), rows first.
"""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cosloss.kernels import tiles
from cosloss.kernels.native import library
from cosloss.kernels.prefixes import Prefixes
from cosloss.kernels.schedule import Needs, TileLoop, functions_of
from cosloss.kernels.scratch import workspace
from cosloss.kernels.stats import Gradients, LossGrads
from cosloss.problem import ALL, Problem

KEEPS_TILES = True
SHARES_PREFIXES = True
REACHES_INPUTS = False

STATS = ("row_stats", "column_stats", "row_max", "column_max")


class NativeLoop(TileLoop):
    """The operands as the kernels take them; a thread takes a tile through all its work at once."""

    def __init__(
        self,
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        problem: Problem,
        needs: Needs,
        prefixes: Prefixes | None = None,
    ) -> None:
        super().__init__(r, c, problem, torch.float32, prefixes)
        self._segments = [ALL] if prefixes is None else [*prefixes.segments]
        self._prefixes = 0 if prefixes is None else len(prefixes.ends)
        # a CPU without products of bfloat16 multiplies the same numbers in float32
        narrow = r.dtype == torch.bfloat16 and library.has("in_batch_exp", r.dtype)
        self._product_dtype = torch.bfloat16 if narrow else torch.float32
        self.symmetric, self.length = c is None, r.shape[1]
        self.r = self._operand(r)
        self.c = self.r if c is None else self._operand(c)
        self.grad_r = torch.zeros_like(self.r, dtype=torch.float32) if needs[0] else None
        self.grad_c = None
        if c is not None and needs[1]:
            self.grad_c = torch.zeros_like(self.c, dtype=torch.float32)
        bias = None if bias is None else bias.float()
        self.grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
        # a rounded logit would be a relative error of its d_logit
        kind = problem.criterion.kind
        keeps_logits = kind == "logsumexp" or prefixes is not None
        self._stash = self.r.new_empty(
            0, dtype=torch.float32 if keeps_logits else self._product_dtype
        )
        self._kept: Tensor | None = None
        self._kernel = library.function(f"in_batch_{kind}", self._product_dtype)
        diagonals = problem.mask.diagonals
        self._params = library.in_batch_params()(  # fields that are not set are 0, or null
            m=self.c.shape[0],
            d=self.c.shape[1],
            symmetric=self.symmetric,
            diagonals=len(diagonals),
            margin=problem.criterion.margin,
            prefixes=self._prefixes,
            all_rows=r.shape[0],
        )
        self._held: dict[str, Any] = {}  # kept alive for the parameters
        self._point_to_numbers("offsets", diagonals)
        groups, classes = problem.mask.groups, problem.mask.classes
        if groups is not None:
            self._point_to_ids("row_groups", "column_groups", groups)
        if classes is not None:
            self._point_to_ids("row_classes", "column_classes", classes)
        limits = problem.mask.row_limits, problem.mask.column_limits
        row_limits, column_limits = (x if x is None else x.float().contiguous() for x in limits)
        self._point(row_limits=row_limits, column_limits=column_limits)
        self._point(rows=self.r, bias=bias)
        self.along_r: Tensor | None = None
        self.along_c: Tensor | None = None
        if prefixes is not None:
            self._point_to_prefixes(prefixes)

    def keep_tiles(self) -> None:
        self._kept = tiles.kept_tiles(self._elements(self.r.shape[0]), self._stash)

    def bands(self) -> Iterator[slice]:
        depth = max(self._prefixes, 1)
        every = tiles.bands(self.r.shape[0], self.c.shape[0], self.r.device, depth)
        rows = [band[0][0] for band in every]
        height = max(band.stop - band.start for band in rows)
        self._kept = workspace.scratch("band", (self._elements(height),), self._stash)
        yield from rows

    def run(
        self, rows: slice = ALL, *, accumulate: bool = False, grads: LossGrads | None = None
    ) -> None:
        start, stop, _ = rows.indices(self.r.shape[0])
        self._params.first_row, self._params.n = start, stop - start
        stats = self.stats
        tensors: dict[str, Tensor | None] = dict.fromkeys(STATS)
        if accumulate:
            tensors = {
                "row_stats": stats.rows,
                "column_stats": stats.columns,
                "row_max": stats.row_max,
                "column_max": stats.column_max,
            }
        if (accumulate or self._kept is None) and "packed_c" not in self._held:
            tensors["packed_c"] = _pack_columns(self.c)
        if grads is not None:
            grads = grads.contiguous()
            self._point_to_gradients(grads, rows)
        d_rows = None if grads is None else grads.d_rows
        self._point(kept=self._kept, d_rows=d_rows, **tensors)
        self._kernel(ctypes.byref(self._params))

    def gradients(self) -> Gradients:
        found = self._without_padding(self.grad_r), self._without_padding(self.grad_c)
        if self._prefixes:
            return *found, self.grad_bias, self.along_r, self.along_c
        return *found, self.grad_bias

    def _point_to_gradients(self, grads: LossGrads, rows: slice) -> None:
        """Give the kernel the gradient on these rows' statistics, and the sums to add to."""
        packed_r = self._held.get("packed_rows_of_c")
        if packed_r is None:
            packed_r = _pack_rows(self.c, "columns")
            sums = {"grad_r": self.grad_r, "grad_c": self.grad_c, "grad_bias": self.grad_bias}
            self._point(packed_rows_of_c=packed_r, **sums)
            self._point(along_rows=self.along_r, along_columns=self.along_c)
        if not self.symmetric:
            packed_r = _pack_rows(self.r[rows], "rows")
        self._point(packed_rows_of_r=packed_r, **grads._asdict())
        positives = self.problem.positives
        if positives is not None and grads.d_row_pos is not None:
            # ids of at most as many classes as rows
            row_class = positives.rows.int().contiguous()
            self._point(row_class=row_class, column_class=positives.columns.int().contiguous())

    def _point_to_ids(self, rows: str, columns: str, ids: tuple[Tensor, Tensor]) -> None:
        row_ids, column_ids = ids
        self._point(**{rows: row_ids.long().contiguous(), columns: column_ids.long().contiguous()})

    def _point_to_numbers(self, name: str, numbers: Sequence[int]) -> None:
        self._held[name] = array = (ctypes.c_int64 * len(numbers))(*numbers)
        setattr(self._params, name, ctypes.addressof(array))

    def _point_to_prefixes(self, prefixes: Prefixes) -> None:
        """Give the kernel the prefixes, and memory for the sums along their logits."""
        widths = [_padded(x.stop - x.start) for x in prefixes.segments]
        self._point_to_numbers("ends", [*itertools.accumulate(widths)])
        rows, columns = (
            x.float().contiguous() for x in (prefixes.row_links, prefixes.column_links)
        )
        self._point(row_links=rows, column_links=columns)
        self.along_r = torch.zeros_like(rows, dtype=torch.float64)
        self.along_c = self.along_r
        if not self.symmetric:
            self.along_c = torch.zeros_like(columns, dtype=torch.float64)

    def _point(self, **tensors: Tensor | None) -> None:
        """Give the kernel the addresses of contiguous tensors, held until the next ones."""
        for name, tensor in tensors.items():
            setattr(self._params, name, None if tensor is None else tensor.data_ptr())
        self._held |= tensors

    def _operand(self, x: Tensor) -> Tensor:
        """Rows in the products' dtype, each segment filled up with zeros to whole panels."""
        x = x.to(self._product_dtype)
        parts = [x[:, segment] for segment in self._segments]
        widths = [part.shape[1] for part in parts]
        if any(width != _padded(width) for width in widths):
            parts = [pad(part, (0, _padded(part.shape[1]) - part.shape[1])) for part in parts]
            return torch.cat(parts, 1)
        return x.contiguous()

    def _without_padding(self, grad: Tensor | None) -> Tensor | None:
        """The gradient on r or c from that on the operand."""
        if grad is None:
            return None
        widths = [len(range(*segment.indices(self.length))) for segment in self._segments]
        parts = grad.split([_padded(width) for width in widths], 1)
        parts = [part[:, :width] for part, width in zip(parts, widths, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _elements(self, rows: int) -> int:
        """The number of elements that these rows' tiles have."""
        sizes = rows, self.c.shape[0], self.symmetric, self._prefixes
        return library.function("in_batch_elements")(*sizes)


forward, forward_backward, backward = functions_of(NativeLoop)


def _padded(width: int) -> int:
    """The width of as many columns in whole panels."""
    return width + -width % library.in_batch_panel()


def _pack_columns(c: Tensor) -> Tensor:
    """C for logits: panels of its rows, each transposed."""
    rows = c.shape[0] + -c.shape[0] % library.in_batch_panel()
    packed = workspace.scratch("packed logits", (rows, c.shape[1]), c)
    words = c.shape[1] * c.element_size() // 4
    library.function("in_batch_pack_b")(c.data_ptr(), c.shape[0], words, packed.data_ptr())
    return packed


def _pack_rows(x: Tensor, use: str) -> Tensor:
    """C or R for gradients: panels of its columns, and in a word as many rows as it has numbers."""
    rows = x.shape[0] + x.shape[0] % 2
    packed = workspace.scratch(f"packed {use}", (rows, x.shape[1]), x)
    library.function("in_batch_pack_bt", x.dtype)(x.data_ptr(), *x.shape, packed.data_ptr())
    return packed
