"""What a comparison of gradients found."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class InputReport:
    """The gradient on one input: analytic, the twin's by autograd, and the float64 truth.

    Norms are over all entries. `relative` is |analytic - autograd| / |autograd|, the errors
    against float64 are divided by the truth's norm; `budget` is what `analytic_vs_float64` may be.
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
    row_error: Tensor = field(repr=False)

    def scalars(self) -> dict[str, float]:
        """The numbers that are logged, by their tag."""
        names = (
            "relative",
            "max_abs",
            "cosine_distance",
            "analytic_vs_float64",
            "autograd_vs_float64",
            "ulp_p50",
            "ulp_p99",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class GradientReport:
    """Every input's comparison, and the value's."""

    inputs: dict[str, InputReport]
    value: float
    value_vs_float64: float
    value_budget: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the value and every gradient are finite and within their error budgets."""
        value = self.value_vs_float64 <= self.value_budget
        return value and all(report.passed for report in self.inputs.values())

    def __str__(self) -> str:
        verdict = "the gradient is right" if self.passed else "THE GRADIENT IS WRONG"
        return f"{verdict}: {self.reason}\n\n{self.markdown()}"

    def markdown(self) -> str:
        """A table: one row per input."""
        lines = [
            "| input | analytic vs float64 | autograd vs float64 | budget | cosine distance | |",
            "|---|---|---|---|---|---|",
            f"| value | {self.value_vs_float64:.2e} | | {self.value_budget:.2e} | | |",
        ]
        for r in self.inputs.values():
            lines.append(
                f"| {r.name} | {r.analytic_vs_float64:.2e} | {r.autograd_vs_float64:.2e} "
                f"| {r.budget:.2e} | {r.cosine_distance:.2e} | {'' if r.passed else 'wrong'} |"
            )
        return "\n".join(lines)
