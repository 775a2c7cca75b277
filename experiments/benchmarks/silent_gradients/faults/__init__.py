"""Faults that have been in released code, each recreated with its mended version."""
