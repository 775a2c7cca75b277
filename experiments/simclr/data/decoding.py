"""Batches of images that are decoded as they are needed, by threads that work ahead."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

AHEAD = 2  # batches that are decoded while one trains

Decoded = Tensor | Exception


class DecodedBatches:
    """Batches of `experiments.simclr.data.base.Batches`'s form, decoded by threads.

    Pillow decodes outside the interpreter's lock, so that threads run side by side, and no image is
    copied from one process to another.

    Args:
        paths: of the images.
        labels: of the images, if they have any.
        decode: called with a path; returns uint8 (3, H, W), or the error that it met.
        order: called at the start of each pass; returns the rows of each batch.
        batches: how many batches a pass has.
        threads: how many decode.
    """

    def __init__(
        self,
        paths: list[Path],
        labels: Tensor | None,
        decode: Callable[[Path], Decoded],
        order: Callable[[], tuple[Tensor, ...]],
        batches: int,
        threads: int,
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.decode = decode
        self.order = order
        self.batches = batches
        self.threads = threads

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pool = ThreadPoolExecutor(self.threads)
        begun: deque[tuple[Tensor, list[Future[Decoded]]]] = deque()
        try:
            for index in self.order():
                begun.append((index, [pool.submit(self.decode, self.paths[i]) for i in index]))
                if len(begun) > AHEAD:
                    yield self._batch(*begun.popleft())
            while begun:
                yield self._batch(*begun.popleft())
        finally:  # a pass may be left before its end
            pool.shutdown(cancel_futures=True)

    def _batch(self, index: Tensor, decoding: list[Future[Decoded]]) -> dict[str, Tensor]:
        images = [image.result() for image in decoding]
        whole = [row for row, image in enumerate(images) if isinstance(image, Tensor)]
        if not whole:
            raise OSError(f"no image of a batch can be decoded, {self.paths[index[0]]} among them")
        for row, image in enumerate(images):
            if isinstance(image, Exception):
                warnings.warn(f"left out {self.paths[index[row]]}: {image}", stacklevel=2)
        # whole images stand in, from the first on, so that the batch keeps its size
        rows = list(islice(cycle(whole), len(images)))
        index = index[rows]
        batch = {"image": torch.stack([images[row] for row in rows]), "index": index}
        return batch if self.labels is None else batch | {"label": self.labels[index]}
