"""Functions that draw random numbers: float64 draws those of the training precision."""

import torch

from cosloss.gradient_check import compare_gradients
from tests.gradient_check.test_compare import views


def test_noise_in_float64_is_that_of_float32():
    mean, scale = views(8)
    report = compare_gradients(lambda m, s: m + s.exp() * torch.randn_like(m), None, mean, scale)
    assert report, report
