"""Anybody's own images, in a folder."""

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import ImageOps
from torch import Tensor

from experiments.simclr.data.base import Batches, ImageData, Named, Part, split
from experiments.simclr.data.decoding import DecodedBatches
from experiments.simclr.data.image_file import ValueRanges, read
from experiments.simclr.data.layout import Image, Layout, printable, read_layout, readable
from experiments.simclr.program.errors import UserError

CLASSES_SHOWN = 12


@dataclass(frozen=True)
class Files:
    """Paths of images and their labels, if they have any."""

    paths: list[Path]
    labels: Tensor | None

    def __getitem__(self, index: Tensor) -> "Files":
        labels = None if self.labels is None else self.labels[index]
        return Files([self.paths[i] for i in index.tolist()], labels)

    def __len__(self) -> int:
        return len(self.paths)


class ImageFolder(ImageData):
    """The images below a folder, resized and cropped about their centre to a square.

    Where `root` has a folder train/, the parts are its folders train/, val/ and test/, whose names
    may be others that say so; a missing val/ or test/ is a tenth of train/. Elsewhere all images
    are one pool, of which a tenth validates and a tenth tests. In a pool two or more folders that
    hold images, at any depth, are the classes; with fewer the images have no labels. The draws are
    the same in every run. What was understood is printed: `layout.py` beside this has the rules.

    Images of more than 8 bits are scaled to 8 from their format's range, or from one that is
    guessed where the format has none: `experiments.simclr.data.image_file.ValueRanges`. What is
    transparent is seen before white.

    An image that cannot be decoded is left out with a warning that names it; a last warning counts
    them. Files whose names do not end as an image's are not looked at.

    With `workers`, for folders too large to be decoded first, each training batch is decoded anew,
    by so many threads, while the batches before it train; an image that cannot be decoded is then
    replaced by another of its batch. `train_images`, which the probes look at, are as many as
    max_memory_gb holds, drawn at random.

    Args:
        root: the folder.
        batch_size: rows of a batch, per process.
        seed: of the order of the training rows.
        image_size: height and width.
        max_memory_gb: images that need more than this many GB decoded lie in a temporary file
            mapped into memory instead of in memory; TMPDIR chooses its disk.
        workers: threads that decode training images as they are needed; 0 decodes all first.
        train_per_class: train on so many images of each class, drawn at random; all without it.
        eval_per_class: likewise for validation and test.
        value_range: [low, high], the values that become black and white in images of more than 8
            bits; each format's own without it.
    """

    def __init__(
        self,
        root: str,
        batch_size: int,
        seed: int = 0,
        image_size: int = 64,
        max_memory_gb: float = 4.0,
        workers: int = 0,
        train_per_class: int | None = None,
        eval_per_class: int | None = None,
        value_range: Sequence[float] | None = None,
    ) -> None:
        super().__init__(batch_size, seed, image_size)
        self.root = Path(root)
        self.max_memory_gb = max_memory_gb
        self.workers = workers
        self.per_class = train_per_class, eval_per_class, eval_per_class
        self.ranges = ValueRanges(value_range)

    def load(self) -> tuple[Part, Part, Part]:
        layout = self._layout()
        parts = zip(self._split(layout), self.per_class, strict=True)
        files = [part if n is None else _drawn(part, n) for part, n in parts]
        if rank_zero_only.rank == 0:
            print(*_understood(layout, files, self.root), sep="\n")
        if self.workers:
            train = _in_random_order(files[0])
            self.train_files = train
            held = max(int(self.max_memory_gb * 1e9) // (3 * self.image_size**2), 1)
            files[0] = train[torch.arange(min(held, len(train)))]
        train, val, test = (self._decoded(part) for part in files)
        found, read = sum(map(len, files)), len(train) + len(val) + len(test)
        if read < found:
            warnings.warn(f"left out {found - read} of {found} images", stacklevel=2)
        self.ranges.warn_of_narrow_values()
        return train, val, test

    def stream(self, rows: int) -> Iterator[Named]:
        layout = self._layout()
        files = _files(layout.images())
        classes = "no labels" if layout.classes is None else f"{len(layout.classes)} classes"
        lines = [f"{len(files):,} images of {printable(str(self.root))}: {classes}"]
        print(*lines, *(f"  {note}" for note in layout.notes), sep="\n")
        self.streamed: list[Path] = []
        for index in torch.arange(len(files)).split(rows):
            chunk = files[index]
            decoded = dict(self._decoding(chunk.paths))
            if decoded:
                kept = chunk[torch.tensor(list(decoded))]
                self.streamed += kept.paths
                names = [readable(os.path.relpath(path, self.root)) for path in kept.paths]
                yield Named(names, Part(torch.stack(list(decoded.values())), kept.labels))
        if not self.streamed:
            raise UserError(f"none of {len(files)} images of {self.root} can be decoded")

    def picture(self, row: int, size: int) -> PIL.Image.Image:
        return ImageOps.contain(read(self.streamed[row], self.ranges), (size, size))

    def address(self, row: int) -> str:
        return self.streamed[row].absolute().as_uri()

    def train_dataloader(self) -> Batches | DecodedBatches:
        if not self.workers:
            return super().train_dataloader()
        self.setup()
        files, decode = self.train_files, self._decode
        rows = self._shuffled, self._batches_per_epoch()
        return DecodedBatches(files.paths, files.labels, decode, *rows, self.workers)

    def _rows(self) -> int:
        return len(self.train_files) if self.workers else super()._rows()

    def _layout(self) -> Layout:
        if not self.root.is_dir():
            raise UserError(f"data.root={self.root} is not a folder: name one that holds images")
        layout = read_layout(self.root)
        self.class_names = layout.classes and [printable(name) for name in layout.classes]
        self.ranges.files = [image.path for image in layout.images()]
        return layout

    def _split(self, layout: Layout) -> list[Files]:
        found = {part: _files(images) for part, images in layout.parts.items()}
        train = found["train"]
        if layout.pool:
            return [train[rows] for rows in split(len(train), 0.8, 0.1, 0.1)]
        for part in ("val", "test"):
            if part not in found:
                rest, drawn = split(len(train), 0.9, 0.1)
                train, found[part] = train[rest], train[drawn]
        return [train, found["val"], found["test"]]

    def _decoded(self, files: Files) -> Part:
        images = self._storage(len(files))
        kept: list[int] = []
        for row, image in self._decoding(files.paths):
            images[len(kept)] = image
            kept.append(row)
        if not kept:
            raise UserError(f"none of {len(files)} images of {self.root} can be decoded")
        return Part(images[: len(kept)], None if files.labels is None else files.labels[kept])

    def _decoding(self, paths: list[Path]) -> Iterator[tuple[int, Tensor]]:
        """The rows that can be decoded, with their images; a warning names each other."""
        # Pillow decodes outside the interpreter's lock; in chunks, as map reads ahead without bound
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for start in range(0, len(paths), 1024):
                decoded = threads.map(self._decode, paths[start : start + 1024])
                for row, image in enumerate(decoded, start):
                    if isinstance(image, Exception):
                        warnings.warn(f"left out {paths[row]}: {image}", stacklevel=2)
                    else:
                        yield row, image

    def _decode(self, file: Path) -> Tensor | Exception:
        try:
            square = ImageOps.fit(read(file, self.ranges), (self.image_size, self.image_size))
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for a broken file
        except Exception as error:
            return error
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def _storage(self, images: int) -> Tensor:
        shape = images, 3, self.image_size, self.image_size
        size = images * 3 * self.image_size**2
        if size <= self.max_memory_gb * 1e9:
            return torch.empty(shape, dtype=torch.uint8)
        with tempfile.NamedTemporaryFile() as file:  # unlinked, it lasts as long as its mapping
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise UserError(
                    f"{images} images of {self.root} need {size / 1e9:.1f} GB in "
                    f"{tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a disk with room, "
                    "or choose a smaller data.image_size"
                ) from error
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(shape)


def _in_random_order(files: Files) -> Files:
    return files[torch.randperm(len(files), generator=torch.Generator().manual_seed(0))]


def _drawn(files: Files, per_class: int) -> Files:
    """So many of each class, the same in every run."""
    if files.labels is None:
        raise UserError("data.train_per_class and eval_per_class need images in class folders")
    files = _in_random_order(files)
    rows = [(files.labels == label).nonzero()[:per_class, 0] for label in files.labels.unique()]
    fewest = min(map(len, rows))
    if fewest < per_class:
        raise UserError(f"{per_class} images of each class are wanted; one class has {fewest}")
    return files[torch.cat(rows)]


def _files(images: list[Image]) -> Files:
    labels = [image.label for image in images if image.label is not None]
    return Files([image.path for image in images], torch.tensor(labels) if labels else None)


def _understood(layout: Layout, parts: list[Files], root: Path) -> list[str]:
    """What a person should see before training: parts, classes, counts, what is left out."""
    names = layout.classes
    kinds = "no labels, and so no accuracies" if names is None else f"{len(names)} classes"
    lines = [f"images of {printable(str(root))}: {kinds}"]
    for name, files in zip(("train", "val", "test"), parts, strict=True):
        drawn = "" if name in layout.parts else ", drawn from the training images"
        plural = "" if len(files) == 1 else "s"
        classes = "" if names is None else f": {_counts(names, files.labels)}"
        lines.append(f"  {name:<6}{len(files):>9,} image{plural}{drawn}{classes}")
    return lines + [f"  {note}" for note in layout.notes]


def _counts(names: list[str], labels: Tensor) -> str:
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    shown = [f"{printable(n)} {c:,}" for n, c in zip(names, counts, strict=True)]
    if len(shown) > CLASSES_SHOWN:
        more = f"{len(shown) - CLASSES_SHOWN:,} more classes"
        shown = [*shown[:CLASSES_SHOWN], f"{more}, of {min(counts):,} to {max(counts):,} in all"]
    return ", ".join(shown)
