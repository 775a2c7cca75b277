"""Data modules: one file per family, and what they share in base."""

from experiments.data.base import ImageData
from experiments.data.digits import ScatteredDigits
from experiments.data.folder import ImageFolder
from experiments.data.random_images import RandomImages
from experiments.data.torchvision_sets import CIFAR10, STL10, FashionMNIST

__all__ = [
    "CIFAR10",
    "STL10",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "RandomImages",
    "ScatteredDigits",
]
