"""The base of the loss modules: hyperparameters, and scalars that may be learnt."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from cosloss import functional, reference
from cosloss.arguments import (
    check_dtype,
    check_flags,
    checked_device,
    described,
    is_number,
)
from cosloss.distributed import Gather
from cosloss.functional._checks import check_gather, check_reduction, check_temperature
from cosloss.functional._dims import check_dims
from cosloss.modes import PLAIN

OF_PREFIXES = ("dims", "dim_weights")


class Unscriptable(nn.Module):
    """Abstract: a module that torch.jit.script is told not to compile."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script does not support {type(self).__name__}: use torch.compile or "
            "torch.export"
        )


class Loss(Unscriptable):
    """Abstract: a module over a function of `cosloss.functional` and its twin of the same name.

    function: the name of both.
    hyperparameters: the attributes that both take.
    """

    function: str
    hyperparameters: tuple[str, ...]
    __signature__: inspect.Signature

    def reference(self) -> Callable[..., Tensor]:
        """This module's twin in plain autograd torch operations, on one process."""
        return partial(getattr(reference, self.function), **self._arguments())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={self._shown(name)}" for name in self.hyperparameters)

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.hyperparameters}

    def _shown(self, name: str) -> str:
        return repr(getattr(self, name))

    def _refuse_inputs(self, first: Any) -> None:
        """Raise TypeError where the module is built with what it is to be called with."""
        if isinstance(first, Tensor) and first.numel() > 1:
            name = type(self).__name__
            raise TypeError(
                f"{self.hyperparameters[0]} must be a number; got {described(first)}: "
                f"{name} is a module, called as {name}()(...)"
            )


class Options(TypedDict, total=False):
    """The keywords of every contrastive module, False or None unless told otherwise.

    learnable_temperature: learn the logarithm of the temperature.
    gather_distributed: take negatives from all processes; "ring" does so in memory that does not
        grow with them.
    dims, dim_weights: the embeddings' first columns whose losses are summed, and their weights, 1
        by default (Matryoshka).
    scalar_parameters: give learnt scalars shape () and not (1,); True by default.
    device, dtype: of learnt scalars.
    """

    learnable_temperature: bool
    gather_distributed: Gather
    dims: Sequence[int] | None
    dim_weights: Sequence[float] | None
    scalar_parameters: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class ContrastiveLoss(Loss):
    """Abstract: an in-batch loss with a temperature, fixed or learnable through its logarithm.

    A learnable scalar is a parameter of shape (), or (1,) with `scalar_parameters=False`, as FSDP2
    wants it; a state dict of either shape is loaded. `loss.temperature = number` sets a fixed
    temperature or goes on from there with a learnable one; so does `loss.log_temperature = number`.

    Keywords of every such loss, besides its own: see `Options`.
    """

    log_temperature: Any  # a parameter, or the logarithm of the fixed temperature

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the keywords of `Options`, where they are taken, in help() and in notebooks."""
        super().__init_subclass__(**kwargs)
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        shared = inspect.signature(ContrastiveLoss.__init__).parameters
        named = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
        takes_all = len(named) < len(own)
        options = [shared[name] for name in Options.__annotations__] if takes_all else []
        cls.__signature__ = inspect.Signature([*named, *options])

    def __init__(
        self,
        temperature: float,
        reduction: str,
        *,
        learnable_temperature: bool = False,
        gather_distributed: Gather = False,
        dims: Sequence[int] | None = None,
        dim_weights: Sequence[float] | None = None,
        scalar_parameters: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._refuse_inputs(temperature)
        check_reduction(reduction)
        if device is not None:
            checked_device("device", device)
        if dtype is not None:
            check_dtype("dtype", dtype)
        check_flags(
            learnable_temperature=learnable_temperature,
            scalar_parameters=scalar_parameters,
        )
        check_gather(gather_distributed)
        check_dims(dims, dim_weights)
        self.reduction = reduction
        self.gather_distributed = gather_distributed
        self.dims = None if dims is None else tuple(dims)
        self.dim_weights = None if dim_weights is None else tuple(dim_weights)
        self.learnable_temperature = learnable_temperature
        self._factory: dict[str, Any] = {
            "size": () if scalar_parameters else (1,),
            "device": device,
            "dtype": dtype,
        }
        self._initial: dict[str, float] = {}
        if learnable_temperature:
            self._learn("log_temperature", temperature=checked_number("temperature", temperature))
        self.temperature = temperature

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        *,
        ignore: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return self._loss(z1, z2, ignore=ignore, weight=weight)

    def _arguments(self) -> dict[str, Any]:
        prefixes = {} if self.dims is None else {name: getattr(self, name) for name in OF_PREFIXES}
        return super()._arguments() | prefixes

    def _loss(self, *given: Tensor, **options: Tensor | Sequence[Tensor] | None) -> Tensor:
        function: Callable[..., Tensor] = getattr(functional, self.function)
        gather = self.gather_distributed
        return function(*given, **self._arguments(), **options, gather_distributed=gather)

    @property
    def temperature(self) -> float | Tensor:
        """The number, or exp of the learnable `log_temperature`, in at least float32."""
        if not self.learnable_temperature:
            return self._temperature
        logarithm: Tensor = self.log_temperature
        return logarithm.to(torch.promote_types(logarithm.dtype, torch.float32)).exp()

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        number = checked_number("temperature", temperature)
        check_temperature(number)
        if not self.learnable_temperature:
            self._temperature = number
        self._set("log_temperature", math.log(number))

    def reset_parameters(self) -> None:
        """Give the learnable scalars their initial values: after `to_empty`, they have none."""
        for name, value in self._initial.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        flags = ("learnable_temperature", "gather_distributed", *OF_PREFIXES)
        shown = "".join(f", {x}={getattr(self, x)!r}" for x in flags if getattr(self, x))
        return super().extra_repr() + shown

    def _learn(self, name: str, **initial: float) -> None:
        self._initial |= initial
        self.register_parameter(name, nn.Parameter(torch.empty(**self._factory)))

    def _shown(self, name: str) -> str:
        parameter = self._parameters.get("log_temperature" if name == "temperature" else name)
        value = getattr(self, name)
        if parameter is not None:
            # a shard, or a tensor without memory, has no number to show
            readable = type(parameter) in PLAIN and not parameter.is_meta
            value = float(value.detach()) if readable else self._initial[name]
        return f"{value:.4g}" if isinstance(value, float) else repr(value)

    def _set(self, name: str, value: float) -> None:
        parameter = self._parameters.get(name)
        if parameter is None:
            object.__setattr__(self, name, value)
        else:
            with torch.no_grad():
                parameter.fill_(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":  # which nn.Module would register if it is a parameter
            object.__setattr__(self, name, value)
        elif not isinstance(value, Real) or name not in ("log_temperature", *self._learnt()):
            super().__setattr__(name, value)
        elif name == "log_temperature":
            self.temperature = math.exp(value)
        else:
            self._set(name, checked_number(name, float(value)))

    def _learnt(self) -> dict[str, Any]:
        return self.__dict__.get("_parameters", {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, parameter in self._parameters.items():
            saved = state_dict.get(prefix + name)
            if parameter is not None and isinstance(saved, Tensor) and saved.shape in ((), (1,)):
                state_dict[prefix + name] = saved.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def checked_number(name: str, value: float) -> float:
    """The finite number that a module holds, from a number or a tensor of one without gradient."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        if value.requires_grad:
            raise TypeError(
                f"{name} must be a number: a tensor that learns goes to cosloss.functional, or "
                "let the module learn its own"
            )
        value = value.item()
    if not is_number(value):
        raise TypeError(f"{name} must be a number; got {described(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)
