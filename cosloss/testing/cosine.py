"""Rows of the table: cosine similarity, row-wise and pairwise, and the cosine embedding loss."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as torch_functional

from cosloss import functional, reference
from cosloss.testing.inputs import Pair, generic_pair, hard_pairs, layouts
from cosloss.testing.op import Op, Sample

TARGET = torch.tensor([1, -1, 1, -1, -1, 1], device="cpu")


def _pairs(
    names: tuple[str, str], keywords: dict[str, Any], pairs: Iterator[tuple[str, Pair]]
) -> Iterator[Sample]:
    for name, pair in pairs:
        yield Sample(name, dict(zip(names, pair, strict=True)), keywords)


def _similarity_generic() -> Iterator[Sample]:
    x1, x2 = generic_pair()
    yield Sample("generic", {"x1": x1, "x2": x2})
    yield Sample("first dimension", {"x1": x1, "x2": x2}, {"dim": 0})
    yield Sample("broadcast", {"x1": x1[:, None], "x2": x2}, {"dim": -1})
    yield Sample("inside the eps ball", {"x1": x1, "x2": x2}, {"eps": 20.0})
    yield Sample("across the eps ball", {"x1": x1, "x2": x2}, {"eps": 3.5})


def _similarity_hard(dtype: torch.dtype) -> Iterator[Sample]:
    for eps in (1e-8, 0.0):
        yield from _pairs(("x1", "x2"), {"eps": eps}, hard_pairs(dtype))
    x1, x2 = generic_pair()
    for name, layout in layouts():
        yield Sample(name, {"x1": x1, "x2": x2}, layout=layout)


def _pairwise_generic() -> Iterator[Sample]:
    x1, x2 = generic_pair()
    yield Sample("two tensors", {"x1": x1, "x2": x2[:4]})
    yield Sample("one tensor", {"x1": x1})
    yield Sample("inside the eps ball", {"x1": x1, "x2": x2[:4]}, {"eps": 20.0})
    yield Sample("one tensor across the eps ball", {"x1": x1}, {"eps": 3.5})


def _pairwise_hard(dtype: torch.dtype) -> Iterator[Sample]:
    for name, (x1, x2) in hard_pairs(dtype):
        yield Sample(name, {"x1": x1, "x2": x2})
        yield Sample(f"{name}, one tensor", {"x1": x1})


def _embedding_generic() -> Iterator[Sample]:
    x1, x2 = generic_pair()
    inputs = {"input1": x1, "input2": x2}
    for reduction in ("none", "mean", "sum"):
        yield Sample(reduction, inputs, {"target": TARGET, "margin": 0.1, "reduction": reduction})
    yield Sample("one pair", {"input1": x1[0], "input2": x2[0]}, {"target": TARGET[0]})


def _embedding_hard(dtype: torch.dtype) -> Iterator[Sample]:
    for name, (x1, x2) in hard_pairs(dtype):
        target = TARGET[: x1.shape[0]]
        keywords = {"target": target, "margin": -0.2, "reduction": "none"}
        yield Sample(name, {"input1": x1, "input2": x2}, keywords)


OPS = (
    Op(
        "cosine_similarity",
        functional.cosine_similarity,
        reference.cosine_similarity,
        _similarity_generic,
        _similarity_hard,
        peer=torch_functional.cosine_similarity,
    ),
    Op(
        "pairwise_cosine_similarity",
        functional.pairwise_cosine_similarity,
        reference.pairwise_cosine_similarity,
        _pairwise_generic,
        _pairwise_hard,
    ),
    Op(
        "cosine_embedding_loss",
        functional.cosine_embedding_loss,
        reference.cosine_embedding_loss,
        _embedding_generic,
        _embedding_hard,
        peer=torch_functional.cosine_embedding_loss,
    ),
)
