"""The engine's problems in the tests, its judge, and the shapes of its tiles."""

import torch

from cosloss.criteria import CosineEmbedding, CrossEntropy, DecoupledCrossEntropy, SigmoidContrast
from cosloss.kernels.eager import in_batch as eager
from cosloss.kernels.triton import block_shapes, in_batch
from cosloss.kernels.triton.block_shapes import Shape

CRITERIA = {
    "exp": CrossEntropy(40.0),
    "logsumexp": DecoupledCrossEntropy(),
    "softplus": SigmoidContrast(),
    "hinge": CosineEmbedding(0.1, 3),
}


def use_shapes(monkeypatch, whole, forward=16, backward=(16, 16)):
    """Tiles of these rows and columns, over rows held whole or in parts of 16 columns."""

    def fitting(table, d, size, card):
        block = (forward,) if table is block_shapes.FORWARD else backward
        return [Shape(block, 4, 1, 0, whole)]

    monkeypatch.setattr(block_shapes, "fitting", fitting)
    for name in ("forward_configs", "backward_configs"):  # those without a cache
        monkeypatch.setattr(block_shapes, name, getattr(block_shapes, name).__wrapped__)
    for size in (2, 4):
        monkeypatch.setitem(block_shapes.WIDEST_GRADIENT, size, 8192 if whole else 16)
        monkeypatch.setitem(block_shapes.PART, size, 16)


def vectors(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def problem(rows, others, columns=20):
    """Rows, and the others' or None, with logits of about 1."""
    scale = columns**-0.25
    r = scale * vectors(rows, columns)
    return r, None if others is None else scale * vectors(others, columns, 1)


def single(*tensors):
    return [None if x is None else x.float() for x in tensors]


def assert_gradients(r, c, bias, matrix, needs, rounding=1e-6, scale=0.37, dtype=torch.float32):
    """The kernel's gradients are the eager backend's in float64, to `rounding` of each weight."""
    exact_total = eager.forward(r, c, bias, matrix)
    grad = scale * torch.linspace(0.5, 2, exact_total.numel(), dtype=torch.float64)
    inputs = r, c, bias
    narrow = [None if x is None else x.to(dtype) for x in (r, c)]
    narrow += single(bias)
    total = in_batch.forward(*narrow, matrix)
    d_pos_logit = None if matrix.positives is None else 0.02 * grad.flip(0)
    asked = {"d_stat": grad, "needs": needs, "d_pos_logit": d_pos_logit}
    found = in_batch.backward(*narrow, matrix, stat=total, **asked)
    exact = eager.backward(*inputs, matrix, stat=exact_total, **asked)
    for own, other, need in zip(found, exact, needs, strict=True):
        assert (own is not None) == need
        if own is not None:
            assert (own - other).abs().max() < rounding * other.abs().max() * 2
