"""Lightning callbacks that check a loss's gradient while it trains."""

from cosloss.callbacks.gradcheck import GradcheckCallback
from cosloss.callbacks.gradient_discrepancy import GradientDiscrepancyCallback
from cosloss.watch.finding import GradientError

__all__ = ["GradcheckCallback", "GradientDiscrepancyCallback", "GradientError"]
