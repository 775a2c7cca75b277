"""A common factor of 1.03 in bfloat16 is seen beside a twin; roundings are not taken for one."""

import pytest
import torch
from torch.nn import functional as F

from cosloss import reference
from cosloss.gradient_check import compare_gradients


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def attention(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def sharp(z1, z2):
    return reference.nt_xent_loss(z1, z2, temperature=0.1)


CASES = {
    "layer norm": (lambda x: F.layer_norm(x, (64,)), layer_norm, [(32, 64)]),
    "attention": (F.scaled_dot_product_attention, attention, [(2, 16, 32)] * 3),
    "cosine": (F.cosine_similarity, reference.cosine_similarity, [(32, 64)] * 2),
    "nt-xent": (sharp, sharp, [(32, 64)] * 2),
    "one row": (F.cosine_similarity, reference.cosine_similarity, [(1, 4)] * 2),
}


def report(case, factor, seed, dtype=torch.bfloat16):
    fn, twin, shapes = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return compare_gradients(lambda *x: Scaled.apply(fn(*x), factor), twin, *inputs)


@pytest.mark.parametrize("case", [name for name in CASES if name != "one row"])
@pytest.mark.parametrize("factor", [1.03, 0.97])
def test_a_factor_is_seen(case, factor):
    found = report(case, factor, 0)
    assert not found
    assert "times the right one" in found.reason


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_right_gradient_passes(case, dtype):
    for seed in range(10):
        found = report(case, 1.0, seed, dtype)
        assert found, found
