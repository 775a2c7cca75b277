"""Pictures of views and of evaluations. Shapes: images (N, 3, H, W), uint8; labels (N,), int64."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

# TensorBoard scales, by repeating and leaving out pixels, what is not 350 of them wide
WIDTH, DPI, LETTERS = 3.5, 100, 8
SAME, OTHER, PLAIN = (0, 114, 178), (213, 94, 0), (255, 255, 255)  # told apart by the colour-blind


def view_figure(images: Tensor, view1: Tensor, view2: Tensor) -> Figure:
    """Images in the first row, their two views below.

    Args:
        images: (N, 3, H, W), uint8.
        view1: (N, 3, H, W), floating point at any scale.
        view2: likewise.
    """
    views = torch.stack([view1, view2]).float().cpu()
    # without the tails, or one pixel's noise would take all contrast away
    low, high = (views.flatten().kthvalue(_rank(views, share)).values for share in (0.005, 0.995))
    shown = (255 * (views - low) / (high - low)).clamp(0, 255).to(torch.uint8)
    figure, axes, _ = _tiles(torch.cat([images.cpu()[None], shown]))
    axes.set_yticks(axes.get_yticks(), ["image", "view 1", "view 2"], fontsize=LETTERS)
    return figure


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
    frames = None
    if same is not None:
        frames = [[PLAIN, *(SAME if is_same else OTHER for is_same in row)] for row in same]
    figure, axes, columns = _tiles(torch.cat([queries[:, None], neighbours], dim=1).cpu(), frames)
    if names is not None:
        axes.set_yticks(axes.get_yticks(), _plain(names), fontsize=LETTERS)
    axes.set_xticks(columns, ["test", *map(str, range(1, len(columns)))], fontsize=LETTERS)
    axes.xaxis.tick_top()
    title = "test images, nearest training images"
    if same is not None:
        title += "\nblue: of the same class, orange: of another"
    figure.suptitle(title, fontsize=LETTERS)
    return figure


def confusion_figure(labels: Tensor, predicted: Tensor, names: Sequence[str]) -> Figure:
    """The linear probe's classes against the true ones, as shares of each true class."""
    size = min(max(WIDTH, 0.22 * len(names) + 0.8), 16.0)  # of many classes, to be enlarged
    figure = Figure(figsize=(size, size), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    longest = max(map(len, names))
    display = ConfusionMatrixDisplay.from_predictions(
        labels.numpy(),
        predicted.numpy(),
        labels=range(len(names)),
        display_labels=_plain(names),
        normalize="true",
        values_format=".0%",
        include_values=len(names) <= 20,
        text_kw={"fontsize": LETTERS - 2},
        xticks_rotation="horizontal" if longest <= 3 else "vertical",
        cmap="Blues",
        im_kw={"vmin": 0, "vmax": 1},
        colorbar=False,
        ax=axes,
    )
    if display.text_ is not None:
        for text, share in zip(display.text_.flat, display.confusion_matrix.flat, strict=True):
            text.set(color="white" if share > 0.5 else "black", visible=share >= 0.005)
    axes.tick_params(labelsize=LETTERS, length=2)
    axes.xaxis.label.set_size(LETTERS)
    axes.yaxis.label.set_size(LETTERS)
    figure.suptitle("linear probe on the test part\nshare of each true class", fontsize=LETTERS)
    return figure


def _plain(names: Sequence[str]) -> list[str]:
    """The names without a meaning for matplotlib, which reads mathematics between dollars."""
    return [name.replace("$", r"\$") for name in names]


def _tiles(
    images: Tensor, frames: Sequence[Sequence[tuple[int, int, int]]] | None = None
) -> tuple[Figure, Axes, list[float]]:
    """Images (R, C, 3, H, W) in rows and columns, with a tick per row; the columns' centres."""
    rows, columns, _, height, width = images.shape
    frame = max(1, height // 16)
    pitch_y, pitch_x = height + 4 * frame, width + 4 * frame
    canvas = torch.full((rows * pitch_y, columns * pitch_x, 3), 255, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            y, x = i * pitch_y + frame, j * pitch_x + frame
            tile = canvas[y : y + height + 2 * frame, x : x + width + 2 * frame]
            if frames is not None:
                tile[:] = torch.tensor(frames[i][j], dtype=torch.uint8)
            tile[frame:-frame, frame:-frame] = images[i, j].permute(1, 2, 0)
    inches = (WIDTH - 0.5) / columns
    figure = Figure(figsize=(WIDTH, inches * rows + 0.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas.numpy(), interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks([(i + 0.5) * pitch_y for i in range(rows)], [""] * rows)
    axes.set_xticks([])
    return figure, axes, [(j + 0.5) * pitch_x for j in range(columns)]


def _rank(values: Tensor, share: float) -> int:
    return 1 + round(share * (values.numel() - 1))
