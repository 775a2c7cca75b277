"""Functions in two forms, both right, at random points: is either called wrong?

`python -m experiments.studies.false_alarms --functions` runs it. Each form is the other's twin;
sizes, values and roundings are new at each point, in float32, bfloat16 and float16.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import cosloss.functional
import cosloss.reference
from cosloss.gradient_check import compare_gradients

Case = tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OURS = ("nt_xent_loss", "info_nce_loss")


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * w + b


def group_norm(x: Tensor) -> Tensor:
    groups = x.reshape(len(x), 4, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    deviation = (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (centred / deviation).reshape(x.shape)


def cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    return (x.logsumexp(-1) - x.gather(-1, target[:, None])[:, 0]).mean()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def attention_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q.float(), k.float(), v.float()).to(q.dtype)


def kl_divergence(x: Tensor, y: Tensor) -> Tensor:
    log_x, log_y = x.log_softmax(-1), y.log_softmax(-1)
    return F.kl_div(log_x, log_y, log_target=True, reduction="batchmean")


def kl_divergence_by_hand(x: Tensor, y: Tensor) -> Tensor:
    log_x, log_y = x.log_softmax(-1), y.log_softmax(-1)
    return (log_y.exp() * (log_y - log_x)).sum(-1).mean()


def focal(x: Tensor, target: Tensor) -> Tensor:
    p = x.sigmoid()
    wrong = F.softplus(x) * p.square() * (1 - target)
    return (F.softplus(-x) * (1 - p).square() * target + wrong).mean()


def focal_by_logarithms(x: Tensor, target: Tensor) -> Tensor:
    p = 1 / (1 + torch.exp(-x))
    wrong = (1 - target) * p.square() * F.logsigmoid(-x)
    return -(target * (1 - p).square() * F.logsigmoid(x) + wrong).mean()


def smooth_l1(x: Tensor, y: Tensor) -> Tensor:
    distance = (x - y).abs()
    return torch.where(distance < 1, 0.5 * distance.square(), distance - 0.5).mean()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotary_by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.stack(x.float().chunk(2, -1), -1).contiguous()
    turned = torch.view_as_complex(pairs) * torch.complex(cos.float(), sin.float())
    return torch.cat(torch.view_as_real(turned).unbind(-1), -1).to(x.dtype)


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def off_diagonal(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    covariance = x.T @ x / (len(x) - 1)
    return covariance.fill_diagonal_(0).square().sum() / x.shape[1]


def off_diagonal_by_difference(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    covariance = x.T @ x / (len(x) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / x.shape[1]


def cases(seed: int) -> Iterator[Case]:
    """Name, function, twin and inputs, of new sizes and values for each seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def below(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    b, d = below(2, 24), 4 * below(1, 12)
    labels = torch.randint(0, d, (b,), generator=generator)
    logits, binary = 2 * normal(b, d), (normal(b, d) > 0).float()
    x, y, weight, bias = normal(b, d), normal(b, d), 1 + 0.1 * normal(d), normal(d)
    q, k, v = (normal(2, b, d) for _ in range(3))
    angles = normal(b, d // 2)
    torch_norm = F.layer_norm
    yield "rms norm", rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [x, weight]
    yield "layer norm", lambda x, w, b: torch_norm(x, w.shape, w, b), layer_norm, [x, weight, bias]
    yield "group norm", lambda x: F.group_norm(x, 4), group_norm, [normal(b, 8, 3, 3)]
    yield "cross entropy", F.cross_entropy, cross_entropy, [logits, labels]
    yield "attention", F.scaled_dot_product_attention, attention, [q, k, v]
    yield "attention in float32", attention_in_float32, attention, [q, k, v]
    yield "gated unit", lambda x, y: F.silu(x) * y, lambda x, y: x * x.sigmoid() * y, [x, y]
    yield "gelu", F.gelu, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), [x]
    yield "softmax", lambda x: x.softmax(-1), softmax, [logits]
    yield "linear", F.linear, lambda x, w, b: (x[:, None] * w).sum(-1) + b, [x, y, normal(b)]
    yield "divergence", kl_divergence, kl_divergence_by_hand, [x, y]
    yield "focal", focal, focal_by_logarithms, [logits, binary]
    yield "smooth l1", F.smooth_l1_loss, smooth_l1, [x, y]
    yield "rotary", rotary, rotary_by_complex_numbers, [x, angles.cos(), angles.sin()]
    yield "covariance", off_diagonal, off_diagonal_by_difference, [x]
    for name in OURS:
        yield name, getattr(cosloss.functional, name), getattr(cosloss.reference, name), [x, y]


def count(minutes: float, seed: int = 0) -> Counter[str]:
    """Checks and false alarms, with a twin and without, by dtype; new points until time is up."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        seed += 1
        for name, function, twin, inputs in cases(seed):
            for dtype in DTYPES:
                given = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
                for stand_in in (twin, None):
                    report = compare_gradients(function, stand_in, *given)
                    kind = str(dtype).removeprefix("torch.")
                    kind += " with a twin" if stand_in else " without a twin"
                    counts[f"{kind}: checks"] += 1
                    counts[f"{kind}: false alarms"] += not report
                    if not report:
                        print(f"{name}, {kind}, seed {seed}: {report.reason}")
    return counts
