"""The autograd Functions, one file per op; each opens with the derivation of its gradient."""

from cosloss.ops.cosine_similarity import (
    CosineDistance,
    CosineSimilarity,
    cosine_distance,
    cosine_similarity,
)
from cosloss.ops.in_batch import InBatch, in_batch
from cosloss.ops.in_batch_pairs import InBatchPairs, in_batch_pairs
from cosloss.ops.pairwise_cosine_similarity import (
    PairwiseCosineSimilarity,
    pairwise_cosine_similarity,
)
from cosloss.ops.unit_rows import UnitRows, unit_pairs, unit_rows

__all__ = [
    "CosineDistance",
    "CosineSimilarity",
    "InBatch",
    "InBatchPairs",
    "PairwiseCosineSimilarity",
    "UnitRows",
    "cosine_distance",
    "cosine_similarity",
    "in_batch",
    "in_batch_pairs",
    "pairwise_cosine_similarity",
    "unit_pairs",
    "unit_rows",
]
