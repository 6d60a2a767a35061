"""Evaluate a model on a benchmark in M-BEIR layout, on local pools and on the global one.

`python -m puma_jax.evaluate --model FOLDER --data.root M-BEIR --out results`
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import jax
import tyro

from puma_jax import Embedder, cli
from puma_jax.config import DType
from puma_jax.data import mbeir
from puma_jax.data.lines import write_lines
from puma_jax.data.mbeir import Benchmark
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation import published
from puma_jax.evaluation.evaluation import Subset, evaluate
from puma_jax.evaluation.report import Evaluation, compare
from puma_jax.model.attention import describe
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.multihost import DistributedConfig

_ALL_DEVICES = MeshConfig()
_ALONE = DistributedConfig()


def main(
    model: str,
    data_root: Annotated[Path, tyro.conf.arg(name="data.root")],
    out: Path,
    split: str = "test",
    sets: tuple[str, ...] = (),
    subset: tuple[int, int] | None = None,
    vectors_dir: Path | None = None,
    compare_with: tuple[Path, ...] = (),
    dtype: DType | None = None,
    tokens_per_chunk: int | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Evaluate a model: print a table, write results.json and a TREC run for each set and pool.

    Args:
        model: Hugging Face folder or hub id of the model.
        data_root: Benchmark in M-BEIR layout to evaluate on.
        out: Folder to write; must not exist, or be empty.
        split: Split of the queries to evaluate.
        sets: Names of the sets to evaluate, such as cirr and nights; the global pool is then that
            of these sets. All sets by default.
        subset: Queries of each set and candidates of each pool to evaluate, for a quick look. All
            of them by default.
        vectors_dir: Folder to keep the candidates' vectors in while they are searched, if memory is
            too small for them. They stay in memory by default.
        compare_with: Files results.json of other models, to print in the same table.
        dtype: Dtype of weights and activations. The dtype of the model's files by default.
        tokens_per_chunk: Approximate tokens that a device processes at a time; no result depends on
            it. Small on a CPU and large on an accelerator by default.
        mesh: How the devices of a process share the work.
        distributed: How processes that share the work find each other.
    """
    multihost.initialize(distributed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists: choose another folder, or remove it")
    others = {str(path.parent): Evaluation.read(path) for path in compare_with}
    benchmark = mbeir.discover(data_root)
    if sets:
        benchmark = only(benchmark, sets)
    devices = make_mesh(mesh, jax.local_devices())
    embedder = Embedder.load(model, dtype=dtype, mesh=devices)
    print(describe(embedder.compute), flush=True)
    evaluation = evaluate(
        benchmark,
        multihost.map_across_processes(
            lambda items: embedder.encode(items, tokens_per_chunk=tokens_per_chunk, progress=False)
        ),
        split=split,
        limits=Subset(*subset) if subset else None,
        vectors_dir=vectors_dir,
        progress=multihost.is_process_zero(),
    )
    results = {"model": model, "benchmark": str(data_root), **evaluation.to_json()}

    def write() -> None:
        write_lines(out / "results.json", [json.dumps(results, indent=2)])
        evaluation.write_runs(out / "runs")

    multihost.on_process_zero(write)
    print(evaluation.table())
    table = None if subset else published.compare_with(evaluation, "this model")
    if table:
        print(f"\nCompared with published results:\n{table}")
    if others:
        print()
        print(compare({**others, str(out): evaluation}))
    print(f"Numbers are in {out / 'results.json'}, ranked documents in {out / 'runs'}")


def only(benchmark: Benchmark, names: tuple[str, ...]) -> Benchmark:
    """Return a benchmark with only the named sets; its global pool is the union of their pools.

    Raises:
        DataError: There is no set of such a name.
    """
    known = sorted({found.name for found in benchmark.sets})
    for name in names:
        if name not in known:
            raise DataError(f'{benchmark.root} has no set "{name}", only {", ".join(known)}')
    chosen = tuple(found for found in benchmark.sets if found.name in names)
    return dataclasses.replace(benchmark, sets=chosen, global_pools={})


if __name__ == "__main__":
    cli.run(main)
