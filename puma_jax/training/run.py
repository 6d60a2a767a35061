"""A training run: its stages in order, each from the model of the one before, and their results.

```
workdir/
  config.json            config of the run
  base/                  base model of a run from scratch, before training
  data/                  built training data of each benchmark
  stages/{stage}/        what the stage is of: its settings, its base model, its data
  checkpoints/{stage}/   Orbax checkpoints, deleted when the stage is finished, unless
                         checkpoint.keep_finished is set
  teacher/{stage}/       cached states of the teacher, deleted likewise
  {stage}/               model of the stage: a Hugging Face folder, adapters merged; and in
    adapter/             the adapters alone, for PEFT, if nothing else was trained
  results/{stage}/       results on the benchmark: numbers, TREC run files, a page with pictures
  metrics.jsonl          metrics of steps and evaluations; with tensorboard/ beside it
  report.html            tables, learning curves, and links to the pages of the stages
  profile/{stage}/       profile of some steps, if requested
  results.json           results of all stages
```
A model or a result that exists is finished: the same command resumes with the next one.
"""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Any

import jax

from puma_jax.artifacts import atomic_folder, lock, write_json
from puma_jax.data.mbeir import discover
from puma_jax.data.pipeline import Loader
from puma_jax.data.prompts import Processor, prompt_fingerprint
from puma_jax.data.store import Store
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.embedder import Embedder
from puma_jax.evaluation.encoding import ItemEncoder
from puma_jax.evaluation.evaluation import Subset, evaluate_selection
from puma_jax.evaluation.selection import select
from puma_jax.files import sha256_of
from puma_jax.model import hf
from puma_jax.model.attention import describe
from puma_jax.model.peft import open_adapted
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import make_mesh
from puma_jax.training.adapter import write_adapter
from puma_jax.training.checkpoint import versions
from puma_jax.training.checks import check_run
from puma_jax.training.config import TrainConfig
from puma_jax.training.loop import Measure, run_stage
from puma_jax.training.metric_writer import MetricWriter
from puma_jax.training.results import stage_result, summary, write_report
from puma_jax.training.scratch import write_base
from puma_jax.training.stages import (
    Stage,
    build_stage,
    kept_layers,
    open_data,
    open_store,
    with_inputs,
)
from puma_jax.training.workdir import (
    CONFIG_FILE,
    as_json,
    claim_run,
    claim_stage,
    finish_stage,
    reuse_stage,
    stage_job,
)


def run(config: TrainConfig, workdir: Path, reuse: Path | None = None) -> dict[str, Any]:
    """Run the stages that are not finished; return the content of results.json.

    Args:
        config: Config of the run.
        workdir: Folder of the run.
        reuse: Workdir of another run: stages that are finished there, with the same settings, base
            model and data, are copied and not trained again.

    Raises:
        ArtifactError: The workdir holds another run, is written by another process, or cannot be
            written.
        ConfigError: Settings do not fit together, the data, the models or the devices.
        DataError: A benchmark is not a folder in M-BEIR layout, or has nothing to train on.
        TrainingError: The loss or the gradient norm is not finite.
        Preempted: The run was asked to stop; the same call resumes it.
    """
    began = time.perf_counter()
    mesh = make_mesh(config.mesh)
    multihost.process_slice(mesh)  # an error if this process reads no contiguous part of a batch
    device = f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
    about = (
        f"Training on {device} in {workdir}: {', '.join(config.stages)}\n"
        f"Mesh: {dict(mesh.shape)}, {describe(config.compute)}"
    )
    multihost.on_process_zero(lambda: check_run(config, workdir, mesh, reuse))
    fresh = not (workdir / CONFIG_FILE).exists()
    with contextlib.ExitStack() as stack:
        multihost.on_process_zero(lambda: stack.enter_context(lock(workdir)))
        multihost.on_process_zero(lambda: claim_run(workdir, config))
        print(about)
        folder = _run_stages(config, workdir, mesh, reuse)
        content = {
            "config": as_json(config),
            "versions": versions(),
            "device": device,
            # Unknown for a resumed run.
            "seconds": round(time.perf_counter() - began) if fresh else None,
            "stages": {
                name: stage_result(name, config, workdir)
                for name in config.stages
                if name in (*config.evaluation.final_stages, list(config.stages)[-1])
            },
        }
        multihost.on_process_zero(lambda: write_json(workdir / "results.json", content))
        multihost.on_process_zero(lambda: write_report(workdir, content))
    print(summary(content))
    print(f"The model is in {folder}, its results in {workdir / 'results.json'}")
    print(f"To see what it finds, open {workdir / 'report.html'} in a browser")
    return content


def _run_stages(
    config: TrainConfig, workdir: Path, mesh: jax.sharding.Mesh, reuse: Path | None
) -> Path:
    """Run the stages that are not finished; return the folder of the last one's model."""
    multihost.on_process_zero(lambda: _make_base(workdir / "base", config))
    data = _open_data(config, workdir, mesh)
    for name, stage in config.stages.items():
        if not (workdir / name).exists():
            folder = stage.model or workdir / (config.stage_before(name) or "base")
            _run_stage(name, config, folder, data.get(name), workdir, mesh, reuse)
        keep = config.checkpoint.keep_finished
        finish = functools.partial(finish_stage, workdir, name, keep_checkpoints=keep)
        multihost.on_process_zero(finish)
    return workdir / name


def _make_base(folder: Path, config: TrainConfig) -> None:
    """Write the base model of a run from scratch, if it is missing."""
    if config.scratch is not None and not folder.exists():
        data, images, prompt = config.data, config.images, config.prompt
        write_base(
            folder, config.scratch, data.root, images, prompt, config.seed, data.on_bad_record
        )


def _open_data(
    config: TrainConfig, workdir: Path, mesh: jax.sharding.Mesh
) -> dict[str, tuple[Loader, int]]:
    """Return the loader and the number of steps of every stage that is still to be trained.

    All data are built before the first step, so that none fails after days of training.
    """
    stores: dict[str, Store] = {}
    found = {}
    folders: dict[str | None, Path] = {None: workdir / "base"}
    for name, stage in config.stages.items():
        folder = folders[config.stage_before(name)]
        if stage.model is not None:
            folder = hf.open_checkpoint(stage.model).folder
        folders[name] = folder
        if not stage.trains or (workdir / name).exists():
            continue
        # The ids of special tokens are those of this tokenizer, which a run from scratch trains.
        model = with_inputs(hf.open_checkpoint(folder).config, config)
        processor = Processor(load_tokenizer(folder), model)
        root = stage.data_root or config.data.root
        key = sha256_of([str(root), prompt_fingerprint(processor)])
        if key not in stores:
            stores[key] = open_store(config, root, processor, workdir)
        found[name] = open_data(name, config, processor, stores[key], mesh)
    return found


def _run_stage(
    name: str,
    config: TrainConfig,
    folder: str | Path,
    data: tuple[Loader, int] | None,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    reuse: Path | None,
) -> None:
    """Train one stage, or take it from another run, and write its model into the workdir."""
    checkpoint, adapter = open_adapted(folder, config.stages[name].adapter)
    store = None if data is None else data[0].store
    job = multihost.from_process_zero(
        lambda: stage_job(
            name, config, checkpoint.folder, None if adapter is None else adapter.folder, store
        )
    )
    begun = (workdir / "stages" / name).exists()
    multihost.on_process_zero(lambda: claim_stage(workdir, name, job))
    if reuse is not None and not begun:
        reason = multihost.from_process_zero(lambda: reuse_stage(reuse, workdir, name, job))
        if reason is None:
            print(f"{name}: taken from {reuse}, where it is finished", flush=True)
            return
        print(f"{name}: not taken from {reuse}: {reason}", flush=True)
    if data is None:
        print(f"{name}: trains nothing (no steps, no epochs), only keeps layers", flush=True)
        stage, embedder = None, _pruned(name, config, checkpoint)
    else:
        stage = build_stage(name, config, checkpoint, data, job, workdir, mesh, adapter)
        metric_writer = MetricWriter(workdir, config.log, as_json(config))
        try:
            checkpoints = workdir / "checkpoints" / name
            run_stage(stage, config, checkpoints, metric_writer, _measure(config))
        finally:
            metric_writer.close()
        embedder = stage.embedder()
        embedder.params = multihost.gather_to_host(embedder.params)
    _save(workdir / name, embedder, stage, str(folder))


def _save(folder: Path, embedder: Embedder, stage: Stage | None, base: str) -> None:
    """Write the model of a stage, and its adapters for PEFT if it trained nothing else."""
    adapters = {} if stage is None else multihost.gather_to_host(stage.adapters())

    def write() -> None:
        with atomic_folder(folder) as partial:
            embedder.save(partial)
            if stage is not None and adapters:
                write_adapter(partial / "adapter", stage.model, adapters, stage.config, base)

    multihost.on_process_zero(write)


def _pruned(name: str, config: TrainConfig, checkpoint: hf.Checkpoint) -> Embedder:
    """Return the model of a stage that trains nothing, in the dtype of its files."""
    base = with_inputs(checkpoint.config, config)
    stage = config.stages[name]
    embedder = Embedder.load(
        checkpoint.folder,
        dtype=None,
        images=base.images,
        prompt=base.prompt,
        adapter=stage.adapter,
    )
    return embedder.keep_layers(kept_layers(stage, base.decoder.layers))


def _measure(config: TrainConfig) -> Measure:
    """Return the function that evaluates a stage on a subset while it trains."""
    settings = config.evaluation
    limits = Subset(settings.max_queries, settings.max_candidates)
    # Selected before the first step, so that a bad record does not stop training later.
    subset, skip = None, config.data.on_bad_record
    if settings.every_steps:
        benchmark = discover(config.data.root)
        subset = select(benchmark, settings.split, limits, on_bad_record=skip)

    def measure(stage: Stage) -> dict[str, float]:
        assert subset is not None
        encode = ItemEncoder(stage.embedder(), shared=False)
        found = evaluate_selection(subset, encode, on_bad_record=skip, progress=False)
        return {"hit@k local": found.mean("local"), "hit@k global": found.mean("global")}

    return measure
