"""The page of an embedding: one HTML file that opens from disk, with its thumbnails inside.

What it shows is data in JSON; gallery.html beside this file draws it.
"""

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import ImageOps
from torch import Tensor

from experiments.simclr.data import ImageData
from experiments.simclr.evaluation.frozen import spread
from experiments.simclr.evaluation.neighbourhood import Pair

TEMPLATE = Path(__file__).with_name("gallery.html")
THUMBNAIL = 96  # pixels
POINTS = 20_000  # of the map


def page(
    title: str,
    data: ImageData,
    names: Sequence[str],
    classes: Sequence[str] | None,
    neighbours: tuple[Tensor, Tensor],
    pairs: Sequence[Pair],
    points: Tensor,
    settings: dict[str, Any],
) -> str:
    """The whole page.

    Args:
        title: above it.
        data: the images, already streamed.
        names: of all images.
        classes: of all images, where they have classes.
        neighbours: similarities and rows of each image's nearest others.
        pairs: near-duplicates, the most alike first.
        points: (N, 2), where each image lies on the map.
        settings: of experiments.embed.
    """
    similarity, rows = neighbours
    queries = spread(len(names), settings["shown"]).tolist()
    shown_pairs = list(pairs[: settings["shown"]])
    on_map = spread(len(names), POINTS).tolist()
    pictured = {*queries, *(row for query in queries for row in rows[query].tolist())}
    pictured |= {row for pair in shown_pairs for row in (pair.first, pair.second)}
    kinds = sorted(set(classes or []))
    content = {
        "title": title,
        "count": len(names),
        "pairs_in_all": len(pairs),
        "threshold": settings["duplicates"],
        "map": settings["map"].upper(),
        "classes": kinds,
        # by row: of images that are not shown nothing is here
        "images": {
            row: {
                "name": names[row],
                "class": None if classes is None else kinds.index(classes[row]),
                "address": data.address(row),
                "thumbnail": _thumbnail(data, row),
            }
            for row in sorted(pictured)
        },
        "neighbours": [
            [row, [[o, round(s, 4)] for o, s in zip(*pair, strict=True)]]
            for row in queries
            for pair in [(rows[row].tolist(), similarity[row].tolist())]
        ],
        "pairs": [
            [p.first, p.second, round(p.pixels, 4), p.mirrored, round(p.features, 4)]
            for p in shown_pairs
        ],
        "points": [
            [
                row,
                round(x, 5),
                round(y, 5),
                names[row],
                kinds.index(classes[row]) if classes else -1,
            ]
            for row, (x, y) in zip(on_map, points[on_map].tolist(), strict=True)
        ],
    }
    # a file's name may hold what ends a script; JSON has another way to write it
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{title}}", escape(title)).replace("{{content}}", text)


def _thumbnail(data: ImageData, row: int) -> str:
    """A data URI."""
    image = ImageOps.contain(data.picture(row, THUMBNAIL), (THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
