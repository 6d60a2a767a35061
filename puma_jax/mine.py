"""Mine hard negatives for the training queries of a benchmark in M-BEIR layout, with a model.

`python -m puma_jax.mine --model FOLDER --data.root M-BEIR --out M-BEIR-mined`
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from puma_jax import Embedder, cli
from puma_jax.artifacts import check_output
from puma_jax.config import DType
from puma_jax.data import mbeir
from puma_jax.data.lines import OnBadRecord
from puma_jax.evaluation.encoding import ItemEncoder
from puma_jax.evaluation.mining import Mined, MiningConfig, mine
from puma_jax.evaluation.rewriting import check_places, rewrite
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
    check_places(data_root, out, vectors_dir)
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
        multihost.on_process_zero(
            lambda: rewrite(data, lambda row: _fields(data, mined, row), out, MANIFEST, about)
        )
    for note in notes(data, mined):
        print(note)
    print(f"Train with --data.root {out} and plan.hard_negatives above 0")


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


def _fields(data: TrainingSet, mined: Mined, query: int) -> dict[str, Any]:
    """Return what the line of a query says of its negatives."""
    rows = mined.rows[query]
    return {"neg_cand_list": [data.dids[row] for row in rows[rows >= 0].tolist()]}


if __name__ == "__main__":
    cli.run(main)
