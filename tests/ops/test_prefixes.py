"""Losses summed over prefixes of the embeddings, which share their products on a CPU."""

import pytest
import torch

from cosloss import NTXentLoss, functional, reference
from cosloss.kernels import dispatch, tiles
from cosloss.ops import prefixes
from tests.losses import inputs, leaves

LABELS = torch.arange(400) // 3
GROUPS = torch.arange(400) % 30
# loss(functional or reference, z1, z2, temperature, the options of prefixes)
LOSSES = {
    "nt_xent": lambda m, a, b, t, **k: m.nt_xent_loss(a, b, t, **k),
    "each": lambda m, a, b, t, **k: m.nt_xent_loss(
        a, b, t, "none", ignore=GROUPS[: len(a)], weight=GROUPS[: len(a)] + 0.5, **k
    ),
    "info_nce": lambda m, a, b, t, **k: m.info_nce_loss(a, b, t, **k),
    "symmetric": lambda m, a, b, t, **k: m.info_nce_loss(a, b, t, symmetric=True, **k),
    "queue": lambda m, a, b, t, **k: m.info_nce_loss(a, b, t, torch.cat([a, b, a * b]), **k),
    "few queries": lambda m, a, b, t, **k: m.info_nce_loss(
        a[:3], b[:3], t, torch.cat([a, b, a * b]), **k
    ),
    "hard": lambda m, a, b, t, **k: m.info_nce_loss(
        a, b, t, hard_negatives=torch.stack([a * b, a + b], 1), **k
    ),
    "sup_con": lambda m, a, b, t, **k: m.sup_con_loss(a + b, LABELS[: len(a)], t, **k),
    "other class": lambda m, a, b, t, **k: m.sup_con_loss(
        a + b, LABELS[: len(a)], t, "none", ignore=GROUPS[: len(a)], **k
    ),
    "sigmoid": lambda m, a, b, t, **k: m.sigmoid_contrastive_loss(a, b, t, 0.3 - 2 * t, **k),
}


def gradients(loss, module, tensors, **options):
    value = loss(module, *tensors, **options)
    weight = torch.linspace(0.37, 1.4, value.numel(), dtype=value.dtype).view_as(value)
    return value, *torch.autograd.grad(value, tensors, weight)


@pytest.fixture(params=["eager", "native"])
def kernels(request):
    """A backend that shares prefixes, its dtype, and how exact that is relative to the largest."""
    with dispatch.use(request.param):
        yield (torch.float64, 1e-12) if request.param == "eager" else (torch.float32, 1e-5)


@pytest.fixture
def shared(monkeypatch):
    """No prefix has a loss of its own."""

    def refuse(*given):
        raise AssertionError("a prefix by itself")

    monkeypatch.setattr(prefixes, "in_batch", refuse)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("temperature", [0.3, 0.01], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("name", LOSSES)
def test_tiles_of_several_prefixes_are_the_twins(
    kernels, name, temperature, kept, shared, monkeypatch
):
    dtype, rounding = kernels
    if not kept:
        monkeypatch.setattr(tiles, "KEPT_BYTES", 0)
    monkeypatch.setattr(tiles, "LARGEST_SIDE", 64)  # several tiles, of unlike size
    monkeypatch.setattr(tiles, "BAND", 1 << 13)
    given = inputs(301, 83, dtype, temperature)
    options = {"dims": (64, 7, 83, 39), "dim_weights": (0.7, 2.0, 0.4, 1.0)}  # no multiples of 32
    found = gradients(LOSSES[name], functional, [x.requires_grad_() for x in given], **options)
    twins = [x.detach().double().requires_grad_() for x in given]
    exact = gradients(LOSSES[name], reference, twins, **options)
    for ours, twin in zip(found, exact, strict=True):
        assert (ours - twin).abs().max() <= rounding / temperature * twin.abs().max()


def test_one_product_serves_all_prefixes(shared, monkeypatch):
    columns = []
    product = torch.mm

    def counted(a, b, **options):
        columns.append(a.shape[1])
        return product(a, b, **options)

    monkeypatch.setattr(torch, "mm", counted)
    with dispatch.use("eager"):
        z1, z2, temperature = leaves(40, 24)
        functional.nt_xent_loss(z1, z2, temperature, dims=(4, 8, 16, 24)).backward()
    assert columns == [4, 4, 8, 8]


@pytest.mark.parametrize("gone", [0.0, 1e-30, 1e-9], ids=["zero", "tiny", "small"])
def test_a_prefix_that_is_nothing_beside_the_rest_has_its_gradient(kernels, gone):
    dtype, rounding = kernels
    z1, z2, temperature = inputs(11, 6, torch.float64)
    z1[3, :2] *= gone
    z2[5] = 0
    given = [x.to(dtype).requires_grad_() for x in (z1, z2, temperature)]
    found = gradients(LOSSES["nt_xent"], functional, given, dims=(2, 4, 6))
    twins = [x.detach().double().requires_grad_() for x in given]
    exact = gradients(LOSSES["nt_xent"], reference, twins, dims=(2, 4, 6))
    for ours, twin in zip(found, exact, strict=True):
        scale = twin.abs()
        if twin.ndim == 2:  # the gradient on a small prefix is large
            scale = scale.amax(1, keepdim=True)
        assert ((ours - twin).abs() <= 10 * rounding * scale).all()


def test_a_prefix_of_one_column_has_no_gradient_and_leaves_no_rounding(kernels):
    dtype, _ = kernels
    z1, z2, temperature = inputs(11, 6, torch.float64)
    z1[:, 0] *= 1e-6  # whose rounding would be large
    given = [x.to(dtype).requires_grad_() for x in (z1, z2, temperature)]
    found = gradients(LOSSES["nt_xent"], functional, given, dims=(1, 6))
    alone = gradients(LOSSES["nt_xent"], functional, given)
    torch.testing.assert_close(found[1:3], alone[1:3], rtol=0, atol=0)


def test_columns_beyond_the_longest_prefix_have_no_gradient(kernels):
    dtype, _ = kernels
    z1, z2, temperature = leaves(7, 9, dtype)
    functional.info_nce_loss(z1, z2, temperature, dims=(3, 5)).backward()
    assert z1.grad[:, :5].all()
    assert not z1.grad[:, 5:].any()


def test_bfloat16_products_under_autocast():
    z1, z2, _ = inputs(300, 100, torch.float32)
    options = {"dims": (32, 50, 100), "dim_weights": (1.0, 2.0, 0.5)}
    z1.requires_grad_()
    with torch.autocast("cpu"):
        found = functional.nt_xent_loss(z1, z2, 0.2, **options)
        found.backward()
    twin = z1.detach().double().requires_grad_()
    exact = reference.nt_xent_loss(twin, z2.double(), 0.2, **options)
    exact.backward()
    assert found.dtype == torch.float32
    assert abs(found - exact) < 2e-3 * exact
    assert (z1.grad - twin.grad).norm() < 0.01 * twin.grad.norm()


def test_a_module_shows_its_prefixes_and_its_twin_has_them():
    loss = NTXentLoss(0.2, dims=[3, 5], dim_weights=[1, 0.5])
    assert repr(loss).endswith("dims=(3, 5), dim_weights=(1, 0.5))")
    z1, z2, _ = inputs(7, 5)
    whole = functional.nt_xent_loss(z1, z2, 0.2)
    short = functional.nt_xent_loss(z1[:, :3], z2[:, :3], 0.2)
    torch.testing.assert_close(loss(z1, z2), short + 0.5 * whole)
    torch.testing.assert_close(loss.reference()(z1, z2), short + 0.5 * whole)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dims": 4}, TypeError, "dims must be a list of whole numbers; got"),
        ({"dims": (2, 2.5)}, TypeError, "dims must hold whole numbers; got"),
        ({"dims": (2, True)}, TypeError, "dims must be a whole number; got True"),
        ({"dims": (2, 0)}, ValueError, "each of dims must be at least 1; got 0"),
        ({"dims": ()}, ValueError, "dims must hold different numbers, at least one; got []"),
        ({"dims": (2, 3, 2)}, ValueError, "different numbers, at least one; got [2, 3, 2]"),
        ({"dim_weights": (1.0,)}, ValueError, "dim_weights are those of dims; got"),
        ({"dims": (2, 3), "dim_weights": (1.0,)}, ValueError, "for each of dims, 2; got 1"),
        ({"dims": (2,), "dim_weights": ("1",)}, TypeError, "dim_weights must hold numbers; got"),
        ({"dims": (2,), "dim_weights": (float("nan"),)}, ValueError, "must be finite"),
    ],
)
def test_mistakes(options, error, text):
    for call in (
        lambda: functional.nt_xent_loss(*inputs(), **options),
        lambda: NTXentLoss(0.5, **options),
    ):
        with pytest.raises(error) as raised:
            call()
        assert text in str(raised.value)


def test_more_columns_than_there_are():
    with pytest.raises(ValueError, match="dims must be at most the embeddings' 3 columns; got 5"):
        functional.info_nce_loss(*inputs(), dims=(2, 5))
