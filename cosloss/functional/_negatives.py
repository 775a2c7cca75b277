"""The checks of what InfoNCE takes besides its pairs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cosloss.arguments import check_device, described
from cosloss.functional._checks import check_floating
from cosloss.functional._in_batch import Options
from cosloss.functional._softmax import Guide, Softmax


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


def check_guide(
    guide: Sequence[Tensor], query: Tensor, given: Tensor | None, margin: float | None
) -> Guide:
    """A guide of the queries, the keys and the given negatives of either kind, or raise."""
    if isinstance(guide, (Tensor, str)) or not isinstance(guide, Sequence):
        raise TypeError(
            "guide must be the guide's embeddings of the queries, the keys and the negatives that "
            f"are given, a tuple of tensors; got {described(guide)}"
        )
    names = ("query", "key") if given is None else ("query", "key", "negatives")
    if len(guide) != len(names):
        raise ValueError(
            f"guide must have {len(names)} tensors here, of {', '.join(names)}; got {len(guide)}"
        )
    for name, x in zip(names, guide, strict=True):
        check_floating(**{f"guide's {name}": x})
        check_device("query", query, f"guide's {name}", x)
    n, of_query = query.shape[0], guide[0]
    if of_query.ndim != 2 or of_query.shape[0] != n or of_query.shape[1] == 0:
        raise ValueError(
            f"guide's query must have shape ({n}, G), G >= 1; got {tuple(of_query.shape)}"
        )
    width = of_query.shape[1]
    shapes = [(n, width), (n, width)]
    if given is not None:
        shapes.append((*given.shape[:-1], width))
    for name, x, shape in zip(names, guide, shapes, strict=True):
        if x.shape != shape:
            raise ValueError(f"guide's {name} must have shape {shape}; got {tuple(x.shape)}")
    if margin is None:
        raise ValueError(
            "guide says which negatives are false, and false_negative_margin from which "
            "similarity: it needs false_negative_margin, 0.0 for the pair's own"
        )
    return Guide(*guide)


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
