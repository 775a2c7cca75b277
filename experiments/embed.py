"""Embed images: python -m experiments.embed ckpt_path=FILE|RUN|last [data.root=DIR] [out=DIR] ...

Takes the images below DIR, or the run's own, and writes to out, by default the folder `embedding`
in the run's directory:

  embeddings.npy     the encoder's features, float32, a row for each image
  embeddings.csv     file, class, x and y on the map, and the features, in the same order;
                     with table=parquet (extra: embed) embeddings.parquet, the same
  neighbours.csv     the nearest images of each
  duplicates.csv     pairs whose pixels are alike, and how much
  index.html         a page to look at: the map, nearest neighbours, near-duplicates; it opens from
                     disk, and needs no server and no network

Settings: neighbours=8, how many; duplicates=0.95, the correlation of the pixels from which on a
pair is listed; shown=300, images and pairs on the page; map=pca or umap (extra: embed), by default
umap where it is installed; table=csv or parquet; and data=, data.KEY=.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.simclr.program.interruption import end_at_signals

    end_at_signals()

import csv
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.simclr.data import ImageData, ImageFolder
from experiments.simclr.evaluation import gallery
from experiments.simclr.evaluation.neighbourhood import (
    FEWEST_FOR_UMAP,
    Pair,
    flat_map,
    near_duplicates,
    nearest_others,
)
from experiments.simclr.program.command_line import USER_ERRORS, command, one_line_errors
from experiments.simclr.program.errors import UserError
from experiments.simclr.program.quiet import silence_routine_messages
from experiments.simclr.program.saved_run import SavedRun, load_run

SETTINGS = {
    "neighbours": 8,
    "duplicates": 0.95,
    "shown": 300,
    "map": None,
    "table": "csv",
}
CHUNK = 512  # images that are decoded and embedded at a time
COARSE = 16  # side of the grey pixels by which pairs are compared


@dataclass(frozen=True)
class Embedded:
    """All images' names, classes and features, and their pixels in coarse grey."""

    names: list[str]
    classes: list[str] | None
    features: Tensor
    grey: Tensor


def main(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    silence_routine_messages()
    with one_line_errors(expected=(*USER_ERRORS, ValueError, TypeError)):
        run = load_run(_of_a_folder(arguments), SETTINGS)
        settings = checked(run.settings)
        out = Path(run.config.out or run.directory / "embedding")
        if out.exists():
            raise UserError(f"{out} is there already: choose another out=, or remove it")
        data = run.unread_data()
        embedded = embed(run, data)
        pairs = write(run, data, embedded, settings, out)
    print(f"embedded {len(embedded.names):,} images: {embedded.features.shape[1]} features each")
    alike = f"correlate by {settings['duplicates']:g} or more"
    print(f"near-duplicates: the pixels of {len(pairs):,} pairs {alike}")
    print(f"wrote {out}\nlook at it:  {(out / 'index.html').absolute().as_uri()}")


def checked(settings: Any) -> dict[str, Any]:
    """The settings, whole; raises UserError for what they cannot be."""
    settings = dict(settings)
    if settings["map"] is None:
        settings["map"] = "umap" if find_spec("umap") else "pca"
    for name, values in (("map", ("pca", "umap")), ("table", ("csv", "parquet"))):
        if settings[name] not in values:
            raise UserError(f"{name} must be {' or '.join(values)}; got {settings[name]}")
    for name in ("neighbours", "shown"):
        if type(settings[name]) is not int or settings[name] < 1:
            raise UserError(f"{name} must be a whole number of at least 1; got {settings[name]}")
    threshold = settings["duplicates"]
    if type(threshold) not in (int, float) or not -1 <= threshold <= 1:
        raise UserError(f"duplicates must be a correlation from -1 to 1; got {threshold}")
    for name, value, package in (("map", "umap", "umap"), ("table", "parquet", "pyarrow")):
        if settings[name] == value and not find_spec(package):
            raise UserError(f'{name}={value} needs the extra embed: pip install -e ".[embed]"')
    return settings


@torch.no_grad()
def embed(run: SavedRun, data: ImageData) -> Embedded:
    """The features of all images of the data, which are decoded, embedded and let go in turn."""
    run.never_compile()
    on_gpu = torch.cuda.is_available() and run.config.trainer.accelerator != "cpu"
    model: L.LightningModule = run.model().float().to("cuda" if on_gpu else "cpu")
    names: list[str] = []
    features, grey, labels = [], [], []
    for named in data.stream(CHUNK):
        names += named.names
        images = named.part.images
        features.append(model.features(images).cpu())
        grey.append(_coarse(images))
        if named.part.labels is not None:
            labels += named.part.labels.tolist()
    if len(names) < 2:
        raise UserError(f"{len(names)} image has no neighbours: name a folder with more")
    if not all(part.isfinite().all() for part in features):
        raise UserError(f"{run.path} gives features that are no numbers: its training has diverged")
    classes = None
    if labels and data.class_names is not None:
        classes = [data.class_names[label] for label in labels]
    return Embedded(names, classes, torch.cat(features), torch.cat(grey))


def write(
    run: SavedRun, data: ImageData, embedded: Embedded, settings: dict[str, Any], out: Path
) -> list[Pair]:
    """Write the folder `out`, whole or not at all; returns the near-duplicates."""
    features = embedded.features
    similarity, rows = nearest_others(features, settings["neighbours"])
    pairs = near_duplicates(features, embedded.grey, settings["duplicates"])
    if len(features) < FEWEST_FOR_UMAP:
        settings = settings | {"map": "pca"}
    points = flat_map(features, settings["map"])
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.mkdir(parents=True)
    try:
        np.save(temporary / "embeddings.npy", features.numpy())
        write_table = write_parquet if settings["table"] == "parquet" else write_csv
        write_table(temporary / f"embeddings.{settings['table']}", embedded, points)
        _write_rows(
            temporary / "neighbours.csv",
            ("file", "rank", "neighbour", "similarity"),
            _ranked(embedded.names, similarity, rows),
        )
        _write_rows(
            temporary / "duplicates.csv",
            ("file", "duplicate", "pixel_correlation", "mirrored", "similarity"),
            _pairs(embedded.names, pairs),
        )
        page = gallery.page(
            title=f"{data.__class__.__name__} embedded by {run.config.name}, step {run.step:,}",
            data=data,
            names=embedded.names,
            classes=embedded.classes,
            neighbours=(similarity, rows),
            pairs=pairs,
            points=points,
            settings=settings,
        )
        (temporary / "index.html").write_text(page, encoding="utf-8")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return pairs


def write_csv(path: Path, embedded: Embedded, points: Tensor) -> None:
    columns = [f"f{i}" for i in range(embedded.features.shape[1])]
    header = ("file", "class", "x", "y", *columns)
    classes = embedded.classes or [""] * len(embedded.names)
    numbers = torch.cat([points, embedded.features], dim=1).numpy()
    # as text, a float32's shortest that is read back the same
    rows = zip(embedded.names, classes, (row.astype(str) for row in numbers), strict=True)
    _write_rows(path, header, ((name, label, *values) for name, label, values in rows))


def write_parquet(path: Path, embedded: Embedded, points: Tensor) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    flat = pa.array(embedded.features.numpy().reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, embedded.features.shape[1])
    classes = embedded.classes or [None] * len(embedded.names)
    columns = {
        "file": pa.array(embedded.names, pa.string()),
        "class": pa.array(classes, pa.string()),
        "x": pa.array(points[:, 0].numpy()),
        "y": pa.array(points[:, 1].numpy()),
        "embedding": vectors,
    }
    parquet.write_table(pa.table(columns), path)


def _of_a_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments; data.root=DIR of a run that was not trained on a folder asks for one."""
    groups = {argument.partition("=")[0] for argument in arguments}
    if "data.root" in groups and "data" not in groups:
        others = [a for a in arguments if not a.startswith("data.")]
        trained_on = load_run(others, SETTINGS).config.data["_target_"]
        if trained_on.rpartition(".")[2] != ImageFolder.__name__:
            return [*arguments, "data=image_folder"]
    return list(arguments)


def _coarse(images: Tensor) -> Tensor:
    """Grey pixels of uint8 images, (N, COARSE, COARSE), uint8."""
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), COARSE)
    return grey.round().squeeze(1).to(torch.uint8)


def _ranked(names: Sequence[str], similarity: Tensor, rows: Tensor) -> Iterable[tuple[Any, ...]]:
    for name, alike, others in zip(names, similarity.tolist(), rows.tolist(), strict=True):
        for rank, (value, other) in enumerate(zip(alike, others, strict=True), 1):
            yield name, rank, names[other], f"{value:.6f}"


def _pairs(names: Sequence[str], pairs: Iterable[Pair]) -> Iterable[tuple[Any, ...]]:
    for p in pairs:
        mirrored = "yes" if p.mirrored else "no"
        yield names[p.first], names[p.second], f"{p.pixels:.6f}", mirrored, f"{p.features:.6f}"


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    with command():
        main(sys.argv[1:])
