"""The table of ops: one row per op, which the tests, `cosloss.verify` and the benchmarks read.

To add an op, add its row to the list in `testing/<topic>.py`; nothing else changes.
"""

from cosloss.testing import contrastive, cosine, late_interaction
from cosloss.testing.op import Errors, Op, Sample, errors

OPS: tuple[Op, ...] = (*cosine.OPS, *contrastive.OPS, *late_interaction.OPS)

__all__ = ["OPS", "Errors", "Op", "Sample", "errors"]
