"""How far a function's own roundings move its gradient: every operation rounded at random.

The inputs' roundings do not say it: 1 - (1 - eps) in float32 is off by 6 % for eps = 1e-6 whatever
the inputs are, and so is the gradient that it multiplies. In float64, each operation's result times
(1 + u s), s between -1 and 1, shows what a format with the unit roundoff u does to the gradient.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosloss.gradient_check.calls import gradients
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.nests import Function

RUNS = 3
# of numbers that are copied, and not computed
EXACT = ("clone", "_to_copy", "copy", "zeros", "ones", "full", "eye", "arange", "empty", "cat")


class _Rounded(TorchDispatchMode):
    def __init__(self, u: float, draw: Draw) -> None:
        super().__init__()
        self.u = u
        self.draw = draw

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        aliased = any(r.alias_info is not None for r in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        if aliased or name.startswith(EXACT):
            return found
        if isinstance(found, tuple):
            return tuple(map(self._round, found))
        return self._round(found)

    def _round(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dtype != torch.float64:
            return t
        return t * (1 + self.u * (2 * self.draw.uniform(t) - 1))


def rounding_moves(
    fn: Function,
    exact: Any,
    wanted: list[str],
    cotangents: Cotangents,
    u: float,
    truth: Mapping[str, Tensor],
) -> dict[str, float]:
    """The largest norm by which roundings of u move each gradient; empty where they cannot."""
    moves = dict.fromkeys(truth, 0.0)
    draw = Draw(cotangents.seed + 2)
    try:
        for _ in range(RUNS):
            with _Rounded(u, draw):
                found = gradients(fn, exact, wanted, cotangents)
            moves = {n: max(m, float((found[n] - truth[n]).norm())) for n, m in moves.items()}
    except Exception:  # a wrapper may refuse modes
        return {}
    return {name: move for name, move in moves.items() if move == move}
