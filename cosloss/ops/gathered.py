"""The in-batch op across processes, each of which owns its rows' gradient completely.

Everyone's rows and columns come in blocks: a single one that is gathered, and kept for the backward
pass; or in a ring one process's after the other, and in the backward pass again. With R', C' of a
block, a process computes the statistics of its own rows against C', and of its own columns against
R' where columns have losses; those of all blocks add up, an lse as log(e^s + e^s'). What the
gradient of its rows needs of the others is d_s_j and s_j of each row, and where its positives are
several the gradient on each: they are gathered once in the forward pass, and

    grad_R = sum over all columns of (d_s_i ds_i/dx_ij + d_s_j ds_j/dx_ij) c'_j

is then local: no gradient travels. It is that of the joined batch's loss times the number of
processes, which DDP's averaging takes back. It takes every process's gradient on the loss to be the
same. Notation as in `cosloss.ops.in_batch`; the problem's masks are those of the own rows (and own
columns) with all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from cosloss.distributed import Block, Peers
from cosloss.kernels.stats import Gradients, merged
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
    own, losses = _own(operands), _losses_per_item(operands, problem)
    everyones = [] if peers.ring else peers.gather_each(*own)
    one_way = replace(problem, column_losses=False)
    stats, class_sums = [], None
    # where columns have no losses, nobody meets the rows
    for block in _blocks(peers, own[-losses:], everyones):
        here = _met_with(block, one_way, peers)
        stat = engine.forward(r, block.rows[-1], bias, here)
        if losses == 2:
            stat = torch.cat([stat, engine.forward(c, block.rows[0], bias, here)])
        stats.append(stat)
        if here.positives is not None:
            class_sums = here.positives.class_sums(block.rows[-1], class_sums)
    stat = merged(problem, stats)
    positive = positives_of(operands, problem, class_sums)
    d_stat, d_positive = problem.criterion.loss_grad(stat, positive)
    d_positive = weights * d_positive
    numbers = [weights * d_stat, stat, weights * problem.criterion.loss(stat, positive)]
    d_pos_logit = problem.d_pos_logit(d_positive)
    if d_pos_logit is not None:
        numbers.append(d_pos_logit)
    sent = torch.stack([x.to(stat.dtype) for x in numbers], 1)
    received = peers.gather_each(*sent.tensor_split(losses))
    return torch.cat(received)[:, LOSS].sum(), d_positive, *received, *everyones


def backward(
    engine: ModuleType,
    grad: Tensor,
    operands: Operands,
    problem: Problem,
    peers: Peers,
    needs: tuple[bool, bool, bool],
    found: Sequence[Tensor],
) -> tuple[Gradients, Tensor]:
    """The gradients on the own rows and columns, on bias, and on the positives.

    grad: on the loss. found: what `forward` returned after it.
    """
    d_positive, *rest = found
    own, losses = _own(operands), _losses_per_item(operands, problem)
    received, everyones = rest[:losses], rest[losses:]
    mine = [peers.part(x, peers.own) for x in received]
    needs_r, needs_c, needs_bias = needs
    grad = grad * peers.world

    def gradients(
        rows: Tensor,
        columns: Tensor,
        numbers: Sequence[Tensor],
        here: Problem,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        """Those of a matrix, from the numbers of its rows, and of its columns if these count."""
        every = torch.cat([*numbers]) if problem.column_losses else numbers[0]
        return engine.backward(
            rows,
            columns,
            operands.bias,
            here,
            d_stat=grad * every[:, D_STAT],
            stat=every[:, STAT],
            needs=needs,
            d_pos_logit=None if problem.positives is None else grad * every[:, D_POS_LOGIT],
        )

    totals: Gradients = (None, None, None)
    for block in _blocks(peers, own, everyones):
        here = _met_with(block, problem, peers)
        theirs = [peers.part(x, block.items) for x in received]
        if needs_r or needs_bias:
            numbers, needed = (mine[0], theirs[-1]), (needs_r, False, needs_bias)
            totals = _added(totals, gradients(own[0], block.rows[-1], numbers, here, needed))
        if needs_c:
            assert here.own_columns is not None
            numbers, needed = (theirs[0], mine[-1]), (False, True, False)
            here = replace(here, mask=here.own_columns)
            totals = _added(totals, gradients(block.rows[0], own[-1], numbers, here, needed))
    return totals, grad * d_positive


def _own(operands: Operands) -> list[Tensor]:
    """This process's rows, and its columns where these are not the rows."""
    return [operands.r] if operands.c is None else [operands.r, operands.c]


def _losses_per_item(operands: Operands, problem: Problem) -> int:
    """Whether an item has a loss of its column besides, or only its rows' own: 2 or 1."""
    return 2 if problem.column_losses and operands.c is not None else 1


def _blocks(peers: Peers, own: Sequence[Tensor], everyones: Sequence[Tensor]) -> Iterable[Block]:
    """Everyone's rows: all of them where they were gathered, or else in a ring."""
    if peers.ring:
        return peers.pass_on(*own)
    return [Block(slice(0, sum(peers.batch_sizes)), everyones)]


def _met_with(block: Block, problem: Problem, peers: Peers) -> Problem:
    """The problem of the own rows and columns with this block's."""
    mask, positives = problem.mask, problem.positives
    own_columns = problem.own_columns or mask.transposed()
    assert mask.groups is not None
    assert own_columns.groups is not None
    (rows, all_columns), (all_rows, columns) = mask.groups, own_columns.groups
    if positives is not None:
        positives = replace(positives, columns=peers.part(positives.columns, block.items))
    return replace(
        problem,
        mask=replace(mask, groups=(rows, peers.part(all_columns, block.items))),
        own_columns=replace(own_columns, groups=(peers.part(all_rows, block.items), columns)),
        positives=positives,
    )


def _added(totals: Gradients, parts: Gradients) -> Gradients:
    """The sums of gradients, in the memory of the totals; None is 0."""
    r, c, bias = (
        part if total is None else total if part is None else total.add_(part)
        for total, part in zip(totals, parts, strict=True)
    )
    return r, c, bias
