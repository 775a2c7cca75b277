"""MaxSim's loss of 64 queries among their documents, forward and backward: time and memory."""

from dataclasses import replace

import torch
from sentence_transformers.util import maxsim
from torch import Tensor
from torch.nn import functional as F

from cosloss import max_sim_loss, release_memory
from cosloss.testing import OPS
from experiments.benchmarks import contrastive_rivals as lean
from experiments.benchmarks.measure import (
    forward_and_backward,
    keeps_its_budget,
    measure,
    peak_memory,
)

QUERIES, COLUMNS = (64, 32), 128
DOCUMENT_TOKENS = (180, 512)


def show_late_interaction(rounds: int) -> bool:
    """Print a table for each length of documents; False if the op is beyond its error budget."""
    right = all(keeps_its_budget(op) for op in OPS if op.name.startswith("max_sim"))
    for tokens in DOCUMENT_TOKENS:
        torch.compiler.reset()
        contenders = {
            "cosloss": max_sim_loss,
            "lean autograd": lean.max_sim,
            "torch.compile of lean": torch.compile(lean.max_sim, dynamic=False),
            "sentence-transformers": _sentence_transformers,
        }
        inputs = [x.requires_grad_() for x in _tokens(tokens)]
        steps = {name: forward_and_backward(loss, *inputs) for name, loss in contenders.items()}
        found = measure(steps, rounds)
        release_memory()  # the memory kept between steps counts as ours
        ours = replace(found["cosloss"], memory=peak_memory(steps["cosloss"]))
        found["cosloss"] = ours
        print(f"\nmax_sim_loss, {QUERIES[0]} queries of {QUERIES[1]} tokens, documents of {tokens}")
        print(f"{'':<24}{'median ms':>10}{'fastest':>10}{'peak MiB':>10}{'of ours':>9}{'':>9}")
        for name, m in found.items():
            faster = f"{m.median / ours.median:.2f}x" if right else "wrong"
            print(
                f"{name:<24}{m.median:>10.1f}{m.fastest:>10.1f}{m.memory:>10.1f}"
                f"{m.memory / ours.memory:>8.1f}x{faster:>9}"
            )
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
