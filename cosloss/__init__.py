"""cosloss: cosine-similarity training losses whose gradients are derived by hand and checked."""

from cosloss.functional import (
    cosine_embedding_loss,
    cosine_similarity,
    in_batch_cosine_embedding_loss,
    info_nce_loss,
    max_sim,
    max_sim_loss,
    nt_xent_loss,
    pairwise_cosine_similarity,
    sigmoid_contrastive_loss,
    sup_con_loss,
)
from cosloss.grad_cache import GradCache, encode_in_chunks
from cosloss.kernels.scratch import release_memory
from cosloss.losses import (
    CosineEmbeddingLoss,
    CosineSimilarity,
    InfoNCELoss,
    MaxSimLoss,
    MemoryBank,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
)

__all__ = [
    "CosineEmbeddingLoss",
    "CosineSimilarity",
    "GradCache",
    "InfoNCELoss",
    "MaxSimLoss",
    "MemoryBank",
    "NTXentLoss",
    "SigmoidContrastiveLoss",
    "SupConLoss",
    "cosine_embedding_loss",
    "cosine_similarity",
    "encode_in_chunks",
    "in_batch_cosine_embedding_loss",
    "info_nce_loss",
    "max_sim",
    "max_sim_loss",
    "nt_xent_loss",
    "pairwise_cosine_similarity",
    "release_memory",
    "sigmoid_contrastive_loss",
    "sup_con_loss",
]
