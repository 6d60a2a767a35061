"""Mine hard negatives for the training queries of a benchmark in M-BEIR layout, with a model.

`python -m puma_jax.mine --model FOLDER --data.root M-BEIR --out M-BEIR-mined`
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from puma_jax import Embedder, cli
from puma_jax.artifacts import atomic_folder, check_output, write_json, writing
from puma_jax.config import DType
from puma_jax.data import mbeir
from puma_jax.data.lines import OnBadRecord, json_object, numbered_lines, write_lines
from puma_jax.errors import ConfigError
from puma_jax.evaluation.encoding import ItemEncoder
from puma_jax.evaluation.mining import Mined, MiningConfig, mine
from puma_jax.evaluation.training_set import TrainingSet, read_training_set
from puma_jax.evaluation.vector_folder import vector_folder
from puma_jax.model.attention import describe
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.multihost import DistributedConfig

MANIFEST = "mined.json"
"""Says what the negatives of a folder were mined with."""

_MINING = MiningConfig()
_ALL_DEVICES = MeshConfig()
_ALONE = DistributedConfig()


def main(
    model: str,
    data_root: Annotated[Path, tyro.conf.arg(name="data.root")],
    out: Path,
    mining: tyro.conf.OmitArgPrefixes[MiningConfig] = _MINING,
    on_bad_record: OnBadRecord = "error",
    vectors_dir: Path | None = None,
    dtype: DType | None = None,
    ret_token: str | None = None,
    tokens_per_chunk: int | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Mine hard negatives, and write a benchmark whose training queries have them.

    Args:
        model: Hugging Face folder or hub id of the model.
        data_root: Benchmark in M-BEIR layout whose training queries get negatives.
        out: Folder to write; must not exist, or be empty. It is a benchmark of its own, with the
            files of data.root as hard links where the file system allows them, else as copies.
        mining: The documents that become negatives.
        on_bad_record: "error" stops at a record or image that cannot be read, "skip" leaves it out
            and counts it; a query that is left out keeps its line, without negatives.
        vectors_dir: Folder to keep vectors in until the result is written, if memory is too small
            for them: the same command then resumes after a kill. They stay in memory by default.
        dtype: Dtype of weights and activations. The dtype of the model's files by default.
        ret_token: Token that ends every item, such as "<|video_pad|>"; for models without a spare
            row for [RET]. The one saved with the model, or [RET], by default.
        tokens_per_chunk: Approximate tokens that a device processes at a time; no result depends on
            it. Small on a CPU and large on an accelerator by default.
        mesh: How the devices of a process share the work.
        distributed: How processes that share the work find each other.
    """
    multihost.initialize(distributed)
    _check_places(data_root, out, vectors_dir)
    multihost.on_process_zero(lambda: check_output(out))
    data = read_training_set(mbeir.discover(data_root), on_bad_record)
    devices = make_mesh(mesh, jax.local_devices())
    embedder = Embedder.load(model, dtype=dtype, ret_token=ret_token, mesh=devices)
    print(describe(embedder.compute), flush=True)
    with contextlib.ExitStack() as stack:
        vectors = None
        if vectors_dir is not None:
            job = [embedder.fingerprint, repr(embedder.compute), str(data_root), tokens_per_chunk]
            vectors = stack.enter_context(vector_folder(vectors_dir, job))
        mined = mine(
            data,
            ItemEncoder(embedder, tokens_per_chunk),
            mining,
            on_bad_record=on_bad_record,
            vectors=vectors,
            progress=multihost.is_process_zero(),
        )
        if vectors is not None and vectors.reused:
            print(f"{vectors.reused:,} vectors are those of an interrupted run")
        about = {
            "model": model,
            "fingerprint": embedder.fingerprint,
            **dataclasses.asdict(mining),
        }
        multihost.on_process_zero(lambda: write_benchmark(data, mined, out, about))
    for note in notes(data, mined):
        print(note)
    print(f"Train with --data.root {out} and plan.hard_negatives above 0")


def write_benchmark(data: TrainingSet, mined: Mined, out: Path, about: dict[str, Any]) -> None:
    """Write a benchmark with other hard negatives; the folder appears whole, or not at all.

    Raises:
        ArtifactError: The folder is not empty, or cannot be written.
        DataError: A file of queries can no longer be read.
    """
    replaced = {index.path for index in data.query_files}
    with atomic_folder(out) as partial, writing(out):

        def ignored(folder: str, names: list[str]) -> list[str]:
            return [name for name in names if name == MANIFEST or Path(folder, name) in replaced]

        shutil.copytree(
            data.root,
            partial,
            symlinks=True,
            ignore=ignored,
            copy_function=_link_or_copy,
            dirs_exist_ok=True,
        )
        for number, index in enumerate(data.query_files):
            path = partial / index.path.relative_to(data.root)
            write_lines(path, _lines_with_negatives(data, mined, number))
        write_json(partial / MANIFEST, about)


def notes(data: TrainingSet, mined: Mined) -> list[str]:
    """Return what was mined and what was left out, in a line each."""
    has = (mined.rows >= 0).sum(1)
    wanted = mined.rows.shape[1]
    lines = [f"{has.sum():,} hard negatives of {np.count_nonzero(has):,} of {len(data):,} queries"]
    for count, what in (
        (np.count_nonzero(has < wanted), f"queries have fewer than {wanted}"),
        (mined.too_close, "documents in the range of ranks score too close to an answer"),
        (mined.unanswered, "queries have none, as no document that answers them is in the pools"),
        (len(data.unused_pools), "pools are not used: no document of theirs answers a query"),
    ):
        if count:
            lines.append(f"{count:,} {what}")
    for skipped in (data.skipped, mined.skipped):
        if skipped.count:
            lines.append(f"{skipped.count:,} bad records were skipped, the first of them:")
            lines += [f"  {message}" for message in skipped.messages]
    return lines


def _check_places(root: Path, out: Path, vectors_dir: Path | None) -> None:
    """Refuse folders within each other.

    Raises:
        ConfigError: The output or the vectors lie in the benchmark, or the vectors in the output.
    """
    for name, inner, outer in (
        ("out", out, root),
        ("vectors_dir", vectors_dir, root),
        ("vectors_dir", vectors_dir, out),
    ):
        if inner is not None and inner.resolve().is_relative_to(outer.resolve()):
            raise ConfigError(f"{name} {inner} lies in {outer}: choose a folder outside of it")


def _lines_with_negatives(data: TrainingSet, mined: Mined, file: int) -> Iterator[str]:
    """Yield the lines of a file of queries; fields that we do not know stay as they are."""
    index = data.query_files[file]
    own = np.flatnonzero(data.locations[:, 0] == file)
    query_of_line = dict(
        zip(index.line_numbers[data.locations[own, 1]].tolist(), own.tolist(), strict=True)
    )
    for line in numbered_lines(index.path):
        if line.content.isspace():
            continue
        query = query_of_line.get(line.number)
        if query is None:  # a bad record, which stays one
            yield line.content.decode("utf-8", "replace").rstrip("\r\n")
            continue
        rows = mined.rows[query]
        negatives = [data.dids[row] for row in rows[rows >= 0].tolist()]
        row = json_object(line.content) | {"neg_cand_list": negatives}
        yield json.dumps(row, ensure_ascii=False)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


if __name__ == "__main__":
    cli.run(main)
