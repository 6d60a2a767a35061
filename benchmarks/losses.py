"""Compare InfoNCE, MAC-Loss and relative MAC-Loss on the demo over several seeds.

    python benchmarks/losses.py --data.root runs/openmoji --out runs/losses

For each seed, one model is trained, pruned and distilled; the last stage then runs with each loss,
all else equal. Rerun the same command to resume after a kill.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from puma_jax.evaluation.report import POOLS, Evaluation, markdown
from puma_jax.train import load_config
from puma_jax.training.config import LossConfig, TrainConfig
from puma_jax.training.run import run

DEMO = Path(__file__).parents[1] / "configs/openmoji.py"
LOSSES = {
    "InfoNCE": LossConfig(kind="info_nce", temperature=0.03),
    "MAC": LossConfig(kind="mac", temperature=0.03),
    "MAC, relative": LossConfig(kind="mac", temperature=0.03, relative=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data.root", dest="root", type=Path, required=True, help="folder of the demo benchmark"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()

    found: dict[str, list[Evaluation]] = {name: [] for name in LOSSES}
    built = given.out / f"seed-{given.seeds[0]}" / "data" / given.root.resolve().name
    for seed in given.seeds:
        shared = given.out / f"seed-{seed}"
        demo = load_config(DEMO)(given.preset)
        # The vocabulary does not depend on the seed: all runs read the data of the first one.
        data = dataclasses.replace(
            demo.data, root=given.root, built=None if built.is_relative_to(shared) else built
        )
        demo = dataclasses.replace(demo, seed=seed, data=data)
        *before, last = (name for name in demo.stages if name != "full")
        run(with_stages(demo, {name: demo.stages[name] for name in before}), shared)
        for name, loss in LOSSES.items():
            stage = dataclasses.replace(
                demo.stages[last], loss=loss, model=str(shared / before[-1])
            )
            other = dataclasses.replace(demo, data=dataclasses.replace(data, built=built))
            folder = given.out / f"seed-{seed}-{name.replace(', ', '-')}"
            results = run(with_stages(other, {last: stage}), folder)
            found[name].append(Evaluation.from_json(results["stages"][last]["evaluation"]))
        print(table(found), flush=True)


def with_stages(config: TrainConfig, stages: dict) -> TrainConfig:
    """Return the config with other stages, of which only the last is evaluated."""
    evaluation = dataclasses.replace(config.evaluation, final_stages=())
    return dataclasses.replace(config, stages=stages, evaluation=evaluation)


def table(found: dict[str, list[Evaluation]]) -> str:
    """Return a table of means and standard deviations over seeds, in percent."""
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
    return markdown(["loss", "seeds", *columns, "wrong modality first"], rows)


def spread(rates: list) -> str:
    """Return mean ± standard deviation, in percent."""
    deviation = 100 * np.std(rates, ddof=1) if len(rates) > 1 else 0.0
    return f"{100 * np.mean(rates):.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    main()
