"""Handwritten digits scattered over a canvas: real data that needs no download."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from experiments.simclr.data.base import ImageData, Part, split


class ScatteredDigits(ImageData):
    """scikit-learn's 1,797 handwritten digits, each rendered at random onto a noisy canvas.

    The 8 x 8 digits are split first (70% training, 10% validation, 20% test), so that no digit is
    in two parts, and then rendered `renders` times each: at a random position, size, rotation,
    contrast and brightness of the paper, with noise. The split and the rendering are the same in
    every run, whatever the training seed.

    Args:
        batch_size: rows of a batch, per process.
        seed: of the order of the training rows.
        renders: images per digit.
        image_size: height and width of the canvas.
        min_scale: side of the smallest digit, as a share of the canvas's.
        max_scale: side of the largest.
        max_rotation: degrees, to both sides.
        min_contrast: of ink against paper; 1 is white on black.
        noise: standard deviation of the noise, where white is 1.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        renders: int = 4,
        image_size: int = 32,
        min_scale: float = 0.5,
        max_scale: float = 0.8,
        max_rotation: float = 15.0,
        min_contrast: float = 0.35,
        noise: float = 0.08,
    ) -> None:
        super().__init__(batch_size, seed, image_size)
        self.renders = renders
        self.scale = min_scale, max_scale
        self.max_rotation = max_rotation
        self.min_contrast = min_contrast
        self.noise = noise

    def load(self) -> tuple[Part, Part, Part]:
        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        pool = Part(
            torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16,
            torch.tensor(digits.target, dtype=torch.int64),
        )
        generator = torch.Generator().manual_seed(0)
        train, val, test = split(len(pool), 0.7, 0.1, 0.2)
        return (
            self._render(pool[train], generator),
            self._render(pool[val], generator),
            self._render(pool[test], generator),
        )

    def _render(self, part: Part, generator: torch.Generator) -> Part:
        index = torch.arange(len(part)).repeat_interleave(self.renders)
        digits, labels = part.images[index], part.labels[index]
        n, size = len(digits), self.image_size

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(n, 1, 1, 1).uniform_(low, high, generator=generator)

        grid = F.affine_grid(self._canvas_to_digit(uniform), [n, 1, size, size], False)
        ink = F.grid_sample(digits, grid, align_corners=False)
        contrast = uniform(self.min_contrast, 1)
        paper = uniform(0, 1) * (1 - contrast)
        noise = self.noise * torch.randn(ink.shape, generator=generator)
        grey = (paper + contrast * ink + noise).clamp(0, 1)
        images = (255 * grey).round().to(torch.uint8)
        return Part(images.expand(-1, 3, -1, -1).contiguous(), labels)

    def _canvas_to_digit(self, uniform: Callable[[float, float], Tensor]) -> Tensor:
        """(N, 2, 3): x -> R(-angle) (x - centre) / scale, both squares having corners at +-1."""
        scale = uniform(*self.scale)
        angle = torch.deg2rad(uniform(-self.max_rotation, self.max_rotation))
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rotation = torch.cat([torch.cat([cos, sin], 3), torch.cat([-sin, cos], 3)], 2).squeeze(1)
        centre = torch.cat([uniform(-1, 1), uniform(-1, 1)], 2).squeeze(1) * (1 - scale.squeeze(1))
        return torch.cat([rotation, -rotation @ centre], 2)
