"""What a person sees: TensorBoard, asked through its HTTP interface about a short run."""

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback
from tests.callbacks import planted
from tests.callbacks.runs import train

TAG = "gradient_discrepancy"
INPUTS = ("z1", "z2", "value")
NUMBERS = (
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
GRADCHECK = ("passed", "max_abs_error", "max_rel_error", "degenerate")
COUNTS = ("run", "failed", "skipped", "verdict", "seconds")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(path, **query) is TensorBoard's answer about a run whose gradient goes wrong."""
    path = tmp_path_factory.mktemp("run")
    checks = [GradcheckCallback(20), GradientDiscrepancyCallback(20)]
    logger = TensorBoardLogger(path, name="", version="")
    with pytest.warns(UserWarning, match="is wrong in batch 40"):
        train(planted.LateLoss(), checks, path, batches=41, logger=logger)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(path), "--port", "0"]
    command += ["--host", "127.0.0.1", "--load_fast", "false", "--reload_interval", "1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in server.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            if found:
                break
        else:
            pytest.fail("tensorboard did not start")

        def get(path, **query):
            url = f"{found.group()}data/plugin/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                body = answer.read()
            return json.loads(body) if path != "images/individualImage" else body

        yield get
    finally:
        server.terminate()
        server.wait(timeout=30)
        server.stdout.close()


def test_the_scalars_have_the_documented_tags(ask):
    (tags,) = ask("scalars/tags").values()
    ours = {tag for tag in tags if tag.startswith("grad")}
    assert ours == {f"gradcheck/loss/{name}" for name in (*GRADCHECK, *COUNTS)} | {
        *(f"gradient_discrepancy/loss/{x}/{name}" for x in INPUTS for name in NUMBERS),
        *(f"gradient_discrepancy/loss/{name}" for name in COUNTS),
    }


def test_the_curve_shows_when_and_which(ask):
    def curve(tag):
        points = ask("scalars/scalars", run=".", tag=f"gradient_discrepancy/loss/{tag}")
        return [value for _, _, value in points]

    analytic, autograd = curve("z1/analytic_vs_float64"), curve("z1/autograd_vs_float64")
    assert max(analytic[:-1]) < 1e-5
    assert analytic[-1] == pytest.approx(0.1, rel=1e-3)
    assert max(autograd) < 1e-5
    assert max(curve("z2/analytic_vs_float64")) < 1e-5
    passed = ask("scalars/scalars", run=".", tag="gradcheck/loss/passed")
    assert [value for _, _, value in passed] == [1, 1, 0]
    assert [step for _, step, _ in passed] == [0, 20, 40]


def test_a_failure_is_a_table_and_a_command(ask):
    (tags,) = ask("text/tags").values()
    assert {f"{tag}/loss/failure/text_summary" for tag in ("gradcheck", TAG)} <= set(tags)
    (event,) = ask("text/text", run=".", tag=f"{TAG}/loss/failure/text_summary")
    assert "<table>" in event["text"]
    assert "0.9 times the right one" in event["text"]
    assert "python -m cosloss.verify --replay" in event["text"]
    assert event["step"] == 40


def test_histograms_of_the_rows_errors(ask):
    points = ask(
        "histograms/histograms", run=".", tag="gradient_discrepancy/loss/z1/log10_row_error"
    )
    assert [step for _, step, _ in points] == [0, 20, 40]
    lowest, highest = points[-1][2][0][0], points[-1][2][-1][1]
    assert -3 < lowest < highest < 1
    # bars, by what is in them: TensorBoard fills 30 of its own
    assert sum(count > 0 for _, _, count in points[-1][2]) > 3


def test_figures_of_the_rows_errors(ask):
    (tags,) = ask("images/tags").values()
    assert {f"gradient_discrepancy/loss/{x}/row_error" for x in ("z1", "z2")} <= set(tags)
    images = ask("images/images", run=".", sample=0, tag="gradient_discrepancy/loss/z1/row_error")
    assert [image["step"] for image in images] == [0, 20, 40]
    query = dict(urllib.parse.parse_qsl(images[-1]["query"]))
    assert ask("images/individualImage", **query).startswith(b"\x89PNG")


def test_the_page_of_custom_scalars_shows_verdicts_budgets_and_whose_errors(ask):
    categories = {c["title"]: c["chart"] for c in ask("custom_scalars/layout")["category"]}
    said = "3 checks, 1 WRONG, first at step 40"
    assert set(categories) == {
        f"gradient of loss: {said}",
        f"gradient of loss by finite differences: {said}",
    }
    charts = {
        (title.partition(":")[0], chart["title"]): chart["multiline"]["tag"]
        for title, found in categories.items()
        for chart in found
    }
    assert all(len(tags) == 1 for tags in charts.values()), "lines of one colour"

    def values(category, title):
        (tag,) = charts[category, title]
        (points,) = ask("custom_scalars/scalars", run=".", tag=tag)["tag_to_events"].values()
        return [value for _, _, value in points]

    for category in ("gradient of loss", "gradient of loss by finite differences"):
        assert values(category, "verdict: 1 right, -1 wrong, 0 not checked") == [1, 1, -1]
        assert values(category, "checks failed so far") == [0, 0, 1]
    for name in ("z1", "z2"):
        shown = values("gradient of loss", f"{name}: error over budget (wrong above 1)")
        assert [error < 1 for error in shown] == [True, True, name == "z2"]
        titles = "training's gradient (analytic)", "its twin's gradient (autograd)"
        analytic, autograd = (
            values("gradient of loss", f"{name}: error of {title}") for title in titles
        )
        budget = values("gradient of loss", f"{name}: error that is allowed (budget)")
        assert [a < b for a, b in zip(analytic, budget, strict=True)] == [x < 1 for x in shown]
        assert all(a < b for a, b in zip(autograd, budget, strict=True))


def test_the_verdict_is_in_words_with_the_last_checks_table(ask):
    for title in ("gradient of loss", "gradient of loss by finite differences"):
        events = ask("text/text", run=".", tag=f"Overview/{title}/text_summary")
        assert [event["step"] for event in events] == [0, 20, 40]
        assert "<strong>1 check, right</strong>" in events[0]["text"]
        assert "<strong>3 checks, 1 WRONG, first at step 40</strong>" in events[-1]["text"]
        assert "<table>" in events[-1]["text"]


def test_the_first_page_begins_with_a_figure_per_input(ask):
    (tags,) = ask("images/tags").values()
    first = {tag for tag in tags if tag.startswith("Overview/")}
    assert first == {f"Overview/gradient of loss on {name}" for name in ("z1", "z2")}
    images = ask("images/images", run=".", sample=0, tag="Overview/gradient of loss on z1")
    assert [image["step"] for image in images] == [0, 20, 40]
    for image in images:
        png = ask("images/individualImage", **dict(urllib.parse.parse_qsl(image["query"])))
        # TensorBoard shows such pictures as they are
        assert [int.from_bytes(png[i : i + 4]) for i in (16, 20)] == [350, 215]
