"""Faults that have been in released code, each recreated with its mended version."""

from experiments.benchmarks.silent_gradients.faults import (  # noqa: F401
    contrastive,
    layouts,
    losses,
    norms,
    sequences,
)
