"""What a row of the table is, and how far a function is from its float64 twin on a sample.

Two errors are measured, so that one number serves every scale:

- value: max |v - v64| / max(1, |v64|);
- gradient: for each row x of each differentiable tensor, the dimensionless gradient |x| g. These
  losses do not depend on a row's scale, so |x| g does not either. The error is the largest
  | |x| (g - g64) | relative to the largest | |x| g64 | in that tensor, or to the incoming gradient
  per row where that is larger (all rows parallel: g64 is 0). A zero row counts as |x| = 1.

The budget of an op in a dtype is set by its twin in that dtype at the generic samples. Hard samples
must keep to the same budget: there the twin itself may be useless.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosloss.arguments import check_callable, check_dtype, check_kind, usable_device

# Our op rounds in another order than its twin does: twice its error, and a few last digits.
BUDGET_FACTOR = 2.0
BUDGET_FLOOR = 4.0  # in units of the dtype's eps
# The float64 twin rounds too; at 4099 columns it is 5 eps from a unit diagonal.
JUDGE_ERROR = 8 * torch.finfo(torch.float64).eps


class Errors(NamedTuple):
    """Largest error of a value and of its gradients; inf where one of them is not finite."""

    value: float
    gradient: float

    def within(self, budget: "Errors") -> bool:
        return self.value <= budget.value and self.gradient <= budget.gradient


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Sample:
    """One call: `function(**inputs, **keywords)`.

    Args:
        name: what is special about it.
        inputs: float64 tensors, by parameter name, that gradients are taken of; they are rounded to
            the dtype under test, and the float64 twin sees the rounded numbers.
        keywords: every other argument (hyperparameters, labels, targets).
        layout: applied to each input on the way into the function, to give it unusual strides.
    """

    name: str
    inputs: Mapping[str, Tensor]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    layout: Callable[[Tensor], Tensor] = _same

    def __post_init__(self) -> None:
        check_kind("name", self.name, str, "a string")
        check_kind("inputs", self.inputs, Mapping, "a dict of tensors by parameter name")
        for x in self.inputs.values():
            check_kind("inputs", x, Tensor, "a dict of tensors by parameter name")
        check_kind("keywords", self.keywords, Mapping, "a dict of arguments by name")
        check_callable("layout", self.layout, "a function of a tensor")

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """Fresh leaves that require a gradient, in the order of `inputs`."""
        return [
            x.to(device=device, dtype=dtype, copy=True).requires_grad_()
            for x in self.inputs.values()
        ]

    def bind(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function` with only the differentiable inputs left, as positional arguments."""

        def call(*tensors: Tensor) -> Tensor:
            device = tensors[0].device
            keywords = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.keywords.items()
            }
            laid_out = map(self.layout, tensors)
            return function(**dict(zip(self.inputs, laid_out, strict=True)), **keywords)

        return call


@dataclass(frozen=True)
class Op:
    """One row of the table.

    Args:
        name: unique in the table.
        function: our op, a callable of `cosloss.functional`.
        twin: the same signature, from `cosloss.reference`.
        generic: gives samples at generic points: no gradient there is zero or infinite.
        hard: gives, for a dtype, the samples that break careless code in that dtype.
        peer: torch's own function of the same signature, if there is one.
    """

    name: str
    function: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    generic: Callable[[], Iterable[Sample]]
    hard: Callable[[torch.dtype], Iterable[Sample]]
    peer: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        check_kind("name", self.name, str, "a string")
        for name in ("function", "twin", "generic", "hard"):
            check_callable(name, getattr(self, name), "a function")
        if self.peer is not None:
            check_callable("peer", self.peer, "a function")

    def budget(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Errors:
        """The errors that `function` is allowed in this dtype."""
        measured = [errors(self.twin, self.twin, s, dtype, device) for s in self.generic()]
        floor = BUDGET_FLOOR * torch.finfo(dtype).eps + JUDGE_ERROR
        return Errors(
            BUDGET_FACTOR * max(e.value for e in measured) + floor,
            BUDGET_FACTOR * max(e.gradient for e in measured) + floor,
        )


def errors(
    function: Callable[..., Tensor],
    twin: Callable[..., Tensor],
    sample: Sample,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Errors:
    """How far `function` in `dtype` is from `twin` in float64, at the same rounded inputs.

    Args:
        function: takes the sample's inputs and keywords by name.
        twin: the same.
        sample: the call.
        dtype: the floating-point dtype under test.
        device: where both run.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: this machine has no such device.
    """
    check_callable("function", function, "a function")
    check_callable("twin", twin, "a function")
    check_kind("sample", sample, Sample, "a Sample(...)")
    check_dtype("dtype", dtype)
    usable_device("device", device)
    tensors = sample.tensors(dtype, device)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    value, value64 = sample.bind(function)(*tensors), sample.bind(twin)(*exact)
    # an incoming gradient that is neither 1 nor constant: a backward that ignores it is seen
    weight = torch.linspace(0.37, 1.1, value64.numel(), dtype=torch.float64, device=device)
    weight = weight.view_as(value64).to(value.dtype)
    grads = torch.autograd.grad(value, tensors, weight)
    grads64 = torch.autograd.grad(value64, exact, weight.double())
    incoming = float(weight.double().sum())
    return Errors(
        _largest((value.double() - value64).detach() / value64.detach().abs().clamp_min(1)),
        max(
            _gradient_error(grad, grad64, x, incoming * (x.shape[-1] / x.numel() if x.ndim else 1))
            for grad, grad64, x in zip(grads, grads64, exact, strict=True)
        ),
    )


def _gradient_error(grad: Tensor, grad64: Tensor, x: Tensor, natural: float) -> float:
    limits = torch.finfo(grad.dtype)
    expected = grad64.to(grad.dtype).double()  # a true gradient may overflow the dtype
    grad = grad.double()
    overflowed = expected.isinf() & (grad == expected)
    difference = torch.where(overflowed, 0, (grad - grad64).abs())
    # no dtype holds a number better than to its smallest subnormal
    difference = difference - difference.clamp_max(limits.smallest_normal * limits.eps)
    norm = x.detach().abs()
    if x.ndim:
        largest = norm.amax(-1, keepdim=True)  # squares of float64 may overflow too
        norm = torch.linalg.vector_norm(norm / largest, dim=-1, keepdim=True) * largest
    norm = torch.where(norm > 0, norm, 1)
    size = torch.where(overflowed, 0, grad64).abs() * norm
    return _largest(difference * norm) / max(float(size.amax()), natural)


def _largest(error: Tensor) -> float:
    largest = float(error.abs().amax())
    return largest if largest == largest else torch.inf
