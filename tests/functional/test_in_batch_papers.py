"""Each in-batch loss against its paper, written as loops over plain numbers, in float64."""

import math

import pytest
import torch

from cosloss import functional

TEMPERATURE = 0.4
BIAS = -1.3
LABELS = [0, 1, 0, 2, 1, 0, 3]
GROUPS = [0, 1, 0, 2, 3, 1, 4]


def rows(seed, count=7, columns=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, dtype=torch.float64, generator=generator)


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def nt_xent(z1, z2, groups=None, decoupled=False):
    z = [*z1, *z2]
    n = len(z1)
    losses = []
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        total = 0.0
        for j in range(2 * n):
            same = j % n == i % n or (groups is not None and groups[j % n] == groups[i % n])
            if not same or (j == positive and not decoupled):
                total += math.exp(cosine(z[i], z[j]) / TEMPERATURE)
        losses.append(-math.log(math.exp(cosine(z[i], z[positive]) / TEMPERATURE) / total))
    return losses


def info_nce(query, key):
    losses = []
    for i, q in enumerate(query):
        total = sum(math.exp(cosine(q, k) / TEMPERATURE) for k in key)
        losses.append(-math.log(math.exp(cosine(q, key[i]) / TEMPERATURE) / total))
    return losses


def clip(query, key):
    return [(a + b) / 2 for a, b in zip(info_nce(query, key), info_nce(key, query), strict=True)]


def moco(query, key, queue):
    losses = []
    for q, k in zip(query, key, strict=True):
        own = math.exp(cosine(q, k) / TEMPERATURE)
        total = own + sum(math.exp(cosine(q, other) / TEMPERATURE) for other in queue)
        losses.append(-math.log(own / total))
    return losses


def with_hard_negatives(query, key, hard, groups=None, bias=None):
    """Multiple negatives ranking (Henderson et al., 2017) with given negatives beside the keys."""
    losses = []
    groups = range(len(query)) if groups is None else groups
    for i, q in enumerate(query):
        terms = []
        for j, k in enumerate([*key, *hard]):
            own = math.exp(cosine(q, k) / TEMPERATURE + (0.0 if bias is None else bias[j]))
            terms.append(own if j in (i, *range(len(key), 99)) or groups[j] != groups[i] else 0.0)
        losses.append(-math.log(terms[i] / sum(terms)))
    return losses


def gte(query, key, further, groups=None, margin=None, guide=None):
    """Li et al., 2023, section 3.3, and the limit of Solatorio, 2024, by another model's rows."""
    losses = []
    groups = range(len(query)) if groups is None else groups
    guide = guide or (query, key)
    sides = {
        "query_to_key": (0, 1),
        "key_to_query": (1, 0),
        "query_to_query": (0, 0),
        "key_to_key": (1, 1),
    }
    for i, q in enumerate(query):
        own = cosine(q, key[i])
        limit = cosine(guide[0][i], guide[1][i]) - (margin or 0)
        total = 0.0
        for name in ["query_to_key", *further]:
            a, b = sides[name]
            if a != b:
                total += math.exp(own / TEMPERATURE)
            for j in range(len(query)):
                false = margin is not None and cosine(guide[a][i], guide[b][j]) > limit
                if groups[j] != groups[i] and not false:
                    total += math.exp(cosine((query, key)[a][i], (query, key)[b][j]) / TEMPERATURE)
        losses.append(-math.log(math.exp(own / TEMPERATURE) / total))
    return losses


def llave(query, key, hard, owners, hardness, on):
    """Lan et al., 2025, equation 5; owners: whose a hard negative is, None if everyone's."""
    losses = []
    for i, q in enumerate(query):
        own = math.exp(cosine(q, key[i]) / TEMPERATURE)
        total = own
        for j, x in enumerate([*key, *hard]):
            mine = j >= len(key) and (owners is None or owners[j - len(key)] == i)
            weighted = on == "all" or (on == "hard") == mine
            s = cosine(q, x)
            if j != i:
                total += math.exp(s / TEMPERATURE + (hardness * s if weighted else 0.0))
        losses.append(-math.log(own / total))
    return losses


def sup_con(z, labels, groups=None):
    """groups: ids whose members are not each other's negatives."""
    losses = []
    groups = range(len(z)) if groups is None else groups
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        others = [a for a in range(len(z)) if groups[a] != groups[i]]
        others = sorted({*positives, *others})
        total = sum(math.exp(cosine(z[i], z[a]) / TEMPERATURE) for a in others)
        terms = [math.log(math.exp(cosine(z[i], z[p]) / TEMPERATURE) / total) for p in positives]
        losses.append(-sum(terms) / len(terms) if terms else 0.0)
    return losses


def sigmoid(z1, z2):
    losses = []
    for i, x in enumerate(z1):
        terms = []
        for j, y in enumerate(z2):
            label = 1 if i == j else -1
            logit = cosine(x, y) / TEMPERATURE + BIAS
            terms.append(-math.log(1 / (1 + math.exp(-label * logit))))
        losses.append(sum(terms))
    return losses


def in_batch_cosine(z1, z2, margin, groups, negative_weight):
    z = [*z1, *z2]
    n = len(z1)
    losses = []
    for i in range(2 * n):
        negatives = [j for j in range(2 * n) if groups[j % n] != groups[i % n]]
        hinges = [max(0.0, cosine(z[i], z[j]) - margin) for j in negatives]
        positive = 1 - cosine(z[i], z[(i + n) % (2 * n)])
        losses.append(positive + negative_weight * sum(hinges) / len(hinges))
    return losses


def close(ours, paper):
    torch.testing.assert_close(
        ours, torch.tensor(paper, dtype=torch.float64), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_nt_xent(groups, decoupled):
    z1, z2 = rows(0), rows(1)
    ignore = None if groups is None else torch.tensor(groups)
    ours = functional.nt_xent_loss(z1, z2, TEMPERATURE, "none", decoupled=decoupled, ignore=ignore)
    close(ours, nt_xent(z1.tolist(), z2.tolist(), groups, decoupled))


def test_info_nce():
    q, k, queue = rows(0), rows(1), rows(2, count=4)
    lists = q.tolist(), k.tolist()
    close(functional.info_nce_loss(q, k, TEMPERATURE, reduction="none"), info_nce(*lists))
    close(
        functional.info_nce_loss(q, k, TEMPERATURE, symmetric=True, reduction="none"),
        clip(*lists),
    )
    close(
        functional.info_nce_loss(q, k, TEMPERATURE, queue, reduction="none"),
        moco(*lists, queue.tolist()),
    )


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_info_nce_with_hard_negatives(groups):
    q, k, hard = rows(0), rows(1), rows(2, count=14)
    ignore = None if groups is None else torch.tensor(groups)
    lists = q.tolist(), k.tolist(), hard.tolist()
    paper = with_hard_negatives(*lists, groups)
    for given in (hard, hard.view(7, 2, 5), hard.view(2, 7, 5).transpose(0, 1)):
        ours = functional.info_nce_loss(
            q, k, TEMPERATURE, hard_negatives=given, reduction="none", ignore=ignore
        )
        close(ours, paper)
    back = with_hard_negatives(lists[1], lists[0], [], groups)
    both = functional.info_nce_loss(
        q, k, TEMPERATURE, None, True, "none", hard_negatives=hard, ignore=ignore
    )
    close(both, [(a + b) / 2 for a, b in zip(paper, back, strict=True)])


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("further", range(8))
@pytest.mark.parametrize("margin", [None, -0.3, 0.2])
def test_info_nce_in_several_directions(further, groups, margin):
    names = ("key_to_query", "query_to_query", "key_to_key")
    chosen = [name for k, name in enumerate(names) if further >> k & 1]
    q, k = rows(0), rows(1)
    ignore = None if groups is None else torch.tensor(groups)
    ours = functional.info_nce_loss(
        q,
        k,
        TEMPERATURE,
        reduction="none",
        directions=[*chosen, "query_to_key"],
        false_negative_margin=margin,
        ignore=ignore,
    )
    close(ours, gte(q.tolist(), k.tolist(), chosen, groups, margin))
    if margin is not None:
        guide = rows(2, columns=3), rows(3, columns=3)
        guided = functional.info_nce_loss(
            q,
            k,
            TEMPERATURE,
            reduction="none",
            directions=[*chosen, "query_to_key"],
            false_negative_margin=margin,
            guide=guide,
            ignore=ignore,
        )
        lists = [x.tolist() for x in guide]
        close(guided, gte(q.tolist(), k.tolist(), chosen, groups, margin, lists))


def test_prefixes():
    # Matryoshka, eq. 1: the loss of each prefix by itself, weighted
    z1, z2 = rows(0), rows(1)
    ours = functional.nt_xent_loss(
        z1, z2, TEMPERATURE, "none", dims=(5, 2, 3), dim_weights=(0.3, 1.5, 2.0)
    )
    each = [nt_xent(z1[:, :dim].tolist(), z2[:, :dim].tolist()) for dim in (5, 2, 3)]
    summed = [0.3 * a + 1.5 * b + 2.0 * c for a, b, c in zip(*each, strict=True)]
    close(ours, summed)


@pytest.mark.parametrize("on", ["all", "in_batch", "hard"])
@pytest.mark.parametrize("per_query", [True, False])
def test_info_nce_weighted_by_hardness(on, per_query):
    q, k, hard = rows(0), rows(1), rows(2, count=14)
    given = hard.view(7, 2, 5) if per_query else hard
    options = {"hard_negatives": given, "hardness": 1.7, "hardness_on": on, "reduction": "none"}
    ours = functional.info_nce_loss(q, k, TEMPERATURE, **options)
    owners = [i for i in range(7) for _ in range(2)] if per_query else None
    close(ours, llave(q.tolist(), k.tolist(), hard.tolist(), owners, 1.7, on))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_info_nce_with_a_bias_of_each_key(groups):
    q, k, hard = rows(0), rows(1), rows(2, count=14)
    bias = 3 * rows(3, count=21, columns=1)[:, 0]
    ignore = None if groups is None else torch.tensor(groups)
    options = {"reduction": "none", "ignore": ignore}
    lists = q.tolist(), k.tolist()
    paper = with_hard_negatives(*lists, [], groups, bias.tolist())
    close(functional.info_nce_loss(q, k, TEMPERATURE, key_bias=bias[:7], **options), paper)
    for given in (hard, hard.view(7, 2, 5)):
        ours = functional.info_nce_loss(
            q, k, TEMPERATURE, hard_negatives=given, key_bias=bias, **options
        )
        close(ours, with_hard_negatives(*lists, hard.tolist(), groups, bias.tolist()))
    both = functional.info_nce_loss(q, k, TEMPERATURE, None, True, key_bias=bias[:7], **options)
    back = with_hard_negatives(*lists[::-1], [], groups)
    close(both, [(a + b) / 2 for a, b in zip(paper, back, strict=True)])
    biases = {"key_bias": bias[:7], "query_bias": bias[7:14]}
    both = functional.info_nce_loss(q, k, TEMPERATURE, None, True, **biases, **options)
    back = with_hard_negatives(*lists[::-1], [], groups, bias[7:14].tolist())
    close(both, [(a + b) / 2 for a, b in zip(paper, back, strict=True)])


def test_sup_con():
    z = rows(0)
    paper = sup_con(z.tolist(), LABELS)
    labels = torch.tensor(LABELS)
    close(functional.sup_con_loss(z, labels, TEMPERATURE, "none"), paper)
    with_positive = sum(LABELS.count(label) > 1 for label in LABELS)
    close(functional.sup_con_loss(z, labels, TEMPERATURE), sum(paper) / with_positive)
    assert functional.rows_without_positive(labels) == len(LABELS) - with_positive == 2


def test_sup_con_without_false_negatives():
    z, groups = rows(0), [0, 1, 0, 0, 1, 2, 3][: len(LABELS)]
    groups += [4 + i for i in range(len(LABELS) - len(groups))]
    losses = functional.sup_con_loss(
        z, torch.tensor(LABELS), TEMPERATURE, "none", ignore=torch.tensor(groups)
    )
    close(losses, sup_con(z.tolist(), LABELS, groups))
    assert not torch.equal(
        losses, functional.sup_con_loss(z, torch.tensor(LABELS), TEMPERATURE, "none")
    )


def test_sigmoid():
    z1, z2 = rows(0), rows(1)
    ours = functional.sigmoid_contrastive_loss(z1, z2, TEMPERATURE, BIAS, "none")
    close(ours, sigmoid(z1.tolist(), z2.tolist()))


@pytest.mark.parametrize("negative_weight", [1.0, 4.0])
def test_in_batch_cosine(negative_weight):
    z1, z2 = rows(0), rows(1)
    ours = functional.in_batch_cosine_embedding_loss(
        z1, z2, 0.1, "none", negative_weight=negative_weight, ignore=torch.tensor(GROUPS)
    )
    close(ours, in_batch_cosine(z1.tolist(), z2.tolist(), 0.1, GROUPS, negative_weight))


@pytest.mark.parametrize("n", [1, 2, 37])
def test_identical_rows_are_told_apart_by_chance(n):
    z = torch.ones(n, 3)
    loss = functional.nt_xent_loss(z, z, 0.5)
    torch.testing.assert_close(loss, torch.tensor(math.log(2 * n - 1)), rtol=1e-6, atol=1e-7)
