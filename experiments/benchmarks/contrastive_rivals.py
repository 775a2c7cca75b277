"""Lean autograd versions of the in-batch losses, as one would write them by hand, in float32."""

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
