"""Kernels in C++ for tensors in a CPU's memory, where the installation could compile them."""

from cosloss.kernels.native import (
    cosine_similarity,
    in_batch,
    pairwise_cosine_similarity,
    unit_rows,
)

__all__ = ["cosine_similarity", "in_batch", "pairwise_cosine_similarity", "unit_rows"]
