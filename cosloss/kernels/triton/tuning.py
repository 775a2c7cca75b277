"""Which of its configurations a kernel is launched in: the fastest, measured at the first use.

It is measured once per kind of card for batches of 2,048 rows and more, and again from 8,192. Fewer
rows take the first configuration: what they cost is the launch, and a choice among so short times
is noise. The first is also taken where torch is asked for deterministic algorithms, since another
adds up in another order, and while a CUDA graph is captured, when nothing can be timed.
"""

from collections.abc import Callable, Hashable, Sequence
from math import inf
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from triton import Config, OutOfResources
from triton.testing import do_bench

from cosloss.kernels.triton.card import card_of
from cosloss.kernels.triton.tile import launch

MEASURED = 2048  # rows from which a batch is worth it
LARGE = 8192  # rows from which another configuration may be the fastest

_chosen: dict[Hashable, Config] = {}
_choosing = Lock()


def launch_fastest(
    kernel: Any,
    configs: Sequence[Config],
    grid: Any,
    like: Tensor,
    key: Sequence[str],
    *,
    rows: int,
    **arguments: Any,
) -> None:
    """Launch a kernel on the device of `like`.

    configs: of which the first is right for small batches.
    grid: the numbers of programs, or a function of the launch's constants.
    key: the names of the arguments with which the fastest configuration may change.
    rows, arguments: the kernel's; rows is the size of the batch.
    """

    def run(config: Config) -> None:
        launch(kernel, grid, like, rows=rows, **arguments, **config.all_kwargs())

    run(_fastest(run, configs, like, rows, (kernel, *(arguments[name] for name in key))))


def _fastest(
    run: Callable[[Config], None],
    configs: Sequence[Config],
    like: Tensor,
    rows: int,
    call: tuple[Hashable, ...],
) -> Config:
    first = configs[0]
    if rows < MEASURED or len(configs) == 1 or torch.are_deterministic_algorithms_enabled():
        return first
    key = call, tuple(configs), card_of(like), rows >= LARGE
    with _choosing, torch.cuda.device_of(like):  # two that measure at once would disturb each other
        if key not in _chosen:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return first
            _chosen[key] = min(configs, key=lambda config: _milliseconds(lambda: run(config)))
        return _chosen[key]


def _milliseconds(call: Callable[[], None]) -> float:
    try:
        return do_bench(call, return_mode="median")
    except OutOfResources:  # another Triton may need more than this one
        return inf
