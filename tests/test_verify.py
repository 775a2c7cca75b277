"""`python -m cosloss.verify`: right ops pass, a wrong one fails with exit status 1."""

from dataclasses import replace

import torch

from cosloss import verify
from cosloss.testing import OPS

SIMILARITY = OPS[0]


def wrong(x1, x2, **keywords):
    return 1.001 * SIMILARITY.function(x1, x2, **keywords)


def test_right_ops_pass_and_torchs_errors_stand_beside_them(capsys):
    assert verify.verify([SIMILARITY], ["float32"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    hard = lines[2].split()
    assert hard[-1] == "ok"
    assert float(hard[4]) < 1e-6 < float(hard[7])  # ours, torch's at zero rows and large norms


def test_a_wrong_op_fails_with_its_sample_named():
    lines = []
    planted = replace(SIMILARITY, function=wrong)
    assert not verify.verify([planted], ["float32"], show=lines.append)
    assert "FAIL at" in lines[1]


def test_exit_status(monkeypatch):
    monkeypatch.setattr(verify, "verify", lambda **options: options["dtypes"] != ["float64"])
    monkeypatch.setattr(verify, "verify_surroundings", lambda **options: same)
    same = True
    assert verify.main(["--dtype", "float32"]) == 0
    assert verify.main(["--dtype", "float64"]) == 1
    same = False
    assert verify.main(["--dtype", "float32"]) == 1


def test_a_surrounding_that_changes_an_op_fails_with_both_named():
    def default_dtype(x1, x2):
        return SIMILARITY.function(x1, x2) * torch.tensor(1 / 3)

    lines = []
    generic = [*SIMILARITY.generic()][:1]
    planted = replace(SIMILARITY, function=default_dtype, generic=lambda: generic)
    assert not verify.verify_surroundings([planted], ["float64"], show=lines.append)
    (failed,) = (line for line in lines if "FAIL" in line and line.startswith("default_dtype"))
    assert "FAIL: cosine_similarity at 'generic'" in failed
    (failed,) = (line for line in lines if line.startswith("default_device"))
    assert "RuntimeError" in failed
