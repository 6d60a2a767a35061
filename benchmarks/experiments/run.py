"""Run an experiment: arms × seeds from one start, all else equal.

    python benchmarks/experiments/run.py pruning --seeds 0 1 2 --data.root runs/openmoji \
        --out runs/experiments

Every arm is a run of `puma_jax.training` in a process of its own, so that its peak memory is its
own; `--at-once 6` runs six of them at the same time, for which a large GPU has room. Finished arms
are read, not run again; rerun the same command to resume after a kill. The first seed runs all
arms, further seeds those that are marked for them and the best of each family. `report.py` makes
the tables, and `docs/plots.py` the plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm, Base, Experiment, train_config
from cost import training_flops
from experiments import EXPERIMENTS
from material import ARM, Data, data_of, model_of
from paired import read_ranks

from puma_jax import compilation_cache
from puma_jax.artifacts import write_json
from puma_jax.cli import exit_on_error
from puma_jax.data.plan import Plan
from puma_jax.data.prompts import Processor
from puma_jax.data.store import Store
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.errors import ConfigError
from puma_jax.files import read_json
from puma_jax.model import hf
from puma_jax.model.flops import forward_flops
from puma_jax.training.cache_index import Index
from puma_jax.training.config import TrainConfig
from puma_jax.training.loop import Preempted
from puma_jax.training.run import run
from puma_jax.training.workdir import claim_run, finished_model

FOUND = "found.json"
RANKS = "ranks.npz"
_LOOKED_AT = 8
"""Steps whose items are counted for the cost of a step."""
_SAID = 2
"""Exit status of a run that has printed what a user can mend."""

Train = Callable[[TrainConfig, Path, "Path | None"], None]
"""Runs a config in a workdir, reusing another one, and leaves what `measure` writes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--data.root", dest="root", type=Path, required=True, help="benchmark in M-BEIR layout"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="arms to run at the same time, each on its share of the cores; a large GPU has room "
        "for many. Their seconds and items per second are then not those of one alone (default: 1)",
    )
    given = parser.parse_args()
    if given.at_once < 1:
        parser.error(f"--at-once is {given.at_once}, expected at least 1")
    if given.at_once > 1:
        # A process would take most of the memory of a GPU, and leave none for the others.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run_experiment(
        given.experiment, given.root, given.out, given.seeds, in_process, at_once=given.at_once
    )


def run_experiment(
    name: str,
    root: Path,
    out: Path,
    seeds: Sequence[int],
    train: Train,
    experiments: Mapping[str, Experiment] = EXPERIMENTS,
    at_once: int = 1,
) -> dict[str, Any]:
    """Run what is not finished of an experiment; return the content of its results.json.

    Args:
        name: Name of the experiment.
        root: Benchmark in M-BEIR layout.
        out: Folder of all experiments; those of one base share its run.
        seeds: Seeds of the arms, the first of which tunes.
        train: Runs one config.
        experiments: All experiments.
        at_once: Arms to run at the same time.
    """
    experiment = experiments[name]
    start, built = _start(name, experiment, root, out, train)
    results: dict[str, Any] = {
        "experiment": name,
        "seeds": list(seeds),
        "start": read_json(start.parent / FOUND),
        "arms": {},
    }
    one_at_a_time = threading.Lock()

    def finish(seed: int, arm: Arm, data: Data, earlier: Future | None) -> None:
        of_seed = out / name / f"seed-{seed}"
        if earlier is not None:
            earlier.result()  # its model is what this arm starts from
        with one_at_a_time:
            model = model_of(arm, start, _initial_model(experiment.base, out), of_seed)
        stage = dataclasses.replace(arm.stage, model=str(model.absolute()))
        settings = {**experiment.settings, **arm.settings}
        config = train_config(data.root, {ARM: stage}, seed, built=data.built, settings=settings)
        found = _finished(config, of_seed / arm.name, None, train)
        with one_at_a_time:
            results["arms"].setdefault(arm.name, {})[str(seed)] = found
            results["arms"] = _in_order(results["arms"], experiment.arms, seeds)
            write_json(out / name / "results.json", results)
            print(f"{name}, seed {seed}, {arm.label}: {_summary(found)}", flush=True)

    def finish_all(jobs: Sequence[tuple[int, Arm]]) -> None:
        futures: dict[tuple[int, str], Future] = {}
        shares = _shares_of_cores(at_once)
        with ThreadPoolExecutor(at_once, initializer=lambda: _take(shares.get())) as threads:
            for seed, arm in jobs:
                data = data_of(arm, start, Data(root, built), out / name)
                earlier = futures.get((seed, arm.continues))
                futures[seed, arm.name] = threads.submit(finish, seed, arm, data, earlier)
            try:
                for future in futures.values():
                    future.result()
            finally:
                threads.shutdown(cancel_futures=True)

    first = [(seeds[0], arm) for arm in experiment.arms]
    further = [(seed, arm) for seed in seeds[1:] for arm in experiment.arms if arm.every_seed]
    if any(arm.family for _, arm in further):  # the first seed tunes
        finish_all(first)
        best = representatives(experiment.arms, results["arms"], seeds[0]).values()
        finish_all([(seed, arm) for seed, arm in further if arm in best])
    else:
        finish_all(first + further)
    return results


def _shares_of_cores(count: int) -> queue.SimpleQueue[set[int]]:
    """Return so many sets of cores, one for each job; too few cores are in several of them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for number in range(count):
        one = cores[number % len(cores) :][:1] if cores else []
        shares.put(set(cores[number::count] or one))
    return shares


def _take(cores: set[int]) -> None:
    """Let this thread, and the processes that it starts, use only these cores.

    Arms at the same time are slower if each of them has a thread for every core.
    """
    if cores:
        os.sched_setaffinity(0, cores)


def _in_order(
    found: Mapping[str, Any], arms: Sequence[Arm], seeds: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return what was found by arm and seed, in the order of the experiment."""
    return {
        arm.name: {str(seed): of for seed in seeds if (of := found[arm.name].get(str(seed)))}
        for arm in arms
        if arm.name in found
    }


def representatives(
    arms: Sequence[Arm], found: Mapping[str, Any], first_seed: int
) -> dict[str, Arm]:
    """Return the arm of each family that is best on the validation split at the first seed.

    An arm without a family represents itself, by its name. Arms that are not finished are left out.
    """
    best: dict[str, Arm] = {}
    for arm in arms:
        if str(first_seed) not in found.get(arm.name, {}):
            continue
        family = arm.family or arm.name
        if family not in best or _validation(found, arm, first_seed) > _validation(
            found, best[family], first_seed
        ):
            best[family] = arm
    return best


def _validation(found: Mapping[str, Any], arm: Arm, seed: int) -> float:
    """Return the mean of local and global hit rates that training measured last; 0 if none."""
    curve = found[arm.name][str(seed)]["curve"]
    return float(np.mean(curve[-1][1:])) if curve else 0.0


def _start(
    name: str, experiment: Experiment, root: Path, out: Path, train: Train
) -> tuple[Path, Path]:
    """Return the model that arms start from and the built data; train and build them if missing."""
    base = experiment.base
    folder, stages, scratch = out / base.folder, dict(base.stages), not base.model
    if base.model:
        model = _initial_model(base, out)
        if not model.exists():
            raise ConfigError(
                f"{model} is missing, the model that {name} starts from: run python "
                f"benchmarks/experiments/{base.model}.py --out {model}"
            )
        first, stage = next(iter(stages.items()))
        stages[first] = dataclasses.replace(stage, model=str(model.absolute()))
    settings = experiment.settings
    config = train_config(root, stages, seed=0, scratch=scratch, settings=settings)
    _finished(config, folder, None, train)
    built = next((folder / "data").iterdir())
    stages |= experiment.start
    if experiment.start:
        config = train_config(root, stages, seed=0, scratch=scratch, built=built, settings=settings)
        _finished(config, out / name / "start", folder, train)
        folder = out / name / "start"
    return folder / list(stages)[-1], built


def _initial_model(base: Base, out: Path) -> Path:
    """Return the folder of the model that a base has before its first stage."""
    return out / base.model if base.model else out / base.folder / "base"


def _finished(
    config: TrainConfig, folder: Path, reuse: Path | None, train: Train
) -> dict[str, Any]:
    """Return what a run found; run it first if it is not finished.

    Raises:
        ArtifactError: The folder holds a run with other settings.
    """
    if (folder / FOUND).exists():
        claim_run(folder, config)
    else:
        train(config, folder, reuse)
    return read_json(folder / FOUND)


def in_process(config: TrainConfig, workdir: Path, reuse: Path | None) -> None:
    """Run a config in a new process, whose peak memory is that of this run alone."""
    process = multiprocessing.get_context("spawn").Process(
        target=_measure_or_say_why_not, args=(config, workdir, reuse)
    )
    process.start()
    process.join()
    if process.exitcode == _SAID:
        raise SystemExit(_SAID)
    if process.exitcode:
        raise SystemExit(f"{workdir} is not finished: rerun the same command to resume")


def _measure_or_say_why_not(config: TrainConfig, workdir: Path, reuse: Path | None) -> None:
    """Run a config as `measure` does; print an error that users can cause as one line."""
    exit_on_error(lambda: measure(config, workdir, reuse))


def measure(config: TrainConfig, workdir: Path, reuse: Path | None) -> None:
    """Run a config; write what it found and what it cost into its workdir."""
    compilation_cache.enable()
    try:
        results = run(config, workdir, reuse)
    except Preempted:
        sys.exit(1)
    name = list(config.stages)[-1]
    result = results["stages"][name]
    ranks = read_ranks(
        workdir / "results" / name,
        config.data.root / "qrels" / config.evaluation.final_split,
        config.evaluation.final_split,
    )
    np.savez_compressed(workdir / RANKS, **ranks)
    evaluation = result["evaluation"]
    settings = results["config"]["stages"][name]
    if settings["model"]:  # results are published: they hold no folders of this machine
        settings["model"] = os.path.relpath(settings["model"], workdir)
    found = {
        "versions": results["versions"],
        "device": results["device"],
        "model": finished_model(workdir, name),
        "settings": settings,
        "layers": result["layers"],
        "parameters": result["parameters"],
        "steps": config.stages[name].steps,
        "mean": evaluation["mean"],
        "wrong_modality": float(
            np.mean([of_set["wrong_modality"]["1"] for of_set in evaluation["sets"]])
        ),
        **_cost(config, workdir, name),
        **_curves(workdir / "metrics.jsonl", name),
    }
    write_json(workdir / FOUND, found)


def _cost(config: TrainConfig, workdir: Path, name: str) -> dict[str, float]:
    """Return the operations of training and of embedding an item of the mean size."""
    stage = config.stages[name]
    model = hf.open_checkpoint(workdir / name).config
    before = workdir / (config.stage_before(name) or "base")
    teacher = hf.open_checkpoint(stage.model or before).config
    built = config.data.built or next((workdir / "data").iterdir())
    store = Store.open(built)
    processor = Processor(load_tokenizer(workdir / name), model)
    plan = Plan(store.table, store.instructions, processor.template, stage.plan)
    sizes = [plan.item_sizes(plan.pairs(step)) for step in range(_LOOKED_AT)]
    tokens, patches = (np.concatenate(of_all) for of_all in zip(*sizes, strict=True))
    ours = forward_flops(model, tokens, patches)
    parts = (stage.steps or 0) / _LOOKED_AT  # how often the steps looked at are in the stage
    taught = parts * forward_flops(teacher, tokens, patches).sum()
    if stage.distill.cached:
        sizes_of_all = Index.of(plan, stage.distill.items).sizes(plan)
        taught = forward_flops(teacher, *sizes_of_all).sum()
    return {
        "training_flops": training_flops(parts * ours.sum(), taught, stage),
        "embedding_flops": float(ours.mean()),
        "tokens_per_item": float(tokens.mean()),
    }


def _curves(metrics: Path, name: str) -> dict[str, Any]:
    """Return the curves of a stage, the median seconds of its steps, and its peak memory.

    A stage without steps has no curves, and no costs.
    """
    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    by_step: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, lines):
        if line["stage"] == name:
            by_step.setdefault(line["step"], {}).update(line)
    steps = sorted(by_step.items())
    trained = [line for _, line in steps if "loss" in line]
    return {
        "curve": [
            [step, line["hit@k local"], line["hit@k global"]]
            for step, line in steps
            if "hit@k local" in line
        ],
        "loss": [[line["step"], line["contrastive"]] for line in trained],
        "seconds_per_step": float(np.median([line["seconds"] for line in trained] or [0])),
        "peak_memory": max((line["peak_memory"] for line in trained), default=0),
    }


def _summary(found: Mapping[str, Any]) -> str:
    """Return hit rates and costs in one line."""
    mean = found["mean"]
    return (
        f"local {100 * mean['local']:.1f}, global {100 * mean['global']:.1f}, "
        f"{found['training_flops'] / 1e12:.1f} TFLOP, {found['seconds_per_step']:.2f} s/step, "
        f"{found['peak_memory'] / 2**30:.1f} GiB"
    )


if __name__ == "__main__":
    exit_on_error(main)
