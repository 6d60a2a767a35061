"""A training run: its stages in order, each from the model of the one before, and their results.

```
workdir/
  config.json            config of the run
  base/                  base model of a run from scratch, before training
  data/                  built training data of each benchmark
  checkpoints/{stage}/   Orbax checkpoints, deleted when the stage is finished
  teacher/{stage}/       cached states of the teacher, deleted likewise
  {stage}/               model of the stage: a Hugging Face folder, adapters merged
  results/{stage}/       results on the benchmark: numbers, TREC run files, a picture
  metrics.jsonl          metrics of steps and evaluations; with tensorboard/ beside it
  profile/{stage}/       profile of some steps, if requested
  results.json           results of all stages
```
A model or a result that exists is finished: the same command resumes with the next one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from puma_jax.artifacts import write_json
from puma_jax.data.mbeir import discover
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError
from puma_jax.evaluation.evaluation import Evaluation, Subset, evaluate_selection
from puma_jax.evaluation.picture import render_results
from puma_jax.evaluation.report import compare, markdown
from puma_jax.evaluation.selection import Selection, select
from puma_jax.model.attention import describe
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.training.checkpoint import versions
from puma_jax.training.config import TrainConfig
from puma_jax.training.loop import run_stage
from puma_jax.training.metric_writer import MetricWriter
from puma_jax.training.scratch import write_base
from puma_jax.training.stages import Stage, build_stage

# Settings that may differ when a run is resumed: they do not change the model.
_MAY_DIFFER = ("mesh", "distributed", "evaluation", "checkpoint", "log")
# Number of candidates that are embedded to measure the speed of a model.
_TIMED_ITEMS = 1024


def run(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Run the stages that are not finished; return the content of results.json.

    Raises:
        ConfigError: The workdir holds another run, or the devices do not fit the mesh.
        DataError: A benchmark is not a folder in M-BEIR layout.
        TrainingError: The loss or the gradient norm is not finite.
        Preempted: The run was asked to stop; the same call resumes it.
    """
    began = time.perf_counter()
    mesh = make_mesh(config.mesh)
    # A mistyped folder is reported before the workdir is claimed.
    for root in (config.data.root, *(stage.data_root for stage in config.stages.values())):
        if root is not None:
            discover(root)
    fresh = not (workdir / "config.json").exists()
    multihost.on_process_zero(lambda: _claim(workdir, config))
    device = mesh.devices.flat[0].device_kind
    print(f"Training on {mesh.size} × {device} in {workdir}: {', '.join(config.stages)}")
    print(f"Mesh: {dict(mesh.shape)}, {describe(config.compute)}")
    folder: str | Path = workdir / "base"
    if config.scratch is not None:
        multihost.on_process_zero(lambda: _make_base(workdir / "base", config))
    results = {}
    for name, stage in config.stages.items():
        folder, out = stage.model or folder, workdir / name
        if not out.exists():
            _train(name, config, folder, workdir, mesh)
        folder = out
        if name in (*config.evaluation.final_stages, list(config.stages)[-1]):
            results[name] = _result(name, config, workdir)
    content = {
        "config": as_json(config),
        "versions": versions(),
        "device": f"{mesh.size} × {device}",
        # Unknown for a resumed run.
        "seconds": round(time.perf_counter() - began) if fresh else None,
        "stages": results,
    }
    multihost.on_process_zero(lambda: write_json(workdir / "results.json", content))
    print(summary(content))
    print(f"The model is in {folder}, its results in {workdir / 'results.json'}")
    return content


def summary(results: dict[str, Any]) -> str:
    """Return the tables of results.json in markdown: hit rates of the models, and their costs."""
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
            f"{speed:,.0f}" if (speed := result["items_per_second"]) else "–",
        ]
        for name, result in results["stages"].items()
    ]
    costs = markdown(["model", "layers", "parameters", "of its layers", "items/s"], rows)
    return "\n\n".join([compare(found), costs] if found else [costs])


def as_json(config: TrainConfig) -> dict[str, Any]:
    """Return a config as plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _make_base(folder: Path, config: TrainConfig) -> None:
    """Write the base model of a run from scratch, if it is missing."""
    if config.scratch is not None and not folder.exists():
        root, images, prompt = config.data.root, config.images, config.prompt
        write_base(folder, config.scratch, root, images, prompt, config.seed)


def _claim(workdir: Path, config: TrainConfig) -> None:
    """Create the folder of this run, or check that an existing one belongs to it."""
    path, wanted = workdir / "config.json", as_json(config)
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        for name in _differences(found, wanted):
            raise ConfigError(
                f"{workdir} holds another run, which differs in {name}: choose another --workdir, "
                "or delete this one"
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir} is not empty and holds no run: choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _differences(found: dict[str, Any], wanted: dict[str, Any], at: str = "") -> list[str]:
    """Return the settings that differ and so make it another run, with both values."""
    names = []
    for name in sorted({*found, *wanted}):
        if at == "" and name in _MAY_DIFFER:
            continue
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            names += _differences(one, other, f"{at}{name}.")
        elif one != other and f"{at}{name}" != "data.workers":
            names.append(f"{at}{name} ({one} there, {other} here)")
    return names


def _train(
    name: str, config: TrainConfig, folder: str | Path, workdir: Path, mesh: jax.sharding.Mesh
) -> None:
    """Train one stage and write its model into the workdir."""
    stage = build_stage(name, config, folder, workdir, mesh)
    metric_writer = MetricWriter(workdir, config.log, as_json(config))
    subset = _subset(config)

    def measure(stage: Stage) -> dict[str, float]:
        if subset is None:
            return {}
        embedder = stage.embedder()
        found = evaluate_selection(
            subset, lambda items: embedder.encode(items, progress=False), progress=False
        )
        return {"hit@k local": found.mean("local"), "hit@k global": found.mean("global")}

    try:
        run_stage(stage, config, workdir / "checkpoints" / name, metric_writer, measure)
    finally:
        metric_writer.close()
    embedder = stage.embedder()
    embedder.params = multihost.gather_to_host(embedder.params)

    def finish() -> None:
        embedder.save(workdir / name)
        for finished in ("checkpoints", "teacher"):
            shutil.rmtree(workdir / finished / name, ignore_errors=True)

    multihost.on_process_zero(finish)


def _subset(config: TrainConfig) -> Selection | None:
    """Return the queries and candidates to evaluate during training; None for no evaluation."""
    settings, benchmark = config.evaluation, discover(config.data.root)
    if not settings.every_steps or not any(
        found.split == settings.split for found in benchmark.sets
    ):
        return None
    return select(benchmark, settings.split, Subset(settings.max_queries, settings.max_candidates))


def _result(name: str, config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Return the results of a finished stage; measure them first if they are missing."""
    folder = workdir / "results" / name
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    # Every process encodes its part of the items, on its own devices.
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    embedder = Embedder.load(workdir / name, dtype=config.compute.dtype, mesh=mesh)
    evaluation, speed = None, None
    benchmark = discover(config.data.root)
    if any(found.split == config.evaluation.final_split for found in benchmark.sets):
        print(f"Evaluating {name} on {config.evaluation.final_split}", flush=True)
        selection = select(benchmark, config.evaluation.final_split)
        encode = multihost.map_across_processes(
            lambda items: embedder.encode(items, progress=False)
        )
        evaluation = evaluate_selection(selection, encode, progress=multihost.is_process_zero())
        speed = _items_per_second(embedder, selection)
        multihost.on_process_zero(lambda: _write_found(folder, selection, evaluation))
    leaves = named_leaves(embedder.params)
    layers = [leaf.size for leaf_name, leaf in leaves.items() if ".layers." in leaf_name]
    result = {
        "layers": embedder.config.decoder.layers,
        "parameters": sum(leaf.size for leaf in leaves.values()),
        "decoder_parameters": sum(layers),
        "items_per_second": speed,
        "evaluation": None if evaluation is None else evaluation.to_json(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    multihost.on_process_zero(lambda: write_json(path, result))
    return result


def _write_found(folder: Path, selection: Selection, evaluation: Evaluation) -> None:
    """Write the ranked candidates: as TREC run files, and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluation.write_runs(folder)
    render_results(selection, evaluation).save(folder / "retrieved.png")


def _items_per_second(embedder: Embedder, selection: Selection) -> float:
    """Return how many candidates are embedded per second, reading of images included."""
    rows = np.linspace(0, len(selection.dids) - 1, _TIMED_ITEMS).astype(int)
    items = [selection.document(row) for row in rows.tolist()]
    embedder.encode(items, progress=False)  # compiles
    began = time.perf_counter()
    embedder.encode(items, progress=False)
    return len(items) / (time.perf_counter() - began)
