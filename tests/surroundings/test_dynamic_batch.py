"""torch.export and torch.compile with a dynamic batch: right at other sizes than the traced."""

import pytest
import torch
import torch._dynamo.testing
from torch.export import Dim

from cosloss import (
    CosineEmbeddingLoss,
    CosineSimilarity,
    InfoNCELoss,
    MaxSimLoss,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
)
from tests.slow import slow
from tests.surroundings.calls import arguments

TWO = ("a", "b")


class HardNegatives(InfoNCELoss):
    """With hard negatives by position, as the other modules' tensors are given here."""

    def forward(self, query, key, hard_negatives, *, ignore=None, weight=None):
        options = {"ignore": ignore, "weight": weight}
        return super().forward(query, key, hard_negatives=hard_negatives, **options)


class LateInteraction(MaxSimLoss):
    """Of items with two tokens each."""

    def forward(self, query, document, *, ignore=None, weight=None):
        tokens = (torch.stack([x, x.flip(1)], 1) for x in (query, document))
        return super().forward(*tokens, ignore=ignore, weight=weight)


MODULES = {
    "nt_xent": (NTXentLoss(), TWO, True),
    "learnable": (NTXentLoss(0.3, learnable_temperature=True), TWO, True),
    "decoupled, each": (NTXentLoss(decoupled=True, reduction="none"), TWO, True),
    "info_nce": (InfoNCELoss(), TWO, True),
    "symmetric, sum": (InfoNCELoss(symmetric=True, reduction="sum"), TWO, True),
    "queue": (InfoNCELoss(), ("a", "b", "q"), False),
    "hard negatives": (HardNegatives(), ("a", "b", "h"), True),
    "sup_con": (SupConLoss(), ("a", "l"), True),
    "sigmoid": (SigmoidContrastiveLoss(), TWO, True),
    "max_sim": (LateInteraction(), TWO, True),
    "in_batch_cosine": (CosineEmbeddingLoss(), TWO, False),
    "cosine_embedding": (CosineEmbeddingLoss(), ("a", "b", "y"), False),
    "similarity": (CosineSimilarity(), TWO, False),
}


def given(rows, names, optional):
    every = {k: x.detach() for k, x in arguments(torch.float64, rows=rows).items()}
    keywords = {"ignore": every["g"], "weight": every["w"]} if optional else {}
    return tuple(every[k] for k in names), keywords


@pytest.mark.parametrize("strict", [False, *slow(True)])
@pytest.mark.parametrize(
    ("name", "keywords"),
    [(name, k) for name, (_, _, takes) in MODULES.items() for k in sorted({False, takes})],
)
def test_export(name, strict, keywords):
    module, names, _ = MODULES[name]
    positional, optional = given(6, names, keywords)
    n, k = Dim("n", min=2), Dim("k", min=2)
    shapes = [{0: k if letter == "q" else n} for letter in names]
    program = torch.export.export(
        module,
        positional,
        optional,
        dynamic_shapes=(*shapes, *({0: n} for _ in optional)),
        strict=strict,
    )
    for rows in (2, 9, 40):
        positional, optional = given(rows, names, keywords)
        torch.testing.assert_close(
            program.module()(*positional, **optional), module(*positional, **optional)
        )


FEW = ("nt_xent", "hard negatives", "sup_con", "similarity")


@pytest.mark.parametrize("name", [*FEW, *slow(*(name for name in MODULES if name not in FEW))])
def test_compile_once_for_every_size(name):
    module, names, optional = MODULES[name]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)
    for rows in (6, 9, 40):
        positional, keywords = given(rows, names, optional)
        torch.testing.assert_close(
            compiled(*positional, **keywords), module(*positional, **keywords)
        )
    assert counter.frame_count == 1
