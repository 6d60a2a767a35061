"""Results of the finished stages of a run: numbers, run files and a page of each, and tables."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from puma_jax.artifacts import write_json, write_text, writing
from puma_jax.data.mbeir import discover
from puma_jax.embedder import Embedder
from puma_jax.errors import ImageError, ItemError
from puma_jax.evaluation.encoding import ItemEncoder
from puma_jax.evaluation.evaluation import Evaluation, evaluate_selection
from puma_jax.evaluation.report import markdown
from puma_jax.evaluation.report_page import evaluation_sections, page, table
from puma_jax.evaluation.results import compare
from puma_jax.evaluation.selection import Selection, select
from puma_jax.files import read_object
from puma_jax.model.flops import forward_flops
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.schema import Count, CountOrZero, NotNegative
from puma_jax.training.config import TrainConfig
from puma_jax.training.curves import curves
from puma_jax.training.workdir import finished_model

_MEASURED_ITEMS = 1024
"""Candidates that are embedded at most to measure what a model costs."""
_REPORT = "report.html"


@dataclass(frozen=True)
class StageResult:
    """The content of result.json: the costs of a stage's model, and its hit rates."""

    model: str
    """Digest of the model."""
    split: str
    """Split that it was evaluated on."""
    layers: Count
    parameters: Count
    decoder_parameters: CountOrZero
    flops_per_item: NotNegative | None
    """Mean operations that embed a document of the benchmark, see `puma_jax.model.flops`."""
    items_per_second: NotNegative | None
    evaluation: dict[str, Any] | None
    """None if the benchmark has no queries of the split."""


def stage_result(name: str, config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Return the results of a finished stage; measure them first if they are missing.

    Results of another split or of another model are measured again, and a line says so.

    Raises:
        ArtifactError: The file of the results cannot be read or written.
        DataError: The file does not hold an evaluation, or the benchmark cannot be read.
    """
    folder = workdir / "results" / name
    path = folder / "result.json"
    split = config.evaluation.final_split
    model = multihost.from_process_zero(lambda: finished_model(workdir, name))
    if path.exists():
        found = read_object(path, StageResult)
        if (found.model, found.split) == (model, split):
            if found.evaluation is not None:
                Evaluation.from_json(found.evaluation)
            return asdict(found)
        print(f"{folder} holds results of another model or split ({found.split}): measured again")
    # Every process encodes its part of the items, on its own devices.
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    embedder = Embedder.load(workdir / name, dtype=config.compute.dtype, mesh=mesh)
    evaluation, flops, speed = None, None, None
    benchmark = discover(config.data.root)
    if any(found.split == split for found in benchmark.sets):
        print(f"Evaluating {name} on {split}", flush=True)
        skip = config.data.on_bad_record
        selection = select(benchmark, split, on_bad_record=skip)
        evaluation = evaluate_selection(
            selection,
            ItemEncoder(embedder),
            on_bad_record=skip,
            progress=multihost.is_process_zero(),
        )
        for note in evaluation.notes():
            print(note, flush=True)
        flops, speed = _costs(embedder, selection)
        multihost.on_process_zero(lambda: _write_found(folder, selection, evaluation))
    else:
        print(f"{name} is not evaluated: {benchmark.root} has no queries of split {split}")
    leaves = named_leaves(embedder.params)
    layers = [leaf.size for leaf_name, leaf in leaves.items() if ".layers." in leaf_name]
    result = asdict(
        StageResult(
            model=model,
            split=split,
            layers=embedder.config.decoder.layers,
            parameters=sum(leaf.size for leaf in leaves.values()),
            decoder_parameters=sum(layers),
            flops_per_item=flops,
            items_per_second=speed,
            evaluation=None if evaluation is None else evaluation.to_json(),
        )
    )
    multihost.on_process_zero(lambda: write_json(path, result))
    return result


def summary(results: dict[str, Any]) -> str:
    """Return the tables of results.json in markdown: hit rates of the models, and their costs."""
    return "\n\n".join(_tables(results))


def write_report(workdir: Path, results: dict[str, Any]) -> Path:
    """Write the page of a run and return its path: tables, learning curves, links to its stages.

    Args:
        workdir: Folder of the run.
        results: Content of its results.json.

    Raises:
        ArtifactError: The page cannot be written.
    """
    path = workdir / "report.html"
    links = [
        f'<li><a href="results/{name}/{_REPORT}">What the model of stage {name} finds</a></li>'
        for name in results["stages"]
        if (workdir / "results" / name / _REPORT).exists()
    ]
    sections = [
        "<h2>Models</h2>\n",
        *map(table, _tables(results)),
        f"<ul>{''.join(links)}</ul>\n",
        *curves(workdir / "metrics.jsonl"),
    ]
    write_text(path, page(f"Run {workdir.absolute().name}", sections))
    return path


def _tables(results: dict[str, Any]) -> list[str]:
    """Return the tables of hit rates, if there are any, and of costs."""
    found = {
        name: Evaluation.from_json(result["evaluation"])
        for name, result in results["stages"].items()
        if result["evaluation"] is not None
    }
    rows = [
        [
            name,
            str(result["layers"]),
            f"{result['parameters'] / 1e6:.2f} M",
            f"{result['decoder_parameters'] / 1e6:.2f} M",
            f"{flops / 1e6:,.1f}" if (flops := result["flops_per_item"]) else "–",
            f"{speed:,.0f}" if (speed := result["items_per_second"]) else "–",
        ]
        for name, result in results["stages"].items()
    ]
    costs = markdown(
        ["model", "layers", "parameters", "of its layers", "MFLOP/item", "items/s"], rows
    )
    return [compare(found), costs] if found else [costs]


def _write_found(folder: Path, selection: Selection, evaluation: Evaluation) -> None:
    """Write the ranked candidates: as TREC run files, and as a page with pictures."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        evaluation.write_runs(folder)
    sections = evaluation_sections(selection, evaluation)
    write_text(folder / _REPORT, page(f"Stage {folder.name} on {selection.split}", sections))


def _costs(embedder: Embedder, selection: Selection) -> tuple[float, float]:
    """Return the mean operations of embedding a candidate, and how many are embedded per second.

    Reading images is part of the time.
    """
    pool = len(selection.dids)
    rows = np.linspace(0, pool - 1, min(pool, _MEASURED_ITEMS)).astype(int)
    items = [selection.document(row) for row in rows.tolist()]
    prepared = []
    for item in items:
        with contextlib.suppress(ItemError, ImageError):  # the evaluation has counted them
            prepared.append(embedder.preprocess(item))
    tokens = np.array([len(item.tokens) for item in prepared])
    patches = np.array([len(item.patches) for item in prepared])
    encode = ItemEncoder(embedder, shared=False)
    encode(items)  # compiles
    began = time.perf_counter()
    encode(items)
    seconds = time.perf_counter() - began
    flops = forward_flops(embedder.config, tokens, patches).sum() / max(1, len(prepared))
    return float(flops), len(items) / seconds
