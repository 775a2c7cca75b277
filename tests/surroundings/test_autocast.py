"""torch.autocast takes float32 to its dtype, and leaves float64 alone."""

import pytest
import torch

from cosloss.kernels import dispatch
from tests.surroundings.calls import CALLS, arguments, error, expected, found


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_float64_is_left_alone(name, autocast, backend):
    given = arguments(torch.float64)
    outside = found(name, given)
    with dispatch.use(backend), torch.autocast("cpu", autocast):
        inside = found(name, given)
    assert inside[0].dtype == torch.float64
    assert error(inside, outside) < 1e-14


def test_one_wide_view_makes_the_loss_wide():
    given = arguments(torch.float64)
    given["b"] = given["b"].detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = found("nt_xent", given)
    assert error(inside[:2], expected("nt_xent", given)[:2]) < 1e-12


def test_float32_is_taken_to_bfloat16():
    given = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        inside = found("nt_xent", given)
    assert 1e-6 < error(inside, expected("nt_xent", given)) < 3e-2
