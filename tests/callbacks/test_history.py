"""What the checks found so far: words, when it is drawn, what a checkpoint keeps of it."""

import math
from types import SimpleNamespace

import pytest
import torch

from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback, tensorboard
from cosloss.callbacks.history import MOST, History, Point
from cosloss.watch.finding import Finding
from tests.callbacks import planted
from tests.callbacks.runs import train


def finding(verdict="right", error=1e-7):
    errors = {"analytic_vs_float64": error, "autograd_vs_float64": 2e-7, "budget": 1e-6}
    found = SimpleNamespace(passed=verdict == "right", **errors)
    return Finding(verdict, "", report=SimpleNamespace(inputs={"z1": found}))


def history_of(*verdicts):
    history = History()
    for step, verdict in enumerate(verdicts):
        history.add(finding(verdict) if verdict != "not checked" else Finding(verdict, ""), step)
    return history


def test_words():
    assert str(History()) == "no check yet"
    assert str(history_of("not checked")) == "NOT CHECKED"
    assert str(history_of("right")) == "1 check, right"
    assert str(history_of("right", "right", "not checked")) == "2 checks, all right, 1 not made"
    assert str(history_of("right", "wrong", "wrong")) == "3 checks, 2 WRONG, first at step 1"
    there = history_of("right")
    there.wrong_elsewhere = True
    assert str(there) == "1 check, right, WRONG on another process"


def test_figures_are_few():
    history, drawn, wrong_drawn = History(), [], []
    for step in range(1, 101):
        history.add(finding(), step)
        drawn += [step] if history.is_worth_drawing(finding()) else []
    assert drawn == [1, 2, 4, 8, 16, 32, 64]
    for step in range(1, 28):
        history.add(finding("wrong"), step)
        wrong_drawn += [step] if history.is_worth_drawing(finding("wrong")) else []
    assert wrong_drawn == [1, 2, 4, 8, 16]


def test_a_long_history_stays_small_and_keeps_the_worst():
    history = History()
    for step in range(10 * MOST):
        wrong = step == 4321
        history.add(finding("wrong" if wrong else "right", math.nan if wrong else 1e-7), step)
    points = history.points["z1"]
    assert MOST / 2 <= len(points) <= MOST
    assert [p.step for p in points if not p.right] == [4321]
    assert [p.step for p in points] == sorted({p.step for p in points})
    assert points[-1].step == 10 * MOST - 1
    assert str(history) == f"{10 * MOST} checks, 1 WRONG, first at step 4321"


def test_a_checkpoint_keeps_it(tmp_path):
    history = history_of("right", "wrong", "not checked")
    torch.save(history.state(), tmp_path / "state.pt")
    assert History.from_state(torch.load(tmp_path / "state.pt", weights_only=True)) == history


def test_a_resumed_run_goes_on_with_it(tmp_path):
    def checked():
        return GradientDiscrepancyCallback(2)

    first = checked()
    train(planted.LateLoss(), [first], tmp_path, batches=5)
    again = checked()
    again.load_state_dict(first.state_dict())
    assert again.histories == first.histories
    assert str(again.histories["loss"]) == "3 checks, all right"


def test_a_failure_on_another_process_is_said_once_and_at_once():
    said = []

    class Writer:
        def add_text(self, tag, text, step):
            said.append((tag, text, step))

        def add_custom_scalars(self, page):
            said.append(list(page))

    check = GradcheckCallback()
    check.histories["loss"] = history_of("right")
    check._last["loss"] = 0, "table"
    check.watch = SimpleNamespace(act=lambda messages: None, should_stop=False)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: True)
    loggers = [SimpleNamespace(experiment=Writer())]
    trainer = SimpleNamespace(strategy=strategy, should_stop=False, loggers=loggers)
    for _ in range(2):
        check._share_verdict(trainer, [])
    title, words = (
        "gradient of loss by finite differences",
        "1 check, right, WRONG on another process",
    )
    assert said == [(f"Overview/{title}", f"**{words}**\n\ntable", 0), [f"{title}: {words}"]]


@pytest.mark.parametrize("errors", [(1e-7, 3e-7), (0.0, 0.0), (math.nan, 1e-7), (math.inf, 0.0)])
def test_a_figure_says_which_line_is_which(errors):
    right = errors[0] < 1e-6
    points = [Point(0, 1e-8, 1e-8, 1e-6, True), Point(50, *errors, 1e-6, right)]
    figure = tensorboard._error_curves("gradient of loss on z1", points)
    words = [text.get_text() for text in figure.texts]
    verdict = "2 checks, all right" if right else "2 checks, 1 WRONG, first at step 50"
    assert words == ["gradient of loss on z1", verdict]
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["allowed", "autograd", "analytic", *([] if right else ["wrong"])]
    (axes,) = figure.axes
    assert len({line.get_color() for line in axes.lines}) == len(named)
    low, high = axes.get_ylim()
    for line in axes.lines:  # also what has no logarithm
        assert all(low < y < high for y in line.get_ydata())
    allowed, _, analytic = axes.lines[:3]
    assert (analytic.get_ydata()[1] < allowed.get_ydata()[1]) == right


def is_whole(figure):
    box = figure.get_tightbbox()  # in inches
    return box.x0 >= 0 and box.y0 >= 0 and all(box.max <= figure.get_size_inches())


def test_steps_are_whole_numbers():
    points = [Point(step, 1e-8, 1e-7, 1e-6, True) for step in range(21)]
    (axes,) = tensorboard._error_curves("gradient of loss on z1", points).axes
    assert all(step == round(step) for step in axes.get_xticks())


@pytest.mark.parametrize("worst", [2e-7, 1e-30, 3e8])
def test_nothing_of_a_figure_is_cut_off(worst):
    points = [Point(step, worst, 1e-7, 1e-6, worst < 1e-6) for step in range(0, 100_000, 20_000)]
    assert is_whole(tensorboard._error_curves("gradient of criterion on embedding1", points))
    rows, partner = torch.randn(2, 64, 16)
    logarithm = torch.linspace(-7.4, -6, 64)
    assert is_whole(tensorboard._row_errors("embedding1", logarithm, rows, partner))
    assert is_whole(tensorboard._row_errors("embedding1", logarithm, rows, None))


def test_many_inputs_have_few_figures_and_the_wrong_one_is_among_them():
    right, wrong = Point(0, 1e-8, 1e-8, 1e-6, True), Point(0, 1.0, 1e-8, 1e-6, False)
    points = {f"x{i}": [right if i != 30 else wrong] for i in range(40)}
    drawn = {}
    writer = SimpleNamespace(add_figure=lambda tag, figure, step: drawn.update({tag: figure}))
    tensorboard.add_error_curves(writer, "loss", History(39, 1, points=points), 0)
    assert len(drawn) == tensorboard.FIGURES
    assert "Overview/gradient of loss on x30" in drawn


def test_a_source_of_charts_replaces_its_own():
    pages = []

    class Writer:
        def add_custom_scalars(self, page):
            pages.append(list(page))

    writer = Writer()
    tensorboard.add_layout(writer, "run", {"training": {}})
    tensorboard.add_layout(writer, "gradcheck", {"gradient: 1 check, right": {}})
    tensorboard.add_layout(writer, "gradcheck", {"gradient: 2 checks, all right": {}})
    assert pages[-1] == ["gradient: 2 checks, all right", "training"]
