"""Writes the metrics of a run: JSON lines always, TensorBoard and Weights & Biases on request.

In a multi-process run, process 0 alone writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puma_jax.artifacts import writing
from puma_jax.errors import ConfigError
from puma_jax.files import sha256_of
from puma_jax.parallel.multihost import is_process_zero
from puma_jax.training.config import LogConfig

_LONGEST_LINE = 1 << 16


class MetricWriter:
    """Writes metrics by step. A resumed run appends: of two lines of a step, the later counts."""

    def __init__(self, folder: Path, config: LogConfig, about: Mapping[str, Any]):
        """Open the files.

        Args:
            folder: Folder of the run.
            config: Which writers to use.
            about: Config of the run, JSON.

        Raises:
            ArtifactError: The files cannot be written.
            ConfigError: Weights & Biases is requested and not installed.
        """
        self._tensorboard = self._wandb = None
        self._path = folder / "metrics.jsonl" if is_process_zero() else Path(os.devnull)
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = self._path.open("a", encoding="utf-8")
            if not is_process_zero():
                return
            _drop_torn_line(self._path)
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if config.wandb is not None:
            self._wandb = _wandb_run(config.wandb, folder, about)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step of a stage.

        Raises:
            ArtifactError: The disk is full, or fails.
        """
        with writing(self._path):
            self._lines.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
            self._lines.flush()
        named = {f"{stage}/{name}": value for name, value in values.items()}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**named, f"{stage}/step": step})

    def close(self) -> None:
        """Flush and close all writers."""
        with writing(self._path):
            self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_torn_line(path: Path) -> None:
    """Cut off the last line if it has no end: a run was killed, or a disk was full, within it.

    Its step is repeated, and a line after it would not be readable.
    """
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST_LINE))
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def _wandb_run(project: str, folder: Path, about: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb needs Weights & Biases: pip install wandb") from None
    # The id is that of the folder's whole path: a resumed run continues the same chart, and a
    # folder of the same name elsewhere has another one.
    path = folder.resolve()
    return wandb.init(
        project=project,
        id=f"{path.name}-{sha256_of(str(path))[:8]}",
        resume="allow",
        config=dict(about),
        dir=folder,
    )
