"""The benchmark's data is honest: faulty gradients are wrong, mended and right ones are right."""

import json

import pytest
import torch

from experiments.benchmarks.silent_gradients import faults, judge, processes, right, two_processes
from experiments.benchmarks.silent_gradients.cases import FAULTS, RIGHT
from experiments.benchmarks.silent_gradients.table import markdown

WRONG = 1e-3
RIGHT_WITHIN = 1e-5

assert faults
assert right


def error(case, make):
    """By finite differences where no gradient is stopped on purpose, and by the twin if any."""
    found = 0.0 if case.stops else judge.worst_slope(case, make())
    if case.twin is not None:
        grads = judge.gradient(case, make())
        found = max(found, judge.difference(grads, judge.twin_gradient(case)))
    return found


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_a_fault_is_wrong_and_its_mended_version_right(case):
    assert error(case, case.make) > max(WRONG, 2 * case.tolerance)
    assert error(case, case.mend) < case.tolerance


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.name)
def test_a_right_function_is_right(case):
    if case.missing():
        pytest.skip(f"needs {case.missing()}")
    assert not case.stops or case.twin is not None
    assert error(case, case.make) < RIGHT_WITHIN


@pytest.mark.slow
def test_faults_across_processes():
    found = two_processes.errors()
    assert found.keys() == {case.name for case in processes.FAULTS}
    for name, (faulty, mended) in found.items():
        assert faulty > WRONG, name
        assert mended < 1e-10, name


def test_there_are_as_many_as_the_benchmark_claims():
    everything = [*FAULTS, *processes.FAULTS]
    names = [case.name for case in [*everything, *RIGHT]]
    assert len(names) == len(set(names))
    assert len(everything) >= 40
    assert sum(case.area == "contrastive" for case in everything) >= 15
    assert len(processes.FAULTS) >= 8
    assert sum(not case.needs for case in RIGHT) >= 100
    sources = [case.source for case in everything]
    assert len(set(sources)) == len(sources)
    assert all(source.startswith("https://github.com/") for source in sources)


def test_the_table_names_a_missed_fault_and_a_false_alarm():
    seen = {"word": "wrong", "weights": "a", "reasons": ["off by | half"], "first": True}
    unseen = {"word": "right", "weights": "a", "reasons": []}
    alarm = {"word": "silent", "weights": "a"}
    results = [
        {"name": FAULTS[0].name, "what": "fault", "watched": seen, "mended": unseen},
        {"name": FAULTS[1].name, "what": "fault", "watched": seen, "mended": seen},
        {"name": RIGHT[0].name, "what": "right", "watched": seen | {"weights": "b"}},
        {"name": RIGHT[1].name, "what": "right", "skip": "needs something"},
    ]
    results = [json.loads(json.dumps(r | {"alarm": alarm, "gradcheck": "right"})) for r in results]
    table = markdown(results)
    assert "| callbacks | 1 of 2 | 1 of 1 |" in table
    assert "At the first check: 1 of 2." in table
    assert f"| {RIGHT[0].name} | wrong | other | off by / half |" in table
    assert "No right function is accused" not in table
    assert "No right function is accused" in markdown(results[:2])
