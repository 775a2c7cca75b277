"""The picture of a loss's curve and its twin's, from runs of train.py."""

import sys

import numpy as np
from PIL import Image

from experiments import loss_curves


def test_two_curves_become_a_picture_and_a_line(train, tmp_path, monkeypatch, capsys):
    """From two short runs of train.py, in this process, which a second call does not repeat."""
    commands = []

    def run(command, **how):
        commands.append(command)
        assert command[:2] == [sys.executable, "train.py"]
        assert train(*command[2:]).status == 0

    monkeypatch.setattr(loss_curves.subprocess, "run", run)
    monkeypatch.setattr(loss_curves, "PRECISIONS", ("64-true",))
    picture = tmp_path / "curves.png"
    arguments = ["--losses", "cosine_embedding", "--logs", str(tmp_path), "--out", str(picture)]
    small = ["data=random_images", "data.batch_size=32", "trainer.max_epochs=1"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["loss_curves", *arguments, *small])
        loss_curves.main()
    assert len(commands) == 2
    said = capsys.readouterr().out
    assert "cosine_embedding, 64-true: 4 steps, at most 0.0e+00 apart" in said
    with Image.open(picture) as found:
        assert min(found.size) > 300


def test_the_difference_is_drawn_relative_and_above_what_is_recorded():
    twin = np.array([1.0, 2.0, 4.0])
    figure = loss_curves.figure_of({"x": {"32-true": (twin * [1, 1.5, 1], twin)}})
    above, below = figure.axes
    assert [line.get_label() for line in above.lines] == ["loss=x", "its twin"]
    drawn = below.lines[0].get_ydata()
    assert drawn.tolist() == [loss_curves.RESOLUTION, 0.5, loss_curves.RESOLUTION]
