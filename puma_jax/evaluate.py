"""Evaluate a model on a benchmark in M-BEIR layout, on local pools and on the global one.

`python -m puma_jax.evaluate --model FOLDER --root M-BEIR --out results`
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from puma_jax import Embedder, cli
from puma_jax.config import DType
from puma_jax.data import mbeir
from puma_jax.data.mbeir import Benchmark
from puma_jax.data.mbeir.lines import write_lines
from puma_jax.errors import ConfigError, DataError
from puma_jax.model.attention import describe
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.multihost import DistributedConfig
from puma_jax.retrieval.evaluation import Subset, evaluate
from puma_jax.retrieval.published import beside as beside_published
from puma_jax.retrieval.report import Evaluation, compare

_ALL_DEVICES = MeshConfig()
_ALONE = DistributedConfig()


def main(
    model: str,
    root: Path,
    out: Path,
    split: str = "test",
    sets: tuple[str, ...] = (),
    subset: tuple[int, int] | None = None,
    scratch: Path | None = None,
    beside: tuple[Path, ...] = (),
    weights: DType | None = None,
    tokens_per_chunk: int | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Evaluate a model: print a table, write results.json and a TREC run for each set and pool.

    Args:
        model: A Hugging Face folder or hub id.
        root: Folder of the benchmark.
        out: Folder to write; must not exist, or be empty.
        split: Of the queries.
        sets: Names such as cirr and nights, to evaluate only these; the global pool is then that
            of these sets. All by default.
        subset: Numbers of queries of each set and of documents of each pool, for a quick look.
        scratch: Folder for the documents' vectors, if memory is too small for them.
        beside: Files results.json of other models, to compare with.
        weights: Dtype of weights and activations; that of the model's files by default.
        tokens_per_chunk: About how many tokens a device reads at a time; no result depends on it.
        mesh: How the devices of a process share the work.
        distributed: How processes that share the work find each other.
    """
    multihost.initialize(distributed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists: choose another folder, or remove it")
    others = {str(path.parent): Evaluation.read(path) for path in beside}
    benchmark = mbeir.discover(root)
    if sets:
        benchmark = only(benchmark, sets)
    devices = make_mesh(mesh, jax.local_devices())
    embedder = Embedder.load(model, dtype=weights, mesh=devices)
    print(describe(embedder.compute), flush=True)
    evaluation = evaluate(
        benchmark,
        multihost.spread(
            lambda items: embedder.encode(items, tokens_per_chunk=tokens_per_chunk, progress=False)
        ),
        split=split,
        limits=Subset(*subset) if subset else None,
        scratch=scratch,
        progress=multihost.is_first(),
    )
    results = {"model": model, "benchmark": str(root), **evaluation.to_json()}

    def write() -> None:
        write_lines(out / "results.json", [json.dumps(results, indent=2)])
        evaluation.write_runs(out / "runs")

    multihost.once(write)
    print(evaluation.table())
    published = None if subset else beside_published(evaluation, "this model")
    if published:
        print(f"\nBeside what is published:\n{published}")
    if others:
        print()
        print(compare({**others, str(out): evaluation}))
    print(f"Numbers are in {out / 'results.json'}, ranked documents in {out / 'runs'}")


def only(benchmark: Benchmark, names: tuple[str, ...]) -> Benchmark:
    """Return a benchmark with only the named sets, and with their local pools as its global one.

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
