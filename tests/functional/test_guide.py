"""InfoNCE whose false negatives another model's embeddings name: twin, limits, errors."""

import pytest
import torch

from cosloss import InfoNCELoss, functional, reference
from cosloss.kernels import dispatch

DIRECTIONS = ("query_to_key", "key_to_query", "query_to_query", "key_to_key")
N, WIDTH = 9, 4


def randn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def pair(dtype=torch.float64):
    query = randn(N, 6, seed=0)
    return [x.to(dtype).requires_grad_() for x in (query, 0.4 * query + randn(N, 6, seed=1))]


def guides():
    query = randn(N, WIDTH, seed=2)
    return query, 0.5 * query + randn(N, WIDTH, seed=3)


OWN = {"hard_negatives": randn(N, 2, 6, seed=4), "guide": (*guides(), randn(N, 2, WIDTH, seed=5))}
SHARED = {"hard_negatives": randn(5, 6, seed=4), "guide": (*guides(), randn(5, WIDTH, seed=5))}
FORMS = {
    "keys": {"guide": guides()},
    "directions": {"guide": guides(), "directions": DIRECTIONS},
    "symmetric": {"guide": guides(), "symmetric": True},
    "own hard": OWN | {"directions": DIRECTIONS},
    "own hard, weighted": OWN | {"directions": DIRECTIONS, "hardness": 1.5},
    "shared hard": SHARED | {"symmetric": True},
    "shared hard, weighted": SHARED | {"hardness": 1.5, "hardness_on": "hard"},
    "queue": {"negatives": SHARED["hard_negatives"], "guide": SHARED["guide"]},
    "prefixes": OWN | {"dims": (3, 6)},
    "groups": {"guide": guides(), "ignore": torch.arange(N) % 4, "weight": torch.arange(N) / 3},
}


@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_the_twins(form, margin):
    query, key = pair()
    options = FORMS[form] | {"false_negative_margin": margin, "reduction": "none"}

    def derivatives(module):
        loss = module.info_nce_loss(query, key, 0.2, **options)
        weight = torch.linspace(0.4, 1.3, N, dtype=loss.dtype)
        first = torch.autograd.grad(loss, (query, key), weight, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (query, key))
        return loss, first, second

    ours = derivatives(functional)
    torch.testing.assert_close(ours, derivatives(reference))
    del options["guide"]
    unguided = functional.info_nce_loss(query, key, 0.2, **options)
    assert not torch.allclose(ours[0], unguided, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_narrow_embeddings_with_the_same_guide(backend, dtype):
    query, key = pair(dtype)
    options = {"guide": guides(), "directions": DIRECTIONS, "false_negative_margin": 0.1}
    with dispatch.use(backend):
        loss = functional.info_nce_loss(query, key, 0.2, **options)
        found = torch.autograd.grad(loss, (query, key))
    wide = [x.detach().double().requires_grad_() for x in (query, key)]
    exact = torch.autograd.grad(reference.info_nce_loss(*wide, 0.2, **options), wide)
    for own, true in zip(found, exact, strict=True):
        assert (own - true).abs().max() <= 8 * torch.finfo(dtype).eps * true.abs().max()


def test_a_guide_of_any_dtype_whose_rows_need_not_be_unit():
    query, key = pair()
    of_query, of_key = guides()
    options = {"false_negative_margin": 0.1, "reduction": "none"}
    plain = functional.info_nce_loss(query, key, 0.2, guide=(of_query, of_key), **options)
    scaled = (3e4 * of_query).float(), (of_key / 7).float().requires_grad_()
    loss = functional.info_nce_loss(query, key, 0.2, guide=scaled, **options)
    torch.testing.assert_close(loss, plain)
    loss.sum().backward()
    assert scaled[1].grad is None
    assert query.grad.abs().sum() > 0


def test_a_guide_that_finds_every_negative_false_leaves_loss_0():
    query, key = pair()
    alike = torch.ones(N, WIDTH)
    loss = functional.info_nce_loss(
        query, key, 0.2, guide=(alike, alike), false_negative_margin=0.1, directions=DIRECTIONS
    )
    # each direction with keys has its own pair
    torch.testing.assert_close(loss, torch.tensor(2.0).log().double())
    grads = torch.autograd.grad(loss, (query, key))
    assert all((x == 0).all() for x in grads)


def test_a_nan_in_the_guide_makes_its_pairs_loss_nan():
    query, key = pair()
    of_query, of_key = guides()
    of_key[3, 1] = torch.nan
    for module in (functional, reference):
        loss = module.info_nce_loss(
            query,
            key,
            0.2,
            reduction="none",
            directions=DIRECTIONS,
            guide=(of_query, of_key),
            false_negative_margin=0.1,
        )
        assert loss.isnan().nonzero()[:, 0].tolist() == [3]


def test_the_module_takes_it_and_its_gradient_is_right():
    module = InfoNCELoss(0.2, directions=DIRECTIONS, false_negative_margin=0.1)
    query, key = pair()
    value = module(query, key, guide=guides())
    expected = reference.info_nce_loss(
        query, key, 0.2, directions=DIRECTIONS, false_negative_margin=0.1, guide=guides()
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(module.reference()(query, key, guide=guides()), expected)
    assert torch.autograd.gradcheck(lambda q, k: module(q, k, guide=guides()), (query, key))


HARD = randn(N, 2, 6, seed=4)
QUERY, KEY = guides()


@pytest.mark.parametrize(
    ("error", "says", "options"),
    [
        (ValueError, "it needs false_negative_margin", {"guide": (QUERY, KEY)}),
        (TypeError, "a tuple of tensors; got a torch.float64", {"guide": QUERY}),
        (TypeError, "a tuple of tensors; got 'model'", {"guide": "model"}),
        (TypeError, "guide's key must be a Tensor", {"guide": (QUERY, None)}),
        (TypeError, "guide's query must have a real floating", {"guide": (QUERY.long(), KEY)}),
        (ValueError, "guide must have 2 tensors here, of query, key; got 1", {"guide": [QUERY]}),
        (
            ValueError,
            "guide must have 3 tensors here, of query, key, negatives; got 2",
            {"guide": (QUERY, KEY), "hard_negatives": HARD},
        ),
        (ValueError, r"guide's query must have shape \(9, G\)", {"guide": (QUERY[1:], KEY)}),
        (ValueError, r"guide's key must have shape \(9, 4\)", {"guide": (QUERY, KEY[:, 1:])}),
        (
            ValueError,
            r"guide's negatives must have shape \(9, 2, 4\); got \(9, 4\)",
            {"guide": (QUERY, KEY, KEY), "hard_negatives": HARD},
        ),
    ],
)
def test_errors(error, says, options):
    margin = {} if "needs" in says else {"false_negative_margin": 0.0}
    with pytest.raises(error, match=says):
        functional.info_nce_loss(*pair(), 0.2, **margin, **options)
