"""The statistics of a logit matrix and the gradients through it, tile by tile in torch operations.

Shapes: rows R (N, D); columns C (M, D), or None where they are the rows; logits X = R C^T + bias,
(N, M), in R's dtype; statistics (N,) in float64, or (N + M,) where columns have losses of their
own, rows first. Of K prefixes every one has logits and statistics of its own.
"""

from torch import Tensor

from cosloss.kernels.eager.prefix_loop import PrefixLoop
from cosloss.kernels.eager.tile_loop import EagerLoop
from cosloss.kernels.prefixes import Prefixes
from cosloss.kernels.schedule import Needs, TileLoop, functions_of
from cosloss.problem import Problem

KEEPS_TILES = True
SHARES_PREFIXES = True
REACHES_INPUTS = False


def _loop(
    r: Tensor,
    c: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
    needs: Needs,
    prefixes: Prefixes | None,
) -> TileLoop:
    if prefixes is None:
        return EagerLoop(r, c, bias, problem, needs)
    return PrefixLoop(r, c, bias, problem, needs, prefixes)


forward, forward_backward, backward = functions_of(_loop)
