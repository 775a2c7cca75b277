"""InfoNCE over prefixes, in several directions and weighted by hardness, beside rivals' own."""

from collections.abc import Callable
from functools import partial

import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional as F

from cosloss import info_nce_loss
from cosloss.testing import OPS
from experiments.benchmarks import contrastive_rivals as lean
from experiments.benchmarks.measure import compare, keeps_its_budget

COLUMNS, DIMS = 768, (64, 128, 256, 512, 768)
TEMPERATURE = 0.1
HARDNESS = 3.0
DIRECTIONS = {
    "query_to_doc": "query_to_key",
    "doc_to_query": "key_to_query",
    "query_to_query": "query_to_query",
    "doc_to_doc": "key_to_key",
}

Loss = Callable[[Tensor, Tensor], Tensor]


def show_softmaxes(rounds: int) -> bool:
    """Print a table for each; False if an op is beyond its error budget."""
    right = all(keeps_its_budget(op) for op in OPS if op.name.startswith("info_nce_loss"))
    one = partial(info_nce_loss, temperature=TEMPERATURE)
    ranking = partial(MultipleNegativesRankingLoss, torch.nn.Identity(), scale=1 / TEMPERATURE)
    for n in (1024, 4096):
        views = _views(n, COLUMNS)
        compare(
            f"info_nce_loss over five prefixes of {COLUMNS} columns, {n} rows",
            {
                "cosloss": partial(one, dims=DIMS),
                "one loss": one,
                "five losses": partial(_over_prefixes, one),
                "torch.compile of lean": torch.compile(
                    partial(_over_prefixes, lean.info_nce), dynamic=False
                ),
                # its MatryoshkaLoss: rows are normalised once more for each prefix
                "sentence-transformers": partial(
                    _over_prefixes, partial(_of_embeddings, ranking()), normalise=True
                ),
            },
            views,
            rounds,
            right,
        )
    everything = ranking(directions=tuple(DIRECTIONS))
    weighed = ranking(hardness_mode="all_negatives", hardness_strength=HARDNESS)
    views = _views(4096, 128)
    compare(
        "info_nce_loss in four directions, 4096 rows",
        {
            "cosloss": partial(one, directions=tuple(DIRECTIONS.values())),
            "sentence-transformers": partial(_of_embeddings, everything),
            "torch.compile of theirs": torch.compile(
                partial(_of_embeddings, everything), dynamic=False
            ),
        },
        views,
        rounds,
        right,
    )
    compare(
        "info_nce_loss weighted by hardness, 4096 rows",
        {
            "cosloss": partial(one, hardness=HARDNESS),
            "sentence-transformers": partial(_of_embeddings, weighed),
            "torch.compile of theirs": torch.compile(
                partial(_of_embeddings, weighed), dynamic=False
            ),
        },
        views,
        rounds,
        right,
    )
    return right


def _views(n: int, columns: int) -> list[Tensor]:
    views = torch.randn(2, n, columns, generator=torch.Generator().manual_seed(0))
    return [x.requires_grad_() for x in views]


def _of_embeddings(loss: MultipleNegativesRankingLoss, query: Tensor, key: Tensor) -> Tensor:
    return loss.compute_loss_from_embeddings([query, key], labels=None)


def _over_prefixes(loss: Loss, query: Tensor, key: Tensor, normalise: bool = False) -> Tensor:
    short = ([x[:, :dim] for x in (query, key)] for dim in DIMS)
    if normalise:
        short = ([F.normalize(x) for x in pair] for pair in short)
    return torch.stack([loss(*pair) for pair in short]).sum()
