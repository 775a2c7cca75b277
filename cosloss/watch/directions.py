"""Lines through the parameters along which a step's loss is measured."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosloss.gradient_check.slopes import AGREES

NEAR = 1e-3  # of the parameters' norm, and of the loss: a gradient's direction is steep
ROUGH = 0.03  # a random direction is to show terms that are missing, not a factor of 1.03
FAR = 4e-3  # of each tensor's norm: a random direction is flat


@dataclass
class Direction:
    """A vector per parameter that moves, the first step, and what slopes are compared with."""

    name: str
    vectors: dict[str, Tensor]
    first: float
    scale: float
    agrees: float = AGREES


def top_level(module: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """The parameters' names by top-level module; by the next level where there is one alone.

    Example:
        >>> model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))})
        >>> list(top_level(model, [name for name, _ in model.named_parameters()]))
        ['net.0', 'net.1']
    """
    groups: dict[str, list[str]] = {}
    depth = 0
    while len(groups) < 2 and depth < max((n.count(".") for n in names), default=0) + 1:
        depth += 1
        groups = {}
        for name in names:
            owner = name.rpartition(".")[0] or name
            groups.setdefault(".".join(owner.split(".")[:depth]), []).append(name)
    return groups


class Directions:
    """The directions of one point: gradients of parameters at their values.

    Args:
        values: the parameters, by name.
        gradients: the same names; equal on all processes.
        loss: the mean loss.
        seed: of the random numbers, which are the same on all processes.
    """

    def __init__(
        self, values: dict[str, Tensor], gradients: dict[str, Tensor], loss: float, seed: int
    ) -> None:
        self.values = values
        self.gradients = gradients
        self.loss = abs(loss)
        self.seed = seed
        self.norm = _norm(gradients)
        count = sum(t.numel() for t in values.values())
        self.typical = self.norm / max(count, 1) ** 0.5  # of a gradient's entry
        self.size = _norm(values) / max(count, 1) ** 0.5  # of a parameter's entry

    def reached(self, names: list[str]) -> list[str]:
        """Of these parameters those with a gradient that is not zero."""
        return [n for n in names if bool(self.gradients[n].any())]

    def along_gradient(self, name: str, names: list[str], weighted: bool = False) -> Direction:
        """The gradient's direction; weighted, with half of the entries, doubled, at random."""
        vectors = {n: self.gradients[n] for n in self.reached(names)}
        if weighted:
            vectors = {n: v * (2 * self._random(n, v, coin=True)) for n, v in vectors.items()}
        length = _norm(vectors)
        slope = sum(dot(v, self.gradients[n]) for n, v in vectors.items())
        weights = _norm({n: self.values[n] for n in vectors})
        steps = [NEAR * weights / length] if weights and length else []
        steps += [NEAR * self.loss / slope] if self.loss and slope > 0 else []
        return Direction(name, vectors, min(steps, default=NEAR), slope)

    def random(self, name: str, names: list[str], turn: int = 0) -> Direction:
        """Random numbers of each tensor's own size; others for another turn."""
        vectors = {}
        for n in names:
            value = self.values[n]
            size = _norm({n: value}) / max(value.numel(), 1) ** 0.5 or self.size or 1.0
            vectors[n] = self._random(f"{n}.{turn}", value) * size
        pairs = [(as_real(v), as_real(self.gradients[n])) for n, v in vectors.items()]
        squares = sum(float((v * g).square().sum()) for v, g in pairs)
        scale = max(squares**0.5, self.typical * _norm(vectors))
        return Direction(name, vectors, FAR, scale, ROUGH if squares else AGREES)

    def _random(self, name: str, like: Tensor, coin: bool = False) -> Tensor:
        seed = hash((self.seed, *name.encode())) % (1 << 62)  # of numbers: alike everywhere
        generator = torch.Generator(like.device).manual_seed(seed)
        kind = torch.promote_types(like.dtype, torch.float32)
        if coin:
            drawn = torch.empty(like.shape, dtype=kind.to_real(), device=like.device)
            return drawn.random_(0, 2, generator=generator)
        return torch.empty(like.shape, dtype=kind, device=like.device).normal_(generator=generator)


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(sum(dot(t, t) for t in tensors.values())) ** 0.5


def dot(a: Tensor, b: Tensor) -> float:
    """The sum of products, in float64 where there is one; complex numbers count as pairs."""
    a, b = as_real(a), as_real(b)
    product = a.to(torch.float64) * b.to(torch.float64) if a.device.type != "mps" else a * b
    return float(product.sum())


def as_real(t: Tensor) -> Tensor:
    """Complex numbers as pairs, others as they are."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
