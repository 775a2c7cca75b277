"""The random generators' states, so that every call of a function draws the same numbers."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# of the others, a dropout's mask is the same in every dtype
DRAWS = {f"aten::{n}" for n in ("normal_", "uniform_", "exponential_", "randn", "rand")} | {
    "aten::randn_like",
    "aten::rand_like",
}


class Generators:
    """The states of torch's, Python's and NumPy's global generators at one moment."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        self.cuda = (
            torch.cuda.get_rng_state()
            if torch.cuda.is_available() and torch.cuda.is_initialized()
            else None
        )
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy: Any = numpy.random.get_state() if numpy else None

    def restore(self) -> None:
        """Put the generators back to these states."""
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        if not torch.equal(self.torch, torch.get_rng_state()) or self.python != random.getstate():
            return True
        return self.cuda is not None and not torch.equal(self.cuda, torch.cuda.get_rng_state())


@contextmanager
def generators_kept() -> Iterator[None]:
    """A scope that leaves the generators as it found them."""
    before = Generators()
    try:
        yield
    finally:
        before.restore()


class Draw:
    """Random tensors from a generator of one's own: the global ones stay where they are.

    Args:
        seed: the same seed draws the same tensors, on every device.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal entries, of the shape, dtype and device of `like`."""
        return torch.randn(like.shape, dtype=like.dtype, generator=self.generator, device="cpu").to(
            like.device
        )

    def uniform(self, like: Tensor) -> Tensor:
        """Entries between 0 and 1, of the shape, dtype and device of `like`."""
        return torch.rand(like.shape, dtype=like.dtype, generator=self.generator, device="cpu").to(
            like.device
        )

    def signs(self, like: Tensor) -> Tensor:
        """Entries 1 and -1, of the shape, dtype and device of `like`."""
        bits = torch.randint(2, like.shape, generator=self.generator, device="cpu")
        return (2 * bits - 1).to(like.dtype).to(like.device)

    def below(self, end: int) -> int:
        """An integer from 0 to end - 1."""
        return int(torch.randint(end, (), generator=self.generator, device="cpu"))

    def cotangent(self, output: Tensor) -> Tensor:
        """A generic gradient on an output: ±k/8, k = 1 ... 15, exact in every dtype.

        No number of neighbours has a sum that is known, so that a backward which leaves out a
        mean or a sum is seen; on a 0-d output it is never 1, so that one which leaves out the
        incoming gradient is.
        """
        shape = (*output.shape, 2) if output.is_complex() else output.shape
        small: dict[str, Any] = {"dtype": torch.int8, "generator": self.generator, "device": "cpu"}
        steps = torch.randint(1, 16, shape, **small)
        steps[steps == 8] = 7 if output.ndim == 0 else 8
        steps *= 2 * torch.randint(2, shape, **small) - 1
        if output.is_complex():
            drawn = torch.view_as_complex(steps.double() / 8).to(output.dtype)
        else:
            drawn = steps.to(output.dtype) / 8
        return drawn.to(output.device)


class Draws:
    """The dtypes in which a function draws random numbers, so that float64 draws the same ones.

    A generator's next normal number in float64 is another than in float32. Within `recorded` the
    dtypes of a call's draws are kept; within `replayed` they are drawn so, and widened.
    """

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def recorded(self) -> "_Drawing":
        """A scope for one call, in the precision of training."""
        self.dtypes = []
        return _Drawing(self.dtypes, record=True)

    def replayed(self) -> "_Drawing":
        """A scope for one call in float64."""
        return _Drawing(self.dtypes, record=False)


class _Drawing(TorchDispatchMode):
    def __init__(self, dtypes: list[torch.dtype], record: bool) -> None:
        super().__init__()
        self.dtypes = dtypes
        self.record = record
        self.place = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name not in DRAWS:
            return func(*args, **kwargs)
        if self.record:
            found = func(*args, **kwargs)
            self.dtypes.append(found.dtype)
            return found
        dtype = self.dtypes[self.place] if self.place < len(self.dtypes) else None
        self.place += 1
        if dtype is None:
            return func(*args, **kwargs)
        if name.endswith("_"):
            narrow = func(args[0].to(dtype), *args[1:], **kwargs)
            return args[0].copy_(narrow)
        wide = kwargs.get("dtype") or (args[0].dtype if isinstance(args[0], Tensor) else None)
        found = func(*args, **{**kwargs, "dtype": dtype})
        return found if wide is None else found.to(wide)
