"""Totals whose work on a tile is one compiled pass over it."""

import torch
from torch import Tensor

from cosloss.kernels.eager.totals import ShiftedLogSumExps, Sums, Totals, rounded
from cosloss.kernels.native.library import function

KINDS = ("exp", "softplus", "hinge")  # of sums


def compiled(totals: Totals) -> Totals:
    """The same totals, compiled where there are kernels for their kind."""
    if isinstance(totals, ShiftedLogSumExps):
        return CompiledLogSumExps(totals)
    if isinstance(totals, Sums) and totals.kind in KINDS:
        return CompiledSums(totals)
    return totals


class _Compiled(Totals):
    """What is not about tiles, the eager totals do."""

    def __init__(self, of: Totals) -> None:
        super().__init__(of.rows, of.columns)
        self.kind, self.margin, self._of = of.kind, of.margin, of

    def coefficients(self, grad: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        return self._of.coefficients(grad, total, torch.float32)  # as the kernels read a tile

    def finish(self, rows: slice = slice(None)) -> None:
        self._of.finish(rows)


class CompiledSums(_Compiled):
    """total_i = sum_j f(x_ij); the tile keeps the slopes f'(x_ij)."""

    def add(self, x: Tensor, i: slice, j: slice, keep: bool) -> None:
        columns = self.columns if self._counts_columns(i, j) else None
        function(f"add_{self.kind}", x.dtype)(
            x.data_ptr(), *x.shape, self.margin, _at(self.rows, i), _at(columns, j)
        )

    def again(self, x: Tensor) -> None:
        function(f"slope_{self.kind}", x.dtype)(x.data_ptr(), x.numel(), self.margin)

    def slopes(self, kept: Tensor, i: slice, out: Tensor) -> Tensor:
        return kept

    def weigh(self, kept: Tensor, i: slice, j: slice, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        function("weigh", kept.dtype)(
            kept.data_ptr(), *kept.shape, _at(a, i), _at(b, j), out.data_ptr()
        )
        return out


class CompiledLogSumExps(_Compiled):
    """total_i = log sum_j exp(x_ij) below a running maximum; the tile keeps the logits."""

    def __init__(self, of: ShiftedLogSumExps) -> None:
        super().__init__(of)
        self._largest = of.largest

    def add(self, x: Tensor, i: slice, j: slice, keep: bool) -> None:
        two = self._counts_columns(i, j)
        function("add_logsumexp", x.dtype)(
            x.data_ptr(),
            *x.shape,
            _at(self.rows, i),
            _at(self._largest[0], i),
            _at(self.columns if two else None, j),
            _at(self._largest[-1], j),
        )

    def again(self, x: Tensor) -> None:
        """The logits are what `weigh` needs."""

    def slopes(self, kept: Tensor, i: slice, out: Tensor) -> Tensor:
        shift = rounded(self.rows[i], torch.float32)
        function("slope_logsumexp", kept.dtype)(
            kept.data_ptr(), *kept.shape, shift.data_ptr(), out.data_ptr()
        )
        return out

    def weigh(self, kept: Tensor, i: slice, j: slice, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        assert self.columns is not None
        row_shift = rounded(self.rows[i], torch.float32)
        column_shift = rounded(self.columns[j], torch.float32)
        function("weigh_logsumexp", kept.dtype)(
            kept.data_ptr(),
            *kept.shape,
            _at(a, i),
            row_shift.data_ptr(),
            _at(b, j),
            column_shift.data_ptr(),
            out.data_ptr(),
        )
        return out


def _at(x: Tensor | None, part: slice) -> int | None:
    """The address of a part of a contiguous vector."""
    return None if x is None else x.data_ptr() + part.start * x.element_size()
