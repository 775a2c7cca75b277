"""Data modules: one file per family, and what they share in base."""

from experiments.simclr.data.base import ImageData
from experiments.simclr.data.digits import ScatteredDigits
from experiments.simclr.data.folder import ImageFolder
from experiments.simclr.data.random_images import RandomImages
from experiments.simclr.data.torchvision_sets import CIFAR10, STL10, FashionMNIST

__all__ = [
    "CIFAR10",
    "STL10",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "RandomImages",
    "ScatteredDigits",
]
