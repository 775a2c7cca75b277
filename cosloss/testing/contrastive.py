"""Rows of the table: the in-batch losses."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cosloss import functional, reference
from cosloss.testing.inputs import generic_pair, hard_pairs
from cosloss.testing.op import Op, Sample

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
TEMPERATURE = torch.tensor(0.3, dtype=torch.float64, device="cpu")
BIAS = torch.tensor(-1.5, dtype=torch.float64, device="cpu")
GROUPS = torch.tensor([0, 1, 2, 1, 3, 0], device="cpu")
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5, 0.7], dtype=torch.float64, device="cpu")
PREFIXES = (2, 7, 9)
LABELS = torch.tensor([0, 1, 0, 1, 1, 2], device="cpu")
# No similarity of a sample is within 0.005 of its margin: one of bfloat16 vectors, off by 0.0013,
# could be on the other side of the kink.

Inputs = Callable[[Tensor, Tensor], dict[str, Tensor]]


def _generic(inputs: Inputs, *keywords: dict[str, Any]) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        for arguments in keywords:
            name = ", ".join(f"{key} {value}" for key, value in arguments.items())
            yield Sample(name, inputs(*generic_pair()), arguments)

    return samples


def _hard(
    inputs: Inputs, *keywords: Callable[[Tensor], dict[str, Any]]
) -> Callable[[torch.dtype], Iterator[Sample]]:
    def samples(dtype: torch.dtype) -> Iterator[Sample]:
        for name, (x1, x2) in hard_pairs(dtype):
            for arguments in keywords:
                given = arguments(x1)
                # the gradients of two prefixes of such rows are infinities, whose sum is NaN
                if "dims" not in given or "small" not in name:
                    yield Sample(name, inputs(x1, x2), given)

    return samples


def _half(x: Tensor) -> tuple[int, ...]:
    """Half of the columns, and all."""
    columns = x.shape[1]
    return tuple(sorted({(columns + 1) // 2, columns}))


def _views(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"z1": x1, "z2": x2}


def _views_and_temperature(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"z1": x1, "z2": x2, "temperature": TEMPERATURE}


def _query_and_key(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"query": x1, "key": x2}


def _query_key_and_temperature(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"query": x1, "key": x2, "temperature": TEMPERATURE}


def _query_key_and_negatives(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"query": x1, "key": x2, "negatives": x1.flip(0) + 0.3 * x2.roll(1, 0)}


def _query_key_temperature_and_bias(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    bias = torch.linspace(-3.1, 2.3, x1.shape[0], dtype=torch.float64, device="cpu")
    return _query_key_and_temperature(x1, x2) | {"key_bias": bias}


def _query_key_temperature_and_biases(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    given = _query_key_temperature_and_bias(x1, x2)
    return given | {"query_bias": given["key_bias"].flip(0) * 0.7}


def _query_key_and_hard_negatives(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    hard = torch.stack([x1.flip(0) + 0.3 * x2.roll(1, 0), x2.flip(0) - 0.4 * x1.roll(2, 0)], 1)
    return _query_key_and_temperature(x1, x2) | {"hard_negatives": hard}


def _rows(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"z": x1 + 0 * x2, "temperature": TEMPERATURE}


def _views_and_bias(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"z1": x1, "z2": x2, "bias": BIAS}


def _views_temperature_and_bias(x1: Tensor, x2: Tensor) -> dict[str, Tensor]:
    return {"z1": x1, "z2": x2, "temperature": TEMPERATURE, "bias": BIAS}


OPS = (
    Op(
        "nt_xent_loss",
        functional.nt_xent_loss,
        reference.nt_xent_loss,
        _generic(
            _views,
            {"temperature": 0.1, "reduction": "none"},
            {"temperature": 1.0, "reduction": "none"},
            {"temperature": 0.02},
            {"ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_views, lambda x: {"reduction": "none"}, lambda x: {"temperature": 0.3}),
    ),
    Op(
        "nt_xent_loss, learnable temperature",
        functional.nt_xent_loss,
        reference.nt_xent_loss,
        _generic(_views_and_temperature, {"reduction": "none"}, {"decoupled": True}),
        _hard(_views_and_temperature, lambda x: {}),
    ),
    Op(
        "nt_xent_loss, over prefixes",
        functional.nt_xent_loss,
        reference.nt_xent_loss,
        _generic(
            _views_and_temperature,
            {"dims": PREFIXES, "reduction": "none"},
            {"dims": PREFIXES, "dim_weights": (0.3, 0.2, 0.5), "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_views_and_temperature, lambda x: {"dims": _half(x)}),
    ),
    Op(
        "in_batch_cosine_embedding_loss",
        functional.in_batch_cosine_embedding_loss,
        reference.in_batch_cosine_embedding_loss,
        _generic(
            _views,
            {"margin": 0.1, "reduction": "none"},
            {"margin": -0.4, "negative_weight": 4.0},
            {"margin": 0.005, "ignore": GROUPS, "weight": WEIGHT, "negative_weight": 0.5},
        ),
        _hard(_views, lambda x: {"margin": -0.17, "reduction": "none"}),
    ),
    Op(
        "info_nce_loss",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_and_key,
            {"temperature": 0.2},
            {"symmetric": True, "reduction": "sum", "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(
            _query_and_key,
            lambda x: {"temperature": 0.3},
            lambda x: {"temperature": 0.3, "symmetric": True},
        ),
    ),
    Op(
        "info_nce_loss, learnable temperature",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_key_and_temperature,
            {"reduction": "none"},
            {"symmetric": True, "reduction": "none"},
            {"symmetric": True, "reduction": "sum", "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_query_key_and_temperature, lambda x: {"symmetric": True, "reduction": "none"}),
    ),
    Op(
        "info_nce_loss, with negatives",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(_query_key_and_negatives, {"temperature": 0.2, "reduction": "none"}),
        _hard(_query_key_and_negatives, lambda x: {"temperature": 0.5}),
    ),
    Op(
        "info_nce_loss, with hard negatives",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_key_and_hard_negatives,
            {"reduction": "none"},
            {"symmetric": True, "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_query_key_and_hard_negatives, lambda x: {}, lambda x: {"symmetric": True}),
    ),
    Op(
        "info_nce_loss, with a bias of each key",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_key_temperature_and_bias,
            {"reduction": "none"},
            {"symmetric": True, "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_query_key_temperature_and_bias, lambda x: {"reduction": "none"}),
    ),
    Op(
        "info_nce_loss, with a bias of each query too",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_key_temperature_and_biases,
            {"symmetric": True, "reduction": "none"},
            {"symmetric": True, "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_query_key_temperature_and_biases, lambda x: {"symmetric": True}),
    ),
    Op(
        "info_nce_loss, further directions",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_key_and_temperature,
            {"directions": DIRECTIONS, "reduction": "none"},
            {"directions": DIRECTIONS[::2], "false_negative_margin": 0.57, "reduction": "none"},
            {"directions": DIRECTIONS[:2], "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(
            _query_key_and_temperature,
            lambda x: {"directions": DIRECTIONS, "reduction": "none"},
        ),
    ),
    Op(
        "info_nce_loss, weighted by hardness",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_key_and_hard_negatives,
            {"hardness": 2.5, "reduction": "none"},
            {"hardness": 1.5, "hardness_on": "hard", "false_negative_margin": -0.45},
            {"hardness": 1.5, "hardness_on": "in_batch", "directions": DIRECTIONS},
        ),
        _hard(_query_key_and_hard_negatives, lambda x: {"hardness": 1.5}),
    ),
    Op(
        "info_nce_loss, over prefixes",
        functional.info_nce_loss,
        reference.info_nce_loss,
        _generic(
            _query_key_and_hard_negatives,
            {"dims": PREFIXES, "reduction": "none"},
            {"dims": PREFIXES, "symmetric": True, "ignore": GROUPS, "weight": WEIGHT},
            {"dims": PREFIXES[1:], "directions": DIRECTIONS, "hardness": 1.5},
        ),
        _hard(_query_key_and_temperature, lambda x: {"dims": _half(x), "symmetric": True}),
    ),
    Op(
        "sup_con_loss",
        functional.sup_con_loss,
        reference.sup_con_loss,
        _generic(
            _rows,
            *({"labels": LABELS, "reduction": r} for r in ("none", "mean")),
            {"labels": LABELS, "ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_rows, lambda x: {"labels": LABELS[: len(x)]}),
    ),
    Op(
        "sigmoid_contrastive_loss",
        functional.sigmoid_contrastive_loss,
        reference.sigmoid_contrastive_loss,
        _generic(_views_and_bias, {"temperature": 0.2, "ignore": GROUPS, "weight": WEIGHT}),
        _hard(_views_and_bias, lambda x: {"temperature": 0.3}),
    ),
    Op(
        "sigmoid_contrastive_loss, learnable temperature",
        functional.sigmoid_contrastive_loss,
        reference.sigmoid_contrastive_loss,
        _generic(
            _views_temperature_and_bias,
            {"reduction": "none"},
            {"ignore": GROUPS, "weight": WEIGHT},
        ),
        _hard(_views_temperature_and_bias, lambda x: {}),
    ),
)
