"""The problem that a backend solves: a logit matrix, its criterion, and which of its pairs count.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosloss.criteria import KINDS, Criterion, criterion_of

ALL = slice(None)


@dataclass(frozen=True)
class Mask:
    """The pairs (row, column) that are no negatives, and count in no statistic.

    diagonals: those with column - row = diagonal.
    groups: ids of the rows and of the columns; those of the same group.
    classes: ids of the rows and of the columns; only those of a group whose classes differ.
    row_limits, column_limits: a number of each row or column; those whose logit is larger.
    guides: of the rows (N, G) and of the columns (M, G); the limits are of their products, then,
        in place of the logits. Only eager operations know them.
    """

    diagonals: tuple[int, ...] = ()
    groups: tuple[Tensor, Tensor] | None = None
    classes: tuple[Tensor, Tensor] | None = None
    row_limits: Tensor | None = None
    column_limits: Tensor | None = None
    guides: tuple[Tensor, Tensor] | None = None

    @property
    def ids(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The groups of rows and columns, then the classes; None where there are none."""
        return *(self.groups or (None, None)), *(self.classes or (None, None))

    def transposed(self) -> "Mask":
        """The same pairs as (column, row)."""
        groups, classes, guides = (
            pair and pair[::-1] for pair in (self.groups, self.classes, self.guides)
        )
        diagonals = tuple(-diagonal for diagonal in self.diagonals)
        return Mask(diagonals, groups, classes, self.column_limits, self.row_limits, guides)

    def fill(self, tile: Tensor, i: slice, j: slice, value: float) -> None:
        """Write `value` at the masked pairs of the tile X[i, j], in place."""
        limited = self._limited(tile, i, j)
        if self.row_limits is not None:
            tile.masked_fill_(limited > self.row_limits[i, None], value)
        if self.column_limits is not None:
            tile.masked_fill_(limited > self.column_limits[j], value)
        if self.groups is not None:
            tile.masked_fill_(self._of_groups(i, j), value)
        for diagonal in self.diagonals:
            local = i.start + diagonal - j.start
            if -tile.shape[0] < local < tile.shape[1]:
                tile.diagonal(local).fill_(value)

    def dense(self, x: Tensor) -> Tensor:
        """True at the masked pairs of the whole matrix x."""
        row, column = (torch.arange(size, device=x.device) for size in x.shape)
        distance = column - row[:, None]
        mask = torch.zeros_like(distance, dtype=torch.bool)
        for diagonal in self.diagonals:
            mask = mask | (distance == diagonal)
        limited = self._limited(x, ALL, ALL)
        if self.row_limits is not None:
            mask = mask | (limited > self.row_limits[:, None])
        if self.column_limits is not None:
            mask = mask | (limited > self.column_limits)
        return mask if self.groups is None else mask | self._of_groups(ALL, ALL)

    def _limited(self, tile: Tensor, i: slice, j: slice) -> Tensor:
        """What limits are of, at the tile X[i, j]."""
        return tile if self.guides is None else self.guides[0][i] @ self.guides[1][j].T

    def _of_groups(self, i: slice, j: slice) -> Tensor:
        assert self.groups is not None
        mask = self.groups[0][i, None] == self.groups[1][j]
        if self.classes is not None:
            mask = mask & (self.classes[0][i, None] != self.classes[1][j])
        return mask


@dataclass(frozen=True)
class PositiveMask:
    """The pairs that a row's positive logit is the mean of: of one class, and not masked.

    rows, columns: ids of their classes.
    count: (N,), how many positives a row has, or 1 if it has none.
    """

    rows: Tensor
    columns: Tensor
    count: Tensor

    def tile(self, i: slice = ALL, j: slice = ALL) -> Tensor:
        """True at the pairs of one class in the tile X[i, j]."""
        return self.rows[i, None] == self.columns[j]

    def class_sums(self, c: Tensor, sums: Tensor | None = None) -> Tensor:
        """The sum of each class's columns, on top of `sums`; ids are at most the number of rows."""
        if sums is None:
            wide = torch.promote_types(c.dtype, torch.float32)
            sums = c.new_zeros(self.rows.shape[0] + 1, c.shape[1], dtype=wide)
        return sums.index_add_(0, self.columns, c.to(sums.dtype))

    def mean_logits(self, r: Tensor, class_sums: Tensor) -> Tensor:
        """Each row's positive logit, for rows that are among the columns."""
        r = r.to(class_sums.dtype)
        others = class_sums[self.rows].sub_(r)
        return others.mul_(r).sum(1) / self.count

    def numbered(self) -> "PositiveMask":
        """The same pairs, with ids that count from 0; for rows that are the columns."""
        _, ids = self.columns.unique(return_inverse=True)
        return PositiveMask(ids, ids, self.count)

    def of_rows(self) -> "PositiveMask":
        """The same pairs: a class's id is its first row, or the number of rows where it has none.

        For ids below the number of columns.
        """
        n = self.rows.shape[0]
        first = self.columns.new_full(self.columns.shape, n)
        first.scatter_reduce_(0, self.rows, torch.arange(n, device=first.device), "amin")
        return PositiveMask(first[self.rows], first[self.columns], self.count)


@dataclass(frozen=True)
class Problem:
    """A logit matrix's criterion and masks.

    column_losses: whether every column has a loss as well as every row (CLIP's symmetric loss);
        always so where the columns are the rows.
    self_similarity: whether the columns are the rows.
    negatives_beside: whether further negatives are columns after the second view's rows, instead of
        in their place.
    own_columns: across processes, the mask of everyone's rows with the own columns, where that is
        not the transposed one.
    positives: where a row's positive logit is the mean of several of the matrix; only for an lse
        with column losses. Their gradient then goes through the matrix too, since close rows are
        pulled and pushed almost alike, and the two parts cancel best pair by pair.
    """

    criterion: Criterion
    mask: Mask
    column_losses: bool
    self_similarity: bool = False
    negatives_beside: bool = False
    own_columns: Mask | None = None
    positives: PositiveMask | None = None

    @property
    def ids(self) -> tuple[Tensor | None, ...]:
        """Every tensor that says which pairs are masked or positive."""
        own = () if self.positives is None else (self.positives.rows, self.positives.columns)
        mask = self.mask
        return *mask.ids, mask.row_limits, mask.column_limits, *(mask.guides or ()), *own

    def split(self, per_loss: Tensor, r: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows' and the columns' part of a vector over the losses."""
        if c is None:
            return per_loss, per_loss
        n = r.shape[0]
        return per_loss[..., :n], per_loss[..., n:] if self.column_losses else None

    def d_pos_logit(self, d_positive: Tensor) -> Tensor | None:
        """The gradient on each of a row's positive logits, from that on their mean, if several."""
        return None if self.positives is None else d_positive / self.positives.count

    def flatten(self) -> tuple[list[Tensor], list[int], float]:
        """Masks, kind and margin, as torch.library takes them: tensors, numbers, a number."""
        p = self.positives
        positives = (None, None, None) if p is None else (p.rows, p.columns, p.count)
        given = *self.mask.ids, self.mask.row_limits, self.mask.column_limits, *positives
        ids = [x for x in given if x is not None]
        kind = KINDS.index(self.criterion.kind)
        spec = [kind, self.column_losses, *(x is not None for x in given), *self.mask.diagonals]
        return ids, [int(x) for x in spec], self.criterion.margin

    @staticmethod
    def unflatten(ids: Sequence[Tensor], spec: Sequence[int], margin: float) -> "Problem":
        """A problem with these statistics, whatever loss its criterion makes of them."""
        (kind, column_losses), has, diagonals = spec[:2], spec[2:11], spec[11:]
        rest = iter(ids)
        g1, g2, c1, c2, row_limits, column_limits, p1, p2, count = (
            next(rest) if given else None for given in has
        )
        groups = None if g1 is None or g2 is None else (g1, g2)
        classes = None if c1 is None or c2 is None else (c1, c2)
        positives = None
        if p1 is not None and p2 is not None and count is not None:
            positives = PositiveMask(p1, p2, count)
        mask = Mask(tuple(diagonals), groups, classes, row_limits, column_limits)
        criterion = criterion_of(KINDS[kind], margin)
        return Problem(criterion, mask, bool(column_losses), positives=positives)
