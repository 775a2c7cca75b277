"""The ops as torch.compile sees them where Triton computes them: calls that it does not look into.

Each is a custom op with a gradient of its own, which is a custom op too, once differentiable. What
they call is the backend for their tensors, so that they are right on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import custom_op

from cosloss.kernels.dispatch import backend, wants_triton
from cosloss.kernels.eager.cross_entropy import Contrast
from cosloss.kernels.eager.in_batch_cosine_embedding import CosineEmbedding
from cosloss.kernels.eager.sigmoid_contrastive import SigmoidContrast
from cosloss.kernels.eager.tile_loss import LogSumExpLoss, TileLoss
from cosloss.kernels.eager.tiles import Excluded
from cosloss.kernels.eager.walk import Matrix


def opaque(*tensors: Tensor | None) -> bool:
    """Whether these are Triton's under torch.compile, and differentiated once and backwards."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.compiler.is_dynamo_compiling()
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
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
    bias: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    row_classes: Tensor | None,
    column_classes: Tensor | None,
    diagonals: list[int],
    two_way: bool,
    kind: str,
    parameter: float,
    dtype: torch.dtype,
) -> Tensor:
    with torch.no_grad():
        matrix = _matrix(
            (row_groups, column_groups, row_classes, column_classes),
            diagonals,
            two_way,
            kind,
            parameter,
            dtype,
        )
        return backend(r, c).in_batch.forward(r, c, bias, matrix, False)[0]


@_totals.register_fake
def _(r: Tensor, c: Tensor | None, bias: Any, *rest: Any) -> Tensor:
    *_, two_way, _kind, _parameter, _dtype = rest
    columns = c.shape[0] if c is not None and two_way else 0
    return r.new_empty(r.shape[0] + columns, dtype=torch.float64)


@custom_op("cosloss::in_batch_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    total: Tensor,
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    row_classes: Tensor | None,
    column_classes: Tensor | None,
    diagonals: list[int],
    two_way: bool,
    kind: str,
    parameter: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    with torch.no_grad():
        matrix = _matrix(
            (row_groups, column_groups, row_classes, column_classes),
            diagonals,
            two_way,
            kind,
            parameter,
            dtype,
        )
        engine = backend(r, c).in_batch
        found = engine.backward(grad, total, r, c, bias, matrix, None, tuple(needs))
        return [x for x in found if x is not None]


@_gradients.register_fake
def _(grad: Tensor, total: Tensor, r: Tensor, c: Any, bias: Any, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip((r, c, bias), rest[-1], strict=True) if need]


def _save_totals(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    r, c, bias, row_groups, column_groups, row_classes, column_classes, *ctx.plain = inputs
    ids = row_groups, column_groups, row_classes, column_classes
    ctx.save_for_backward(r, c, bias, output, *ids)


def _through_totals(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    r, c, bias, total, *ids = ctx.saved_tensors
    given = zip((r, c, bias), ctx.needs_input_grad, strict=False)
    needs = [x is not None and need for x, need in given]
    found = iter(_gradients(grad, total, r, c, bias, *ids, *ctx.plain, needs))
    return *(next(found) if need else None for need in needs), *([None] * 9)


_totals.register_autograd(_through_totals, setup_context=_save_totals)


def in_batch_totals(r: Tensor, c: Tensor | None, bias: Tensor | None, matrix: Matrix) -> Tensor:
    """The totals of a logit matrix, differentiable with respect to r, c and bias."""
    kind, parameter = _total_of(matrix.loss)
    pairs = matrix.excluded
    return _totals(
        *(r, c, bias, *pairs.ids, list(pairs.offsets)),
        *(matrix.two_way, kind, parameter, matrix.dtype),
    )


def _total_of(loss: TileLoss) -> tuple[str, float]:
    """What determines a loss's totals: their kind, and a number."""
    if isinstance(loss, LogSumExpLoss):
        return "logsumexp", loss.largest_logit
    if isinstance(loss, CosineEmbedding):
        return "hinge", loss.margin
    assert isinstance(loss, SigmoidContrast)
    return "softplus", 0.0


def _matrix(
    ids: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    diagonals: list[int],
    two_way: bool,
    kind: str,
    parameter: float,
    dtype: torch.dtype,
) -> Matrix:
    """A matrix with these totals, whatever is made of them."""
    loss: TileLoss = SigmoidContrast()
    if kind == "logsumexp":
        loss = Contrast(parameter)
    elif kind == "hinge":
        loss = CosineEmbedding(parameter, negatives=1)
    groups, classes = _both(*ids[:2]), _both(*ids[2:])
    return Matrix(loss, Excluded(tuple(diagonals), groups, classes), two_way, dtype)


def _both(rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if rows is None or columns is None else (rows, columns)
