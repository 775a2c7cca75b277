"""Losses with planted faults: twelve wrong backwards of cosine losses, and a stranger's four."""

import torch
from torch import nn
from torch.nn import functional as F

from cosloss import functional, reference


def _both(x1, x2, eps):
    """Unit rows, similarity and clamped norms, as the derivation of the gradient has them."""
    norm1, norm2 = x1.norm(dim=-1, keepdim=True), x2.norm(dim=-1, keepdim=True)
    u1, u2 = x1 / norm1.clamp_min(eps), x2 / norm2.clamp_min(eps)
    return u1, u2, (u1 * u2).sum(-1, keepdim=True), norm1, norm2


def right(grad, x1, x2, eps):
    u1, u2, s, norm1, norm2 = _both(x1, x2, eps)
    g1 = grad * (u2 - torch.where(norm1 > eps, s, 0) * u1) / norm1.clamp_min(eps)
    g2 = grad * (u1 - torch.where(norm2 > eps, s, 0) * u2) / norm2.clamp_min(eps)
    return g1, g2


def swapped(grad, x1, x2, eps):
    return right(grad, x1, x2, eps)[::-1]


def zero(grad, x1, x2, eps):
    return torch.zeros_like(x1), torch.zeros_like(x2)


def doubled(grad, x1, x2, eps):
    return tuple(2 * g for g in right(grad, x1, x2, eps))


def negated(grad, x1, x2, eps):
    return tuple(-g for g in right(grad, x1, x2, eps))


def million(grad, x1, x2, eps):
    return tuple(1e6 * g for g in right(grad, x1, x2, eps))


def missing_projection(grad, x1, x2, eps):
    u1, u2, _, norm1, norm2 = _both(x1, x2, eps)
    return grad * u2 / norm1, grad * u1 / norm2


def wrong_sign(grad, x1, x2, eps):
    """The sign that the article's rearranged differential has."""
    u1, u2, s, norm1, norm2 = _both(x1, x2, eps)
    return grad * (u2 + s * u1) / norm1, grad * (u1 + s * u2) / norm2


def missing_grad_output(grad, x1, x2, eps):
    return right(torch.ones_like(grad), x1, x2, eps)


def eps_branch(grad, x1, x2, eps):
    """The projection kept below eps, where the norm is constant: seen with a large eps only."""
    u1, u2, s, norm1, norm2 = _both(x1, x2, eps)
    g1 = grad * (u2 - s * u1) / norm1.clamp_min(eps)
    return g1, grad * (u1 - s * u2) / norm2.clamp_min(eps)


def wrong_reduction(grad, x1, x2, eps):
    return tuple(g * len(x1) for g in right(grad, x1, x2, eps))


def one_row(grad, x1, x2, eps):
    g1, g2 = right(grad, x1, x2, eps)
    g1 = g1.clone()
    g1[-1] *= 1.5
    return g1, g2


def one_entry(grad, x1, x2, eps):
    g1, g2 = right(grad, x1, x2, eps)
    g1 = g1.clone()
    g1[0, 0] *= 1.05
    return g1, g2


WRONG = (
    swapped,
    zero,
    doubled,
    negated,
    million,
    missing_projection,
    wrong_sign,
    missing_grad_output,
    eps_branch,
    wrong_reduction,
    one_row,
    one_entry,
)


class PlantedCosine(torch.autograd.Function):
    """cosloss's cosine similarity, with a backward of one's choice."""

    @staticmethod
    def forward(ctx, x1, x2, eps, rule):
        ctx.save_for_backward(x1, x2)
        ctx.eps, ctx.rule = eps, rule
        return functional.cosine_similarity(x1, x2, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        return (*ctx.rule(grad.unsqueeze(-1), *ctx.saved_tensors, ctx.eps), None, None)


class PlantedLoss(nn.Module):
    """The mean of (1 - similarity)^2 over positive pairs."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.eps = 10.0 if rule is eps_branch else 1e-8

    def forward(self, z1, z2):
        return (1 - PlantedCosine.apply(z1, z2, self.eps, self.rule)).square().mean()

    def reference(self):
        return self._twin

    def _twin(self, z1, z2):
        return (1 - reference.cosine_similarity(z1, z2, eps=self.eps)).square().mean()


class FusedSoftmax(torch.autograd.Function):
    """Log-likelihood by a fused softmax, whose backward forgets the one-hot of the first class."""

    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, grad):
        logits, target = ctx.saved_tensors
        hot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
        hot[:, 0] = 0
        return grad * (logits.softmax(1) - hot) / len(logits), None


class SoftmaxLoss(nn.Module):
    def forward(self, z1, z2):
        return FusedSoftmax.apply(z1 + z2, torch.arange(len(z1), device=z1.device) % z1.shape[1])

    def reference(self):
        return lambda z1, z2: F.cross_entropy(
            z1 + z2, torch.arange(len(z1), device=z1.device) % z1.shape[1]
        )


class Round(torch.autograd.Function):
    """A straight-through estimator: it rounds, and passes `slope` times the gradient through."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.slope = slope
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope, None


class StraightThroughLoss(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, z1, z2):
        return (Round.apply(4 * z1, self.slope) / 4 - z2).square().mean()

    def reference(self):
        def twin(z1, z2):
            scaled = 4 * z1
            return ((scaled + (scaled.round() - scaled).detach()) / 4 - z2).square().mean()

        return twin


class HalfPrecisionKernel(torch.autograd.Function):
    """A squared distance whose bfloat16 path alone is wrong: it loses every fourth column."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (x - y).square().mean()

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        g = grad * 2 * (x - y) / x.numel()
        if x.dtype == torch.bfloat16:
            g[:, ::4] = 0
        return g, -g


class HalfPrecisionLoss(nn.Module):
    def forward(self, z1, z2):
        return HalfPrecisionKernel.apply(z1, z2)

    def reference(self):
        return lambda z1, z2: (z1 - z2).square().mean()


class Late(torch.autograd.Function):
    """The identity; what `late` holds says when its backward starts to be wrong."""

    @staticmethod
    def forward(ctx, x, late):
        ctx.late = late
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (0.9 if ctx.late["step"] > 30 else 1.0), None


class LateLoss(nn.Module):
    """Wrong after 30 steps of training: the model counts them in `clock`."""

    def __init__(self):
        super().__init__()
        self.clock = {"step": 0}

    def forward(self, z1, z2):
        return reference.nt_xent_loss(Late.apply(z1, self.clock), z2)

    def reference(self):
        return reference.nt_xent_loss
