"""Going on from a checkpoint: its weights and moments, and the settings of now.

What a run is started with is what it uses and records, or it is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from experiments.simclr.program.errors import UserError

# where things lie, and what is shown: no settings of the training
APART = ("ckpt_path", "log_root", "name", "debug", "logger", "callbacks")
# what decides which images an epoch has still to see
WITHIN_AN_EPOCH = (
    "seed",
    "data._target_",
    "data.seed",
    "data.batch_size",
    "data.train_per_class",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.limit_train_batches",
    "trainer.num_nodes",
    "trainer.overfit_batches",
)
# copies of groups that stand at the top as well
COPIES = ("model.loss.", "model.optimizer.", "model.views.")


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The settings of the training that differ, each with its value before and now.

    Example:
        >>> before = {"seed": 0, "optimizer": {"lr": 0.1}, "name": "a"}
        >>> changed_settings(before, {"seed": 0, "optimizer": {"lr": 0.2}, "name": "b"})
        {'optimizer.lr': (0.1, 0.2)}
    """
    old, new = _flat(before), _flat(now)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key.split(".")[0] not in APART
        and not key.startswith(COPIES)
    }


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """One line, of what is set otherwise from here on.

    Example:
        >>> describe({"optimizer.lr": (0.1, 0.2), "seed": (0, 1)})
        'optimizer.lr 0.2 (was 0.1), seed 1 (was 0)'
    """
    return ", ".join(f"{key} {new} (was {old})" for key, (old, new) in changed.items())


def check_resumes(
    path: Path,
    checkpoint: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    model: LightningModule,
) -> None:
    """Raise UserError where training cannot go on from the checkpoint with the changed settings.

    Args:
        path: where the checkpoint lies.
        checkpoint: a whole one, of a model of the same parameters.
        changed: `changed_settings` between the checkpoint's configuration and now.
        model: the one that is to be trained.
    """
    schedules, optimizers = checkpoint.get("lr_schedulers"), checkpoint.get("optimizer_states")
    if not schedules or not optimizers or "offset" not in schedules[0]:
        raise UserError(
            f"{path} holds no optimizer and schedule of this program to go on with: it can be "
            "evaluated, and a new run started without ckpt_path"
        )
    _check_optimizer(path, optimizers[0], changed, model)
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    _, max_epochs = changed.get("trainer.max_epochs", (None, None))
    if max_epochs is not None and 0 <= max_epochs < epochs["processed"]:
        raise UserError(
            f"{path} has {epochs['processed']} epochs behind it, more than trainer.max_epochs="
            f"{max_epochs}: give as many or more"
        )
    within = [key for key in WITHIN_AN_EPOCH if key in changed]
    if within and epochs["processed"] < epochs["ready"]:
        old, new = changed[within[0]]
        raise UserError(
            f"{path} stands within epoch {epochs['ready']}, which has to be finished with "
            f"{within[0]}={old}; got {new}: keep it, or go on from an epoch's end, as best.ckpt is"
        )
    for setting, (old, new) in changed.items():
        parameter = setting.replace(".temperature", ".log_temperature")
        if setting.startswith("loss.") and parameter in checkpoint["state_dict"]:
            raise UserError(
                f"{setting}={new} would not be used: the checkpoint holds what was learned from "
                f"{old} on; leave it out"
            )


def keep_own_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let a loaded state bring its moments, and leave lr, weight_decay and the rest as they are."""

    def with_own_settings(
        optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> dict[str, Any]:
        groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
        return state | {"param_groups": [own | {"params": g["params"]} for g, own in groups]}

    optimizer.register_load_state_dict_pre_hook(with_own_settings)


def _check_optimizer(
    path: Path,
    saved: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    model: LightningModule,
) -> None:
    if "optimizer._target_" in changed:
        names = [str(target).rpartition(".")[2] for target in changed["optimizer._target_"]]
        raise UserError(
            f"{path} holds the state of {names[0]}, with which {names[1]} cannot go on: keep the "
            "optimizer, or start a new run"
        )
    ours = [len(group["params"]) for group in model.parameter_groups()]
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    if ours != theirs:
        raise UserError(
            f"{path} has trained {sum(theirs)} parameters, and here {sum(ours)} are to be trained: "
            "freeze the same ones"
        )
    # what the settings of now want to be kept of a step, amsgrad=true for example
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = model.make_optimizer([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = {name for state in saved["state"].values() for name in state}
    missing = sorted(optimizer.state[parameter].keys() - kept)
    if missing and saved["state"]:
        raise UserError(
            f"{path} does not hold {', '.join(missing)}, which the optimizer's settings now want: "
            "keep those that it was started with"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
