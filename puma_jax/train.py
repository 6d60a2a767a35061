"""Train a model: `python -m puma_jax.train --config configs/openmoji.py --workdir DIR`.

Every field of the config is a flag; `--help` lists them. Rerun the same command to resume after a
stop, a crash or a kill.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from puma_jax import cli
from puma_jax.errors import ConfigError
from puma_jax.parallel.multihost import initialize
from puma_jax.training.config import TrainConfig
from puma_jax.training.loop import Preempted
from puma_jax.training.run import run


@dataclass(frozen=True)
class _Run:
    """Train the model that a config file describes."""

    config: Path
    """Python file with a function `get_config()` that returns a `TrainConfig`."""
    workdir: Path
    """Folder of the run: checkpoints, metrics, models and results. The same one resumes the run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags and run.

    Flags are `--config` and `--workdir`, the arguments of the file's `get_config` (such as
    `--preset`), and all fields of the config that it returns.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not any(flag.split("=")[0] == "--config" for flag in given):
        tyro.cli(_Run, args=given, prog=_PROG)
    wants_help = bool({"-h", "--help"} & set(given))
    known = [flag for flag in given if flag not in ("-h", "--help")]
    if wants_help and "--workdir" not in known:
        known += ["--workdir", "DIR"]
    chosen, rest = tyro.cli(_Run, args=known, return_unknown_args=True, prog=_PROG)
    config, rest = tyro.cli(
        load_config(chosen.config), args=rest, return_unknown_args=True, prog=_PROG
    )
    config = tyro.cli(
        Annotated[TrainConfig, tyro.conf.AvoidSubcommands],
        default=config,
        args=[*rest, *(["--help"] if wants_help else [])],
        prog=f"{_PROG} --config {chosen.config} --workdir {chosen.workdir}",
    )
    initialize(config.distributed)
    try:
        run(config, chosen.workdir)
    except Preempted:
        print("Stopped, all is saved: rerun the same command to resume")


_PROG = "python -m puma_jax.train"


def load_config(path: Path) -> Callable[..., TrainConfig]:
    """Return the function `get_config` of a config file.

    Raises:
        ConfigError: There is no such file, or it has no such function.
    """
    if not path.is_file():
        raise ConfigError(f"--config {path} is not a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, "get_config", None)
    if not inspect.isfunction(function):
        raise ConfigError(f"{path} has no function get_config() that returns a TrainConfig")
    return function


if __name__ == "__main__":
    cli.exit_on_error(main)
