"""Every experiment composes with trainer=gpu: one GPU in bfloat16, both gradient checks on."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_trainer_gpu(experiment):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("train", [f"experiment={experiment}", "trainer=gpu"])
    assert config.trainer.accelerator == "gpu"
    assert config.trainer.devices == 1
    targets = " ".join(str(callback.get("_target_")) for callback in config.callbacks.values())
    assert "GradcheckCallback" in targets
    assert "GradientDiscrepancyCallback" in targets
