"""The engine of the in-batch losses: totals of a logit matrix, and the gradient, tile by tile.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M); totals (N,) in float64, or (N + M,) where the columns have a loss of their own, rows first.
"""

import torch
from torch import Tensor

from cosloss.kernels.eager.totals import Totals
from cosloss.kernels.eager.walk import Matrix, Walk

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix) -> Tensor:
    """The totals."""
    walk = Walk(r, c, bias, matrix)
    totals = matrix.new_totals(r, c)
    for i, j, memory in walk:
        totals.add(walk.logits(i, j, memory), i, j, keep=False)
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
    """The totals, and the gradients of sum_i weight_i loss_i: on positive, and where needed.

    A tile is weighed once the slopes of its rows' and columns' losses are known: at once if the
    loss is linear in its totals; after its band of rows if the columns have no loss; else after all
    others, for which it is kept, or computed again if there are too many.
    """
    walk = Walk(r, c, bias, matrix)
    totals = matrix.new_totals(r, c)
    sums = _Sums(walk, matrix, totals, r, c, bias, needs)
    if matrix.loss.linear:
        total = totals.joined()
        slopes, of_positive = matrix.loss.row_slopes(total, positive)
        sums.take(totals.coefficients(weight * slopes, total, matrix.dtype))
        for i, j, memory in walk:
            totals.add(walk.logits(i, j, memory), i, j, keep=True)
            sums.add(memory, i, j)
        totals.finish()
        return totals.joined(), weight * of_positive, sums.finish()
    if matrix.two_way:
        walk.keep_tiles()
        for i, j, memory in walk:
            totals.add(walk.logits(i, j, memory), i, j, keep=True)
        totals.finish()
        total = totals.joined()
        slopes, of_positive = matrix.loss.row_slopes(total, positive)
        grad_positive = weight * of_positive
        coefficients = totals.coefficients(weight * slopes, total, matrix.dtype)
        sums.take(coefficients, pulls=matrix.pulls(grad_positive))
        sums.add_all()
        return total, grad_positive, sums.finish()
    weights = torch.as_tensor(weight, dtype=totals.rows.dtype, device=r.device).expand_as(positive)
    of_positives = []
    for band in walk.bands():
        for i, j, memory in band:
            totals.add(walk.logits(i, j, memory), i, j, keep=True)
        rows = band[0][0]
        totals.finish(rows)
        slopes, of_positive = matrix.loss.row_slopes(totals.rows[rows], positive[rows])
        of_positives.append(of_positive)
        sums.take(
            totals.coefficients(weights[rows] * slopes, totals.rows[rows], matrix.dtype), rows
        )
        for i, j, memory in band:
            sums.add(memory, i, j)
    return totals.rows, weights * torch.cat(of_positives), sums.finish()


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
    walk = Walk(r, c, bias, matrix)
    totals = matrix.loss.totals(*matrix.split(total, r, c))
    sums = _Sums(walk, matrix, totals, r, c, bias, needs)
    sums.take(totals.coefficients(grad, total, matrix.dtype), pulls=pulls)
    sums.add_all()
    return sums.finish()


class _Sums:
    """The gradients on r, c and bias, summed up tile by tile.

    With a loss of every column too, W_ij has a share of both: the tile becomes W. Otherwise
    W_ij = a_i s_ij with s the tile's slopes, which the products take as they are:

        grad_R = diag(a) (s C),    grad_C = s^T (diag(a) R).
    """

    def __init__(
        self,
        walk: Walk,
        matrix: Matrix,
        totals: Totals,
        r: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self._walk, self._totals = walk, totals
        self._positives = matrix.positives
        self._split = lambda per_loss: matrix.split(per_loss, r, c)
        self._grad_r = torch.zeros_like(r) if needs[0] else None
        self._grad_c = torch.zeros_like(c) if c is not None and needs[1] else None
        self._grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
        self._one_way = totals.columns is None
        self._a, self._b = r.new_empty(r.shape[0]), totals.columns
        self._pulls: tuple[Tensor, Tensor | None] | None = None
        scales_r = self._one_way and self._grad_c is not None
        self._factor = torch.empty_like(walk.r) if scales_r else walk.r

    def take(
        self, coefficients: Tensor, rows: slice = slice(None), pulls: Tensor | None = None
    ) -> None:
        """Know the coefficients of these rows; of all rows and columns, if columns have some."""
        self._pulls = None if pulls is None else self._split(pulls.to(self._a.dtype))
        a, b = self._split(coefficients.to(self._a.dtype))
        if rows == slice(None):
            self._a = a
        else:
            self._a[rows] = a
        self._b = b
        if self._factor is not self._walk.r:
            self._factor[rows] = self._walk.r[rows] * a[:, None]

    def add_all(self) -> None:
        """Add every tile, as it was kept or computed again."""
        for i, j, memory in self._walk:
            if not self._walk.keeps:
                self._totals.again(self._walk.logits(i, j, memory))
            self.add(memory, i, j)

    def add(self, kept: Tensor, i: slice, j: slice) -> None:
        """Add what the tile [i, j] says, of which the totals kept what they need."""
        walk, scratch = self._walk, self._walk.scratch(kept)
        if self._b is None:
            weight = self._totals.slopes(kept, i, out=scratch)
        else:
            weight = self._totals.weigh(kept, i, j, self._a, self._b, out=scratch)
            self._pull(weight, kept, i, j)
        if self._grad_r is not None:
            _add_product(self._grad_r[i], weight, walk.c[j])
            if walk.symmetric and i != j:
                _add_product(self._grad_r[j], weight.T, walk.r[i])
        if self._grad_c is not None:
            _add_product(self._grad_c[j], weight.T, self._factor[i])
        if self._grad_bias is not None:
            of_rows = weight.sum(1, dtype=self._grad_bias.dtype)
            self._grad_bias += (of_rows * self._a[i] if self._one_way else of_rows).sum()

    def _pull(self, weight: Tensor, kept: Tensor, i: slice, j: slice) -> None:
        """Add to the weights of a tile those of its positives."""
        if self._pulls is None or self._positives is None:
            return
        of_rows, of_columns = self._pulls
        assert of_columns is not None
        pairs = self._positives.mask(i, j) & self._totals.included(kept)
        weight += torch.where(pairs, of_rows[i, None] + of_columns[j], 0)

    def finish(self) -> Gradients:
        """The gradients, once every tile was added."""
        if self._one_way and self._grad_r is not None:
            self._grad_r *= self._a[:, None]
        return self._grad_r, self._grad_c, self._grad_bias


def _add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a b, added up in target's dtype."""
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    else:
        target += a @ b
