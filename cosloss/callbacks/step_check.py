"""The training step as a whole, its gradient against its loss's slopes, while it trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cosloss.arguments import check_count
from cosloss.callbacks import record
from cosloss.callbacks.check import COUNTS
from cosloss.callbacks.packages import Callback, DummyLogger, LightningModule, Trainer
from cosloss.watch.step_check import StepCheck

# strategies by name, since Lightning's package has two
WHOLE = ("SingleDeviceStrategy", "DDPStrategy")
_UNSET = object()


class StepCheckCallback(Callback):
    """Check every n-th training step as a whole, across all processes.

    After the backward pass, before clipping, the scaler and the optimizer, `training_step` is
    called again on the same batch with the parameters moved a little, all generators, buffers and
    attributes as they were. The mean of the losses over the processes must change as the gradient
    says. After the optimizer's step all processes must have the same parameters.

    Finds what no check of one call can: a collective without a gradient, factors of world_size, a
    detached module, a dropped micro-batch, a wrong hook or division. Some eight forward passes a
    check; training goes on to the bit as without it.

    Logs `step_check/{passed,factor,error,resolution,seconds}`, `step_check/<module>/factor` and
    `step_check/skipped`: the factor is how many times the right gradient training had, the error is
    the largest over all directions, the resolution is how well the slope is known.

    Args:
        every_n_batches: how often; the first batch is checked.
        on_failure: "warn", "raise" a `GradientError`, or "stop" gracefully, with a checkpoint.
        directions: so many top-level modules get a direction of their own on each check, in turn;
            None for all. The gradient's own direction and a random one are always tried.

    Attributes:
        checks_run: how many checks came to a verdict.
        checks_failed: how many of these said wrong.
        checks_skipped: how many could not be made; a warning says why, once.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range.
    """

    def __init__(
        self, every_n_batches: int = 500, on_failure: str = "warn", directions: int | None = 1
    ) -> None:
        check_count("every_n_batches", every_n_batches)
        # refuses what is out of range
        StepCheck(nn.Identity(), every_n_batches, on_failure, directions)
        self.every_n_batches = every_n_batches
        self.on_failure = on_failure
        self.directions = directions
        self.batches_seen = self.checks_run = self.checks_failed = self.checks_skipped = 0
        self.check: StepCheck | None = None
        self._restore: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"check": None, "_restore": None}  # a copied model takes us along

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.check = StepCheck(pl_module, self.every_n_batches, self.on_failure, self.directions)
        self.check.steps_seen = self.batches_seen
        for name in COUNTS:
            setattr(self.check, name, getattr(self, name))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        self._unwrap()
        self.check = None

    def _unwrap(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._unwrap()
        check = self.check
        if check is None:
            return
        check.steps_seen, check.finding = self.batches_seen, None
        if not check.due():
            return
        why = _unsuited(trainer, pl_module)
        if why:
            check.skip(why)
            return
        check.trained = {
            id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]
        }
        step = pl_module.training_step

        def observed(*args: Any, **kwargs: Any) -> Any:
            self._unwrap()  # an optimizer may ask for the same batch again

            def again() -> Any:
                context = trainer.precision_plugin.train_step_context()
                with _unlogged(trainer, pl_module), context:
                    return step(*args, **kwargs)

            return check.observe(lambda: step(*args, **kwargs), again)

        # Lightning reads the signature, one wrapper deep: whether it takes a batch_idx
        observed.__wrapped__ = getattr(step, "__wrapped__", step)  # type: ignore[attr-defined]
        self._restore = _set(pl_module, training_step=observed)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if self.check is not None:
            self.check.before_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.check is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        accumulates = trainer.fit_loop._should_accumulate()
        self.check.after_backward(scale / trainer.accumulate_grad_batches, not accumulates)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._unwrap()
        check = self.check
        if check is None:
            return
        check.steps_seen = self.batches_seen + 1
        if self.batches_seen % self.every_n_batches == 0 and check.finding is None:
            check.skip("training_step returned no loss")
        failed = check.finish()
        self.batches_seen = check.steps_seen
        for name in COUNTS:
            setattr(self, name, getattr(check, name))
        found = check.finding
        if found is not None and trainer.is_global_zero:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step Lightning logs at
            record.log(trainer.loggers, check.prefix, found.scalars, found, step, _write_nothing)
        if failed:
            check.act()
        if check.should_stop and not trainer.should_stop:
            directory = Path(trainer.default_root_dir) / "gradient_failures"
            trainer.save_checkpoint(directory / f"stopped-step{self.batches_seen:06d}.ckpt")
            trainer.should_stop = True

    def state_dict(self) -> dict[str, int]:
        return {n: getattr(self, n) for n in ("batches_seen", *COUNTS)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
            if self.check is not None and name in COUNTS:
                setattr(self.check, name, value)


def _unsuited(trainer: Trainer, pl_module: LightningModule) -> str:
    """Why no step of this run can be checked; empty if it can."""
    if not pl_module.automatic_optimization:
        return "manual optimization: use cosloss.watch.StepCheck around each backward pass"
    strategy = type(trainer.strategy).__name__
    if strategy not in WHOLE:
        return f"{strategy} may not keep whole parameters on each process"
    return ""


@contextmanager
def _unlogged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """A scope in which the module logs to nothing."""
    loggers = trainer._loggers
    trainer._loggers = [DummyLogger() for _ in loggers]
    undo = _set(pl_module, log=_write_nothing, log_dict=_write_nothing)
    try:
        yield
    finally:
        undo()
        trainer._loggers = loggers


def _write_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of `log`, and of what other callbacks add on TensorBoard."""


def _set(module: LightningModule, **attributes: Any) -> Callable[[], None]:
    """Put attributes of the instance over the class's; returns what undoes it."""
    own = {name: vars(module).get(name, _UNSET) for name in attributes}
    vars(module).update(attributes)

    def undo() -> None:
        for name, value in own.items():
            if value is _UNSET:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value

    return undo
