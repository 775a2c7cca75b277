"""The in-batch op across processes, each of which owns its rows' gradient completely.

With the gathered rows R', C' of all processes, a process computes the totals of its own rows
against C', and of its own columns against R' where columns have losses. What the gradient of its
rows needs of the others is one coefficient a_j = w_j dl/dT_j and one total T_j per row, and where
its positives are several the gradient on each: they are gathered once in the forward pass, and

    grad_R = sum over all columns of (a_i dT_i/dx_ij + b_j dT_j/dx_ij) c'_j

is then local: nothing travels in the backward pass. The gradient is that of the joined batch's loss
times the number of processes, which DDP's averaging takes back. It takes every process's gradient
on the loss to be the same. Notation as in `cosloss.ops.in_batch`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.distributed import Peers
from cosloss.kernels.dispatch import in_batch as engine_for
from cosloss.modes import differentiates_itself, without_autocast
from cosloss.problem import Mask, Problem

# what a row tells of itself, in this order; its pull only if positives are several
COEFFICIENT, TOTAL, LOSS, PULL = range(4)


@dataclass(frozen=True)
class Everyone:
    """All processes' rows and columns and the ids of their groups; columns None for the rows."""

    peers: Peers
    rows: Tensor
    columns: Tensor | None
    own_groups: Tensor
    groups: Tensor


class Gathered(Function):
    """The joined batch's sum_i w_i l_i, the same number in every process."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        c: Tensor | None,
        positive: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        matrix: Problem,
        everyone: Everyone,
    ) -> Tensor:
        own = replace(
            matrix, mask=Mask(groups=(everyone.own_groups, everyone.groups)), column_losses=False
        )
        others = everyone.rows if everyone.columns is None else everyone.columns
        kernel = engine_for(r, c)
        with without_autocast(r):
            total = kernel.forward(r, others, bias, own)
            if matrix.column_losses and c is not None:
                of_columns = kernel.forward(c, everyone.rows, bias, own)
                total = torch.cat([total, of_columns])
        loss = matrix.criterion.loss(total, positive) * weight
        per_total, per_positive = matrix.criterion.loss_grad(total, positive)
        each = [weight * per_total, total, loss]
        pulls = matrix.d_pos_logit(weight * per_positive)
        if pulls is not None:
            each.append(pulls)
        told = torch.stack([x.to(total.dtype) for x in each], 1)
        # two rows of losses for an item, one of its row and one of its column, travel as columns
        sides = 2 if matrix.column_losses and c is not None else 1
        heard = everyone.peers.gather(torch.cat(told.tensor_split(sides), 1))
        ctx.matrix, ctx.everyone, ctx.sides = matrix, everyone, sides
        ctx.save_for_backward(r, c, bias, weight * per_positive, told, heard)
        return heard[:, LOSS :: len(each)].sum().to(r.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("gather_distributed has no second derivative: use one process")
        _refuse_unless_plain(grads[0])
        r, c, bias, per_positive, told, heard = ctx.saved_tensors
        everyone = ctx.everyone
        needs_r, needs_c, _, _, needs_bias, *_ = ctx.needs_input_grad
        grad = grads[0] * everyone.peers.world
        own_rows = told[: r.shape[0]]
        grad_r = grad_c = grad_bias = None
        kernel = engine_for(r, c)

        def gradients(
            rows: Tensor, columns: Tensor, sides: list[Tensor], needs: tuple[bool, bool, bool]
        ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            groups = everyone.own_groups, everyone.groups
            excluded = Mask(groups=groups[::-1] if needs[1] else groups)
            matrix = replace(ctx.matrix, mask=excluded, column_losses=len(sides) == 2)
            both = torch.cat(sides)
            pulls = None if matrix.positives is None else grad * both[:, PULL]
            return kernel.backward(
                *(grad * both[:, COEFFICIENT], both[:, TOTAL]),
                *(rows, columns, bias, matrix, needs, pulls),
            )

        with without_autocast(r):
            if c is None:
                grad_r, _, _ = gradients(
                    r, everyone.rows, [own_rows, heard], (needs_r, False, False)
                )
            else:
                two = ctx.sides == 2
                own_columns = [told[r.shape[0] :]] if two else []
                all_columns = [heard[:, 3:]] if two else []
                if needs_r or needs_bias:
                    grad_r, _, grad_bias = gradients(
                        r, everyone.columns, [own_rows, *all_columns], (needs_r, False, needs_bias)
                    )
                if needs_c:
                    _, grad_c, _ = gradients(
                        everyone.rows, c, [heard[:, :3], *own_columns], (False, True, False)
                    )
        return grad_r, grad_c, (grad * per_positive).to(r.dtype), None, grad_bias, None, None


def _refuse_unless_plain(*tensors: Tensor | None) -> None:
    if differentiates_itself(*tensors):
        raise RuntimeError(
            "gather_distributed works on plain tensors, outside of torch.compile and torch.func"
        )


def gathered(
    r: Tensor,
    c: Tensor | None,
    positive: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    matrix: Problem,
    everyone: Everyone,
) -> Tensor:
    """`Gathered`, where bias and two-way do not occur together."""
    _refuse_unless_plain(r, c, positive, weight, bias, everyone.own_groups, *matrix.ids)
    return Gathered.apply(r, c, positive, weight, bias, matrix, everyone)
