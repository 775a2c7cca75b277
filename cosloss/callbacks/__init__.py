"""Lightning callbacks that check a loss's gradient while it trains."""

from cosloss.callbacks.finding import GradientError
from cosloss.callbacks.gradcheck import GradcheckCallback
from cosloss.callbacks.gradient_discrepancy import GradientDiscrepancyCallback

__all__ = ["GradcheckCallback", "GradientDiscrepancyCallback", "GradientError"]
