"""What every data module shares: three parts held as uint8 tensors, and batches cut from them.

Shapes: images (N, 3, H, W), uint8; labels (N,), int64.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.simclr.program.errors import UserError


@dataclass(frozen=True)
class Part:
    """Images and their labels, if they have any."""

    images: Tensor
    labels: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "Part":
        return Part(self.images[index], None if self.labels is None else self.labels[index])

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Part":
        """The same on that device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Part(self.images.to(device), labels)


@dataclass(frozen=True)
class Named:
    """Images and their names, files' paths where they are files."""

    names: list[str]
    part: Part


class Batches:
    """Batches of a part, cut by indexing where it lies, which needs no worker processes.

    Not a torch DataLoader, so that Lightning leaves the order of the rows alone.

    Args:
        part: what the batches are cut from.
        order: called at the start of each pass; returns the rows of each batch.
        batches: how many batches a pass has.
    """

    def __init__(self, part: Part, order: Callable[[], tuple[Tensor, ...]], batches: int) -> None:
        self.part = part
        self.order = order
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in self.order():
            index = index.to(self.part.images.device, non_blocking=True)
            rows = self.part[index]
            batch = {"image": rows.images, "index": index}
            yield batch if rows.labels is None else batch | {"label": rows.labels}


class ImageData(L.LightningDataModule, ABC):
    """Images in memory, in a training, a validation and a test part.

    After `setup()`: train_images, val_images and test_images, uint8 (N, 3, H, W); train_labels,
    val_labels and test_labels, int64 (N,), or None; num_classes and class_names, or None.

    Batches are {"image": uint8 (B, 3, H, W), "index": int64 (B,), "label": int64 (B,) if there are
    labels}. Training batches are full and shuffled; the order is drawn from (seed, epoch) alone, so
    that a resumed run, within an epoch too, sees what the run before it would have seen. With
    several processes each trains on its share of the rows, batch_size at a time, and each evaluates
    all.

    Training images are copied to the GPU that trains where they fit in half of its free memory.

    Args:
        batch_size: rows of a batch, per process.
        seed: of the order of the training rows.
        image_size: height and width.
    """

    def __init__(self, batch_size: int, seed: int, image_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size must be at least 1; got {batch_size}")
        if image_size < 1:
            raise UserError(f"data.image_size must be at least 1; got {image_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.image_size = image_size
        self.class_names: list[str] | None = None
        self.same_order = False  # in every epoch, as trainer.overfit_batches wants it
        self._parts: tuple[Part, ...] | None = None
        self._streamed: tuple[Part, ...] = ()

    @abstractmethod
    def load(self) -> tuple[Part, Part, Part]:
        """The training, validation and test parts; sets `class_names` where there are labels."""

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        if self._parts is None:
            self._parts = self._with_labels_that_tell(*self.load())
        train, val, test = self._parts
        self.train_images, self.train_labels = train.images, train.labels
        self.val_images, self.val_labels = val.images, val.labels
        self.test_images, self.test_labels = test.images, test.labels
        self._check_batch_size()

    def stream(self, rows: int) -> Iterator[Named]:
        """All images of all parts, in their order, at most so many at a time; no need of setup."""
        self._streamed = self.load()
        for name, part in zip(("train", "val", "test"), self._streamed, strict=True):
            for index in torch.arange(len(part)).split(rows):
                yield Named([f"{name}/{i}" for i in index.tolist()], part[index])

    def picture(self, row: int, size: int) -> Image.Image:
        """The image that was streamed as the row-th, to look at, in a square of that size."""
        for part in self._streamed:
            if row < len(part):
                break
            row -= len(part)
        return Image.fromarray(part.images[row].permute(1, 2, 0).numpy())

    def address(self, row: int) -> str | None:
        """Where a browser finds the image that was streamed as the row-th, if it is a file."""
        return None

    def train_dataloader(self) -> Batches:
        part = self._part(0)
        return Batches(part.to(self._home(part)), self._shuffled, self._batches_per_epoch())

    def val_dataloader(self) -> Batches:
        return self._in_order(self._part(1))

    def test_dataloader(self) -> Batches:
        return self._in_order(self._part(2))

    def _with_labels_that_tell(self, *parts: Part) -> tuple[Part, ...]:
        """The parts; without labels where the training part has one class, which all would get."""
        labels = parts[0].labels
        if labels is None or len(labels.unique()) > 1:
            return parts
        warnings.warn("all training images are of one class: labels are left out", stacklevel=2)
        self.class_names = None
        return tuple(Part(part.images) for part in parts)

    def _part(self, number: int) -> Part:
        self.setup()
        assert self._parts is not None
        return self._parts[number]

    def _home(self, part: Part) -> torch.device:
        cpu = torch.device("cpu")
        device = cpu if self.trainer is None else self.trainer.strategy.root_device
        if device.type != "cuda":
            return cpu
        free, _ = torch.cuda.mem_get_info(device)
        return device if part.images.nbytes <= free / 2 else cpu

    def _rows(self) -> int:
        """How many images train."""
        return len(self.train_images)

    def _in_order(self, part: Part) -> Batches:
        order = torch.arange(len(part)).split(self.batch_size)
        return Batches(part, lambda: order, len(order))

    def _shuffled(self) -> tuple[Tensor, ...]:
        epoch = 0 if self.trainer is None or self.same_order else self.trainer.current_epoch
        rank = 0 if self.trainer is None else self.trainer.global_rank
        (mixed,) = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed))
        order = torch.randperm(self._rows(), generator=generator)
        mine = order[rank :: self._processes()]
        return mine.split(self.batch_size)[self._batches_done() : self._batches_per_epoch()]

    def _batches_done(self) -> int:
        # not 0 in a run that was interrupted within an epoch and resumed
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed

    def _batches_per_epoch(self) -> int:
        return self._rows() // self._processes() // self.batch_size

    def _processes(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _check_batch_size(self) -> None:
        rows_each = self._rows() // self._processes()
        if self.batch_size > rows_each:
            raise UserError(
                f"data.batch_size={self.batch_size} is more than the {rows_each} training images"
                f"{'' if self._processes() == 1 else ' of each process'}: choose a smaller one"
            )


def split(rows: int, *shares: float) -> tuple[Tensor, ...]:
    """Rows drawn at random for each part, at least one for each; the first takes what is left.

    The draw is the same in every run: runs that differ in their training seed are judged on the
    same images.

    Example:
        >>> [len(part) for part in split(10, 0.8, 0.1, 0.1)]
        [8, 1, 1]
    """
    if rows < len(shares):
        raise UserError(f"{rows} images are too few for {len(shares)} parts")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    sizes = [max(1, round(share * rows)) for share in shares[1:]]
    return order.split([rows - sum(sizes), *sizes])
