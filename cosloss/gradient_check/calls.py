"""Calling a function of nested inputs at a point of one's choice, and its gradient there."""

import math
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from cosloss.gradient_check.copies import copy_tensor, wide_dtype
from cosloss.gradient_check.cotangents import Cotangents
from cosloss.gradient_check.generators import generators_kept
from cosloss.gradient_check.nests import Function, change_each, tensors_in


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a function's result through which a gradient flows, by name."""
    found = tensors_in(result).items()
    return {n: t for n, t in found if t.requires_grad and (t.is_floating_point() or t.is_complex())}


class _Fresh(torch.autograd.Function):
    """The identity, as a copy of its own: a function may write into what it is called with.

    Of what nobody reads afterwards, `spent`, not a copy but the memory itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spent: bool) -> Tensor:
        if not spent or x.layout is not torch.strided or type(x) is not Tensor:
            return copy_tensor(x)
        # a tensor of its own, no view: autograd lets nobody write into those of a Function
        alias = torch.empty(0, dtype=x.dtype, device=x.device)
        return alias.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def copied_inputs(
    inputs: Any, wanted: Container[str], spent: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """Copies to call a function with, and the leaves behind those of the names `wanted`.

    Of inputs that nobody reads afterwards, `spent`, no copies but the tensors themselves.
    """
    leaves: dict[str, Tensor] = {}

    def copied(name: str, t: Tensor) -> Tensor:
        if name not in wanted:
            return copy_tensor(t)
        if name.startswith("self."):  # parameters are leaves, what a function is called with is not
            leaves[name] = copy_tensor(t).requires_grad_()
            return leaves[name]
        leaf = copy_tensor(t) if t.is_inference() else t.detach()
        leaves[name] = leaf.requires_grad_()
        return _Fresh.apply(leaves[name], spent)

    return change_each(copied, inputs), leaves


class Gradients(Mapping[str, Tensor]):
    """Gradients by name, and "value"; kept as narrow as they came, and given in float64.

    Complex ones are given as pairs of real numbers.

    Args:
        tensors: by name; "value" is the outputs.
        scale: what the gradients are divided by.
    """

    def __init__(self, tensors: Mapping[str, Tensor | list[Tensor]], scale: float = 1.0) -> None:
        self._tensors = tensors
        self._scale = scale

    def __getitem__(self, name: str) -> Tensor:
        found = self._tensors[name]
        if isinstance(found, list):
            flat = [as_real(t).flatten() for t in found]
            return flat[0] if len(flat) == 1 else torch.cat(flat)
        return as_real(found) if self._scale == 1.0 else as_real(found) / self._scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def gradients(
    fn: Function, inputs: Any, wanted: Sequence[str], cotangents: Cotangents, spent: bool = False
) -> Gradients:
    """The gradients of fn(inputs), weighted by `cotangents`, on the inputs `wanted`.

    They are computed in the inputs' own dtypes, on detached copies, or, of inputs that are `spent`,
    on themselves. Under "value" stand all outputs, as one vector.
    """
    copies, leaves = copied_inputs(inputs, wanted, spent)
    return backward(fn(copies), leaves, cotangents)


def backward(result: Any, leaves: Mapping[str, Tensor], cotangents: Cotangents) -> Gradients:
    """As `gradients`, from a result whose graph exists."""
    outputs = outputs_of(result)
    if not outputs:
        raise ValueError("the result does not depend on its inputs by autograd")
    recorded = cotangents.recorded
    if recorded is not None and recorded.keys() <= outputs.keys():
        # an argument that is handed through is no output of the recorded call
        outputs = {name: outputs[name] for name in outputs if name in recorded}
    weights = cotangents.on(outputs)
    made_up = recorded is None
    half = any(t.dtype == torch.float16 for t in (*outputs.values(), *leaves.values()))
    # float16 gradients underflow without the loss scale that training uses
    scale = _float16_scale(outputs, leaves, weights) if half and made_up else 1.0
    scaled = [weight * scale for weight in weights] if scale != 1.0 else weights
    with without_autocast(outputs):  # a training loop calls backward outside of it
        found = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), scaled, allow_unused=True
        )
    grads = {
        # a function may hand back a buffer that it uses again
        name: torch.zeros_like(leaf) if g is None else copy_tensor(g)
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
    return Gradients({"value": [t.detach() for t in outputs.values()], **grads}, scale)


def as_real(t: Tensor, detach: bool = True) -> Tensor:
    """A dense float64 tensor, detached or not; a complex one with a last dimension of 2."""
    t = t.detach() if detach else t
    t = t if t.layout is torch.strided else t.to_dense()
    return (
        torch.view_as_real(t.to(torch.complex128).resolve_conj()) if t.is_complex() else t.double()
    )


def _float16_scale(
    outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor], weights: list[Tensor]
) -> float:
    # a shared graph would not survive a Function that writes into what it saved: by the outputs
    largest = max((float(w.abs().max()) for w in weights if w.numel()), default=1.0)
    entries = max((leaf.numel() for leaf in leaves.values()), default=1)
    scalar = all(output.ndim == 0 for output in outputs.values())
    return (
        2.0 ** round(math.log2(min(2.0**14, max(1.0, entries**0.5)) / largest)) if scalar else 1.0
    )


def in_float64(inputs: Any) -> Any:
    """The inputs detached, floating-point tensors as float64, complex ones as complex128."""

    def widen(name: str, t: Tensor) -> Tensor:
        return copy_tensor(t, wide_dtype(t.dtype)) if t.dtype != wide_dtype(t.dtype) else t.detach()

    return change_each(widen, inputs)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A scope with gradients on and outside inference mode that leaves the generators as found."""
    with generators_kept(), torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def without_autocast(inputs: Any) -> Iterator[None]:
    """A scope in which autocast is off on the inputs' devices."""
    with ExitStack() as stack:
        for kind in {t.device.type for t in tensors_in(inputs).values()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def full_precision(inputs: Any) -> Iterator[None]:
    """A scope without autocast, in which compiled functions run as they are written."""
    with without_autocast(inputs), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; the import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
