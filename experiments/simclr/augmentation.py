"""Two augmented views of each image of a batch, on the device that trains.

kornia augments a whole batch at once, each image with its own draw. Measured on two CPU cores at
batch 256 of 32 x 32 with SimCLR's recipe (crop, flip, colour jitter, grey): kornia 0.9 makes
11,300 views/s in the training process; torchvision 0.29's v2, image by image, 1,900 in one process
and 3,600 in two workers that then compete with the training for the two cores.
"""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from torch import Tensor, nn


class TwoViews(nn.Module):
    """Two views of each image, every image and view augmented by a draw of its own.

    A step whose strength or probability is 0 is left out. The draws come from torch's global
    generators. Images are uint8 (B, 3, H, W); views float32, standardised as
    `normalize` does.

    Args:
        image_size: height and width of the views.
        rotation: degrees, to both sides.
        translation: share of the width and height, to both sides.
        min_zoom: of the magnification; with max_zoom.
        max_zoom: 1 leaves the size as it is.
        shear: degrees, to both sides.
        min_crop: area of the smallest random crop, as a share; 1 crops nothing.
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter.
        brightness: strength of the colour jitter, as in torchvision.
        contrast: likewise.
        saturation: likewise.
        hue: likewise, at most 0.5.
        grayscale: probability.
        blur: probability of a Gaussian blur with sigma from 0.1 to 2.
        blur_kernel: side of its kernel, odd.
        noise: standard deviation of Gaussian noise added to half of the views; white is 1.
        standardize_each: each image to mean 0 and variance 1, which takes its brightness and
            contrast away; else the fixed map from [0, 1] to [-1, 1], or the encoder's own: see
            `standardize_by`.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning", appendix A.
    """

    def __init__(
        self,
        image_size: int,
        rotation: float = 0.0,
        translation: float = 0.0,
        min_zoom: float = 1.0,
        max_zoom: float = 1.0,
        shear: float = 0.0,
        min_crop: float = 1.0,
        flip: float = 0.0,
        jitter: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        grayscale: float = 0.0,
        blur: float = 0.0,
        blur_kernel: int = 3,
        noise: float = 0.0,
        standardize_each: bool = False,
    ) -> None:
        super().__init__()
        self.standardize_each = standardize_each
        self.mean = self.std = 0.5
        steps: list[nn.Module] = []
        if rotation or translation or shear or (min_zoom, max_zoom) != (1, 1):
            steps.append(
                K.RandomAffine(
                    rotation,
                    (translation, translation),
                    (min_zoom, max_zoom),
                    shear or None,
                    padding_mode="border",
                    p=1.0,
                )
            )
        if min_crop < 1:
            # one warp for the batch; the default cuts and resizes image by image
            size, scale = (image_size, image_size), (min_crop, 1.0)
            steps.append(K.RandomResizedCrop(size, scale, cropping_mode="resample"))
        if flip:
            steps.append(K.RandomHorizontalFlip(p=flip))
        if jitter:
            steps.append(K.ColorJitter(brightness, contrast, saturation, hue, p=jitter))
        if grayscale:
            steps.append(K.RandomGrayscale(p=grayscale))
        if blur:
            steps.append(K.RandomGaussianBlur((blur_kernel, blur_kernel), (0.1, 2.0), p=blur))
        if noise:
            steps.append(K.RandomGaussianNoise(std=noise, p=0.5))
        self.steps = nn.Sequential(*steps)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # views of half precision would lose the low bits of the grid that they are sampled at
        with torch.autocast(images.device.type, enabled=False):
            views = self.steps((images / 255).repeat(2, 1, 1, 1))
            first, second = self._standardize(views).chunk(2)
        return first, second

    def normalize(self, images: Tensor) -> Tensor:
        """The images themselves as the encoder sees them, without augmentation: float32."""
        return self._standardize(images / 255)

    def standardize_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """From here on take the mean of each channel away and divide by its deviation."""
        self.standardize_each = False
        # no part of a checkpoint: they are the encoder's, wherever it is built
        for name, values in (("mean", mean), ("std", std)):
            delattr(self, name)
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def _standardize(self, images: Tensor) -> Tensor:
        if not self.standardize_each:
            return (images - self.mean) / self.std
        std, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
        return (images - mean) / std.clamp_min(0.02)  # an even image stays even
