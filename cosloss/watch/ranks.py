"""What the processes of a run tell one another about a check: numbers, and who cannot go on."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cosloss.watch.finding import NotCheckedError

PERIOD = 65521


class Ranks:
    """The processes of the default group; one without a group."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0
        # NCCL moves what lies on a GPU
        nccl = together and "nccl" in str(dist.get_backend())
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def agree(self, compute: Callable[[], Sequence[float]]) -> list[list[float]]:
        """Every process's numbers; an exception of any is raised as NotCheckedError on all.

        Raises:
            NotCheckedError: with the message of the first process that cannot go on.
        """
        numbers: Sequence[float] = ()
        reason = ""
        try:
            numbers = list(map(float, compute()))
        except Exception as error:  # somebody's step may raise anything
            lines = str(error).splitlines() or [""]
            known = isinstance(error, (NotCheckedError, ValueError)) and lines[0]
            reason = lines[0] if known else f"{type(error).__name__}: {lines[0]}"
        if self.count == 1:
            if reason:
                raise NotCheckedError(reason)
            return [list(numbers)]
        states = self.gather(torch.tensor([float(not reason), float(len(numbers))], device="cpu"))
        if all(state[0] for state in states):
            gathered = self.gather(torch.tensor(list(numbers), dtype=torch.float64, device="cpu"))
            return [row.tolist() for row in gathered]
        reasons: list[str | None] = [None] * self.count
        dist.all_gather_object(reasons, reason)
        rank, first = next((i, r) for i, r in enumerate(reasons) if r)
        raise NotCheckedError(f"{first} (rank {rank})")

    def gather(self, row: Tensor) -> list[Tensor]:
        """A row of numbers of each process, in their order, on the CPU."""
        if self.count == 1:
            return [row]
        row = row.to(self.device)
        rows = [torch.empty_like(row) for _ in range(self.count)]
        dist.all_gather(rows, row)
        return [each.cpu() for each in rows]

    def mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """The means of tensors over the processes, one collective per dtype."""
        if self.count == 1:
            return tensors
        means = list(tensors)
        for dtype in {t.dtype for t in tensors}:
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat)
            parts = (flat / self.count).split([tensors[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                means[i] = part.view(tensors[i].shape)
        return means

    def who_differs(self, groups: dict[str, list[Tensor]]) -> dict[str, list[int]]:
        """Per group the ranks whose tensors are not, to the bit, those of most ranks."""
        if self.count == 1:
            return {}
        hashes = torch.stack([_hash(tensors).cpu() for tensors in groups.values()])
        rows = [row.tolist() for row in self.gather(hashes)]
        found = {}
        for i, name in enumerate(groups):
            column = [row[i] for row in rows]
            most = max(column, key=column.count)
            others = [rank for rank, value in enumerate(column) if value != most]
            if others:
                found[name] = others
        return found


def _hash(tensors: Iterable[Tensor]) -> Tensor:
    """A number of the tensors' bits and of their places, modulo 2^64."""
    total = torch.zeros((), dtype=torch.int64, device="cpu")
    for t in tensors:
        t = (t.to_dense() if t.is_sparse else t).detach()
        flat = t.contiguous().reshape(-1)
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(t.element_size(), torch.int64)
        bits = flat.view(whole).to(torch.int64)
        places = torch.arange(bits.numel(), device=bits.device) % PERIOD + 1
        total = total * 31 + (bits * places).sum().cpu()
    return total
