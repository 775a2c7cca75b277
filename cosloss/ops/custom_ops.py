"""The ops as torch.compile sees them where Triton computes them: calls that it does not look into.

Each is a custom op with a gradient of its own, which is a custom op too, once differentiable. They
call the backend for their tensors, so that they are right on every device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from cosloss.kernels.dispatch import backend, wants_triton
from cosloss.modes import forward_mode, transforming
from cosloss.problem import Problem

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # the products', by number: torch.library has no lists of dtypes


def suits(*tensors: Tensor) -> bool:
    """Whether these are Triton's under torch.compile, and differentiated once and backwards."""
    return (
        torch.compiler.is_dynamo_compiling()
        and not forward_mode()
        and not transforming()
        and wants_triton(*tensors)
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


@custom_op("cosloss::in_batch_stats", mutates_args=())
def _stats(
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    pair: Tensor | None,
    ids: Sequence[Tensor],
    spec: Sequence[int],
    margin: float,
) -> tuple[Tensor, Tensor]:
    """Every loss's statistic, and its positive.

    pair: the positives as they are; None where each is the mean of several of the matrix, and its
        gradient goes to r with the statistics' own.
    ids, spec, margin: a dtype's number in DTYPES, and the problem, flattened.
    """
    problem, r, c = _problem(ids, spec, margin), *_rounded(r, c, spec)
    with torch.no_grad():
        stat = backend(r, c).in_batch.forward(r, c, bias, problem)
        if pair is not None:
            return stat, pair.clone()
        assert problem.positives is not None
        positives = problem.positives.numbered()
        return stat, positives.mean_logits(r, positives.class_sums(r))


@_stats.register_fake
def _(
    r: Tensor, c: Any, bias: Any, pair: Any, ids: Any, spec: Sequence[int], margin: float
) -> tuple[Tensor, Tensor]:
    n = r.shape[0]
    losses = n if c is None or not spec[2] else n + c.shape[0]
    positive = r.new_empty(n) if pair is None else torch.empty_like(pair)
    return r.new_empty(losses, dtype=torch.float64), positive


@custom_op("cosloss::in_batch_grads", mutates_args=())
def _grads(
    given: Sequence[Tensor],
    operands: Sequence[Tensor | None],
    ids: Sequence[Tensor],
    spec: Sequence[int],
    margin: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients on r, c and bias that are needed; given: d_stat, d_positive and stat."""
    (d_stat, d_positive, stat), (r, c, bias) = given, operands
    assert r is not None
    problem, r, c = _problem(ids, spec, margin), *_rounded(r, c, spec)
    needed = needs[0], needs[1], needs[2]
    d_pos_logit = problem.d_pos_logit(d_positive)
    with torch.no_grad():
        found = backend(r, c).in_batch.backward(
            r, c, bias, problem, d_stat=d_stat, stat=stat, needs=needed, d_pos_logit=d_pos_logit
        )
    return [x for x in found if x is not None]


@_grads.register_fake
def _(given: Any, operands: Any, ids: Any, spec: Any, margin: float, needs: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip(operands, needs, strict=True) if need]


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    r, c, bias, _, ids, ctx.spec, ctx.margin = inputs
    ctx.save_for_backward(r, c, bias, output[0], *ids)


def _through_stats(ctx: Any, d_stat: Tensor, d_positive: Tensor) -> tuple[Any, ...]:
    r, c, bias, stat, *ids = ctx.saved_tensors
    needs_r, needs_c, needs_bias, needs_pair, *_ = ctx.needs_input_grad
    needs = [needs_r, needs_c, needs_bias]
    given = [d_stat, d_positive, stat]
    found = iter(_grads(given, [r, c, bias], ids, ctx.spec, ctx.margin, needs))
    d_r, d_c, d_bias = (next(found) if need else None for need in needs)
    d_pair = d_positive if needs_pair else None
    return d_r, d_c, d_bias, d_pair, [None] * len(ids), None, None


_stats.register_autograd(_through_stats, setup_context=_save_stats)


def in_batch_stats(
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    pair: Tensor | None,
    problem: Problem,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Every loss's statistic and its positive, differentiable but in the ids."""
    ids, spec, margin = problem.flatten()
    stat, positive = _stats(r, c, bias, pair, ids, [DTYPES.index(dtype), *spec], margin)
    return stat, positive


def _problem(ids: Sequence[Tensor], spec: Sequence[int], margin: float) -> Problem:
    return Problem.unflatten(ids, spec[1:], margin)


def _rounded(r: Tensor, c: Tensor | None, spec: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    dtype = DTYPES[spec[0]]
    return r.to(dtype), None if c is None else c.to(dtype)
