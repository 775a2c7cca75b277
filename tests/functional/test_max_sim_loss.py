"""MaxSim and its loss against the paper as loops, their options, and answers to mistakes."""

import math
import warnings

import pytest
import torch

from cosloss import MaxSimLoss, functional, reference
from tests.functional.test_in_batch_papers import close, cosine

TEMPERATURE = 0.4
GROUPS = [0, 1, 0, 2]


def tokens(n, count, seed, columns=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, count, columns, dtype=torch.float64, generator=generator)


def lengths(n, count):
    """One token of the first item counts, two of the second, and so on."""
    return torch.arange(count) <= torch.arange(n)[:, None] % count


QUERY, DOCUMENT = tokens(4, 3, 0), tokens(6, 7, 1)
MASKS = lengths(4, 3), lengths(6, 7)


def colbert(query, document):
    """Equation 3, of lists of tokens."""
    return sum(max(cosine(q, d) for d in document) for q in query)


def own_among(scores, groups=None):
    """The cross entropy of item i among those with scores[i]; of its group, only itself."""
    losses = []
    for i, row in enumerate(scores):
        terms = []
        for j, score in enumerate(row):
            other = groups is None or j >= len(groups) or groups[i] != groups[j] or i == j
            terms.append(math.exp(score / TEMPERATURE) if other else 0.0)
        losses.append(-math.log(terms[i] / sum(terms)))
    return losses


def scores(masked):
    query, document = QUERY.tolist(), DOCUMENT.tolist()
    if masked:
        query, document = (
            [[x for x, counts in zip(item, mask, strict=True) if counts] for item, mask in pairs]
            for pairs in (zip(query, MASKS[0], strict=True), zip(document, MASKS[1], strict=True))
        )
    return [[colbert(q, d) for d in document] for q in query]


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_scores(masked):
    masks = MASKS if masked else ()
    close(functional.max_sim(QUERY, DOCUMENT, *masks), scores(masked))


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_loss(masked, symmetric, groups):
    paper = own_among(scores(masked), groups)
    if symmetric:  # of the queries' own documents, without the hard negatives
        back = own_among(
            [list(column)[:4] for column in zip(*scores(masked), strict=True)][:4], groups
        )
        paper = [(a + b) / 2 for a, b in zip(paper, back, strict=True)]
    masks = MASKS if masked else (None, None)
    options = {"symmetric": symmetric, "ignore": None if groups is None else torch.tensor(groups)}
    given = QUERY, DOCUMENT, *masks, TEMPERATURE
    each = functional.max_sim_loss(*given, "none", **options)
    close(each, paper)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0])
    total = functional.max_sim_loss(*given, "sum", weight=weight, **options)
    torch.testing.assert_close(total, (weight * each).sum())
    torch.testing.assert_close(functional.max_sim_loss(*given, **options), each.mean())


def test_one_token_each_is_info_nce():
    query, document = QUERY[:, 0], DOCUMENT[:, 0]
    ours = functional.max_sim_loss(QUERY[:, :1], DOCUMENT[:, :1], temperature=0.1)
    options = {"temperature": 0.1, "hard_negatives": document[4:]}
    torch.testing.assert_close(ours, functional.info_nce_loss(query, document[:4], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scores_are_added_up_wide_and_the_loss_has_the_tokens_dtype(dtype):
    query, document = tokens(4, 64, 0).to(dtype), tokens(4, 40, 1).to(dtype)
    exact = functional.max_sim(query.double(), document.double())
    found = functional.max_sim(query, document)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    assert functional.max_sim_loss(query, document).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.max_sim_loss(query, document).dtype == torch.float32


def test_a_small_loss_keeps_its_digits():
    """Where one minus the cross entropy's probability is below the dtype's rounding."""
    query = torch.eye(2, dtype=torch.float64)[:, None]
    loss = functional.max_sim_loss(query, query, temperature=0.01)
    assert float(loss) == pytest.approx(math.exp(-100), rel=1e-9, abs=0)


def test_a_module_learns_the_temperature():
    module = MaxSimLoss(2.0, "sum", symmetric=True, learnable_temperature=True, dtype=torch.float64)
    assert repr(module) == (
        "MaxSimLoss(temperature=2, reduction='sum', symmetric=True, learnable_temperature=True)"
    )
    given = QUERY, DOCUMENT, *MASKS
    ours, twin = module(*given), module.reference()(*given)
    torch.testing.assert_close(ours, twin)
    (found,), (expected,) = (torch.autograd.grad(x, [module.log_temperature]) for x in (ours, twin))
    torch.testing.assert_close(found, expected)
    assert MaxSimLoss().temperature == 1.0


def test_an_empty_document_is_a_document_of_score_0():
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2] = mask[5] = False
    inputs = [QUERY.clone().requires_grad_(), DOCUMENT.clone().requires_grad_()]
    values = [m.max_sim_loss(*inputs, None, mask) for m in (functional, reference)]
    torch.testing.assert_close(*values)
    ours, twin = (torch.autograd.grad(value, inputs) for value in values)
    torch.testing.assert_close(ours, twin)
    assert not ours[1][[2, 5]].any()


def test_a_batch_without_negatives_is_warned_of():
    with pytest.warns(UserWarning, match="batch of one item"):
        assert functional.max_sim_loss(QUERY[:1], DOCUMENT[:1]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional.max_sim_loss(QUERY[:1], DOCUMENT[:2]) > 0


Q, D = torch.ones(3, 2, 4), torch.ones(5, 6, 4)
ALL = torch.ones(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            (Q[0], D),
            ValueError,
            r"shapes \(B, Q, D\) and \(C, T, D\); got \(2, 4\) and \(5, 6, 4\)",
        ),
        ((Q, D[..., :3]), ValueError, r"got \(3, 2, 4\) and \(5, 6, 3\)"),
        ((Q[:0], D), ValueError, r"at least one token each; got shapes \(0, 2, 4\)"),
        ((Q, D[:, :0]), ValueError, r"at least one token each; got .* \(5, 0, 4\)"),
        ((Q[..., :0], D[..., :0]), ValueError, r"query_tokens .* at least one column; got"),
        ((Q.long(), D), TypeError, r"query_tokens .* real floating-point .*query_tokens.float\(\)"),
        ((Q, D.cfloat()), TypeError, "document_tokens must have a real floating-point dtype"),
        ((Q, D.to("meta")), ValueError, r"on one device; got cpu and meta: use document_tokens.to"),
        ((Q, D, ALL.float()), TypeError, r"query_mask must be boolean.*use query_mask.bool\(\)"),
        ((Q, D, ALL[:2]), ValueError, r"query_mask .* shape \(3, 2\); got \(2, 2\)"),
        ((Q, D, None, ALL), ValueError, r"document_mask .* shape \(5, 6\); got \(3, 2\)"),
        ((Q, D, ALL.to("meta")), ValueError, "tokens and query_mask must be on one device"),
        ((Q, D, [True]), TypeError, "query_mask must be a Tensor; got a list of length 1"),
    ],
)
def test_a_mistake_is_named(given, error, message):
    for function in (functional.max_sim, functional.max_sim_loss):
        with pytest.raises(error, match=message):
            function(*given)


def test_fewer_documents_than_queries():
    with pytest.raises(ValueError, match=r"document_tokens .* C >= 5.*; got \(3, 2, 4\)"):
        functional.max_sim_loss(D, Q)
    with pytest.raises(ValueError, match=r"as many hard negatives for each of 3 queries.*; got 2"):
        functional.max_sim_loss(Q, D, gather_distributed=True)
    assert functional.max_sim(D, Q).shape == (5, 3)
