"""experiment=broken_gradient: the checks stop the run, and say why."""

import pytest
import torch

from cosloss.gradient_check import check_finite_differences, compare_gradients
from experiments.simclr.broken_gradient import BrokenCosineLoss


def test_the_run_is_stopped_with_status_1(train, tmp_path):
    run = train("experiment=broken_gradient", "data=random_images", "data.batch_size=32",
                "loss.wrong_after=2")  # fmt: skip
    assert run.status == 1
    assert "the gradient of `loss` (BrokenCosineLoss) is wrong in batch 2" in run.err
    assert "its direction is wrong" in run.err
    assert "python -m cosloss.verify --replay" in run.err
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(("wrong_after", "right"), [(0, False), (1, True)])
def test_the_planted_fault_is_the_only_one(wrong_after, right):
    loss = BrokenCosineLoss(wrong_after).eval()
    z1 = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    z2 = z1 + torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    assert bool(compare_gradients(loss, loss.reference(), z1, z2)) is right
    assert bool(check_finite_differences(loss, z1, z2)) is right
