"""A loss that is no number: told at once, training stops, and results.json has nulls."""

import json

import pytest
import torch

from experiments.simclr.module import SimCLR

SMOKE = ("experiment=simclr_smoke", "trainer.max_epochs=3")


@pytest.fixture
def broken_at(monkeypatch):
    """broken_at(batches, value): the loss of these batches is multiplied by the value."""
    step, seen = SimCLR.training_step, []

    def patch(batches, value):
        def broken(self, batch, batch_idx):
            loss = step(self, batch, batch_idx)
            seen.append(batch_idx)
            return loss * value if len(seen) - 1 in batches else loss

        monkeypatch.setattr(SimCLR, "training_step", broken)

    return patch


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_it_stops_with_what_to_try_and_nulls(train, tmp_path, broken_at, value):
    broken_at([5], float(value))
    run = train(*SMOKE, f"hydra.run.dir={tmp_path}/run")
    assert run.status == 1
    assert "Traceback" not in run.err
    (told,) = (line for line in run.err.splitlines() if "training has stopped" in line)
    assert f"the loss is {value} from step 5 on (learning rate 0.00" in told
    assert "optimizer.lr" in told
    text = (tmp_path / "run/results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)
    assert results["test/knn"] is None
    assert results["test/linear"] is None
    assert results["not_measured"] == "the loss is no number"
    assert results["steps"] == 6
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4, "of the epoch before"
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


def test_told_to_it_trains_on_and_has_nulls_too(train, tmp_path, broken_at):
    broken_at([5], float("nan"))
    on = "callbacks.finite_loss.stop=false", f"hydra.run.dir={tmp_path}/run"
    with pytest.warns(UserWarning, match="nan from step 5 on") as told:
        run = train(*SMOKE, *on)
    assert len([w for w in told if "from step 5" in str(w.message)]) == 1
    assert run.status == 0, run.err
    assert "not measured: the features are no numbers" in " ".join(run.out.split())
    text = (tmp_path / "run/results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)
    assert (results["test/knn"], results["steps"]) == (None, 12)


def test_a_learning_rate_that_is_too_large(train, tmp_path):
    large = "optimizer=sgd", "optimizer.lr=1e30", "callbacks=no_checks"
    run = train(*SMOKE, *large, f"hydra.run.dir={tmp_path}/run")
    assert run.status == 1
    assert "training has stopped: the loss is" in run.err
    assert "(learning rate " in run.err
    assert json.loads((tmp_path / "run/results.json").read_text())["test/knn"] is None


def test_in_a_sweep_the_other_jobs_run(train, tmp_path):
    rates = "optimizer=sgd", "optimizer.lr=1e30,1e-2", "callbacks=no_checks"
    run = train("-m", *SMOKE, *rates, f"hydra.sweep.dir={tmp_path}/s")
    assert run.status == 1
    assert "1 of the jobs failed" in run.err
    first, second = (json.loads((tmp_path / f"s/{n}/results.json").read_text()) for n in "01")
    assert first["test/knn"] is None
    assert second["test/knn"] is not None
