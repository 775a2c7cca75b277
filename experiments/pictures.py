"""Pictures of views and of evaluations. Shapes: images (N, 3, H, W), uint8; labels (N,), int64."""

from collections.abc import Sequence

import torch
import torchvision
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

SAME, OTHER, PLAIN = (0, 114, 178), (213, 94, 0), (255, 255, 255)  # told apart by the colour-blind


def view_grid(view1: Tensor, view2: Tensor) -> Tensor:
    """Pairs of views side by side, (3, height, width) in [0, 1]."""
    pairs = torch.stack([view1, view2], dim=1).flatten(0, 1).float().cpu()
    return torchvision.utils.make_grid(pairs, nrow=8, normalize=True, scale_each=False, padding=1)


def neighbour_figure(
    queries: Tensor,
    neighbours: Tensor,
    names: Sequence[str] | None = None,
    same: Tensor | None = None,
) -> Figure:
    """One row per query: the query, then its neighbours, framed by whether the class is its own.

    Args:
        queries: (Q, 3, H, W), uint8.
        neighbours: (Q, K, 3, H, W), uint8.
        names: each query's class.
        same: (Q, K), whether the neighbour's class is the query's.
    """
    tiles = torch.cat([queries[:, None], neighbours], dim=1)
    rows, columns, _, height, width = tiles.shape
    frame = max(1, height // 16)
    pitch_y, pitch_x = height + 4 * frame, width + 4 * frame
    canvas = torch.full((rows * pitch_y, columns * pitch_x, 3), 255, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            colour = PLAIN
            if same is not None and j > 0:
                colour = SAME if same[i, j - 1] else OTHER
            y, x = i * pitch_y + frame, j * pitch_x + frame
            outer = canvas[y : y + height + 2 * frame, x : x + width + 2 * frame]
            outer[:] = torch.tensor(colour, dtype=torch.uint8)
            outer[frame:-frame, frame:-frame] = tiles[i, j].permute(1, 2, 0)
    figure = Figure(figsize=(0.8 * columns + 1, 0.8 * rows + 0.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas.numpy(), interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks([(i + 0.5) * pitch_y for i in range(rows)], names or [""] * rows)
    places = [(j + 0.5) * pitch_x for j in range(columns)]
    axes.set_xticks(places, ["test image", *map(str, range(1, columns))])
    axes.xaxis.tick_top()
    title = "nearest training images"
    if same is not None:
        title += ": blue of the same class, orange of another"
    axes.set_title(title, fontsize="medium")
    return figure


def confusion_figure(labels: Tensor, predicted: Tensor, names: Sequence[str]) -> Figure:
    """The linear probe's classes against the true ones, as shares of each true class."""
    size = min(max(5.0, 0.45 * len(names) + 1.5), 16.0)
    figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
    axes = figure.subplots()
    longest = max(map(len, names))
    ConfusionMatrixDisplay.from_predictions(
        labels.numpy(),
        predicted.numpy(),
        labels=range(len(names)),
        display_labels=names,
        normalize="true",
        values_format=".0%",
        include_values=len(names) <= 20,
        text_kw={"fontsize": "small"},
        xticks_rotation="horizontal" if longest <= 3 else "vertical",
        cmap="Blues",
        im_kw={"vmin": 0, "vmax": 1},
        colorbar=False,
        ax=axes,
    )
    axes.set_title("linear probe on the test part, share of each true class", fontsize="medium")
    return figure
