"""The in-batch losses, forward and backward, D = 128: time, memory, and bytes between processes."""

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses as metric_learning
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from cosloss import (
    in_batch_cosine_embedding_loss,
    info_nce_loss,
    nt_xent_loss,
    release_memory,
    sigmoid_contrastive_loss,
    sup_con_loss,
)
from cosloss.testing import OPS
from experiments.benchmarks import contrastive_rivals as lean
from experiments.benchmarks.collectives import show_collectives
from experiments.benchmarks.growth import show_growth
from experiments.benchmarks.late_interaction import show_late_interaction
from experiments.benchmarks.measure import (
    Step,
    forward_and_backward,
    keeps_its_budget,
    measure,
    peak_memory,
)
from experiments.benchmarks.softmaxes import show_softmaxes

COLUMNS = 128
PLOT = Path("benchmark_contrastive.png")
# how often one full product of the similarity matrix is spent: by ours where the matrix is
# symmetric (half for the similarities, one for the gradient), and else
G_SYMMETRIC, G_FULL = 1.5, 3.0
CHUNKED = hasattr(torch.nn.functional, "linear_cross_entropy")

Loss = Callable[[Tensor, Tensor], Tensor]


def run(rounds: int) -> bool:
    """Print the tables and save the plot; False if an op is beyond its error budget."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, CPU"
    )
    rows = {op.name: op for op in OPS}
    right = True
    for n in (128, 256, 1024, 4096):
        contenders = {
            "cosloss": _nt_xent,
            "lean autograd": lean.nt_xent,
            "lightly": NTXentLoss(temperature=0.1),
        }
        if CHUNKED:
            contenders["torch, chunked"] = lean.chunked_nt_xent
        if n <= 128:  # it is O(N^3)
            contenders["metric learning"] = _metric_learning_nt_xent
        contenders["cosloss, bfloat16"] = _autocast(_nt_xent)
        right &= _compare("nt_xent_loss", contenders, n, rounds, 2 * n, G_SYMMETRIC, rows)
    for name, contenders, symmetric in (
        (
            "in_batch_cosine_embedding_loss",
            {
                "cosloss": lambda a, b: in_batch_cosine_embedding_loss(a, b, 0.1),
                "lean autograd": lean.in_batch_cosine,
            },
            True,
        ),
        (
            "sup_con_loss",
            {
                "cosloss": lambda a, b: sup_con_loss(torch.cat([a, b]), _labels(a), 0.1),
                "lean autograd": lean.sup_con,
            },
            True,
        ),
        (
            "sigmoid_contrastive_loss",
            {
                "cosloss": lambda a, b: sigmoid_contrastive_loss(a, b, 0.1, -10.0),
                "lean autograd": lean.sigmoid,
            },
            False,
        ),
        (
            "info_nce_loss, symmetric",
            {
                "cosloss": lambda a, b: info_nce_loss(a, b, 0.1, symmetric=True),
                "lean autograd": lean.symmetric_info_nce,
            },
            False,
        ),
    ):
        size, spent = (8192, G_SYMMETRIC) if symmetric else (4096, G_FULL)
        right &= _compare(name, contenders, 4096, rounds, size, spent, rows)
    for n in (1024, 2048, 4096):
        contenders = {
            "cosloss": lambda a, b: info_nce_loss(a, b, 0.1),
            "lean autograd": lean.info_nce,
        }
        if CHUNKED:
            contenders["torch, chunked"] = lean.chunked_info_nce
        right &= _compare("info_nce_loss", contenders, n, rounds, n, G_FULL, rows)
    for n in (512, 2048):
        contenders = {
            "cosloss": lambda a, b: info_nce_loss(a, b, 0.1, hard_negatives=lean.hard(b)),
            "lean autograd": lean.hard_info_nce,
            "sentence-transformers": _sentence_transformers,
        }
        name = "info_nce_loss, with hard negatives"  # three for each query
        right &= _compare(name, contenders, n, rounds, 2 * n, G_FULL, rows)
    right &= show_softmaxes(rounds)
    right &= show_late_interaction(rounds)
    show_growth(PLOT)
    show_collectives()
    return right


def _compare(
    name: str,
    contenders: dict[str, Loss],
    n: int,
    rounds: int,
    matrix: int,
    spent: float,
    table: dict,
) -> bool:
    """Print one table; G is the work of one product of the whole (matrix, matrix) similarity."""
    torch.compiler.reset()
    right = keeps_its_budget(table.get(name, table[name.split(",")[0]]))
    compiled = torch.compile(contenders["lean autograd"], dynamic=False)
    contenders = {**contenders, "torch.compile of lean": compiled}
    views = [x.clone().requires_grad_() for x in _views(n)]
    steps: dict[str, Step] = {
        label: forward_and_backward(loss, *views) for label, loss in contenders.items()
    }
    a = torch.randn(2048, 2048)
    steps["matrix product"] = lambda: a @ a
    found = measure(steps, rounds * (10 if n <= 256 else 1))
    for label in ("cosloss", "cosloss, bfloat16"):
        if label in steps:
            release_memory()  # the memory kept between steps counts as ours
            found[label] = replace(found[label], memory=peak_memory(steps[label]))
    rate = 2 * 2048**3 / found.pop("matrix product").median / 1e6  # GFLOP/s
    work = 2 * matrix**2 * COLUMNS / 1e9
    rivals = [label for label in found if not label.startswith("cosloss")]
    best = min(rivals, key=lambda label: found[label].median)
    print(f"\n{name}, {n} rows per view, float32; matrix product {rate:.0f} GFLOP/s")
    print(f"{'':<24}{'median ms':>10}{'fastest':>10}{'peak MiB':>10}{'G':>6}{'of rate':>9}{'':>9}")
    for label, m in found.items():
        g = G_FULL if label in rivals else spent
        faster = m.median / found["cosloss"].median
        print(
            f"{label:<24}{m.median:>10.2f}{m.fastest:>10.2f}{m.memory:>10.1f}{g:>6.1f}"
            f"{g * work / m.median * 1e3 / rate:>9.0%}{f'{faster:.2f}x' if right else 'wrong':>9}"
        )
    two_g = 2 * work / rate * 1e3
    print(
        f"best rival: {best}; 2 G at the matrix rate: {two_g:.2f} ms, "
        f"ours takes {found['cosloss'].median / two_g:.2f} of that"
    )
    return right


def _views(n: int) -> Tensor:
    return torch.randn(2, n, COLUMNS, generator=torch.Generator().manual_seed(0))


def _labels(z: Tensor) -> Tensor:
    return torch.arange(2 * len(z)) % 100


def _nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    return nt_xent_loss(z1, z2, 0.1)


def _autocast(loss: Loss) -> Loss:
    def under_autocast(z1: Tensor, z2: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(z1, z2)

    return under_autocast


def _sentence_transformers(query: Tensor, key: Tensor) -> Tensor:
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=10.0)
    return loss.compute_loss_from_embeddings([query, key, *lean.hard(key).unbind(1)], labels=None)


def _metric_learning_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    loss = metric_learning.NTXentLoss(temperature=0.1)
    return loss(torch.cat([z1, z2]), torch.arange(len(z1)).repeat(2))
