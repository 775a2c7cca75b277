"""A case of the benchmark: a function as people call it behind an encoder, and what is known of it.

A case's arguments are made from the encoder's output h, so that they depend on one another as in
training: triplet(h, h.roll(1, 0), h.roll(2, 0)).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Arguments = Callable[[Tensor, torch.Generator], tuple[Any, ...]]
Finish = Callable[[Any], Tensor]


def weigh(outputs: Any) -> Tensor:
    """A scalar of any nest of outputs: scalars added up, tensors with generic weights."""
    if isinstance(outputs, Tensor):
        value = torch.view_as_real(outputs) if outputs.is_complex() else outputs
        if value.ndim == 0:
            return value
        generator = torch.Generator().manual_seed(value.numel())
        weights = torch.randn(value.shape, generator=generator)
        return (value * weights.to(value)).sum() / value.shape[0]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return sum((weigh(value) for value in values), torch.zeros(()))


@dataclass(frozen=True)
class Case:
    """A function, and how it is called in training.

    Attributes:
        name: unique over the benchmark.
        make: builds the function or module anew; of a fault the faulty version.
        arguments: of the encoder's output and a generator for the rest of the batch.
        shape: of the encoder's output.
        finish: a scalar of the function's outputs.
        twin: the same in plain torch operations, where people would have it.
        stops: the gradient that is meant to be stopped, if any: the twin then judges, and finite
            differences do not.
        alone: whether gradcheck can be asked without the encoder (layers without floating-point
            arguments cannot).
        single: whether it takes no float64.
        needs: packages that must be installed.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    arguments: Arguments
    shape: tuple[int, ...] = (16, 8)
    finish: Finish = weigh
    twin: Callable[..., Any] | None = None
    stops: str = ""
    alone: bool = True
    single: bool = False
    needs: tuple[str, ...] = ()

    def missing(self) -> str:
        """The packages that this case needs and that are not installed."""
        return ", ".join(name for name in self.needs if find_spec(name) is None)

    def value(self, function: Callable[..., Any], h: Tensor, batch: int = 0) -> Tensor:
        """The scalar that training would differentiate."""
        generator = torch.Generator().manual_seed(batch)
        return self.finish(function(*self.arguments(h, generator)))

    def sample(self, dtype: torch.dtype = torch.float64, batch: int = 0) -> Tensor:
        """An encoder's output."""
        generator = torch.Generator().manual_seed(1000 + batch)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Fault(Case):
    """A fault that has been in somebody's released code: `make` builds it, `mend` the right one.

    Attributes:
        source: the public report.
        kind: of fault: layout, missing term, detach, in-place, scale, dtype, last block, NaN, ...
        area: contrastive, or another field.
        tolerance: of the mended gradient against float64's, for faults of low precision.
    """

    source: str = ""
    kind: str = ""
    area: str = "kernel"
    mend: Callable[[], Callable[..., Any]] | None = None
    tolerance: float = 1e-5


FAULTS: list[Fault] = []
RIGHT: list[Case] = []


def fault(
    source: str, kind: str, arguments: Arguments, **options: Any
) -> Callable[[Callable[[bool], Callable[..., Any]]], Callable[[bool], Callable[..., Any]]]:
    """Register a builder of both versions, `builder(mended)`, under its name."""

    def register(builder: Callable[[bool], Callable[..., Any]]) -> Callable[[bool], Any]:
        FAULTS.append(
            Fault(
                builder.__name__,
                lambda: builder(False),
                arguments,
                source=source,
                kind=kind,
                mend=lambda: builder(True),
                **options,
            )
        )
        return builder

    return register


def right(
    name: str, make: Callable[[], Callable[..., Any]], arguments: Arguments, **options: Any
) -> None:
    """Register a right function."""
    RIGHT.append(Case(name, make, arguments, **options))


def plain(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """The `make` of a function that has no state."""
    return lambda: function


class Op(torch.autograd.Function):
    """A forward and a backward, given as plain functions of the arguments."""

    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, *args: Any) -> Any:
        ctx.rule = backward
        ctx.others = [None if isinstance(a, Tensor) else a for a in args]
        ctx.at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        out = forward(*args)
        ctx.single = isinstance(out, Tensor)
        outputs = [out] if ctx.single else list(out)
        ctx.save_for_backward(*(args[i] for i in ctx.at), *outputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        args = list(ctx.others)
        for i, tensor in zip(ctx.at, saved, strict=False):
            args[i] = tensor
        out = saved[len(ctx.at) :]
        grad = grads[0] if ctx.single else grads
        found = ctx.rule(grad, out[0] if ctx.single else out, *args)
        found = found if isinstance(found, tuple) else (found,)
        return (None, None, *found, *[None] * (len(args) - len(found)))


def op(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A custom function: backward(grad, out, *args) gives the gradients of the first arguments."""

    def call(*args: Any) -> Any:
        return Op.apply(forward, backward, *args)

    return call


def raw(grad: Tensor) -> Tensor:
    """The gradient as a kernel sees it that takes its memory for contiguous."""
    flat = grad.new_empty(0).set_(grad.untyped_storage())
    at = grad.storage_offset() + torch.arange(grad.numel())
    return flat[at % len(flat)].reshape(grad.shape)


def plain_gradient(function: Callable[..., Tensor], grad: Tensor, *args: Tensor) -> Any:
    """The gradients of a plain torch function, for a backward that is right but for one thing."""
    with torch.enable_grad():
        leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args]
        wanted = [a for a in leaves if a.requires_grad]
        return torch.autograd.grad(function(*leaves), wanted, grad, allow_unused=True)


def clone(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a module, with buffers and Python attributes; a function as it is."""
    return copy.deepcopy(function) if isinstance(function, nn.Module) else function


def draw(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Random normal numbers of the batch, in the dtype of the encoder's output."""
    return torch.randn(shape or like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def classes(generator: torch.Generator, rows: int, count: int) -> Tensor:
    """Random labels."""
    return torch.randint(count, (rows,), generator=generator)
