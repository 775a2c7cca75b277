"""Attention and scans whose gradient went wrong, mostly in a last, partial block."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.benchmarks.silent_gradients.cases import draw, fault, op, plain_gradient

GITHUB = "https://github.com"
AREA = {"area": "sequence"}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@fault(
    f"{GITHUB}/ROCm/triton/issues/666",
    "last block",
    lambda h, g: (h, h.roll(1, -1), h.roll(2, -1)),
    shape=(1, 2, 40, 4),
    **AREA,
)
def attention_of_a_length_that_blocks_do_not_divide(mended: bool) -> Any:
    """Queries of the last, partial block of 16 add nothing to the keys and values."""

    def backward(grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
        dq, dk, dv = plain_gradient(attention, grad, q, k, v)
        if not mended:
            whole = grad.clone()
            whole[..., q.shape[-2] // 16 * 16 :, :] = 0
            _, dk, dv = plain_gradient(attention, whole, q, k, v)
        return dq, dk, dv

    return op(attention, backward)


def scan(x: Tensor, gate: Tensor) -> Tensor:
    """s_t = exp(-softplus(gate_t)) s_{t-1} + x_t over dimension 1."""
    state, states = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = torch.exp(-F.softplus(gate[:, t])) * state + x[:, t]
        states.append(state)
    return torch.stack(states, 1)


@fault(
    f"{GITHUB}/state-spaces/mamba/pull/537",
    "last block",
    lambda h, g: (h, draw(g, h)),
    shape=(2, 20, 3),
    **AREA,
)
def scan_input_of_the_last_block_untouched(mended: bool) -> Any:
    """The pointer overshoots: positions after the last full block of 8 keep zeros."""

    def backward(grad: Tensor, out: Tensor, x: Tensor, gate: Tensor) -> Any:
        dx, dgate = plain_gradient(scan, grad, x, gate)
        if not mended:
            dx = dx.index_fill(1, torch.arange(16, 20), 0)
        return dx, dgate

    return op(scan, backward)


@fault(
    f"{GITHUB}/state-spaces/mamba/issues/368",
    "last block",
    lambda h, g: (draw(g, h), h),
    shape=(2, 20, 3),
    **AREA,
)
def scan_whose_padding_decays(mended: bool) -> Any:
    """Padding is zero before softplus and not after: what passes it on the way back shrinks."""

    def backward(grad: Tensor, out: Tensor, x: Tensor, gate: Tensor) -> Any:
        if not mended:
            pad = torch.exp(-F.softplus(torch.zeros(()))) ** (-x.shape[1] % 8)
            tail = torch.ones(x.shape[1])
            tail[x.shape[1] // 8 * 8 :] = pad
            grad = grad * tail.view(1, -1, 1).to(grad)
        return plain_gradient(scan, grad, x, gate)

    return op(scan, backward)


@fault(
    f"{GITHUB}/fla-org/flash-linear-attention/pull/875",
    "detach",
    lambda h, g: (h.sigmoid() + 0.1, h.roll(1, 2).sigmoid() + 0.1, h),
    shape=(2, 6, 4),
    **AREA,
)
def linear_attention_normaliser_off_the_graph(mended: bool) -> Any:
    """The sum of the keys comes from a bare kernel, without a gradient."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(1, 2)).tril()
        summed = (k if mended else k.detach()).cumsum(1)
        return scores @ v / (q * summed).sum(-1, keepdim=True)

    return attend


def convolve(x: Tensor, start: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A causal convolution over dimension 1, with the W - 1 inputs before it, and those after."""
    joined = torch.cat([start, x], 1)
    windows = joined.unfold(1, len(w), 1)
    return (windows * w).sum(-1), joined[:, -start.shape[1] :]


@fault(
    f"{GITHUB}/fla-org/flash-linear-attention/issues/1140",
    "last block",
    lambda h, g: (h[:, :1], h[:, 1:], torch.tensor([0.3, -1.0, 0.5, 2.0]).to(h)),
    shape=(4, 4, 3),
    **AREA,
)
def convolution_of_a_chunk_shorter_than_its_window(mended: bool) -> Any:
    """What is left of the first state in the last one gets no gradient; two outputs."""

    def backward(grads: Any, outs: Any, x: Tensor, start: Tensor, w: Tensor) -> Any:
        grad_y, grad_end = grads
        through = lambda *a: torch.cat([o.flatten() for o in convolve(*a)])  # noqa: E731
        if not mended:
            kept = torch.zeros_like(grad_end)
            kept[:, : x.shape[1]] = grad_end[:, : x.shape[1]]
            grad_end = kept
        return plain_gradient(
            through, torch.cat([grad_y.flatten(), grad_end.flatten()]), x, start, w
        )

    return op(convolve, backward)
