"""Encoders and the projection head. Shapes: images (B, 3, H, W); features (B, num_features)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision import models

Norm = Literal["batch", "group"]


class SmallConvNet(nn.Module):
    """Four 3x3 convolutions, each with normalisation and ReLU, then the maximum over positions.

    Args:
        width: channels after the first convolution; the next two have twice and four times as many.
        features: channels after the last convolution, and so the number of features.
        norm: "batch", or "group", which sees one image alone: see `normalization`.
        channels_last: keep the weights, and so the activations, with the channels innermost.

    Example:
        >>> import torch
        >>> SmallConvNet(width=8, features=16)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        width: int = 32,
        features: int = 128,
        norm: Norm = "batch",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.num_features = features
        self.layers = nn.Sequential(
            _convolution(3, width, 2, norm),
            _convolution(width, 2 * width, 2, norm),
            _convolution(2 * width, 4 * width, 1, norm),
            _convolution(4 * width, features, 2, norm),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def resnet18(
    stem: Literal["cifar", "imagenet"] = "cifar",
    norm: Norm = "batch",
    channels_last: bool = False,
    compile: bool = False,
) -> models.ResNet:
    """ResNet-18 without its classifier.

    Args:
        stem: "cifar", for images of about 32 x 32, is a 3x3 convolution of stride 1 without
            max-pooling; "imagenet" is torchvision's, which takes a 16th of the time.
        norm: "batch", or "group", which sees one image alone: see `normalization`.
        channels_last: keep the weights, and so the activations, with the channels innermost.
        compile: let torch.compile make kernels of it at the first call.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning", appendix B.9.

    Example:
        >>> import torch
        >>> resnet18().eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 512])
    """
    net = models.resnet18(weights=None, norm_layer=lambda channels: normalization(norm, channels))
    net.num_features = net.fc.in_features
    net.fc = nn.Identity()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    if channels_last:
        net.to(memory_format=torch.channels_last)
    if compile:
        net.compile()  # in place: the names in a checkpoint stay
    return net


class ProjectionHead(nn.Sequential):
    """SimCLR's projection head: linear, normalisation, ReLU, linear.

    Example:
        >>> import torch
        >>> ProjectionHead(16, 32, 8)(torch.randn(4, 16)).shape
        torch.Size([4, 8])
    """

    def __init__(self, num_features: int, hidden: int, out: int, norm: Norm = "batch") -> None:
        super().__init__(
            nn.Linear(num_features, hidden, bias=False),
            nn.BatchNorm1d(hidden) if norm == "batch" else normalization(norm, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out),
        )


def normalization(norm: Norm, channels: int) -> nn.Module:
    """Batch norm over images, or group norm of 16 channels to a group.

    Group norm (Wu and He, 2018, table 3) treats each image alone, so that a batch split over
    processes gives what it gives in one; batch norm does so where torch synchronises it: on GPUs.
    """
    if norm == "group":
        return nn.GroupNorm(max(channels // 16, 1), channels)
    return nn.BatchNorm2d(channels)


def _convolution(channels_in: int, channels_out: int, stride: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        normalization(norm, channels_out),
        nn.ReLU(inplace=True),
    )
