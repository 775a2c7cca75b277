"""The table's ops in other people's surroundings: each must give what it gives without them.

A surrounding takes an op, one of its samples, a dtype and a device, and returns the worst relative
difference between the value and gradients that it finds there and those found outside.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cosloss.kernels.scratch import release_memory
from cosloss.testing.op import Op, Sample

Surrounding = Callable[[Op, Sample, torch.dtype, str], float]

# Outside and inside, the same numbers may be added in another order: units of the dtype's eps. In
# float64, 135 were seen, of the sigmoid loss's temperature, whose gradient is a difference.
TOLERANCE = 512


def default_device(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> float:
    """Tensors made without a device would be elsewhere: on `meta`, without memory."""

    def inside() -> list[Tensor]:
        tensors = sample.tensors(dtype, device)
        with torch.device("meta"):
            return _found(op, sample, tensors)

    return _difference(inside(), _found(op, sample, sample.tensors(dtype, device)))


def default_dtype(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> float:
    """Numbers made without a dtype would be in float16."""
    outside = _found(op, sample, sample.tensors(dtype, device))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        return _difference(_found(op, sample, sample.tensors(dtype, device)), outside)
    finally:
        torch.set_default_dtype(before)


def transform(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> float:
    """`torch.func.grad` over other tensors than the op's, and over its own."""
    call = sample.bind(op.function)
    tensors = sample.tensors(dtype, device)
    value, *grads = _found(op, sample, tensors)
    other = torch.func.grad(lambda w: (w * call(*tensors)).sum())(torch.ones_like(value))

    def weighted(*inputs: Tensor) -> Tensor:
        return (call(*inputs) * _incoming(value)).sum()

    plain = [x.detach() for x in tensors]
    own = torch.func.grad(weighted, tuple(range(len(plain))))(*plain)
    return _difference([other, *own], [value, *grads])


def batching(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> float:
    """`torch.func.vmap` over several problems at once."""
    call = sample.bind(op.function)
    tensors = [x.detach() for x in sample.tensors(dtype, device)]
    stacks = [torch.stack([x, x.flip(0) if x.ndim else x / 2]) for x in tensors]
    one_by_one = torch.stack([call(*parts) for parts in zip(*stacks, strict=True)])
    return _difference([torch.func.vmap(call)(*stacks)], [one_by_one])


def autocast(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> float:
    """float64, whatever the dtype, inside of bfloat16 autocast, which leaves it alone."""
    dtype = torch.float64
    outside = _found(op, sample, sample.tensors(dtype, device))
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        return _difference(_found(op, sample, sample.tensors(dtype, device)), outside)


def inference_mode(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> float:
    """An evaluation under `torch.inference_mode`, and a training step after it."""
    tensors = sample.tensors(dtype, device)
    release_memory()  # the evaluation is the first to make any
    with torch.inference_mode():
        value = sample.bind(op.function)(*(x.clone() for x in tensors))
    found = _found(op, sample, tensors)
    return _difference([value.clone(), *found], [found[0], *_found(op, sample, tensors)])


def export(op: Op, sample: Sample, dtype: torch.dtype, device: str) -> float:
    """`torch.export` with a dynamic number of rows, called with twice as many."""
    named = [*sample.inputs, *(n for n, x in sample.keywords.items() if isinstance(x, Tensor))]
    fixed = {n: x for n, x in sample.keywords.items() if not isinstance(x, Tensor)}
    tensors = [x.detach() for x in sample.tensors(dtype, device)]
    tensors += [sample.keywords[n].to(device) for n in named[len(tensors) :]]

    class Exported(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            arguments: dict[str, Any] = dict(zip(named, given, strict=True))
            return op.function(**arguments, **fixed)

    dynamic = tuple({0: torch.export.Dim.DYNAMIC} if x.ndim else None for x in tensors)
    program = torch.export.export(Exported(), tuple(tensors), dynamic_shapes=(dynamic,))
    twice = [torch.cat([x, x.flip(0)]) if x.ndim else x for x in tensors]
    return _difference([program.module()(*twice)], [Exported()(*twice)])


SURROUNDINGS: tuple[Surrounding, ...] = (
    default_device,
    default_dtype,
    transform,
    batching,
    autocast,
    inference_mode,
    export,
)


def _found(op: Op, sample: Sample, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The value, and the gradients of a sum that weighs its entries differently."""
    value = sample.bind(op.function)(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors, _incoming(value))]


def _incoming(value: Tensor) -> Tensor:
    numbers = torch.arange(value.numel(), dtype=torch.float64, device=value.device)
    return (0.37 + numbers / (1 + numbers)).view_as(value).to(value.dtype)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.dtype != theirs.dtype or ours.device != theirs.device or ours.isnan().any():
            return torch.inf
        scale = float(theirs.detach().abs().amax().clamp_min(1e-3))
        worst = max(worst, float((ours - theirs).detach().abs().amax()) / scale)
    return worst
