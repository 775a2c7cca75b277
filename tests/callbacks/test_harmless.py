"""What the callbacks must not do: change training, break under what Lightning offers, hold on."""

import copy
import csv
import io
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from cosloss import CosineEmbeddingLoss, NTXentLoss, reference
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback, GradientError
from tests.callbacks import planted
from tests.callbacks.runs import TwoViews, data, train, trainer_for


def both(n=1, **options):
    return [GradcheckCallback(n, **options), GradientDiscrepancyCallback(n, **options)]


def strict(n=1, **options):
    return both(n, on_failure="raise", **options)


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
@pytest.mark.parametrize("loss", [Counting, NTXentLoss])
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


class Nested(nn.Module):
    """Takes a dict of tuples, integers, None and labels; returns a dict."""

    def __init__(self, wrong):
        super().__init__()
        self.late = {"step": 99 if wrong else 0}

    def forward(self, views, labels, k, ignore=None, names=("a",)):
        z1, z2 = views["pair"]
        loss = nn.functional.cross_entropy(planted.Late.apply(z1, self.late) + k * z2, labels)
        return {"loss": loss, "rows": len(z1)}


@pytest.mark.parametrize("wrong", [False, True])
def test_nested_and_non_tensor_arguments(wrong, tmp_path):
    class Model(TwoViews):
        def training_step(self, batch, batch_idx):
            z1, z2 = self.views(batch)
            labels = torch.arange(len(z1)) % z1.shape[1]
            return self.loss({"pair": (z1, z2)}, labels, 2, names=("b", "c"))["loss"]

    def twin(views, labels, k, ignore=None, names=()):
        z1, z2 = views["pair"]
        return nn.functional.cross_entropy(z1 + k * z2, labels)

    checks = both(twin=twin)
    train(Model(Nested(wrong)), checks, tmp_path)
    assert [check.checks_failed > 0 for check in checks] == [wrong, wrong]


@pytest.mark.parametrize("where", ["loss_fn", "criterion", "parts.inner", "several"])
def test_where_the_loss_is_found(where, tmp_path):
    class Model(TwoViews):
        def __init__(self):
            super().__init__(nn.Identity(), "unused")
            self.parts = nn.Module()
            self.parts.inner = CosineEmbeddingLoss()
            self.loss_fn = NTXentLoss() if where == "loss_fn" else None
            self.criterion = NTXentLoss() if where != "loss_fn" else None

        def training_step(self, batch, batch_idx):
            views = self.views(batch)
            return self.parts.inner(*views) + (self.loss_fn or self.criterion)(*views)

    target = {"several": {"cosine": "parts.inner", "nt_xent": "criterion"}}.get(where)
    checks = strict(2, target="parts.inner" if "." in where else target)
    train(Model(), checks, tmp_path)
    assert [check.checks_run for check in checks] == ([6, 6] if where == "several" else [3, 3])


def test_a_function_as_loss(tmp_path):
    model = TwoViews(nn.Identity())
    del model.loss
    model.loss = reference.nt_xent_loss
    checks = strict(twin=reference.nt_xent_loss)
    train(model, checks, tmp_path)
    assert [check.checks_run for check in checks] == [4, 4]
    assert model.loss is reference.nt_xent_loss


def test_no_loss_is_said(tmp_path):
    with pytest.raises(ValueError, match="target="):
        train(TwoViews(NTXentLoss(), name="objective"), both(), tmp_path)


def test_a_loss_that_is_never_called_is_said(tmp_path):
    model = TwoViews(NTXentLoss(), name="objective")
    model.loss = NTXentLoss()
    with pytest.warns(UserWarning, match="checked nothing"):
        train(model, [GradcheckCallback()], tmp_path)


@pytest.mark.parametrize("how", ["module", "in place", "function", "step"])
def test_compiled(how, tmp_path):
    model = TwoViews(NTXentLoss())
    if how == "module":
        model.loss = torch.compile(model.loss, backend="aot_eager")
    elif how == "in place":
        model.loss.compile(backend="aot_eager")
    elif how == "function":
        del model.loss
        model.loss = torch.compile(reference.nt_xent_loss, backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    checks = strict(2)
    torch.manual_seed(0)
    trainer_for(tmp_path, checks).fit(model, data())
    assert [check.checks_run for check in checks] == [3, 3]


@pytest.mark.parametrize("logger", ["several", "none", "csv", "fast"])
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


def test_only_sampled_rows_are_held(tmp_path):
    held = []

    class Holding(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for check in trainer.callbacks[:2]:
                for seen in check._observed.values():
                    held.append(max(len(z) for z in seen[0].inputs["args"].values()))
                    assert "self" not in seen[0].inputs

    train(Counting(), [*both(3, rows=4), Holding()], tmp_path, rows=32)
    assert held == [4] * 4


def test_collapsed_embeddings_are_said_to_be_degenerate(tmp_path):
    class Collapsed(TwoViews):
        def views(self, batch):
            z1, z2 = super().views(batch)
            return 0 * z1 + self.encoder.bias, 0 * z2 + self.encoder.bias

    check = GradcheckCallback(10, on_failure="raise")
    logger = CSVLogger(tmp_path)
    train(Collapsed(NTXentLoss()), [check], tmp_path, batches=1, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["gradcheck/loss/degenerate"]) == 1
    assert float(row["gradcheck/loss/passed"]) == 1
    wrong = GradcheckCallback(10, on_failure="raise")
    with pytest.raises(GradientError, match="generic"):
        train(Collapsed(planted.PlantedLoss(planted.swapped)), [wrong], tmp_path)


@pytest.mark.parametrize("check", [GradcheckCallback, GradientDiscrepancyCallback])
def test_nan_is_never_a_pass(check, tmp_path):
    class Broken(TwoViews):
        def views(self, batch):
            return tuple(z * float("nan") for z in super().views(batch))

    with pytest.raises(GradientError, match="NaN"):
        train(Broken(NTXentLoss()), [check(on_failure="raise")], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches"),
        ({"on_failure": "explode"}, "explode"),
        ({"rows": 0}, "rows"),
    ],
)
@pytest.mark.parametrize("check", [GradcheckCallback, GradientDiscrepancyCallback])
def test_bad_arguments_are_said(check, options, message):
    with pytest.raises(ValueError, match=message):
        check(**options)
