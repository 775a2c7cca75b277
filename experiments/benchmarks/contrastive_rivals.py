"""Lean autograd versions of the in-batch losses, as one would write them by hand, in float32.

The chunked ones are over torch's own `F.linear_cross_entropy`, which torch has from 2.13 on.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    n = z1.shape[0]
    u = F.normalize(torch.cat([z1, z2]))
    logits = (u @ u.T / 0.1).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=u.device).roll(n))


def in_batch_cosine(z1: Tensor, z2: Tensor) -> Tensor:
    n = z1.shape[0]
    u = F.normalize(torch.cat([z1, z2]))
    similarity = u @ u.T
    positive = similarity.diagonal(n)
    hinge = F.relu(similarity - 0.1)
    own = hinge.diagonal().sum() + 2 * hinge.diagonal(n).sum()
    return 1 - positive.mean() + (hinge.sum() - own) / (2 * n * (2 * n - 2))


def info_nce(query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query) @ F.normalize(key).T / 0.1
    return F.cross_entropy(logits, torch.arange(len(query)))


def hard(key: Tensor) -> Tensor:
    """Three rows like these for each, (N, 3, D)."""
    return torch.stack([key.roll(k, 0) for k in (1, 2, 3)], 1)


def hard_info_nce(query: Tensor, key: Tensor) -> Tensor:
    columns = torch.cat([key, hard(key).flatten(0, 1)])
    logits = F.normalize(query) @ F.normalize(columns).T / 0.1
    return F.cross_entropy(logits, torch.arange(len(query)))


def max_sim(query: Tensor, document: Tensor) -> Tensor:
    similarity = torch.einsum(
        "bqd,ctd->bcqt", F.normalize(query, dim=2), F.normalize(document, dim=2)
    )
    return F.cross_entropy(similarity.amax(3).sum(2), torch.arange(len(query)))


def symmetric_info_nce(query: Tensor, key: Tensor) -> Tensor:
    logits = F.normalize(query) @ F.normalize(key).T / 0.1
    target = torch.arange(len(query))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sup_con(z1: Tensor, z2: Tensor) -> Tensor:
    u = F.normalize(torch.cat([z1, z2]))
    labels = torch.arange(len(u)) % 100
    logits = (u @ u.T / 0.1).fill_diagonal_(-torch.inf)
    positive = (labels == labels[:, None]).fill_diagonal_(False)
    log_probability = logits.log_softmax(1).masked_fill(~positive, 0)
    return -(log_probability.sum(1) / positive.sum(1)).mean()


def sigmoid(z1: Tensor, z2: Tensor) -> Tensor:
    n = z1.shape[0]
    logits = F.normalize(z1) @ F.normalize(z2).T / 0.1 - 10
    labels = 2 * torch.eye(n) - 1
    return -F.logsigmoid(labels * logits).sum() / n


def chunked_info_nce(query: Tensor, key: Tensor) -> Tensor:
    target = torch.arange(len(query), device=query.device)
    return _chunked_cross_entropy(F.normalize(query), F.normalize(key), target, "mean")


def chunked_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    n = z1.shape[0]
    u = F.normalize(torch.cat([z1, z2]))
    target = torch.arange(2 * n, device=u.device).roll(n)
    loss = _chunked_cross_entropy(u, u, target, "none")
    # there is no mask: what a row's similarity with itself adds to its sum of exp is taken off
    itself, positive = u.square().sum(1) / 0.1, (u * u.roll(n, 0)).sum(1) / 0.1
    return (loss + torch.log1p(-(itself - loss - positive).exp())).mean()


def _chunked_cross_entropy(u: Tensor, v: Tensor, target: Tensor, reduction: str) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(u, v / 0.1, target, reduction=reduction, options=options)
