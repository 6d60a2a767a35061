"""What the parts of a workdir are of: the run, its data, its stages and the models they leave.

Everything is told by content. A run is its config, a stage its settings, the files of the model it
starts from and the data it trains on, and a model its files. So a stage of another run can be
reused, and one that differs in anything is never taken for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from puma_jax.artifacts import atomic_folder, claim, differences, write_json, writing
from puma_jax.data.store import BUILD_FILE, INSTRUCTIONS_FILE, TABLE_FOLDER, Store
from puma_jax.errors import ArtifactError, CheckpointError, DataError
from puma_jax.files import parse_json, read_json, read_object, sha256, sha256_of
from puma_jax.schema import shown
from puma_jax.training.config import TrainConfig

CONFIG_FILE = "config.json"
STAGE_FILE = "stage.json"

_FINISHED_FILE = "finished.json"
_MAY_DIFFER = ("mesh", "distributed", "evaluation", "checkpoint", "log")
"""Settings that may differ when a run is resumed: they do not change the model."""
_MODEL_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model")
"""Files of a model's folder that decide what it computes."""
_NOT_CONTENT = ("root", "modified_ns")
"""Fields of a build that say where and when its inputs were found, not what they hold."""


@dataclass(frozen=True)
class _Finished:
    """The content of finished.json, which is written once a stage's model is."""

    model: str
    """Digest of the model's files."""


def as_json(config: TrainConfig) -> dict[str, Any]:
    """Return a config as plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def claim_run(workdir: Path, config: TrainConfig) -> None:
    """Make a folder that of a run, or check that it is.

    As long as no stage has begun, other settings replace those that are there: a run that was
    refused for one of them can be corrected.

    Raises:
        ArtifactError: It holds something else, another run, or the run of another version.
    """
    if (workdir / CONFIG_FILE).exists():
        found = read_run(workdir)
        if not (workdir / "stages").exists():
            # As text, because the order of the stages counts.
            if json.dumps(as_json(found)) != json.dumps(as_json(config)):
                print(f"{workdir}: no stage has begun, other settings replace those there")
                _remove_settings(workdir)
        elif [name for name in found.stages if name in config.stages] != list(config.stages):
            raise ArtifactError(
                f"{workdir} holds a run with stages {', '.join(found.stages)}, this one has "
                f"{', '.join(config.stages)}: choose another --workdir"
            )
    try:
        claim(workdir, CONFIG_FILE, as_json(config), what="a run", may_differ=_MAY_DIFFER)
    except ArtifactError as error:
        if not (workdir / CONFIG_FILE).exists():
            raise
        raise ArtifactError(
            f"{error}; with --reuse {workdir}, a run in another folder takes over the finished "
            "stages that are the same"
        ) from None


def _remove_settings(workdir: Path) -> None:
    """Remove the config of a run without a stage, and the base model that was made for it."""
    with writing(workdir):
        if (workdir / "base").exists():
            shutil.rmtree(workdir / "base")
        (workdir / CONFIG_FILE).unlink()


def read_run(workdir: Path) -> TrainConfig:
    """Return the config of the run in a workdir.

    Raises:
        ArtifactError: It cannot be read, or is of a version that has other settings.
    """
    try:
        return read_object(workdir / CONFIG_FILE, TrainConfig)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error}: the file is damaged, or of another version of puma_jax; choose another "
            "folder, or resume with that version"
        ) from None


def data_folder(workdir: Path, root: Path, fingerprint: Mapping[str, Any]) -> Path:
    """Return the folder for the training data built from a benchmark for a tokenizer.

    The name tells both apart: benchmarks whose folders have the same name, and models.
    """
    path = root.resolve()
    return workdir / "data" / f"{path.name or 'root'}-{sha256_of([str(path), fingerprint])[:8]}"


def stage_job(
    name: str, config: TrainConfig, base: Path, adapter: Path | None, store: Store | None
) -> dict[str, Any]:
    """Return all that decides the model of a stage, as JSON values.

    Args:
        name: Name of the stage. It decides nothing, but its place among the stages does.
        config: Config of the run.
        base: Folder of the model that the stage starts from.
        adapter: Folder of the adapter on it, if it has one.
        store: Training data of the stage; None if it trains nothing.

    Raises:
        CheckpointError: The files of the model cannot be read.
        DataError: The files of the training data cannot be read.
    """
    values = as_json(config)
    settings = values["stages"][name]
    return {
        "number": list(config.stages).index(name),
        "settings": {
            field: value
            for field, value in settings.items()
            if field not in ("model", "init_from", "adapter", "data_root")
        },
        **{field: values[field] for field in ("seed", "images", "prompt", "causal", "compute")},
        "on_bad_record": config.data.on_bad_record,
        "base": model_digest(base),
        "adapter": None if adapter is None else model_digest(adapter),
        "data": None if store is None else _data_digest(store),
    }


def claim_stage(workdir: Path, name: str, job: dict[str, Any]) -> None:
    """Note what a stage is, or check that its unfinished work is of the same.

    Raises:
        ArtifactError: The stage was begun with other settings, another model or other data.
    """
    claim(workdir / "stages" / name, STAGE_FILE, job, what=f"work on stage {name}")


def finish_stage(workdir: Path, name: str, *, keep_checkpoints: bool = False) -> None:
    """Note the digest of a stage's model, and remove what was needed to train it."""
    finished = workdir / "stages" / name / _FINISHED_FILE
    if not finished.exists():
        write_json(finished, dataclasses.asdict(_Finished(model_digest(workdir / name))))
    for folder in ("teacher",) if keep_checkpoints else ("checkpoints", "teacher"):
        shutil.rmtree(workdir / folder / name, ignore_errors=True)


def finished_model(workdir: Path, name: str) -> str:
    """Return the digest of a finished stage's model, as it was when the stage ended.

    Raises:
        ArtifactError: The stage is not finished, or the file that says so cannot be read.
    """
    return read_object(workdir / "stages" / name / _FINISHED_FILE, _Finished).model


def reuse_stage(other: Path, workdir: Path, name: str, job: dict[str, Any]) -> str | None:
    """Copy a stage's model from another workdir if it is finished there and the same job.

    Returns:
        What keeps it from being reused; None if it was.

    Raises:
        ArtifactError: The copy cannot be written.
    """
    source = other / name
    try:
        found = read_json(other / "stages" / name / STAGE_FILE)
        model = finished_model(other, name)
        copied = model_digest(source)
    except (ArtifactError, CheckpointError) as error:
        return f"it is not finished there: {error}"
    for field, there, here in differences(found, job):
        return f"it differs in {field} ({shown(there)} there, {shown(here)} here)"
    if copied != model:
        return f"{source} is damaged, or was changed after training"
    with atomic_folder(workdir / name) as partial, writing(workdir / name):
        shutil.copytree(source, partial, dirs_exist_ok=True)
    return None


def model_digest(folder: Path) -> str:
    """Return the SHA-256 of a model's files: their names and what they hold.

    Raises:
        CheckpointError: A file cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
        return sha256_of({path.name: sha256(path) for path in paths})
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from None


def _data_digest(store: Store) -> str:
    """Return a digest of built training data: its settings, its inputs, and its tables."""
    folder = epath.Path(store.path)
    try:
        build = parse_json((folder / BUILD_FILE).read_bytes())
        files = [folder / INSTRUCTIONS_FILE, *sorted((folder / TABLE_FOLDER).iterdir())]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} cannot be read: {error}") from None
    return sha256_of({**digests, BUILD_FILE: _content(build)})


def _content(value: Any) -> Any:
    """Return the description of a build without places and times."""
    if isinstance(value, dict):
        return {name: _content(part) for name, part in value.items() if name not in _NOT_CONTENT}
    return [_content(part) for part in value] if isinstance(value, list) else value
