"""Pictures, by the pixels and words that a person looks at."""

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.simclr.evaluation.pictures import (
    OTHER,
    SAME,
    confusion_figure,
    neighbour_figure,
    view_figure,
)


def drawn(figure):
    """The figure's pixels, (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def count(pixels, colour):
    return int((pixels == np.array(colour)).all(-1).sum())


def test_neighbours_are_framed_by_class():
    queries = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    neighbours = torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8)
    names = ["cat", "dog"]
    same = torch.tensor([[True, True, True], [True, True, False]])
    figure = neighbour_figure(queries, neighbours, names, same)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    pixels = drawn(figure)
    assert 4 < count(pixels, SAME) / count(pixels, OTHER) < 6
    plain = drawn(neighbour_figure(queries, neighbours))
    assert count(plain, SAME) == count(plain, OTHER) == 0


def test_neighbours_lie_beside_their_query():
    red, blue = (torch.tensor(c, dtype=torch.uint8)[:, None, None] for c in ([9, 0, 0], [0, 0, 9]))
    queries = torch.stack([red.expand(3, 8, 8), blue.expand(3, 8, 8)])
    neighbours = queries[:, None].expand(2, 2, 3, 8, 8)
    figure = neighbour_figure(queries, neighbours)
    canvas = figure.axes[0].images[0].get_array()
    top, bottom = canvas[: len(canvas) // 2], canvas[len(canvas) // 2 :]
    assert count(top, (9, 0, 0)) == count(bottom, (0, 0, 9)) == 3 * 64
    assert count(top, (0, 0, 9)) == count(bottom, (9, 0, 0)) == 0


def test_confusion_has_true_classes_in_rows_as_shares():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    predicted = torch.tensor([0, 0, 0, 1, 1, 1])
    figure = confusion_figure(labels, predicted, ["cat", "dog", "eel"])
    (axes,) = figure.axes
    shares = axes.images[0].get_array()
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert "75%" in {text.get_text() for text in axes.texts}
    assert axes.get_ylabel() == "True label"


def test_views_lie_below_their_image_without_the_tails():
    images = torch.full((3, 3, 8, 8), 40, dtype=torch.uint8)
    dark, bright = -2 * torch.ones(3, 3, 8, 8), 3 * torch.ones(3, 3, 8, 8)
    dark[0, 0, 0, 0], bright[0, 0, 0, 0] = -1000, 1000
    figure = view_figure(images, dark, bright)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["image", "view 1", "view 2"]
    canvas = axes.images[0].get_array()
    centres = [int(y) for y in axes.get_yticks()]
    x = canvas.shape[1] // 2
    assert [canvas[y, x].tolist() for y in centres] == [[40] * 3, [0] * 3, [255] * 3]


def test_dollars_in_a_class_name_are_dollars():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    names = ["$5 to $9", r"$\frac"]
    drawn(neighbour_figure(images, images[:, None], names))
    labels = torch.tensor([0, 1])
    figure = confusion_figure(labels, labels, names)
    drawn(figure)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [text.replace(r"\$", "$") for text in shown] == names
