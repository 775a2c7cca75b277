"""The exchange between the processes of a training run: rows, sent without a gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from cosloss.notices import warn_once

Gather = bool | Literal["ring"]  # whether a loss is the joined batch's, and how its rows travel

NOT_PLAIN = "gather_distributed works on plain tensors, outside of torch.compile and torch.func"
NO_SECOND = "gather_distributed has no second derivative: use one process"
DRIFTED = (
    "gather_distributed: {name} differs between the processes ({values}), so that each of them "
    "trains on a loss of its own. A learnable one needs its gradient averaged, as DDP does it: "
    "see docs/many-gpus.md"
)


class Block(NamedTuple):
    """The rows of some of all items: of one process's, or of everyone's.

    items: where they are among all, in the order of ranks. rows: of each tensor that was sent.
    """

    items: slice
    rows: Sequence[Tensor]


@dataclass(frozen=True)
class Peers:
    """The processes of the default group, and how many items each has in this batch.

    ring: whether embeddings are passed on from process to process, and not gathered.
    """

    rank: int
    batch_sizes: tuple[int, ...]
    ring: bool = False

    @property
    def world(self) -> int:
        return len(self.batch_sizes)

    @property
    def own(self) -> slice:
        """Where this process's items are among all."""
        return self._items_of(self.rank)

    def gather(self, x: Tensor) -> Tensor:
        """Every process's rows, in the order of ranks: one collective.

        x has k rows per item, with the same k everywhere; batches need not be equal.
        """
        return self.gather_each(x)[0]

    def gather_each(self, *tensors: Tensor) -> list[Tensor]:
        """Every process's rows of each of these tensors, all of one width: one collective."""
        own = self.batch_sizes[self.rank]
        counts = [x.shape[0] // own for x in tensors]
        missing = sum(counts) * (max(self.batch_sizes) - own)
        filling = tensors[0].new_zeros(missing, *tensors[0].shape[1:])
        padded = torch.cat([*(x.detach() for x in tensors), filling])
        parts = [torch.empty_like(padded) for _ in self.batch_sizes]
        _all_gather(parts, padded)
        split = [
            part[: sum(counts) * n].split([k * n for k in counts])
            for part, n in zip(parts, self.batch_sizes, strict=True)
        ]
        return [torch.cat(of_one) for of_one in zip(*split, strict=True)]

    def pass_on(self, *tensors: Tensor) -> Iterator[Block]:
        """Every process's rows of each of these tensors in turn, the own first.

        While a block is used it travels on to the next process, and the one before it arrives: no
        process holds more than these two beside its own. What was yielded is written over.
        """
        held = [x.detach().contiguous() for x in tensors]
        counts = [x.shape[0] // self.batch_sizes[self.rank] for x in held]
        largest = max(self.batch_sizes)
        room = [
            [x.new_empty(k * largest, *x.shape[1:]) for k, x in zip(counts, held, strict=True)]
            for _ in range(min(2, self.world - 1))
        ]
        following, previous = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        for step in range(self.world):
            owner = (self.rank - step) % self.world
            arriving, requests = list[Tensor](), list[dist.Work]()
            if step + 1 < self.world:
                n = self.batch_sizes[owner - 1]
                arriving = [x[: k * n] for k, x in zip(counts, room[step % 2], strict=True)]
                with _told_of_an_end():
                    requests = dist.batch_isend_irecv(
                        [
                            *(dist.P2POp(dist.isend, x, following) for x in held),
                            *(dist.P2POp(dist.irecv, x, previous) for x in arriving),
                        ]
                    )
            yield Block(self._items_of(owner), held)
            with _told_of_an_end():
                for request in requests:
                    request.wait()
            held = arriving

    def part(self, everyones: Tensor, items: slice) -> Tensor:
        """The rows of these items among everyone's, which are k for each item."""
        k = everyones.shape[0] // sum(self.batch_sizes)
        return everyones[k * items.start : k * items.stop]

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

    def _items_of(self, rank: int) -> slice:
        start = sum(self.batch_sizes[:rank])
        return slice(start, start + self.batch_sizes[rank])


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
    ring: bool = False,
    **learnable: float | Tensor,
) -> Peers | None:
    """The processes that share their rows, or None where there is only this one.

    hard_negatives: how many each item has, the same number in all processes.
    ring: whether embeddings are to be passed on, and not gathered.
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
    return Peers(dist.get_rank(), tuple(map(int, counts)), ring)


def _all_gather(parts: list[Tensor], x: Tensor) -> None:
    with _told_of_an_end():
        dist.all_gather(parts, x)


def _summed(x: Tensor) -> Tensor:
    """The sum over all processes."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with _told_of_an_end():
        dist.all_reduce(total)
    return total


@contextmanager
def _told_of_an_end() -> Iterator[None]:
    """Say what it means where an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "gather_distributed: the exchange failed because a process of the group ended, or did "
            "not call the loss, and in a ring its backward pass, within the group's timeout (this "
            f"is rank {dist.get_rank()})"
        ) from error
