"""The picture of a loss's curve and its twin's, from runs of train.py."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.studies import loss_curves
from experiments.studies.loss_curves import CONTROL, TWIN, TWIN_64


@pytest.mark.slow
def test_five_runs_become_a_picture_and_three_lines(train, tmp_path, monkeypatch, capsys):
    """Short runs of train.py, in this process, which a second call does not repeat."""
    commands = []

    def run(command, **how):
        commands.append(command)
        assert command[:2] == [sys.executable, "train.py"]
        assert train(*command[2:]).status == 0

    monkeypatch.setattr(loss_curves.subprocess, "run", run)
    picture = tmp_path / "curves.png"
    arguments = ["--losses", "cosine_embedding", "--logs", str(tmp_path), "--out", str(picture)]
    small = ["data=random_images", "data.batch_size=32", "model.encoder.width=4"]
    for _ in range(2):
        monkeypatch.setattr(
            sys, "argv", ["loss_curves", *arguments, *small, "trainer.max_epochs=1"]
        )
        loss_curves.main()
    assert len(commands) == 5
    said = capsys.readouterr().out
    steps = "4 steps, apart by 0.0e+00 in the median, at most 0.0e+00"
    assert f"cosine_embedding beside {TWIN_64}: {steps}" in said
    assert f"cosine_embedding beside {CONTROL}: 4 steps" in said
    with Image.open(picture) as found:
        assert min(found.size) > 300


def test_the_control_is_the_smallest_step_that_one_weight_can_make():
    module = torch.nn.Module()
    module.encoder = torch.nn.Linear(3, 2)
    before = module.encoder.weight.detach().clone()
    loss_curves.MoveOneWeight().on_fit_start(None, module)
    moved = module.encoder.weight.detach() - before
    assert moved.count_nonzero() == 1
    assert 0 < moved[0, 0] <= before[0, 0].abs() * torch.finfo(torch.float32).eps


def test_the_differences_are_drawn_relative_and_above_what_is_recorded():
    twin = np.array([1.0, 2.0, 4.0])
    far, same = (twin * [1, 1.5, 1], twin), (twin, twin)
    figure = loss_curves.figure_of({"x": {TWIN: far, CONTROL: same, TWIN_64: same}})
    left, right = figure.axes
    assert left.get_ylabel() == "x"
    assert [line.get_label() for line in left.lines] == ["loss=X", "loss=X_reference"]
    drawn = [line.get_ydata().tolist() for line in right.lines[:3]]
    floor = loss_curves.RESOLUTION
    assert drawn == [[floor, 0.5, floor], [floor] * 3, [floor] * 3]
    assert [line.get_label() for line in right.lines[:3]] == [TWIN, CONTROL, TWIN_64]


def test_every_loss_that_has_a_twin_is_drawn():
    configs = loss_curves.ROOT / "configs" / "loss"
    twins = {path.stem.removesuffix("_reference") for path in configs.glob("*_reference.yaml")}
    assert set(loss_curves.LOSSES) == twins
