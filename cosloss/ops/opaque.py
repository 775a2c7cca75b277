"""The ops as torch.compile sees them where Triton computes them: calls that it does not look into.

Each is a custom op with a gradient of its own, which is a custom op too, once differentiable. What
they call is the backend for their tensors, so that they are right on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from cosloss.criteria import (
    CosineEmbedding,
    Criterion,
    DecoupledCrossEntropy,
    SigmoidContrast,
)
from cosloss.kernels.dispatch import backend, wants_triton
from cosloss.modes import forward_mode, transforming
from cosloss.problem import Mask, PositiveMask, Problem


def opaque(*tensors: Tensor | None) -> bool:
    """Whether these are Triton's under torch.compile, and differentiated once and backwards."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.compiler.is_dynamo_compiling()
        and not forward_mode()
        and not transforming()
        and wants_triton(*given)
    )


@custom_op("cosloss::cosine_similarity", mutates_args=())
def cosine_similarity(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> Tensor:
    """Row-wise similarities, or 1 less them."""
    with torch.no_grad():
        kernel = backend(x1, x2).cosine_similarity
        return (kernel.distance_forward if distance else kernel.forward)(x1, x2, eps)


@cosine_similarity.register_fake
def _(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> Tensor:
    return x1.new_empty(x1.shape[:-1])


@custom_op("cosloss::cosine_similarity_backward", mutates_args=())
def cosine_similarity_backward(
    grad: Tensor, x1: Tensor, x2: Tensor, eps: float, needs: list[bool]
) -> list[Tensor]:
    """The gradients that are needed."""
    with torch.no_grad():
        kernel = backend(grad, x1, x2).cosine_similarity
        return [x for x in kernel.backward(grad, x1, x2, eps, tuple(needs)) if x is not None]


@cosine_similarity_backward.register_fake
def _(grad: Tensor, x1: Tensor, x2: Tensor, eps: float, needs: list[bool]) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip((x1, x2), needs, strict=True) if need]


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x1, x2, ctx.eps, ctx.distance = inputs
    ctx.save_for_backward(x1, x2)


def _through_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x1, x2 = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grad = -grad if ctx.distance else grad
    found = iter(cosine_similarity_backward(grad, x1, x2, ctx.eps, needs))
    return *(next(found) if need else None for need in needs), None, None


cosine_similarity.register_autograd(_through_rows, setup_context=_save_rows)


@custom_op("cosloss::in_batch_totals", mutates_args=())
def _totals(
    r: Tensor,
    c: Tensor | None,
    positive: Tensor,
    bias: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    row_classes: Tensor | None,
    column_classes: Tensor | None,
    row_positives: Tensor | None,
    column_positives: Tensor | None,
    positives_count: Tensor | None,
    diagonals: list[int],
    two_way: bool,
    kind: str,
    parameter: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The totals, and the positives' logits as they are given.

    The gradient on these goes to `positive`, or, where each is the mean of several of the matrix,
    to r with the totals' own.
    """
    with torch.no_grad():
        matrix = Problem(
            _loss_of(kind, parameter),
            _excluded(diagonals, row_groups, column_groups, row_classes, column_classes),
            two_way,
            dtype,
            _positives(row_positives, column_positives, positives_count),
        )
        return backend(r, c).in_batch.forward(r, c, bias, matrix), positive.clone()


@_totals.register_fake
def _(
    r: Tensor, c: Tensor | None, positive: Tensor, bias: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, two_way, _kind, _parameter, _dtype = rest
    columns = c.shape[0] if c is not None and two_way else 0
    return r.new_empty(r.shape[0] + columns, dtype=torch.float64), torch.empty_like(positive)


@custom_op("cosloss::in_batch_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    grad_positive: Tensor,
    total: Tensor,
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    row_classes: Tensor | None,
    column_classes: Tensor | None,
    row_positives: Tensor | None,
    column_positives: Tensor | None,
    positives_count: Tensor | None,
    diagonals: list[int],
    two_way: bool,
    kind: str,
    parameter: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    with torch.no_grad():
        matrix = Problem(
            _loss_of(kind, parameter),
            _excluded(diagonals, row_groups, column_groups, row_classes, column_classes),
            two_way,
            dtype,
            _positives(row_positives, column_positives, positives_count),
        )
        found = backend(r, c).in_batch.backward(
            grad, total, r, c, bias, matrix, tuple(needs), matrix.d_pos_logit(grad_positive)
        )
        return [x for x in found if x is not None]


@_gradients.register_fake
def _(
    grad: Tensor, grad_positive: Tensor, total: Tensor, r: Tensor, c: Any, bias: Any, *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip((r, c, bias), rest[-1], strict=True) if need]


def _save_totals(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    r, c, _, bias, *ids = inputs[:11]
    ctx.save_for_backward(r, c, bias, output[0], *ids)
    ctx.plain = inputs[11:]


def _through_totals(ctx: Any, grad: Tensor, grad_positive: Tensor) -> tuple[Any, ...]:
    r, c, bias, total, *ids = ctx.saved_tensors
    needs_r, needs_c, needs_positive, needs_bias, *_ = ctx.needs_input_grad
    needs = [needs_r, needs_c, needs_bias]
    found = iter(_gradients(grad, grad_positive, total, r, c, bias, *ids, *ctx.plain, needs))
    grad_r, grad_c, grad_bias = (next(found) if need else None for need in needs)
    to_positive = grad_positive if needs_positive else None
    return grad_r, grad_c, to_positive, grad_bias, *([None] * len([*ids, *ctx.plain]))


_totals.register_autograd(_through_totals, setup_context=_save_totals)


def in_batch_totals(
    r: Tensor, c: Tensor | None, positive: Tensor, bias: Tensor | None, matrix: Problem
) -> tuple[Tensor, Tensor]:
    """The totals of a logit matrix and the positives' logits, differentiable but in the ids."""
    kind, parameter = matrix.criterion.kind, matrix.criterion.margin
    pairs, positives = matrix.mask, matrix.positives
    own = () if positives is None else (positives.rows, positives.columns, positives.count)
    total, positive = _totals(
        *(r, c, positive, bias, *pairs.ids, *(own or (None, None, None)), list(pairs.diagonals)),
        *(matrix.column_losses, kind, parameter, matrix.dtype),
    )
    return total, positive


def _loss_of(kind: str, margin: float) -> Criterion:
    """A criterion with this statistic, whatever loss it makes of it."""
    if kind == "hinge":
        return CosineEmbedding(margin, negatives=1)
    if kind == "softplus":
        return SigmoidContrast()
    return DecoupledCrossEntropy(0.0 if kind == "exp" else torch.inf)


def _excluded(
    diagonals: list[int],
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    row_classes: Tensor | None,
    column_classes: Tensor | None,
) -> Mask:
    groups = classes = None
    if row_groups is not None and column_groups is not None:
        groups = row_groups, column_groups
    if row_classes is not None and column_classes is not None:
        classes = row_classes, column_classes
    return Mask(tuple(diagonals), groups, classes)


def _positives(
    rows: Tensor | None, columns: Tensor | None, count: Tensor | None
) -> PositiveMask | None:
    if rows is None or columns is None or count is None:
        return None
    return PositiveMask(rows, columns, count)
