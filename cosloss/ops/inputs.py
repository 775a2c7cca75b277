"""The gradients on an in-batch loss's inputs by a backend whose kernels reach the embeddings.

`cosloss.ops.operands` has what they are of, and the way there by the operands' own gradients.
"""

from collections.abc import Sequence

from torch import Tensor

from cosloss.kernels.inputs import InputGrads, Inputs, Source
from cosloss.ops.operands import Operands, Rows, d_pair_of, temperature_grad
from cosloss.problem import Problem


def inputs_of(
    rows: Rows,
    temperature: float | Tensor,
    problem: Problem,
    operands: Operands,
    d_positive: Tensor,
    needs: Sequence[bool],
    factor: Tensor | None = None,
) -> Inputs:
    """What the operands are made of; needs: a gradient on temperature, bias, and each of the rows.

    factor: of the gradients on rows; the others are not needed then.
    """
    first, second, negatives = rows
    needs_temperature, needs_bias, *needs_rows = needs
    along = isinstance(temperature, Tensor) and needs_temperature
    d_pair = d_pair_of(operands, d_positive, problem)
    # a sum over all rows wants every row's
    wanted = [need or along or needs_bias for need in needs_rows]
    norm, n = operands.norms[0], first.shape[0]
    of_columns, apart = [], []
    if second is None:
        of_rows = [Source(first, norm, wanted[0])]
    else:
        of_rows = [Source(first, norm[:n], wanted[0], second, norm[n:])]
        of_second = Source(second, norm[n:], wanted[1], first, norm[:n])
        if problem.self_similarity:
            of_rows.append(of_second)
        elif negatives is None or problem.negatives_beside:
            of_columns.append(of_second)
        else:
            apart.append(of_second)
    if negatives is not None:
        of_columns.append(Source(negatives, operands.norms[1], wanted[2]))
    pulls = [] if d_pair is None else d_pair.split(n)
    return Inputs(of_rows, of_columns, apart, operands.scale, pulls, factor, along, needs_bias)


def grads_of_inputs(
    found: InputGrads,
    rows: Rows,
    temperature: float | Tensor,
    problem: Problem,
    operands: Operands,
    d_positive: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients on temperature, bias and rows, where needed, from those on the sources."""
    d_temperature = d_bias = None
    if isinstance(temperature, Tensor) and found.along is not None:
        d_pair = d_pair_of(operands, d_positive, problem)
        d_temperature = temperature_grad(temperature, found.along, operands.pair, d_pair)
    if found.bias is not None:
        d_bias = found.bias + d_positive.sum().to(found.bias.dtype)
    of_rows = iter(found.sources)
    d_rows = [None if x is None else next(of_rows) for x in rows]
    _, second, negatives = rows
    if second is not None and negatives is not None and not problem.negatives_beside:
        d_rows[1:] = d_rows[:0:-1]  # a second view that is in pairs alone comes last
    return [
        grad if need else None
        for grad, need in zip((d_temperature, d_bias, *d_rows), needs, strict=True)
    ]
