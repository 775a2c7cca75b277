"""CIFAR-10, STL-10 and Fashion-MNIST through torchvision, downloaded on first use."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms

from experiments.simclr.data.base import ImageData, Part, split
from experiments.simclr.program.errors import UserError


class TorchvisionData(ImageData):
    """A labelled data set of torchvision's, resized to image_size.

    Its training part gives a share to validation, the same images in every run; its test part is
    the test part.

    Args:
        batch_size: rows of a batch, per process.
        seed: of the order of the training rows.
        root: the folder that holds the files, or that they are downloaded to.
        image_size: height and width.
        val_share: of the training part that is held out for validation.
    """

    files: tuple[str, ...]
    source: str

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        root: str = "data",
        image_size: int = 32,
        val_share: float = 0.1,
    ) -> None:
        super().__init__(batch_size, seed, image_size)
        if not 0 <= val_share < 1:
            raise UserError(f"data.val_share must be in [0, 1); got {val_share}")
        self.root = Path(root)
        self.val_share = val_share

    @abstractmethod
    def read(self, train: bool) -> tuple[Part, list[str]]:
        """torchvision's training or test part, downloaded if need be, and the classes' names."""

    def prepare_data(self) -> None:
        self.setup()  # the first process downloads; the others wait, then find the files

    def load(self) -> tuple[Part, Part, Part]:
        pool, self.class_names = self._found(lambda: self.read(train=True))
        test, _ = self._found(lambda: self.read(train=False))
        train, val = split(len(pool), 1 - self.val_share, self.val_share)
        return pool[train], pool[val], test

    def _found(self, read: Callable[[], tuple[Part, list[str]]]) -> tuple[Part, list[str]]:
        try:
            part, names = read()
        # torchvision raises OSError, RuntimeError, AssertionError, an unpickler's errors and more
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            files = ", ".join(str(self.root.absolute() / file) for file in self.files)
            raise UserError(
                f"could not download or read {type(self).__name__} ({reason}): remove what is "
                f"broken and put these files, from {self.source}, in place: {files}"
            ) from error
        return Part(self._resize(part.images), part.labels), names

    def _resize(self, images: Tensor) -> Tensor:
        if images.shape[-1] == self.image_size:
            return images
        size = [self.image_size, self.image_size]
        # in pieces: the resize works in float32, four times the memory
        return torch.cat([transforms.resize(piece, size) for piece in images.split(4096)])


class CIFAR10(TorchvisionData):
    """CIFAR-10: 60,000 images of 32 x 32, ten classes."""

    files = (datasets.CIFAR10.filename,)
    source = datasets.CIFAR10.url

    def read(self, train: bool) -> tuple[Part, list[str]]:
        data = datasets.CIFAR10(self.root, train, download=True)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return Part(images, torch.tensor(data.targets)), data.classes


class STL10(TorchvisionData):
    """STL-10: 5,000 labelled training and 8,000 test images of 96 x 96, ten classes."""

    files = (datasets.STL10.filename,)
    source = datasets.STL10.url

    def read(self, train: bool) -> tuple[Part, list[str]]:
        data = datasets.STL10(self.root, "train" if train else "test", download=True)
        return Part(torch.from_numpy(data.data), torch.from_numpy(data.labels).long()), data.classes


class FashionMNIST(TorchvisionData):
    """Fashion-MNIST: 70,000 grey images of 28 x 28, ten classes."""

    files = tuple(f"FashionMNIST/raw/{name}" for name, _ in datasets.FashionMNIST.resources)
    source = datasets.FashionMNIST.mirrors[0]

    def read(self, train: bool) -> tuple[Part, list[str]]:
        data = datasets.FashionMNIST(self.root, train, download=True)
        images = data.data[:, None].expand(-1, 3, -1, -1).contiguous()
        return Part(images, data.targets.long()), data.classes
