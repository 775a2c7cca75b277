"""A loss that is no number: told at once, and nothing is trained on."""

import warnings

import lightning as L
import torch

from experiments.simclr.program.errors import Diverged

# with a loss scaler a step whose gradient is not finite is left out, and the weights stay sound
LEFT_OUT_AT_MOST = 10


class FiniteLoss(L.Callback):
    """Stop training where the loss is NaN or infinite: raise Diverged with what to try.

    On a CPU after that very step. A GPU is not waited for: it is asked at the steps at which
    Lightning logs. Stopping so, the last checkpoint stays the sound one of the epoch before.

    Args:
        stop: if False, warn once and train on.
    """

    def __init__(self, stop: bool = True) -> None:
        self.stop = stop
        self._rate = 0.0
        self._in_a_row: torch.Tensor | int = 0
        self._told = False

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self._told or outputs is None:
            return
        loss = outputs["loss"].detach()
        self._in_a_row = torch.where(loss.isfinite(), 0, self._in_a_row + 1)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        awaited = trainer._logger_connector.should_update_logs or trainer.is_last_batch
        if loss.device.type != "cpu" and not awaited:
            return
        allowed = LEFT_OUT_AT_MOST if scaled else 0
        # on all processes alike: one that stopped alone would leave the others waiting
        diverged = bool(self._in_a_row > allowed)
        if trainer.strategy.reduce_boolean_decision(diverged, all=False):
            self._tell(trainer, float(loss))

    def _tell(self, trainer: L.Trainer, loss: float) -> None:
        self._told = True
        first = trainer.fit_loop.epoch_loop.total_batch_idx + 1 - max(int(self._in_a_row), 1)
        first //= trainer.accumulate_grad_batches
        message = (
            f"the loss is {loss} from step {first} on (learning rate {self._rate:.3g}): try a "
            "lower optimizer.lr, a longer model.warmup_epochs, +trainer.gradient_clip_val=1"
        )
        if str(trainer.precision).startswith("16"):
            message += ", trainer.precision=bf16-mixed"
        if self.stop:
            raise Diverged(f"{message}; callbacks.finite_loss.stop=false trains on")
        if trainer.is_global_zero:
            warnings.warn(f"{message}; training goes on", stacklevel=2)
