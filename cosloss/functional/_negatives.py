"""The checks of what InfoNCE takes besides its pairs."""

from collections.abc import Mapping

from torch import Tensor

from cosloss.arguments import check_device
from cosloss.functional._checks import check_floating
from cosloss.functional._in_batch import Options
from cosloss.functional._softmax import Softmax


def check_softmax(
    softmax: Softmax,
    query: Tensor,
    negatives: Tensor | None,
    hard_negatives: Tensor | None,
    biases: Mapping[str, Tensor | None],
    symmetric: bool,
    options: Options,
) -> Tensor | None:
    """Raise unless the options go together; the given negatives of either kind."""
    if options.gather_distributed == "ring":
        raise ValueError(
            "gather_distributed must be True or False with directions, hardness or "
            "false_negative_margin; got 'ring'"
        )
    for name, bias in biases.items():
        if bias is not None:
            raise ValueError(
                f"{name} is not taken with directions, hardness or false_negative_margin; got both"
            )
    if negatives is not None:
        if not softmax.one_way:
            raise ValueError("negatives take the place of the other keys, which directions need")
        if hard_negatives is not None:
            raise ValueError(
                "negatives take the place of the other keys, which hard_negatives needs; got both"
            )
        check_negatives(
            negatives, query, symmetric or bool(options.gather_distributed), options.ignore
        )
        return negatives
    if hard_negatives is not None:
        check_hard_negatives(hard_negatives, query, bool(options.gather_distributed))
        by_item = softmax.hardness > 0 or "key_to_key" in softmax.directions
        if hard_negatives.ndim == 3 and by_item and options.ignore is not None:
            raise ValueError(
                "ignore is not taken with hard_negatives of each query and hardness or "
                "'key_to_key', which tell an item's own from the others'"
            )
    return hard_negatives


def check_hard_negatives(hard: Tensor, query: Tensor, gathered: bool) -> None:
    check_floating(hard_negatives=hard)
    n, d = query.shape
    fits = hard.ndim in (2, 3) and hard.shape[-1] == d and hard.numel() > 0
    if not fits or (hard.ndim == 3 and hard.shape[0] != n):
        raise ValueError(
            f"hard_negatives must have shape ({n}, K, {d}), or (M, {d}) for all queries, with at "
            f"least one; got {tuple(hard.shape)}"
        )
    check_device("query", query, "hard_negatives", hard)
    if gathered and hard.ndim == 2:
        raise ValueError(
            f"hard_negatives must have shape ({n}, K, {d}) with gather_distributed, each query's "
            f"own; got {tuple(hard.shape)}"
        )


def check_key_bias(bias: Tensor, query: Tensor, hard_negatives: Tensor | None) -> None:
    check_floating(key_bias=bias)
    columns = query.shape[0]
    if hard_negatives is not None:
        columns += hard_negatives.flatten(0, -2).shape[0]
    if bias.shape != (columns,):
        raise ValueError(
            f"key_bias must hold a number for each key, then each hard negative, shape ({columns},)"
            f"; got {tuple(bias.shape)}"
        )
    check_device("query", query, "key_bias", bias)


def check_query_bias(bias: Tensor, query: Tensor, symmetric: bool) -> None:
    check_floating(query_bias=bias)
    if bias.shape != query.shape[:1]:
        raise ValueError(
            f"query_bias must hold a number for each query, shape ({query.shape[0]},); got "
            f"{tuple(bias.shape)}"
        )
    check_device("query", query, "query_bias", bias)
    if not symmetric:
        raise ValueError(
            "query_bias cancels in the losses of the queries, and is for those of the keys: it "
            "needs symmetric=True; got symmetric=False"
        )


def check_negatives(negatives: Tensor, query: Tensor, wider: bool, ignore: Tensor | None) -> None:
    check_floating(negatives=negatives)
    if negatives.ndim != 2 or negatives.shape[1] != query.shape[1] or negatives.shape[0] == 0:
        raise ValueError(
            f"negatives must have shape (K, {query.shape[1]}) with K >= 1; "
            f"got {tuple(negatives.shape)}"
        )
    check_device("query", query, "negatives", negatives)
    if wider or ignore is not None:
        raise ValueError(
            "symmetric, ignore and gather_distributed are about the batch's own keys: "
            "leave out negatives"
        )
