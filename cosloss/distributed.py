"""The exchange between the processes of a training run: rows, gathered without a gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from cosloss.notices import warn_once

NOT_PLAIN = "gather_distributed works on plain tensors, outside of torch.compile and torch.func"
NO_SECOND = "gather_distributed has no second derivative: use one process"
DRIFTED = (
    "gather_distributed: {name} differs between the processes ({values}), so that each of them "
    "trains on a loss of its own. A learnable one needs its gradient averaged, as DDP does it: "
    "see docs/many-gpus.md"
)


@dataclass(frozen=True)
class Peers:
    """The processes of the default group, and how many items each has in this batch."""

    rank: int
    batch_sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.batch_sizes)

    def gather(self, x: Tensor) -> Tensor:
        """Every process's rows, in the order of ranks: one collective.

        x has k rows per item, with the same k everywhere; batches need not be equal.
        """
        x = x.detach().contiguous()
        per_item = x.shape[0] // self.batch_sizes[self.rank]
        largest = per_item * max(self.batch_sizes)
        padded = torch.cat([x, x.new_zeros(largest - x.shape[0], *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in self.batch_sizes]
        _all_gather(parts, padded)
        return torch.cat(
            [part[: per_item * n] for part, n in zip(parts, self.batch_sizes, strict=True)]
        )

    def join(self, x: Tensor) -> Tensor:
        """The same with a gradient: the sum of every process's on the own rows."""
        joined: Tensor = _Join.apply(x, self)
        return joined

    def joined_sum(self, x: Tensor) -> Tensor:
        """The sum of every process's number; its gradient is what DDP's averaging makes x's own."""
        total: Tensor = _JoinedSum.apply(x, self)
        return total

    def item_ids(self, views: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """An id for each item of this process's rows, and of all rows, `views` rows per item."""
        start = 0
        parts = []
        for n in self.batch_sizes:
            parts.append(torch.arange(start, start + n, device=device).repeat(views))
            start += n
        return parts[self.rank], torch.cat(parts)


class _Join(Function):
    """Rows of all processes; the backward pass adds up their gradients: one collective each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers.gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        rank, sizes = ctx.peers.rank, ctx.peers.batch_sizes
        return _summed(grads[0]).split(sizes)[rank], None


class _JoinedSum(Function):
    """A number, added up over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.world = peers.world
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.world * grads[0], None


def peers(
    items: int,
    device: torch.device,
    hard_negatives: int | None = None,
    **learnable: float | Tensor,
) -> Peers | None:
    """The processes that gather, or None where there is only this one.

    hard_negatives: how many each item has, the same number in all processes.
    learnable: numbers that must be equal in all processes. Those that are tensors travel with the
        number of items, whose exchange waits for the device anyway; a warning names one that
        differs.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    given = [items] if hard_negatives is None else [items, hard_negatives]
    own = torch.tensor(given, dtype=torch.float64, device=device)
    scalars = {name: x.detach().to(own) for name, x in learnable.items() if isinstance(x, Tensor)}
    own = torch.stack([*own, *scalars.values()])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    _all_gather(parts, own)
    counts, *columns = zip(*torch.stack(parts).tolist(), strict=True)
    if hard_negatives is not None:
        per_item, *columns = columns
        if min(per_item) < max(per_item):
            listed = ", ".join(f"{n:.0f}" for n in per_item)
            raise ValueError(
                "hard_negatives must have as many for each query in every process, which "
                f"gather_distributed joins; got {listed}"
            )
    for name, values in zip(scalars, columns, strict=True):
        if min(values) < max(values):
            listed = ", ".join(f"{value:.6g}" for value in values)
            warn_once(DRIFTED.format(name=name, values=listed))
    return Peers(dist.get_rank(), tuple(map(int, counts)))


def _all_gather(parts: list[Tensor], x: Tensor) -> None:
    with _exchange():
        dist.all_gather(parts, x)


def _summed(x: Tensor) -> Tensor:
    """The sum over all processes."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with _exchange():
        dist.all_reduce(total)
    return total


@contextmanager
def _exchange() -> Iterator[None]:
    """Say what it means if a collective fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "gather_distributed: the gather failed because a process of the group ended, or did "
            f"not call the loss within the group's timeout (this is rank {dist.get_rank()})"
        ) from error
