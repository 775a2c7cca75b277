"""The GPU benchmark's parts that need no GPU, and what it says where there is none."""

import json

import pytest
import torch

from cosloss import nt_xent_loss
from experiments.benchmarks import __main__ as program
from experiments.benchmarks import gpu
from experiments.benchmarks.gpu_results import Result, write


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path, capsys):
    assert program.main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out == "no CUDA device here: nothing was checked or timed\n"
    assert not (tmp_path / "out").exists()


def test_the_rivals_compute_the_same_loss():
    z1, z2 = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    exact = nt_xent_loss(z1, z2, gpu.TEMPERATURE)
    found = gpu.rivals()
    assert {"lean autograd", "torch.compile of lean"} <= found.keys()
    for name in {"lean autograd", "lightly"} & found.keys():  # lightly is in the [bench] extra
        torch.testing.assert_close(found[name](z1, z2), exact)


def test_nothing_is_timed_where_a_check_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.verify, "verify", lambda device: False)
    assert gpu.run(1, tmp_path / "out") == 1
    assert "nothing was timed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.fixture
def pretended(monkeypatch):
    """A GPU whose every measurement is a number: what is done, and in which order, is seen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda rounds: 3e12)
    monkeypatch.setattr(gpu, "matrix_rate", lambda dtype, rounds: 6e14)
    checks, measured, interrupted = [], [], gpu.NT_XENT[2]
    monkeypatch.setattr(gpu.verify, "verify", lambda device: checks.append(device) or True)

    def one(op):
        def measure(shape, dtype, rounds, machine):
            measured.append((op, shape, dtype))
            if shape == interrupted:
                raise KeyboardInterrupt
            name = str(dtype).removeprefix("torch.")
            yield Result(op, str(shape), name, "cosloss", 1.0, 1.0, 1.0, 0.0, 0.5)

        return measure

    monkeypatch.setattr(gpu, "_nt_xent", one("nt_xent_loss"))
    monkeypatch.setattr(gpu, "_row_wise", one("cosine_similarity"))
    return checks, measured


def test_what_ends_it_loses_no_result(pretended, tmp_path):
    _, measured = pretended
    with pytest.raises(KeyboardInterrupt):
        gpu.run(3, tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert len(content["results"]) == len(measured) - 1 == 4
    assert content["machine"]["float32_tflop_per_s"] == 200, "three products of TF32"


@pytest.mark.slow
def test_the_largest_comes_last(monkeypatch, pretended, tmp_path):
    checks, measured = pretended
    monkeypatch.setattr(gpu, "NT_XENT", gpu.NT_XENT[:2])
    assert program.main(["gpu", "--out", str(tmp_path)]) == 0
    assert checks == ["cuda"]
    assert [shape for _, shape, _ in measured[-2:]] == [*gpu.LARGEST] * 2


def test_checks_are_skipped_and_minutes_kept_where_asked(monkeypatch, pretended, tmp_path, capsys):
    checks, measured = pretended
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert program.main(["gpu", "--skip-checks", "--minutes", "1", "--out", str(tmp_path)]) == 0
    assert checks == []
    assert len(measured) == 2
    assert "after 1 min" in capsys.readouterr().out


def test_results_are_written_with_their_ratios(tmp_path):
    def result(contender, median):
        return Result("op", "8 x 4", "float32", contender, median, 1.0, 9.0, 0.5, 0.25)

    results = [result("cosloss", 2.0), result("rival", 5.0)]
    write(results, {"device": "a GPU", "copy_gb_per_s": 4000.2}, tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["machine"]["device"] == "a GPU"
    assert [r["contender"] for r in content["results"]] == ["cosloss", "rival"]
    table = (tmp_path / "gpu.md").read_text()
    assert "device a GPU, copy_gb_per_s 4000" in table
    assert "| rival | 5.000 | 1.000 to 9.000 | 0.5 | 25% | 2.50x |" in table
    assert (tmp_path / "gpu.png").stat().st_size > 0
