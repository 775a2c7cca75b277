"""The swaps that docs/swapping.md shows, made in each library's own training loop."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from cosloss import InfoNCELoss, MaxSimLoss, MemoryBank
from cosloss.adapters import MultipleNegativesRankingLoss

PAGE = Path(__file__).parents[1] / "docs" / "swapping.md"

# as in lightly's examples/pytorch/simclr.py
LIGHTLY = """
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead

torch.manual_seed(0)
backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.ReLU())
model = torch.nn.Sequential(backbone, SimCLRProjectionHead(16, 16, 8))
dataloader = [((torch.randn(12, 3, 4, 4), torch.randn(12, 3, 4, 4)), None) for _ in range(5)]
criterion = NTXentLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
curve = []
for batch in dataloader:
    x0, x1 = batch[0]
    z0 = model(x0)
    z1 = model(x1)
    loss = criterion(z0, z1)
    curve.append(loss.detach())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""

# its trainers.MetricLossOnly
METRIC_LEARNING = """
import torch
from pytorch_metric_learning import trainers
from pytorch_metric_learning.losses import SupConLoss

torch.manual_seed(0)
trunk, embedder = torch.nn.Linear(12, 16), torch.nn.Linear(16, 8)
rows = [(torch.randn(12), i % 4) for i in range(64)]
curve = []
trainers.MetricLossOnly(
    models={"trunk": trunk, "embedder": embedder},
    optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)},
    batch_size=16,
    loss_funcs={"metric_loss": SupConLoss(temperature=0.1)},
    dataset=rows,
    data_device=torch.device("cpu"),
    dataloader_num_workers=0,
    end_of_iteration_hook=lambda t: curve.append(t.losses["total_loss"].detach()),
).train(num_epochs=2)
"""


def swapped(source, name):
    """The source with the page's removed line replaced by its added ones."""
    (diff,) = re.findall(rf"<!-- swap: {name} -->\n```diff\n(.*?)```", PAGE.read_text(), re.S)
    (old,) = re.findall("^-(.*)$", diff, re.M)
    new = "\n".join(re.findall(r"^\+(.*)$", diff, re.M))
    assert source.count(f"\n{old}\n") == 1
    return source.replace(f"\n{old}\n", f"\n{new}\n")


def curve(source):
    scope = {}
    exec(source, scope)
    return torch.stack(scope["curve"])


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize(
    ("name", "source"),
    [("lightly", LIGHTLY), ("pytorch_metric_learning", METRIC_LEARNING)],
    ids=["lightly", "pytorch_metric_learning"],
)
def test_the_swap_leaves_the_loop_and_the_curve(name, source):
    pytest.importorskip(name, reason=f"{name} is in the [bench] extra")
    ours = swapped(source, name)
    assert "from cosloss import" in ours
    theirs = curve(source)
    assert theirs.std() > 1e-3  # it moves
    # float32, over the steps' accumulated roundings
    torch.testing.assert_close(curve(ours), theirs, rtol=1e-4, atol=1e-5)


def value_and_gradients(loss, tensors):
    value = loss(*tensors)
    return value, *torch.autograd.grad(value, tensors)


def test_lightlys_memory_bank():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is in the [bench] extra")
    torch.manual_seed(0)
    theirs = lightly.NTXentLoss(temperature=0.5, memory_bank_size=(36, 8))
    theirs(*torch.randn(2, 12, 8))  # it makes its bank
    ours, bank = InfoNCELoss(0.5), MemoryBank(36, 8)
    bank.keys.copy_(theirs.memory_bank.bank)
    bank.position.copy_(theirs.memory_bank.bank_ptr[0])
    for _ in range(7):  # round the bank twice
        query, key = torch.randn(2, 12, 8)
        query.requires_grad_()
        negatives = bank(key)
        torch.testing.assert_close(
            value_and_gradients(lambda q, k=key, n=negatives: ours(q, k, n), [query]),
            value_and_gradients(lambda q, k=key: theirs(q, k), [query]),
        )


JOINT = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": JOINT[:2], "partition_mode": "per_direction"},
        {"directions": JOINT},
        {"directions": JOINT[::2]},
        {"directions": JOINT[::3], "hardness_mode": "all_negatives"},
        {"hardness_mode": "hard_negatives"},
        {"hardness_mode": "in_batch_negatives"},
        {
            "directions": JOINT[:2],
            "partition_mode": "per_direction",
            "hardness_mode": "all_negatives",
        },
    ],
    ids=lambda options: ", ".join(map(str, options.values())) or "plain",
)
def test_sentence_transformers_ranking_loss(options, hard_negatives):
    module = "sentence_transformers.sentence_transformer.losses"
    losses = pytest.importorskip(module, reason="sentence_transformers is in the [bench] extra")
    if "hardness_mode" in options:
        options = options | {"hardness_strength": 3.0}
    theirs = losses.MultipleNegativesRankingLoss(torch.nn.Module(), scale=20.0, **options)
    torch.manual_seed(0)
    columns = [x.requires_grad_() for x in torch.randn(2 + hard_negatives, 12, 8).double()]

    ours = MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
    torch.testing.assert_close(
        value_and_gradients(lambda *c: ours([{"sentence_embedding": x} for x in c]), columns),
        value_and_gradients(
            lambda *c: theirs.compute_loss_from_embeddings(list(c), labels=None), columns
        ),
    )
    assert ours.get_config_dict() == theirs.get_config_dict()


class Embeddings(torch.nn.Module):
    """A model that gives what it is given."""

    def forward(self, features):
        return dict(features)

    def get_embedding_dimension(self):
        return 8


@pytest.mark.parametrize("hard_negatives", [0, 2])
@pytest.mark.parametrize("options", [{}, {"hardness_mode": "all_negatives"}], ids=str)
def test_sentence_transformers_matryoshka_loss(options, hard_negatives):
    module = "sentence_transformers.sentence_transformer.losses"
    losses = pytest.importorskip(module, reason="sentence_transformers is in the [bench] extra")
    if options:
        options = options | {"hardness_strength": 3.0}
    torch.manual_seed(0)
    columns = [x.requires_grad_() for x in torch.randn(2 + hard_negatives, 12, 8).double()]
    model, dims, weights = Embeddings(), [8, 3, 5], [1, 0.5, 2.0]

    def value(loss, *columns):
        return loss([{"sentence_embedding": x} for x in columns], None)

    theirs = losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model, **options), dims, weights
    )
    expected = value_and_gradients(partial(value, theirs), columns)
    ours = MultipleNegativesRankingLoss(
        model, **options, matryoshka_dims=dims, matryoshka_weights=weights
    )
    inside = losses.MatryoshkaLoss(
        model, MultipleNegativesRankingLoss(model, **options), dims, weights
    )
    for loss in (ours, inside):
        found = value_and_gradients(partial(value, loss), columns)
        torch.testing.assert_close(found, expected)


class Guide(torch.nn.Module):
    """A model of other embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features["guide"]}


@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize(
    ("directions", "hard"),
    [
        (["query_to_key"], False),
        (["query_to_key", "query_to_query", "key_to_key"], False),
        (["query_to_key", "query_to_query"], True),
    ],
)
def test_sentence_transformers_guided_loss(directions, hard, margin):
    module = "sentence_transformers.sentence_transformer.losses"
    losses = pytest.importorskip(module, reason="sentence_transformers is in the [bench] extra")
    theirs = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)  # it asks for two tokenizers
    torch.nn.Module.__init__(theirs)
    theirs.model, theirs.guide, theirs.must_retokenize = Embeddings(), Guide(), False
    theirs.temperature, theirs.margin, theirs.margin_strategy = 0.01, margin, "absolute"
    theirs.contrast_anchors = "query_to_query" in directions
    theirs.contrast_positives = "key_to_key" in directions
    theirs.gather_across_devices = False
    theirs.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    theirs.cross_entropy_loss = torch.nn.CrossEntropyLoss()

    torch.manual_seed(0)
    columns = [x.requires_grad_() for x in torch.randn(2 + hard, 12, 8).double()]
    guide = [*torch.randn(2 + hard, 12, 5).double()]
    ours = InfoNCELoss(0.01, directions=directions, false_negative_margin=margin)

    def guided(query, key, hard_negatives=None):
        return ours(query, key, hard_negatives=hard_negatives, guide=guide)

    def value(*columns):
        features = zip(columns, guide, strict=True)
        return theirs([{"sentence_embedding": x, "guide": g} for x, g in features], None)

    found, expected = (value_and_gradients(loss, columns) for loss in (guided, value))
    torch.testing.assert_close(found, expected)


class TokenEncoder(torch.nn.Module):
    """As a MultiVectorEncoder answers: unit rows of tokens, and which of them score."""

    def forward(self, features, task=None):
        tokens = torch.nn.functional.normalize(features["tokens"], dim=2)
        return {"token_embeddings": tokens, "attention_mask": features["attention_mask"]}


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_sentence_transformers_late_interaction(hard_negatives):
    module = "sentence_transformers.multi_vector_encoder.losses"
    losses = pytest.importorskip(module, reason="sentence_transformers is in the [bench] extra")
    theirs = losses.MultiVectorMultipleNegativesRankingLoss(TokenEncoder(), scale=2.0)
    torch.manual_seed(0)
    columns = [torch.randn(6, n, 8).requires_grad_() for n in (4, *[9] * (1 + hard_negatives))]
    masks = [torch.rand(x.shape[:2]) < 0.7 for x in columns]
    for mask in masks:
        mask[:, 0] = True

    def of_theirs(*columns):
        pairs = zip(columns, masks, strict=True)
        return theirs([{"tokens": x, "attention_mask": mask} for x, mask in pairs])

    def ours(query, *documents):
        given = query, torch.cat(documents), masks[0], torch.cat(masks[1:])
        return MaxSimLoss(temperature=0.5)(*given)

    found, expected = (value_and_gradients(loss, columns) for loss in (ours, of_theirs))
    torch.testing.assert_close(found, expected)
