"""Encoders: what the parts around them rely on."""

import pytest
import torch

from experiments.simclr.encoders import ProjectionHead, SmallConvNet, resnet18


@pytest.mark.parametrize("size", [28, 32, 96])
def test_small_conv_net_takes_any_size(size):
    encoder = SmallConvNet(width=4, features=12)
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, encoder.num_features) == (2, 12)


def test_resnet_keeps_the_resolution_of_small_images():
    encoder = resnet18().eval()
    sizes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, encoder.num_features) == (1, 512)
    assert sizes == [(1, 64, 32, 32)]


def test_projection_head_follows_the_features():
    head = ProjectionHead(SmallConvNet(width=4, features=12).num_features, hidden=8, out=6)
    assert head(torch.randn(5, 12)).shape == (5, 6)


@pytest.mark.parametrize(
    "build", [lambda norm: SmallConvNet(32, 64, norm=norm), lambda norm: resnet18(norm=norm)]
)
def test_group_norm_treats_each_image_alone(build):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    for norm, alone in [("group", True), ("batch", False)]:
        encoder = build(norm)
        together = encoder(images)
        halves = torch.cat([encoder(half) for half in images.chunk(2)])
        assert torch.allclose(together, halves, atol=1e-5) == alone


def test_group_norm_in_the_projection_head_treats_each_row_alone():
    head = ProjectionHead(16, hidden=64, out=8, norm="group")
    rows = torch.randn(4, 16)
    torch.testing.assert_close(head(rows), torch.cat([head(row[None]) for row in rows]))


def test_resnet_with_imagenets_stem_reduces_the_resolution_at_once():
    encoder = resnet18("imagenet").eval()
    sizes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    encoder(torch.randn(1, 3, 96, 96))
    assert sizes == [(1, 64, 24, 24)]


def test_channels_last_and_compile_change_neither_results_nor_names():
    images = torch.randn(2, 3, 32, 32)
    plain, tuned = resnet18("imagenet"), resnet18("imagenet", channels_last=True, compile=True)
    tuned.load_state_dict(plain.state_dict())
    assert tuned.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert tuned._compiled_call_impl is not None
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(tuned.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
