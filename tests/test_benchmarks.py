"""What the benchmark suites measure, and that a wrong op gets no speed-up."""

from dataclasses import replace

import pytest
import torch

from cosloss import cosine_similarity, info_nce_loss, max_sim_loss, nt_xent_loss
from cosloss.testing import OPS
from experiments.benchmarks import contrastive_rivals as lean
from experiments.benchmarks.measure import (
    forward_and_backward,
    keeps_its_budget,
    measure,
    peak_memory,
    show,
)


def test_peak_memory_is_what_is_held_at_once():
    def two_after_each_other():
        first = torch.empty(1 << 18)
        del first
        return torch.empty(1 << 19)

    assert peak_memory(two_after_each_other) == 2.0
    assert peak_memory(lambda: (torch.empty(1 << 18), torch.empty(1 << 19))) == 3.0


def test_similarity_holds_little_beyond_the_two_gradients():
    x, y = torch.randn(2, 16384, 512)
    step = forward_and_backward(cosine_similarity, x.requires_grad_(), y.requires_grad_())
    assert 64 <= peak_memory(step) <= 1.05 * 64


def test_contenders_take_turns():
    calls = []
    measured = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    rounds = [set(calls[start : start + 2]) for start in (4, 6, 8)]
    assert rounds == [{"a", "b"}] * 3
    assert measured["a"].fastest <= measured["a"].median


def test_no_speed_up_for_a_wrong_op(capsys):
    op = OPS[0]
    assert keeps_its_budget(op)
    wrong = replace(op, function=lambda x1, x2, **keywords: 1.01 * op.function(x1, x2, **keywords))
    assert not keeps_its_budget(wrong)
    measured = measure({"cosloss": lambda: None, "copy": lambda: None}, rounds=1)
    show("title", measured, "copy", right=False)
    assert "no speed-up is claimed" in (out := capsys.readouterr().out)
    assert "x\n" not in out


@pytest.mark.parametrize(
    ("rival", "ours"),
    [
        (lean.nt_xent, nt_xent_loss),
        (lean.chunked_nt_xent, nt_xent_loss),
        (lean.info_nce, info_nce_loss),
        (lean.chunked_info_nce, info_nce_loss),
        (
            lean.hard_info_nce,
            lambda a, b, t: info_nce_loss(a, b, t, hard_negatives=lean.hard(b)),
        ),
    ],
)
def test_the_rivals_compute_the_same_loss(rival, ours):
    if "chunked" in rival.__name__ and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch has no linear_cross_entropy before 2.13")
    z1, z2 = (torch.randn(300, 64, requires_grad=True) for _ in range(2))
    values = rival(z1, z2), ours(z1, z2, 0.1)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    found, expected = (torch.autograd.grad(value, (z1, z2)) for value in values)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_rivals_compute_the_same_scores():
    query, document = torch.randn(5, 4, 16), torch.randn(5, 9, 16)
    inputs = query.requires_grad_(), document.requires_grad_()
    values = lean.max_sim(*inputs), max_sim_loss(*inputs)
    torch.testing.assert_close(*values)
    found, expected = (torch.autograd.grad(value, inputs) for value in values)
    torch.testing.assert_close(found, expected)
