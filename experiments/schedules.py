"""Learning-rate schedules."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, steps: int) -> LRScheduler:
    """Linear warm-up over `warmup_steps`, then a cosine to zero at `steps`, as SimCLR's."""
    cosine = CosineAnnealingLR(optimizer, T_max=max(steps - warmup_steps, 1))
    if warmup_steps == 0:
        return cosine
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])
