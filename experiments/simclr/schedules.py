"""Learning-rate schedules."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Linear warm-up, then a cosine to zero at the end of training, as SimCLR's.

    The rate depends on the optimizer's initial rate, the settings below and how many epochs lie
    behind, and on nothing else: a run that goes on with another rate, number of epochs or batch
    size stands at once where its own settings have that epoch.

    Args:
        optimizer: its groups' rates are the peak.
        warmup_epochs: how long the rate rises.
        epochs: when it reaches zero.
        steps_per_epoch: optimizer steps.
        max_steps: when it reaches zero, where that is earlier; -1 for never.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupCosine(optimizer, warmup_epochs=1, epochs=3, steps_per_epoch=1)
        >>> rates = []
        >>> for _ in range(3):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates, schedule.get_last_lr()
        ([0.5, 1.0, 0.5], [0.0])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: float,
        epochs: float,
        steps_per_epoch: int,
        max_steps: int = -1,
    ) -> None:
        self.warmup = round(warmup_epochs * steps_per_epoch)
        self.end = epochs * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        self.max_steps = max_steps
        # the epochs behind, in steps of this length, are the steps taken and so many more
        self.offset = 0.0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Any]:
        done = self.last_epoch + self.offset  # torch calls the number of steps an epoch
        if done < self.warmup:
            return [rate * (done + 1) / (self.warmup + 1) for rate in self.base_lrs]
        end = self.end if self.max_steps < 0 else min(self.end, self.offset + self.max_steps)
        share = min((done - self.warmup) / max(end - self.warmup, 1), 1.0)
        return [rate * (1 + math.cos(math.pi * share)) / 2 for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_epoch": self.last_epoch,
            "offset": self.offset,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        scale = self.steps_per_epoch / state_dict["steps_per_epoch"]
        self.offset = (self.last_epoch + state_dict["offset"]) * scale - self.last_epoch
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
