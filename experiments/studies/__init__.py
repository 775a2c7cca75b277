"""Questions that take many runs: of the losses, and of the checks."""
