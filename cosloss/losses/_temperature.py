"""What the modules with a temperature share."""

import math

import torch
from torch import Tensor, nn


class TemperatureLoss(nn.Module):
    """Abstract: holds a temperature, fixed or learnable through its logarithm."""

    def __init__(
        self, temperature: float, learnable_temperature: bool, gather_distributed: bool
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        self.gather_distributed = gather_distributed
        self.learnable_temperature = learnable_temperature
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        else:
            self._temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The number, or exp of the learnable `log_temperature`."""
        return self.log_temperature.exp() if self.learnable_temperature else self._temperature

    def extra_repr(self) -> str:
        learnable = ", learnable_temperature=True" if self.learnable_temperature else ""
        gather = ", gather_distributed=True" if self.gather_distributed else ""
        return f"temperature={float(self.temperature):.4g}{learnable}{gather}"
