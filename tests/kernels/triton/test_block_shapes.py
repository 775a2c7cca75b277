"""Every kind of card has block shapes for every dtype and width, in its own shared memory."""

from types import SimpleNamespace

import pytest
import torch

from cosloss.criteria import KINDS
from cosloss.kernels.triton import block_shapes, card
from tests.kernels.triton.compiling import CARDS

WIDTHS = (1, 16, 64, 65, 128, 129, 256, 257, 384, 512, 513, 1000, 1024, 5000)


@pytest.mark.parametrize("each", [*CARDS.values(), card.INTERPRETER], ids=lambda each: each.name)
@pytest.mark.parametrize("size", [2, 4], ids=["2 bytes", "4 bytes"])
def test_some_configuration_fits(each, size):
    for d in WIDTHS:
        for config in block_shapes.forward_configs(d, size, each):
            constants = config.kwargs
            assert constants["BLOCK_D"] >= (d if constants["WHOLE"] else 16)
        assert block_shapes.forward_configs(d, size, each)
        for kind in KINDS:
            backward = block_shapes.backward_configs(d, size, each, kind)
            assert backward
            for config in backward:
                assert config.kwargs["BLOCK_D"] >= (d if config.kwargs["WHOLE"] else 16)
        for table in (block_shapes.FORWARD, block_shapes.BACKWARD):
            for shape in block_shapes.fitting(table, d, size, each):
                assert shape.kib * 1024 <= each.shared


def test_products_of_float32_below_hopper_are_in_parts_in_the_forward_pass():
    for each in CARDS.values():
        configs = block_shapes.forward_configs(128, 4, each)
        assert each.cores == "wgmma" or not any(config.kwargs["WHOLE"] for config in configs)


@pytest.mark.parametrize(
    ("major", "hip", "cores", "shared"),
    [
        (8, None, "mma", 101376),
        (9, None, "wgmma", 101376),
        (10, None, "tcgen05", 101376),
        (12, None, "mma", 101376),
        (9, "7.0", "mma", 65536),  # AMD's numbers are others
    ],
)
def test_a_card_is_what_torch_says(major, hip, cores, shared, monkeypatch):
    properties = SimpleNamespace(
        name="a card",
        major=major,
        shared_memory_per_block=65536,
        shared_memory_per_block_optin=101376,
        multi_processor_count=7,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    like = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    card._card.cache_clear()
    try:
        assert card.card_of(like) == card.Card("a card", cores, shared, 7)
    finally:
        card._card.cache_clear()
