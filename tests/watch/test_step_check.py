"""StepCheck in one process: right steps are silent, and the same to the bit; faults are seen."""

import copy
import functools
import json
import random
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cosloss.callbacks import GradientError, StepCheckCallback
from cosloss.gradient_check.slopes import measure
from cosloss.watch import StepCheck
from tests.callbacks.runs import data, trainer_for


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Model(L.LightningModule):
    """An encoder and a head, with all that a step may have around them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.head = nn.Linear(16, 4)
        self.calls = 0

    def loss_of(self, x):
        return self.head(self.encoder(x)).square().mean()

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = self.loss_of(batch[0])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def decorated(step):
    @functools.wraps(step)
    def call(*args):
        return step(*args)

    return call


class BatchAlone(Model):
    """A step that takes no batch_idx, behind a decorator."""

    @decorated
    def training_step(self, batch):
        self.calls += 1
        return self.loss_of(batch[0])


class Dropout(Model):
    def loss_of(self, x):
        random_signs = random.random() + np.random.rand()
        return (
            (self.head(F.dropout(self.encoder(x + 0.1 * torch.randn_like(x)), 0.3)) * random_signs)
            .square()
            .mean()
        )


class Queue(Model):
    """A queue in a Python list, a counter in a dict, and a generator of its own."""

    def __init__(self):
        super().__init__()
        self.queue = []
        self.generator = torch.Generator().manual_seed(3)
        self.seen = {"rows": 0, "last": None}

    def loss_of(self, x):
        z = F.normalize(self.head(self.encoder(x)))
        noise = torch.rand(len(x), 4, generator=self.generator)
        loss = (z * noise).square().sum(1).mean()
        if self.queue:
            loss = loss + (z @ torch.cat(self.queue).t()).exp().mean()
        self.queue.append(z.detach())
        del self.queue[:-3]
        self.seen["rows"] += len(x)
        self.seen["last"] = x
        return loss * (1 + 0.01 * self.seen["rows"])


class Teacher(Model):
    """BYOL: an EMA teacher, moved by the step itself; its output is a constant."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.encoder)

    def loss_of(self, x):
        with torch.no_grad():
            for mine, theirs in zip(
                self.teacher.parameters(), self.encoder.parameters(), strict=True
            ):
                mine.mul_(0.9).add_(theirs, alpha=0.1)
            target = self.teacher(x)
        return F.mse_loss(self.encoder(x + 0.1), target) + self.head(target).square().mean()


class FrozenTeacher(Teacher):
    def __init__(self):
        super().__init__()
        self.teacher.requires_grad_(False)

    def loss_of(self, x):
        target = self.teacher(x)
        return F.mse_loss(self.head(self.encoder(x)), target[:, :4])


class Siamese(Model):
    """SimSiam: the other branch of the same encoder is detached."""

    def loss_of(self, x):
        z1, z2 = self.encoder(x), self.encoder(x + 0.3)
        return -F.cosine_similarity(self.head(z1), z2[:, :4].detach()).mean()


class Detached(Model):
    def loss_of(self, x):
        return self.head(self.encoder(x).detach()).square().mean()


class Dropped(Model):
    """Two micro-batches; the backward pass of the first is forgotten."""

    def loss_of(self, x):
        self.last = super().loss_of(x[6:])
        return (super().loss_of(x[:6]) + self.last) / 2

    def backward(self, loss):
        (self.last / 2).backward()


class DividedTwice(Model):
    def backward(self, loss):
        (loss / self.trainer.accumulate_grad_batches).backward()


class Hooked(Model):
    def __init__(self):
        super().__init__()
        self.head.weight.register_hook(lambda grad: 1.03 * grad)


class OneWrong(Model):
    """The encoder's gradient has a wrong factor, the head's is right."""

    def loss_of(self, x):
        return self.head(Scaled.apply(self.encoder(x), 0.7)).square().mean()


class Hinge(Model):
    def loss_of(self, x):
        return F.relu(1 - self.head(F.relu(self.encoder(x)))).mean()


def fit(kind, callbacks, tmp_path, batches=5, **options):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = kind()
    trainer = trainer_for(tmp_path, callbacks, **options)
    trainer.fit(model, data(batches))
    return model, trainer


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def drawn():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


class Classified(Model):
    """Its parameters, logits and loss move by few steps of 16 bits each."""

    factor = 1.0

    def loss_of(self, x):
        z = self.head(self.encoder(x))
        return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])

    def backward(self, loss):
        (self.factor * loss).backward()


class HalfClassified(Classified):
    factor = 0.5


RIGHT = {
    "plain": (Model, {}),
    "batch alone": (BatchAlone, {}),
    "dropout": (Dropout, {}),
    "queue": (Queue, {}),
    "frozen teacher": (FrozenTeacher, {}),
    "hinge": (Hinge, {}),
    "bf16": (Model, {"precision": "bf16-mixed"}),
    "bf16 throughout": (Classified, {"precision": "bf16-true"}),
    "accumulation": (Model, {"accumulate_grad_batches": 2}),
    "clipping": (Model, {"gradient_clip_val": 1e-3}),
    "float64": (Model, {"precision": "64-true"}),
}


@pytest.mark.parametrize("name", [*RIGHT, "teacher", "siamese"])
def test_training_is_the_same_to_the_bit(name, tmp_path):
    kind, options = RIGHT.get(name) or ({"teacher": Teacher, "siamese": Siamese}[name], {})
    plain, trainer = fit(kind, [], tmp_path, **options)
    then, logged = drawn(), trainer.logged_metrics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked, trainer = fit(kind, [StepCheckCallback(1)], tmp_path, **options)
    assert drawn() == then
    assert trainer.logged_metrics == logged
    assert checked.calls == plain.calls
    for n, t in bits(plain).items():
        assert torch.equal(t, bits(checked)[n]), n
    assert "training_step" not in vars(checked)
    assert "log" not in vars(checked)
    if name == "queue":
        assert len(checked.queue) == 3
        assert all(map(torch.equal, plain.queue, checked.queue))
        assert plain.seen["rows"] == checked.seen["rows"]


@pytest.mark.parametrize("name", RIGHT)
def test_right_steps_are_silent(name, tmp_path):
    kind, options = RIGHT[name]
    check = StepCheckCallback(1, on_failure="raise", directions=None)
    fit(kind, [check], tmp_path, batches=8, **options)
    assert check.checks_failed == 0
    # a step beside a kink has no slope, and one in bfloat16 not always a known one
    loose = name in ("hinge", "bf16", "bf16 throughout")
    assert check.checks_run >= (4 if loose else 8)


WRONG = {
    "detached": (Detached, {}, "`encoder`: no gradient reaches it"),
    "dropped": (Dropped, {}, ""),
    "divided twice": (DividedTwice, {"accumulate_grad_batches": 2}, "it is 0.5 times"),
    "hook": (Hooked, {}, "`head`: 1.03 times"),
    "one module": (OneWrong, {}, "`encoder`: 0.7 times"),
    "bf16 throughout": (HalfClassified, {"precision": "bf16-true"}, " times the right one"),
    "one module in bf16": (OneWrong, {"precision": "bf16-mixed"}, "`encoder`: 0."),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_seen_at_the_first_check(name, tmp_path):
    kind, options, said = WRONG[name]
    check = StepCheckCallback(1, on_failure="raise")
    with pytest.raises(GradientError) as caught:
        fit(kind, [check], tmp_path, **options)
    assert said in str(caught.value)
    assert check.checks_failed == 1


def test_only_the_module_that_is_wrong_is_named(tmp_path):
    with pytest.raises(GradientError) as caught:
        fit(OneWrong, [StepCheckCallback(1, on_failure="raise")], tmp_path)
    assert "`head`" not in str(caught.value)


@pytest.mark.parametrize("kind", [Teacher, Siamese])
def test_a_gradient_that_is_stopped_on_purpose_is_named_and_not_wrong(kind, tmp_path):
    check = StepCheckCallback(1, on_failure="raise")
    with pytest.warns(UserWarning, match=r"the step stops gradients at test_step_check\.py:\d+"):
        fit(kind, [check], tmp_path)
    assert check.checks_failed == 0
    assert check.checks_skipped > 0


class Manual(Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch[0]))
        optimizer.step()


class Nothing(Model):
    def training_step(self, batch, batch_idx):
        return None


class Unrepeatable(Model):
    def __init__(self):
        super().__init__()
        self.numbers = iter(range(10**6))

    def loss_of(self, x):
        return super().loss_of(x) * (1 + next(self.numbers))


class RaisesAgain(Model):
    """Its step cannot be called twice, for a reason that lies outside of it."""

    happened: ClassVar[set] = set()

    def loss_of(self, x):
        key = float(x.sum()), self.trainer.global_step
        if key in self.happened:
            raise KeyError("once only")
        self.happened.add(key)
        return super().loss_of(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Manual, "manual optimization"),
        (Nothing, "no loss"),
        (Unrepeatable, "iterator"),
        (RaisesAgain, "KeyError"),
    ],
)
def test_what_cannot_be_checked_says_why(kind, reason, tmp_path):
    RaisesAgain.happened = set()
    check = StepCheckCallback(1, on_failure="raise")
    with pytest.warns(UserWarning, match=f"step_check: not checked: .*{reason}"):
        fit(kind, [check], tmp_path, batches=2)
    assert (check.checks_run, check.checks_failed, check.checks_skipped) == (0, 0, 2)


def test_every_n_batches_and_scalars(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    check = StepCheckCallback(every_n_batches=3)
    logger = CSVLogger(tmp_path)
    fit(Model, [check], tmp_path, batches=7, logger=logger, log_every_n_steps=1)
    assert check.checks_run == 3
    assert check.batches_seen == 7
    logger.save()
    logged = set((Path(logger.log_dir) / "metrics.csv").read_text().split("\n")[0].split(","))
    wanted = ("passed", "factor", "error", "resolution", "seconds", "encoder/factor")
    assert {f"step_check/{tag}" for tag in wanted} <= logged


def test_stop_ends_the_run_with_a_checkpoint(tmp_path):
    check = StepCheckCallback(2, on_failure="stop")
    with pytest.warns(UserWarning, match="the step is wrong in batch 0"):
        _, trainer = fit(OneWrong, [check], tmp_path)
    assert trainer.global_step == 1
    assert len(list((tmp_path / "gradient_failures").glob("*.ckpt"))) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every_n_batches": 0}, "every_n_batches must be at least 1; got 0"),
        ({"on_failure": "cry"}, "on_failure must be one of"),
        ({"directions": -1}, "directions must be at least 0"),
    ],
)
def test_arguments_out_of_range(arguments, said):
    with pytest.raises(ValueError, match=said):
        StepCheckCallback(**arguments)


def plain_loop(step, scale=1.0, wrong=1.0):
    """Gradient accumulation over two micro-batches in a loop of one's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    check = StepCheck(model, every=1, on_failure="raise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(8, 4)
            loss = check.observe(lambda x=x: step(model, x))
            (loss * scale * wrong).backward()
            check.after_backward(scale)
        optimizer.step()
        check.after_step()
    return check


def test_a_plain_loop():
    check = plain_loop(lambda model, x: model(x).square().mean(), scale=0.5)
    assert check.summary() == "step_check: 3 checks, 0 failed, 0 not checked"
    assert json.loads(check.report())["last"]["verdict"] == "right"


def test_a_plain_loop_that_divides_twice():
    with pytest.raises(GradientError, match=r"it is 0\.5 times the right one in every module"):
        plain_loop(lambda model, x: model(x).square().mean(), scale=0.5, wrong=0.5)


def test_a_closure_is_put_back():
    count = 0
    seen = []

    def step(model, x):
        nonlocal count
        count += 1
        seen.append(x)
        return model(x).square().mean() * (1 + 0.1 * count)

    plain_loop(step)
    assert count == len(seen) == 6


def test_a_loss_that_jumps_is_not_called_wrong():
    # a mean over the triplets that count: its gradient is right, and it jumps with their number
    def triplets(model, x, labels):
        z = model(x)
        near = torch.cdist(z, z)
        same = labels[:, None] == labels[None, :]
        hinge = (near[:, :, None] - near[:, None, :] + 0.05).relu()
        counted = hinge[(same[:, :, None] & ~same[:, None, :]) & (hinge > 0)]
        return counted.mean()

    verdicts = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        check = StepCheck(model, every=1)
        for _ in range(25):
            x, labels = torch.randn(16, 12), torch.arange(16) % 4
            model.zero_grad()
            check.observe(functools.partial(triplets, model, x, labels)).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check.after_backward()
                check.after_step()
            verdicts.append(check.finding.verdict)
    assert "wrong" not in verdicts
    assert verdicts.count("right") > 50


class Padded(nn.Module):
    """Padding has an embedding that is not trained, and no mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=0)
        nn.init.normal_(self.embed.weight)

    def forward(self):
        tokens = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 4, 1]])
        return self.embed(tokens).mean(1).exp().sum()


class Chosen(nn.Module):
    """One of several, by a straight-through Gumbel softmax."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(4, 3)

    def forward(self):
        chosen = F.gumbel_softmax(self.logits(torch.ones(6, 4)), hard=True)
        return (chosen * torch.tensor([1.0, 5.0, -2.0])).sum()


@pytest.mark.parametrize("kind", [Padded, Chosen])
def test_what_torch_itself_stops_is_named_and_not_wrong(kind):
    torch.manual_seed(0)
    model = kind()
    check = StepCheck(model, 1, on_failure="raise")
    check.observe(model).backward()
    check.after_backward()
    with pytest.warns(UserWarning, match=r"the step stops gradients at \w+\.py:\d+"):
        check.after_step()
    assert (check.checks_failed, check.checks_skipped) == (0, 1)


class Complex(nn.Module):
    """Parameters that are complex numbers."""

    def __init__(self, right):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.right = right

    def forward(self):
        weight = self.weight if self.right else self.weight + 0.5 * self.weight.detach()
        return (weight * (1 + 2j)).exp().abs().sum()


def test_complex_parameters():
    torch.manual_seed(0)
    for right in (True, False):
        model = Complex(right)
        check = StepCheck(model, 1)
        check.observe(model).backward()
        if not right:
            model.weight.grad.mul_(1j)
        check.after_backward()
        with nullcontext() if right else pytest.warns(UserWarning, match="is wrong"):
            check.after_step()
        assert (check.checks_run, check.checks_failed) == (1, int(not right))


def clear(optimizer):
    optimizer.zero_grad()


def clear_in_place(optimizer):
    optimizer.zero_grad(set_to_none=False)


def keep(optimizer):
    """Accumulate over all steps."""


@pytest.mark.parametrize("before", [clear, clear_in_place, keep])
@pytest.mark.parametrize("after", [clear, clear_in_place, keep])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_gradients_are_cleared_before_the_loss_or_after_it(before, after, factor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    check = StepCheck(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with nullcontext() if factor == 1 else pytest.warns(UserWarning, match="it is 1.5 times"):
        for _ in range(3):
            before(optimizer)
            x = torch.randn(6, 4)
            loss = check.observe(lambda x=x: model(x).square().mean())
            after(optimizer)
            (factor * loss).backward()
            check.after_backward()
            optimizer.step()
            check.after_step()
    assert check.checks_run == 3
    assert check.checks_failed == (0 if factor == 1 else 3)


def test_the_backward_pass_of_another_loss_is_wrong():
    model = nn.Linear(4, 1)
    check = StepCheck(model, 1, on_failure="raise")
    check.observe(lambda: model(torch.ones(2, 4)).square().mean())
    model(torch.ones(2, 4)).sum().backward()
    check.after_backward()
    with pytest.raises(GradientError):
        check.after_step()


def test_a_graph_that_is_gone_through_twice():
    model = nn.Linear(4, 1)
    check = StepCheck(model, 1)
    loss = check.observe(lambda: model(torch.ones(2, 4)).square().mean())
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    check.after_backward()
    check.after_step()
    assert (check.checks_run, check.checks_failed) == (1, 0)


def test_parameters_that_have_no_shape_yet():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))
    check = StepCheck(model, 1)
    for step in range(2):
        loss = check.observe(lambda: model(torch.ones(2, 4)).square().mean())
        model.zero_grad()
        loss.backward()
        check.after_backward()
        with nullcontext() if step else pytest.warns(UserWarning, match="have their shapes from"):
            check.after_step()
    assert (check.checks_run, check.checks_failed, check.checks_skipped) == (1, 0, 1)


def test_a_step_that_a_format_swallows_is_no_slope():
    def in_steps(t):
        """Slope 1, seen in steps of 0.01 alone; a gradient that says so, or says twice that."""
        return round(100 * t) / 100

    for factor, wrong in ((1.0, False), (2.0, True)):
        slope = measure(
            lambda t, factor=factor: (in_steps(t), factor * t), 0.0, 1e-3, 1.0, swallows=True
        )
        assert slope.wrong == wrong, slope
    # the longest step alone, where it is a coarse one, says little
    slope = measure(lambda t: (float(round(2.2 * t)), 3 * t), 0.0, 1e-3, 1.0, swallows=True)
    assert not slope.wrong
    assert not slope.right
    # one that stays is the function's own
    constant = measure(lambda t: (0.0, t), 0.0, 1e-3, 1.0, swallows=True)
    assert constant.wrong
    assert constant.measured == 0
