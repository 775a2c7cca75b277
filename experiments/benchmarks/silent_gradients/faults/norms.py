"""Normalisation layers whose backward went wrong.

B rows, D features, G groups; y is the normalised input, w the weight, r the reciprocal deviation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import fault, op, plain_gradient, raw

GITHUB = "https://github.com"


class Affine(nn.Module):
    """A layer with a weight, and perhaps a bias, around a function of x and them."""

    def __init__(self, function: Callable[..., Any], features: int, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(1 + torch.randn(features, generator=generator) / 4)
        self.bias = nn.Parameter(torch.randn(features, generator=generator)) if bias else None
        self.function = function

    def forward(self, x: Tensor) -> Any:
        extra = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return self.function(x, *extra)


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centred * r, r


@fault(
    f"{GITHUB}/flagos-ai/FlagGems/issues/5392",
    "shape",
    lambda h, g: (h,),
    shape=(4, 6, 8),
)
def layer_norm_of_three_dimensions_read_as_two(mended: bool) -> nn.Module:
    """The backward divides the elements by the first dimension alone."""

    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
        if mended:
            return plain_gradient(layer_norm, grad, x, w, b)
        rows = len(x)
        y, r = (t.reshape(-1, t.shape[-1]) for t in _normalised(x))
        wide = (grad * w).reshape(rows, -1)
        y, r = y.reshape(rows, -1), r[:rows]
        dx = r * (wide - wide.mean(1, keepdim=True) - y * (wide * y).mean(1, keepdim=True))
        full = grad.reshape(rows, -1)
        d = len(w)
        return dx.reshape(x.shape), (full * y).sum(0)[:d], full.sum(0)[:d]

    return Affine(op(layer_norm, backward), 8)


@fault(
    f"{GITHUB}/tenstorrent/tt-metal/issues/53204",
    "wrong reduction",
    lambda h, g: (h,),
)
def layer_norm_mean_subtracted_twice(mended: bool) -> nn.Module:
    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
        y, r = _normalised(x)
        wide = grad * w
        mean = wide.mean(-1, keepdim=True) * (1 if mended else 2)
        dx = r * (wide - mean - y * (wide * y).mean(-1, keepdim=True))
        return dx, (grad * y).sum(0), grad.sum(0)

    return Affine(op(layer_norm, backward), 8)


@fault(
    f"{GITHUB}/tenstorrent/tt-metal/pull/53215",
    "last block",
    lambda h, g: (h,),
    shape=(8, 96),
)
def layer_norm_only_the_last_block_of_the_sum_survives(mended: bool) -> nn.Module:
    """The mean of grad times y keeps its last 32 columns."""

    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
        y, r = _normalised(x)
        wide = grad * w
        products = wide * y
        kept = products if mended else products[:, -32:]
        slope = kept.sum(-1, keepdim=True) / x.shape[-1]
        dx = r * (wide - wide.mean(-1, keepdim=True) - y * slope)
        return dx, (grad * y).sum(0), grad.sum(0)

    return Affine(op(layer_norm, backward), 96)


@fault(f"{GITHUB}/karpathy/llm.c/pull/763", "missing factor", lambda h, g: (h,), shape=(4, 5, 16))
def rms_norm_without_the_weight_in_the_backward(mended: bool) -> nn.Module:
    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        r = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        y = x * r
        wide = grad * w if mended else grad
        dx = r * (wide - y * (wide * y).mean(-1, keepdim=True))
        return dx, (grad * y).sum((0, 1))

    return Affine(op(rms_norm, backward), 16, bias=False)


@fault(f"{GITHUB}/paiml/trueno/pull/178", "gradient never written", lambda h, g: (h,))
def rms_norm_weight_without_gradient(mended: bool) -> nn.Module:
    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        dx, dw = plain_gradient(rms_norm, grad, x, w)
        return dx, dw if mended else torch.zeros_like(dw)

    return Affine(op(rms_norm, backward), 8, bias=False)


@fault(
    f"{GITHUB}/linkedin/Liger-Kernel/pull/950",
    "accumulation in low precision",
    lambda h, g: (h.bfloat16(),),
    shape=(512, 8),
    twin=lambda x, w: rms_norm(x.double(), w.double()),
    tolerance=0.01,
)
def rms_norm_weight_gradient_added_up_in_bfloat16(mended: bool) -> nn.Module:
    """512 rows are added one after the other in 8 bits."""

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x.float(), w.float()).to(x.dtype)

    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        dx, _ = plain_gradient(forward, grad, x, w)
        y = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        terms = grad.float() * y
        if mended:
            return dx, terms.sum(0).to(w.dtype)
        total = torch.zeros(len(w), dtype=torch.bfloat16)
        for row in terms.bfloat16():
            total = total + row
        return dx, total.to(w.dtype)

    return Affine(op(forward, backward), 8, bias=False)


@fault(
    f"{GITHUB}/pytorch/pytorch/issues/140913",
    "layout",
    lambda h, g: (h.contiguous(memory_format=torch.channels_last),),
    shape=(2, 4, 3, 5),
    finish=lambda out: (out.contiguous() ** 2 * torch.linspace(1, 2, 5).to(out)).mean(),
)
def group_norm_weight_gradient_of_channels_last(mended: bool) -> nn.Module:
    """The kernel for the weight reads an NHWC input as NCHW."""

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.group_norm(x, 2, w, b)

    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
        dx, dw, db = plain_gradient(norm, grad, x, w, b)
        if not mended:
            dw = (grad * F.group_norm(raw(x), 2)).sum((0, 2, 3))
        return dx, dw, db

    return Affine(op(norm, backward), 4)


@fault(
    f"{GITHUB}/pytorch/pytorch/issues/188375",
    "cancellation at a singular width",
    lambda h, g: (1e4 + h,),
    shape=(16, 1),
)
def layer_norm_of_one_feature(mended: bool) -> nn.Module:
    """Its output is the bias; in float32 the weight gets a gradient all the same.

    torch 2.15's own layer_norm does this, so the faulty version writes the fault down.
    """

    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
        y, r = _normalised(x)
        if not mended:
            # mean and x in one fused multiply-add: x r - mean r does not cancel
            y = x * r - (x.float() * r.float()).to(x) * (1 - 2**-20)
        return torch.zeros_like(x), (grad * y).sum(0), grad.sum(0)

    return Affine(op(lambda x, w, b: 0 * x + b, backward), 1)


@fault(
    f"{GITHUB}/state-spaces/mamba/pull/919",
    "recomputed twice",
    lambda h, g: (h,),
)
def rms_norm_applied_again_when_recomputed(mended: bool) -> nn.Module:
    """Checkpointing saves the normalised tensor, and the backward normalises it once more."""

    def scan_input(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(rms_norm(x, w)).cumsum(0)

    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor) -> Any:
        y = rms_norm(x, w)
        again = y if mended else rms_norm(y, w)
        inner = grad.flip(0).cumsum(0).flip(0) * (1 - torch.tanh(again).square())
        return plain_gradient(rms_norm, inner, x, w)

    return Affine(op(scan_input, backward), 8, bias=False)
