"""Interleaved timing and peak memory of contenders, and the table that shows them."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cosloss import release_memory
from cosloss.testing import Op, errors

Step = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """Milliseconds (median, and the fastest call) and the peak of the memory allocated, in MiB."""

    median: float
    fastest: float
    memory: float


def measure(contenders: Mapping[str, Step], rounds: int) -> dict[str, Measured]:
    """All contenders in one process, taking turns, so that a busy machine disturbs them alike.

    The turns are shuffled: what the one before has freed decides whether fresh memory costs time.
    """
    for step in contenders.values():
        step()  # compiles, and fills caches
        step()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    turns, shuffled = list(contenders.items()), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(turns)
        for name, step in turns:
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Measured(1e3 * statistics.median(t), 1e3 * min(t), peak_memory(contenders[name]))
        for name, t in seconds.items()
    }


def peak_memory(step: Step) -> float:
    """The most memory that one step's tensors hold at once, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def keeps_its_budget(op: Op, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the op is right at every sample of its row of the table."""
    budget = op.budget(dtype)
    samples = (*op.generic(), *op.hard(dtype))
    return all(errors(op.function, op.twin, s, dtype).within(budget) for s in samples)


def forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """A step that calls the function and takes the gradients of its leaves."""
    leaves = [x for x in inputs if x.requires_grad]
    shape = function(*inputs).shape
    grad = 0.37 * torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return lambda: torch.autograd.grad(function(*inputs), leaves, grad)


def compare(
    title: str,
    contenders: Mapping[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    rounds: int,
    right: bool,
) -> None:
    """Measure losses forward and backward, and print a table; no speed-up unless right."""
    torch.compiler.reset()
    steps = {name: forward_and_backward(loss, *inputs) for name, loss in contenders.items()}
    found = measure(steps, rounds)
    release_memory()  # the memory kept between steps counts as ours
    ours = replace(found["cosloss"], memory=peak_memory(steps["cosloss"]))
    found["cosloss"] = ours
    print(f"\n{title}")
    print(f"{'':<24}{'median ms':>10}{'fastest':>10}{'peak MiB':>10}{'of ours':>9}{'':>9}")
    for name, m in found.items():
        faster = f"{m.median / ours.median:.2f}x" if right else "wrong"
        print(
            f"{name:<24}{m.median:>10.1f}{m.fastest:>10.1f}{m.memory:>10.1f}"
            f"{m.memory / ours.memory:>8.1f}x{faster:>9}"
        )


def show(title: str, measured: Mapping[str, Measured], limit: str, right: bool) -> None:
    """Print a table; `limit` names the contender that only copies. No speed-up unless right."""
    ours = measured["cosloss"]
    copies = measured[limit].median
    print(f"\n{title}")
    print(f"{'':<28}{'median ms':>10}{'fastest':>10}{'peak MiB':>10}{'of copy':>9}{'ours is':>9}")
    for name, m in measured.items():
        speed_up = f"{m.median / ours.median:.2f}x" if right else "wrong"
        print(
            f"{name:<28}{m.median:>10.3f}{m.fastest:>10.3f}{m.memory:>10.1f}"
            f"{copies / m.median:>9.0%}{speed_up:>9}"
        )
    if not right:
        print("our op is beyond its error budget: no speed-up is claimed")
