"""The prefixes of the embeddings over which a loss is taken (Matryoshka)."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from cosloss.arguments import check_count, check_each, check_number

Dims = Sequence[int] | None
DimWeights = Sequence[float] | None


def check_dims(dims: Dims, dim_weights: DimWeights, z: Tensor | None = None) -> None:
    """Raise unless dims are several numbers of columns, at most z's, with a weight each."""
    if dim_weights is not None:
        check_each("dim_weights", dim_weights, (int, float), "numbers")
        for weight in dim_weights:
            check_number("each of dim_weights", weight)
    if dims is None:
        if dim_weights is not None:
            raise ValueError(f"dim_weights are those of dims; got {[*dim_weights]} alone")
        return
    check_each("dims", dims, int, "whole numbers")
    for dim in dims:
        check_count("each of dims", dim)
    if len(dims) == 0 or len(set(dims)) < len(dims):
        raise ValueError(f"dims must hold different numbers, at least one; got {[*dims]}")
    if z is not None and max(dims) > z.shape[-1]:
        raise ValueError(
            f"dims must be at most the embeddings' {z.shape[-1]} columns; got {max(dims)}"
        )
    if dim_weights is not None and len(dim_weights) != len(dims):
        raise ValueError(
            f"dim_weights must hold a number for each of dims, {len(dims)}; got {len(dim_weights)}"
        )


def weighted_dims(dims: Sequence[int], dim_weights: DimWeights) -> Iterator[tuple[int, float]]:
    """The dims from the smallest on, with their weights, 1 each by default."""
    weights = [1.0] * len(dims) if dim_weights is None else dim_weights
    return iter(sorted(zip(dims, weights, strict=True)))
