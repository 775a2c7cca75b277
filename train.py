"""Train and evaluate: compose -> build -> fit -> test. `python train.py --help` lists settings."""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.simclr.program.interruption import end_at_signals

    end_at_signals()

import math
import os
from contextlib import nullcontext
from pathlib import Path

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from experiments.simclr.callbacks.checkpointing import AtomicCheckpointIO, remove_unfinished
from experiments.simclr.callbacks.interruption import CheckpointOnSignal, take_signals_over
from experiments.simclr.callbacks.results import Results
from experiments.simclr.evaluation import report
from experiments.simclr.evaluation.overview import OverviewLogger
from experiments.simclr.program.command_line import USER_ERRORS, command, one_line_errors
from experiments.simclr.program.config_types import check_types, expand_home
from experiments.simclr.program.interruption import interruptible
from experiments.simclr.program.jobs import this_job
from experiments.simclr.program.processes import leave_process_group
from experiments.simclr.program.quiet import silence_routine_messages
from experiments.simclr.program.resuming import changed_settings, check_resumes, describe
from experiments.simclr.program.run_directory import RunDirectory, check_fits, read_checkpoint
from experiments.simclr.program.trainer_settings import check_trainer, trainer_arguments

CONFIGS = str(Path(__file__).parent / "configs")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(config: DictConfig) -> float:
    """Returns the last val/score, for a sweep that looks for the best."""
    run = RunDirectory(HydraConfig.get().runtime.output_dir)
    results = Results(run.results, config, this_job())
    writer = run.claimed() if rank_zero_only.rank == 0 else nullcontext()
    # a launcher may call this in a process of its own
    with one_line_errors(run), interruptible(), writer:
        with one_line_errors(run, (*USER_ERRORS, ValueError, TypeError)):
            trainer, model, data, checkpoint = build(config, run, results)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        score = float(trainer.callback_metrics.get("val/score", math.nan))
        trainer.test(model, data, verbose=False)
        found = results.write(trainer, model)  # again, with the whole time
        if trainer.is_global_zero:
            report.show(found, {"checkpoint": run.last}, run.path)
    return score


def build(
    config: DictConfig, run: RunDirectory, results: Results
) -> tuple[L.Trainer, L.LightningModule, L.LightningDataModule, str | None]:
    """Everything that a run needs, checked; the first thing it writes is the configuration."""
    silence_routine_messages()
    expand_home(config)
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    check_types(values)
    check_trainer(values)
    L.seed_everything(config.seed, workers=True, verbose=False)

    data = instantiate(config.data)
    data.same_order = bool(config.trainer.get("overfit_batches"))
    data.prepare_data()
    data.setup("fit")
    data.train_dataloader()
    model = instantiate(config.model)
    model.hparams.update(values)

    checkpoint, step = None, None
    if config.ckpt_path is not None:
        checkpoint = run.find_checkpoint(config.ckpt_path, config.log_root)
        saved = read_checkpoint(checkpoint)
        check_fits(checkpoint, saved["state_dict"], model)
        changed = changed_settings(saved["hyper_parameters"], values)
        check_resumes(checkpoint, saved, changed, model)
        step = saved["global_step"]
    elif rank_zero_only.rank == 0:
        run.refuse_if_used()

    # an experiment may set a number of a callback that callbacks=no_checks leaves out
    chosen = [c for c in (config.get("callbacks") or {}).values() if c and "_target_" in c]
    callbacks = [results, *map(instantiate, chosen), CheckpointOnSignal(run.last)]
    # what the interrupted run logged after its checkpoint will be logged again
    tensorboard = OverviewLogger(run.path, "train", purge_step=step)
    others = [instantiate(logger) for logger in (config.get("logger") or {}).values()]
    for logger in others:
        logger.log_hyperparams(values)
    trainer = instantiate(
        config.trainer,
        **trainer_arguments(config.trainer, callbacks, [tensorboard, *others], run.path),
        plugins=[AtomicCheckpointIO()],
        # torch synchronises batch norm on GPUs alone
        sync_batchnorm=config.trainer.sync_batchnorm and torch.cuda.is_available(),
    )
    take_signals_over(trainer)
    if trainer.is_global_zero:
        remove_unfinished(run.checkpoints)
        if checkpoint is not None:
            told = f"; from here on: {describe(changed)}" if changed else ""
            print(f"resuming {checkpoint} after step {step}{told}")
            run.keep_config(step)
        OmegaConf.save(config, run.path / "config.yaml", resolve=True)
    return trainer, model, data, checkpoint


def command_line() -> None:
    """Compose the configuration from sys.argv and run."""
    # Hydra then raises its errors instead of printing them
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with command():
        main()
    leave_process_group()


if __name__ == "__main__":
    command_line()
