"""What frozen features are worth: the one evaluation, of train.py's test and of evaluate.py.

Shapes: features (N, F), float32; predicted (N,), int64; shown (Q,) and neighbours (Q, K), int64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.simclr.data import ImageData
from experiments.simclr.evaluation import probes

SHOWN, NEIGHBOURS = 10, 8


@dataclass(frozen=True)
class Evaluation:
    """The test part's features and what was found with them.

    Args:
        features: of the test part.
        shown: test rows whose neighbours are shown, spread over the part.
        neighbours: for each of them, the nearest training rows, the nearest first.
        scores: accuracies by name; empty where there is nothing to measure.
        predicted: the linear probe's classes; None where there are none.
        not_measured: why, where there is nothing to measure.
    """

    features: Tensor
    shown: Tensor
    neighbours: Tensor
    scores: dict[str, float]
    predicted: Tensor | None
    not_measured: str = ""


@torch.no_grad()
def evaluate(
    data: ImageData, train_features: Tensor, test_features: Tensor, k: int, temperature: float
) -> Evaluation:
    """k-NN, linear and few-label accuracy on the test part, beside that of the raw pixels.

    Args:
        k: neighbours of the k-NN vote.
        temperature: of its weights exp(similarity / temperature).
    """
    shown = spread(len(test_features), SHOWN)
    test_labels = data.test_labels
    if test_labels is not None:
        test_labels = test_labels[: len(test_features)]  # all, unless trainer.limit_test_batches
        # one of each class, where they are ten of equal size
        shown = test_labels.cpu().argsort(stable=True)[shown]
    neighbours = probes.nearest(train_features, test_features[shown], NEIGHBOURS)[1].cpu()
    nothing = ""
    if data.num_classes is None:
        nothing = "the data has no labels"
    elif not (train_features.isfinite().all() and test_features.isfinite().all()):
        nothing = "the features are no numbers"
    if nothing:
        return Evaluation(test_features, shown, neighbours, {}, None, nothing)
    device = test_features.device
    train_labels, test_labels = data.train_labels.to(device), test_labels.to(device)
    parts = train_features, train_labels, test_features, test_labels
    raw_train, raw_test = (
        images.to(device).flatten(1) / 255
        for images in (data.train_images, data.test_images[: len(test_features)])
    )
    predicted = probes.linear_predictions(*parts[:3])
    scores = {
        "test/knn": probes.knn_accuracy(*parts, k, temperature),
        "test/linear": probes.accuracy(predicted, test_labels),
        "test/linear_10_percent": probes.few_label_probe(*parts, share=0.1),
        "test/linear_1_percent": probes.few_label_probe(*parts, share=0.01),
        "raw_pixels/knn": probes.knn_accuracy(
            raw_train, train_labels, raw_test, test_labels, k, temperature
        ),
    }
    return Evaluation(test_features, shown, neighbours, scores, predicted.cpu())


def spread(rows: int, n: int) -> Tensor:
    """Numbers of n rows spread evenly, or of all where there are fewer.

    Example:
        >>> spread(10, 2), spread(2, 10)
        (tensor([2, 7]), tensor([0, 1]))
    """
    n = min(n, rows)
    return ((torch.arange(n) + 0.5) * rows / n).long()
