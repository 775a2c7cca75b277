"""Probes of frozen features. Shapes: features (N, D), any float dtype; labels (N,), int64."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    bank = F.normalize(train_features.float(), dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for features, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        similarity, neighbour = (F.normalize(features.float(), dim=1) @ bank.T).topk(
            min(k, len(bank)), dim=1
        )
        # a factor common to a row's votes decides nothing; the largest weight must not underflow
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[neighbour], weight)
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(test_labels)


@torch.inference_mode(False)
@torch.enable_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    l2: float = 1e-3,
    steps: int = 100,
) -> float:
    """Accuracy of a multinomial logistic regression on the standardised features.

    Minimises mean cross-entropy + l2/2 |W|^2 with L-BFGS, full batch, from zero: the problem is
    strictly convex in W and nothing is drawn at random, so the figure is the features' own.

    Args:
        l2: weight of the penalty on the weights; the biases go free.
        steps: most L-BFGS iterations.

    Returns:
        The share of test rows whose class is right, in [0, 1].

    Example:
        >>> features, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> linear_probe(features, labels, features, labels)
        1.0
    """

    mean, std = train_features.float().mean(0), train_features.float().std(0, correction=0)
    # a feature that never varies in training says nothing: standardised to 0, not blown up
    scale = torch.where(std > 0, 1 / std, 0)
    train, test = ((f.float() - mean) * scale for f in (train_features, test_features))
    train_labels = train_labels.clone()  # of an inference tensor, an ordinary one
    classes = int(max(train_labels.max(), test_labels.max())) + 1
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
    predicted = F.linear(test, weight, bias).argmax(dim=1)
    return float((predicted == test_labels).float().mean())
