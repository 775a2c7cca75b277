"""Other people's functions: right ones train on to the bit and are never called wrong."""

import copy
import warnings

import pytest
import torch

from cosloss.gradient_check import FiniteDifferences
from cosloss.watch import Differences, Discrepancy, GradientWatch
from cosloss.watch.overwriting import holders
from tests.watch.strangers import CASES, Model


def trained(case, checks=(), steps=2, scaler=False, autocast=None, accumulate=1):
    """The weights after a few steps, the random state, and the watches."""
    make, call = CASES[case]
    holders.cache_clear()  # as in a process whose first call this is
    torch.manual_seed(0)
    model = Model(make(), call)
    watches = [GradientWatch(model, "layer", 1, "raise", check=check) for check in checks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scale = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaler)
    for step in range(steps):
        for watch in watches:
            watch.start()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(torch.randn(12, 6))
        scale.scale(loss.float()).backward()
        if (step + 1) % accumulate == 0:
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
        for watch in watches:
            watch.act(watch.finish())
    return copy.deepcopy(model.state_dict()), torch.get_rng_state(), watches


@pytest.mark.parametrize(
    "options", [{}, {"autocast": torch.bfloat16}, {"scaler": True, "accumulate": 2}], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_same_bit_for_bit(case, options):
    plain, random, _ = trained(case, **options)
    checks = [Discrepancy(), Differences(FiniteDifferences(directions=1, slow_entries=2), 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched, watched_random, watches = trained(case, checks, **options)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(random, watched_random)
    assert watches[0].checks_run == 2, watches[0].summary()
