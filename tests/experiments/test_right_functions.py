"""The functions of the false-alarm runs: both forms are one function, and no check accuses them."""

import torch

from experiments.studies.right_functions import cases, count


def test_both_forms_are_one_function():
    for seed in range(3):
        for name, function, twin, inputs in cases(seed):
            if "float32" in name or name.startswith(("rms", "rotary")):
                continue  # these compute in float32 whatever they are given
            wide = [t.double() if t.is_floating_point() else t for t in inputs]
            assert torch.allclose(function(*wide), twin(*wide), rtol=1e-10, atol=1e-12), name


def test_no_check_accuses_them():
    counts = count(1e-4)
    assert sum(n for name, n in counts.items() if name.endswith("checks")) == 17 * 3 * 2
    assert not any(n for name, n in counts.items() if name.endswith("alarms"))
