"""Contrastive and self-supervised losses as people call them; cancellation, queues and centres."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import classes, draw, plain, right
from experiments.benchmarks.silent_gradients.faults.contrastive import info_nce, sup_con, views


def close(h: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two close views, whose similarity is near 1."""
    return views(0.02 * h, g)


def nt_xent(a: Tensor, b: Tensor) -> Tensor:
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.t() / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(a)))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def barlow_twins(a: Tensor, b: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
    c = a.t() @ b / len(a)
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + 0.005 * (c.square().sum() - diagonal.square().sum())


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    total = 25 * F.mse_loss(a, b)
    for z in (a, b):
        z = z - z.mean(0)
        total = total + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        c = z.t() @ z / (len(z) - 1)
        total = total + (c.square().sum() - c.diagonal().square().sum()) / c.shape[0]
    return total


right("InfoNCE", plain(info_nce), views)
right("NT-Xent with minus infinity on the diagonal", plain(nt_xent), views)
right("NT-Xent of a batch with itself", plain(nt_xent), lambda h, g: (h, h))
right("supervised contrastive", plain(sup_con), lambda h, g: (h, classes(g, 16, 4)))
right(
    "one minus cosine of close views",
    plain(lambda a, b: (1 - torch.cosine_similarity(a, b)).mean()),
    close,
)
right("one minus Pearson", plain(lambda a, b: 1 - correlation(a, b).mean()), close)
right(
    "concordance correlation",
    plain(
        lambda a, b: (
            1
            - (
                2
                * ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
                / (a.var(0, False) + b.var(0, False) + (a.mean(0) - b.mean(0)).square())
            ).mean()
        )
    ),
    close,
)
right("Barlow Twins", plain(barlow_twins), views)
right("Barlow Twins of close views", plain(barlow_twins), close)
right("VICReg", plain(vicreg), views)
right(
    "BYOL with z.detach() inside",
    plain(lambda p, z: 2 - 2 * F.cosine_similarity(p, z.detach()).mean()),
    lambda h, g: (torch.tanh(h), h.roll(1, 1)),
    twin=lambda p, z: (F.normalize(p) - F.normalize(z.detach())).square().sum(1).mean(),
    stops="the target",
)
right(
    "SimSiam of four",
    plain(
        lambda p1, p2, z1, z2: (
            -(
                F.cosine_similarity(p1, z2.detach()).mean()
                + F.cosine_similarity(p2, z1.detach()).mean()
            )
            / 2
        )
    ),
    lambda h, g: (torch.tanh(h), torch.tanh(2 * h), h, 2 * h + 1),
    twin=lambda p1, p2, z1, z2: (
        -(
            (F.normalize(p1) * F.normalize(z2.detach())).sum(1).mean()
            + (F.normalize(p2) * F.normalize(z1.detach())).sum(1).mean()
        )
        / 2
    ),
    stops="both targets",
)


class Temperature(nn.Module):
    """CLIP's loss with a learnable scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = self.scale.exp() * F.normalize(a) @ F.normalize(b).t()
        target = torch.arange(len(a))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


class Sigmoids(nn.Module):
    """SigLIP's loss with a learnable scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = self.scale.exp() * F.normalize(a) @ F.normalize(b).t() + self.bias
        return -F.logsigmoid(logits * (2 * torch.eye(len(a)).to(a) - 1)).sum() / len(a)


class Queue(nn.Module):
    """MoCo's negatives in a Python list, which the call before this one has filled."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []
        self.calls = 0

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q), F.normalize(k)
        negatives = torch.cat([k.detach().roll(1, 0), *(t.to(q) for t in self.keys)])
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.t()], 1) / 0.2
        self.keys = [*self.keys[-2:], k.detach()]
        self.calls += 1
        scale = 1 / (1 + self.calls)  # a warm-up that counts calls
        return (1 - scale) * F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


class Memory(nn.Module):
    """A ring buffer with an integer position and a flag, as a cross-batch memory has them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
        self.at = 0
        self.full = False

    def forward(self, z: Tensor, keys: Tensor) -> Tensor:
        end = self.at + len(z)
        with torch.no_grad():
            self.bank[torch.arange(self.at, end) % 40] = keys.to(self.bank)
        self.full = self.full or end >= 40
        self.at = end % 40
        reach = 40 if self.full else self.at
        distance = torch.cdist(z, self.bank[:reach].clone())
        return distance.topk(3, largest=False).values[:, 1:].mean() + distance.mean()


class Centred(nn.Module):
    """DINO's loss, whose centre is a moving average of the teacher's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(8))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        p = ((teacher.detach() - self.center) / 0.5).softmax(1)
        loss = -(p * (student / 0.9).log_softmax(1)).sum(1).mean()
        with torch.no_grad():
            self.center.mul_(0.9).add_(teacher.mean(0), alpha=0.1)
        return loss


class Sinkhorn(nn.Module):
    """SwAV: codes by Sinkhorn iterations without a gradient."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            q = (a / 0.5).exp()
            for _ in range(3):
                q = q / q.sum(0, keepdim=True)
                q = q / q.sum(1, keepdim=True)
        return -(q * (b / 0.5).log_softmax(1)).sum(1).mean()


right("CLIP with a learnable temperature", Temperature, views)
right("SigLIP", Sigmoids, views)
right("MoCo with a queue in a list", Queue, lambda h, g: (h, draw(g, h)))
right("nearest rows of a memory with counters", Memory, lambda h, g: (h, draw(g, h)))
right("DINO with a moving centre", Centred, lambda h, g: (h, draw(g, h)))
right("SwAV with Sinkhorn codes", Sinkhorn, lambda h, g: (draw(g, h), h))
right(
    "hard negatives by topk",
    plain(
        lambda z: F.relu(
            0.5
            + (z @ z.t() - 9 * torch.eye(len(z)).to(z)).topk(2).values.mean(1)
            - (z * z.roll(1, 0)).sum(1)
        ).mean()
    ),
    lambda h, g: (F.normalize(h),),
)
right(
    "angular margin by acos",
    plain(
        lambda c, t: F.cross_entropy(
            8 * torch.where(F.one_hot(t, 8).bool(), (c.clamp(-0.999, 0.999).acos() + 0.3).cos(), c),
            t,
        )
    ),
    lambda h, g: (F.normalize(h), classes(g, 16, 8)),
)
right(
    "uniformity of squared distances",
    plain(lambda z: torch.pdist(z).square().mul(-2).exp().mean().log()),
    lambda h, g: (F.normalize(h),),
)
right(
    "maximum mean discrepancy",
    plain(
        lambda a, b: sum(
            s * (-torch.cdist(x, y).square()).exp().mean()
            for s, x, y in ((1, a, a.clone() + 1e-3), (1, b, b.clone() + 1e-3), (-2, a, b))
        )
    ),
    views,
)
right(
    "optimal transport, differentiated",
    plain(lambda c: (torch.stack([(-c).softmax(0), (-c).softmax(1)]).mean(0) * c).sum()),
    lambda h, g: (torch.cdist(h, draw(g, h)),),
)
