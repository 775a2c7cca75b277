"""A call that is too large to check is not checked, and is said to be."""

import pytest
import torch
from torch import nn

from cosloss.watch import Differences, Discrepancy, GradientWatch, memory


@pytest.mark.parametrize("check", [Discrepancy, Differences])
@pytest.mark.parametrize("free", [2**20, 2**40])
def test_too_large(check, free, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: free)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    watch = GradientWatch(model, "1", 1, "raise", check=check())
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    with watch.step():
        model(torch.randn(1000, 64)).square().mean().backward()
    assert watch.checks_skipped == (free == 2**20)
    assert watch.checks_run == (free == 2**40)
    assert ("too large" in watch.summary()) == (free == 2**20)


def test_what_is_free_is_known_or_not(tmp_path, monkeypatch):
    assert memory.available() is None or memory.available() > 2**20
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.available() is None
    assert memory.too_large({"x": torch.ones(3)}) == ""
