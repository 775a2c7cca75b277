"""A loss that stops a gradient on purpose is right for every check, however it is called."""

import pytest
import torch
from torch import nn

from cosloss import InfoNCELoss, info_nce_loss
from cosloss.adapters import MultipleNegativesRankingLoss
from cosloss.gradient_check import check_finite_differences
from cosloss.watch import GradientError, GradientWatch, StepCheck
from cosloss.watch.checks import Differences

N, D = 6, 8


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


FORMS = {
    "keys": {},
    "learnt": {"temperature": torch.tensor(0.3, dtype=torch.float64)},
    "shared hard": {"hard_negatives": drawn(5, D, seed=2)},
    "own hard": {"hard_negatives": drawn(N, 2, D, seed=2)},
    "one kind": {"hard_negatives": drawn(N, 2, D, seed=2), "hardness_on": "hard"},
    "directions": {"directions": ("query_to_key", "key_to_query", "query_to_query")},
    "limit": {"false_negative_margin": 0.1},
    "symmetric": {"symmetric": True},
    "limit, symmetric": {"false_negative_margin": 0.1, "symmetric": True},
    "guide": {"false_negative_margin": 0.1, "guide": (drawn(N, 3, seed=3), drawn(N, 3, seed=4))},
    "prefixes": {"dims": (3, 8)},
    "groups": {"ignore": torch.arange(N) % 4, "weight": torch.arange(N) / 3},
}


class Model(nn.Module):
    """A tower, and a module around a loss, of which it knows nothing."""

    def __init__(self, loss):
        super().__init__()
        self.tower = nn.Linear(D, D)
        nn.init.eye_(self.tower.weight)
        self.objective = Objective(loss)

    def forward(self, query, key):
        return self.objective(self.tower(query), self.tower(key))


class Objective(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, query, key):
        return 3 * self.loss(query, key)


class Pairs(MultipleNegativesRankingLoss):
    """Of embeddings, in the place of a model's."""

    def forward(self, query, key):
        return super().forward([{"sentence_embedding": x} for x in (query, key)])


class Twice(torch.autograd.Function):
    """The identity, with a gradient that is twice the right one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Wrong(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, query, key):
        return Twice.apply(self.loss(query, key))


@pytest.mark.parametrize("form", FORMS)
def test_a_call_of_the_function(form):
    options = dict(FORMS[form])
    temperature = options.pop("temperature", 0.2)
    query = drawn(N, D)
    key = query + drawn(N, D, seed=1)

    def call(query, key, temperature):
        return info_nce_loss(query, key, temperature, hardness=2.0, **options)

    found = check_finite_differences(call, query, key, temperature)
    assert found.passed, found
    assert found.constants
    twice = check_finite_differences(lambda *x: Twice.apply(call(*x)), query, key, temperature)
    assert not twice.passed
    assert not twice.skipped


LOSSES = [
    InfoNCELoss(0.2, hardness=2.0),
    InfoNCELoss(0.2, hardness=2.0, symmetric=True, learnable_temperature=True),
    Pairs(lambda x: x, hardness_mode="in_batch_negatives", hardness_strength=3.0, scale=5.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("target", ["objective", "objective.loss"])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_module(loss, target, wrong):
    model = Model(Wrong(loss) if wrong else loss)
    watch = GradientWatch(model, target, 1, "raise", check=Differences())

    def step():
        with watch.step():
            model(drawn(N, D).float(), drawn(N, D, seed=1).float()).backward()

    if wrong:
        with pytest.raises(GradientError):
            step()
    else:
        step()
        assert watch.checks_failed == 0
        assert watch.checks_run > 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("wrong", [False, True])
def test_a_training_step(loss, wrong):
    model = Model(Wrong(loss) if wrong else loss)
    check = StepCheck(model, every=1)
    query = drawn(N, D).float()
    loss = check.observe(lambda: model(query, query + 0.5 * drawn(N, D, seed=1).float()))
    loss.backward()
    check.after_backward()
    said = "times the right one|missing or wrong" if wrong else "the step stops gradients at"
    with pytest.warns(UserWarning, match=said):
        check.after_step()
    assert check.checks_failed == wrong
