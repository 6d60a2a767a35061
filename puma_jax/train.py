"""Train a model: `python -m puma_jax.train --config configs/openmoji.py --workdir DIR`.

Every field of the config is a flag; `--help` lists them. Rerun the same command to resume after a
stop, a crash or a kill.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from puma_jax import cli, compilation_cache
from puma_jax.errors import ConfigError, PumaError
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
    reuse: Path | None = None
    """Workdir of another run: stages that are finished there, with the same settings, base model
    and data, are copied and not trained again. Nothing in it is changed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags and run."""
    config, workdir, reuse = parse(list(sys.argv[1:] if arguments is None else arguments))
    compilation_cache.enable()
    initialize(config.distributed)
    try:
        with cli.printable_output():
            run(config, workdir, reuse)
    except Preempted:
        print("Stopped, all is saved: rerun the same command to resume")


def parse(given: list[str]) -> tuple[TrainConfig, Path, Path | None]:
    """Return the config, the workdir and the run to reuse that flags describe.

    Flags are `--config`, `--workdir` and `--reuse`, the arguments of the file's `get_config` (such
    as `--preset`), and all fields of the config that it returns.

    Raises:
        ConfigError: The file holds no config, or a setting is out of its range.
    """
    if not any(flag.split("=")[0] == "--config" for flag in given):
        tyro.cli(_Run, args=given, prog=_PROG)
    for name, use in _REMOVED.items():
        if any(flag.split("=")[0] == f"--data.{name}" for flag in given):
            raise ConfigError(f"--data.{name} is no longer a setting: {use}")
    wants_help = bool({"-h", "--help"} & set(given))
    known = [flag for flag in given if flag not in ("-h", "--help")]
    if wants_help and "--workdir" not in known:
        known += ["--workdir", "DIR"]
    chosen, rest = tyro.cli(_Run, args=known, return_unknown_args=True, prog=_PROG)
    config, rest = tyro.cli(
        load_config(chosen.config), args=rest, return_unknown_args=True, prog=_PROG
    )
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"get_config() of {chosen.config} returns a {type(config).__name__}, expected a "
            "TrainConfig"
        )
    config = tyro.cli(
        Annotated[TrainConfig, tyro.conf.AvoidSubcommands],
        default=config,
        args=[*rest, *(["--help"] if wants_help else [])],
        prog=f"{_PROG} --config {chosen.config} --workdir {chosen.workdir}",
    )
    return config, chosen.workdir, chosen.reuse


_PROG = "python -m puma_jax.train"
_REMOVED = {
    "workers": "leave it out, images are read by a process on each core; PUMA_JAX_IMAGE_WORKERS "
    "sets another number"
}
"""Fields that DataConfig had, and what to do instead."""


def load_config(path: Path) -> Callable[..., TrainConfig]:
    """Return the function `get_config` of a config file.

    Raises:
        ConfigError: There is no such file, it is not Python, or it has no such function.
    """
    if not path.is_file():
        raise ConfigError(f"--config {path} is not a file")
    if path.suffix != ".py":
        raise ConfigError(f"--config {path} is not a Python file: its name must end with .py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _named(path):
        spec.loader.exec_module(module)
    function = getattr(module, "get_config", None)
    if not inspect.isfunction(function):
        raise ConfigError(f"{path} has no function get_config() that returns a TrainConfig")

    @functools.wraps(function)
    def get_config(*arguments: object, **named: object) -> Any:
        with _named(path):
            return function(*arguments, **named)

    return get_config


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever a config file raises into one line that names the file and its line."""
    try:
        yield
    except PumaError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        removed = [use for name, use in _REMOVED.items() if f"'{name}'" in reason]
        raise ConfigError(
            ": ".join([_place(path, error), type(error).__name__, reason, *removed])
        ) from error


def _place(path: Path, error: Exception) -> str:
    """Return the file and the line at which a config file failed."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


if __name__ == "__main__":
    cli.exit_on_error(main)
