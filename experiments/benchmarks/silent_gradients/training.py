"""One short Lightning run with a case as the loss or layer, and what is learnt from it."""

import contextlib
import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.benchmarks.silent_gradients.adapter import STARTS, Collected
from experiments.benchmarks.silent_gradients.cases import Case

FEATURES = 6
STEPS = 4
JUMP = 10.0
SLOW_ENTRIES = 512  # beyond, gradcheck's slow mode takes minutes


class Encoded(L.LightningModule):
    """A linear encoder, and the case behind it."""

    def __init__(self, case: Case, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.case = case
        self.encoder = nn.Linear(FEATURES, prod(case.shape[1:]))
        self.loss = loss
        self.norms: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        h = self.encoder(batch[0]).reshape(self.case.shape)
        return self.case.value(self.loss, h, batch_idx)

    def on_after_backward(self) -> None:
        grads = [
            p.grad.coalesce() if p.grad.is_sparse else p.grad
            for p in self.parameters()
            if p.grad is not None
        ]
        self.norms.append(float(sum(g.norm() ** 2 for g in grads) ** 0.5))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(
    case: Case, make: Callable[[], Any], callbacks: list[Any], steps: int, **options: Any
) -> Encoded:
    """Fit for some steps, from the same weights and data every time."""
    torch.manual_seed(0)
    model = Encoded(case, make())
    data = torch.randn(steps * case.shape[0], FEATURES)
    with tempfile.TemporaryDirectory() as folder:
        quiet = {
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "default_root_dir": folder,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = L.Trainer(callbacks=callbacks, **(quiet | options))
        torch.manual_seed(1)
        trainer.fit(model, DataLoader(TensorDataset(data), case.shape[0]))
    return model


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights and buffers, to the bit."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def watched(
    case: Case,
    make: Callable[[], Any],
    twin: Callable[..., Any] | None,
    steps: int = STEPS,
    **options: Any,
) -> dict[str, Any]:
    """The callbacks' verdict, the seconds of the run, and the weights it left."""
    collected = Collected(twin)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            model = train(case, make, collected.callbacks, steps, **options)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            return {"word": "ended the run", "checks": 0, "reasons": [reason]}
    messages = [str(w.message) for w in warned if w.category is UserWarning]
    messages = [m for m in messages if m.startswith((*STARTS, "Grad"))]
    verdict = asdict(collected.verdict(messages))
    seconds = time.perf_counter() - start
    return verdict | {"seconds": round(seconds, 2), "weights": fingerprint(model)}


def unwatched(
    case: Case, make: Callable[[], Any], steps: int = STEPS, **options: Any
) -> dict[str, Any]:
    """The weights of a run without callbacks, and whether an alarm on gradient norms rings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = train(case, make, [], steps, **options)
    pairs = zip(model.norms, model.norms[1:], strict=False)
    jump = any(b > JUMP * a for a, b in pairs if a > 0)
    rings = jump or any(not math.isfinite(n) for n in model.norms)
    return {"word": "rings" if rings else "silent", "weights": fingerprint(model)}


def gradcheck(case: Case, make: Callable[[], Any]) -> str:
    """The word of torch.autograd.gradcheck, in float64, on the arguments as leaves."""
    torch.manual_seed(0)
    function = make()
    if isinstance(function, nn.Module):
        function = function.double()
    arguments = case.arguments(case.sample(), torch.Generator().manual_seed(0))
    if not case.alone or not all(_leaf_or_plain(a) for a in arguments):
        return "not applicable"
    leaves = [
        a.detach().requires_grad_(a.is_floating_point() or a.is_complex())
        if isinstance(a, Tensor)
        else a
        for a in arguments
    ]
    entries = sum(a.numel() for a in leaves if isinstance(a, Tensor))
    fast = entries > SLOW_ENTRIES
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.autograd.gradcheck(function, leaves, fast_mode=fast)
        except RuntimeError:  # GradcheckError too
            return "wrong"
        return "right"
    return "not applicable"


def _leaf_or_plain(argument: Any) -> bool:
    return not isinstance(argument, (list, tuple, dict))
