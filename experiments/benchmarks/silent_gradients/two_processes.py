"""Two gloo processes: the gradients of the faults across processes, and the callbacks on them."""

import os
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from experiments.benchmarks.silent_gradients.collectives import ROWS, WORLD
from experiments.benchmarks.silent_gradients.processes import FAULTS, ProcessFault
from experiments.simclr.program.processes import leave_process_group

FEATURES, WIDTH = 6, 8
LIMIT = timedelta(seconds=30)


def batch() -> tuple[Tensor, Tensor]:
    """Two views of all processes' rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, WORLD * ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x[0], x[0] + 0.5 * x[1]


def rows(case: ProcessFault, rank: int) -> slice:
    """The rows of a process: half each, or 12 and 4."""
    middle = ROWS + 4 if case.uneven else ROWS
    return slice(0, middle) if rank == 0 else slice(middle, WORLD * ROWS)


def encoder() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(FEATURES, WIDTH, generator=generator, dtype=torch.float64)


def errors() -> dict[str, tuple[float, float]]:
    """Per case the error of the faulty and the mended version's averaged gradient, relative."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_errors, (folder, queue), WORLD)
    return queue.get()


def _join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=LIMIT
    )


def _errors(rank: int, folder: str, queue: "SimpleQueue[Any]") -> None:
    _join(rank, folder)
    found = {}
    for case in FAULTS:
        whole = encoder().requires_grad_()
        x1, x2 = batch()
        (right,) = torch.autograd.grad(case.whole(x1 @ whole, x2 @ whole), whole)
        part = rows(case, rank)
        pair = []
        for loss in (case.faulty, case.mended):
            weight = encoder().requires_grad_()
            (grad,) = torch.autograd.grad(loss(x1[part] @ weight, x2[part] @ weight), weight)
            dist.all_reduce(grad)
            pair.append(float((grad / WORLD - right).norm() / right.norm()))
        found[case.name] = (pair[0], pair[1])
    if rank == 0:
        queue.put(found)
    leave_process_group()


def results(names: list[str]) -> Iterable[dict[str, Any]]:
    """The callbacks' words on each case, in two processes of their own."""
    for case in FAULTS:
        if case.name not in names:
            continue
        found: dict[str, Any] = {"name": case.name, "what": "fault", "gradcheck": "not applicable"}
        for key, mended, twin in (
            ("alarm", False, None),
            ("watched", False, False),
            ("with a twin", False, True),
            ("mended", True, False),
        ):
            found[key] = _run(case, mended, twin)
        yield found


def _run(case: ProcessFault, mended: bool, twin: bool | None) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.start_processes(
                _trained,
                (folder, FAULTS.index(case), mended, twin, queue),
                WORLD,
                start_method="fork",
            )
        except Exception as error:
            last = str(error).strip().splitlines()[-1][:160]
            return {"word": "ended the run", "checks": 0, "reasons": [last]}
    return queue.get()


def _trained(rank: int, folder: str, index: int, mended: bool, twin: Any, queue: Any) -> None:
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from experiments.benchmarks.silent_gradients import training
    from experiments.benchmarks.silent_gradients.cases import Case

    # Lightning reads its place from the environment, and takes the group that is there
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "GROUP_RANK": "0",
    }
    _join(rank, folder)
    fault = FAULTS[index]
    loss = fault.mended if mended else fault.faulty
    part = rows(fault, rank)
    count = len(range(WORLD * ROWS)[part])
    case = Case(fault.name, lambda: loss, lambda h, g: h.chunk(2), (2 * count, WIDTH))
    options = {
        "strategy": "ddp",
        "devices": WORLD,
        "plugins": [TorchElasticEnvironment()],
        "use_distributed_sampler": False,
        "default_root_dir": Path(folder),
    }
    if twin is None:
        found = training.unwatched(case, case.make, **options)
    else:
        # a per-call twin is of the local call: people have the mended loss, which gathers too
        found = training.watched(case, case.make, fault.mended if twin else None, **options)
    if rank == 0:
        queue.put(found)
    leave_process_group()
