"""Layers as models call them: dropout, buffers, layouts, complex numbers, sparse gradients."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from experiments.benchmarks.silent_gradients.cases import classes, draw, plain, right
from experiments.benchmarks.silent_gradients.faults.norms import Affine, rms_norm


def one(h: Tensor, g: torch.Generator) -> tuple[Tensor]:
    return (h,)


def same(h: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return h, h, h


def channels_last(h: Tensor, g: torch.Generator) -> tuple[Tensor]:
    return (h.contiguous(memory_format=torch.channels_last),)


IMAGE: dict[str, Any] = {"shape": (2, 4, 6, 6)}
SEQUENCE: dict[str, Any] = {"shape": (2, 6, 8)}

right("LayerNorm of sequences", lambda: nn.LayerNorm(8), one, **SEQUENCE)
right("RMSNorm", lambda: nn.RMSNorm(8), one, **SEQUENCE)
right("RMSNorm of a wide batch", lambda: Affine(rms_norm, 64, bias=False), one, shape=(8, 32, 64))
right("BatchNorm1d", lambda: nn.BatchNorm1d(64), one, shape=(16, 64))
right(
    "Linear, BatchNorm and ReLU",
    lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()),
    one,
)
right("BatchNorm2d of channels_last", lambda: nn.BatchNorm2d(4), channels_last, **IMAGE)
right("GroupNorm", lambda: nn.GroupNorm(2, 4), one, **IMAGE)
right(
    "InstanceNorm with running statistics",
    lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    one,
    **IMAGE,
)
right("weight normalisation", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 5)), one)
right(
    "spectral normalisation, which iterates",
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5)).eval(),
    one,
)
right("attention(h, h, h)", plain(F.scaled_dot_product_attention), same, shape=(2, 2, 6, 4))
right(
    "causal attention",
    plain(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    same,
    shape=(2, 2, 6, 4),
)
right(
    "multi-head attention, time first",
    lambda: nn.MultiheadAttention(8, 2),
    lambda h, g: (h.transpose(0, 1),) * 3,
    finish=lambda out: out[0].square().mean(),
    **SEQUENCE,
)
right(
    "transformer layer with dropout",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True),
    one,
    **SEQUENCE,
)
right("dropout", lambda: nn.Dropout(0.3), one)
right("alpha dropout", lambda: nn.AlphaDropout(0.3), one)
right("feature dropout of an image", lambda: nn.Dropout2d(0.3), one, **IMAGE)
right("SwiGLU of halves", plain(lambda a, b: F.silu(a) * b), lambda h, g: h.chunk(2, -1))
right("softplus, softmax and GELU", plain(lambda x: F.gelu(x.softmax(-1) * F.softplus(x))), one)


def rotary(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[1]).view(-1, 1) / torch.tensor([1.0, 3.0, 10.0, 30.0])
    turned = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turned.to(pairs)).flatten(-2)


right("rotary embedding by complex numbers", plain(rotary), one, **SEQUENCE)
right(
    "embedding of tokens",
    lambda: nn.Embedding(12, 8),
    lambda h, g: (torch.randint(12, (4, 5), generator=g),),
    alone=False,
)
right(
    "embedding with sparse gradients",
    lambda: nn.Embedding(12, 8, sparse=True),
    lambda h, g: (torch.randint(12, (4, 5), generator=g),),
    alone=False,
)
right(
    "embedding bag with weights a token",
    lambda: nn.EmbeddingBag(12, 8, mode="sum"),
    lambda h, g: (torch.randint(12, (16, 8), generator=g), None, h),
)
right(
    "first convolution of raw images",
    lambda: nn.Conv2d(3, 4, 3),
    lambda h, g: (torch.randn(2, 3, 6, 6, generator=g).to(h.dtype),),
    alone=False,
)
right("GRU, time first", lambda: nn.GRU(8, 5), lambda h, g: (h.transpose(0, 1),), **SEQUENCE)
right(
    "LSTM of packed lengths",
    lambda: nn.LSTM(8, 5, batch_first=True),
    lambda h, g: (nn.utils.rnn.pack_padded_sequence(h, torch.tensor([6, 3]), batch_first=True),),
    finish=lambda out: out[0].data.square().mean(),
    alone=False,
    **SEQUENCE,
)
right("convolution", lambda: nn.Conv1d(6, 4, 3, padding=1), one, **SEQUENCE)
right(
    "depthwise convolution of channels_last",
    lambda: nn.Conv2d(4, 4, 3, groups=4),
    channels_last,
    **IMAGE,
)
right("transposed convolution", lambda: nn.ConvTranspose2d(4, 2, 3, stride=2), one, **IMAGE)
right("max pooling", lambda: nn.MaxPool2d(2), one, **IMAGE)
right("adaptive pooling", lambda: nn.AdaptiveAvgPool2d((2, 3)), one, **IMAGE)
right(
    "grid sample",
    plain(lambda x, g: F.grid_sample(x, g, align_corners=False)),
    lambda h, g: (h[:, :2], torch.tanh(h[:, 2:].permute(0, 2, 3, 1))),
    **IMAGE,
)
right(
    "bicubic interpolation",
    plain(lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic")),
    one,
    **IMAGE,
)
right("pixel shuffle", lambda: nn.PixelShuffle(2), one, **IMAGE)
right("unfold", lambda: nn.Unfold(3), one, **IMAGE)
right("spectrum loss", plain(lambda x: torch.fft.rfft(x).abs().square().mean()), one)
right(
    "complex argument",
    plain(lambda z: (z * z.conj().roll(1, 0)).real.mean()),
    lambda h, g: (torch.complex(h[:, :4], h[:, 4:]),),
)
right(
    "complex output",
    plain(lambda a, b: torch.complex(a, b).exp()),
    lambda h, g: (h[:, :4], h[:, 4:]),
)
right(
    "log-determinant",
    plain(lambda a: torch.logdet(a @ a.mT + torch.eye(4).to(a))),
    one,
    shape=(3, 4, 4),
)
right("singular values", plain(lambda a: torch.linalg.svdvals(a).log().sum()), one, shape=(3, 5, 4))
right(
    "solve by Cholesky",
    plain(
        lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a @ a.mT + torch.eye(4).to(a)))
    ),
    lambda h, g: (h[..., :4], h[..., 4:]),
    shape=(3, 4, 6),
)
right("distances of rows", plain(torch.cdist), lambda h, g: (h, h.roll(1, 1) + 0.5))
right(
    "masked softmax with minus infinity",
    plain(lambda x, m: x.masked_fill(m, -torch.inf).softmax(1)),
    lambda h, g: (h, torch.arange(8).expand(16, 8) > torch.arange(16)[:, None]),
)
right("running products", plain(lambda x: x.cumsum(1) + (0.5 * x.tanh() + 1).cumprod(1)), one)
right(
    "mean of segments",
    plain(
        lambda x, i: (
            torch.zeros(4, 8).to(x).index_add(0, i, x)
            / torch.bincount(i, minlength=4).clamp_min(1)[:, None]
        )
    ),
    lambda h, g: (h, classes(g, 16, 4)),
)
right(
    "scatter of maxima",
    plain(
        lambda x, i: torch.zeros(4, 8).to(x).scatter_reduce(0, i[:, None].expand_as(x), x, "amax")
    ),
    lambda h, g: (h, classes(g, 16, 4)),
)
right(
    "columns of every second row", plain(lambda x: x.square().sum(0)), lambda h, g: (h[::2, ::3],)
)
right(
    "expanded argument", plain(lambda a, b: (a * b).tanh()), lambda h, g: (h[:1].expand(16, 8), h)
)
right("bilinear form", lambda: nn.Bilinear(8, 8, 3), lambda h, g: (h, h.roll(1, 0)))
right("dictionary of outputs", plain(lambda x: {"a": x.tanh(), "b": x.square().mean()}), one)


class Checkpointed(nn.Module):
    """A block with dropout that is recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False)


class Codebook(nn.Module):
    """Vector quantisation: straight-through codes, and moving averages of their rows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randn(6, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        codes = self.codes[nearest].clone()
        with torch.no_grad():
            self.codes[nearest] = 0.9 * codes + 0.1 * x
        return 0.25 * F.mse_loss(x, codes) + (x + (codes - x).detach()).square().mean()


def _codebook_twin(x: Tensor) -> Tensor:
    codes = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(x)
    codes = codes[torch.cdist(x.detach(), codes).argmin(1)]
    through = (x * (2 * codes)).sum() / x.numel()
    return 0.25 * (x - codes).square().mean() + through


right("checkpointed block with dropout", Checkpointed, one)
right(
    "codebook with straight-through codes",
    Codebook,
    one,
    twin=_codebook_twin,
    stops="rounding to the code",
)
right(
    "straight-through rounding",
    plain(lambda x: x + (x.round() - x).detach()),
    one,
    twin=lambda x: 1 * x,
    stops="rounding",
    finish=lambda y: (y * torch.linspace(-1, 1, 8).to(y)).sum(),
)
right("softmax of Gumbel noise", plain(lambda x: F.gumbel_softmax(x, 0.7)), one)
right(
    "reparametrised sample",
    plain(lambda m, s: m + s.exp() * torch.randn_like(m)),
    lambda h, g: (h[:, :4], h[:, 4:]),
)
right(
    "penalty on the gradient",
    plain(
        lambda x, w: (
            (torch.autograd.grad((x @ w).tanh().sum(), x, create_graph=True)[0].norm(dim=1) - 1)
            .square()
            .mean()
        )
    ),
    lambda h, g: (h, draw(g, h, 8, 3)),
)
