"""cosloss: cosine-similarity training losses whose gradients are derived by hand and checked."""

from cosloss.functional import (
    cosine_embedding_loss,
    cosine_similarity,
    nt_xent_loss,
    pairwise_cosine_similarity,
)
from cosloss.losses import CosineEmbeddingLoss, CosineSimilarity, NTXentLoss

__all__ = [
    "CosineEmbeddingLoss",
    "CosineSimilarity",
    "NTXentLoss",
    "cosine_embedding_loss",
    "cosine_similarity",
    "nt_xent_loss",
    "pairwise_cosine_similarity",
]
