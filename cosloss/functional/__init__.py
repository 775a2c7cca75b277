"""The losses as functions: they check arguments, pick the op and reduce."""

from cosloss.functional.contrastive import nt_xent_loss
from cosloss.functional.cosine import (
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
