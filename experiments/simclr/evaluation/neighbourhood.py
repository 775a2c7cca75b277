"""Which images are alike by their features, and where they lie on a map.

Shapes: features (N, F), float32; similarities and rows (N, K); map (N, 2).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.simclr.evaluation import probes
from experiments.simclr.program.errors import UserError

FEWEST_FOR_UMAP = 10  # below, its spectral beginning has no solution


@dataclass(frozen=True)
class Pair:
    """Two rows that are alike.

    Args:
        first: a row.
        second: a later one.
        pixels: how alike their pixels are, 1 for the same: see `near_duplicates`.
        mirrored: whether they are so with one of them mirrored.
        features: cosine of their features.
    """

    first: int
    second: int
    pixels: float
    mirrored: bool
    features: float


def nearest_others(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and rows of each row's k nearest others, the nearest first.

    Example:
        >>> similarity, rows = nearest_others(torch.tensor([[1.0, 0], [0, 1], [1, 0.1]]), k=1)
        >>> rows.flatten().tolist()
        [2, 2, 0]
    """
    k = min(k, len(features) - 1)
    similarity, rows = probes.nearest(features, features, k + 1)
    itself = rows == torch.arange(len(rows), device=rows.device)[:, None]
    itself[~itself.any(1), -1] = True  # beyond k + 1 rows that are all the same
    return similarity[~itself].view(-1, k), rows[~itself].view(-1, k)


def near_duplicates(features: Tensor, grey: Tensor, threshold: float, k: int = 8) -> list[Pair]:
    """Pairs whose pixels are alike by at least the threshold, the most alike first.

    Pixels are judged, not features, which an encoder may give to many images alike: by the
    correlation of coarse grey, which another size, compression, brightness or contrast hardly
    changes, the larger of the two ways round. The k nearest of each row are looked at, by pixels
    and by features.

    Args:
        grey: coarse pixels, (N, S, S), uint8.
    """
    units = F.normalize(features, dim=1)
    ways = _shapes(grey), _shapes(grey.flip(2))
    found = [nearest_others(ways[0], k)[1], nearest_others(units, k)[1]]
    found.append(probes.nearest(*ways, k + 1)[1])
    first = torch.cat(
        [torch.arange(len(rows))[:, None].expand_as(rows).flatten() for rows in found]
    )
    second = torch.cat([rows.flatten() for rows in found])
    candidates = torch.stack([first, second]).sort(0).values[:, first != second].unique(dim=1)
    pairs = []
    for chunk in candidates.split(65536, dim=1):
        a, b = chunk
        straight, mirrored = ((ways[0][a] * way[b]).sum(1) for way in ways)
        pixels = torch.maximum(straight, mirrored).clamp(-1, 1)
        alike = (units[a] * units[b]).sum(1).clamp(-1, 1)
        columns = a, b, pixels, mirrored > straight + 1e-4, alike
        kept = pixels >= threshold
        pairs += [Pair(*r) for r in zip(*(c[kept].tolist() for c in columns), strict=True)]
    return sorted(pairs, key=lambda pair: (-pair.pixels, pair.first, pair.second))


def _shapes(grey: Tensor) -> Tensor:
    """Vectors of norm 1 whose products are the images' correlations, (N, S * S + 2)."""
    pixels = grey.flatten(1).float()
    mean = pixels.mean(1, keepdim=True)
    # below two levels of contrast brightness decides: an even image has no shape but its noise's
    angle = mean / 255 * math.pi / 2
    floor = 2 * pixels.shape[1] ** 0.5
    shapes = torch.cat([pixels - mean, floor * angle.cos(), floor * angle.sin()], dim=1)
    return F.normalize(shapes, dim=1)


def flat_map(features: Tensor, method: str) -> Tensor:
    """The rows in two dimensions.

    Args:
        method: "pca", the two principal components of the features of norm 1; "umap", McInnes et
            al. 2018, which keeps neighbours together, by cosine, the same in every run.
    """
    units = F.normalize(features, dim=1)
    if method == "umap":
        return _umap(units)
    centred = (units - units.mean(0)).double()
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes.flip(1)[:, :2]
    # an axis has no direction: that of its largest entry, the same everywhere
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    points = (centred @ (axes * signs)).float()
    return F.pad(points, (0, 2 - points.shape[1]))


def _umap(units: Tensor) -> Tensor:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError('map=umap needs the extra embed: pip install -e ".[embed]"') from error
    neighbours = min(15, len(units) - 1)
    # one thread, which the seed asks for
    model = UMAP(n_neighbors=neighbours, metric="cosine", random_state=0, n_jobs=1)
    return torch.from_numpy(model.fit_transform(units.numpy())).float()
