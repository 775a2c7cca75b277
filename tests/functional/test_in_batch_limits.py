"""The in-batch losses at the ends of their ranges: precision, autocast, singular and bad input."""

import pytest
import torch

from cosloss import (
    CosineEmbeddingLoss,
    InfoNCELoss,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
    functional,
    reference,
)
from cosloss.kernels import dispatch

LOSSES = {
    "nt_xent": lambda m, a, b, t: m.nt_xent_loss(a, b, t),
    "decoupled": lambda m, a, b, t: m.nt_xent_loss(a, b, t, decoupled=True),
    "info_nce": lambda m, a, b, t: m.info_nce_loss(a, b, t),
    "symmetric": lambda m, a, b, t: m.info_nce_loss(a, b, t, symmetric=True),
    "sup_con": lambda m, a, b, t: m.sup_con_loss(a + b, torch.arange(len(a)) % 7, t),
    "sigmoid": lambda m, a, b, t: m.sigmoid_contrastive_loss(a, b, t, -1.0),
    "max_sim": lambda m, a, b, t: m.max_sim_loss(
        torch.stack([a, a.roll(1, 1)], 1), torch.stack([b, b.flip(1)], 1), temperature=t
    ),
    "in_batch_cosine": lambda m, a, b, t: m.in_batch_cosine_embedding_loss(a, b, 0.1) * t,
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def views(rows, columns, scale=1.0):
    generator = torch.Generator().manual_seed(rows)
    z1, z2 = torch.randn(2, rows, columns, generator=generator)
    return z1 * scale, (0.7 * z1 + z2) * scale


def value_and_gradients(loss, module, tensors, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    value = loss(module, *leaves)
    grads = torch.autograd.grad(0.37 * value, leaves)
    return [value.detach().double(), *(grad.double() for grad in grads)]


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.024, 0.026, 0.07, 0.5, 100.0])
@pytest.mark.parametrize("shape", [(3, 1), (50, 33), (300, 129)], ids=str)
def test_errs_no_more_than_the_twin_does(loss, shape, temperature):
    tensors = [*views(*shape), torch.tensor(temperature)]
    exact = value_and_gradients(loss, reference, tensors, torch.float64)
    twin = value_and_gradients(loss, reference, tensors, torch.float32)
    ours = value_and_gradients(loss, functional, tensors, torch.float32)
    limits = torch.finfo(torch.float32)
    # the temperature's gradient sums terms of this size, which may cancel; the others' do not
    floors = (limits.tiny, limits.tiny, limits.tiny, limits.eps * 0.37 / temperature**2)
    for one, other, true, floor in zip(ours, twin, exact, floors, strict=True):
        # the twin's own error, which may be small by luck, and what the rounding of one logit does:
        # its size is up to 1 / temperature, and its weight exp(logit)
        rounding = 1e-6 + limits.eps / temperature
        budget = 3 * (other - true).abs().max() + rounding * true.abs().max() + floor
        assert (one - true).abs().max() <= budget


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_batchs_scale_does_not_matter(loss, scale):
    temperature = torch.tensor(0.2)
    plain = value_and_gradients(loss, functional, [*views(20, 9), temperature], torch.float32)
    scaled = value_and_gradients(
        loss, functional, [*views(20, 9, scale), temperature], torch.float32
    )
    for one, other, factor in zip(plain, scaled, (1, scale, scale, 1), strict=True):
        torch.testing.assert_close(one, other * factor, rtol=2e-4, atol=2e-6)


def test_a_zero_row_has_no_gradient_and_leaves_the_others_theirs(loss):
    z1, z2 = (x.double() for x in views(6, 5))
    z1[2] = z2[4] = 0
    tensors = [z1, z2, torch.tensor(0.3)]
    _, grad1, grad2, _ = value_and_gradients(loss, functional, tensors, torch.float64)
    _, twin1, twin2, _ = value_and_gradients(loss, reference, tensors, torch.float64)
    torch.testing.assert_close([grad1, grad2], [twin1, twin2], rtol=1e-10, atol=1e-12)
    if loss is not LOSSES["sup_con"]:  # which sums the views
        assert not grad1[2].any()
        assert not grad2[4].any()


def test_bfloat16_autocast_keeps_the_twins_budget(loss):
    tensors = [*views(300, 64), torch.tensor(0.1)]
    exact = value_and_gradients(loss, reference, tensors, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        twin = value_and_gradients(loss, reference, tensors, torch.float32)
        leaves = [x.requires_grad_() for x in tensors]
        value = loss(functional, *leaves)
    assert value.dtype is torch.float32
    grads = torch.autograd.grad(0.37 * value, leaves)
    for one, other, true in zip((value.detach(), *grads), twin, exact, strict=True):
        budget = 2 * (other - true).abs().max() + 2**-7 * true.abs().max()
        assert (one.double() - true).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_keep_their_dtype(loss, dtype):
    z1, z2 = (x.to(dtype).requires_grad_() for x in views(8, 16))
    value = loss(functional, z1, z2, 0.2)
    assert value.dtype is dtype
    value.backward()
    assert z1.grad.dtype is dtype
    exact = loss(reference, z1.detach().double(), z2.detach().double(), 0.2)
    torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_a_nan_is_not_hidden(loss):
    z1, z2 = views(5, 4)
    z1[1, 2] = torch.nan
    assert loss(functional, z1, z2, 0.2).isnan()


def test_one_pair_has_nothing_to_be_told_from():
    z1, z2 = views(1, 4)
    assert functional.nt_xent_loss(z1, z2) == functional.info_nce_loss(z1, z2) == 0
    assert functional.nt_xent_loss(z1, z2, decoupled=True) == 0
    assert functional.sup_con_loss(z1, torch.tensor([3])) == 0


def test_bad_input_is_named():
    z1, z2 = views(4, 3)
    bad = (
        (lambda: functional.nt_xent_loss(z1, z2[:3]), r"\(4, 3\) and \(3, 3\)"),
        (lambda: functional.info_nce_loss(z1, z2[:, :2]), r"\(4, 3\) and \(4, 2\)"),
        (lambda: functional.info_nce_loss(z1, z2, 0.1, z1[:0]), "K >= 1"),
        (lambda: functional.info_nce_loss(z1, z2, 0.1, z1, True), "leave out negatives"),
        (lambda: functional.nt_xent_loss(z1, z2, -0.1), "must be positive; got -0.1"),
        (lambda: functional.nt_xent_loss(z1, z2, torch.tensor(0.0)), "must be positive; got 0"),
        (lambda: functional.nt_xent_loss(z1, z2, torch.ones(2)), r"0-d tensor; got shape \(2,\)"),
        (
            lambda: functional.sigmoid_contrastive_loss(z1, z2, 0.1, torch.zeros(4)),
            r"bias must be a number or a 0-d tensor; got shape \(4,\)",
        ),
        (lambda: functional.nt_xent_loss(z1[:0], z2[:0]), "empty batch"),
        (lambda: functional.nt_xent_loss(z1, z2, reduction="max"), "none, mean, sum; got 'max'"),
        (lambda: functional.nt_xent_loss(z1, z2, ignore=torch.arange(3)), r"shape \(4,\)"),
        (lambda: functional.nt_xent_loss(z1, z2, weight=torch.ones(8)), r"shape \(4,\)"),
        (
            lambda: functional.sup_con_loss(z1, torch.arange(3)),
            r"labels must .* shape \(4,\); got .* \(3,\)",
        ),
        (
            lambda: functional.sup_con_loss(
                z1, torch.arange(4), ignore=torch.arange(4), gather_distributed=True
            ),
            "takes no ignore",
        ),
        (lambda: functional.in_batch_cosine_embedding_loss(z1, z2, 1.5), r"\[-1, 1\]; got 1.5"),
        (lambda: CosineEmbeddingLoss(negative_weight=0)(z1, z2), "must be positive; got 0"),
        (
            lambda: CosineEmbeddingLoss(negative_weight=2.0)(z1, z2, torch.ones(4)),
            "give each pair's weight",
        ),
        (lambda: NTXentLoss(temperature=0.0), "must be positive; got 0.0"),
    )
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: functional.nt_xent_loss(z1.long(), z2), "floating-point"),
        (
            lambda: functional.info_nce_loss(z1, z2, "0.1"),
            "temperature must be a number .* got '0.1'",
        ),
        (lambda: functional.sigmoid_contrastive_loss(z1, z2, 0.1, None), "bias .* got None"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize(
    "module",
    [
        NTXentLoss(0.2, decoupled=True, learnable_temperature=True),
        InfoNCELoss(0.2, symmetric=True, learnable_temperature=True),
        SigmoidContrastiveLoss(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_learn_the_temperature(module):
    tensors = views(6, 5)
    parameters = list(module.parameters())
    ours, twin = module(*tensors), module.reference()(*tensors)
    torch.testing.assert_close(ours, twin)
    torch.testing.assert_close(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(twin, parameters)
    )


def test_cosine_module_hands_its_weight_on():
    z1, z2 = views(6, 5)
    module = CosineEmbeddingLoss(-0.2, negative_weight=3.0)
    plain = CosineEmbeddingLoss(-0.2)
    torch.testing.assert_close(module(z1, z2), module.reference()(z1, z2))
    assert module(z1, z2) > plain(z1, z2)
    target = torch.tensor([1, -1, 1, -1, 1, -1])
    torch.testing.assert_close(plain(z1, z2, target), plain.reference()(z1, z2, target))
    assert repr(module) == "CosineEmbeddingLoss(margin=-0.2, reduction='mean', negative_weight=3.0)"


@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("spread", [0.3, 0.05, 0.001])
def test_sup_con_on_tight_clusters_errs_no_more_than_the_twin(spread, backend):
    """What pulls a row to its class and what pushes it away all but cancel."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 10
    z = torch.randn(10, 128, generator=generator)[labels]
    z = z + spread * torch.randn(256, 128, generator=generator)

    def gradient(module, dtype):
        leaf = z.to(dtype).requires_grad_()
        return torch.autograd.grad(module.sup_con_loss(leaf, labels), leaf)[0].double()

    exact = gradient(reference, torch.float64)
    with dispatch.use(backend):
        ours = gradient(functional, torch.float32) - exact
    assert ours.norm() <= 1.25 * (gradient(reference, torch.float32) - exact).norm()


@pytest.mark.parametrize(
    "labels", [(torch.arange(60) % 14)[::2], torch.arange(30) / 2 % 3], ids=str
)
@pytest.mark.parametrize("ignore", [None, (torch.arange(60) % 6)[::2]])
def test_labels_strided_or_fractional(labels, ignore):
    z = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = [m.sup_con_loss(z, labels, ignore=ignore) for m in (functional, reference)]
    ours, twin = (torch.autograd.grad(value, z)[0] for value in values)
    torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-6)


def test_sup_con_counts_the_rows_it_leaves_out():
    module = SupConLoss(0.2)
    z, labels = views(5, 3)[0], torch.tensor([0, 0, 1, 2, 2])
    torch.testing.assert_close(module(z, labels), module.reference()(z, labels))
    assert module.rows_without_positive == 1


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_item_with_hard_negatives_is_not_said_to_have_none(symmetric, recwarn):
    query, key, hard = (torch.randn(n, 4) for n in (1, 1, 3))
    options = {"hard_negatives": hard, "symmetric": symmetric}
    assert functional.info_nce_loss(query, key, 0.5, **options) > 0
    assert not [w for w in recwarn.list if "negatives" in str(w.message)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"directions": ("query_to_key", "key_to_key")},
        {"directions": ("query_to_key", "key_to_query", "query_to_query")},
        {"false_negative_margin": -0.1},
        {"hardness": 1.5},
        {"hardness": 1.5, "directions": ("query_to_key", "key_to_key")},
    ],
    ids=str,
)
def test_hard_negatives_and_groups_in_one_softmax(options, per_query, grouped):
    query, key = views(6, 4)
    hard = torch.randn(6, 2, 4, dtype=query.dtype, generator=torch.Generator().manual_seed(2))
    given = {"hard_negatives": hard if per_query else hard.flatten(0, 1)[:5], **options}
    if grouped:
        given["ignore"] = torch.tensor([0, 1, 0, 2, 3, 1])
    tensors = [x.requires_grad_() for x in (query, key)]
    own_or_not = {"hardness", "directions"} & options.keys() and "query_to_query" not in str(
        options
    )
    if grouped and per_query and own_or_not:
        with pytest.raises(ValueError, match="ignore is not taken with hard_negatives of each"):
            functional.info_nce_loss(*tensors, 0.3, **given)
        return

    def derivatives(module):
        value = module.info_nce_loss(*tensors, 0.3, **given)
        first = torch.autograd.grad(value, tensors, create_graph=True)
        return value, first, torch.autograd.grad(sum(x.square().sum() for x in first), tensors)

    torch.testing.assert_close(derivatives(functional), derivatives(reference))
