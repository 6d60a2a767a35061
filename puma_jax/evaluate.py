"""Evaluate a model on a benchmark in M-BEIR layout, on local pools and on the global one.

`python -m puma_jax.evaluate --model FOLDER --data.root M-BEIR --out results`
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from puma_jax import Embedder, Reranker, cli
from puma_jax.artifacts import atomic_folder, check_output, write_json, write_text
from puma_jax.config import DType
from puma_jax.data import mbeir
from puma_jax.data.lines import OnBadRecord
from puma_jax.data.mbeir import Benchmark
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation import published
from puma_jax.evaluation.depths import Depth, check_depths, depths_json, depths_table
from puma_jax.evaluation.encoding import ItemEncoder
from puma_jax.evaluation.evaluation import (
    KS,
    EmbeddedSelection,
    Evaluation,
    Subset,
    embed_selection,
)
from puma_jax.evaluation.report_page import evaluation_sections, page, reranked_section
from puma_jax.evaluation.reranking import rerank
from puma_jax.evaluation.results import compare, differing, read_evaluations
from puma_jax.evaluation.selection import Selection, select
from puma_jax.evaluation.sizes import (
    Size,
    StoredPrecision,
    evaluate_sizes,
    sizes_json,
    sizes_of,
    sizes_table,
)
from puma_jax.evaluation.vector_folder import VectorFolder, vector_folder
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
    on_bad_record: OnBadRecord = "error",
    vectors_dir: Path | None = None,
    compare_with: tuple[Path, ...] = (),
    reranker: str | None = None,
    rerank_top: int = 50,
    precision: tuple[StoredPrecision, ...] = (),
    dimensions: tuple[int, ...] = (),
    layers: tuple[int, ...] = (),
    rescore_multiplier: int = 4,
    dtype: DType | None = None,
    ret_token: str | None = None,
    adapter: str | None = None,
    tokens_per_chunk: int | None = None,
    mesh: MeshConfig = _ALL_DEVICES,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Evaluate a model: print a table, write results.json, a page with pictures, and TREC runs.

    Args:
        model: Hugging Face folder or hub id of the model.
        data_root: Benchmark in M-BEIR layout to evaluate on.
        out: Folder to write; must not exist, or be empty.
        split: Split of the queries to evaluate.
        sets: Names of the sets to evaluate, such as cirr and nights; the global pool is then that
            of these sets. All sets by default.
        subset: Queries of each set and candidates of each pool to evaluate, for a quick look. All
            of them by default.
        on_bad_record: "error" stops at a record or image that cannot be read, "skip" leaves it out
            and counts it.
        vectors_dir: Folder to keep vectors in until the results are written, if memory is too small
            for them: the same command then resumes after a kill. They stay in memory by default.
        compare_with: Files results.json of other models or of training runs, or result.json of
            their stages, to print in the same table.
        reranker: Hugging Face folder or hub id of a reranker, such as Qwen/Qwen3-VL-Reranker-2B.
            It orders the first documents of each query and pool anew, and the results of both are
            written.
        rerank_top: Number of documents of each query and pool that the reranker scores.
        precision: Precisions in which document vectors are stored, to print what each keeps of the
            hit rates: int8, and ubinary, one bit for each value.
        dimensions: Numbers of values to keep of each vector, likewise. All of them by default.
        layers: Numbers of decoder layers to evaluate as well: the first 4 and the first 8, say, of
            a model that was trained for these depths. Each embeds everything again. Only all layers
            by default.
        rescore_multiplier: With ubinary, this many times the deepest k that is counted, 50, are
            found by their bits and scored anew by the float32 vector of the query.
        dtype: Dtype of weights and activations. The dtype of the model's files by default.
        ret_token: Token that ends every item, such as "<|video_pad|>"; for models without a spare
            row for [RET]. The one saved with the model, or [RET], by default.
        adapter: PEFT folder or hub id of an adapter on the model, merged when it is read. None by
            default.
        tokens_per_chunk: Approximate tokens that a device processes at a time; no result depends on
            it. Small on a CPU and large on an accelerator by default.
        mesh: How the devices of a process share the work.
        distributed: How processes that share the work find each other.
    """
    multihost.initialize(distributed)
    multihost.on_process_zero(lambda: check_output(out))
    if vectors_dir is not None and out.absolute() in (
        vectors_dir.absolute(),
        *vectors_dir.absolute().parents,
    ):
        raise ConfigError(f"vectors_dir {vectors_dir} lies in {out}: choose a folder outside of it")
    for name, value in (("rerank_top", rerank_top), ("rescore_multiplier", rescore_multiplier)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    others = _others(compare_with)
    benchmark = mbeir.discover(data_root)
    if sets:
        benchmark = only(benchmark, sets)
    selection = select(
        benchmark, split, Subset(*subset) if subset else None, on_bad_record=on_bad_record
    )
    devices = make_mesh(mesh, jax.local_devices())
    embedder = Embedder.load(model, dtype=dtype, ret_token=ret_token, mesh=devices, adapter=adapter)
    sizes = []
    if precision or dimensions:
        sizes = sizes_of(precision, dimensions, embedder.embedding_dim)
    check_depths(layers, embedder.config.decoder.layers)
    reader = None if reranker is None else Reranker.load(reranker, dtype=dtype, mesh=devices)
    print(describe(embedder.compute), flush=True)
    with contextlib.ExitStack() as stack:

        def embed(model: Embedder) -> tuple[EmbeddedSelection, VectorFolder | None]:
            vectors = None
            if vectors_dir is not None:
                job = [_what_decides_vectors(model, selection), tokens_per_chunk, sets, subset]
                vectors = stack.enter_context(vector_folder(vectors_dir, job))
            encode = ItemEncoder(model, tokens_per_chunk)
            return embed_selection(
                selection,
                encode,
                on_bad_record=on_bad_record,
                vectors=vectors,
                progress=multihost.is_process_zero(),
            ), vectors

        def smaller(embedded: EmbeddedSelection) -> dict[Size, Evaluation]:
            return evaluate_sizes(
                embedded, sizes, multiplier=rescore_multiplier, progress=multihost.is_process_zero()
            )

        embedded, vectors = embed(embedder)
        evaluation = embedded.evaluate(
            ks={*KS, rerank_top} if reader else KS, progress=multihost.is_process_zero()
        )
        # What was measured is told before anything can fail, and vectors are kept until it is safe.
        _print(evaluation, vectors, {**others, str(out): evaluation}, whole=subset is None)
        name = model if adapter is None else f"{model} with {adapter}"
        results = {"model": name, "benchmark": str(data_root), **evaluation.to_json()}
        of_sizes = smaller(embedded)
        if of_sizes:
            print(f"\n{sizes_table(evaluation, of_sizes)}", flush=True)
        depths = [Depth(embedder.config.decoder.layers, evaluation, of_sizes)]
        for count in layers:
            shallow, _ = embed(embedder.keep_layers(count))
            of_depth = shallow.evaluate(progress=multihost.is_process_zero())
            depths.append(Depth(count, of_depth, smaller(shallow)))
        if layers:
            print(f"\n{depths_table(depths)}", flush=True)
        reranked = None
        if reader is not None:
            reranked = rerank(
                selection,
                evaluation,
                functools.partial(
                    reader.score_pairs, tokens_per_chunk=tokens_per_chunk, progress=False
                ),
                top=rerank_top,
                progress=multihost.is_process_zero(),
            )
            print(f"\nFirst {rerank_top} documents reranked by {reranker}:\n{reranked.table()}\n")
            print(compare({name: evaluation, f"{name} + {reranker}": reranked}), flush=True)
        said = {"reranker": reranker, "rerank_top": rerank_top}
        multihost.on_process_zero(
            lambda: _write(
                out,
                results,
                selection,
                evaluation,
                reranked,
                said,
                {
                    "sizes": sizes_json(of_sizes, rescore_multiplier) if of_sizes else None,
                    "depths": depths_json(depths, rescore_multiplier) if layers else None,
                },
            )
        )
    print(f"Numbers are in {out / 'results.json'}, ranked documents in {out / 'runs'}")
    if reranker is not None:
        print(f"Those of reranking are in {out / 'reranked.json'} and {out / 'reranked-runs'}")
    print(f"To see what was found, open {out / 'report.html'} in a browser")


def _others(paths: tuple[Path, ...]) -> dict[str, Evaluation]:
    """Return the evaluations in files of results, each by a name of its own."""
    others: dict[str, Evaluation] = {}
    for path in paths:
        for stage, evaluation in read_evaluations(path).items():
            name = str(path.parent / stage)
            others[name if name not in others else f"{path} {stage}".strip()] = evaluation
    return others


def _what_decides_vectors(embedder: Embedder, selection: Selection) -> list[str]:
    """Return what decides the vectors besides the items themselves."""
    return [embedder.fingerprint, repr(embedder.compute), str(selection.root), selection.split]


def _print(
    evaluation: Evaluation,
    vectors: VectorFolder | None,
    models: dict[str, Evaluation],
    *,
    whole: bool,
) -> None:
    """Print the table, what it leaves out, and comparisons.

    Args:
        evaluation: What was measured.
        vectors: Folder that the vectors were kept in.
        models: Evaluations to compare, this one included.
        whole: Whether whole pools were searched, as for published results.
    """
    if vectors is not None and vectors.reused:
        print(f"{vectors.reused:,} vectors are those of an interrupted run")
    print(evaluation.table())
    for note in evaluation.notes():
        print(note)
    table = published.compare_with(evaluation, "this model") if whole else None
    if table:
        print(f"\nCompared with published results:\n{table}")
    if len(models) > 1:
        print()
        print(compare(models))
        for line in differing(models):
            print(line)
    print(end="", flush=True)


def _write(
    out: Path,
    results: dict[str, Any],
    selection: Selection,
    evaluation: Evaluation,
    reranked: Evaluation | None,
    said: dict[str, Any],
    smaller: dict[str, Any],
) -> None:
    """Write numbers, ranked documents and page; the folder appears whole, or not at all.

    Args:
        out: Folder to write.
        results: Content of results.json.
        selection: What was evaluated.
        evaluation: Its evaluation.
        reranked: The evaluation after reranking, if there was any.
        said: What reranked.json tells of the reranker.
        smaller: Content of further JSON files by name; None writes none.
    """
    with atomic_folder(out) as folder:
        write_json(folder / "results.json", results)
        evaluation.write_runs(folder / "runs")
        for name, content in smaller.items():
            if content is not None:
                write_json(folder / f"{name}.json", content)
        title = f"{results['model']} on {selection.split} of {results['benchmark']}"
        sections = [*evaluation_sections(selection, evaluation)]
        if reranked is not None:
            write_json(folder / "reranked.json", results | said | reranked.to_json())
            reranked.write_runs(folder / "reranked-runs")
            sections += reranked_section(reranked, **said)
        write_text(folder / "report.html", page(title, sections))


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
