"""The losses as functions: they check arguments, pick the op and reduce."""

from cosloss.functional.cosine import (
    cosine_embedding_loss,
    cosine_similarity,
    pairwise_cosine_similarity,
)
from cosloss.functional.in_batch_cosine import in_batch_cosine_embedding_loss
from cosloss.functional.info_nce import info_nce_loss
from cosloss.functional.late_interaction import max_sim, max_sim_loss
from cosloss.functional.nt_xent import nt_xent_loss
from cosloss.functional.sigmoid_contrastive import sigmoid_contrastive_loss
from cosloss.functional.sup_con import rows_without_positive, sup_con_loss

__all__ = [
    "cosine_embedding_loss",
    "cosine_similarity",
    "in_batch_cosine_embedding_loss",
    "info_nce_loss",
    "max_sim",
    "max_sim_loss",
    "nt_xent_loss",
    "pairwise_cosine_similarity",
    "rows_without_positive",
    "sigmoid_contrastive_loss",
    "sup_con_loss",
]
