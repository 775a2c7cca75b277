"""The gradients on a function's outputs that its own are weighted by."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cosloss.gradient_check.copies import copy_tensor
from cosloss.gradient_check.generators import Draw


class Cotangents:
    """The gradients on a function's outputs: recorded ones, or generic ones of a seed.

    Args:
        seed: of the generic ones, `Draw.cotangent`; every call's outputs get the same.
        recorded: gradients by the outputs' names.
        doubts: how far off each recorded one may be, by name: the roundings of a difference.
    """

    def __init__(
        self,
        seed: int,
        recorded: Mapping[str, Tensor] | None = None,
        doubts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.seed = seed
        self.recorded = recorded
        self.doubts = doubts or {}
        self.factor = 1.0
        self.layout: Callable[[Tensor], Tensor] | None = None
        self.left_out: Mapping[str, Tensor] = {}

    def laid_out(self, layout: Callable[[Tensor], Tensor]) -> "Cotangents":
        """The same numbers, each gradient as `layout` puts it into memory."""
        changed = copy.copy(self)
        changed.layout = layout
        return changed

    def without(self, left_out: Mapping[str, Tensor]) -> "Cotangents":
        """The same, but zero on the entries of outputs that are marked, by the outputs' names."""
        changed = copy.copy(self)
        changed.left_out = left_out
        return changed

    def scaled(self, factor: float) -> "Cotangents":
        """All of them times a factor; of k/8, k below 16, generic ones stay exact."""
        recorded = self.recorded
        if recorded is not None:
            recorded = {n: (t * factor).to(t.dtype) for n, t in recorded.items()}
        scaled = copy.copy(self)
        scaled.recorded = recorded
        scaled.factor = self.factor * factor
        return scaled

    def doubted(self, draw: Draw) -> "Cotangents":
        """Other gradients that may as well be the right ones."""
        if not self.doubts or self.recorded is None:
            return self
        moved = {n: draw.signs(t.real) * self.doubts[n] for n, t in self.recorded.items()}
        changed = copy.copy(self)
        changed.recorded = {n: t + moved[n] for n, t in self.recorded.items()}
        return changed

    def on(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        """One gradient per output.

        Raises:
            ValueError: the outputs are not those of the recorded gradients.
        """
        weights = self._on(outputs)
        if self.left_out:
            weights = [
                weight.masked_fill(self.left_out[name], 0) if name in self.left_out else weight
                for name, weight in zip(outputs, weights, strict=True)
            ]
        return weights if self.layout is None else [self.layout(weight) for weight in weights]

    def _on(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        if self.recorded is None:
            draw = Draw(self.seed)
            return [draw.cotangent(output) * self.factor for output in outputs.values()]
        found: Mapping[str, Tensor | None] = self.recorded
        if not self.recorded.keys() <= outputs.keys():
            if len(self.recorded) != len(outputs):
                raise ValueError(
                    f"the twin has {len(outputs)} outputs through which gradients flow, "
                    f"the function {len(self.recorded)}"
                )
            found = dict(zip(outputs, self.recorded.values(), strict=True))
        weights = []
        for name, output in outputs.items():
            weight = found.get(name)
            if weight is None:
                weight = torch.zeros_like(output)
            elif weight.numel() != output.numel():
                raise ValueError(
                    f"the twin's output has shape {tuple(output.shape)}, "
                    f"the function's {tuple(weight.shape)}"
                )
            if weight.shape != output.shape:
                weight = weight.reshape(output.shape)
            # a backward may write into what it is given
            same = weight.dtype == output.dtype
            weights.append(copy_tensor(weight) if same else weight.to(output.dtype))
        return weights
