"""A loss that stops a gradient on purpose is judged by its twin, which stops it too."""

import pytest
import torch

from cosloss import InfoNCELoss
from cosloss.watch import GradientError, GradientWatch
from cosloss.watch.checks import Differences


class Doubled(InfoNCELoss):
    """Its gradient on the queries is twice the right one."""

    def forward(self, query, key, **options):
        return super().forward(2 * query - query.detach(), key, **options)


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, query, key):
        return self.loss(query, key)


@pytest.mark.parametrize("loss", [InfoNCELoss, Doubled])
def test_a_weight_of_hard_pairs(loss):
    module = loss(0.2, hardness=2.0)
    assert module.stops_gradients
    assert not loss(0.2).stops_gradients
    model = Model(module)
    watch = GradientWatch(model, "loss", 1, "raise", check=Differences())
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 8, generator=generator).requires_grad_()

    def step():
        with watch.step():
            model(query, key).backward()

    if loss is Doubled:
        with pytest.raises(GradientError, match="query"):
            step()
    else:
        step()
