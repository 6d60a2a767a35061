"""Read files of results, and compare evaluations of several models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from puma_jax.errors import DataError
from puma_jax.evaluation.report import POOLS, Evaluation, markdown
from puma_jax.files import read_json
from puma_jax.schema import shown


def read_evaluations(path: Path) -> dict[str, Evaluation]:
    """Return the evaluations in a file of results, by the names of their stages.

    Args:
        path: The results.json of `puma_jax.evaluate` or a stage's result.json, whose evaluation has
            the name ""; or the results.json of a training run.

    Raises:
        DataError: The file cannot be read, or holds no evaluation.
    """
    values = read_json(path, error=DataError)
    stages = values.get("stages", {"": values})
    if not isinstance(stages, Mapping):
        raise DataError(f"{path}: stages {shown(stages)} is not an object")
    found = {}
    for name, stage in stages.items():
        if isinstance(stage, Mapping) and "sets" not in stage and "evaluation" in stage:
            stage = stage["evaluation"]  # result.json, and the stages of a run
        if stage is None:
            continue
        try:
            found[name] = Evaluation.from_json(stage)
        except DataError as error:
            at = f"stage {name}: " if name else ""
            raise DataError(f"{path} cannot be read as results: {at}{error}") from None
    if not found:
        raise DataError(
            f"{path} holds no evaluation: its run had no queries of the split to evaluate on"
        )
    return found


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation in a file that holds one; see `read_evaluations`.

    Raises:
        DataError: The file cannot be read, or holds none or several.
    """
    found = read_evaluations(path)
    if len(found) > 1:
        raise DataError(
            f"{path} holds the results of stages {', '.join(found)}: give the result.json of one"
        )
    return next(iter(found.values()))


def compare(evaluations: Mapping[str, Evaluation]) -> str:
    """Return a markdown table of the headline hit rates of several models, in percent.

    The means are over the sets that all models were evaluated on.

    Args:
        evaluations: Evaluations by the names of their models.
    """
    found = {
        model: {result.title: result for result in evaluation.sets}
        for model, evaluation in evaluations.items()
    }
    titles = list(dict.fromkeys(title for of_model in found.values() for title in of_model))
    shared = [title for title in titles if all(title in of_model for of_model in found.values())]
    header = ["set", *(f"{model} {pool}" for model in evaluations for pool in POOLS)]

    rows = []
    for title in titles:
        rows.append([title])
        for of_model in found.values():
            result = of_model.get(title)
            rows[-1] += [f"{100 * result.hits[p][result.k]:.1f}" if result else "–" for p in POOLS]
    if shared:
        rows.append([f"mean of {len(shared)}"])
        for evaluation, of_model in zip(evaluations.values(), found.values(), strict=True):
            both = replace(evaluation, sets=tuple(of_model[title] for title in shared))
            rows[-1] += [f"{100 * both.mean(pool):.1f}" for pool in POOLS]
    return markdown(header, rows)


def differing(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Return a line for each set whose queries or pools differ between evaluations.

    Such numbers stand in one row of `compare`, and do not compare models.

    Args:
        evaluations: Evaluations by the names of their models.
    """
    measured: dict[str, dict[str, list[str]]] = {}
    for model, evaluation in evaluations.items():
        for found in evaluation.sets:
            how = (
                f"{found.queries:,} queries of {evaluation.split} in {found.documents:,} of "
                f"{evaluation.documents:,} documents at {found.k}"
            )
            measured.setdefault(found.title, {}).setdefault(how, []).append(model)
    return [
        f"{title} differs in what was measured: "
        + "; ".join(f"{how} ({', '.join(models)})" for how, models in ways.items())
        for title, ways in measured.items()
        if len(ways) > 1
    ]
