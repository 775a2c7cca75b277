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
from experiments.simclr.program.processes import leave_process_group

WORLD, ROWS, COLUMNS = 2, 256, 128


def show_collectives() -> None:
    """Print the calls and the bytes that each process hands over, forward and backward."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        result = Path(folder) / "sent.json"
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_count, (port, str(result)), WORLD)
        found = json.loads(result.read_text())
    print(f"\nNT-Xent over {WORLD} processes, {ROWS} rows per view in each, D = {COLUMNS}")
    print(f"{'':<28}{'forward':>22}{'backward':>22}")
    for name, phases in found.items():
        cells = "".join(f"{f'{len(sent)} calls, {sum(sent)} B':>22}" for sent in phases)
        print(f"{name:<28}{cells}")


def _count(rank: int, port: int, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    sent: list[int] = []
    _listen(sent)
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cosloss": lambda a, b: nt_xent_loss(a, b, 0.1, gather_distributed=True),
        "lightly": NTXentLoss(temperature=0.1, gather_distributed=True),
        "open_clip's gather_with_grad": _gather_with_gradient,
    }
    found = {}
    for name, loss in contenders.items():
        z1, z2 = (torch.randn(ROWS, COLUMNS, requires_grad=True) for _ in range(2))
        sent.clear()
        value = loss(z1, z2)
        forward = list(sent)
        sent.clear()
        value.backward()
        found[name] = (forward, list(sent))
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    leave_process_group()


def _gather_with_gradient(z1: Tensor, z2: Tensor) -> Tensor:
    """As open_clip with gather_with_grad and local_loss: autograd through the gather."""
    u1, u2 = F.normalize(z1), F.normalize(z2)
    all1, all2 = (torch.cat(differentiable_all_gather(u)) for u in (u1, u2))
    target = torch.arange(len(u1)) + dist.get_rank() * len(u1)
    one = F.cross_entropy(u1 @ all2.T / 0.1, target)
    return (one + F.cross_entropy(u2 @ all1.T / 0.1, target)) / 2


def _listen(sent: list[int]) -> None:
    """Note the bytes of every tensor that this process passes to a collective."""

    def wrap(name: str, argument: int) -> None:
        original = getattr(dist, name)

        def counted(*arguments, **keywords):
            given = arguments[argument]
            # who receives a scatter gives None
            tensors = given if isinstance(given, list) else [] if given is None else [given]
            sent.append(sum(t.numel() * t.element_size() for t in tensors))
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
