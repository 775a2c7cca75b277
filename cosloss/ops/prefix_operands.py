"""The operands of an in-batch loss over nested prefixes, and the way back from their gradients.

Notation of `cosloss.ops.prefixes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from cosloss.kernels.prefixes import Prefixes
from cosloss.kernels.stats import Gradients
from cosloss.ops.operands import Rows, operands_of, positives_of, views_of
from cosloss.problem import Problem


def prefix_of(rows: Rows, end: int) -> Rows:
    """The rows' first columns."""
    first, second, negatives = rows
    return (
        first[:, :end],
        None if second is None else second[:, :end],
        None if negatives is None else negatives[:, :end],
    )


@dataclass
class PrefixOperands:
    """The factors of all prefixes' logits, as `cosloss.ops.operands.Operands` are of one matrix's.

    positive: (K, losses). pairs: (K, losses of both views) or None: the pairs' logits without bias.
    norms: each prefix's, as in `Operands`.
    """

    r: Tensor
    c: Tensor | None
    prefixes: Prefixes
    positive: Tensor
    pairs: Tensor | None
    norms: list[tuple[Tensor, ...]]
    scale: float | Tensor

    def input_grads(
        self,
        unit_rows: ModuleType,
        rows: Rows,
        temperature: float | Tensor,
        problem: Problem,
        gradients: Gradients,
        d_positive: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients on temperature, bias and rows, where needed, from those on the operands."""
        (grad_r, grad_c, grad_bias), (along_r, along_c) = gradients[:3], gradients[3:]
        assert along_r is not None
        assert along_c is not None
        n, views, negatives = rows[0].shape[0], views_of(rows), rows[2]
        needs_temperature, needs_bias, *needs_rows = needs
        of_second = negatives is None or problem.negatives_beside
        total = along_r.sum() if self.c is None else along_r.sum() + along_c.sum()
        if not problem.self_similarity:
            own = along_c[:, :n] if of_second else torch.zeros_like(along_r)
            along_views = torch.cat([along_r, own], 1)[:, : len(views) * n]
        else:
            along_views = along_r
        d_pairs = None
        if self.pairs is not None:
            sign = -1 if problem.criterion.distance else 1
            d_pairs = pad(sign * d_positive, (0, self.pairs.shape[1] - d_positive.shape[1]))
            of_pairs = d_pairs * (1 - self.pairs if problem.criterion.distance else self.pairs)
            total = total + 2 * of_pairs.sum()
            along_views = along_views + of_pairs + of_pairs.roll(n, 1)
        d_temperature = None
        if isinstance(temperature, Tensor) and needs_temperature:
            d_temperature = (-total / (2 * temperature.to(total))).to(temperature)
        if grad_bias is not None:
            grad_bias = grad_bias + d_positive.sum().to(grad_bias.dtype)
        self.r, self.c = self.r.new_empty(0), None  # their memory serves the gradients
        d_views: list[Tensor | None] = [None, None]
        d_negatives = None
        if any(needs_rows[:2]):
            grad_second = grad_c[:n] if of_second and grad_c is not None else None
            grads: list[Tensor | None] = [grad_r, grad_second]
            if problem.self_similarity:
                grads = [None] if grad_r is None else [*grad_r.chunk(len(views))]
            d_views[: len(views)] = self._through_rows(
                unit_rows, 0, grads[: len(views)], d_pairs, views, along_views, needs_rows
            )
        if negatives is not None and needs_rows[2]:
            assert grad_c is not None
            m = negatives.shape[0]
            (d_negatives,) = self._through_rows(
                unit_rows, 1, [grad_c[-m:]], None, [negatives], along_c[:, -m:], [True]
            )
        return [d_temperature, grad_bias if needs_bias else None, *d_views, d_negatives]

    def _through_rows(
        self,
        unit_rows: ModuleType,
        which: int,
        grads: Sequence[Tensor | None],
        d_pairs: Tensor | None,
        views: Sequence[Tensor],
        along: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients on the views whose norms are those, from those on their segments' rows.

        d_pairs: (K, V N), on the pairs' logits. along: (K, V N), <h, r> of each prefix alone.
        """
        wide = torch.promote_types(views[0].dtype, torch.float32)
        norms = [each[which] for each in self.norms]
        links = [unit_rows.ratio(*pair) for pair in pairwise(norms)]
        found: list[list[Tensor | None]] = []
        chained_along = chained_pairs = None
        for k, segment in reversed([*enumerate(self.prefixes.segments)]):
            own_along, own_pairs = along[k], None if d_pairs is None else d_pairs[k]
            if chained_along is not None:
                own_along = own_along + links[k] ** 2 * chained_along
            if own_pairs is not None and chained_pairs is not None:
                both = links[k] * links[k].roll(views[0].shape[0], 0)
                own_pairs = own_pairs + both * chained_pairs
            chained_along, chained_pairs = own_along, own_pairs
            found.append(
                unit_rows.backward(
                    [None if grad is None else grad[:, segment] for grad in grads],
                    None if own_pairs is None else own_pairs.to(wide),
                    [x[:, segment] for x in views],
                    norms[k],
                    needs[: len(views)],
                    scale=self.scale,
                    along=own_along,
                )
            )
        rest = views[0].shape[1] - self.prefixes.ends[-1]  # columns beyond the longest prefix
        return [
            None if parts[0] is None else pad(torch.cat([*reversed(parts)], 1), (0, rest))
            for parts in zip(*found, strict=True)
        ]


def prefix_operands(
    unit_rows: ModuleType,
    rows: Rows,
    ends: tuple[int, ...],
    temperature: float | Tensor,
    bias: Tensor | None,
    problem: Problem,
    dtype: torch.dtype,
) -> PrefixOperands:
    """The operands, from those of each prefix in turn."""
    of_rows: list[Tensor] = []
    of_columns: list[Tensor] = []
    row_links: list[Tensor] = []
    column_links: list[Tensor] = []
    norms: list[tuple[Tensor, ...]] = []
    positives: list[Tensor] = []
    pairs: list[Tensor] = []
    n, begin = rows[0].shape[0], 0
    scale: float | Tensor = 1.0
    for end in ends:
        own = operands_of(unit_rows, prefix_of(rows, end), temperature, None, problem, dtype)
        own.bias = bias
        positives.append(positives_of(own, problem))
        if own.pair is not None:
            pairs.append(own.pair)
        of_rows.append(own.r[:, begin:end])
        if own.c is not None:
            of_columns.append(own.c[:, begin:end])
        before = norms[-1] if norms else own.norms
        links = [unit_rows.ratio(*pair) for pair in zip(before, own.norms, strict=True)]
        if problem.self_similarity:
            row_links.append(links[0])
        else:
            row_links.append(links[0][:n])
            of_keys = [links[0][n:]] if rows[2] is None or problem.negatives_beside else []
            column_links.append(torch.cat([*of_keys, *links[1:]]))
        norms.append(own.norms)
        begin, scale = end, own.scale
    linked = torch.stack(row_links)
    return PrefixOperands(
        torch.cat(of_rows, 1),
        torch.cat(of_columns, 1) if of_columns else None,
        Prefixes(ends, linked, torch.stack(column_links) if column_links else linked),
        torch.stack(positives),
        torch.stack(pairs) if pairs else None,
        norms,
        scale,
    )
