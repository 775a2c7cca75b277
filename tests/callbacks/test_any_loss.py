"""What the callbacks take for a loss, and what they say of what they cannot judge."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from cosloss import CosineEmbeddingLoss, NTXentLoss, reference
from cosloss.callbacks import GradcheckCallback, GradientDiscrepancyCallback, GradientError
from tests.callbacks import planted
from tests.callbacks.runs import TwoViews, both, data, strict, train, trainer_for


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


class BuiltLate(TwoViews):
    """Its loss is built in configure_model, as models of many processes build their parts."""

    def __init__(self, rule):
        super().__init__(None)
        self.rule = rule

    def configure_model(self):
        if self.loss is None:
            self.loss = planted.PlantedLoss(self.rule)


class OwnMethod(TwoViews):
    """Its loss is a method."""

    def __init__(self, rule):
        super().__init__(nn.Identity())
        del self.loss
        self.planted = planted.PlantedLoss(rule)

    def loss(self, z1, z2):
        return self.planted(z1, z2)


@pytest.mark.parametrize(
    ("model", "target"), [(BuiltLate, None), (OwnMethod, "loss"), (OwnMethod, "custom")]
)
def test_losses_built_late_and_methods(model, target, tmp_path):
    checks = strict(2, target=target)
    train(model(planted.right), checks, tmp_path)
    assert all(check.checks_run for check in checks)
    with pytest.raises(GradientError):
        train(model(planted.doubled), [GradcheckCallback(2, "raise", target)], tmp_path)


def test_a_method_is_named_where_no_loss_is(tmp_path):
    with pytest.raises(ValueError, match=r"`loss` is a method: target=.loss. watches"):
        train(OwnMethod(planted.right), both(), tmp_path)


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

    callback = check(on_failure="raise")
    with pytest.warns(UserWarning, match="was not checked: .*NaN"):
        train(Broken(NTXentLoss()), [callback], tmp_path)
    assert callback.checks_run == callback.checks_failed == 0 < callback.checks_skipped


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


def test_the_end_of_fit_says_in_one_line_what_was_checked(tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(
            planted.PlantedLoss(planted.right),
            [GradientDiscrepancyCallback(1)],
            tmp_path,
            batches=3,
        )
    said = [r.getMessage() for r in caplog.records if "gradient_discrepancy" in r.getMessage()]
    assert said == ["gradient_discrepancy: 3 checks, 0 failed, 0 not checked"]
