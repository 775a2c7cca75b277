"""What both callbacks share: when to check, how to log, what to do about a failure."""

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from cosloss.callbacks.observed import Observation, PureLoss, Target, find_losses, observe

ON_FAILURE = ("warn", "raise", "stop")
_checking = False  # a check calls the loss: no callback may observe that call


class GradientError(RuntimeError):
    """A gradient check failed, and the callback was told to raise."""


class LossCheck(Callback):
    """Observes calls of a loss through a forward pre-hook, and checks some at the end of a batch.

    The first and the last batch are always checked; batches are counted, since global_step stands
    still within gradient accumulation.
    """

    def __init__(
        self,
        every_n_batches: int,
        on_failure: str = "warn",
        target: Target = None,
        rows: int | None = None,
        twin: Callable[..., Any] | None = None,
    ) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1; got {every_n_batches}")
        if on_failure not in ON_FAILURE:
            raise ValueError(
                f"on_failure must be one of {', '.join(ON_FAILURE)}; got {on_failure!r}"
            )
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be at least 1, or None for all; got {rows}")
        self.every_n_batches = every_n_batches
        self.on_failure = on_failure
        self.target = target
        self.rows = rows
        self.twin = twin
        self.batches_seen = self.checks_run = self.checks_failed = 0
        self._losses: dict[str, PureLoss] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._observed: dict[str, list[Observation]] = {}
        self._listening = self._due = self._started = False

    @abstractmethod
    def check(
        self, name: str, loss: PureLoss, observation: Observation
    ) -> tuple[bool, str, dict[str, float]]:
        """Verdict, reason, and the scalars by tag, of one call of the loss."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # before the first compiled call: hooks added later would never fire
        if stage != "fit" or self._handles:
            return
        for name, module in find_losses(pl_module, self.target).items():
            self._losses[name] = PureLoss(module, self.twin)
            self._handles.append(
                module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            )
        self._started = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._losses.clear()
        self._observed.clear()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._due = not self._started or self.batches_seen % self.every_n_batches == 0
        self._started = self._listening = True
        self._observed.clear()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._listening = False
        self.batches_seen += 1
        if self._due:
            self._run(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._started and not self._due:
            self._run(trainer)

    def state_dict(self) -> dict[str, int]:
        names = ("batches_seen", "checks_run", "checks_failed")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _hook(self, name: str) -> Callable[..., None]:
        @torch.compiler.disable
        def observe_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._listening or _checking or not torch.is_grad_enabled():
                return
            inputs = self._losses[name].inputs(args, kwargs)
            observation = observe(inputs, self.rows, offset=self.batches_seen)
            if observation is not None:
                self._observed.setdefault(name, []).append(observation)

        return observe_call

    def _run(self, trainer: Trainer) -> None:
        global _checking
        failures = []
        for name, observations in self._observed.items():
            start = time.perf_counter()
            _checking = True
            try:
                results = [self._check_one(name, o) for o in observations]
            finally:
                _checking = False
            scalars = {
                tag: (min if tag.endswith("/passed") else max)(s[tag] for _, _, s in results)
                for tag in results[0][2]
            }
            scalars[f"{self.prefix}/{name}/seconds"] = time.perf_counter() - start
            self.checks_run += 1
            wrong = [reason for passed, reason, _ in results if not passed]
            if wrong:
                self.checks_failed += 1
                failures.append(f"{self.prefix}: {name}, batch {self.batches_seen - 1}: {wrong[0]}")
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)
        self._observed.clear()
        # every rank asks, so that a failure on one reaches all
        if trainer.strategy.reduce_boolean_decision(bool(failures), all=False):
            self._fail(trainer, failures or [f"{self.prefix}: a check failed on another process"])

    def _check_one(self, name: str, observation: Observation) -> tuple[bool, str, dict[str, float]]:
        with ExitStack() as stack:
            for kind, dtype in observation.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            return self.check(name, self._losses[name], observation)

    def _fail(self, trainer: Trainer, failures: list[str]) -> None:
        message = "\n".join(failures)
        for logger in trainer.loggers:
            logger.save()
        if self.on_failure == "raise":
            raise GradientError(message)
        rank_zero_warn(message)
        if self.on_failure == "stop":
            trainer.should_stop = True

    @property
    @abstractmethod
    def prefix(self) -> str:
        """The first part of every tag."""
