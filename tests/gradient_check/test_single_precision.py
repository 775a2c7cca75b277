"""Finite differences where a function refuses float64, as most kernels of others do."""

import pytest
import torch
from torch import Tensor

from cosloss.gradient_check import check_finite_differences
from tests.slow import slow


def kernel(*dtypes: torch.dtype, fault: str = "") -> type[torch.autograd.Function]:
    """An RMSNorm with a weight that takes these dtypes alone."""

    class RMSNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            if x.dtype not in dtypes:
                raise TypeError(f"unsupported dtype {x.dtype}")
            ctx.save_for_backward(x, weight)
            wide = x.float()
            r = wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
            return (wide * r * weight.float()).to(x.dtype)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            g, wide = grad.float(), x.float()
            r = wide.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
            unit = wide * r
            weighted = g * weight.float()
            along = (weighted * unit).mean(-1, keepdim=True)
            grad_x = r * (weighted - (0 if fault == "no projection" else 1) * unit * along)
            grad_weight = (g * unit).flatten(0, -2).sum(0)
            if fault == "factor":
                grad_x *= 0.9
            if fault == "last row":
                grad_x.flatten(0, -2)[-1] = 0
            if fault == "no weight":
                grad_weight = torch.zeros_like(grad_weight)
            if fault == "half the rows":
                grad_weight = (g * unit).flatten(0, -2)[::2].sum(0)
            return grad_x.to(x.dtype), grad_weight.to(weight.dtype)

    return RMSNorm


def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 7, 32, generator=generator).to(dtype).requires_grad_()
    return x, (1 + 0.1 * torch.randn(32, generator=generator)).to(dtype).requires_grad_()


PRECISIONS = {
    "float32 alone": ((torch.float32,), torch.float32),
    "all but float64, called in bfloat16": (
        (torch.float32, torch.bfloat16, torch.float16),
        torch.bfloat16,
    ),
    "float32 alone, called in float16": ((torch.float32,), torch.float16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_right_gradient_is_called_right(precision):
    takes, called = PRECISIONS[precision]
    for seed in range(10):
        report = check_finite_differences(kernel(*takes).apply, *inputs(seed, called), seed=seed)
        assert report, report
        assert "float32" in report.reason


@pytest.mark.parametrize(
    ("fault", "at"),
    [
        ("no projection", 0),
        ("half the rows", 1),
        *slow(("factor", 0), ("last row", 0), ("no weight", 1)),
    ],
)
def test_a_wrong_gradient_is_called_wrong(fault, at):
    for seed in range(10):
        report = check_finite_differences(
            kernel(torch.float32, fault=fault).apply, *inputs(seed, torch.float32), seed=seed
        )
        assert not report, (seed, report)
        assert not report.skipped
        assert report.reason.startswith(f"{at}: the gradient's slope is")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_alone_shows_what_stands_out_of_its_noise(dtype):
    for seed in range(5):
        right = check_finite_differences(kernel(dtype).apply, *inputs(seed, dtype), seed=seed)
        assert right or right.skipped, right
        wrong = kernel(dtype, fault="no weight").apply
        assert not check_finite_differences(wrong, *inputs(seed, dtype), seed=seed)


def test_a_stop_gradient_is_no_fault_in_float32_either():
    def weighted(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        return (x.detach().sigmoid() * x.square()).sum()

    assert check_finite_differences(weighted, torch.randn(5, 4, generator=torch.manual_seed(0)))


def test_a_kink_is_no_fault_in_float32_either():
    def hinge(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        return torch.relu(x).square().sum() + x.abs().sum()

    for seed in range(10):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        report = check_finite_differences(hinge, x, seed=seed)
        assert report or report.skipped, report


def test_noise_that_hides_the_slope_is_not_checked():
    def rounded(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        noise = ((x.detach() * 1e6).round() % 7 - 3) * x.abs().max().detach()
        return (x * 1e-4).sum() + noise.sum() * 10

    report = check_finite_differences(rounded, torch.randn(5, 4, generator=torch.manual_seed(0)))
    assert report.skipped, report
    assert "float32" in report.reason
