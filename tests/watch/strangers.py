"""Right functions of the kinds that other people write, which a check could disturb or misjudge."""

import torch
from torch import nn
from torch.nn import functional as F


class ScaledInPlace(torch.autograd.Function):
    """Cross entropy whose gradient lies over its input from the forward on, scaled in place."""

    @staticmethod
    def forward(ctx, logits, target):
        loss = F.cross_entropy(logits, target)
        probability = logits.softmax(-1)
        probability[torch.arange(len(target)), target] -= 1
        logits.data.copy_(probability / len(target))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        return saved.mul_(grad), None


class Freed(torch.autograd.Function):
    """A square that lets go of its input's memory after use, and writes into what it saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.clone()
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        kept, ctx.kept = ctx.kept, None
        return kept.mul_(2).mul_(grad)


class Queue(nn.Module):
    """Negatives of earlier batches in a list, counted by an integer, weighted by an average."""

    def __init__(self):
        super().__init__()
        self.queue, self.calls = [], 0
        self.register_buffer("mean", torch.zeros(8))
        self.drop = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        y = self.norm(self.drop(x)) - self.mean
        negatives = torch.cat([*self.queue, y.detach()])
        self.queue = [*self.queue, y.detach()][-3:]
        return torch.logsumexp(y @ negatives.T, 1).mean() * (1 + 0.1 * self.calls)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, q, k, v):
        q, k, v = self.q(q), self.k(k), self.v(v)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


class InPlaceEntropy(nn.Module):
    def forward(self, x):
        return ScaledInPlace.apply(x, torch.arange(len(x)) % x.shape[1])


class Square(nn.Module):
    def forward(self, x):
        return Freed.apply(x).mean()


class VAE(nn.Module):
    def forward(self, reconstruction, x, mean, log_variance):
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()
        return (reconstruction - x).square().mean() + divergence


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x, residual):
        total = x + residual
        return self.norm(total), total


class LossAndLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits, torch.arange(len(x)) % 5), "logits": logits}


class Model(nn.Module):
    """`layer` between an encoder and a loss, called as `call` says."""

    def __init__(self, layer, call):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.GELU())
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, self.encoder(x))


def vae(layer, h):
    mean, log_variance = h, 0.1 * h.roll(1, 0)
    return layer((mean + torch.randn_like(mean)).tanh(), h.detach(), mean, log_variance)


def residual(layer, h):
    y, total = layer(h.sin(), h)
    return (y * y.roll(1, 1)).sum() + 0.1 * total.square().sum()


def loss_and_logits(layer, h):
    found = layer(h)
    return found["loss"] + 0.1 * found["logits"].square().mean()


CASES = {
    "overwrites its input": (InPlaceEntropy, lambda layer, h: layer(h * 2)),
    "frees what it saved": (Square, lambda layer, h: layer(h)),
    "queue, counter, dropout, batch norm": (Queue, lambda layer, h: layer(h)),
    "attention(h, h, h)": (Attention, lambda layer, h: layer(h, h, h).sin().sum()),
    "vae": (VAE, vae),
    "residual": (Residual, residual),
    "loss and logits": (LossAndLogits, loss_and_logits),
    "layer norm": (lambda: nn.LayerNorm(8), lambda layer, h: layer(h).sin().sum()),
    "checkpointed": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)),
        lambda layer, h: (
            torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False).sin().sum()
        ),
    ),
    "checkpointed, reentrant": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        lambda layer, h: (
            torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=True).sin().sum()
        ),
    ),
    "embedding": (
        lambda: nn.Embedding(5, 8, sparse=False),
        lambda layer, h: (h * layer(torch.arange(len(h)) % 5)).sin().sum(),
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh()),
        lambda layer, h: layer(h).sin().sum(),
    ),
    "gru": (lambda: nn.GRU(8, 8), lambda layer, h: layer(h)[0].sin().sum()),
    "byol": (
        lambda: _Byol(),
        lambda layer, h: layer(h, h.roll(1, 1)),
    ),
    "close views": (
        lambda: _Close(),
        lambda layer, h: layer(h, h + 1e-3 * h.sin()),
    ),
}


class _Byol(nn.Module):
    def forward(self, p, z):
        return -F.cosine_similarity(p, z.detach()).mean() + torch.exp(p - p.detach()).mean()


class _Close(nn.Module):
    def forward(self, a, b):
        return (1 - torch.cosine_similarity(a, b)).mean()
