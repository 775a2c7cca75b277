"""Options that several losses share are described in the same words."""

import inspect
import re

import pytest

import cosloss
from cosloss import functional

LOSSES = ("nt_xent_loss", "info_nce_loss", "sup_con_loss", "sigmoid_contrastive_loss")
SHARED = {
    "temperature": (*LOSSES, "max_sim_loss"),
    "query_mask": ("max_sim", "max_sim_loss"),
    "gather_distributed": (*LOSSES[:2], LOSSES[3], "in_batch_cosine_embedding_loss"),
}


def argument(function, name):
    """The description of an argument, its lines joined."""
    text = inspect.getdoc(getattr(functional, function))
    match = re.search(rf"^    {name}: (.*?)(?=^    \S|^\S|^$)", text, re.M | re.S)
    assert match, (function, name)
    return " ".join(match[1].split())


@pytest.mark.parametrize("name", SHARED)
def test_shared_options_have_one_description(name):
    assert len({argument(function, name) for function in SHARED[name]}) == 1
    assert len(argument(SHARED[name][0], name)) > 40


def test_an_option_of_one_loss_begins_like_the_others():
    shared = argument("nt_xent_loss", "gather_distributed")
    assert argument("sup_con_loss", "gather_distributed").startswith(shared.removesuffix("."))


@pytest.mark.parametrize(
    "name", ["NTXentLoss", "InfoNCELoss", "SupConLoss", "MaxSimLoss", "SigmoidContrastiveLoss"]
)
def test_modules_show_every_keyword(name):
    module = getattr(cosloss, name)
    shown = inspect.signature(module).parameters
    assert "options" not in shown
    assert {"temperature", "reduction", "learnable_temperature", "dtype"} <= set(shown)
    module(**{p.name: p.default for p in shown.values()})
