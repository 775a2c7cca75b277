"""Losses below 1e-16: right where the float64 cross entropy that judges them gives 0."""

import mpmath
import pytest
import torch

from cosloss import NTXentLoss, functional, reference
from cosloss.gradient_check import compare_gradients
from cosloss.kernels import dispatch

TEMPERATURE = 0.005


def separated(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    base = torch.eye(4, 8, dtype=torch.float64)
    noise = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator)
    return [(base + 0.2 * x).to(dtype) for x in noise]


def exact(z1, z2):
    """The mean loss, and its gradient on z1, from Algorithm 1 as loops in 60 digits."""
    with mpmath.workdps(60):
        rows = [[mpmath.mpf(float(v)) for v in row] for row in torch.cat([z1, z2]).double()]

        def mean_loss(rows):
            units = []
            for row in rows:
                norm = mpmath.sqrt(mpmath.fsum(v * v for v in row))
                units.append([v / norm for v in row])
            count, total = len(rows), mpmath.mpf(0)
            for i in range(count):
                logits = [mpmath.fdot(units[i], other) / TEMPERATURE for other in units]
                positive = logits[(i + count // 2) % count]
                others = [x for j, x in enumerate(logits) if j not in (i, (i + count // 2) % count)]
                total += mpmath.log1p(mpmath.fsum(mpmath.exp(x - positive) for x in others))
            return total / count

        step, gradient = mpmath.mpf(10) ** -20, []
        for i in range(len(z1)):
            for k in range(z1.shape[1]):
                sides = []
                for sign in (1, -1):
                    moved = [list(row) for row in rows]
                    moved[i][k] += sign * step
                    sides.append(mean_loss(moved))
                gradient.append(float((sides[0] - sides[1]) / (2 * step)))
        return float(mean_loss(rows)), torch.tensor(gradient, dtype=torch.float64).view_as(z1)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-12), (torch.float32, 3e-4)])
def test_value_and_gradient_are_those_of_60_digits(dtype, budget, backend):
    z1, z2 = separated(dtype)
    value, gradient = exact(z1, z2)
    assert 0 < value < 1e-16
    z1.requires_grad_()
    with dispatch.use(backend):
        loss = functional.nt_xent_loss(z1, z2, TEMPERATURE)
        (found,) = torch.autograd.grad(loss, z1)
    assert abs(float(loss.detach()) / value - 1) < budget
    assert float((found.double() - gradient).norm() / gradient.norm()) < budget


def test_the_judge_is_wrong_here():
    z1, z2 = separated()
    _, gradient = exact(z1, z2)
    leaf = z1.clone().requires_grad_()
    twin = reference.nt_xent_loss(leaf, z2, TEMPERATURE)
    (theirs,) = torch.autograd.grad(twin, leaf)
    assert twin == 0
    assert (theirs - gradient).norm() > 0.1 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_check_does_not_call_it_wrong(dtype):
    z1, z2 = separated(dtype)
    loss = NTXentLoss(TEMPERATURE)
    report = compare_gradients(loss, loss.reference(), z1, z2)
    assert report, report


def test_the_gradient_check_still_sees_a_wrong_one_of_that_size():
    class Scaled(torch.autograd.Function):
        """A tiny, well resolved function, whose gradient is a hundredth too large."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 1e-25 * x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            return 2.02e-25 * grad * ctx.saved_tensors[0]

    x, _ = separated()
    report = compare_gradients(Scaled.apply, lambda x: 1e-25 * x.square().sum(), x)
    assert not report
    assert "1.01 times the right one" in report.reason
