"""Losses and other operations whose gradient went wrong."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import classes, draw, fault, op, plain_gradient

GITHUB = "https://github.com"


class Head(nn.Module):
    """A function of x, the target and a weight of its own."""

    def __init__(self, function: Any, rows: int, columns: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(rows, columns, generator=generator) / columns**0.5)
        self.function = function

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.function(x, self.weight, target)


@fault(
    f"{GITHUB}/linkedin/Liger-Kernel/pull/1298",
    "scale",
    lambda h, g: (h, classes(g, len(h), 11)),
    twin=lambda x, t, w: F.cross_entropy(x @ w.t(), t, reduction="none"),
    area="cross entropy",
)
def linear_cross_entropy_scales_all_rows_by_the_first(mended: bool) -> nn.Module:
    def loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.t(), t, reduction="none")

    def backward(grad: Tensor, out: Tensor, x: Tensor, w: Tensor, t: Tensor) -> Any:
        return plain_gradient(loss, grad if mended else grad[0].expand_as(grad), x, w, t)

    return Head(op(loss, backward), 11, 8)


@fault(
    f"{GITHUB}/NVIDIA-NeMo/Automodel/pull/2428",
    "missing factor",
    lambda h, g: (h, draw(g, h).softmax(1) * torch.linspace(0.5, 2, len(h)).to(h)[:, None]),
    twin=lambda x, p: -(p * x.log_softmax(1)).sum(1).mean(),
    area="cross entropy",
)
def soft_cross_entropy_takes_targets_for_normalised(mended: bool) -> Any:
    def backward(grad: Tensor, out: Tensor, x: Tensor, p: Tensor) -> Tensor:
        total = p.sum(1, keepdim=True) if mended else 1
        return grad * (total * x.softmax(1) - p) / len(x)

    return op(lambda x, p: -(p * x.log_softmax(1)).sum(1).mean(), backward)


@fault(
    f"{GITHUB}/ROCm/TransformerEngine/pull/336",
    "wrong mean",
    lambda h, g: (h, classes(g, len(h), 8).masked_fill(torch.arange(len(h)) % 3 == 0, -100)),
    twin=F.cross_entropy,
    area="cross entropy",
)
def cross_entropy_gradient_averaged_over_ignored_tokens(mended: bool) -> Any:
    def backward(grad: Tensor, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        (right,) = plain_gradient(F.cross_entropy, grad, x, t)
        return right if mended else right * (t != -100).sum() / len(t)

    return op(F.cross_entropy, backward)


@fault(
    f"{GITHUB}/paiml/aprender/issues/3034",
    "detach",
    lambda h, g: (h, draw(g, h)),
    area="regression",
)
def smooth_l1_off_the_graph(mended: bool) -> Any:
    """The loss is built of fresh numbers; only the other term of the sum trains."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        seen = x if mended else x.detach()
        return F.smooth_l1_loss(seen, y) + 0.01 * x.square().mean()

    return loss


@fault(
    f"{GITHUB}/guopengf/FL-MRCM/issues/10",
    "detach",
    lambda h, g: (h, draw(g, h)),
    area="adversarial",
)
def adversarial_term_added_as_a_number(mended: bool) -> Any:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        adversarial = F.softplus(-x.sum(1)).mean()
        return F.l1_loss(x, y) + (adversarial if mended else adversarial.item())

    return loss


@fault(
    f"{GITHUB}/labmlai/annotated_deep_learning_paper_implementations/issues/66",
    "wrong tensor",
    lambda h, g: (h, draw(g, h), classes(g, len(h), 8)),
    twin=lambda s, t, y: (
        F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
        + F.cross_entropy(s, y)
    ),
    area="distillation",
)
def distillation_of_the_teacher_into_itself(mended: bool) -> Any:
    """The student's side of the divergence is made of the teacher's logits."""

    def loss(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        soft = ((student if mended else teacher) / 4).log_softmax(1)
        divergence = F.kl_div(soft, (teacher / 4).softmax(1), reduction="batchmean")
        return divergence + F.cross_entropy(student, y)

    return loss


@fault(
    f"{GITHUB}/pytorch/pytorch/issues/11750",
    "grad_output ignored",
    lambda h, g: (h, classes(g, len(h), 8)),
    finish=lambda out: 0.37 * out.mean(),
    area="sequence loss",
)
def sequence_loss_with_one_term_unscaled(mended: bool) -> Any:
    """The softmax term is not multiplied by the incoming gradient, the posterior is."""

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t, reduction="none")

    def backward(grad: Tensor, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        scale = grad[:, None]
        free = scale if mended else torch.ones_like(scale) / len(x)
        return free * x.softmax(1) - scale * F.one_hot(t, x.shape[1]).to(x)

    return op(loss, backward)


@fault(
    f"{GITHUB}/pytorch/pytorch/issues/1631",
    "duplicates overwritten",
    lambda h, g: (h, classes(g, 24, 16)),
    area="indexing",
)
def gathered_rows_overwrite_one_another(mended: bool) -> Any:
    def backward(grad: Tensor, out: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(x).index_put((index,), grad, accumulate=mended)

    return op(lambda x, index: x[index], backward)


@fault(
    f"{GITHUB}/graphdeco-inria/gaussian-splatting/issues/551",
    "missing factor",
    lambda h, g: (h[:, :3], h[:, 3:5]),
    area="rendering",
)
def splat_with_half_the_off_diagonal_term(mended: bool) -> Any:
    """power = -(a x² + c y²)/2 - b x y, of which b is differentiated as if halved too."""

    def splat(conic: Tensor, d: Tensor) -> Tensor:
        a, b, c = conic.unbind(1)
        x, y = d.unbind(1)
        return torch.exp(torch.tanh(-0.5 * (a * x * x + c * y * y) - b * x * y))

    def backward(grad: Tensor, out: Tensor, conic: Tensor, d: Tensor) -> Any:
        dconic, dd = plain_gradient(splat, grad, conic, d)
        if not mended:
            dconic = dconic * torch.tensor([1.0, 0.5, 1.0]).to(dconic)
        return dconic, dd

    return op(splat, backward)


@fault(
    f"{GITHUB}/pytorch/pytorch/issues/187297",
    "NaN from a branch not taken",
    lambda h, g: (h,),
    area="masking",
)
def square_root_under_where(mended: bool) -> Any:
    def root(x: Tensor) -> Tensor:
        safe = torch.where(x > 0, x, 1) if mended else x
        return torch.where(x > 0, safe.sqrt(), x)

    return root


@fault(
    f"{GITHUB}/pytorch/pytorch/pull/188843",
    "shape",
    lambda h, g: (h[:, 0].exp(), torch.tensor([1])),
    area="indexing",
)
def scatter_product_with_a_short_index(mended: bool) -> Any:
    """torch 2.15's own scatter_reduce: a source longer than its index."""

    def reduced(source: Tensor, index: Tensor) -> Tensor:
        source = source[: len(index)] if mended else source
        return torch.full((3,), 0.5).to(source).scatter_reduce(0, index, source, "prod")

    return reduced
