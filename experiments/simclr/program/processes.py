"""The end of a process that was one of several."""

import time

import torch.distributed as dist

# within this long a thread that waits for the interpreter has had it
PAUSE = 0.5  # seconds


def leave_process_group() -> None:
    """Leave the default process group, if there is one; the last thing that a process does.

    A thread of gloo's drops what a finished collective kept, for which it needs the interpreter,
    and DistributedDataParallel keeps these threads beyond destroy_process_group. One that asks
    for the interpreter while it shuts down aborts the process (torch 2.15, Python 3.11).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(PAUSE)  # without the interpreter, which the threads take
