"""`python -m cosloss.verify`: right ops pass, a wrong one fails with exit status 1."""

from dataclasses import replace

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
    monkeypatch.setattr(verify, "verify", lambda **options: options["dtypes"] == ["float32"])
    assert verify.main(["--dtype", "float32"]) == 0
    assert verify.main(["--dtype", "float64"]) == 1
