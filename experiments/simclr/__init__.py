"""The SimCLR program: its model here; data, callbacks, evaluation, and what makes it a job."""
