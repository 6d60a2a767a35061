"""A run: stage after stage, each from the model the one before left, and what they are worth.

```
workdir/
  config.json            what is run
  base/                  a model from scratch, before training
  data/                  built training data, for each benchmark
  checkpoints/{stage}/   Orbax; gone when the stage is finished
  teacher/{stage}/       states of its teacher, if they are cached; likewise
  {stage}/               the stage's model: a Hugging Face folder, adapters merged
  results/{stage}/       how it does on the benchmark: numbers, TREC run files, a picture
  metrics.jsonl          and tensorboard/
  profile/{stage}/       traces of some steps, if asked for
  results.json           what all of it came to
```
What exists is finished: the same command goes on with what does not.
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

from puma_jax.data.mbeir import discover
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError
from puma_jax.files import write_json
from puma_jax.model.attention import describe
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.retrieval.evaluation import Evaluation, Subset, evaluate_selection
from puma_jax.retrieval.picture import retrieved
from puma_jax.retrieval.report import compare, markdown
from puma_jax.retrieval.selection import Selection, select
from puma_jax.training.checkpoint import versions
from puma_jax.training.config import TrainConfig
from puma_jax.training.journal import Journal
from puma_jax.training.loop import run_stage
from puma_jax.training.scratch import write_base
from puma_jax.training.stages import Stage, prepare

# What may differ when a run goes on: it changes how, not what.
_HOW = ("mesh", "distributed", "evaluation", "checkpoint", "log")
# Documents that are embedded to see how fast a model is.
_TIMED = 1024


def run(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Run what is not finished of a run; return the content of results.json.

    Raises:
        ConfigError: The workdir holds another run, or the devices do not fit the mesh.
        DataError: A benchmark is no folder in M-BEIR layout.
        TrainingError: The loss left the finite numbers.
        Stopped: The run was asked to stop; the same call goes on.
    """
    began = time.perf_counter()
    mesh = make_mesh(config.mesh)
    # A mistyped folder is found before the workdir is claimed for it.
    for root in (config.data.root, *(stage.root for stage in config.stages.values())):
        if root is not None:
            discover(root)
    fresh = not (workdir / "config.json").exists()
    multihost.once(lambda: _claim(workdir, config))
    device = mesh.devices.flat[0].device_kind
    print(f"Training on {mesh.size} × {device} in {workdir}: {', '.join(config.stages)}")
    print(f"Mesh: {dict(mesh.shape)}, {describe(config.compute)}")
    folder: str | Path = workdir / "base"
    if config.scratch is not None:
        multihost.once(lambda: _make_base(workdir / "base", config))
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
        # Of a run that was resumed no one knows how long it took.
        "seconds": round(time.perf_counter() - began) if fresh else None,
        "stages": results,
    }
    multihost.once(lambda: write_json(workdir / "results.json", content))
    print(summary(content))
    print(f"The model is in {folder}, its results in {workdir / 'results.json'}")
    return content


def summary(results: dict[str, Any]) -> str:
    """Return the tables of results.json: what the models can, and what they cost."""
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
    """Write the model that a run from scratch starts from, if it is not there."""
    if config.scratch is not None and not folder.exists():
        root, images, prompt = config.data.root, config.images, config.prompt
        write_base(folder, config.scratch, root, images, prompt, config.seed)


def _claim(workdir: Path, config: TrainConfig) -> None:
    """Make the folder that of this run, or check that it is."""
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
    """Return the names of the settings that make it another run."""
    names = []
    for name in sorted({*found, *wanted}):
        if at == "" and name in _HOW:
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
    """Run one stage and leave its model in the workdir."""
    stage = prepare(name, config, folder, workdir, mesh)
    journal = Journal(workdir, config.log, as_json(config))
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
        run_stage(stage, config, workdir / "checkpoints" / name, journal, measure)
    finally:
        journal.close()
    embedder = stage.embedder()
    embedder.params = multihost.on_host(embedder.params)

    def finish() -> None:
        embedder.save(workdir / name)
        for needed_no_more in ("checkpoints", "teacher"):
            shutil.rmtree(workdir / needed_no_more / name, ignore_errors=True)

    multihost.once(finish)


def _subset(config: TrainConfig) -> Selection | None:
    """Return what is evaluated while training, if anything is."""
    settings, benchmark = config.evaluation, discover(config.data.root)
    if not settings.every or not any(found.split == settings.split for found in benchmark.sets):
        return None
    return select(benchmark, settings.split, Subset(settings.queries, settings.documents))


def _result(name: str, config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Return what a finished stage is worth, measured if it has not been."""
    folder = workdir / "results" / name
    path = folder / "result.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    # Every process embeds its share, on its own devices.
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    embedder = Embedder.load(workdir / name, dtype=config.compute.dtype, mesh=mesh)
    evaluation, speed = None, None
    benchmark = discover(config.data.root)
    if any(found.split == config.evaluation.final for found in benchmark.sets):
        print(f"Evaluating {name} on {config.evaluation.final}", flush=True)
        selection = select(benchmark, config.evaluation.final)
        encode = multihost.spread(lambda items: embedder.encode(items, progress=False))
        evaluation = evaluate_selection(selection, encode, progress=multihost.is_first())
        speed = _items_per_second(embedder, selection)
        multihost.once(lambda: _write_found(folder, selection, evaluation))
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
    multihost.once(lambda: write_json(path, result))
    return result


def _write_found(folder: Path, selection: Selection, evaluation: Evaluation) -> None:
    """Write what queries found: for other tools, and for eyes."""
    folder.mkdir(parents=True, exist_ok=True)
    evaluation.write_runs(folder)
    retrieved(selection, evaluation).save(folder / "retrieved.png")


def _items_per_second(embedder: Embedder, selection: Selection) -> float:
    """Return how many documents are embedded in a second, images read and decoded."""
    rows = np.linspace(0, len(selection.dids) - 1, _TIMED).astype(int)
    items = [selection.document(row) for row in rows.tolist()]
    embedder.encode(items, progress=False)  # compiles
    began = time.perf_counter()
    embedder.encode(items, progress=False)
    return len(items) / (time.perf_counter() - began)
