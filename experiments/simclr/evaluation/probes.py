"""Probes of frozen features. Shapes: features (N, D), any float dtype; labels (N,), int64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of rows whose class is right, in [0, 1]."""
    return float((predicted == labels).double().mean())


def nearest(
    train_features: Tensor, test_features: Tensor, k: int, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """The k training rows of largest cosine similarity to each test row, the largest first.

    Args:
        k: all training rows where there are fewer.
        chunk: test rows at a time, which bounds the memory at chunk x N similarities.

    Returns:
        Similarities and row numbers, each (test rows, k).
    """
    bank = F.normalize(train_features.float(), dim=1)
    found = [
        (F.normalize(rows.float(), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        for rows in test_features.split(chunk)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour vote under cosine similarity.

    A test row is given the class with the largest sum over its k most similar training rows of
    exp(s_i / temperature).

    Args:
        k: neighbours that vote; all training rows where there are fewer.
        temperature: positive.
        chunk: test rows at a time, which bounds the memory at chunk x N similarities.

    Returns:
        The share of test rows whose class is right, in [0, 1].

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", section 3.4.

    Example:
        >>> features, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> knn_accuracy(features, labels, features, labels, k=1)
        1.0
    """
    similarity, neighbour = nearest(train_features, test_features, k, chunk)
    # a factor common to a row's votes decides nothing; the largest weight must not underflow
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weight.new_zeros(len(test_features), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[neighbour], weight)
    return accuracy(votes.argmax(dim=1), test_labels)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    labelled: Tensor | None = None,
) -> float:
    """Accuracy of `linear_predictions`.

    Example:
        >>> features, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> linear_probe(features, labels, features, labels)
        1.0
    """
    predicted = linear_predictions(train_features, train_labels, test_features, labelled)
    return accuracy(predicted, test_labels)


def few_label_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    share: float,
    draws: int = 3,
) -> float:
    """Mean accuracy of linear probes, each with another draw of a share of the labels.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning", section 4.2: 1 % and
    10 % of the labels, as many of each class.
    """
    parts = train_features, train_labels, test_features, test_labels
    rows = (few_labels(train_labels, share, seed) for seed in range(draws))
    return sum(linear_probe(*parts, labelled) for labelled in rows) / draws


def few_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """Rows of a share of each class, drawn at random; at least one of each class that there is.

    Example:
        >>> labels = torch.tensor([0] * 20 + [1] * 20 + [3])
        >>> labels[few_labels(labels, 0.1, seed=0)]
        tensor([0, 0, 1, 1, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten().cpu()
        order = torch.randperm(len(rows), generator=generator)
        drawn.append(rows[order[: max(1, round(share * len(rows)))]])
    return torch.cat(drawn).to(labels.device)


@torch.inference_mode(False)
@torch.enable_grad()
def linear_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    labelled: Tensor | None = None,
    l2: float = 1e-3,
    steps: int = 100,
) -> Tensor:
    """Classes that a multinomial logistic regression on the standardised features predicts.

    Minimises mean cross-entropy + l2/2 |W|^2 with L-BFGS, full batch, from zero: the problem is
    strictly convex in W and nothing is drawn at random, so the figure is the features' own.

    Args:
        labelled: the training rows whose labels are used, for few labels; all if None. Features
            are standardised with all training rows, which takes no labels.
        l2: weight of the penalty on the weights; the biases go free.
        steps: most L-BFGS iterations.

    Returns:
        One class per test row.
    """
    mean, std = train_features.float().mean(0), train_features.float().std(0, correction=0)
    # a feature that never varies in training says nothing: standardised to 0, not blown up
    scale = torch.where(std > 0, 1 / std, 0)
    train, test = ((f.float() - mean) * scale for f in (train_features, test_features))
    classes = int(train_labels.max()) + 1
    train_labels = train_labels.clone()  # of an inference tensor, an ordinary one
    if labelled is not None:
        train, train_labels = train[labelled], train_labels[labelled]
    weight = train.new_zeros(classes, train.shape[1], requires_grad=True)
    bias = train.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), train_labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(test, weight, bias).argmax(dim=1)
