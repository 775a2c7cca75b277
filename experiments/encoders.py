"""Encoders and the projection head. Shapes: images (B, 3, H, W); features (B, num_features)."""

from torch import Tensor, nn
from torchvision.models import ResNet, resnet18


class SmallConvNet(nn.Module):
    """Four 3x3 convolutions, each with batch norm and ReLU, then the maximum over positions.

    Args:
        width: channels after the first convolution; the next two have twice and four times as many.
        features: channels after the last convolution, and so the number of features.

    Example:
        >>> import torch
        >>> SmallConvNet(width=8, features=16)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(self, width: int = 32, features: int = 128) -> None:
        super().__init__()
        self.num_features = features
        self.layers = nn.Sequential(
            _convolution(3, width, stride=2),
            _convolution(width, 2 * width, stride=2),
            _convolution(2 * width, 4 * width, stride=1),
            _convolution(4 * width, features, stride=2),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def resnet18_cifar() -> ResNet:
    """ResNet-18 for 32 x 32 images: a 3x3 stem of stride 1, no max-pooling, no classifier.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning", appendix B.9.

    Example:
        >>> import torch
        >>> resnet18_cifar().eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 512])
    """
    net = resnet18(weights=None)
    net.num_features = net.fc.in_features
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    return net


class ProjectionHead(nn.Sequential):
    """SimCLR's projection head: linear, batch norm, ReLU, linear.

    Example:
        >>> import torch
        >>> ProjectionHead(16, 32, 8)(torch.randn(4, 16)).shape
        torch.Size([4, 8])
    """

    def __init__(self, num_features: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.Linear(num_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out),
        )


def _convolution(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )
