"""Kernels in Triton, for the GPUs that it compiles for; nothing outside this folder imports it."""

from cosloss.kernels.triton import cosine_similarity, in_batch, unit_rows

__all__ = ["cosine_similarity", "in_batch", "unit_rows"]
