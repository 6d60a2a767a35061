"""What a run says as it goes: JSON lines always, TensorBoard and Weights & Biases if asked.

Of several processes, the first one says it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puma_jax.errors import ConfigError
from puma_jax.parallel.multihost import is_first
from puma_jax.training.config import LogConfig


class Journal:
    """Writes metrics by step. A resumed run goes on where it was: later lines count."""

    def __init__(self, folder: Path, config: LogConfig, about: Mapping[str, Any]):
        """Open the files.

        Args:
            folder: Of the run.
            config: Where to write.
            about: The run's config, JSON.

        Raises:
            ConfigError: Weights & Biases is asked for and not installed.
        """
        self._tensorboard = self._wandb = None
        folder.mkdir(parents=True, exist_ok=True)
        where = folder / "metrics.jsonl" if is_first() else Path(os.devnull)
        self._lines = where.open("a", encoding="utf-8")
        if not is_first():
            return
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if config.wandb is not None:
            self._wandb = _wandb_run(config.wandb, folder, about)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step of a stage."""
        self._lines.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._lines.flush()
        named = {f"{stage}/{name}": value for name, value in values.items()}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**named, f"{stage}/step": step})

    def close(self) -> None:
        """Finish all files."""
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(project: str, folder: Path, about: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb needs Weights & Biases: pip install wandb") from None
    # The same folder is the same run, so that a resumed one goes on in the same chart.
    return wandb.init(
        project=project, id=folder.resolve().name, resume="allow", config=dict(about), dir=folder
    )
