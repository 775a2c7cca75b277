"""Losses as people call them: arguments that depend on one another, and intended stop-gradients."""

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


def focal(x: Tensor, t: Tensor, stop: bool = True) -> Tensor:
    logp = x.log_softmax(1).gather(1, t[:, None])[:, 0]
    weight = (1 - logp.exp()) ** 2
    return -((weight.detach() if stop else weight) * logp).mean()


def _focal_twin(x: Tensor, t: Tensor) -> Tensor:
    loss = F.cross_entropy(x, t, reduction="none")
    return ((1 - (-loss.detach()).exp()) ** 2 * loss).mean()


right("focal", plain(lambda x, t: focal(x, t, False)), lambda h, g: (h, classes(g, 16, 8)))
right(
    "focal with a detached weight",
    plain(focal),
    lambda h, g: (h, classes(g, 16, 8)),
    twin=_focal_twin,
    stops="the modulating weight",
)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """1 - IoU + distance + alpha v, alpha without a gradient."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    inter = (high - low).clamp_min(0).prod(1)
    area = [(t[:, 2:] - t[:, :2]).prod(1) for t in (a, b)]
    iou = inter / (area[0] + area[1] - inter)
    span = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    centres = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]).square().sum(1) / 4
    angle = [torch.atan2(*(t[:, 2:] - t[:, :2]).unbind(1)) for t in (a, b)]
    v = 4 / torch.pi**2 * (angle[0] - angle[1]).square()
    with torch.no_grad():
        alpha = v / (1 - iou + v)
    return (1 - iou + centres / span.square().sum(1) + alpha * v).mean()


def _ciou_twin(a: Tensor, b: Tensor) -> Tensor:
    import torchvision

    return torchvision.ops.complete_box_iou_loss(a, b, reduction="mean")


right(
    "complete IoU with its alpha stopped",
    plain(ciou),
    lambda h, g: (boxes(h), target_boxes(h)),
    twin=_ciou_twin,
    stops="alpha, as in the paper",
    needs=("torchvision",),
)


def ratio(logp: Tensor, advantage: Tensor) -> Tensor:
    return -(torch.exp(logp - logp.detach()) * advantage).mean()


right(
    "policy gradient by exp(logp - logp.detach())",
    plain(ratio),
    lambda h, g: (h.log_softmax(1).gather(1, classes(g, 16, 8)[:, None])[:, 0], draw(g, h, 16)),
    twin=lambda logp, a: -(logp * a).mean(),
    stops="the old policy, for the gradient only",
)
right(
    "clipped policy ratio",
    plain(
        lambda logp, old, a: (
            -torch.minimum((logp - old).exp() * a, (logp - old).exp().clamp(0.8, 1.2) * a).mean()
        )
    ),
    lambda h, g: (h[:, 0], draw(g, h, 16), draw(g, h, 16)),
)
right(
    "preference of chosen over rejected",
    plain(lambda c, r, rc, rr: -F.logsigmoid(0.1 * (c - rc - r + rr)).mean()),
    lambda h, g: (h[:, 0], h[:, 1], draw(g, h, 16), draw(g, h, 16)),
)
right(
    "expert load balance",
    plain(
        lambda x: (
            8 * (F.one_hot(x.topk(2).indices, 8).sum(1).to(x).mean(0) * x.softmax(1).mean(0)).sum()
        )
    ),
    lambda h, g: (h,),
)
right(
    "dice",
    plain(lambda p, t: 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)),
    lambda h, g: (h.sigmoid(), (draw(g, h) > 0).to(h)),
)
right(
    "total variation",
    plain(lambda x: x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()),
    lambda h, g: (h,),
    shape=(2, 3, 6, 6),
)
right(
    "loss scaled to another by item",
    plain(
        lambda a, b: (
            a.square().mean()
            + (a.detach().square().mean() / b.detach().abs().mean()).item() * b.abs().mean()
        )
    ),
    lambda h, g: (h[:, :4], h[:, 4:]),
    twin=lambda a, b: (
        a.square().mean() + b.abs().mean() * (a.detach().square().mean() / b.detach().abs().mean())
    ),
    stops="the scale, which is a number",
)
