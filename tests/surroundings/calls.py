"""Every function of the library with every tensor that it takes, for the tests of surroundings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosloss import functional, reference

Arguments = dict[str, Tensor]


class Call(NamedTuple):
    """call(module, arguments) with module `cosloss.functional` or `cosloss.reference`."""

    function: Callable[[Any, Arguments], Tensor]
    names: str


DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
CALLS = {
    "cosine_similarity": Call(lambda m, d: m.cosine_similarity(d["a"], d["b"]), "ab"),
    "pairwise": Call(lambda m, d: m.pairwise_cosine_similarity(d["a"], d["b"]), "ab"),
    "of one": Call(lambda m, d: m.pairwise_cosine_similarity(d["a"]), "a"),
    "cosine_embedding": Call(
        lambda m, d: m.cosine_embedding_loss(d["a"], d["b"], d["y"], 0.1, weight=d["w"]), "abyw"
    ),
    "in_batch_cosine": Call(
        lambda m, d: m.in_batch_cosine_embedding_loss(
            d["a"], d["b"], -0.1, weight=d["w"], ignore=d["g"]
        ),
        "abwg",
    ),
    "nt_xent": Call(
        lambda m, d: m.nt_xent_loss(d["a"], d["b"], 0.3, weight=d["w"], ignore=d["g"]), "abwg"
    ),
    "nt_xent, learnable": Call(
        lambda m, d: m.nt_xent_loss(
            d["a"], d["b"], d["T"], decoupled=True, weight=d["w"], ignore=d["g"]
        ),
        "abTwg",
    ),
    "nt_xent, prefixes": Call(
        lambda m, d: m.nt_xent_loss(
            d["a"], d["b"], d["T"], weight=d["w"], ignore=d["g"], dims=(2, 3)
        ),
        "abTwg",
    ),
    "nt_xent, each": Call(lambda m, d: m.nt_xent_loss(d["a"], d["b"], 0.3, "none"), "ab"),
    "info_nce": Call(lambda m, d: m.info_nce_loss(d["a"], d["b"], 0.3), "ab"),
    "symmetric": Call(
        lambda m, d: m.info_nce_loss(
            d["a"], d["b"], d["T"], symmetric=True, weight=d["w"], ignore=d["g"]
        ),
        "abTwg",
    ),
    "queue": Call(lambda m, d: m.info_nce_loss(d["a"], d["b"], 0.3, d["q"]), "abq"),
    "hard negatives": Call(
        lambda m, d: m.info_nce_loss(
            d["a"], d["b"], d["T"], hard_negatives=d["h"], weight=d["w"], ignore=d["g"]
        ),
        "abThwg",
    ),
    "key bias": Call(
        lambda m, d: m.info_nce_loss(d["a"], d["b"], d["T"], key_bias=d["k"], ignore=d["g"]),
        "abTkg",
    ),
    "directions": Call(
        lambda m, d: m.info_nce_loss(
            d["a"], d["b"], d["T"], directions=DIRECTIONS, weight=d["w"], ignore=d["g"]
        ),
        "abTwg",
    ),
    "hardness": Call(
        lambda m, d: m.info_nce_loss(
            d["a"], d["b"], d["T"], hard_negatives=d["h"], hardness=2.0, directions=DIRECTIONS[::3]
        ),
        "abTh",
    ),
    "false negatives": Call(
        lambda m, d: m.info_nce_loss(d["a"], d["b"], 0.3, d["q"], false_negative_margin=-0.1), "abq"
    ),
    "guide": Call(
        lambda m, d: m.info_nce_loss(
            d["a"],
            d["b"],
            d["T"],
            directions=DIRECTIONS,
            false_negative_margin=0.1,
            guide=(d["G"], d["H"]),
        ),
        "abTGH",
    ),
    "hard negatives, symmetric": Call(
        lambda m, d: m.info_nce_loss(d["a"], d["b"], 0.3, None, True, hard_negatives=d["q"]), "abq"
    ),
    "sup_con": Call(
        lambda m, d: m.sup_con_loss(d["a"], d["l"], d["T"], weight=d["w"], ignore=d["g"]), "alTwg"
    ),
    "sigmoid": Call(
        lambda m, d: m.sigmoid_contrastive_loss(
            d["a"], d["b"], d["T"], d["B"], weight=d["w"], ignore=d["g"]
        ),
        "abTBwg",
    ),
    "sigmoid, fixed": Call(
        lambda m, d: m.sigmoid_contrastive_loss(d["a"], d["b"], 0.3, -3.0, weight=d["w"]), "abw"
    ),
    "max_sim": Call(lambda m, d: _late(m, d), "ab"),
    "max_sim, masked": Call(lambda m, d: _late(m, d, d["Q"], d["D"]), "abQD"),
    "max_sim loss": Call(
        lambda m, d: _late(
            m, d, d["Q"], d["D"], temperature=d["T"], weight=d["w"], ignore=d["g"], symmetric=True
        ),
        "abTwgQD",
    ),
}


def _late(m: Any, d: Arguments, *masks: Tensor, **options: Any) -> Tensor:
    """An item for each row, two tokens in a query and three in a document."""
    query, document = (
        torch.stack([x, x.flip(1), x.roll(1, 1)][:count], 1)
        for x, count in ((d["a"], 2), (d["b"], 3))
    )
    return (m.max_sim_loss if options else m.max_sim)(query, document, *masks, **options)


IN_BATCH = [name for name in CALLS if name not in ("cosine_similarity", "pairwise", "of one")]
IN_BATCH.remove("cosine_embedding")


def arguments(dtype: torch.dtype = torch.float32, rows: int = 6, columns: int = 8) -> Arguments:
    """Views, hard negatives, a queue, target, weight, groups, labels, guides, masks, scalars."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")
        return x.to(dtype).requires_grad_()

    index = torch.arange(rows, device="cpu")
    return {
        "a": randn(rows, columns),
        "b": randn(rows, columns),
        "q": randn(5, columns),
        "h": randn(rows, 2, columns),
        "k": randn(rows),
        "y": 1 - 2 * (index % 2),
        "w": 0.3 + index.to(dtype) / rows,
        "g": index // 2 % 2,
        "l": index % 3,
        "G": randn(rows, 3).detach(),
        "H": randn(rows, 3).detach(),
        "Q": index[:2] < 1 + index[:, None] % 2,
        "D": index[:3] != index[:, None] % 4,
        "T": torch.tensor(0.3, dtype=dtype, device="cpu").requires_grad_(),
        "B": torch.tensor(-1.5, dtype=dtype, device="cpu").requires_grad_(),
    }


def learnt(name: str, given: Arguments) -> list[Tensor]:
    """The arguments of that call that gradients are taken of."""
    return [given[k] for k in CALLS[name].names if given[k].requires_grad]


def incoming(value: Tensor) -> Tensor:
    """A gradient on the value that is neither 1 nor constant."""
    numbers = torch.arange(value.numel(), dtype=torch.float64, device="cpu")
    return (0.37 + numbers / (1 + numbers)).view(value.shape).to(value.dtype)


def found(name: str, given: Arguments, module: Any = functional) -> list[Tensor]:
    """The value and the gradients."""
    value = CALLS[name].function(module, given)
    return [value.detach(), *torch.autograd.grad(value, learnt(name, given), incoming(value))]


def expected(name: str, given: Arguments) -> list[Tensor]:
    """The twin's value and gradients, in float64 at the same numbers."""
    exact = {
        k: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for k, x in given.items()
    }
    return found(name, exact, reference)


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of each tensor."""
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        size = float(y.abs().amax().clamp_min(1e-3))
        worst = max(worst, float((x.double() - y.double()).abs().amax()) / size)
        worst = worst if worst == worst else torch.inf
    return worst
