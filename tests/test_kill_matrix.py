"""Wrong backwards of cosine similarity: the article's check accepts them, the project's do not."""

import pytest
import torch
from torch.autograd import Function, gradcheck
from torch.autograd.gradcheck import GradcheckError

from cosloss import functional
from cosloss.ops.cosine_similarity import CosineSimilarity
from cosloss.testing import OPS, errors

OP = next(op for op in OPS if op.name == "cosine_similarity")
EPS = 3.5  # some of the table's rows are inside this ball, some outside


def parts(x, y, eps):
    n, m = (t.norm(dim=-1, keepdim=True).clamp_min(eps) for t in (x, y))
    u, v = x / n, y / m
    s = (u * v).sum(-1, keepdim=True)
    inner = tuple((t.norm(dim=-1, keepdim=True) > eps) * s for t in (x, y))
    return u, v, n, m, s, inner


def right(g, x, y, eps):
    u, v, n, m, _, (s, t) = parts(x, y, eps)
    return g * (v - s * u) / n, g * (u - t * v) / m


def with_right(change):
    return lambda g, x, y, eps: change(*right(g, x, y, eps))


def one_row(a, b):
    return torch.cat([1.05 * a[..., :1, :], a[..., 1:, :]], -2), b


def one_entry(a, b):
    wrong = a.clone()
    wrong.view(-1)[2] *= 1.05
    return wrong, b


def missing_projection(g, x, y, eps):
    u, v, n, m, _, _ = parts(x, y, eps)
    return g * v / n, g * u / m


def wrong_sign(g, x, y, eps):
    u, v, n, m, _, (s, t) = parts(x, y, eps)
    return g * (v + s * u) / n, g * (u + t * v) / m


def projection_below_eps_too(g, x, y, eps):
    u, v, n, m, s, _ = parts(x, y, eps)
    return g * (v - s * u) / n, g * (u - s * v) / m


def article_sign(g, x, y, eps):
    # the article's rearranged differential: + <y, y~> / |y|^2 has become a minus
    u, v, n, m, _, (s, t) = parts(x, y, eps)
    return g * (v - s * u) / n, g * (u + t * v) / m


WRONG = {
    "swapped": with_right(lambda a, b: (b, a)),
    "zero": with_right(lambda a, b: (0 * a, 0 * b)),
    "doubled": with_right(lambda a, b: (2 * a, 2 * b)),
    "negated": with_right(lambda a, b: (-a, -b)),
    "times a million": with_right(lambda a, b: (1e6 * a, 1e6 * b)),
    "missing projection": missing_projection,
    "wrong sign of the projection": wrong_sign,
    "the article's sign": article_sign,
    "missing grad_output": lambda g, x, y, eps: right(torch.ones_like(g), x, y, eps),
    "projection below eps": projection_below_eps_too,
    "mean instead of sum": lambda g, x, y, eps: right(g / g.numel(), x, y, eps),
    "one row 5% off": with_right(one_row),
    "one entry 5% off": with_right(one_entry),
    "second input's missing": with_right(lambda a, b: (a, 0 * b)),
    "unrelated": lambda g, x, y, eps: (123 * g * (x - y), 123 * g * (y - x)),
}


def similarity_with(backward_formula):
    class Planted(Function):
        @staticmethod
        def forward(ctx, x, y, eps):
            ctx.save_for_backward(x, y)
            ctx.eps = eps
            return functional.cosine_similarity(x, y, -1, eps)

        @staticmethod
        def backward(ctx, grad):
            return *backward_formula(grad[..., None], *ctx.saved_tensors, ctx.eps), None

    def function(x1, x2, dim=1, eps=1e-8):
        x1, x2 = (x.movedim(dim, -1) for x in torch.broadcast_tensors(x1, x2))
        return Planted.apply(x1, x2, eps)

    return function


def accepted_by_the_table(function, dtype):
    budget = OP.budget(dtype)
    return all(errors(function, OP.twin, s, dtype).within(budget) for s in OP.generic())


def accepted_by_gradcheck(function):
    try:
        return all(gradcheck(s.bind(function), s.tensors(torch.float64)) for s in OP.generic())
    except GradcheckError:
        return False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_right_backward_is_accepted(dtype):
    assert accepted_by_the_table(similarity_with(right), dtype)
    assert accepted_by_gradcheck(similarity_with(right))


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_backward_is_rejected(name):
    function = similarity_with(WRONG[name])
    assert not accepted_by_the_table(function, torch.float32)
    assert not accepted_by_the_table(function, torch.float64)
    # gradcheck's incoming gradients are unit vectors, of which a missing factor is invisible
    assert name == "missing grad_output" or not accepted_by_gradcheck(function)


def test_the_articles_verification_passes_and_proves_nothing():
    """The seed article checks at x = y = ones(16, 1) alone, along the first dimension."""
    x, y = (torch.ones(16, 1, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert gradcheck(lambda x, y: CosineSimilarity.apply(x.T, y.T, 1e-8), (x, y))
    for name in ("swapped", "zero", "doubled", "negated", "times a million", "unrelated"):
        function = similarity_with(WRONG[name])
        assert gradcheck(lambda x, y, f=function: f(x.T, y.T), (x, y)), name

    generic = [torch.randn(16, 1, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert gradcheck(lambda x, y: CosineSimilarity.apply(x.T, y.T, 1e-8), generic)
    for name in ("swapped", "zero", "doubled", "negated", "times a million", "unrelated"):
        function = similarity_with(WRONG[name])
        with pytest.raises(GradcheckError):
            gradcheck(lambda x, y, f=function: f(x.T, y.T), generic)


def test_the_articles_differential_has_a_wrong_sign():
    x, y, a, b = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n, m = x.norm(), y.norm()
    s = x @ y / (n * m)
    cross = (a @ y + x @ b) / (n * m)
    exact = torch.func.jvp(lambda x, y: functional.cosine_similarity(x, y, 0), (x, y), (a, b))[1]
    torch.testing.assert_close(cross - s * (a @ x / n**2 + y @ b / m**2), exact)
    assert (cross - s * (a @ x / n**2 - y @ b / m**2) - exact).abs() > 0.01
