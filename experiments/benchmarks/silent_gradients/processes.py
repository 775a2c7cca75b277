"""Faults across processes: a step's gradient after the processes' average, against the whole batch.

Each case is a layer and a loss of one process's rows; `whole` is the same of all rows in one
process. Training averages the gradients of all processes, so that average must be the whole's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn import functional as collectives
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.faults.contrastive import info_nce
from experiments.benchmarks.silent_gradients.right.embeddings import nt_xent

GITHUB = "https://github.com"
WORLD = 2
ROWS = 8  # of each process


@dataclass(frozen=True)
class ProcessFault:
    """A fault of a collective: loss(z1, z2) of the local rows, faulty and mended.

    Attributes:
        uneven: whether the second process has half as many rows.
    """

    name: str
    source: str
    kind: str
    faulty: Callable[[Tensor, Tensor], Tensor]
    mended: Callable[[Tensor, Tensor], Tensor]
    whole: Callable[[Tensor, Tensor], Tensor]
    area: str = "contrastive"
    uneven: bool = False


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
        if ctx.rule == "local":
            return r * (grad - sums[0] / len(y) - y * sums[1] / len(y)), None
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


FAULTS = [
    ProcessFault(
        "simclr_keys_gathered_without_gradient",
        f"{GITHUB}/facebookresearch/vissl/pull/123",
        "collective without gradient",
        lambda z1, z2: local_rows(z1, z2, without_gradient),
        keys_gathered,
        info_nce,
    ),
    ProcessFault(
        "barlow_twins_sum_in_place",
        f"{GITHUB}/lightly-ai/lightly/issues/1977",
        "off by 1/world_size",
        lambda z1, z2: barlow(z1, z2, raw_total),
        lambda z1, z2: barlow(z1, z2, collectives.all_reduce),
        whole_barlow,
    ),
    ProcessFault(
        "sketched_regulariser_sum_in_place",
        f"{GITHUB}/lightly-ai/lightly/issues/1920",
        "off by 1/world_size",
        lambda z1, z2: sketched(z1, z2, raw_total, WORLD * ROWS),
        lambda z1, z2: sketched(z1, z2, collectives.all_reduce, WORLD * ROWS),
        lambda z1, z2: sketched(z1, z2, lambda x: x, len(z1)),
    ),
    ProcessFault(
        "gather_returns_its_own_slice",
        f"{GITHUB}/lightly-ai/lightly/issues/1528",
        "own rank's slice",
        lambda z1, z2: local_rows(z1, z2, own_slice),
        keys_gathered,
        info_nce,
    ),
    ProcessFault(
        "late_interaction_loss_not_scaled",
        f"{GITHUB}/lightonai/pylate/pull/111",
        "off by 1/world_size",
        LATE,
        scaled(LATE, WORLD),
        info_nce,
    ),
    ProcessFault(
        "local_loss_scaled_as_if_gathered",
        f"{GITHUB}/lightonai/pylate/pull/156",
        "off by world_size",
        scaled(info_nce, WORLD),
        info_nce,
        lambda z1, z2: (
            sum(info_nce(a, b) for a, b in zip(z1.split(ROWS), z2.split(ROWS), strict=True)) / WORLD
        ),
    ),
    ProcessFault(
        "global_loss_with_gradient_times_the_processes",
        f"{GITHUB}/mlfoundations/open_clip/issues/616",
        "off by world_size",
        scaled(ALL, WORLD),
        ALL,
        nt_xent,
    ),
    ProcessFault(
        "declutr_gather_not_rescaled",
        f"{GITHUB}/JohnGiorgi/DeCLUTR/pull/212",
        "off by 1/world_size",
        LOCAL,
        scaled(LOCAL, WORLD),
        nt_xent,
    ),
    ProcessFault(
        "passages_of_other_ranks_as_constants",
        f"{GITHUB}/NVIDIA-NeMo/Automodel/pull/2283",
        "collective without gradient",
        lambda z1, z2: local_rows(z2, z1, without_gradient),
        lambda z1, z2: local_rows(z2, z1, gathered),
        lambda z1, z2: info_nce(z2, z1),
    ),
    ProcessFault(
        "clip_image_side_gathered_without_gradient",
        f"{GITHUB}/facebookresearch/SLIP/issues/31",
        "collective without gradient",
        lambda z1, z2: local_rows(z1, z2, without_gradient) + local_rows(z2, z1, gathered),
        lambda z1, z2: local_rows(z1, z2, gathered) + local_rows(z2, z1, gathered),
        lambda z1, z2: info_nce(z1, z2) + info_nce(z2, z1),
    ),
    ProcessFault(
        "sync_batch_norm_of_uneven_batches",
        f"{GITHUB}/pytorch/pytorch/pull/36382",
        "wrong mean",
        lambda z1, z2: sync_norm(z1, z2, "mean of means"),
        lambda z1, z2: sync_norm(z1, z2, "sum"),
        whole_norm,
        area="normalisation",
        uneven=True,
    ),
    ProcessFault(
        "sync_batch_norm_backward_of_local_sums",
        f"{GITHUB}/NVIDIA/apex/issues/387",
        "missing reduction term",
        lambda z1, z2: sync_norm(z1, z2, "local"),
        lambda z1, z2: sync_norm(z1, z2, "sum"),
        whole_norm,
        area="normalisation",
    ),
    ProcessFault(
        "mean_of_all_rows_without_gradient",
        f"{GITHUB}/pytorch/pytorch/pull/190419",
        "collective without gradient",
        lambda z1, z2: centred(z1, z2, raw_total),
        lambda z1, z2: centred(z1, z2, collectives.all_reduce),
        lambda z1, z2: F.mse_loss(torch.tanh(z1 - z1.mean(0)), z2),
        area="normalisation",
    ),
]
