"""The in-batch op across processes, each of which owns its rows' gradient completely.

With the gathered rows R', C' of all processes, a process computes the statistics of its own rows
against C', and of its own columns against R' where columns have losses. What the gradient of its
rows needs of the others is d_s_j and s_j of each row, and where its positives are several the
gradient on each: they are gathered once in the forward pass, and

    grad_R = sum over all columns of (d_s_i ds_i/dx_ij + d_s_j ds_j/dx_ij) c'_j

is then local: nothing travels in the backward pass. The gradient is that of the joined batch's loss
times the number of processes, which DDP's averaging takes back. It takes every process's gradient
on the loss to be the same. Notation as in `cosloss.ops.in_batch`; the problem's masks are those of
the own rows (and own columns) with all.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from cosloss.distributed import Peers
from cosloss.kernels.stats import Gradients
from cosloss.ops.operands import Operands, positives_of
from cosloss.problem import Problem

# the numbers that a row sends, in this order; d_pos_logit only if positives are several
D_STAT, STAT, LOSS, D_POS_LOGIT = range(4)


def forward(
    engine: ModuleType,
    operands: Operands,
    weights: Tensor | float | None,
    problem: Problem,
    peers: Peers,
) -> tuple[Tensor, ...]:
    """The joined batch's sum_i w_i l_i, the same in every process, and what `backward` needs."""
    assert weights is not None
    r, c, bias = operands.r, operands.c, operands.bias
    # an item's row, its column and its hard negatives travel side by side
    everyone = peers.gather(r if c is None else torch.cat([r, *c.split(r.shape[0])], 1))
    all_r, all_c = _rows_and_columns(everyone, r)
    one_way = replace(problem, column_losses=False)
    stat = engine.forward(r, all_c, bias, one_way)
    if problem.column_losses and c is not None:
        stat = torch.cat([stat, engine.forward(c, all_r, bias, one_way)])
    positive = positives_of(operands, all_r, problem)
    d_stat, d_positive = problem.criterion.loss_grad(stat, positive)
    d_positive = weights * d_positive
    sent = [weights * d_stat, stat, weights * problem.criterion.loss(stat, positive)]
    d_pos_logit = problem.d_pos_logit(d_positive)
    if d_pos_logit is not None:
        sent.append(d_pos_logit)
    own = torch.stack([x.to(stat.dtype) for x in sent], 1)
    # an item's two losses, of its row and of its column, travel side by side
    received = peers.gather(torch.cat(own.tensor_split(_losses_per_item(problem, c)), 1))
    return received[:, LOSS :: len(sent)].sum(), everyone, d_positive, own, received


def backward(
    engine: ModuleType,
    grad: Tensor,
    operands: Operands,
    problem: Problem,
    needs: tuple[bool, bool, bool],
    found: Sequence[Tensor],
) -> tuple[Gradients, Tensor]:
    """The gradients on the own rows and columns, on bias, and on the positives.

    grad: on the loss, times the number of processes. found: what `forward` returned after it.
    """
    everyone, d_positive, own, received = found
    r, c, bias = operands.r, operands.c, operands.bias
    needs_r, needs_c, needs_bias = needs
    n = r.shape[0]
    all_r, all_c = _rows_and_columns(everyone, r)

    def gradients(
        rows: Tensor, columns: Tensor, sides: list[Tensor], needs: tuple[bool, bool, bool]
    ) -> Gradients:
        """The gradients of a matrix of own rows or own columns with everyone's, from both stats."""
        mask = problem.mask
        if needs[1]:
            mask = problem.own_columns or mask.transposed()
        here = replace(problem, mask=mask, column_losses=len(sides) == 2)
        stats = torch.cat(sides)
        d_pos_logit = None if problem.positives is None else grad * stats[:, D_POS_LOGIT]
        return engine.backward(
            rows,
            columns,
            bias,
            here,
            d_stat=grad * stats[:, D_STAT],
            stat=stats[:, STAT],
            needs=needs,
            d_pos_logit=d_pos_logit,
        )

    grad_r = grad_c = grad_bias = None
    if c is None:
        grad_r, _, _ = gradients(r, all_r, [own, received], (needs_r, False, False))
        return (grad_r, None, None), grad * d_positive
    two = _losses_per_item(problem, c) == 2
    if needs_r or needs_bias:
        sides = [own[:n], received[:, 3:]] if two else [own]
        grad_r, _, grad_bias = gradients(r, all_c, sides, (needs_r, False, needs_bias))
    if needs_c:
        sides = [received[:, :3], own[n:]] if two else [received]
        _, grad_c, _ = gradients(all_r, c, sides, (False, True, False))
    return (grad_r, grad_c, grad_bias), grad * d_positive


def _rows_and_columns(everyone: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Everyone's rows, and their columns: those of all items, then their hard negatives."""
    all_r, *columns = everyone.split(r.shape[1], 1)
    if not columns:
        return all_r, all_r
    return all_r, columns[0] if len(columns) == 1 else torch.cat(columns)


def _losses_per_item(problem: Problem, c: Tensor | None) -> int:
    return 2 if problem.column_losses and c is not None else 1
