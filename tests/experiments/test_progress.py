"""Speed, learning rate and the time that is left, by a clock that the test sets."""

import io
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress as RichProgress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.simclr.callbacks import progress
from experiments.simclr.callbacks.progress import Progress, TrainingFigures
from experiments.simclr.schedules import WarmupCosine
from tests.slow import slow


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.now` is set."""
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", fake)
    return clock


def trainer_of(max_epochs=10, batches_done=0, **more):
    logged = []
    logger = SimpleNamespace(log_metrics=lambda figures, step: logged.append(figures))
    loop = SimpleNamespace(
        total_batch_idx=batches_done - 1,
        _batches_that_stepped=batches_done,
        _should_accumulate=lambda: False,
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.125}])
    return SimpleNamespace(
        max_epochs=max_epochs,
        num_training_batches=50,
        world_size=2,
        _logger_connector=SimpleNamespace(should_update_logs=True),
        fit_loop=SimpleNamespace(epoch_loop=loop),
        optimizers=[optimizer],
        loggers=[logger],
        logged=logged,
        **more,
    )


def test_speed_is_images_of_all_processes_without_validation(clock):
    figures, trainer, shown = TrainingFigures(), trainer_of(), {}
    module = SimpleNamespace(
        device=torch.device("cpu"), log_dict=lambda found, **how: shown.update(found)
    )
    batch = {"image": torch.zeros(8, 1)}
    figures.on_train_epoch_start(trainer, module)
    for batch_idx in range(9):
        trainer._logger_connector.should_update_logs = batch_idx % 3 == 2
        figures.on_train_batch_start(trainer, module, batch, batch_idx)
        clock.now += 0.5
        figures.on_train_batch_end(trainer, module, None, batch, batch_idx)
        if batch_idx == 5:
            clock.now += 1000
            figures.on_validation_end(trainer, module)
    expected = {"train/images_per_second": 2 * 8 / 0.5, "train/learning_rate": 0.125}
    assert trainer.logged == [pytest.approx(expected)] * 3
    assert shown == pytest.approx({"images/s": 32, "lr": 0.125})


def started(clock, batches_before):
    bar = Progress()
    bar._began, bar._batches_before = clock.now, batches_before
    return bar


def test_time_left_is_at_the_pace_since_the_start(clock):
    bar = started(clock, batches_before=100)
    assert bar.time_left(trainer_of(batches_done=100)) is None
    clock.now += 40
    # 20 of 500 batches in 40 s, after 100 that another process did: 380 are left
    assert bar.time_left(trainer_of(batches_done=120)) == timedelta(seconds=760)
    assert bar.time_left(trainer_of(batches_done=500)) == timedelta(0)
    assert bar.time_left(trainer_of(max_epochs=-1, batches_done=120)) is None
    assert bar.time_left(trainer_of(max_epochs=None, batches_done=120)) is None


class CountingTrainer(SimpleNamespace):
    """Counts how often it is asked what the bar shows, each time of which waits for a GPU."""

    fetched = 0

    @property
    def progress_bar_metrics(self):
        self.fetched += 1
        return {"train/loss": 0.000123456, "v_num": ""}


def test_the_bars_figures_are_fetched_twice_a_second_at_most(clock):
    bar = started(clock, batches_before=0)
    trainer = CountingTrainer(**vars(trainer_of(batches_done=1)) | {"loggers": []})
    for _ in range(20):
        clock.now += 0.1
        found = bar.get_metrics(trainer, None)
    assert 3 <= trainer.fetched <= 4
    assert found["train/loss"] == "0.000123"
    assert "v_num" not in found
    assert "left" in found


@pytest.mark.parametrize("width", [100, 60])
def test_the_bar_takes_two_lines(width):
    bar = Progress()
    trainer = trainer_of(max_epochs=20)
    bar._trainer = trainer
    console = Console(file=io.StringIO(), width=width)
    bar.progress = RichProgress(*bar.configure_columns(trainer), console=console)

    def lines():
        console.file = io.StringIO()
        console.print(bar.progress.get_renderable())
        return [line.rstrip() for line in console.file.getvalue().splitlines()]

    figures = {"train/loss": "0.540", "val/knn": "0.771", "lr": "0.00103", "images/s": "1843"}
    bar._figures = figures | {"left": "0:01:02"}
    training = bar.train_progress_bar_id = bar.progress.add_task(
        bar._get_train_description(2), total=39, completed=24
    )
    first, second = lines()
    assert first.startswith("Epoch 3/20 ━")
    assert first.endswith("24/39 0:01:02 left")
    assert second == "train/loss 0.540  val/knn 0.771  lr 0.00103  images/s 1843"
    bar._figures["GiB"] = "12.3" * 30
    assert len(lines()) == 2
    validation = bar.progress.add_task("Validation", total=10, completed=3)
    first, second = lines()
    assert first.startswith("Epoch 3/20 ━")
    assert second.startswith("Validation ━")
    assert second.endswith("3/10")
    bar.progress.update(validation, visible=False)
    bar.progress.update(training, completed=39)
    assert "39/39" in lines()[0]
    assert lines()[1].startswith("train/loss 0.540")


def scalars(path, tag):
    events = EventAccumulator(str(path / "train"))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


@pytest.mark.parametrize("batches", [3, *slow(1)])
def test_a_rate_stands_at_the_step_that_was_taken_with_it(train, tmp_path, batches):
    """Also where a step has three batches, and the last of an epoch one."""
    sgd = "optimizer=sgd", "optimizer.lr=0.5", "callbacks.representation.every_n_batches=1"
    steps = f"trainer.accumulate_grad_batches={batches}", f"hydra.run.dir={tmp_path}/run"
    assert train("experiment=simclr_smoke", *sgd, *steps, "trainer.max_epochs=2").status == 0
    per_epoch = 4 if batches == 1 else 2
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = WarmupCosine(optimizer, 1, 2, per_epoch)
    expected = []
    for step in range(2 * per_epoch):
        expected.append((step, pytest.approx(schedule.get_last_lr()[0], rel=1e-6)))
        optimizer.step()
        schedule.step()
    assert scalars(tmp_path / "run", "train/learning_rate") == expected
    for tag in ("train/loss", "representation/alignment"):
        assert [step for step, _ in scalars(tmp_path / "run", tag)] == list(range(2 * per_epoch))


def test_log_every_n_steps_counts_steps_of_short_epochs_too(train, tmp_path):
    run = f"hydra.run.dir={tmp_path}/run"
    assert train("experiment=simclr_smoke", "trainer.log_every_n_steps=5", run).status == 0
    assert [step for step, _ in scalars(tmp_path / "run", "train/learning_rate")] == [4]
