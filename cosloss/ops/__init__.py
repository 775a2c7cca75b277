"""The autograd Functions, one file per op; each opens with the derivation of its gradient."""

from cosloss.ops.cosine_similarity import (
    CosineDistance,
    CosineSimilarity,
    cosine_distance,
    cosine_similarity,
)
from cosloss.ops.in_batch_cosine_embedding import InBatchCosineEmbedding
from cosloss.ops.nt_xent import NTXent
from cosloss.ops.pairwise_cosine_similarity import (
    PairwiseCosineSimilarity,
    pairwise_cosine_similarity,
)

__all__ = [
    "CosineDistance",
    "CosineSimilarity",
    "InBatchCosineEmbedding",
    "NTXent",
    "PairwiseCosineSimilarity",
    "cosine_distance",
    "cosine_similarity",
    "pairwise_cosine_similarity",
]
