"""What the checks show on TensorBoard beside their scalars."""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cosloss.callbacks.history import History, Point
from cosloss.gradient_check.nests import tensors_in
from cosloss.gradient_check.report import GradientReport, row_norms

LOWEST = 1e-20  # an exact row, on a logarithmic axis
# TensorBoard scales, by repeating and leaving out pixels, what is not 350 x 215 of them
WIDTH, HEIGHT, DPI, LETTERS = 3.5, 2.15, 100, 8
FIGURES = 4  # per loss: one takes 50 ms
# told apart by the colour-blind, and by their marks
ANALYTIC, AUTOGRAD, WRONG = "#0072b2", "#e69f00", "#d00000"

_layouts: WeakKeyDictionary[Any, dict[str, dict[str, Any]]] = WeakKeyDictionary()


def add_layout(writer: Any, source: str, categories: dict[str, Any]) -> None:
    """Put a source's categories of charts on the writer's page of custom scalars.

    A writer's own `add_custom_scalars` replaces the page that is there; this replaces what the
    same source has put on it, and a new source comes before the others.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter.
        source: whose categories these are.
        categories: as `add_custom_scalars` takes them: {category: {chart: [kind, [tag, ...]]}}.
    """
    sources = _layouts.setdefault(writer, {})
    if source not in sources:
        _layouts[writer] = sources = {source: categories, **sources}
    sources[source] = categories
    page: dict[str, Any] = {}
    for each in sources.values():
        page |= each
    writer.add_custom_scalars(page)


def discrepancy_charts(losses: dict[str, History]) -> dict[str, Any]:
    """Per loss a category that says the verdict: error over budget, then each number by itself."""
    # a line each: the page gives all lines of a run one colour
    numbers = {
        "analytic_vs_float64": "error of training's gradient (analytic)",
        "autograd_vs_float64": "error of its twin's gradient (autograd)",
        "budget": "error that is allowed (budget)",
    }
    page: dict[str, Any] = {}
    for loss, history in losses.items():
        tag = f"gradient_discrepancy/{loss}"
        charts = {"verdict: 1 right, -1 wrong, 0 not checked": _line(f"{tag}/verdict")}
        for name in history.points:
            title = f"{name}: error over budget (wrong above 1)"
            charts[title] = _line(f"{tag}/{name}/error_over_budget")
        for name in history.points:
            for number, title in numbers.items():
                charts[f"{name}: {title}"] = _line(f"{tag}/{name}/{number}")
        page[f"gradient of {loss}: {history}"] = charts | _counts(tag)
    return page


def gradcheck_charts(losses: dict[str, History]) -> dict[str, Any]:
    """Per loss a category that says the verdict: the errors against finite differences."""
    page: dict[str, Any] = {}
    for loss, history in losses.items():
        tag = f"gradcheck/{loss}"
        charts = {
            "verdict: 1 right, -1 wrong, 0 not checked": _line(f"{tag}/verdict"),
            "largest relative error": _line(f"{tag}/max_rel_error"),
            "largest absolute error": _line(f"{tag}/max_abs_error"),
        }
        page[f"gradient of {loss} by finite differences: {history}"] = charts | _counts(tag)
    return page


def _counts(tag: str) -> dict[str, Any]:
    return {
        "checks run so far": _line(f"{tag}/run"),
        "checks failed so far": _line(f"{tag}/failed"),
        "not checked so far": _line(f"{tag}/skipped"),
    }


def _line(tag: str) -> list[Any]:
    return ["Multiline", [tag]]


def add_error_curves(writer: Any, loss: str, history: History, step: int) -> None:
    """Per input a figure: both gradients' errors and the budget at every check, below the verdict.

    Of many inputs a few, those that were ever wrong first. The capital of their group has the page
    of time series begin with it. Without matplotlib there are none.
    """
    wrong_first = sorted(history.points, key=lambda n: all(p.right for p in history.points[n]))
    for name in wrong_first[:FIGURES]:
        title = f"gradient of {loss} on {name}"
        figure = _error_curves(title, history.points[name])
        if figure is not None:
            writer.add_figure(f"Overview/{title}", figure, step)


def add_row_errors(
    writer: Any, tag: str, report: GradientReport, inputs: Any, step: int, figure: bool
) -> None:
    """A histogram of the rows' errors (log10), and perhaps a figure of what they go with."""
    rows = {n.split(".", 1)[-1]: t.detach().double() for n, t in tensors_in(inputs).items()}
    for name, found in report.inputs.items():
        logarithm = found.row_error.clamp(LOWEST, 1 / LOWEST).nan_to_num(1 / LOWEST).log10().cpu()
        writer.add_histogram(f"{tag}/{name}/log10_row_error", logarithm, step, bins="auto")
        if figure and name in rows and logarithm.numel() > 1:
            drawn = _row_errors(name, logarithm, rows[name], _partner(name, rows))
            if drawn is not None:
                writer.add_figure(f"{tag}/{name}/row_error", drawn, step)


def _partner(name: str, rows: dict[str, Tensor]) -> Tensor | None:
    """The other input of the same shape, if there is one: the second view, or the key."""
    mine = rows[name]
    others = [t for n, t in rows.items() if n != name and t.shape == mine.shape and t.ndim > 1]
    return others[0] if others else None


def _error_curves(title: str, points: list[Point]) -> Any:
    figure = _blank_figure()
    if figure is None:
        return None
    axes = figure.add_axes((0.2, 0.2, 0.76, 0.5))
    numbers = [x for p in points for x in (p.analytic, p.autograd, p.budget)]
    drawable = [x for x in numbers if math.isfinite(x) and x > 0] or [1.0]
    lowest, highest = min(drawable) / 3, max(drawable) * 3

    def draw(points: list[Point], number: str, style: str, **more: Any) -> None:
        # an error of 0 lies on the floor, NaN and infinity on the ceiling
        errors = [getattr(p, number) for p in points]
        errors = [max(x, lowest) if math.isfinite(x) else highest for x in errors]
        axes.plot([p.step for p in points], errors, style, linewidth=1, **more)

    draw(points, "budget", "--", color="black", label="allowed")
    draw(points, "autograd", "s-", color=AUTOGRAD, markersize=3, label="autograd")
    draw(points, "analytic", "o-", color=ANALYTIC, markersize=3, label="analytic")
    wrong = [p for p in points if not p.right]
    if wrong:
        draw(wrong, "analytic", "x", color=WRONG, markersize=6, markeredgewidth=2, label="wrong")
    verdict = History(len(points) - len(wrong), len(wrong), 0, wrong[0].step if wrong else None)
    figure.text(0.5, 0.92, title, fontsize=LETTERS, ha="center")
    colour = WRONG if wrong else "black"
    figure.text(0.5, 0.83, verdict, color=colour, fontsize=LETTERS, weight="bold", ha="center")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.0e}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(lowest / 1.5, highest * 1.5)
    _label(axes, "training step", "relative error")
    figure.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.84),
        ncols=4,
        fontsize=LETTERS,
        frameon=False,
        handlelength=1.5,
        columnspacing=1,
    )
    return figure


def _row_errors(name: str, logarithm: Tensor, x: Tensor, partner: Tensor | None) -> Any:
    """Row error against norm and, with a partner, similarity; None without matplotlib."""
    figure = _blank_figure()
    if figure is None:
        return None
    panels = {f"norm of the row\nof {name}": row_norms(x)}
    if partner is not None:
        flat, other = x.flatten(1), partner.flatten(1)
        similarity = torch.nn.functional.cosine_similarity(flat, other)
        panels["cosine similarity with\nthe row of the other input"] = similarity
    figure.subplots_adjust(0.17, 0.25, 0.96, 0.96)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, values) in zip(all_axes, panels.items(), strict=True):
        axes.plot(values.cpu().numpy(), logarithm.numpy(), ".", markersize=3, color=ANALYTIC)
        _label(axes, label, "log10 of the row's error" if axes is all_axes[0] else "")
    return figure


def _blank_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    return Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LETTERS, labelpad=1)
    axes.set_ylabel(y, fontsize=LETTERS, labelpad=1)
    axes.tick_params(labelsize=LETTERS - 1)
