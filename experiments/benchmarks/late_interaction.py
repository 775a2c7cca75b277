"""MaxSim's loss of 64 queries among their documents, forward and backward: time and memory."""

import torch
from sentence_transformers.util import maxsim
from torch import Tensor
from torch.nn import functional as F

from cosloss import max_sim_loss
from cosloss.testing import OPS
from experiments.benchmarks import contrastive_rivals as lean
from experiments.benchmarks.measure import compare, keeps_its_budget

QUERIES, COLUMNS = (64, 32), 128
DOCUMENT_TOKENS = (180, 512)


def show_late_interaction(rounds: int) -> bool:
    """Print a table for each length of documents; False if the op is beyond its error budget."""
    right = all(keeps_its_budget(op) for op in OPS if op.name.startswith("max_sim"))
    for tokens in DOCUMENT_TOKENS:
        contenders = {
            "cosloss": max_sim_loss,
            "lean autograd": lean.max_sim,
            "torch.compile of lean": torch.compile(lean.max_sim, dynamic=False),
            "sentence-transformers": _sentence_transformers,
        }
        inputs = [x.requires_grad_() for x in _tokens(tokens)]
        title = f"max_sim_loss, {QUERIES[0]} queries of {QUERIES[1]} tokens, documents of {tokens}"
        compare(title, contenders, inputs, rounds, right)
    return right


def _tokens(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (*QUERIES, COLUMNS), (QUERIES[0], count, COLUMNS)
    query, document = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, document


def _sentence_transformers(query: Tensor, document: Tensor) -> Tensor:
    """Its MultiVectorMultipleNegativesRankingLoss at its scale, of token embeddings."""
    scores = maxsim(F.normalize(query, dim=2), F.normalize(document, dim=2))
    return F.cross_entropy(scores, torch.arange(len(query)))
