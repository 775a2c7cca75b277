"""Cosine similarity, the cosine embedding loss and pairwise similarity, forward and backward."""

import platform
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from cosloss.testing import OPS
from experiments.benchmarks.measure import (
    forward_and_backward,
    keeps_its_budget,
    measure,
    peak_memory,
    show,
)

SHAPES = ((128, 128), (8192, 512), (65536, 128), (4096, 2048))
LIMIT = "two copies of an input"
TABLE = {op.name: op for op in OPS}


def run(rounds: int) -> bool:
    """Print the tables; False if an op is beyond its error budget."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, CPU"
    )
    right = [_similarity(*shape, rounds) for shape in SHAPES]
    right.append(_embedding_loss(65536, 128, rounds))
    right.append(_pairwise(256, 128, rounds, broadcast=True))
    right.append(_pairwise(2048, 128, rounds, broadcast=False))
    _show_broadcast_memory(2048, 128)
    right.append(_pairwise_of_one(2048, 128, rounds))
    return all(right)


def _similarity(rows: int, columns: int, rounds: int) -> bool:
    op = TABLE["cosine_similarity"]
    x, y = _inputs(rows, columns)
    functions = {
        "cosloss": op.function,
        "twin": op.twin,
        "torch": op.peer,
        "torch.compile of torch": torch.compile(op.peer, dynamic=False),
    }
    # small sizes are over before a clock has settled
    return _compare(op.name, functions, (x, y), rounds * (30 if rows * columns < 1 << 18 else 1))


def _embedding_loss(rows: int, columns: int, rounds: int) -> bool:
    op = TABLE["cosine_embedding_loss"]
    x, y = _inputs(rows, columns)
    target = torch.arange(rows) % 2 * 2.0 - 1
    functions = {
        "cosloss": op.function,
        "twin": op.twin,
        "torch": op.peer,
        "torch.compile of torch": torch.compile(op.peer, dynamic=False),
    }
    return _compare(op.name, functions, (x, y, target), rounds)


def _pairwise(rows: int, columns: int, rounds: int, broadcast: bool) -> bool:
    op = TABLE["pairwise_cosine_similarity"]
    functions = {"cosloss": op.function, "twin": op.twin, "normalise, then matmul": _normalised}
    functions["torch.compile of that"] = torch.compile(_normalised, dynamic=False)
    if broadcast:
        functions["torch by broadcasting"] = _broadcast
    return _compare(op.name, functions, _inputs(rows, columns), rounds)


def _show_broadcast_memory(rows: int, columns: int) -> None:
    # it holds six tensors of N x N x D at once
    needed = 7 * 4 * rows**2 * columns
    # the system's count has what it would give back, its file cache above all
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if available is None or int(available[1]) * 1024 < needed:
        print(f"torch by broadcasting: not run for want of {needed / 2**30:.0f} GiB of memory")
        return
    memory = peak_memory(forward_and_backward(_broadcast, *_inputs(rows, columns)))
    print(f"torch by broadcasting: {memory:.1f} MiB")


def _pairwise_of_one(rows: int, columns: int, rounds: int) -> bool:
    op = TABLE["pairwise_cosine_similarity"]
    functions = {"cosloss": op.function, "twin": op.twin}
    functions["normalise, then matmul"] = lambda x: _normalised(x, x)
    functions["torch.compile of that"] = torch.compile(lambda x: _normalised(x, x), dynamic=False)
    return _compare(op.name, functions, _inputs(rows, columns)[:1], rounds)


def _compare(name, functions, inputs: tuple[Tensor, ...], rounds: int) -> bool:
    torch.compiler.reset()
    right = keeps_its_budget(TABLE[name])
    steps = {label: forward_and_backward(f, *inputs) for label, f in functions.items()}
    copies = [torch.empty_like(x) for x in inputs[:2]]
    steps[LIMIT] = lambda: [copy.copy_(x.detach()) for copy, x in zip(copies, inputs, strict=False)]
    shape = " x ".join(map(str, inputs[0].shape))
    show(f"{name}, {shape}, float32", measure(steps, rounds), LIMIT, right)
    return right


def _inputs(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, rows, columns, generator=generator)
    return x.clone().requires_grad_(), y.clone().requires_grad_()


def _normalised(x1: Tensor, x2: Tensor) -> Tensor:
    return torch_functional.normalize(x1, dim=1) @ torch_functional.normalize(x2, dim=1).T


def _broadcast(x1: Tensor, x2: Tensor) -> Tensor:
    return torch_functional.cosine_similarity(x1[:, None], x2[None], dim=-1)
