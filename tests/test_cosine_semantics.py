"""Cosine similarity and its losses at singular points and extreme scales, and on bad input."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.gradcheck import GradcheckError

import cosloss
from cosloss import functional

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rows(count: int, columns: int, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_row_has_similarity_and_gradient_zero(dtype):
    x, y = rows(3, 8, dtype=dtype), rows(3, 8, 1, dtype)
    x[1] = 0
    x.requires_grad_()
    y.requires_grad_()
    for s in (functional.cosine_similarity(x, y), functional.pairwise_cosine_similarity(x, y)):
        grads = torch.autograd.grad(s.sum(), (x, y))
        assert s.dtype == dtype
        assert (s[1] == 0).all()
        assert (grads[0][1] == 0).all()
        assert all(g.isfinite().all() and g[0].any() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 128, 1000])
def test_similarity_is_at_most_one_and_of_a_row_with_itself_exactly_one(dtype, columns):
    x = rows(500, columns, dtype=dtype)
    x = x[(x != 0).any(1)]
    assert (functional.cosine_similarity(x, x.clone()) == 1).all()
    assert (functional.cosine_similarity(x, -x) == -1).all()
    near = x + x * torch.finfo(dtype).eps * rows(len(x), columns, 2, dtype)
    assert functional.cosine_similarity(x, near).acos().isfinite().all()
    own = functional.pairwise_cosine_similarity(x)
    assert (own.diagonal() == 1).all()
    assert torch.equal(own, own.mT)
    assert functional.pairwise_cosine_similarity(x, near).acos().isfinite().all()


def test_nan_and_infinity_stay_in_their_row():
    x, y = rows(6, 8), rows(6, 8, 1)
    expected = functional.cosine_similarity(x, y)
    for bad in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[2, 3] = bad
        broken.requires_grad_()
        s = functional.cosine_similarity(broken, y)
        (g,) = torch.autograd.grad(s.sum(), broken)
        others = torch.tensor([0, 1, 3, 4, 5])
        assert s[2].isnan()
        torch.testing.assert_close(s[others], expected[others])
        assert g[others].isfinite().all()


@pytest.mark.parametrize("norms", [(0.3, 0.3), (0.3, 2.0), (2.0, 0.3), (1.5, 2.0)], ids=str)
def test_the_gradient_is_the_derivative_of_the_clamped_function(norms):
    x, y = (
        torch.nn.functional.normalize(rows(4, 5, seed, torch.float64)) * norm
        for seed, norm in enumerate(norms)
    )
    inputs = (x.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: functional.cosine_similarity(a, b, 1, 0.5), inputs)


def test_torchs_gradient_below_eps_is_not():
    x = (0.3 * torch.nn.functional.normalize(rows(4, 5, 0, torch.float64))).requires_grad_()
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(
            lambda x: torch.nn.functional.cosine_similarity(x, 0.9 * x, 1, 0.5), (x,)
        )


@pytest.mark.parametrize("angle", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5])
@pytest.mark.parametrize("columns", [2, 128, 2048])
def test_one_minus_similarity_keeps_its_relative_accuracy(angle, columns):
    x = rows(50, columns)
    turned = rows(50, columns, 1, torch.float64)
    unit = torch.nn.functional.normalize(x.double())
    across = torch.nn.functional.normalize(turned - (turned * unit).sum(1, keepdim=True) * unit)
    y = (math.cos(angle) * unit + math.sin(angle) * across).float()
    ones = torch.ones(50)
    ours = functional.cosine_embedding_loss(x, y, ones, reduction="none")
    u, v = (torch.nn.functional.normalize(t.double()) for t in (x, y))
    exact = (u - v).square().sum(1) / 2
    assert ((ours - exact) / exact).abs().max() < 2e-6


def exact_similarity_and_gradient(x, y, eps):
    """By mpmath, in 60 digits."""
    with mpmath.workdps(60):
        a, b = ([mpmath.mpf(float(v)) for v in t.double()] for t in (x, y))
        length = [mpmath.sqrt(mpmath.fsum(v * v for v in t)) for t in (a, b)]
        n, m = (max(value, mpmath.mpf(eps)) for value in length)
        s = mpmath.fsum(p * q for p, q in zip(a, b, strict=True)) / (n * m)
        inner = s if length[0] > eps else 0
        gradient = [(q / m - inner * p / n) / n for p, q in zip(a, b, strict=True)]
        return s, gradient, 1 / n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mpmath_sweep_over_norm_and_angle(dtype, capsys):
    limits = torch.finfo(dtype)
    exponents = torch.linspace(
        math.log10(limits.smallest_normal * limits.eps) + 3, math.log10(limits.max) - 1, 7
    )
    angles = (1e-4, 1e-2, 0.3, 1.5, 2.8, 3.1, math.pi)
    a, b = rows(2, 7, 3, torch.float64)
    a, b = a / a.norm(), b - (a @ b) / (a @ a) * a
    b = b / b.norm()
    worst_value = worst_gradient = 0.0
    for eps in (0.0, 1e-8):
        for first in exponents.tolist():
            for second in exponents.tolist():
                x = torch.stack([a * 10**first] * len(angles)).to(dtype).requires_grad_()
                y = torch.stack(
                    [(math.cos(t) * a + math.sin(t) * b) * 10**second for t in angles]
                ).to(dtype)
                s = functional.cosine_similarity(x, y, eps=eps)
                (g,) = torch.autograd.grad(s, x, torch.full_like(s, 0.37))
                for i in range(len(angles)):
                    value, gradient, size = exact_similarity_and_gradient(x[i], y[i], eps)
                    worst_value = max(worst_value, abs(float(value - float(s[i]))))
                    if float(size) > limits.max / 4:  # the true gradient overflows
                        continue
                    half_unit = limits.smallest_normal * limits.eps  # of a subnormal gradient
                    for ours, true in zip(g[i].tolist(), gradient, strict=True):
                        error = max(0.0, float(abs(ours - mpmath.mpf(0.37) * true)) - half_unit)
                        worst_gradient = max(worst_gradient, error / float(0.37 * size))
    with capsys.disabled():
        print(
            f"\n{dtype}: worst value {worst_value:.2g}, worst gradient {worst_gradient:.2g}", end=""
        )
    # float64 has nothing wider to be computed in: norms, products and quotient each round
    assert worst_value <= (2 if dtype == torch.float64 else 1) * limits.eps
    assert worst_gradient <= (1e-6 if dtype == torch.float32 else 8 * limits.eps)


finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)
vectors = st.lists(st.tuples(finite, finite), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(vectors, st.integers(-60, 60), st.integers(-60, 60))
def test_properties(entries, exponent1, exponent2):
    x, y = (torch.tensor(v, dtype=torch.float32)[None] for v in zip(*entries, strict=True))
    s = functional.cosine_similarity(x, y, eps=0.0)
    assert s.abs() <= 1
    assert torch.equal(s, functional.cosine_similarity(y, x, eps=0.0))
    scaled = functional.cosine_similarity(x * 2.0**exponent1, y * 2.0**exponent2, eps=0.0)
    if ((x * 2.0**exponent1) * 2.0**-exponent1 == x).all() and (
        (y * 2.0**exponent2) * 2.0**-exponent2 == y
    ).all():
        torch.testing.assert_close(s, scaled, rtol=0, atol=2.4e-7)
    x.requires_grad_()
    (g,) = torch.autograd.grad(functional.cosine_similarity(x, y, eps=0.0), x)
    norm = x.double().norm()
    if norm > 1e-30:
        assert (g.double() * x.double()).sum().abs() <= 1e-6  # a row's scale changes nothing


def test_rows_are_isolated():
    x, y = rows(9, 16).requires_grad_(), rows(9, 16, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: functional.cosine_similarity(x, y), x)
    for i in range(9):
        for j in range(9):
            assert jacobian[i, j].any() == (i == j)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: cosloss.cosine_similarity(x, x, eps=-1.0), RuntimeError, "non-negative"),
        (lambda x: cosloss.cosine_similarity(x, x[:, :2]), RuntimeError, "must match"),
        (lambda x: cosloss.cosine_similarity(x, x, dim=2), IndexError, "out of range"),
        (lambda x: cosloss.cosine_similarity(x.int(), x.int()), RuntimeError, "floating"),
        (lambda x: cosloss.cosine_similarity(x.cfloat(), x), RuntimeError, "floating"),
        (lambda x: cosloss.cosine_similarity([1.0], x), TypeError, "Tensor"),
        (lambda x: cosloss.pairwise_cosine_similarity(x[0]), ValueError, "shapes"),
        (lambda x: cosloss.pairwise_cosine_similarity(x, x[:, :2]), ValueError, "shapes"),
        (lambda x: embedding(x.int(), x.int()), TypeError, "floating"),
        (lambda x: embedding(x.cfloat(), x), TypeError, "floating"),
        (lambda x: embedding(x, x[:, :2]), RuntimeError, "must match"),
        (lambda x: embedding(x, x, torch.ones(3)), RuntimeError, "broadcast"),
        (lambda x: embedding(x, x, torch.ones(4, 1)), RuntimeError, "broadcast"),
        (lambda x: embedding(x, x, weight=torch.ones(4, 1)), RuntimeError, "broadcast"),
        (lambda x: embedding(x, x, reduction="x"), ValueError, "reduction"),
        (lambda x: embedding(x, x, margin=2.0), ValueError, "margin"),
        (lambda x: embedding(x[:0], x[:0], torch.ones(0)), ValueError, "empty"),
        (lambda x: embedding(x, x, torch.tensor([1, 0, 1, 1])), ValueError, "1 or -1; got 0"),
        (lambda x: embedding(x, x, torch.tensor(0.5)), ValueError, r"1 or -1; got 0\.5"),
        (lambda x: embedding(x, x, torch.tensor(False)), ValueError, r"got 0\.0"),
        (
            lambda x: embedding(x, x, torch.tensor(255, dtype=torch.uint8)),
            ValueError,
            r"got 255\.0",
        ),
        (lambda x: embedding(x, x, torch.tensor(math.nan)), ValueError, "got nan"),
        (lambda x: cosloss.cosine_embedding_loss(x, x, weight=torch.ones(4)), ValueError, "target"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(rows(4, 3))


def embedding(x1, x2, target=None, **keywords):
    target = torch.ones(4) if target is None else target
    return cosloss.cosine_embedding_loss(x1, x2, target, **keywords)


def test_empty_and_scalar_shapes_are_torchs():
    torch_function = torch.nn.functional.cosine_similarity
    for x, y, dim in (
        (rows(3, 0), rows(3, 0), 1),
        (rows(0, 3), rows(0, 3), 1),
        (rows(1, 1)[0, 0], rows(1, 1)[0, 0], 0),
        (rows(1, 1)[0, 0], rows(1, 3)[0], 0),
        (rows(4, 3), rows(1, 3)[0], 1),
        (rows(4, 3)[:, None], rows(5, 3), -1),
        (rows(4, 3).double(), rows(4, 3), 0),
        (rows(4, 3).half(), rows(4, 3).bfloat16(), 0),
        (rows(4, 3).int(), rows(4, 3), 1),
    ):
        ours, theirs = cosloss.cosine_similarity(x, y, dim), torch_function(x, y, dim)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        exact = torch_function(x.double(), y.double(), dim)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    empty = torch.ones(0)
    assert embedding(rows(0, 3), rows(0, 3), empty, reduction="none").shape == (0,)
    assert embedding(rows(0, 3), rows(0, 3), empty, reduction="sum") == 0


def test_weights_three_dimensions_and_broadcast_pairs():
    x, y = rows(6, 4).view(2, 3, 4), rows(3, 4, 1)
    target = torch.tensor([1, -1, 1])
    weight = torch.tensor([[0.5], [2.0]])
    ours = embedding(x, y, target, weight=weight, reduction="none")
    flat = torch.nn.functional.cosine_embedding_loss(
        x.reshape(6, 4), y.repeat(2, 1), target.repeat(2), reduction="none"
    )
    torch.testing.assert_close(ours, flat.view(2, 3) * weight)
    torch.testing.assert_close(embedding(x, y, target, weight=weight), ours.sum() / 6)
