"""Encoders: what the parts around them rely on."""

import pytest
import torch

from experiments.encoders import ProjectionHead, SmallConvNet, resnet18_cifar


@pytest.mark.parametrize("size", [28, 32, 96])
def test_small_conv_net_takes_any_size(size):
    encoder = SmallConvNet(width=4, features=12)
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, encoder.num_features) == (2, 12)


def test_resnet_keeps_the_resolution_of_small_images():
    encoder = resnet18_cifar().eval()
    sizes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, encoder.num_features) == (1, 512)
    assert sizes == [(1, 64, 32, 32)]


def test_projection_head_follows_the_features():
    head = ProjectionHead(SmallConvNet(width=4, features=12).num_features, hidden=8, out=6)
    assert head(torch.randn(5, 12)).shape == (5, 6)
