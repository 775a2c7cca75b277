"""GradientWatch in other people's loops: each test is an example to copy."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cosloss.watch import GradientError, GradientWatch


class HalfTanh(torch.autograd.Function):
    """tanh, whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 0.5 * grad * (1 - y * y)


class Tanh(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        return HalfTanh.apply(x) if self.wrong else x.tanh()

    def reference(self):
        return lambda x: 1 - 2 / (torch.exp(2 * x) + 1)


def model_of(wrong):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Tanh(wrong), nn.Linear(8, 3))


BATCHES = [(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(4)]


def in_a_plain_loop(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = GradientWatch(model, target="1", every=2, on_failure="raise")
    for x, y in BATCHES:
        with watch.step():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return watch


def in_fabric(model):
    fabric_module = pytest.importorskip("lightning.fabric", reason="lightning is in [train]")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    watch = GradientWatch(model, target="1", every=2, on_failure="raise")
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for x, y in BATCHES:
        with watch.step():
            fabric.backward(F.cross_entropy(wrapped(x), y))
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return watch


def in_hugging_faces_trainer(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is in [bench]")
    pytest.importorskip("accelerate", reason="accelerate is in [bench]")

    class Watch(transformers.TrainerCallback):
        """Steps of the watch are those of the optimizer: with gradient accumulation, several calls.

        The first four calls of each module are looked at.
        """

        def __init__(self, watch):
            self.watch = watch

        def on_step_begin(self, args, state, control, **kwargs):
            self.watch.start()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.watch.act(self.watch.finish())
            control.should_training_stop |= self.watch.should_stop

        def on_train_end(self, args, state, control, **kwargs):
            self.watch.close()

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    classifier = Classifier()
    watch = GradientWatch(classifier, target="net.1", every=2, on_failure="raise")
    rows = [
        {"x": row, "labels": label} for x, y in BATCHES for row, label in zip(x, y, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=6,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        classifier, arguments, train_dataset=rows, callbacks=[Watch(watch)]
    )
    trainer.train()
    return watch


@pytest.mark.parametrize("loop", [in_a_plain_loop, in_fabric, in_hugging_faces_trainer])
def test_a_wrong_gradient_ends_the_run_and_a_right_one_is_counted(loop, tmp_path):
    more = (tmp_path,) if loop is in_hugging_faces_trainer else ()
    watch = loop(model_of(False), *more)
    assert watch.summary() == "gradient_discrepancy: 2 checks, 0 failed, 0 not checked"
    with pytest.raises(GradientError, match=r"it is 0\.5 times the right one"):
        loop(model_of(True), *more)


def test_scalars_go_to_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is in [train]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = model_of(True)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        watch = GradientWatch(model, target="1", every=2, log=writer.add_scalar)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x, y in BATCHES:
                with watch.step():
                    F.cross_entropy(model(x), y).backward()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    points = found.Scalars("gradient_discrepancy/1/failed")
    assert [(point.step, point.value) for point in points] == [(0, 1), (2, 2)]
    assert found.Scalars("gradient_discrepancy/1/x/error_over_budget")[0].value > 1
