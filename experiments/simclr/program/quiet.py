"""Which routine messages of the libraries a run leaves out."""

import logging
import warnings

ROUTINE = (
    # the data lie in memory: workers would only copy them
    ".*does not have many workers.*",
    # SeedEachStep and the data module's sampler make a resumed run exact
    ".*your dataloader is not resumable.*",
    # resuming into the run's own directory
    "Checkpoint directory .* exists and is not empty.*",
    ".*is smaller than the logging interval.*",
    # lightning's own use of torch
    ".*treespec, LeafSpec.*",
)


def silence_routine_messages() -> None:
    """Leave out warnings that do not concern this program, and the list of absent accelerators."""
    for message in ROUTINE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
