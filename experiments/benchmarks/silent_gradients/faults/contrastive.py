"""Contrastive, retrieval and self-supervised losses whose gradient went wrong."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import classes, draw, fault, op

GITHUB = "https://github.com"
AREA = {"area": "contrastive"}


def info_nce(q: Tensor, k: Tensor, temperature: float = 0.2) -> Tensor:
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).t() / temperature
    return F.cross_entropy(logits, torch.arange(len(q)))


def views(h: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two views of eight pictures, which the encoder had in one batch."""
    picture = draw(g, h, len(h) // 2, h.shape[1])
    first, second = h.chunk(2)
    return picture + first, picture + second


@fault(f"{GITHUB}/liorshk/facenet_pytorch/issues/6", "detach", lambda h, g: (h,), **AREA)
def hard_triplets_taken_out_of_numpy(mended: bool) -> Any:
    """The hard rows are wrapped anew, and only the norm penalty reaches the encoder."""

    def loss(h: Tensor) -> Tensor:
        a, p, n = h, h.roll(1, 0), h.roll(2, 0)
        gap = (a - p).square().sum(1) - (a - n).square().sum(1) + 1
        hard = gap > 0
        chosen = [t[hard] if mended else torch.tensor(t.detach().numpy())[hard] for t in (a, p, n)]
        return F.triplet_margin_loss(*chosen) + 0.01 * h.square().mean()

    return loss


def sup_con(z: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool)
    logits = (unit @ unit.t() / 0.3).masked_fill(itself, -1e9)
    same = (labels[:, None] == labels) & ~itself
    logp = logits.log_softmax(1)
    return -(logp * same).sum(1).div(same.sum(1).clamp_min(1)).mean()


@fault(
    f"{GITHUB}/sl-93/SUPERVISED-CONTRASTIVE-LEARNING-FOR-PRE-TRAINED-LANGUAGE-MODEL-FINE-TUNING"
    "/issues/2",
    "detach",
    lambda h, g: (h, classes(g, len(h), 4)),
    twin=lambda h, y: 0.9 * sup_con(h, y) + 0.1 * F.cross_entropy(h, y),
    **AREA,
)
def supervised_contrastive_term_on_detached_states(mended: bool) -> Any:
    def loss(h: Tensor, y: Tensor) -> Tensor:
        return 0.9 * sup_con(h if mended else h.detach(), y) + 0.1 * F.cross_entropy(h, y)

    return loss


@fault(
    f"{GITHUB}/deepinsight/insightface/issues/2309",
    "no_grad",
    lambda h, g: (F.normalize(h, dim=1), classes(g, len(h), 8)),
    **AREA,
)
def angular_margin_under_no_grad(mended: bool) -> Any:
    """cos(θ + m) is put in without its slope sin(θ + m) / sin θ."""

    def loss(cosine: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(y))
        with torch.set_grad_enabled(mended):
            moved = (cosine[rows, y].clamp(-0.99, 0.99).acos() + 0.3).cos()
        shift = moved - cosine[rows, y] if mended else moved - cosine[rows, y].detach()
        return F.cross_entropy(8 * cosine.index_put((rows, y), cosine[rows, y] + shift), y)

    return loss


@fault(
    f"{GITHUB}/lightly-ai/lightly/issues/559",
    "missing stop-gradient",
    lambda h, g: (torch.tanh(h), h),
    twin=lambda p, z: -F.cosine_similarity(p, z.detach(), dim=1).mean(),
    stops="the target projection, as SimSiam's equation has it",
    **AREA,
)
def simsiam_target_left_on_the_graph(mended: bool) -> Any:
    def loss(p: Tensor, z: Tensor) -> Tensor:
        target = F.normalize(z.detach() if mended else z, dim=1)
        return -(F.normalize(p, dim=1) * target).sum(1).mean()

    return loss


class Cached(nn.Module):
    """A projection in mini-batches whose gradients are cached by the forward (GradCache)."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.dropout(x @ weight, 0.2)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        states, parts = [], []
        for chunk in x.split(4):
            states.append(torch.get_rng_state())
            parts.append(self.project(chunk, self.weight).detach())
        after = torch.get_rng_state()
        with torch.enable_grad():
            leaves = [part.requires_grad_() for part in parts]
            keys = k.detach().requires_grad_()
            loss = info_nce(torch.cat(leaves), keys)
            *cached, grad_k = torch.autograd.grad(loss, [*leaves, keys])
            xs, w = x.detach().requires_grad_(), self.weight.detach().requires_grad_()
            total = torch.zeros(())
            for i, (chunk, grad) in enumerate(zip(xs.split(4), cached, strict=True)):
                if self.fault != "generator":
                    torch.set_rng_state(states[i])
                if self.fault != "dropped" or i == len(cached) - 1:
                    total = total + (self.project(chunk, w) * grad).sum()
            grads = torch.autograd.grad(total, [xs, w])
        torch.set_rng_state(after)
        give = op(
            lambda x, k, w: loss.detach().clone(),
            lambda grad, out, x, k, w: (grad * grads[0], grad * grad_k, grad * grads[1]),
        )
        return give(x, k, self.weight)


@fault(f"{GITHUB}/huggingface/sentence-transformers/pull/3854", "last block", views, **AREA)
def cached_loss_keeps_the_last_mini_batch(mended: bool) -> nn.Module:
    return Cached("" if mended else "dropped")


@fault(f"{GITHUB}/huggingface/sentence-transformers/pull/3862", "generator", views, **AREA)
def cached_loss_recomputes_with_other_dropout(mended: bool) -> nn.Module:
    return Cached("" if mended else "generator")


@fault(
    f"{GITHUB}/huggingface/sentence-transformers/pull/4033",
    "NaN at a singular point",
    lambda h, g: (h, torch.cat([h[:1], h[1:].roll(1, 0)]), h.roll(5, 0)),
    **AREA,
)
def euclidean_triplet_of_identical_texts(mended: bool) -> Any:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).norm(dim=1) if mended else (a - b).square().sum(1).sqrt()

    return lambda a, p, n: F.relu(distance(a, p) - distance(a, n) + 5).mean()


@fault(
    f"{GITHUB}/adambielski/siamese-triplet/issues/18",
    "NaN at a singular point",
    lambda h, g: (h, torch.where(torch.arange(len(h))[:, None] < 2, h, h.roll(1, 0))),
    **AREA,
)
def siamese_loss_of_equal_pictures(mended: bool) -> Any:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        squared = (a - b).square().sum(1)
        distance = (squared + 1e-9).sqrt() if mended else squared.sqrt()
        apart = torch.arange(len(a)) % 2
        return ((1 - apart) * squared + apart * F.relu(4 - distance).square()).mean() / 2

    return loss


@fault(
    f"{GITHUB}/keras-team/keras/issues/23075",
    "NaN at a singular point",
    lambda h, g: (torch.where(torch.arange(len(h))[:, None] == 3, 0 * h, h), draw(g, h)),
    **AREA,
)
def normalised_embedding_with_a_zero_row(mended: bool) -> Any:
    def unit(x: Tensor) -> Tensor:
        if mended:
            return x / x.norm(dim=1, keepdim=True).clamp_min(1e-3)
        return x * x.square().sum(1, keepdim=True).rsqrt().clamp_max(1e3)

    return lambda a, b: -(unit(a) * unit(b)).sum(1).mean()


@fault(
    f"{GITHUB}/pytorch/pytorch/pull/31378",
    "missing term",
    lambda h, g: (1e-7 * h, draw(g, h)),
    twin=lambda a, b: (a * b).sum(1) / (a.norm(dim=1).clamp_min(1e-6) * b.norm(dim=1)),
    finish=lambda s: (1 - s).square().mean(),
    **AREA,
)
def cosine_of_collapsed_rows(mended: bool) -> Any:
    """torch's own clamps the norm without its gradient, and projects where it is constant."""

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        if not mended:
            return F.cosine_similarity(a, b, eps=1e-6)
        return (a * b).sum(1) / (a.norm(dim=1).clamp_min(1e-6) * b.norm(dim=1).clamp_min(1e-6))

    return similarity
