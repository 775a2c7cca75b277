"""What a comparison of gradients shows on TensorBoard beside its scalars."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cosloss.gradient_check.nests import tensors_in
from cosloss.gradient_check.report import GradientReport, row_norms

LOWEST = 1e-20  # an exact row, on a logarithmic axis


_layouts: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def add_layout(writer: Any, categories: dict[str, Any]) -> None:
    """Add categories of charts to the writer's page of custom scalars.

    A writer's own `add_custom_scalars` replaces the page that is there; this keeps its other
    categories.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter.
        categories: as `add_custom_scalars` takes them: {category: {chart: [kind, [tag, ...]]}}.
    """
    layout = _layouts.setdefault(writer, {})
    layout.update(categories)
    writer.add_custom_scalars(layout)


def discrepancy_charts(losses: dict[str, list[str]]) -> dict[str, Any]:
    """Per loss a category: verdicts, per input error over budget, then each error by itself."""
    root = "gradient_discrepancy"
    errors = {
        "analytic_vs_float64": "error of the gradient that training got",
        "autograd_vs_float64": "error of the twin's gradient",
    }
    return {
        f"gradient of {loss}": {
            **_verdicts(f"{root}/{loss}"),
            **{
                f"{name}: error over budget (below 1 is right)": _line(
                    f"{root}/{loss}/{name}/error_over_budget"
                )
                for name in inputs
            },
            **{
                f"{name}: {title}": _line(f"{root}/{loss}/{name}/{error}")
                for name in inputs
                for error, title in errors.items()
            },
        }
        for loss, inputs in losses.items()
    }


def gradcheck_charts(losses: list[str]) -> dict[str, Any]:
    """Per loss a category: verdicts, and the errors against finite differences."""
    return {
        f"gradient of {loss} by finite differences": {
            **_verdicts(f"gradcheck/{loss}"),
            "largest relative error": _line(f"gradcheck/{loss}/max_rel_error"),
            "largest absolute error": _line(f"gradcheck/{loss}/max_abs_error"),
        }
        for loss in losses
    }


def _verdicts(tag: str) -> dict[str, Any]:
    # a line each: the page gives all lines of a run one colour
    return {
        "verdicts: 1 right, 0 not checked, -1 wrong": _line(f"{tag}/verdict"),
        "checks run so far": _line(f"{tag}/run"),
        "checks failed so far": _line(f"{tag}/failed"),
        "not checked so far": _line(f"{tag}/skipped"),
    }


def _line(tag: str) -> list[Any]:
    return ["Multiline", [tag]]


def add_row_errors(
    writer: Any, tag: str, report: GradientReport, inputs: Any, step: int, figure: bool
) -> None:
    """A histogram of the rows' errors (log10), and perhaps a figure of what they go with."""
    rows = {n.split(".", 1)[-1]: t.detach().double() for n, t in tensors_in(inputs).items()}
    for name, found in report.inputs.items():
        logarithm = found.row_error.clamp(LOWEST, 1 / LOWEST).nan_to_num(1 / LOWEST).log10().cpu()
        writer.add_histogram(f"{tag}/{name}/log10_row_error", logarithm, step, bins="auto")
        if figure and name in rows and logarithm.numel() > 1:
            drawn = _figure(name, logarithm, rows[name], _partner(name, rows))
            if drawn is not None:
                writer.add_figure(f"{tag}/{name}/row_error", drawn, step)


def _partner(name: str, rows: dict[str, Tensor]) -> Tensor | None:
    """The other input of the same shape, if there is one: the second view, or the key."""
    mine = rows[name]
    others = [t for n, t in rows.items() if n != name and t.shape == mine.shape and t.ndim > 1]
    return others[0] if others else None


def _figure(name: str, logarithm: Tensor, x: Tensor, partner: Tensor | None) -> Any:
    """Row error against norm and, with a partner, similarity; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    panels = {f"norm of the row of {name}": row_norms(x)}
    if partner is not None:
        flat, other = x.flatten(1), partner.flatten(1)
        similarity = torch.nn.functional.cosine_similarity(flat, other)
        panels["cosine similarity with the same row of the other input"] = similarity
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axes, (label, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        axes.plot(values.cpu().numpy(), logarithm.numpy(), ".", markersize=3)
        axes.set_xlabel(label, fontsize="small")
        axes.set_ylabel("log10 of the row's error", fontsize="small")
    return figure
