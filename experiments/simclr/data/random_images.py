"""Random images, for smoke tests."""

import torch

from experiments.simclr.data.base import ImageData, Part, split
from experiments.simclr.program.errors import UserError


class RandomImages(ImageData):
    """Images of independent uniform pixels with random labels: nothing can be learnt from them.

    Args:
        batch_size: rows of a batch, per process.
        seed: of the order of the training rows.
        num_images: in all; 60% train, 20% validate, 20% test.
        image_size: height and width.
        num_classes: of the labels.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        num_images: int = 256,
        image_size: int = 32,
        num_classes: int = 10,
    ) -> None:
        super().__init__(batch_size, seed, image_size)
        if num_images < 3:
            raise UserError(f"data.num_images must be at least 3; got {num_images}")
        if num_classes < 1:
            raise UserError(f"data.num_classes must be at least 1; got {num_classes}")
        self.num_images = num_images
        self.class_names = [str(i) for i in range(num_classes)]

    def load(self) -> tuple[Part, Part, Part]:
        generator = torch.Generator().manual_seed(0)
        shape = self.num_images, 3, self.image_size, self.image_size
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, len(self.class_names), shape[:1], generator=generator)
        pool = Part(images, labels)
        train, val, test = split(self.num_images, 0.6, 0.2, 0.2)
        return pool[train], pool[val], pool[test]
