"""Every planted fault is caught by both callbacks within one period; the right one by neither."""

import pytest

from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback, GradientError
from tests.callbacks import planted
from tests.callbacks.runs import train

PERIOD = 5
CALLBACKS = {"gradcheck": GradcheckCallback, "discrepancy": GradientDiscrepancyCallback}


def caught_at(loss, callback, tmp_path, batches=2, **options):
    """The number of the batch in which the run was stopped, or None."""
    try:
        train(loss, [callback], tmp_path, batches=batches, **options)
    except GradientError:
        return callback.batches_seen - 1
    assert callback.checks_run > 0
    return None


@pytest.mark.parametrize("check", CALLBACKS)
@pytest.mark.parametrize("rule", planted.WRONG, ids=lambda rule: rule.__name__)
def test_a_wrong_backward_is_caught(rule, check, tmp_path):
    callback = CALLBACKS[check](PERIOD, on_failure="raise")
    assert caught_at(planted.PlantedLoss(rule), callback, tmp_path) == 0


@pytest.mark.parametrize("check", CALLBACKS)
def test_the_right_backward_passes(check, tmp_path):
    callback = CALLBACKS[check](1, on_failure="raise")
    assert caught_at(planted.PlantedLoss(planted.right), callback, tmp_path, batches=8) is None


@pytest.mark.parametrize("check", CALLBACKS)
def test_a_fused_softmax_that_forgets_a_class(check, tmp_path):
    callback = CALLBACKS[check](PERIOD, on_failure="raise")
    assert caught_at(planted.SoftmaxLoss(), callback, tmp_path) == 0


@pytest.mark.parametrize(("slope", "caught"), [(1.0, None), (0.5, 0)])
@pytest.mark.parametrize(
    "callback",
    [
        lambda: GradcheckCallback(PERIOD, on_failure="raise", surrogate=True),
        lambda: GradientDiscrepancyCallback(PERIOD, on_failure="raise"),
    ],
    ids=CALLBACKS,
)
def test_a_declared_straight_through_estimator(callback, slope, caught, tmp_path):
    assert caught_at(planted.StraightThroughLoss(slope), callback(), tmp_path) == caught


def test_an_undeclared_straight_through_estimator_is_wrong(tmp_path):
    callback = GradcheckCallback(PERIOD, on_failure="raise")
    assert caught_at(planted.StraightThroughLoss(1.0), callback, tmp_path) == 0


@pytest.mark.parametrize(("precision", "caught"), [("bf16-mixed", 0), ("32-true", None)])
def test_a_kernel_wrong_in_bfloat16_alone(precision, caught, tmp_path):
    callback = GradientDiscrepancyCallback(PERIOD, on_failure="raise")
    found = caught_at(planted.HalfPrecisionLoss(), callback, tmp_path, precision=precision)
    assert found == caught


@pytest.mark.parametrize("check", CALLBACKS)
def test_a_gradient_that_goes_wrong_after_step_30(check, tmp_path):
    callback = CALLBACKS[check](PERIOD, on_failure="raise")
    caught = caught_at(planted.LateLoss(), callback, tmp_path, batches=45)
    assert caught is not None
    assert 30 < caught <= 30 + PERIOD
