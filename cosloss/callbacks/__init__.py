"""Lightning callbacks that check gradients, a loss's or a whole step's, during training."""

from cosloss.callbacks.gradcheck import GradcheckCallback
from cosloss.callbacks.gradient_discrepancy import GradientDiscrepancyCallback
from cosloss.callbacks.step_check import StepCheckCallback
from cosloss.watch.finding import GradientError

__all__ = [
    "GradcheckCallback",
    "GradientDiscrepancyCallback",
    "GradientError",
    "StepCheckCallback",
]
