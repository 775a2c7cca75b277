"""Row normalisation, reduction and prefixes that the twins share."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

OF_PREFIXES = ("dims", "dim_weights")


def unit_rows(z: Tensor) -> Tensor:
    """Rows of z, (N, D), scaled to unit norm at any non-zero scale; a zero row stays zero.

    A zero row's gradient is zero as well: the multiplication by `nonzero` cuts it.
    """
    largest = z.detach().abs().amax(dim=1, keepdim=True)
    scaled = z / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    nonzero = norm != 0
    return scaled / torch.where(nonzero, norm, 1) * nonzero


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The loss itself ("none"), its sum, or its mean."""
    return loss if reduction == "none" else getattr(loss, reduction)()


def over_prefixes(*embeddings: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Give a twin `dims` and `dim_weights`: sum_k w_k of it, over those arguments' first columns.

    Kusupati et al., "Matryoshka Representation Learning", 2022, eq. 1.
    """

    def decorate(twin: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(twin)

        @wraps(twin)
        def summed(
            *args: Any,
            dims: Sequence[int] | None = None,
            dim_weights: Sequence[float] | None = None,
            **options: Any,
        ) -> Tensor:
            if dims is None:
                return twin(*args, **options)
            given = signature.bind(*args, **options).arguments
            losses = []
            for dim, weight in zip(dims, dim_weights or [1.0] * len(dims), strict=True):
                short = {
                    name: x[..., :dim] if name in embeddings and x is not None else x
                    for name, x in given.items()
                }
                losses.append(weight * twin(**short))
            return torch.stack(losses).sum(0)

        own = signature.parameters.values()
        further = [
            inspect.signature(summed, follow_wrapped=False).parameters[x] for x in OF_PREFIXES
        ]
        summed.__signature__ = signature.replace(parameters=[*own, *further])  # type: ignore[attr-defined]
        return summed

    return decorate
