"""trainer=ddp on two CPU processes against one process with the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# torch synchronises batch norm on GPUs alone; a draw for a whole batch is another one for its half
COMPARABLE = (
    "experiment=simclr_smoke",
    "trainer.accelerator=cpu",
    "trainer.precision=64-true",
    "callbacks=no_checks",
    "trainer.max_epochs=2",
    "model.encoder.norm=group",
    "model.encoder.width=16",
    "model.projection_head.hidden=64",
    "augmentation._target_=tests.fixed_views.FixedViews",
    "optimizer=sgd",
    "optimizer.lr=0.1",
)


def curve(path, *arguments):
    """The training loss of every step."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *COMPARABLE, *arguments, f"hydra.run.dir={path}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(path / "train"))
    events.Reload()
    return torch.tensor([event.value for event in events.Scalars("train/loss")])


def weights(path):
    return torch.load(path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(("loss", "gather"), [("nt_xent", "true"), ("sup_con", "ring")])
def test_two_processes_train_as_one_with_the_joined_batch(tmp_path, loss, gather):
    one = curve(tmp_path / "one", f"loss={loss}", "data.batch_size=32")
    chosen = f"loss={loss}", f"loss.gather_distributed={gather}", "data.batch_size=16"
    two = curve(tmp_path / "two", *chosen, "trainer=ddp", "trainer.devices=2")
    assert len(one) == 8
    assert one.std() > 1e-3  # it moves
    # TensorBoard holds float32
    torch.testing.assert_close(two, one, rtol=1e-6, atol=0)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-11)
