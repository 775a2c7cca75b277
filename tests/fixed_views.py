"""Views without chance, for runs that must see the same views in any number of processes."""

from torch import Tensor

from experiments.simclr.augmentation import TwoViews


class FixedViews(TwoViews):
    """The image, and its mirror image with the contrast halved."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        view = self.normalize(images)
        return view, view.flip(-1) / 2
