"""InfoNCE against MAC-Loss against relative MAC-Loss, on the demo, over several seeds.

    python benchmarks/losses.py --root runs/openmoji --out runs/losses

For each seed one model is trained, cut and distilled; from there the last stage is run with each
loss, all else equal. Run it again after a stop, and it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from puma_jax.retrieval.report import POOLS, Evaluation, markdown
from puma_jax.train import load_config
from puma_jax.training.config import LossConfig, TrainConfig
from puma_jax.training.run import run

DEMO = Path(__file__).parents[1] / "configs/openmoji.py"
LOSSES = {
    "InfoNCE, 0.03": LossConfig(kind="info_nce", temperature=0.03),
    "InfoNCE, 0.018": LossConfig(kind="info_nce", temperature=0.018),
    "MAC": LossConfig(kind="mac", temperature=0.03),
    "MAC, relative": LossConfig(kind="mac", temperature=0.03, relative=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the demo benchmark")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()

    found: dict[str, list[Evaluation]] = {name: [] for name in LOSSES}
    for seed in given.seeds:
        demo = load_config(DEMO)(given.preset)
        demo = dataclasses.replace(
            demo, seed=seed, data=dataclasses.replace(demo.data, root=given.root)
        )
        shared = given.out / f"seed-{seed}"
        before = {name: stage for name, stage in demo.stages.items() if name != "mac"}
        run(with_stages(demo, before, ()), shared)
        for name, loss in LOSSES.items():
            last = dataclasses.replace(
                demo.stages["mac"], loss=loss, model=str(shared / list(before)[-1])
            )
            folder = given.out / f"seed-{seed}-{name.replace(', ', '-').replace('.', '')}"
            results = run(with_stages(demo, {"last": last}, ()), folder)
            found[name].append(Evaluation.from_json(results["stages"]["last"]["evaluation"]))
        print(table(found), flush=True)


def with_stages(config: TrainConfig, stages: dict, measured: tuple[str, ...]) -> TrainConfig:
    """Return the config with other stages; of them, the last one and those named are measured."""
    evaluation = dataclasses.replace(config.evaluation, final_stages=measured)
    return dataclasses.replace(config, stages=stages, evaluation=evaluation)


def table(found: dict[str, list[Evaluation]]) -> str:
    """Return mean and deviation over seeds, in per cent."""
    rows = []
    for name, evaluations in found.items():
        if not evaluations:
            continue
        cells = [name, str(len(evaluations))]
        for pool in POOLS:
            for k in (1, 5):
                cells.append(spread([one.mean(pool, k) for one in evaluations]))
        wrong = [np.mean([one.wrong_modality[1] for one in e.sets]) for e in evaluations]
        rows.append([*cells, spread(wrong)])
    columns = [f"{pool} hit@{k}" for pool in POOLS for k in (1, 5)]
    return markdown(["loss", "seeds", *columns, "wrong kind first"], rows)


def spread(rates: list) -> str:
    """Return mean ± standard deviation, in per cent."""
    deviation = 100 * np.std(rates, ddof=1) if len(rates) > 1 else 0.0
    return f"{100 * np.mean(rates):.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    main()
