"""The losses as modules: they hold hyperparameters and call `cosloss.functional`."""

from cosloss.losses.contrastive import (
    InfoNCELoss,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
)
from cosloss.losses.cosine import CosineEmbeddingLoss, CosineSimilarity

__all__ = [
    "CosineEmbeddingLoss",
    "CosineSimilarity",
    "InfoNCELoss",
    "NTXentLoss",
    "SigmoidContrastiveLoss",
    "SupConLoss",
]
