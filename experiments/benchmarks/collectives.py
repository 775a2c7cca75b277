"""What the processes send in one step, counted at torch.distributed, for ours and two others."""

import json
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.distributed.nn.functional import all_gather as differentiable_all_gather
from torch.nn import functional as F

from cosloss import nt_xent_loss
from experiments.benchmarks.measure import peak_memory
from experiments.simclr.program.processes import leave_process_group

WORLDS = (2, 4, 8)  # the rivals in the fewest processes alone
ROWS, COLUMNS = 256, 128

Loss = Callable[[Tensor, Tensor], Tensor]


def show_collectives() -> None:
    """Print the calls and the bytes of each process, forward and backward, and its memory."""
    rivals: dict[str, Loss] = {
        "lightly": NTXentLoss(temperature=0.1, gather_distributed=True),
        "open_clip's gather_with_grad": _gather_with_gradient,
    }
    ours: dict[str, Loss] = {"cosloss": _Ours(True), "cosloss, in a ring": _Ours("ring")}
    for world in WORLDS:
        contenders = ours | rivals if world == min(WORLDS) else ours
        print(f"\nNT-Xent over {world} processes, {ROWS} rows per view in each, D = {COLUMNS}")
        heads = (f"{head:>22}" for head in ("forward", "backward", "received"))
        print(f"{'':<28}{''.join(heads)}{'peak MiB':>10}")
        for name, (forward, backward, received, memory) in _in_processes(world, contenders).items():
            cells = [f"{len(sent)} calls, {sum(sent)} B" for sent in (forward, backward)]
            cells.append(f"{sum(received)} B" if name in ours else "not counted")
            print(f"{name:<28}{''.join(f'{x:>22}' for x in cells)}{memory:>10.2f}")


def _in_processes(world: int, contenders: dict[str, Loss]) -> dict[str, list]:
    """The bytes that each call sends forward, and backward, and gets; and the peak memory."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        result = Path(folder) / "sent.json"
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_count, (world, contenders, port, str(result)), world)
        return json.loads(result.read_text())


def _count(rank: int, world: int, contenders: dict[str, Loss], port: int, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    sent, received = list[int](), list[int]()
    _listen(sent, received)
    found = {}
    for name, loss in contenders.items():
        z1, z2 = (torch.randn(ROWS, COLUMNS, requires_grad=True) for _ in range(2))
        sent.clear()
        received.clear()
        value = loss(z1, z2)
        forward = list(sent)
        sent.clear()
        value.backward()
        counted = forward, list(sent), list(received)
        memory = peak_memory(lambda loss=loss, z=(z1, z2): torch.autograd.grad(loss(*z), z))
        found[name] = *counted, memory
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    leave_process_group()


class _Ours:
    """A loss that goes to another process as it is."""

    def __init__(self, gather: bool | str) -> None:
        self.gather = gather

    def __call__(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent_loss(z1, z2, 0.1, gather_distributed=self.gather)


def _gather_with_gradient(z1: Tensor, z2: Tensor) -> Tensor:
    """As open_clip with gather_with_grad and local_loss: autograd through the gather."""
    u1, u2 = F.normalize(z1), F.normalize(z2)
    all1, all2 = (torch.cat(differentiable_all_gather(u)) for u in (u1, u2))
    target = torch.arange(len(u1)) + dist.get_rank() * len(u1)
    one = F.cross_entropy(u1 @ all2.T / 0.1, target)
    return (one + F.cross_entropy(u2 @ all1.T / 0.1, target)) / 2


def _listen(sent: list[int], received: list[int]) -> None:
    """Note the bytes that this process passes to each call, and those that ours get from others."""

    def wrap(name: str, argument: int) -> None:
        original = getattr(dist, name)

        def counted(*arguments, **keywords):
            given = arguments[argument]
            # who receives a scatter gives None
            tensors = given if isinstance(given, list) else [] if given is None else [given]
            sent.append(_bytes(tensors))
            if name == "all_gather":
                received.append((dist.get_world_size() - 1) * sent[-1])
            return original(*arguments, **keywords)

        setattr(dist, name, counted)

    for name, argument in (
        ("all_gather", 1),
        ("all_reduce", 0),
        ("all_to_all", 1),
        ("reduce_scatter", 1),
        ("broadcast", 0),
        ("reduce", 0),
        ("scatter", 1),
    ):
        wrap(name, argument)
    in_a_batch = dist.batch_isend_irecv

    def counted_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        for op, counted in ((dist.isend, sent), (dist.irecv, received)):
            counted.append(_bytes([x.tensor for x in operations if x.op is op]))
        return in_a_batch(operations)

    dist.batch_isend_irecv = counted_batch


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
