"""Kernels in plain torch operations: they run on every device and judge the other backends."""

from cosloss.kernels.eager import cosine_similarity, in_batch, max_sim, unit_rows

__all__ = ["cosine_similarity", "in_batch", "max_sim", "unit_rows"]
