"""Which configuration is launched, by a kernel that notes it and times that are given."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import local

import pytest
import torch
from triton import Config, OutOfResources

from cosloss.kernels.triton import card, tuning

FIRST, SLOW, FAST = (Config({"BLOCK": block}) for block in (1, 2, 3))
MILLISECONDS = {1: 2.0, 2: 3.0, 3: 1.0}


class Kernel:
    """A kernel that notes the block in which a thread launches it."""

    def __init__(self):
        self.of_thread = local()

    def __getitem__(self, grid):
        return self

    def __call__(self, *, BLOCK, **others):
        self.of_thread.block = BLOCK


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def measured(monkeypatch, kernel):
    """The blocks that were timed; no two may be at once."""
    blocks = []
    at_work = []

    def do_bench(call, return_mode):
        at_work.append(call)
        assert len(at_work) == 1
        call()
        blocks.append(kernel.of_thread.block)
        time.sleep(0.01)
        at_work.pop()
        return MILLISECONDS[blocks[-1]]

    monkeypatch.setattr(tuning, "do_bench", do_bench)
    monkeypatch.setattr(tuning, "_chosen", {})
    return blocks


def launched(kernel, rows, configs=(FIRST, SLOW, FAST), kind="exp"):
    """The block of the launch itself."""
    tuning.launch_fastest(kernel, configs, (1,), torch.zeros(1), ["KIND"], rows=rows, KIND=kind)
    return kernel.of_thread.block


def test_the_fastest_is_kept_for_sizes_kinds_and_cards_alike(kernel, measured, monkeypatch):
    assert launched(kernel, tuning.MEASURED) == 3
    assert measured == [1, 2, 3]
    assert launched(kernel, tuning.LARGE - 1) == 3
    assert measured == [1, 2, 3]
    for times, change in enumerate(({"rows": tuning.LARGE}, {"kind": "hinge"}), 2):
        assert launched(kernel, **{"rows": tuning.MEASURED, **change}) == 3
        assert measured == times * [1, 2, 3]
    monkeypatch.setattr(card, "INTERPRETER", card.INTERPRETER._replace(name="another"))
    launched(kernel, tuning.MEASURED)
    assert measured == 4 * [1, 2, 3]


def test_a_small_batch_takes_the_first_and_chooses_for_no_other(kernel, measured):
    assert launched(kernel, tuning.MEASURED - 1) == 1
    assert measured == []
    assert launched(kernel, tuning.MEASURED) == 3


def test_one_configuration_is_not_timed(kernel, measured):
    assert launched(kernel, tuning.LARGE, [SLOW]) == 2
    assert measured == []


def test_deterministic_algorithms_take_the_first_whatever_was_chosen(kernel, measured):
    launched(kernel, tuning.LARGE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert launched(kernel, tuning.LARGE) == 1
        assert launched(kernel, tuning.LARGE, kind="hinge") == 1
    finally:
        torch.use_deterministic_algorithms(before)
    assert measured == [1, 2, 3]


def test_what_the_card_cannot_launch_is_not_chosen(kernel, measured, monkeypatch):
    bench = tuning.do_bench

    def refused(call, return_mode):
        found = bench(call, return_mode)
        if found == MILLISECONDS[3]:
            raise OutOfResources(102400, 101376, "shared memory")
        return found

    monkeypatch.setattr(tuning, "do_bench", refused)
    assert launched(kernel, tuning.LARGE) == 1


def test_threads_that_begin_at_once_choose_once(kernel, measured):
    kinds = ["exp", "hinge"] * 4
    with ThreadPoolExecutor(len(kinds)) as pool:
        found = pool.map(lambda kind: launched(kernel, tuning.LARGE, kind=kind), kinds)
        assert set(found) == {3}  # and raises what a thread raised
    assert measured == 2 * [1, 2, 3]
