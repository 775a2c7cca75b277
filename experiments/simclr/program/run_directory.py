"""A run's directory: what is in it, who writes it, and which run to resume."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.simclr.program.errors import UserError


class RunDirectory:
    """`path/checkpoints/{last,best}.ckpt`, `config.yaml`, `results.json`, TensorBoard's files."""

    RESULTS = "results.json"
    FAILURE = "failed.json"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.results = self.path / self.RESULTS
        self.failure = self.path / self.FAILURE

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within it no other process writes here; raises UserError if another does.

        A directory into which nothing was written is taken away again.
        """
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(directory)
            raise UserError(
                f"{self.path}: another process is writing this run; wait for its end, "
                "or choose another hydra.run.dir"
            ) from error
        except OSError:  # a file system without locks
            pass
        self.failure.unlink(missing_ok=True)  # of an attempt before this one
        try:
            yield
        finally:
            with suppress(OSError):
                self.path.rmdir()
            os.close(directory)

    def refuse_if_used(self) -> None:
        """Raise UserError if another run's checkpoints or results lie here."""
        if self.results.exists() or any(self.checkpoints.glob("*.ckpt")):
            raise UserError(
                f"{self.path} already holds a run: choose another hydra.run.dir, "
                "or continue it with ckpt_path=last"
            )

    def keep_config(self, step: int) -> None:
        """Keep the config.yaml that is here as that of the steps up to this one."""
        config = self.path / "config.yaml"
        if config.exists():
            config.replace(self.path / f"config_until_step_{step}.yaml")

    def find_checkpoint(self, ckpt_path: str, root: Path | str) -> Path:
        """The file that ckpt_path names; of a run's directory, its last checkpoint.

        "last" is this run's last checkpoint, else that of the newest run below root.
        """
        if ckpt_path != "last":
            path = Path(ckpt_path).expanduser()
            if path.is_dir():
                path = RunDirectory(path).last
            if not path.is_file():
                raise UserError(f"ckpt_path={ckpt_path}: there is no file {path}")
            return path
        if self.last.exists():
            return self.last
        found = Path(root).glob("**/checkpoints/last.ckpt")
        newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise UserError(f"ckpt_path=last: there is no checkpoints/last.ckpt below {root}")
        return newest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint, on the CPU; raises UserError unless it is a whole one of this program."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"state_dict", "global_step", "hyper_parameters"} - checkpoint.keys()
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    except Exception as error:
        raise UserError(
            f"{path} is not a whole checkpoint of this program: {_line(error)}"
        ) from error
    return checkpoint


def check_fits(path: Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise UserError unless the model's parameters are those of the checkpoint at path."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    different = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if different:
        name = different[0]
        raise UserError(
            f"{path} is from another model: {len(different)} of {len(ours)} parameters differ, "
            f"first {name} (here {ours.get(name)}, there {theirs.get(name)})"
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
