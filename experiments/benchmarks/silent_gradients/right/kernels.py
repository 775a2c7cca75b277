"""Custom autograd Functions as fused-kernel libraries write them, in plain torch: all right.

They keep a gradient from the forward and scale it in place, write over what they saved, or free
it: right in a backward that runs once, as training runs it, and not to be run twice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import classes, op, plain, plain_gradient, right
from experiments.benchmarks.silent_gradients.faults.losses import Head
from experiments.benchmarks.silent_gradients.faults.norms import Affine, rms_norm


class CrossEntropyGradientInForward(torch.autograd.Function):
    """The gradient is computed in the forward, and scaled in place in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        grad = (logits.softmax(1) - F.one_hot(target, logits.shape[1]).to(logits)) / len(logits)
        ctx.save_for_backward(grad.detach())
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        kept.data.mul_(grad)
        return kept, None


class CrossEntropyOverLogits(torch.autograd.Function):
    """The backward writes its gradient over the logits that the forward saved."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits, target, reduction="none")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, target = ctx.saved_tensors
        logits.data.copy_((logits.softmax(1) - F.one_hot(target, logits.shape[1])) * grad[:, None])
        return logits, None


class CrossEntropyInLogits(torch.autograd.Function):
    """The forward already writes the gradient over its input, which nobody else has saved."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target)
        hot = F.one_hot(target, logits.shape[1]).to(logits)
        logits.data.copy_((logits.softmax(1) - hot) / len(logits))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0] * grad, None


class NormInPlaceGradient(torch.autograd.Function):
    """RMSNorm whose backward overwrites the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return rms_norm(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx, dw = plain_gradient(rms_norm, grad, *ctx.saved_tensors)
        if grad.is_contiguous():
            dx = grad.data.copy_(dx)
        return dx, dw


class GateOverActivations(torch.autograd.Function):
    """SwiGLU that writes both gradients over the activations it copied."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a.clone(), b.clone())
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        da, db = grad * b * (s + a * s * (1 - s)), grad * a * s
        return a.data.copy_(da), b.data.copy_(db)


class FreedAfterUse(torch.autograd.Function):
    """A saved tensor whose memory the backward gives back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = torch.tanh(x).detach()
        return ctx.kept.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found = grad * (1 - ctx.kept.square())
        ctx.kept.untyped_storage().resize_(0)
        return found


class ReleasedContext(torch.autograd.Function):
    """An attribute of the context that the backward deletes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.inputs = [x.detach().clone()]
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x = ctx.inputs.pop()
        return grad * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))


class SinglePrecision(torch.autograd.Function):
    """A kernel for float32 and narrower, which refuses float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise AssertionError("only float32, float16 and bfloat16 are supported")
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return plain_gradient(lambda x: F.gelu(x, approximate="tanh"), grad, x)


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Linear and cross entropy in chunks; all gradients from the forward, scaled in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        dx, dw, loss = torch.empty_like(x), torch.zeros_like(w), x.new_zeros(())
        for rows in torch.arange(len(x)).split(5):
            logits = x[rows] @ w.t()
            loss = loss + F.cross_entropy(logits, t[rows], reduction="sum") / len(x)
            slope = (logits.softmax(1) - F.one_hot(t[rows], len(w)).to(x)) / len(x)
            dx[rows] = slope @ w
            dw += slope.t() @ x[rows]
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), dw.mul_(grad), None


class Activation(nn.Module):
    """Counts its calls, as a module that logs does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return FreedAfterUse.apply(x)


def logits(h: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return h, classes(g, 16, 8)


def one(h: Tensor, g: torch.Generator) -> tuple[Tensor]:
    return (h,)


right(
    "cross entropy that scales its gradient in place",
    plain(CrossEntropyGradientInForward.apply),
    logits,
    finish=lambda out: 0.37 * out,
    twin=F.cross_entropy,
)
right(
    "cross entropy that writes over its logits in the backward",
    plain(CrossEntropyOverLogits.apply),
    lambda h, g: (3 * h, classes(g, 16, 8)),
)
right(
    "cross entropy that writes over its logits in the forward",
    plain(CrossEntropyInLogits.apply),
    lambda h, g: (3 * h, classes(g, 16, 8)),
)
right(
    "RMSNorm that overwrites the incoming gradient",
    lambda: Affine(NormInPlaceGradient.apply, 8, bias=False),
    one,
    twin=rms_norm,
)
right(
    "SwiGLU that overwrites its copies",
    plain(GateOverActivations.apply),
    lambda h, g: (h[:, :4], h[:, 4:]),
    twin=lambda a, b: F.silu(a) * b,
)
right("activation freed after use", plain(FreedAfterUse.apply), one, twin=torch.tanh)
right("activation freed after use, in a module that counts", Activation, one)
right("context emptied by the backward", plain(ReleasedContext.apply), one, twin=F.silu)
right(
    "kernel that refuses float64",
    plain(SinglePrecision.apply),
    one,
    twin=lambda x: F.gelu(x, approximate="tanh"),
    single=True,
)
right(
    "linear cross entropy in chunks",
    lambda: Head(ChunkedLinearCrossEntropy.apply, 11, 8),
    lambda h, g: (h, classes(g, 16, 11)),
)
right(
    "function with a non-differentiable output",
    plain(lambda x: x.max(1)),
    one,
    finish=lambda out: out.values.square().mean(),
)
right("custom sigmoid", plain(op(torch.sigmoid, lambda g, y, x: g * y * (1 - y))), one)
