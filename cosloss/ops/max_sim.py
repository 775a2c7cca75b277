"""The op of late interaction: MaxSim scores, whose gradient goes to each maximum's own token.

With u = x / |x| for the tokens x of the queries, v likewise for those of the documents, and
t(b, q, c) the first t at which <u_bq, v_ct> is largest,

    s_bc = sum_q <u_bq, v_ct(b,q,c)>.

Away from ties t(b, q, c) does not change, and s is bilinear in the rows it is made of. A gradient G
on s gives

    grad_u_bq = sum_c G_bc v_ct(b,q,c),    grad_v_ct = sum of G_bc u_bq where t(b,q,c) = t,

    grad_x = (grad_u - <grad_u, u> u) / |x|.

Positions t are kept from the forward pass; unit rows are computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cosloss.kernels import dispatch, eager
from cosloss.modes import differentiates_itself, without_autocast

Masks = tuple[Tensor | None, Tensor | None]  # the queries' and the documents'


def max_sim(queries: Tensor, documents: Tensor, masks: Masks) -> Tensor:
    """Scores (B, C) of tokens (B, Q, D) and (C, T, D) of one dtype; at least float32."""
    dtype = dispatch.wide_product_dtype(queries)
    if differentiates_itself(queries, documents, *masks):
        return composition(queries, documents, masks, dtype)
    if not torch.is_grad_enabled():  # a Function sees requires_grad alone
        queries, documents = queries.detach(), documents.detach()
    return MaxSim.apply(queries, documents, *masks, dtype)


class MaxSim(Function):
    """The scores by tiles; their second derivative is the composition's."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        given = queries, documents, query_mask, document_mask
        ctx.unit_rows, ctx.dtype = dispatch.in_batch(queries, documents).unit_rows, dtype
        with without_autocast(queries):
            scores, positions = eager.max_sim.forward(
                ctx.unit_rows, *given, dtype, keep=any(ctx.needs_input_grad)
            )
        ctx.save_for_backward(*given, positions)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), needs = grads, ctx.needs_input_grad[:2]
        queries, documents, query_mask, document_mask, positions = ctx.saved_tensors
        masks = query_mask, document_mask
        if torch.is_grad_enabled() or differentiates_itself(grad):
            return *_composed_grads(ctx, grad, queries, documents, masks), None, None, None
        with without_autocast(queries):
            found = eager.max_sim.backward(
                ctx.unit_rows, grad, queries, documents, *masks, positions, needs
            )
        return *found, None, None, None


def composition(queries: Tensor, documents: Tensor, masks: Masks, dtype: torch.dtype) -> Tensor:
    """The scores as operations that torch differentiates any number of times.

    The tensor of all similarities is in memory.
    """
    query_mask, document_mask = masks
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(queries):
        given = zip((queries, documents), masks, strict=True)
        u, v = (
            eager.max_sim.unit_tokens(eager.unit_rows, eager.max_sim.kept(x, mask), dtype)[0]
            for x, mask in given
        )
        x = (u @ v.T).to(wide).view(*queries.shape[:2], *documents.shape[:2])
        if document_mask is not None:
            x = x.masked_fill(~document_mask, -torch.inf)
        best = x.max(3).values
        if document_mask is not None:
            best = best.masked_fill(~document_mask.any(1), 0)
        if query_mask is not None:
            best = best.masked_fill(~query_mask[..., None], 0)
        return best.sum(1)


def _composed_grads(
    ctx: Any, grad: Tensor, queries: Tensor, documents: Tensor, masks: Masks
) -> list[Tensor | None]:
    """The gradients on the tokens, differentiable if they are to be."""
    create_graph, needs = torch.is_grad_enabled(), ctx.needs_input_grad[:2]
    with torch.enable_grad():
        # aliases, since one input may be a function of the other
        inputs = queries.view_as(queries), documents.view_as(documents)
        scores = composition(*inputs, masks, ctx.dtype)
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(scores, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
