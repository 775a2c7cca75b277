"""Going on with other settings: they are used, told and recorded, or one line refuses."""

import math

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.simclr.schedules import WarmupCosine

SMOKE = ("experiment=simclr_smoke", "callbacks=no_checks")
STEPS = 4  # of the smoke run's epochs


def rates(path) -> dict[int, float]:
    events = EventAccumulator(str(path / "train"))
    events.Reload()
    return {point.step: point.value for point in events.Scalars("train/learning_rate")}


def schedule_of(lr=1.0, steps_per_epoch=10, epochs=4, max_steps=-1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    return WarmupCosine(optimizer, 1, epochs, steps_per_epoch, max_steps)


def advance(schedule, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_the_rate_is_the_published_curve():
    found = advance(schedule_of(), 40)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    cosine = [(1 + math.cos(math.pi * i / 30)) / 2 for i in range(30)]
    assert found[10:] == pytest.approx(cosine)


@pytest.mark.parametrize("settings", [{}, {"epochs": 8}, {"lr": 0.1}, {"steps_per_epoch": 4}])
def test_a_resumed_schedule_stands_where_its_own_settings_have_that_epoch(settings):
    first = schedule_of()
    advance(first, 20)  # two of its epochs
    resumed, whole = schedule_of(**settings), schedule_of(**settings)
    resumed.load_state_dict(first.state_dict())
    advance(whole, 2 * resumed.steps_per_epoch)
    left = (settings.get("epochs", 4) - 2) * resumed.steps_per_epoch
    assert advance(resumed, left) == pytest.approx(advance(whole, left))
    assert resumed.get_last_lr()[0] == pytest.approx(0)


def test_max_steps_end_the_schedule_after_a_change_of_batch_too():
    first = schedule_of(max_steps=30)
    assert advance(first, 30)[-1] < 0.01
    first = schedule_of(max_steps=30)
    advance(first, 20)
    resumed = schedule_of(max_steps=30, steps_per_epoch=5)
    resumed.load_state_dict(first.state_dict())
    found = advance(resumed, 10)
    assert found == sorted(found, reverse=True)
    assert resumed.get_last_lr()[0] == pytest.approx(0)
    assert advance(schedule_of(epochs=math.inf), 50)[-1] == 1  # no end: the peak


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, request):
    """The checkpoint at the end of a run of two epochs, to be read only."""
    import sys

    import train as program

    path = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*SMOKE, f"hydra.run.dir={path}", "optimizer.weight_decay=0.1"]
        patch.setattr(sys, "argv", ["train.py", *arguments])
        program.command_line()
    return path


def test_other_settings_are_used_told_and_recorded(train, tmp_path, stopped):
    settings = "trainer.max_epochs=4", "optimizer.lr=0.01", "data.batch_size=16"
    run = train(*SMOKE, *settings, f"ckpt_path={stopped}", f"hydra.run.dir={tmp_path}/run")
    assert run.status == 0, run.err
    (told,) = (line for line in run.out.splitlines() if line.startswith("resuming"))
    assert "optimizer.lr 0.01 (was 0.001)" in told
    assert "data.batch_size 16 (was 32)" in told
    assert "optimizer.weight_decay 0.0001 (was 0.1)" in told
    assert "model." not in told
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    first, second = saved["optimizer_states"][0]["param_groups"]
    assert (first["weight_decay"], second["weight_decay"]) == (1e-4, 0)
    assert first["initial_lr"] == 0.01
    assert saved["hyper_parameters"]["optimizer"]["lr"] == 0.01
    found = rates(tmp_path / "run")
    steps = 9  # batches of 16 in an epoch
    assert sorted(found) == list(range(2 * STEPS, 2 * STEPS + 2 * steps))
    shares = [i / (3 * steps) for i in range(steps, 3 * steps)]
    expected = [0.01 * (1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


def test_the_settings_of_the_steps_before_stay_beside_those_of_now(train, tmp_path):
    where = f"hydra.run.dir={tmp_path}/run", "trainer.check_val_every_n_epoch=3"
    assert train(*SMOKE, *where, "trainer.max_epochs=1").status == 0
    more = "optimizer.lr=0.01", "ckpt_path=last"
    assert train(*SMOKE, *where, *more, "trainer.max_epochs=2").status == 0
    before, now = (
        yaml.safe_load((tmp_path / "run" / name).read_text())["optimizer"]["lr"]
        for name in (f"config_until_step_{STEPS}.yaml", "config.yaml")
    )
    assert (before, now) == (0.001, 0.01)


REFUSED = {
    "optimizer=sgd": ["AdamW", "SGD cannot go on"],
    "+optimizer.amsgrad=true": ["max_exp_avg_sq"],
    "trainer.max_epochs=1": ["has 2 epochs behind it", "max_epochs=1"],
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_go_on_is_refused_in_one_line(train, stopped, setting):
    run = train(*SMOKE, f"ckpt_path={stopped}", setting)
    assert run.status == 2
    assert len(run.err.strip().splitlines()) == 1, run.err
    for words in REFUSED[setting]:
        assert words in run.err


def test_an_epoch_is_finished_with_its_own_batches(train, tmp_path, stopped):
    checkpoint = torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    epochs["processed"] = epochs["ready"] - 1  # as the signal's checkpoint has it
    torch.save(checkpoint, tmp_path / "within.ckpt")
    run = train(*SMOKE, f"ckpt_path={tmp_path}/within.ckpt", "data.batch_size=16")
    assert run.status == 2
    assert "within epoch 2" in run.err
    assert "data.batch_size=32; got 16" in run.err


def test_a_learned_temperature_is_not_set_anew(train, tmp_path):
    learned = *SMOKE, "loss=nt_xent", "+loss.learnable_temperature=true", "trainer.max_epochs=1"
    assert train(*learned, f"hydra.run.dir={tmp_path}/run").status == 0
    run = train(*learned, f"ckpt_path={tmp_path}/run", "loss.temperature=0.2")
    assert run.status == 2
    assert "loss.temperature=0.2 would not be used" in run.err
