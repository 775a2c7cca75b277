"""A trained model from its checkpoint: what evaluate.py and experiments.export begin with.

The checkpoint holds the configuration that its run was started with, resolved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from experiments.simclr.data import ImageData
from experiments.simclr.program.config_types import check_types, expand_home
from experiments.simclr.program.errors import UserError
from experiments.simclr.program.jobs import CONFIGS
from experiments.simclr.program.run_directory import RunDirectory, check_fits, read_checkpoint

GROUPS = ("data", "trainer")
KEYS = ("ckpt_path", "out", "log_root", "seed", "debug")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint and its run's configuration, with what the command line sets otherwise.

    Args:
        path: the checkpoint.
        config: of the run; `out` is the folder to write to, or None.
        state: the checkpoint's parameters.
        step: how many optimizer steps the checkpoint has behind it.
        settings: the program's own, with what the command line sets otherwise.
    """

    path: Path
    config: DictConfig
    state: dict[str, Any]
    step: int
    settings: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """The run's directory; for a checkpoint that lies alone, its folder."""
        folder = self.path.absolute().parent
        return folder.parent if folder.name == "checkpoints" else folder

    def data(self) -> ImageData:
        data = self.unread_data()
        data.setup("test")
        return data

    def unread_data(self) -> ImageData:
        """The data as they are before anything is divided or decoded."""
        data = instantiate(self.config.data)
        data.prepare_data()
        return data

    @property
    def encoder_config(self) -> DictConfig:
        """What builds an encoder of the run's kind, and downloads nothing."""
        return self._model_config().encoder

    def never_compile(self) -> None:
        """Build the encoder without torch.compile, whose work a single pass does not repay."""
        if self.config.model.encoder.get("compile"):
            self.config.model.encoder.compile = False

    def new_encoder(self) -> nn.Module:
        """An untrained encoder of the run's kind."""
        return instantiate(self.encoder_config)

    def model(self) -> L.LightningModule:
        """The model with the checkpoint's parameters, in evaluation mode."""
        model = instantiate(self._model_config())
        check_fits(self.path, self.state, model)
        model.load_state_dict(self.state)
        return model.eval()

    def _model_config(self) -> DictConfig:
        # its first weights are not needed, and may no longer be where they were
        config = self.config.model.copy()
        for node, key, value in (
            (config, "weights", None),
            (config, "pretrained", False),
            (config.encoder, "pretrained", False),
        ):
            if key in node:
                node[key] = value
        return config


def load_run(arguments: Sequence[str], settings: Mapping[str, Any] | None = None) -> SavedRun:
    """The run that ckpt_path=FILE, =DIRECTORY or =last names, with the other overrides applied.

    Args:
        arguments: KEY=VALUE, as Hydra reads them.
        settings: those that only the program which asks has, with their defaults.

    GROUP=OPTION takes the whole group from configs/, for the groups data and trainer; GROUP.KEY
    and the keys seed and model.knn_* change one value of the saved configuration.
    """
    own = dict(settings or {})
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    overrides = [_plain(o, tuple(own)) for o in parsed]
    values = {o.key_or_group: o.value() for o in overrides}
    own |= {name: values.pop(name) for name in own if name in values}
    if values.get("ckpt_path") is None:
        raise UserError("name a checkpoint, a run's directory or the newest run: ckpt_path=last")
    log_root = values.get("log_root", "logs")
    path = RunDirectory(Path(log_root)).find_checkpoint(values["ckpt_path"], log_root)
    checkpoint = read_checkpoint(path)
    config = OmegaConf.create(checkpoint["hyper_parameters"])
    with open_dict(config):
        config.out = None
    OmegaConf.set_struct(config, True)
    for group in GROUPS:
        mine = [o for o in overrides if o.key_or_group.split(".")[0] == group]
        if any(o.key_or_group == group for o in mine):
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                other = compose("train", [o.input_line for o in mine])[group]
            if group == "data" and all(o.key_or_group != "data.image_size" for o in mine):
                other.image_size = config.data.image_size  # what the encoder has learnt from
            config[group] = other
            for override in mine:
                values.pop(override.key_or_group)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    expand_home(config)
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    resolved.pop("out")
    check_types(resolved)
    return SavedRun(path, config, checkpoint["state_dict"], checkpoint["global_step"], own)


def _plain(override: Override, own: tuple[str, ...]) -> Override:
    key = override.key_or_group
    if override.type != OverrideType.CHANGE or override.is_sweep_override():
        raise UserError(f"{override.input_line}: give one value as KEY=VALUE")
    if (
        key not in (*KEYS, *own)
        and key.split(".")[0] not in GROUPS
        and not key.startswith("model.knn_")
    ):
        groups = ", ".join(f"{group}=, {group}.KEY=" for group in GROUPS)
        keys = ", ".join(f"{name}=" for name in (*own, *KEYS))
        raise UserError(
            f"{key} is as it was trained and cannot be set here: only {groups}, model.knn_k=, "
            f"model.knn_temperature= and {keys} can"
        )
    return override
