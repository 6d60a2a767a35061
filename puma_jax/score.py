"""Score the positives and hard negatives of training queries with a teacher, for distillation.

`python -m puma_jax.score --reranker FOLDER --data.root M-BEIR-mined --out M-BEIR-scored`
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from puma_jax import Embedder, Reranker, cli
from puma_jax.artifacts import check_output
from puma_jax.config import DType
from puma_jax.data import mbeir
from puma_jax.data.lines import OnBadRecord
from puma_jax.errors import ConfigError
from puma_jax.evaluation.rewriting import check_places, rewrite
from puma_jax.evaluation.scoring import Scored, score
from puma_jax.evaluation.training_set import TrainingSet, read_training_set
from puma_jax.evaluation.vector_folder import vector_folder
from puma_jax.model.attention import describe
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.multihost import DistributedConfig

MANIFEST = "scored.json"
"""Says what the scores of a folder were made with."""

_ALL_DEVICES = MeshConfig()
_ALONE = DistributedConfig()


def main(
    data_root: Annotated[Path, tyro.conf.arg(name="data.root")],
    out: Path,
    model: str | None = None,
    reranker: str | None = None,
    on_bad_record: OnBadRecord = "error",
    vectors_dir: Path | None = None,
    dtype: DType | None = None,
    ret_token: str | None = None,
    tokens_per_chunk: int | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Score what training queries name, and write a benchmark whose queries have the scores.

    Args:
        data_root: Benchmark in M-BEIR layout whose training queries have hard negatives.
        out: Folder to write; must not exist, or be empty. It is a benchmark of its own, with the
            files of data.root as hard links where the file system allows them, else as copies.
        model: Hugging Face folder or hub id of an embedder that scores by cosines. Give this one
            or a reranker.
        reranker: Hugging Face folder or hub id of a reranker, such as Qwen/Qwen3-VL-Reranker-2B,
            that scores by logits.
        on_bad_record: "error" stops at a record or image that cannot be read, "skip" leaves it out
            and counts it; its scores are then missing.
        vectors_dir: Folder to keep finished work in until the result is written, if memory is too
            small for it: the same command then resumes after a kill. It stays in memory by default.
        dtype: Dtype of weights and activations. The dtype of the model's files by default.
        ret_token: Token that ends every item of an embedder without a spare row for [RET], such as
            "<|video_pad|>". The one saved with the model, or [RET], by default.
        tokens_per_chunk: Approximate tokens that a device processes at a time; no result depends on
            it. Small on a CPU and large on an accelerator by default.
        mesh: How the devices of a process share the work.
        distributed: How processes that share the work find each other.

    Raises:
        ConfigError: Not exactly one teacher is given, or folders lie within each other.
    """
    if (model is None) == (reranker is None):
        raise ConfigError("expected one teacher: give --model or --reranker")
    multihost.initialize(distributed)
    check_places(data_root, out, vectors_dir)
    multihost.on_process_zero(lambda: check_output(out))
    data = read_training_set(mbeir.discover(data_root), on_bad_record)
    devices = make_mesh(mesh, jax.local_devices())
    teacher: Embedder | Reranker
    if model is not None:
        teacher = Embedder.load(model, dtype=dtype, ret_token=ret_token, mesh=devices)
    else:
        teacher = Reranker.load(str(reranker), dtype=dtype, mesh=devices)
    print(describe(teacher.compute), flush=True)
    with contextlib.ExitStack() as stack:
        vectors = None
        if vectors_dir is not None:
            job = [teacher.fingerprint, repr(teacher.compute), str(data_root), tokens_per_chunk]
            vectors = stack.enter_context(vector_folder(vectors_dir, job))
        scored = score(
            data,
            teacher,
            tokens_per_chunk=tokens_per_chunk,
            on_bad_record=on_bad_record,
            vectors=vectors,
            progress=multihost.is_process_zero(),
        )
        if vectors is not None and vectors.reused:
            print(f"{vectors.reused:,} results are those of an interrupted run")
        about = {
            "model": model,
            "reranker": reranker,
            "fingerprint": teacher.fingerprint,
        }
        multihost.on_process_zero(
            lambda: rewrite(data, lambda row: _fields(data, scored, row), out, MANIFEST, about)
        )
    for note in notes(scored):
        print(note)
    print(f"Train with --data.root {out}, plan.hard_negatives and score_distill.weight above 0")


def notes(scored: Scored) -> list[str]:
    """Return what was scored and what was left out, in a line each."""
    there = np.isfinite(scored.scores)
    queries = np.count_nonzero(scored.named.lengths)
    lines = [f"{there.sum():,} scores of documents for {queries:,} queries"]
    for count, what in (
        ((~there).sum(), "documents have none, because they or their query cannot be read"),
        (scored.unknown, "ids of positives and negatives are of no document"),
    ):
        if count:
            lines.append(f"{count:,} {what}")
    if scored.skipped.count:
        lines.append(f"{scored.skipped.count:,} bad records were skipped, the first of them:")
        lines += [f"  {message}" for message in scored.skipped.messages]
    return lines


def _fields(data: TrainingSet, scored: Scored, query: int) -> dict[str, Any]:
    """Return what the line of a query says of scores."""
    rows, scores = (of.tolist() for of in scored.of_query(query))
    named = zip(rows, scores, strict=True)
    return {"cand_scores": {data.dids[row]: value for row, value in named}}


if __name__ == "__main__":
    cli.run(main)
