"""The twins: each loss of `cosloss.functional`, same signature, in plain autograd torch code."""

from cosloss.reference.contrastive import nt_xent_loss
from cosloss.reference.cosine import (
    cosine_embedding_loss,
    cosine_similarity,
    pairwise_cosine_similarity,
)

__all__ = [
    "cosine_embedding_loss",
    "cosine_similarity",
    "nt_xent_loss",
    "pairwise_cosine_similarity",
]
