"""What a comparison of gradients found, and how it says so."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

ENTRIES = 3
BLOCK = 2**20  # entries
TAGS = (
    "error_over_budget",
    "relative",
    "max_abs",
    "cosine_distance",
    "analytic_vs_float64",
    "autograd_vs_float64",
    "budget",
    "ulp_p50",
    "ulp_p99",
)


@dataclass(frozen=True)
class Discrepancy:
    """The gradient on one input, or the value: analytic, the twin's in the same dtype, the truth.

    `relative` is |analytic - autograd| / |autograd|, norms over all entries, `max_abs` the largest
    entry of their difference; without a twin the truth, float64, stands in for autograd. The two
    errors against float64 are divided by the truth's norm; `budget` is what `analytic_vs_float64`
    may be. `row_error` has each row's error, divided by the root mean square of the rows' norms.
    `worst` names the entries that are most off, of what has not passed.
    """

    name: str
    relative: float
    max_abs: float
    cosine_distance: float
    analytic_vs_float64: float
    autograd_vs_float64: float
    ulp_p50: float
    ulp_p99: float
    budget: float
    passed: bool
    diagnosis: str
    row_error: Tensor = field(repr=False)
    worst: str = ""

    @property
    def error_over_budget(self) -> float:
        """Below 1 is within budget; 0 where nothing is allowed and nothing is off."""
        if self.analytic_vs_float64 == 0:
            return 0.0
        return self.analytic_vs_float64 / self.budget if self.budget else math.inf

    def scalars(self) -> dict[str, float]:
        """The numbers that are logged, by the last part of their tag."""
        return {tag: getattr(self, tag) for tag in TAGS}


@dataclass(frozen=True)
class GradientReport:
    """The comparison of every input's gradient, and of the value; true where all is right.

    Example of use in a test: `assert report, report`.
    """

    inputs: dict[str, Discrepancy]
    value: Discrepancy
    allowance: str

    @property
    def passed(self) -> bool:
        """Whether every gradient is finite and within its error budget; the value is shown only."""
        return not self.failures

    @property
    def failures(self) -> list[Discrepancy]:
        """What is beyond its budget, the worst first."""
        failed = [d for d in (*self.inputs.values(), self.value) if not d.passed]
        return sorted(failed, key=lambda d: -d.analytic_vs_float64 / max(d.budget, 1e-300))

    @property
    def reason(self) -> str:
        """One line: what is wrong with the worst of them."""
        return self.failures[0].diagnosis if self.failures else "every gradient is within budget"

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{self.reason}\n\n{self.markdown()}"

    def markdown(self) -> str:
        """The numbers as a Markdown table, one row per input, and the reason for the budgets."""
        columns = ("analytic_vs_float64", "autograd_vs_float64", "budget", "relative", "max_abs")
        lines = [
            "| | " + " | ".join((*columns, "cosine_distance")) + " | |",
            "|---" * (len(columns) + 3) + "|",
        ]
        for d in (self.value, *self.inputs.values()):
            numbers = " | ".join(f"{getattr(d, c):.2e}" for c in (*columns, "cosine_distance"))
            lines.append(f"| {d.name} | {numbers} | {'' if d.passed else '**wrong**'} |")
        entries = [f"Worst entries of {d.name}: {d.worst}." for d in self.failures if d.worst]
        return "\n".join([*lines, "", *entries, self.allowance])


def discrepancy(
    name: str,
    ours: Tensor,
    autograd: Tensor | None,
    truth: Tensor,
    dtype: torch.dtype,
    budget: float,
    passed: bool,
) -> Discrepancy:
    """The numbers for one gradient, computed in float64; `budget` is absolute here."""
    norm = truth.norm().item()
    scale = norm or torch.finfo(torch.float64).tiny
    peer = truth if autograd is None else autograd
    peer_norm, our_norm = peer.norm().item(), ours.norm().item()
    rows = _row_errors(ours, truth)
    analytic = rows.norm().item() / scale
    twin = math.nan if autograd is None else _row_errors(autograd, truth).norm().item() / scale
    ulps = _ulps(ours, truth, dtype)
    true_rows = row_norms(truth).square().mean().sqrt()
    return Discrepancy(
        name=name,
        relative=_row_errors(ours, peer).norm().item() / (peer_norm or scale),
        max_abs=_largest(float((a - b).abs().max()) for a, b in _blocks(ours, peer) if len(a)),
        cosine_distance=_cosine_distance(ours, peer, our_norm, peer_norm),
        analytic_vs_float64=analytic,
        autograd_vs_float64=twin,
        ulp_p50=_quantile(ulps, 0.5),
        ulp_p99=_quantile(ulps, 0.99),
        budget=budget / scale,
        passed=passed,
        diagnosis="" if passed else _diagnosis(name, ours, truth, budget, analytic, twin),
        row_error=rows / true_rows.clamp_min(torch.finfo(rows.dtype).tiny),
        worst="" if passed else _worst_entries(ours, truth),
    )


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both that are not too large: what is computed of them takes little memory."""
    return zip(a.reshape(-1).split(BLOCK), b.reshape(-1).split(BLOCK), strict=True)


def _row_errors(a: Tensor, b: Tensor) -> Tensor:
    """`row_norms` of a - b."""
    if a.ndim == 0 or not a.numel():
        return row_norms(a - b)
    rows = max(1, BLOCK * len(a) // a.numel())
    parts = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([row_norms(x - y) for x, y in parts])


def _ulps(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Errors in units of the dtype's spacing, of at most `BLOCK` entries, evenly chosen."""
    step = -(-truth.numel() // BLOCK) or 1
    a, b = ours.reshape(-1)[::step], truth.reshape(-1)[::step]
    return (a - b).abs() / _spacing(b, dtype)


def _largest(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def row_norms(x: Tensor) -> Tensor:
    """Norm of each x[i] over all its entries; of a 0-d tensor, its magnitude."""
    return x.abs().reshape(1) if x.ndim == 0 else x.reshape(len(x), -1).norm(dim=1)


def _diagnosis(
    name: str, ours: Tensor, truth: Tensor, budget: float, analytic: float, twin: float
) -> str:
    """What a person would look for first: NaN, a factor, a few rows, another direction."""
    if not truth.isfinite().all():
        return f"{name}: the truth itself, in float64, is NaN or infinite"
    if not ours.isfinite().all():
        bad = row_norms(ours).isfinite().logical_not().sum().item()
        return f"{name}: NaN or inf in {bad} of {row_norms(ours).numel()} rows"
    norm = truth.norm().item()
    allowed = budget / (norm or 1)
    by_autograd = "" if twin != twin else f", autograd's by {twin:.1e}"
    text = f"{name}: off by {analytic:.1e} of its norm{by_autograd}, allowed {allowed:.1e}"
    if norm == 0:
        return f"{name}: has norm {ours.norm().item():.1e} where it must be zero"
    if not ours.any():
        return f"{text}; it is zero"
    factor = ((ours * truth).sum() / truth.square().sum()).item()
    if (ours - factor * truth).norm() <= 0.1 * (ours - truth).norm():
        return f"{text}; it is {factor:.4g} times the right one"
    wrong = row_norms(ours - truth) > budget
    if wrong.sum() <= wrong.numel() // 4:
        first = int(wrong.nonzero()[0]) if wrong.any() else 0
        return f"{text}; {int(wrong.sum())} of {wrong.numel()} rows are wrong, first row {first}"
    distance = _cosine_distance(ours, truth, ours.norm().item(), norm)
    return f"{text}; its direction is wrong (cosine distance {distance:.1e})"


def _worst_entries(ours: Tensor, truth: Tensor) -> str:
    """Where the two differ most: index, ours, expected."""
    error = (ours - truth).abs().nan_to_num(math.inf, posinf=math.inf).flatten()
    entries = []
    for place in error.topk(min(ENTRIES, error.numel())).indices.tolist():
        index = torch.unravel_index(torch.tensor(place, device="cpu"), truth.shape)
        numbers = f"{ours.flatten()[place]:.4g}, expected {truth.flatten()[place]:.4g}"
        entries.append(f"[{', '.join(str(int(i)) for i in index)}] is {numbers}")
    return "; ".join(entries)


def _spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of `dtype` at x, subnormal numbers included."""
    info = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1)
    return torch.where(x == 0, 0, spacing).clamp_min(info.tiny * info.eps)


def _quantile(x: Tensor, q: float) -> float:
    # torch.quantile refuses more than 2^24 entries
    rank = min(int(q * x.numel()), x.numel() - 1)
    return x.kthvalue(rank + 1).values.item()


def _cosine_distance(a: Tensor, b: Tensor, norm_a: float, norm_b: float) -> float:
    """1 - <a, b> / (|a| |b|), as half the squared distance of the directions; 0 if both are 0."""
    if norm_a == 0 and norm_b == 0:
        return 0.0
    if norm_a == 0 or norm_b == 0:
        return math.nan
    return sum(float((x / norm_a - y / norm_b).square().sum()) for x, y in _blocks(a, b)) / 2
