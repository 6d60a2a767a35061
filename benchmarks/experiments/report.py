"""Write the tables of an experiment: `python benchmarks/experiments/report.py RUNS NAME`.

RUNS is the `--out` of `run.py`. The numbers go into docs/results/NAME.json, and the tables into
docs/results/NAME.md between two marks; what stands outside of them stays. `python docs/plots.py`
draws the plots. A run that is not finished gives a table of what there is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import Experiment, Question
from experiments import EXPERIMENTS
from paired import Hits, Interval, hits, of_pool, paired_interval
from run import FOUND, RANKS, representatives

from puma_jax.artifacts import write_json, write_text
from puma_jax.cli import exit_on_error
from puma_jax.evaluation.report import POOLS, Pool, markdown
from puma_jax.files import read_json

RESULTS = Path(__file__).parents[2] / "docs/results"
BEGIN, END = "<!-- tables of report.py -->", "<!-- end of tables -->"
NOISE = "noise"
"""End of the names of arms that are another arm, rounded in another order."""
_K = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of all runs, the --out of run.py")
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    given = parser.parse_args()
    content = collect(given.runs / given.experiment, EXPERIMENTS[given.experiment])
    write_json(RESULTS / f"{given.experiment}.json", content)
    path = RESULTS / f"{given.experiment}.md"
    text = path.read_text("utf-8") if path.exists() else f"# {content['title']}\n\n{BEGIN}\n{END}\n"
    write_text(path, with_tables(text, content))
    print(f"The tables are in {path}")


def collect(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Return what is known of an experiment, as JSON values.

    Args:
        folder: Folder of the experiment's runs.
        experiment: Its arms and questions.
    """
    run = read_json(folder / "results.json")
    # As it is on disk: a runner that was stopped has not listed its last arm.
    found = {
        arm.name: {
            str(seed): read_json(path)
            for seed in run["seeds"]
            if (path := folder / f"seed-{seed}" / arm.name / FOUND).exists()
        }
        for arm in experiment.arms
    }
    found = {name: by_seed for name, by_seed in found.items() if by_seed}
    best = representatives(experiment.arms, found, run["seeds"][0])
    labels = {arm.name: arm.label for arm in experiment.arms}
    answers = []
    for question in experiment.questions:
        if question.arm in best and question.other in best | found:
            other = best[question.other].name if question.other in best else question.other
            answers.append(_answer(folder, question, best[question.arm].name, other, found))
    return {
        "title": experiment.title,
        "seeds": run["seeds"],
        "start": run["start"],
        "arms": {
            name: {"label": labels[name], "seeds": by_seed} for name, by_seed in found.items()
        },
        "answers": answers,
    }


def _answer(
    folder: Path, question: Question, arm: str, other: str, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the paired difference of two arms, in each pool, over the seeds that both have."""
    seeds = [seed for seed in found[arm] if seed in found[other]]
    intervals = {}
    for pool in POOLS:
        ours, theirs = (
            [_hits(folder / f"seed-{seed}" / name, pool) for seed in seeds] for name in (arm, other)
        )
        intervals[pool] = vars(paired_interval(ours, theirs))
    return {"question": question.text, "arm": arm, "other": other, **intervals}


def _hits(folder: Path, pool: Pool) -> Hits:
    """Return the hits of a finished arm."""
    with np.load(folder / RANKS) as ranks:
        return hits(of_pool(dict(ranks), pool), _K)


def with_tables(text: str, content: Mapping[str, Any]) -> str:
    """Return a page with the tables between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = f"{_about(content)}\n\n{arms_table(content)}\n\n{answers_table(content)}"
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def _about(content: Mapping[str, Any]) -> str:
    """Return what was measured, and with what."""
    start = content["start"]
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    seeds = ", ".join(map(str, content["seeds"]))
    return (
        f"Seeds {seeds}; {start['device']}; {versions}. Hit@{_K} in percent, mean of the sets. "
        f"TFLOP are those of training an arm, MFLOP those of embedding an item of "
        f"{start['tokens_per_item']:.0f} tokens, both by formula; seconds are the median of a step "
        "on a machine that did other work, too."
    )


def arms_table(content: Mapping[str, Any]) -> str:
    """Return the table of all arms: hit rates, and what they cost."""
    rows = [_arm_row("start", [content["start"]])]
    rows += [
        _arm_row(arm["label"], list(arm["seeds"].values())) for arm in content["arms"].values()
    ]
    header = ["arm", "seeds", "layers", "steps", "local", "global", "wrong modality"]
    return markdown([*header, "TFLOP", "MFLOP/item", "s/step", "memory"], rows)


def _arm_row(label: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    first = runs[0]
    return [
        label,
        str(len(runs)),
        str(first["layers"]),
        str(first["steps"]),
        *(_spread([100 * run["mean"][pool] for run in runs]) for pool in POOLS),
        f"{100 * np.mean([run['wrong_modality'] for run in runs]):.1f}",
        f"{first['training_flops'] / 1e12:.1f}",
        f"{first['embedding_flops'] / 1e6:.1f}",
        f"{np.median([run['seconds_per_step'] for run in runs]):.2f}",
        f"{max(run['peak_memory'] for run in runs) / 2**30:.1f} GiB",
    ]


def _spread(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation over seeds if there are several."""
    deviation = (
        f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{np.std(values, ddof=1):.1f}"
        if len(values) > 1
        else ""
    )
    return f"{np.mean(values):.1f}{deviation}"


def answers_table(content: Mapping[str, Any]) -> str:
    """Return the table of paired differences in points, with their 95 % intervals."""
    answers = [(one, {pool: Interval(**one[pool]) for pool in POOLS}) for one in content["answers"]]
    measured = [each for one, each in answers if one["arm"].endswith(NOISE)]
    noise = {pool: max((abs(each[pool].mean) for each in measured), default=0.0) for pool in POOLS}
    rows = [
        [
            one["question"],
            f"{content['arms'][one['arm']]['label']} − {content['arms'][one['other']]['label']}",
            str(each["local"].seeds),
            *(_points(each[pool], noise[pool]) for pool in POOLS),
        ]
        for one, each in answers
    ]
    table = markdown(["question", "difference", "seeds", *POOLS], rows)
    rounding = ", ".join(f"{100 * noise[pool]:.1f} points in {pool} pools" for pool in POOLS)
    if not measured:
        rounding = "an amount that is not measured yet"
    return (
        f"{table}\n\nDifferences are in points, paired by seed and query, with 95 % intervals; "
        "with one seed, they are of the queries alone. Another order of rounding, of the same arm, "
        f"moves the mean by {rounding}. Bold are differences that both tell apart from nothing."
    )


def _points(interval: Interval, noise: float) -> str:
    """Return a difference in points and its interval, bold if it is told apart from nothing."""
    mean = f"{100 * interval.mean:+.1f}"
    if interval.tells_apart(noise):
        mean = f"**{mean}**"
    return f"{mean} ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


if __name__ == "__main__":
    exit_on_error(main)
