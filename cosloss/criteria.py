"""The criteria of the in-batch losses: how a row's statistic and its positive become its loss.

A row's statistic is taken over the logits of its pairs, tile by tile: their logsumexp (lse), or a
sum of f(x_ij). A criterion says which, by a `kind` that every backend knows, and what follows from
it; it knows nothing of tiles or devices.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import softplus

# exp(40), exp(-40) and sums of them over any batch are normal numbers in float32 and bfloat16
LARGEST_UNSHIFTED_LOGIT = 40.0
KINDS = ("exp", "logsumexp", "softplus", "hinge")
# torch's softplus is its argument beyond the threshold: off by exp(-40) at most
THRESHOLD = 40.0


def empty_lse(dtype: torch.dtype) -> float:
    """The finite stand-in for log 0, the logsumexp of a row without pairs."""
    return torch.finfo(dtype).min / 4


class Criterion(ABC):
    """loss_i = loss(stat_i, positive_i), the statistic taken over row i of a logit matrix.

    kind: the statistic: "exp" or "logsumexp", the logsumexp of logits that are small or of any
        size; "softplus" or "hinge", the sum of log(1 + exp(x)) or of max(0, x - margin).
    linear: whether `loss` is linear in the statistic, so that d_stat is known before the statistic.
    distance: whether the positive is the distance 1 - S in place of a logit.
    share: the share of each logit that has a gradient, where the rest is a constant to it.
    formula: the loss's name to a backend that computes it in the kernel of the statistic, if any.
    """

    kind: str
    margin = 0.0
    linear = False
    distance = False
    share: float | Tensor | None = None
    formula: str | None = None

    @abstractmethod
    def dense_stat(self, x: Tensor, dim: int) -> Tensor:
        """The statistic along `dim` of the whole matrix, differentiable.

        Mask pairs have a logit that is finite and lower than any other can be.
        """

    @abstractmethod
    def loss(self, stat: Tensor, positive: Tensor) -> Tensor:
        """Each row's loss, differentiable."""

    @abstractmethod
    def loss_grad(self, stat: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """d_stat and d_positive, the derivatives of `loss` in its two arguments."""


class LogSumExpCriterion(Criterion):
    """Abstract: the statistic is the lse of a row's logits.

    largest_logit: a bound on every logit's magnitude; infinity if none is known.
    """

    def __init__(self, largest_logit: float = torch.inf) -> None:
        self.kind = "exp" if largest_logit <= LARGEST_UNSHIFTED_LOGIT else "logsumexp"

    def dense_stat(self, x: Tensor, dim: int) -> Tensor:
        return x.logsumexp(dim)


class CrossEntropy(LogSumExpCriterion):
    """NT-Xent and InfoNCE, the lse over the negatives; without negatives the loss is 0.

    loss = -positive + log(exp(positive) + exp(lse)) = softplus(lse - positive).
    """

    formula = "cross_entropy"

    def loss(self, stat: Tensor, positive: Tensor) -> Tensor:
        return softplus(stat - positive, threshold=THRESHOLD)

    def loss_grad(self, stat: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        d_lse = torch.sigmoid(stat - positive)
        return d_lse, -d_lse


class DecoupledCrossEntropy(LogSumExpCriterion):
    """Decoupled NT-Xent, and SupCon, whose lse has the positives; without a pair the loss is 0.

    loss = lse - positive.
    """

    formula = "decoupled"

    def loss(self, stat: Tensor, positive: Tensor) -> Tensor:
        return (stat - positive).masked_fill(_without_pairs(stat), 0)

    def loss_grad(self, stat: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        d_lse = (~_without_pairs(stat)).to(stat.dtype)
        return d_lse, -d_lse


class NegativesLogSumExp(LogSumExpCriterion):
    """The lse over a row's pairs itself, for what becomes a loss with other rows' statistics.

    Without a pair it is a finite stand-in for log 0, in float32 too, with gradient 0.
    """

    def __init__(self, largest_logit: float, share: float | Tensor | None) -> None:
        super().__init__(largest_logit)
        self.share = share

    def loss(self, stat: Tensor, positive: Tensor) -> Tensor:
        return stat.clamp(min=empty_lse(torch.float32))

    def loss_grad(self, stat: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        d_lse = (~_without_pairs(stat)).to(stat.dtype)
        return d_lse if self.share is None else self.share * d_lse, torch.zeros_like(positive)


class SigmoidContrast(Criterion):
    """SigLIP: every pair a binary classification of its own, same item or not.

    loss = softplus(-positive) + sum over the row's negatives of softplus(x).
    """

    kind = "softplus"
    linear = True

    def dense_stat(self, x: Tensor, dim: int) -> Tensor:
        return softplus(x, threshold=THRESHOLD).sum(dim)

    def loss(self, stat: Tensor, positive: Tensor) -> Tensor:
        return softplus(-positive, threshold=THRESHOLD) + stat

    def loss_grad(self, stat: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(stat), -torch.sigmoid(-positive)


class CosineEmbedding(Criterion):
    """PositiveMask pulled to similarity 1, negatives pushed below the margin; a logit is S itself.

    loss = positive + (sum over the row's negatives of max(0, S - margin)) / negatives, the positive
    given as its distance 1 - S, which is accurate where S is near 1.

    negatives: a number or one per row: how many there are, over their weight.
    """

    kind = "hinge"
    linear = True
    distance = True

    def __init__(self, margin: float, negatives: float | Tensor) -> None:
        self.margin = margin
        self.negatives = negatives

    def dense_stat(self, x: Tensor, dim: int) -> Tensor:
        return torch.relu(x - self.margin).sum(dim)

    def loss(self, stat: Tensor, positive: Tensor) -> Tensor:
        return positive + stat / self.negatives

    def loss_grad(self, stat: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(stat) / self.negatives, torch.ones_like(positive)


def criterion_of(kind: str, margin: float) -> Criterion:
    """A criterion with that statistic, whatever loss it makes of it."""
    if kind == "softplus":
        return SigmoidContrast()
    if kind == "hinge":
        return CosineEmbedding(margin, negatives=1)
    return DecoupledCrossEntropy(0.0 if kind == "exp" else torch.inf)


def _without_pairs(lse: Tensor) -> Tensor:
    return lse < empty_lse(lse.dtype) / 2
