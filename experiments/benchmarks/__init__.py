"""Time and memory of the ops beside their rivals: `python -m experiments.benchmarks cosine`."""
