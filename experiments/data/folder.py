"""Anybody's own images, in a folder."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from experiments.data.base import ImageData, Part, split
from experiments.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageFolder(ImageData):
    """The images below a folder, resized and cropped about their centre to a square.

    Where `root` has a folder train/, the parts are its folders train/, val/ and test/; a missing
    val/ or test/ is a tenth of train/. Elsewhere all images are one pool, of which a tenth
    validates and a tenth tests. In a pool each folder that holds images, at any depth, is a class;
    without such folders the images have no labels. The draws are the same in every run.

    An image that cannot be decoded is left out with a warning that names it; a last warning counts
    them. Files whose names do not end as an image's are not looked at.

    Args:
        root: the folder.
        batch_size: rows of a batch, per process.
        seed: of the order of the training rows.
        image_size: height and width.
        max_memory_gb: images that need more than this many GB decoded lie in a temporary file
            mapped into memory instead of in memory; TMPDIR chooses its disk.
    """

    def __init__(
        self,
        root: str,
        batch_size: int,
        seed: int = 0,
        image_size: int = 64,
        max_memory_gb: float = 4.0,
    ) -> None:
        super().__init__(batch_size, seed, image_size)
        self.root = Path(root)
        self.max_memory_gb = max_memory_gb

    def load(self) -> tuple[Part, Part, Part]:
        if not self.root.is_dir():
            raise UserError(f"data.root={self.root} is not a folder: name one that holds images")
        if not (self.root / "train").is_dir():
            self.class_names = _class_names(self.root)
            train, val, test = split(self._read(self.root), 0.8, 0.1, 0.1)
            return train, val, test
        self.class_names = _class_names(self.root / "train")
        train = self._read(self.root / "train")
        parts = {}
        for name in ("val", "test"):
            if (self.root / name).is_dir():
                parts[name] = self._read(self.root / name)
            else:
                train, parts[name] = split(train, 0.9, 0.1)
        return train, parts["val"], parts["test"]

    def _read(self, pool: Path) -> Part:
        files, labels = self._files(pool)
        images = self._storage(len(files))
        kept = []
        # Pillow decodes outside the interpreter's lock
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for row, image in enumerate(threads.map(self._decode, files)):
                if image is not None:
                    images[len(kept)] = image
                    kept.append(row)
        broken = len(files) - len(kept)
        if broken:
            warnings.warn(f"left out {broken} of {len(files)} images of {pool}", stacklevel=2)
        if not kept:
            raise UserError(f"none of the {len(files)} images of {pool} can be decoded")
        return Part(images[: len(kept)], None if labels is None else torch.tensor(labels)[kept])

    def _files(self, pool: Path) -> tuple[list[Path], list[int] | None]:
        if self.class_names is None:
            files, labels = list(_images(pool)), None
        else:
            unknown = set(_class_names(pool) or []) - set(self.class_names)
            if unknown:
                raise UserError(f"{pool} has classes that train/ has not: {sorted(unknown)}")
            found = [(f, i) for i, c in enumerate(self.class_names) for f in _images(pool / c)]
            files, labels = [f for f, _ in found], [i for _, i in found]
        if not files:
            raise UserError(f"no images in {pool}: expected files ending in {_endings()}")
        return files, labels

    def _decode(self, file: Path) -> Tensor | None:
        try:
            with Image.open(file) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
                square = ImageOps.fit(upright, (self.image_size, self.image_size))
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for a broken file
        except Exception as error:
            warnings.warn(f"left out {file}: {error}", stacklevel=2)
            return None
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


def _class_names(pool: Path) -> list[str] | None:
    """Names of the folders below the pool that hold images, or None if there are none."""
    folders = (f for f in pool.iterdir() if f.is_dir() and not f.name.startswith("."))
    return sorted(f.name for f in folders if any(_images(f))) or None


def _images(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in EXTENSIONS)
        yield from (f for f in files if f.is_file() and not f.name.startswith("."))


def _endings() -> str:
    return ", ".join(sorted(EXTENSIONS))
