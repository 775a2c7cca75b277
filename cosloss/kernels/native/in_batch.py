"""The engine of the in-batch losses, compiled: a thread takes a tile through all its work at once.

Shapes as in the eager engine, which has the same three functions: rows R (N, D); columns C (M, D),
or None where they are the rows; totals (N,) in float64, or (N + M,), rows first.
"""

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_int64

import torch
from torch import Tensor
from torch.nn.functional import pad

from cosloss.kernels.eager import tiles, walk
from cosloss.kernels.eager.in_batch import Gradients
from cosloss.kernels.eager.totals import ShiftedLogSumExps, Totals, rounded
from cosloss.kernels.eager.walk import Matrix
from cosloss.kernels.eager.workspace import workspace
from cosloss.kernels.native import library


def forward(r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix) -> Tensor:
    """The totals."""
    totals = matrix.new_totals(r, c)
    _Task(r, c, bias, matrix, totals).run(adds=True)
    totals.finish()
    return totals.joined()


def forward_and_backward(
    weight: Tensor | float,
    positive: Tensor,
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    matrix: Matrix,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """The totals, and the gradients of sum_i weight_i loss_i: on positive, and where needed."""
    totals = matrix.new_totals(r, c)
    task = _Task(r, c, bias, matrix, totals)
    gradients = _Gradients(task, needs)
    if matrix.loss.linear:
        total = totals.joined()
        slopes, of_positive = matrix.loss.row_slopes(total, positive)
        gradients.take(weight * slopes, total)
        task.run(adds=True, gradients=gradients)
        return totals.joined(), weight * of_positive, gradients.finish()
    if matrix.two_way:
        task.keep_tiles()
        task.run(adds=True)
        totals.finish()
        total = totals.joined()
        slopes, of_positive = matrix.loss.row_slopes(total, positive)
        grad_positive = weight * of_positive
        gradients.take(weight * slopes, total, matrix.pulls(grad_positive))
        task.run(gradients=gradients)
        return total, grad_positive, gradients.finish()
    weights = torch.as_tensor(weight, dtype=torch.float64, device=r.device).expand_as(positive)
    of_positives = []
    for rows in task.bands():
        task.run(rows, adds=True)
        totals.finish(rows)
        slopes, of_positive = matrix.loss.row_slopes(totals.rows[rows], positive[rows])
        of_positives.append(of_positive)
        gradients.take(weights[rows] * slopes, totals.rows[rows])
        task.run(rows, gradients=gradients)
    return totals.rows, weights * torch.cat(of_positives), gradients.finish()


def backward(
    grad: Tensor,
    total: Tensor,
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    matrix: Matrix,
    needs: tuple[bool, bool, bool],
    pulls: Tensor | None = None,
) -> Gradients:
    """Gradients on r, c and bias, each only where `needs` asks, from the gradient on the totals.

    pulls: like the totals, the gradient on the logit of each of a row's positives.
    """
    totals = matrix.loss.totals(*matrix.split(total, r, c))
    task = _Task(r, c, bias, matrix, totals)
    gradients = _Gradients(task, needs)
    gradients.take(grad, total, pulls)
    task.run(gradients=gradients)
    return gradients.finish()


class _Task:
    """One matrix's operands as the kernels take them, its totals, and the memory of its tiles."""

    def __init__(
        self, r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix, totals: Totals
    ) -> None:
        self.symmetric, self.two_way, self.totals = c is None, matrix.two_way, totals
        self.length = r.shape[1]
        # where bfloat16 cannot be multiplied, its numbers are in float32
        narrow = matrix.dtype == torch.bfloat16 and library.has("in_batch_exp", matrix.dtype)
        self._dtype = torch.bfloat16 if narrow else torch.float32
        self.r = self._operand(r, matrix.dtype)
        self.c = self.r if c is None else self._operand(c, matrix.dtype)
        self.bias = None if bias is None else bias.float()
        self._ids = [*map(_ids, matrix.excluded.ids)]
        positives = matrix.positives
        self._classes = None
        if positives is not None:  # ids of at most as many classes as rows
            self._classes = [ids.int().contiguous() for ids in (positives.rows, positives.columns)]
        offsets = matrix.excluded.offsets
        self._offsets = (c_int64 * len(offsets))(*offsets)
        self._packed: dict[str, Tensor] = {}
        self._kept: Tensor | None = None
        # the logits that a logsumexp keeps do not bear rounding
        kept = torch.float32 if totals.kind == "logsumexp" else self._dtype
        self._memory = self.r.new_empty(0, dtype=kept)

    def split(self, per_loss: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows' and the columns' part of a vector over the losses, of all or some rows."""
        if self.symmetric:
            return per_loss, per_loss
        rows = self.r.shape[0]
        return (per_loss[:rows], per_loss[rows:]) if self.two_way else (per_loss, None)

    def keep_tiles(self) -> None:
        """Give every tile memory of its own, if all of them fit."""
        self._kept = walk.kept_tiles(self._elements(self.r.shape[0]), self._memory)

    def bands(self) -> Iterator[slice]:
        """Rows whose tiles are kept together, until the next are."""
        every = tiles.bands(self.r.shape[0], self.c.shape[0], self.r.device)
        slices = [band[0][0] for band in every]
        height = max(rows.stop - rows.start for rows in slices)
        self._kept = workspace.scratch("band", (self._elements(height),), self._memory)
        yield from slices

    def run(
        self,
        rows: slice = slice(None),
        *,
        adds: bool = False,
        gradients: "_Gradients | None" = None,
    ) -> None:
        """Go over these rows' tiles: add them to the totals, add their weights to the gradients.

        A tile is computed if it is to be added, or was not kept.
        """
        start, stop, _ = rows.indices(self.r.shape[0])
        totals, (row_groups, column_groups, row_classes, column_classes) = self.totals, self._ids
        columns, length = self.c.shape
        work = library.in_batch_work()(  # and what is not set is 0, or nothing
            rows=_at(self.r, start),
            n=stop - start,
            m=columns,
            d=length,
            symmetric=self.symmetric,
            first_row=start,
            diagonals=len(self._offsets),
            offsets=ctypes.addressof(self._offsets),
            row_groups=_at(row_groups, start),
            column_groups=_at(column_groups),
            row_classes=_at(row_classes, start),
            column_classes=_at(column_classes),
            bias=_at(self.bias),
            margin=totals.margin,
        )
        if adds:
            work.row_totals, work.column_totals = _at(totals.rows, start), _at(totals.columns)
            if isinstance(totals, ShiftedLogSumExps):
                work.row_largest = _at(totals.largest[0], start)
                work.column_largest = _at(totals.largest[-1])
        if adds or self._kept is None:
            work.across = _at(self._columns("across", _across))
        work.kept = _at(self._kept)
        if gradients is not None:
            down_c = self._columns("down", _down)
            down_r = down_c if self.symmetric else _down(self.r[rows], "own rows")
            work.down_r, work.down_c = _at(down_r), _at(down_c)
            work.a, work.b, work.row_shift, work.column_shift = map(_at, gradients.coefficients)
            if gradients.pulls is not None and self._classes is not None:
                work.row_pull, work.column_pull = map(_at, gradients.pulls)
                work.row_class, work.column_class = map(_at, self._classes)
            work.grad_r, work.grad_c = _at(gradients.grad_r, start), _at(gradients.grad_c)
            work.grad_bias = _at(gradients.grad_bias)
        library.function(f"in_batch_{totals.kind}", self._dtype)(ctypes.byref(work))

    def _operand(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        missing = -x.shape[1] % library.in_batch_panel()
        x = x.to(dtype).to(self._dtype)
        return (pad(x, (0, missing)) if missing else x).contiguous()

    def _columns(self, how: str, packed: Callable[[Tensor], Tensor]) -> Tensor:
        if how not in self._packed:
            self._packed[how] = packed(self.c)
        return self._packed[how]

    def _elements(self, rows: int) -> int:
        return library.function("in_batch_elements")(rows, self.c.shape[0], self.symmetric)


class _Gradients:
    """The gradients on r, c and bias, summed up, from the coefficients of the rows at hand."""

    def __init__(self, task: _Task, needs: tuple[bool, bool, bool]) -> None:
        def zeros(like: Tensor | None, needed: bool) -> Tensor | None:
            if like is None or not needed:
                return None
            return torch.zeros_like(like, dtype=torch.float32)

        self._task = task
        self.grad_r = zeros(task.r, needs[0])
        self.grad_c = zeros(task.c, needs[1] and not task.symmetric)
        self.grad_bias = zeros(task.bias, needs[2])
        self.coefficients: tuple[Tensor | None, ...] = ()
        self.pulls: tuple[Tensor | None, ...] | None = None

    def take(self, grad: Tensor, total: Tensor, pulls: Tensor | None = None) -> None:
        """Know the coefficients from the gradient on the totals: on all, or on some rows'."""
        split, totals = self._task.split, self._task.totals
        self.pulls = None if pulls is None else split(pulls.float())
        of_losses = split(totals.coefficients(grad, total, torch.float32).float())
        shifts: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(totals, ShiftedLogSumExps):
            shifts = split(rounded(total, torch.float32))
        self.coefficients = *of_losses, *shifts

    def finish(self) -> Gradients:
        """The gradients, once every tile was added."""
        length = self._task.length
        grad_r, grad_c = (g if g is None else g[:, :length] for g in (self.grad_r, self.grad_c))
        return grad_r, grad_c, self.grad_bias


def _across(x: Tensor) -> Tensor:
    """Rows in panels, each transposed, for products along the rows."""
    rows = x.shape[0] + -x.shape[0] % library.in_batch_panel()
    packed = workspace.scratch("across", (rows, x.shape[1]), x)
    words = x.shape[1] * x.element_size() // 4
    library.function("in_batch_across")(x.data_ptr(), x.shape[0], words, packed.data_ptr())
    return packed


def _down(x: Tensor, use: str = "down") -> Tensor:
    """Rows for products along the columns: as many together as a word has numbers."""
    rows = x.shape[0] + x.shape[0] % 2
    packed = workspace.scratch(use, (rows, x.shape[1]), x)
    library.function("in_batch_down", x.dtype)(x.data_ptr(), *x.shape, packed.data_ptr())
    return packed


def _ids(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.long().contiguous()


def _at(x: Tensor | None, index: int = 0) -> int | None:
    """The address of a contiguous tensor's row."""
    if x is None:
        return None
    return x.data_ptr() + (index * x.stride(0) * x.element_size() if index else 0)
