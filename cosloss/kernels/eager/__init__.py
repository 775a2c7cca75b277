"""Kernels in plain torch operations: they run on every device and judge the other backends."""
