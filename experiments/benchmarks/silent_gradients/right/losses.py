"""Losses as people call them, with arguments that depend on one another."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import classes, draw, plain, right

BOXES = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 4.0, 3.0], [0.5, 2.0, 3.0, 5.0]])


def boxes(h: Tensor) -> Tensor:
    """Boxes (x1, y1, x2, y2) of four numbers a row."""
    return torch.cat([h[:, :2], h[:, :2] + 0.5 + F.softplus(h[:, 2:4])], 1)


def target_boxes(h: Tensor) -> Tensor:
    return BOXES.to(h)[torch.arange(len(h)) % 3]


right("cross entropy", plain(F.cross_entropy), lambda h, g: (h, classes(g, 16, 8)))
right(
    "cross entropy, weights, smoothing, ignored",
    lambda: nn.CrossEntropyLoss(
        torch.linspace(0.5, 2, 8).double().float(), ignore_index=3, label_smoothing=0.1
    ),
    lambda h, g: (h, classes(g, 16, 8)),
)
right(
    "cross entropy of soft targets", plain(F.cross_entropy), lambda h, g: (h, draw(g, h).softmax(1))
)
right(
    "cross entropy of all positions",
    plain(lambda x, t: F.cross_entropy(x.transpose(1, 2), t)),
    lambda h, g: (h, torch.randint(8, (4, 6), generator=g)),
    shape=(4, 6, 8),
)
right(
    "binary cross entropy with logits",
    lambda: nn.BCEWithLogitsLoss(pos_weight=torch.full((8,), 3.0)),
    lambda h, g: (h, (draw(g, h) > 0).to(h)),
)
right(
    "binary cross entropy of probabilities",
    plain(F.binary_cross_entropy),
    lambda h, g: (h.sigmoid(), (draw(g, h) > 0).to(h)),
)
right("mean squared error", plain(F.mse_loss), lambda h, g: (h, draw(g, h)))
right("mean squared error of itself and a roll", plain(F.mse_loss), lambda h, g: (h, h.roll(1, 0)))
right("l1", plain(F.l1_loss), lambda h, g: (h, draw(g, h)))
right("smooth l1", plain(F.smooth_l1_loss), lambda h, g: (h, draw(g, h)))
right("huber, keyword delta", lambda: nn.HuberLoss(delta=0.3), lambda h, g: (h, draw(g, h)))
right(
    "KL divergence",
    lambda: nn.KLDivLoss(reduction="batchmean", log_target=True),
    lambda h, g: (h.log_softmax(1), draw(g, h).log_softmax(1)),
)
right(
    "symmetric KL of two dropout passes",
    plain(lambda a, b: (F.kl_div(a, b, log_target=True) + F.kl_div(b, a, log_target=True)) / 2),
    lambda h, g: (h.log_softmax(1), (2 * h).log_softmax(1)),
)
right(
    "negative log-likelihood", plain(F.nll_loss), lambda h, g: (h.log_softmax(1), classes(g, 16, 8))
)
right(
    "Gaussian likelihood with predicted variance",
    plain(F.gaussian_nll_loss),
    lambda h, g: (h[:, :4], draw(g, h, 16, 4), F.softplus(h[:, 4:]) + 0.1),
)
right(
    "Poisson likelihood",
    plain(F.poisson_nll_loss),
    lambda h, g: (h, torch.poisson(torch.ones(16, 8), g).to(h)),
)
right(
    "CTC behind log_softmax",
    plain(lambda x, t: F.ctc_loss(x, t, [10] * 3, [4] * 3)),
    lambda h, g: (h.transpose(0, 1).log_softmax(2), torch.randint(1, 6, (3, 4), generator=g)),
    shape=(3, 10, 6),
)
right(
    "margin ranking",
    lambda: nn.MarginRankingLoss(0.2),
    lambda h, g: (h[:, 0], h[:, 1], torch.where(torch.arange(16) % 2 == 0, 1, -1)),
)
right(
    "triplet of rolled rows",
    lambda: nn.TripletMarginLoss(1.0),
    lambda h, g: (h, h.roll(1, 0), h.roll(2, 0)),
)
right(
    "triplet with a cosine distance",
    lambda: nn.TripletMarginWithDistanceLoss(
        distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)
    ),
    lambda h, g: (h, h.roll(1, 0), h.roll(2, 0)),
)
right(
    "cosine embedding",
    lambda: nn.CosineEmbeddingLoss(0.1),
    lambda h, g: (h, h.roll(1, 0), torch.where(torch.arange(16) % 2 == 0, 1, -1)),
)
right(
    "multi-label soft margin",
    plain(F.multilabel_soft_margin_loss),
    lambda h, g: (h, (draw(g, h) > 0).to(h)),
)
right(
    "VAE of reconstruction, input, mean and log-variance",
    plain(
        lambda r, x, mu, logvar: (
            F.mse_loss(r, x, reduction="sum") / len(x)
            - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
        )
    ),
    lambda h, g: (
        torch.tanh(h[:, :4] + (h[:, 4:] / 2).exp() * draw(g, h, 16, 4)),
        draw(g, h, 16, 4),
        h[:, :4],
        h[:, 4:],
    ),
)
right(
    "deep supervision of a list",
    plain(lambda outs, t: sum(0.5**i * F.cross_entropy(o, t) for i, o in enumerate(outs))),
    lambda h, g: ([h, torch.tanh(h), h * h.sigmoid()], classes(g, 16, 8)),
)
right(
    "detection of target dicts",
    plain(
        lambda out, targets: (
            sum(
                F.cross_entropy(out["logits"][i], t["labels"])
                + F.l1_loss(out["boxes"][i], t["boxes"])
                for i, t in enumerate(targets)
            )
            / len(targets)
        )
    ),
    lambda h, g: (
        {"logits": h[..., 4:], "boxes": h[..., :4]},
        [{"labels": classes(g, 3, 4), "boxes": BOXES.to(h)} for _ in range(4)],
    ),
    shape=(4, 3, 8),
)
right(
    "sequences of listed lengths",
    plain(
        lambda x, lengths: (
            sum(x[i, :n].square().mean() for i, n in enumerate(lengths)) / len(lengths)
        )
    ),
    lambda h, g: (h, [5, 2, 4, 1]),
    shape=(4, 5, 3),
)
right(
    "time-first cross entropy",
    plain(lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten())),
    lambda h, g: (h.transpose(0, 1), torch.randint(5, (7, 3), generator=g)),
    shape=(3, 7, 5),
)


class LinearCrossEntropy(nn.Module):
    """Cross entropy of a vocabulary longer than the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        logits = x @ self.weight.t()
        return F.cross_entropy(logits, t) + 1e-3 * logits.logsumexp(1).square().mean()


class Uncertainty(nn.Module):
    """Two tasks, weighted by learnable log-variances."""

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.tensor([0.2, -0.3]))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        losses = torch.stack([F.cross_entropy(x, t), F.mse_loss(x, y)])
        return (losses * (-self.logvar).exp() + self.logvar).sum()


right(
    "linear cross entropy with a z-loss", LinearCrossEntropy, lambda h, g: (h, classes(g, 16, 40))
)
right("tasks weighted by uncertainty", Uncertainty, lambda h, g: (h, classes(g, 16, 8), draw(g, h)))
