"""The autograd Functions, one file per op; each opens with the derivation of its gradient."""

from cosloss.ops.cosine_similarity import CosineSimilarity
from cosloss.ops.in_batch_cosine_embedding import InBatchCosineEmbedding
from cosloss.ops.nt_xent import NTXent

__all__ = ["CosineSimilarity", "InBatchCosineEmbedding", "NTXent"]
