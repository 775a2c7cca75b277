"""Losses whose gradient is stopped on purpose, and other losses of detection and of policies."""

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import classes, draw, plain, right
from experiments.benchmarks.silent_gradients.right.losses import boxes, target_boxes


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
