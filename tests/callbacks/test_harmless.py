"""What the callbacks must not do: change training, break under what Lightning offers, hold on."""

import copy
import io
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from cosloss import NTXentLoss, reference
from cosloss.callbacks import GradientDiscrepancyCallback, GradientError
from tests.callbacks import planted
from tests.callbacks.runs import TwoViews, both, data, strict, train, trainer_for
from tests.slow import slow


class Counting(nn.Module):
    """A loss in plain torch code with everything a check could disturb."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))
        self.dropped = nn.Dropout(0.0)

    def forward(self, z1, z2):
        self.calls += 1
        temperature = self.log_temperature.exp() * (1 + 0.1 * self.calls)
        return reference.nt_xent_loss(self.dropped(z1), z2, temperature)


def fp16():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, fp16()]
)
@pytest.mark.parametrize("loss", [Counting, *slow(NTXentLoss)])
def test_training_is_the_same_bit_for_bit(loss, options, tmp_path):
    def states(callbacks):
        options_ = copy.deepcopy(options)
        model = train(loss(), callbacks, tmp_path, batches=5, **options_)
        random_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        return model.state_dict(), random_state

    plain, plain_random = states([])
    for callbacks in (strict(1), strict(2), [GradientDiscrepancyCallback(3)]):
        checked, checked_random = states(callbacks)
        assert all(check.checks_failed == 0 for check in callbacks)
        assert all(torch.equal(plain[name], checked[name]) for name in plain)
        assert torch.equal(plain_random[0], checked_random[0])
        assert plain_random[1:] == checked_random[1:]


class Fused(TwoViews):
    """A fused optimizer takes the scaled gradients and divides them itself."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


def test_a_fused_optimizer_under_a_scaler(tmp_path):
    def weights(callbacks, loss):
        torch.manual_seed(0)
        return train(Fused(loss), callbacks, tmp_path, batches=5, **fp16()).state_dict()

    plain, checked = weights([], NTXentLoss()), weights(strict(), NTXentLoss())
    assert all(torch.equal(plain[name], checked[name]) for name in plain)
    with pytest.raises(GradientError):
        weights(strict(), planted.PlantedLoss(planted.doubled))


def test_nothing_is_left_behind_even_by_a_check_that_raises(tmp_path):
    model = TwoViews(planted.PlantedLoss(planted.negated))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(GradientError):
        train(model, strict(), tmp_path)
    assert not model.loss._forward_pre_hooks
    assert not model.loss._forward_hooks
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_an_exception_in_the_loop_releases_the_loss(tmp_path):
    class Failing(TwoViews):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise KeyError("unrelated")
            return super().training_step(batch, batch_idx)

    model = Failing(NTXentLoss())
    with pytest.raises(KeyError, match="unrelated"):
        train(model, both(), tmp_path)
    assert not model.loss._forward_pre_hooks


def test_the_encoder_does_not_run_again(tmp_path):
    model = TwoViews(NTXentLoss())
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    train(model, strict(), tmp_path, batches=4)
    assert len(calls) == 2 * 4


def test_first_last_and_every_nth_batch_within_accumulation(tmp_path):
    checks = both(4)
    train(NTXentLoss(), checks, tmp_path, batches=10, accumulate_grad_batches=4)
    # batches 0, 4, 8 and, at the end, 9
    assert [check.checks_run for check in checks] == [4, 4]
    assert [check.batches_seen for check in checks] == [10, 10]


def test_manual_optimization_and_a_loss_called_twice(tmp_path):
    class Manual(TwoViews):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            z1, z2 = self.views(batch)
            self.manual_backward(self.loss(z1, z2) + self.loss(z2.clone(), z1=z1) * 0.5)
            optimizer.step()

    class Symmetric(nn.Module):
        def forward(self, z2, z1):
            return reference.nt_xent_loss(z1, z2)

        def reference(self):
            return lambda z2, z1: reference.nt_xent_loss(z1, z2)

    checks = strict()
    train(Manual(Symmetric()), checks, tmp_path)
    assert [check.checks_run for check in checks] == [4, 4]


def test_a_fault_in_the_second_call_of_a_step_is_seen(tmp_path):
    class Second(nn.Module):
        def forward(self, z1, z2, wrong):
            return reference.nt_xent_loss(planted.Late.apply(z1, {"step": 99 * wrong}), z2)

        def reference(self):
            return lambda z1, z2, wrong: reference.nt_xent_loss(z1, z2)

    class Twice(TwoViews):
        def training_step(self, batch, batch_idx):
            z1, z2 = self.views(batch)
            return self.loss(z1, z2, False) + self.loss(z1, z2, wrong=True)

    checks = both(10)
    with pytest.warns(UserWarning, match="z1: .*0.9 times"):
        train(Twice(Second()), checks, tmp_path, batches=1)
    assert [check.checks_failed for check in checks] == [1, 1]


@pytest.mark.parametrize("logger", ["several", "fast", *slow("none", "csv")])
def test_loggers(logger, tmp_path):
    options = {
        "several": {"logger": [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]},
        "none": {"logger": False},
        "csv": {"logger": CSVLogger(tmp_path)},
        "fast": {"fast_dev_run": True, "logger": True},
    }[logger]
    checks = both()
    with pytest.warns(UserWarning, match="reproduce it"):
        train(planted.PlantedLoss(planted.doubled), checks, tmp_path, **options)
    assert all(check.checks_failed == check.checks_run > 0 for check in checks)


def test_the_sanity_check_and_validation_are_not_observed(tmp_path):
    class Validated(TwoViews):
        def validation_step(self, batch, batch_idx):
            with torch.inference_mode(False), torch.enable_grad():
                self.loss(*(z.requires_grad_() for z in self.views(batch)))

    checks = strict()
    torch.manual_seed(0)
    trainer_for(tmp_path, checks, num_sanity_val_steps=2).fit(
        Validated(NTXentLoss()), data(), data(seed=1)
    )
    assert [check.checks_run for check in checks] == [4, 4]


def test_counters_survive_a_checkpoint(tmp_path):
    checks = both(3)
    model = TwoViews(NTXentLoss())
    trainer = trainer_for(tmp_path, checks)
    torch.manual_seed(0)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    resumed = both(3)
    trainer = trainer_for(tmp_path, resumed, max_epochs=2)
    trainer.fit(TwoViews(NTXentLoss()), data(), ckpt_path=tmp_path / "model.ckpt")
    assert [check.batches_seen for check in resumed] == [8, 8]
    assert resumed[0].checks_run > checks[0].checks_run == 2


def test_stop_is_graceful_and_leaves_a_checkpoint(tmp_path):
    check = GradientDiscrepancyCallback(on_failure="stop")
    with pytest.warns(UserWarning, match="is wrong in batch 0"):
        train(planted.PlantedLoss(planted.zero), [check], tmp_path)
    assert check.batches_seen == 1
    (saved,) = (tmp_path / "gradient_failures").glob("stopped-*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 1


def test_the_model_can_be_copied_and_pickled_while_it_is_observed(tmp_path):
    class Copying(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            twin = copy.deepcopy(pl_module.loss)
            twin(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3))
            torch.save(pl_module.loss, io.BytesIO())

    checks = strict()
    train(NTXentLoss(), [*checks, Copying()], tmp_path)
    assert [check.checks_run for check in checks] == [4, 4]


def test_nothing_is_held_but_on_due_batches(tmp_path):
    held = []

    class Holding(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            calls = [check.watch._recordings for check in trainer.callbacks[:2]]
            held.append([sum(map(len, seen.values())) for seen in calls])

        def on_before_zero_grad(self, trainer, *_):
            held.append([len(check.watch._recordings) for check in trainer.callbacks[:2]])

    train(Counting(), [*both(3), Holding()], tmp_path, batches=6)
    assert held == [
        [1, 1],
        [0, 0],
        *([[0, 0]] * 4),
        [1, 1],
        [0, 0],
        *([[0, 0]] * 2),
        [1, 1],
        [0, 0],
    ]
