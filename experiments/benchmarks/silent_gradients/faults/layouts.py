"""Kernels that read a gradient or an input in another layout than it has, or write over one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import fault, op, plain_gradient, raw

GITHUB = "https://github.com"


def _read(grad: Tensor, mended: bool) -> Tensor:
    return grad if mended else raw(grad)


@fault(
    f"{GITHUB}/pytorch/pytorch/issues/194719",
    "layout",
    lambda h, g: (h,),
    finish=lambda y: (torch.cat([y, torch.ones_like(y)], 1) ** 2).mean(),
)
def scaled_sigmoid_before_a_concatenation(mended: bool) -> Any:
    """torch.cat hands each input a slice of the wider gradient."""
    return op(
        lambda x: x * x.sigmoid(),
        lambda grad, y, x: _read(grad, mended) * (x.sigmoid() * (1 + x * (1 - x.sigmoid()))),
    )


@fault(
    f"{GITHUB}/Dao-AILab/flash-attention/issues/355",
    "layout",
    lambda h, g: (h, h.roll(1, 1), h.roll(2, 1)),
    shape=(2, 3, 5, 4),
    finish=lambda out: (out.transpose(1, 2).flatten(2) ** 2).mean(),
)
def attention_with_a_transposed_gradient(mended: bool) -> Any:
    """Heads and positions change places after the call, and so do the gradient's strides."""
    return op(
        F.scaled_dot_product_attention,
        lambda grad, out, q, k, v: plain_gradient(
            F.scaled_dot_product_attention, _read(grad, mended), q, k, v
        ),
    )


@fault(
    f"{GITHUB}/open-mmlab/mmcv/pull/737",
    "layout",
    lambda h, g: (h,),
    shape=(2, 4, 4, 4),
    finish=lambda y: (y.permute(0, 2, 3, 1).flatten(1) * torch.linspace(-1, 1, 16).to(y)).sum(),
)
def pooled_regions_with_a_permuted_gradient(mended: bool) -> Any:
    pool = lambda x: F.max_pool2d(x, 2)  # noqa: E731
    return op(pool, lambda grad, y, x: plain_gradient(pool, _read(grad, mended), x))


@fault(
    f"{GITHUB}/torch/nn/pull/345",
    "layout",
    lambda h, g: (h,),
    shape=(3, 2, 7, 5),
    finish=lambda y: (y.sum(2) * torch.linspace(-1, 1, 6).view(3, 2).to(y)).sum(),
)
def mean_before_a_sum(mended: bool) -> Any:
    """The gradient of a sum is expanded: one number in memory for a whole row."""
    return op(
        lambda x: x.mean(3),
        lambda grad, y, x: (_read(grad, mended) / 5).unsqueeze(3).expand_as(x),
    )


@fault(
    f"{GITHUB}/NovaSky-AI/SkyRL/pull/1886",
    "result dropped",
    lambda h, g: (h,),
    finish=lambda y: (y.t().contiguous() * torch.linspace(-1, 2, 16).to(y)).square().mean(),
)
def reduction_in_place_of_a_contiguous_copy(mended: bool) -> Any:
    """Only a non-contiguous gradient is copied by contiguous(), and then the copy is doubled."""

    def backward(grad: Tensor, y: Tensor, x: Tensor) -> Tensor:
        reduced = grad.clone() if grad.is_contiguous() else grad.contiguous()
        reduced.mul_(2)
        return reduced if mended or grad.is_contiguous() else grad

    return op(lambda x: 2 * x, backward)


@fault(
    f"{GITHUB}/unslothai/unsloth/issues/5001",
    "in-place on saved",
    lambda h, g: (torch.tanh(h),),
    shape=(2, 5, 8),
    area="attention",
)
def rotary_embedding_written_into_its_input(mended: bool) -> Any:
    """The caller's tanh has saved the very tensor that the kernel turns in place."""
    angle = torch.arange(5.0).view(1, 5, 1) / torch.tensor([1.0, 3.0, 10.0, 30.0])

    def turn(q: Tensor, sign: float) -> Tensor:
        c, s = angle.cos().to(q), sign * angle.sin().to(q)
        a, b = q.chunk(2, -1)
        return torch.cat([a * c - b * s, a * s + b * c], -1)

    def forward(q: Tensor) -> Tensor:
        turned = turn(q, 1)
        if not mended:
            q.data.copy_(turned)  # .data: a kernel tells no version counter
        return turned

    return op(forward, lambda grad, y, q: turn(grad, -1))


@fault(
    f"{GITHUB}/linkedin/Liger-Kernel/issues/272",
    "in-place on saved",
    lambda h, g: (h.exp(), torch.randint(8, (len(h),), generator=g)),
    area="cross entropy",
)
def cross_entropy_that_keeps_its_gradient_in_the_logits(mended: bool) -> Any:
    """exp has saved its output, the logits, and differentiates with what stands there now."""

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
            loss = F.cross_entropy(logits, target)
            hot = F.one_hot(target, logits.shape[1]).to(logits)
            grad = (logits.softmax(1) - hot) / len(logits)
            if not mended:
                grad = logits.data.copy_(grad)
            ctx.save_for_backward(grad.detach())
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return grad * ctx.saved_tensors[0], None

    return CrossEntropy.apply


@fault(
    f"{GITHUB}/linkedin/Liger-Kernel/issues/254",
    "in-place on saved",
    lambda h, g: (h[:, :4].exp(), h[:, 4:]),
    area="gated unit",
)
def gated_unit_whose_backward_writes_into_its_inputs(mended: bool) -> Any:
    def backward(grad: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Any:
        s = a.sigmoid()
        da, db = grad * b * (s + a * s * (1 - s)), grad * a * s
        if mended:
            return da, db
        return a.data.copy_(da), b.data.copy_(db)

    return op(lambda a, b: F.silu(a) * b, backward)


class Recomputed(nn.Module):
    """A dropout block that runs again in the backward to save its activations."""

    def __init__(self, mended: bool) -> None:
        super().__init__()
        self.mended = mended
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(
            lambda x: F.dropout(torch.tanh(x @ self.weight), 0.5) @ self.weight,
            x,
            use_reentrant=False,
            preserve_rng_state=self.mended,
        )


@fault(f"{GITHUB}/openai/guided-diffusion/issues/167", "generator", lambda h, g: (h,), area="block")
def checkpoint_with_another_dropout_mask(mended: bool) -> nn.Module:
    return Recomputed(mended)


@fault(
    f"{GITHUB}/foundation-model-stack/fms-acceleration/issues/97",
    "generator",
    lambda h, g: (h, torch.eye(8, 3).to(h), torch.ones(3, 5).to(h)),
    area="adapter",
)
def adapter_whose_input_gradient_forgets_dropout(mended: bool) -> Any:
    class Adapter(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            kept = F.dropout(torch.ones_like(x), 0.3)
            ctx.save_for_backward(x, kept, a, b)
            return (x * kept) @ a @ b + x[:, :5]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, kept, a, b = ctx.saved_tensors
            inner = grad @ b.t() @ a.t()
            dx = inner * kept if mended else inner
            dx = dx + F.pad(grad, (0, 3))
            xk = x * kept
            return dx, xk.t() @ (grad @ b.t()), (xk @ a).t() @ grad

    return Adapter.apply
