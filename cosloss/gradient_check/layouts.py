"""The same numbers in other memory: a gradient must not depend on where its tensors lie.

A backward that reads memory in order takes a transposed gradient, a slice of a wider buffer or an
expanded number for another gradient, and nothing is raised. Here a function is repeated with such
incoming gradients and inputs, and must give what it gives with contiguous ones, up to rounding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosloss.gradient_check.calls import copied_inputs, gradients
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.generators import Draw
from cosloss.gradient_check.nests import Function, change_each, display_name, tensors_in

Layout = Callable[[Tensor], Tensor]
CONSTANT = 0.625
# what reading the wrong numbers does is of order 1; another order of summation is of order u
NOISE = 16.0


def contiguous(t: Tensor) -> Tensor:
    """The tensor in one block of memory, its last dimension innermost."""
    return t.contiguous() if _dense(t) else t


def as_it_is(t: Tensor) -> Tensor:
    """The tensor itself."""
    return t


def transposed(t: Tensor) -> Tensor:
    """The same numbers with the first dimension innermost; of one dimension, every other place."""
    if not _dense(t) or t.ndim == 0:
        return t
    if t.ndim == 1:
        return torch.stack([t, -3 * t.flip(0)], 1)[:, 0]
    order = list(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


def sliced(t: Tensor) -> Tensor:
    """The same numbers as the first half of each row of a wider buffer."""
    if not _dense(t) or t.ndim == 0:
        return t
    return torch.cat([t, -3 * t.flip(0)], -1)[..., : t.shape[-1]]


def expanded(t: Tensor) -> Tensor:
    """One number in memory for all entries, as a sum hands it back."""
    return t.new_full((), CONSTANT).expand(t.shape)


def constant(t: Tensor) -> Tensor:
    """What `expanded` looks like, entry by entry in memory."""
    return torch.full_like(t, CONSTANT, memory_format=torch.contiguous_format)


def laid_out(inputs: Any, layout: Layout, but: str = "") -> Any:
    """The inputs with floating-point tensors in that layout, but those whose names begin so."""

    def place(name: str, t: Tensor) -> Tensor:
        if but and name.startswith(but):
            return t
        return layout(t.detach()) if _dense(t) else t

    return change_each(place, inputs)


def layout_faults(
    fn: Function, inputs: Any, wanted: list[str], cotangents: Cotangents, u: float
) -> dict[str, str]:
    """What is wrong in another layout, by the name of the input whose gradient shows it.

    A function that raises there, or returns other values, is not accused.

    Args:
        fn: a function of the nest `inputs`.
        inputs: the nest.
        wanted: names of the inputs whose gradients are compared.
        cotangents: on the outputs.
        u: the unit roundoff of the coarsest format at work.
    """
    plain = laid_out(inputs, contiguous)

    def run(
        layout: Layout = contiguous, to_inputs: Layout | None = None, at: Any = plain
    ) -> Mapping[str, Tensor] | None:
        point = laid_out(at, to_inputs, but="self.") if to_inputs else at
        try:
            return gradients(fn, point, wanted, cotangents.laid_out(layout))
        except Exception:  # what raises is not silent
            return None

    base = run()
    if base is None:
        return {}
    # outputs without dimensions have one layout
    trials: list[tuple[str, Layout, Layout | None]] = []
    if base["value"].numel() > 1:
        trials = [
            ("the incoming gradient transposed in memory", transposed, None),
            ("the incoming gradient a slice of a wider buffer", sliced, None),
            ("the incoming gradient expanded from one number", expanded, None),
        ]
    if not _draws(fn, plain):  # a dropout's mask is drawn in memory's order
        trials += [("the inputs transposed in memory", contiguous, transposed)]
    for text, layout, to_inputs in trials:
        found = run(layout, to_inputs)
        right = run(constant) if layout is expanded else base
        if found is None or right is None or _off(found, right, ["value"], u, {}):
            continue
        if not _off(found, right, wanted, u, {}):
            continue
        noise = _noise(run, right, plain, wanted, u, constant if layout is expanded else contiguous)
        wrong = _off(found, right, wanted, u, noise)
        if wrong:
            return {
                name: f"{display_name(name)}: off by {error:.1e} of its norm with {text} "
                "(memory read as if it were contiguous?)"
                for name, error in wrong.items()
            }
    return {}


def _draws(fn: Function, inputs: Any) -> bool:
    """Whether a call draws random numbers, or may, where it refuses to be watched."""
    seeded = _Seeded()
    try:
        with seeded:
            fn(copied_inputs(inputs, ())[0])
    except Exception:  # a compiled function, say
        return True
    return seeded.drew


class _Seeded(TorchDispatchMode):
    """Sees operations that draw random numbers."""

    drew = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.drew = self.drew or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _off(
    found: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    names: list[str],
    u: float,
    noise: dict[str, float],
) -> dict[str, float]:
    """Relative errors of what differs by more than roundings."""
    errors = {}
    for name in names:
        error, norm = float((found[name] - right[name]).norm()), float(right[name].norm())
        if not error <= u**0.5 * norm + NOISE * noise.get(name, 0.0):
            errors[name] = error / (norm or 1.0)
    return errors


def _noise(
    run: Callable[..., Any],
    right: Mapping[str, Tensor],
    plain: Any,
    wanted: list[str],
    u: float,
    layout: Layout,
) -> dict[str, float]:
    """What roundings of the inputs, and a second call, do to each gradient, as a norm."""
    draw = Draw(0)

    def nearby(name: str, t: Tensor) -> Tensor:
        return (t.detach() * (1 + 4 * u * draw.signs(t.real))).to(t.dtype) if name in wanted else t

    runs = [run(layout)] + [run(layout, None, change_each(nearby, plain)) for _ in range(2)]
    moves = [{n: float((r[n] - right[n]).norm()) for n in wanted} for r in runs if r is not None]
    return {name: max((move[name] for move in moves), default=0.0) for name in wanted}


def same_memory(inputs: Any, cotangents: Cotangents) -> bool:
    """Whether everything is contiguous as it is."""
    tensors = [*tensors_in(inputs).values(), *(cotangents.recorded or {}).values()]
    return all(t.is_contiguous() for t in tensors if _dense(t))


def _dense(t: Tensor) -> bool:
    floating = t.is_floating_point() or t.is_complex()
    return floating and t.layout is torch.strided and not t.is_quantized and not t.is_nested
