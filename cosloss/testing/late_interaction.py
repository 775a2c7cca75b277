"""Rows of the table: late interaction, of tokens in place of rows.

To a query's token, a document's most similar one is more similar than the next by 0.07 in the
generic samples, and by 0.003 in the hard ones, or exactly as similar: closer, a rounding could put
another first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cosloss import functional, reference
from cosloss.testing.inputs import hard_pairs
from cosloss.testing.op import Op, Sample

TEMPERATURE = torch.tensor(0.3, dtype=torch.float64, device="cpu")
# a query without a token that counts, and documents without one of theirs
MASKS = {
    "query_mask": torch.tensor(
        [[True, True], [True, False], [True, True], [False, False]], device="cpu"
    ),
    "document_mask": torch.arange(3, device="cpu")
    != torch.tensor([0, 3, 1, 2, 3], device="cpu")[:, None],
}
GROUPS = torch.tensor([0, 1, 2, 0], device="cpu")
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64, device="cpu")


def _tokens() -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(3670)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu")

    return {"query_tokens": randn(4, 2, 9), "document_tokens": randn(5, 3, 9)}


def _generic() -> Iterator[Sample]:
    yield Sample("all tokens", _tokens())
    yield Sample("masked", _tokens(), MASKS)


def _generic_loss() -> Iterator[Sample]:
    inputs = {**_tokens(), "temperature": TEMPERATURE}
    yield Sample("each", inputs, {"reduction": "none"})
    yield Sample("masked", inputs, {**MASKS, "symmetric": True, "ignore": GROUPS, "weight": WEIGHT})


def _hard(dtype: torch.dtype) -> Iterator[Sample]:
    for name, (x1, x2) in hard_pairs(dtype):
        queries = torch.stack([x1, x1.roll(8, 1)], 1)
        documents = torch.stack([x2, x2.roll(4, 1), x2.roll(8, 1)], 1)
        yield Sample(name, {"query_tokens": queries, "document_tokens": documents})


def _hard_loss(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in _hard(dtype):
        yield Sample(sample.name, {**sample.inputs, "temperature": TEMPERATURE})


OPS = (
    Op("max_sim", functional.max_sim, reference.max_sim, _generic, _hard),
    Op("max_sim_loss", functional.max_sim_loss, reference.max_sim_loss, _generic_loss, _hard_loss),
)
