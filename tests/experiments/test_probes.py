"""k-NN and linear probe against plain loops and scikit-learn."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from experiments.simclr.evaluation.probes import (
    few_label_probe,
    few_labels,
    knn_accuracy,
    linear_probe,
    nearest,
)


def clusters(rows, seed, spread=1.5, classes=3, features=5):
    """Overlapping clouds around fixed centres."""
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    noise = torch.randn(rows, features, generator=generator)
    return centres[labels] + spread * noise, labels


def knn_by_loops(train, train_labels, test, test_labels, k, temperature):
    right = 0
    for row, label in zip(test.double(), test_labels.tolist(), strict=True):
        similarity = [
            (float(row @ other / (row.norm() * other.norm())), of)
            for other, of in zip(train.double(), train_labels.tolist(), strict=True)
        ]
        votes = {}
        for s, of in sorted(similarity, reverse=True)[:k]:
            votes[of] = votes.get(of, 0) + math.exp(s / temperature)
        right += max(votes, key=votes.get) == label
    return right / len(test)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 10.0])
def test_knn_is_the_weighted_vote(k, temperature):
    data = *clusters(60, seed=1), *clusters(50, seed=2)
    expected = knn_by_loops(*data, k, temperature)
    assert 0.4 < expected < 0.95
    assert knn_accuracy(*data, k=k, temperature=temperature) == pytest.approx(expected)


def test_knn_weighs_the_near_more():
    """One neighbour at similarity 1 outvotes two at 0.8 when the temperature is low."""
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    data = bank, torch.tensor([0, 1, 1]), bank[:1], torch.tensor([0])
    assert knn_accuracy(*data, k=3, temperature=0.1) == 1
    assert knn_accuracy(*data, k=3, temperature=10) == 0


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_knn_does_not_depend_on_the_chunk(chunk):
    data = *clusters(60, seed=1), *clusters(50, seed=2)
    assert knn_accuracy(*data, chunk=chunk) == knn_accuracy(*data)


def test_knn_with_fewer_rows_than_neighbours_and_a_tiny_temperature():
    data = *clusters(10, seed=1), *clusters(50, seed=2)
    expected = knn_by_loops(*data, 10, 0.1)
    assert knn_accuracy(*data, k=20) == pytest.approx(expected)
    nearest = knn_by_loops(*data, 1, 0.1)
    assert knn_accuracy(*data, k=20, temperature=1e-4) == pytest.approx(nearest)


def test_linear_probe_is_logistic_regression():
    train, train_labels = clusters(300, seed=1)
    test, test_labels = clusters(400, seed=2)
    scale = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0])  # standardising takes this out
    train, test = train * scale, test * scale
    scaler = StandardScaler().fit(train)
    # its penalty is |W|^2 / 2 beside C times the sum of the losses
    twin = LogisticRegression(C=1 / (1e-3 * len(train)), tol=1e-8, max_iter=1000)
    twin.fit(scaler.transform(train), train_labels)
    expected = twin.score(scaler.transform(test), test_labels)
    assert 0.5 < expected < 0.9
    # rows at the boundary may fall to either side: one in 400
    accuracy = linear_probe(train, train_labels, test, test_labels)
    assert accuracy == pytest.approx(expected, abs=1.1 / 400)


def test_linear_probe_draws_nothing_at_random():
    data = *clusters(100, seed=1), *clusters(100, seed=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = linear_probe(*data)
    assert torch.get_rng_state().equal(before)
    assert linear_probe(*data) == first


def test_linear_probe_ignores_a_feature_that_never_varies():
    train, train_labels = clusters(100, seed=1)
    test, test_labels = clusters(100, seed=2)
    expected = linear_probe(train, train_labels, test, test_labels)
    train = torch.cat([train, torch.full((100, 1), 3.0)], 1)
    test = torch.cat([test, torch.full((100, 1), 5.0)], 1)
    assert linear_probe(train, train_labels, test, test_labels) == expected


def test_linear_probe_trains_inside_inference_mode():
    with torch.inference_mode():
        data = *clusters(100, seed=1), *clusters(100, seed=2)
        assert linear_probe(*data) > 0.5


def test_nearest_are_the_most_similar_in_order():
    train, test = torch.randn(30, 5), torch.randn(7, 5)
    similarity, rows = nearest(train, test, k=4, chunk=3)
    for i in range(7):
        cosines = [float(torch.cosine_similarity(test[i], other, dim=0)) for other in train]
        order = sorted(range(30), key=lambda j: -cosines[j])
        assert rows[i].tolist() == order[:4]
        assert similarity[i].tolist() == pytest.approx([cosines[j] for j in order[:4]], abs=1e-6)


def test_few_labels_have_the_share_of_each_class_and_at_least_one():
    labels = torch.tensor([0] * 100 + [1] * 30 + [4] * 2)[torch.randperm(132)]
    rows = few_labels(labels, 0.1, seed=0)
    assert len(rows.unique()) == len(rows)
    assert torch.bincount(labels[rows]).tolist() == [10, 3, 0, 0, 1]
    assert few_labels(labels, 0.1, seed=0).equal(rows)
    assert not few_labels(labels, 0.1, seed=1).equal(rows)
    assert sorted(few_labels(labels, 1.0, seed=0).tolist()) == list(range(132))


def test_few_label_probe_sees_these_labels_only():
    train, train_labels = clusters(300, seed=1, spread=0.5)
    test, test_labels = clusters(200, seed=2, spread=0.5)
    few = few_label_probe(train, train_labels, test, test_labels, share=0.02)
    assert 0.6 < few <= linear_probe(train, train_labels, test, test_labels)
    # all other labels wrong: they were not seen
    rows = few_labels(train_labels, 0.02, seed=0)
    wrong = (train_labels + 1) % 3
    wrong[rows] = train_labels[rows]
    parts = train, wrong, test, test_labels
    seen = linear_probe(train, train_labels, test, test_labels, labelled=rows)
    assert linear_probe(*parts, labelled=rows) == seen > 0.6
    assert linear_probe(*parts) < 0.4


def test_few_label_probe_is_the_mean_of_its_draws():
    parts = *clusters(300, seed=1), *clusters(200, seed=2)
    one, two = (linear_probe(*parts, labelled=few_labels(parts[1], 0.05, seed)) for seed in (0, 1))
    assert one != two
    assert few_label_probe(*parts, share=0.05, draws=2) == pytest.approx((one + two) / 2)
