"""Train and evaluate: compose -> build -> fit -> test. `python train.py --help` lists settings."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cosloss.callbacks import GradientError
from experiments import report
from experiments.callbacks.checkpointing import AtomicCheckpointIO
from experiments.callbacks.interruption import CheckpointOnSignal, Interrupted
from experiments.config_types import check_types
from experiments.errors import UserError
from experiments.quiet import silence_routine_messages
from experiments.run_directory import RunDirectory, check_checkpoint

USER_ERRORS = (
    UserError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
    OSError,
)


CONFIGS = str(Path(__file__).parent / "configs")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(config: DictConfig) -> None:
    started = time.perf_counter()
    run = RunDirectory(HydraConfig.get().runtime.output_dir)
    with one_line_errors(run, (*USER_ERRORS, ValueError, TypeError)):
        trainer, model, data, checkpoint = build(config, run)
    with one_line_errors(run, USER_ERRORS):
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        (metrics,) = trainer.test(model, data, verbose=False)
        if trainer.is_global_zero:
            results = report.collect(trainer, metrics, time.perf_counter() - started)
            report.write(results, run.results)
            report.show(results, run.last, run.path)


def build(
    config: DictConfig, run: RunDirectory
) -> tuple[L.Trainer, L.LightningModule, L.LightningDataModule, str | None]:
    """Everything that a run needs, checked; the first thing it writes is the configuration."""
    silence_routine_messages()
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_types(values)
    L.seed_everything(config.seed, workers=True, verbose=False)

    data = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    data.train_dataloader()
    model = instantiate(config.model)
    model.hparams.update(values)

    checkpoint, step = None, None
    if config.ckpt_path is not None:
        checkpoint = run.find_checkpoint(config.ckpt_path, config.log_root)
        step = check_checkpoint(checkpoint, model)
    elif rank_zero_only.rank == 0:
        run.refuse_if_used()

    # an experiment may set a number of a callback that callbacks=no_checks leaves out
    callbacks = [instantiate(c) for c in config.callbacks.values() if c and "_target_" in c]
    trainer = instantiate(
        config.trainer,
        callbacks=[*callbacks, CheckpointOnSignal(run.last)],
        # what the interrupted run logged after its checkpoint will be logged again
        logger=TensorBoardLogger(
            run.path, name="", version="", default_hp_metric=False, purge_step=step
        ),
        plugins=[AtomicCheckpointIO()],
        # torch synchronises batch norm on GPUs alone
        sync_batchnorm=config.trainer.sync_batchnorm and torch.cuda.is_available(),
    )
    if trainer.is_global_zero:
        OmegaConf.save(config, run.path / "config.yaml", resolve=True)
    return trainer, model, data, checkpoint


@contextmanager
def one_line_errors(
    run: RunDirectory | None = None, expected: tuple[type[Exception], ...] = USER_ERRORS
) -> Iterator[None]:
    """Say in one line what went wrong and leave with a status: 2 for a mistake of the user.

    A wrong gradient leaves with 1, an interruption with 128 and the signal's number. Anything
    unexpected is a fault of this program, and keeps its traceback.
    """
    try:
        yield
    except Interrupted as interruption:
        command = run.resume_command(HydraConfig.get().overrides.task)
        print(f"\n{interruption}: saved {run.last}\nresume with:\n  {command}")
        raise SystemExit(interruption.exit_status) from None
    except GradientError as error:
        print(f"\n{error}", file=sys.stderr)
        raise SystemExit(1) from None
    except expected as error:
        if "debug=true" in sys.argv:
            raise
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        if run is not None:
            run.remove_if_empty()
        raise SystemExit(2) from None


def in_one_line(error: BaseException) -> str:
    """The message that helps: of the cause, where Hydra wraps it, with its place in the config."""
    text, _, place = str(error).partition("full_key: ")
    text = text.partition("Config search path")[0]
    if place:
        text = f"{place.split()[0]}: {error.__cause__ or text}"
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()).rstrip("; ")


def command_line() -> None:
    """Compose the configuration from sys.argv and run."""
    # Hydra then raises its errors instead of printing them
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_line_errors():
        main()


if __name__ == "__main__":
    command_line()
