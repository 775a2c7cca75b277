"""Collectives with right and wrong gradients, and losses over all processes' rows."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import functional as collectives
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.faults.contrastive import info_nce
from experiments.benchmarks.silent_gradients.right.embeddings import nt_xent

WORLD = 2
ROWS = 8  # of each process


class Gather(torch.autograd.Function):
    """All rows; the backward is the rule that is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: str) -> Tensor:
        ctx.rule, ctx.rows = rule, len(x)
        parts = [torch.empty_like(x) for _ in range(WORLD)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous()
        if ctx.rule != "own slice":
            dist.all_reduce(grad)
        return grad.split(ctx.rows)[dist.get_rank()], None


def gathered(x: Tensor, rule: str = "sum") -> Tensor:
    return Gather.apply(x, rule)


def without_gradient(x: Tensor) -> Tensor:
    """All rows, only this process's on the graph."""
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


class Scaled(torch.autograd.Function):
    """The identity; the gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


def local_rows(z1: Tensor, z2: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """The local queries against the keys of all processes."""
    logits = F.normalize(z1) @ F.normalize(gather(z2)).t() / 0.2
    return F.cross_entropy(logits, torch.arange(len(z1)) + len(z1) * dist.get_rank())


def standardised(z: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    rows = WORLD * ROWS
    mean = total(z.sum(0)) / rows
    return (z - mean) / (total((z - mean).square().sum(0)) / rows + 1e-3).sqrt()


def raw_total(x: Tensor) -> Tensor:
    """A sum over processes in place of the values, which autograd does not see."""
    total = x.clone()
    dist.all_reduce(total.detach())
    return total


def barlow(z1: Tensor, z2: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    a, b = (standardised(z, collectives.all_reduce) for z in (z1, z2))
    return _off(total(a.t() @ b) / (WORLD * ROWS))


def _off(c: Tensor) -> Tensor:
    on = c.diagonal()
    return (on - 1).square().sum() + 0.1 * (c.square().sum() - on.square().sum())


def whole_barlow(z1: Tensor, z2: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-3).sqrt() for z in (z1, z2))
    return _off(a.t() @ b / len(a))


def sketched(z1: Tensor, z2: Tensor, total: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """The distance of the embeddings' characteristic function from a normal one's."""
    t = torch.linspace(0.2, 2, 5).to(z1).view(-1, 1, 1)
    cos, sin = total((t * z1).cos().sum(1)) / rows, total((t * z1).sin().sum(1)) / rows
    real = torch.exp(-t[:, 0].square() / 2)
    return ((cos - real).square() + sin.square()).mean() + 0 * z2.sum()


class SyncNorm(torch.autograd.Function):
    """Batch normalisation over all processes; the backward is the rule that is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: str) -> Tensor:
        sums = torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])
        dist.all_reduce(sums)
        ctx.count = float(sums[2, 0])
        mean, square = sums[0] / ctx.count, sums[1] / ctx.count
        r = (square - mean.square() + 1e-3).rsqrt()
        y = (x - mean) * r
        ctx.save_for_backward(y, r)
        ctx.rule = rule
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, r = ctx.saved_tensors
        sums = torch.stack([grad.sum(0), (grad * y).sum(0)])
        if ctx.rule == "mean of means":
            sums = sums / len(y)
            dist.all_reduce(sums)
            sums = sums / WORLD
        else:
            dist.all_reduce(sums)
            sums = sums / ctx.count
        return r * (grad - sums[0] - y * sums[1]), None


def sync_norm(z1: Tensor, z2: Tensor, rule: str) -> Tensor:
    y = SyncNorm.apply(z1, rule)
    # each process adds its rows; the average over processes divides by their number
    return WORLD * (torch.tanh(y + z2) ** 2 * _column(y)).sum() / (WORLD * ROWS)


def whole_norm(z1: Tensor, z2: Tensor) -> Tensor:
    y = (z1 - z1.mean(0)) / (z1.var(0, unbiased=False) + 1e-3).sqrt()
    return (torch.tanh(y + z2) ** 2 * _column(y)).sum() / (WORLD * ROWS)


def _column(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.shape[1]).to(y)


def both(loss: Callable[[Tensor, Tensor], Tensor], gather: Callable[[Tensor], Tensor]) -> Any:
    """The loss of all rows on every process."""
    return lambda z1, z2: loss(gather(z1), gather(z2))


def scaled(loss: Callable[[Tensor, Tensor], Tensor], factor: float) -> Any:
    return lambda z1, z2: Scaled.apply(loss(z1, z2), factor)


def own_slice(x: Tensor) -> Tensor:
    return gathered(x, "own slice")


ALL = both(nt_xent, gathered)
LOCAL = both(nt_xent, without_gradient)
LATE = both(info_nce, without_gradient)


def keys_gathered(z1: Tensor, z2: Tensor) -> Tensor:
    return local_rows(z1, z2, gathered)


def mean_over_all(x: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    return total(x.sum(0)) / (WORLD * ROWS)


def centred(z1: Tensor, z2: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    return F.mse_loss(torch.tanh(z1 - mean_over_all(z1, total)), z2)
