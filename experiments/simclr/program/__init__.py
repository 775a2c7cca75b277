"""Configuration, directories, signals, resuming and errors of a run."""
