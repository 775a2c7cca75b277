"""Batches without a negative or a positive: a loss of 0, and one warning where it comes from."""

import warnings

import pytest
import torch

from cosloss import (
    CosineEmbeddingLoss,
    InfoNCELoss,
    NTXentLoss,
    SigmoidContrastiveLoss,
    SupConLoss,
)
from cosloss.gradient_check import compare_gradients

ONE = torch.randn(2, 1, 4)
FOUR = torch.randn(2, 4, 4)
SAME = torch.zeros(4, dtype=torch.long)
LONELY = [
    ("batch of one", lambda: NTXentLoss()(*ONE)),
    ("batch of one", lambda: NTXentLoss(decoupled=True, learnable_temperature=True)(*ONE)),
    ("batch of one", lambda: InfoNCELoss(symmetric=True)(*ONE)),
    ("of one group", lambda: NTXentLoss()(*FOUR, ignore=SAME)),
    ("no two labels", lambda: SupConLoss()(FOUR[0], torch.arange(4))),
    ("no two labels", lambda: SupConLoss(reduction="none")(ONE[0], torch.arange(1))),
]
FINE = [
    lambda: NTXentLoss()(*FOUR),
    lambda: NTXentLoss()(*FOUR, ignore=torch.arange(4) // 2),
    lambda: InfoNCELoss()(*ONE, torch.randn(3, 4)),
    lambda: SupConLoss()(FOUR[0], SAME),
    lambda: SigmoidContrastiveLoss()(*ONE),
    lambda: CosineEmbeddingLoss()(*ONE),
    lambda: torch.compile(NTXentLoss(), backend="eager")(*ONE),
]


@pytest.mark.parametrize(("message", "call"), LONELY)
def test_a_lonely_batch_is_warned_of_once_where_it_comes_from(message, call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert not call().any()
    (warning,) = caught
    assert message in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("call", FINE)
def test_others_are_not(call, recwarn):
    call()
    assert not [w for w in recwarn if "loss is 0" in str(w.message)]


def test_a_gradient_check_of_few_rows_does_not_warn(recwarn):
    z1, z2 = ONE.double()
    compare_gradients(NTXentLoss(), NTXentLoss().reference(), z1, z2)
    assert not [w for w in recwarn if "loss is 0" in str(w.message)]
