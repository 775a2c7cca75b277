"""What both callbacks share: when to check, what to log, what to do about a failure."""

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from cosloss.callbacks.finding import Finding, GradientError, worst
from cosloss.callbacks.observed import (
    Found,
    Observation,
    Target,
    add_live_gradient,
    find_losses,
    observe,
)
from cosloss.callbacks.record import Record
from cosloss.gradient_check.module import PureLoss

ON_FAILURE = ("warn", "raise", "stop")
CALLS_PER_BATCH = 4
Twin = Callable[..., Any] | Mapping[str, Callable[..., Any]] | None

_checking = False  # a check calls the loss, perhaps through an observed module: not to be observed


class LossCheck(Callback):
    """Observes calls of a loss through forward hooks, and checks them at the end of some batches.

    Batches are counted, since global_step stands still within gradient accumulation. On a batch
    that is due, every process checks its own calls and all share one verdict.
    """

    prefix: str
    live_graph = False

    def __init__(
        self, every_n_batches: int, on_failure: str, target: Target, rows: int | None, twin: Twin
    ) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1; got {every_n_batches}")
        if on_failure not in ON_FAILURE:
            names = ", ".join(ON_FAILURE)
            raise ValueError(f"on_failure must be one of {names}; got {on_failure!r}")
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be at least 1, or None for all; got {rows}")
        self.every_n_batches = every_n_batches
        self.on_failure = on_failure
        self.target = target
        self.rows = rows
        self.twin = twin
        self.batches_seen = self.checks_run = self.checks_failed = 0
        self._losses: dict[str, PureLoss] = {}
        self._undo: list[Callable[[], None]] = []
        self._observed: dict[str, list[Observation]] = {}
        self._listening = self._due = self._fresh = self._ever = False
        self._open: Observation | None = None
        self._checked: set[str] = set()
        self._failures: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        # a model that is copied or pickled in training takes its hooks, and us, along: idle
        idle: dict[str, Any] = {
            "_losses": {},
            "_undo": [],
            "_observed": {},
            "_open": None,
            "_listening": False,
        }
        return vars(self) | idle

    @abstractmethod
    def check(self, loss: PureLoss, observation: Observation) -> Finding:
        """Judge one call of the loss."""

    def settings(self) -> dict[str, Any]:
        """The options that a replay of this check needs."""
        return {}

    def log_details(
        self, writer: Any, name: str, finding: Finding, observation: Observation, step: int
    ) -> None:
        """Write more than scalars to a TensorBoard writer."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # before the first compiled call: hooks added later would never fire
        if stage != "fit":
            return
        self._release()
        for name, (module, found) in find_losses(pl_module, self.target).items():
            twin = self.twin.get(name) if isinstance(self.twin, Mapping) else self.twin
            self._losses[name] = PureLoss(module, twin)
            if isinstance(found, Found):
                self._undo.append(found.release)
            before = module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            after = module.register_forward_hook(partial(self._after, name), with_kwargs=True)
            self._undo += [before.remove, after.remove]
        # asks every process, so it is asked here
        directory = Path(trainer.log_dir or trainer.default_root_dir) / "gradient_failures"
        self._record = Record(self.prefix, directory, trainer.global_rank)
        self._fresh = True
        self._ever = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._losses.clear()
        self._observed.clear()
        self._listening = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._due = self._fresh or self.batches_seen % self.every_n_batches == 0
        if self._due:
            self._checked.clear()
        self._fresh = False
        self._listening = True
        self._observed.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._listening = False
        # a loss that the due batch did not call is checked on the first batch that does
        for name in self._observed.keys() - self._checked:
            self._check_calls(trainer, name)
        self.batches_seen += 1
        if self._due or trainer.world_size == 1:
            self._share_verdict(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in list(self._observed):
            self._check_calls(trainer, name)
        self._share_verdict(trainer)
        if not self._ever:
            names = ", ".join(self._losses)
            warnings.warn(
                f"{type(self).__name__} checked nothing: {names} was never called with an input "
                "that requires a gradient",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, int]:
        return {n: getattr(self, n) for n in ("batches_seen", "checks_run", "checks_failed")}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    @torch.compiler.disable
    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._open = None
        seen = self._observed.get(name, [])
        if not self._listens() or len(seen) == CALLS_PER_BATCH:
            return
        loss = self._losses[name]
        to_check = name not in self._checked
        arguments = loss.arguments(args, kwargs)
        self._open = observe(loss, arguments, self.rows, self.batches_seen, complete=to_check)
        if self._open is not None:
            self._observed[name] = [*seen, self._open]

    @torch.compiler.disable
    def _after(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        if self.live_graph and self._listens() and self._open and self._open.complete:
            loss = self._losses[name]
            add_live_gradient(self._open, loss, loss.arguments(args, kwargs), result)
        self._open = None

    def _listens(self) -> bool:
        return self._listening and not _checking and torch.is_grad_enabled()

    def _check_calls(self, trainer: Trainer, name: str) -> None:
        global _checking
        start = time.perf_counter()
        observations = self._observed.pop(name)
        _checking = True
        try:
            findings = [self._check_one(name, observation) for observation in observations]
        finally:
            _checking = False
        self._checked.add(name)
        self._ever = True
        self.checks_run += 1
        shown = next((i for i, found in enumerate(findings) if not found.passed), 0)
        found, observation = findings[shown], observations[shown]
        if not found.passed:
            self.checks_failed += 1
            self._failures.append(
                self._record.failure(
                    name, self.batches_seen, found, observation, self._losses[name], self.settings()
                )
            )
        scalars = worst([found.scalars for found in findings])
        scalars["seconds"] = time.perf_counter() - start
        if trainer.is_global_zero:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step Lightning logs at
            details = partial(
                self.log_details, name=name, finding=found, observation=observation, step=step
            )
            self._record.log(trainer.loggers, name, scalars, found, step, details)

    def _check_one(self, name: str, observation: Observation) -> Finding:
        loss = self._losses[name]
        if not observation.complete:
            observation.inputs |= loss.state()
        with ExitStack() as stack:
            for kind, dtype in observation.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            try:
                return self.check(loss, observation)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                # a check that cannot run is not a pass
                return Finding(False, f"the check could not run: {error}", {}, str(error))

    def _share_verdict(self, trainer: Trainer) -> None:
        """Act on a failure of any process, on all of them."""
        failures, self._failures = self._failures, []
        if not trainer.strategy.reduce_boolean_decision(bool(failures), all=False):
            return
        if not failures:
            failures = [f"{self.prefix}: a gradient check failed on another process"]
        message = "\n".join(failures)
        if self.on_failure == "raise":
            raise GradientError(message)
        warnings.warn(message, stacklevel=2)
        if self.on_failure == "stop" and not trainer.should_stop:
            trainer.save_checkpoint(
                self._record.directory / f"stopped-batch{self.batches_seen:06d}.ckpt"
            )
            trainer.should_stop = True
