"""Lightning callbacks and plugins of the experiments."""
