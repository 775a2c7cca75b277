"""The losses as modules: they hold hyperparameters and call `cosloss.functional`."""

from cosloss.losses.contrastive import (
    InfoNCELoss,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
)
from cosloss.losses.cosine import CosineEmbeddingLoss, CosineSimilarity
from cosloss.losses.late_interaction import MaxSimLoss
from cosloss.losses.memory_bank import MemoryBank

__all__ = [
    "CosineEmbeddingLoss",
    "CosineSimilarity",
    "InfoNCELoss",
    "MaxSimLoss",
    "MemoryBank",
    "NTXentLoss",
    "SigmoidContrastiveLoss",
    "SupConLoss",
]
