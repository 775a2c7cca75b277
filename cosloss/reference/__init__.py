"""The twins: each loss of `cosloss.functional`, same signature, in plain autograd torch code."""

from cosloss.reference.contrastive import (
    info_nce_loss,
    nt_xent_loss,
    sigmoid_contrastive_loss,
    sup_con_loss,
)
from cosloss.reference.cosine import (
    cosine_embedding_loss,
    cosine_similarity,
    in_batch_cosine_embedding_loss,
    pairwise_cosine_similarity,
)
from cosloss.reference.late_interaction import max_sim, max_sim_loss

__all__ = [
    "cosine_embedding_loss",
    "cosine_similarity",
    "in_batch_cosine_embedding_loss",
    "info_nce_loss",
    "max_sim",
    "max_sim_loss",
    "nt_xent_loss",
    "pairwise_cosine_similarity",
    "sigmoid_contrastive_loss",
    "sup_con_loss",
]
