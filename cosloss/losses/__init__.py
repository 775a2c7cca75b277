"""The losses as modules: they hold hyperparameters and call `cosloss.functional`."""

from cosloss.losses.contrastive import NTXentLoss
from cosloss.losses.cosine import CosineEmbeddingLoss, CosineSimilarity

__all__ = ["CosineEmbeddingLoss", "CosineSimilarity", "NTXentLoss"]
