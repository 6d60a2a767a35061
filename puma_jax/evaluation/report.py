"""Results of an evaluation: numbers, tables, and run files for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from puma_jax.data.lines import FilePath, write_lines
from puma_jax.data.mbeir import TASKS
from puma_jax.errors import DataError
from puma_jax.evaluation.metrics import bootstrap_interval
from puma_jax.typing import Float, ndarray

Pool = Literal["local", "global"]
POOLS: tuple[Pool, ...] = get_args(Pool)
"""The pool of one set, and the pool of all sets."""

_LETTERS = {"text": "t", "image": "i", "image,text": "it"}


def headline_k(name: str) -> int:
    """Return the k of a set's headline hit rate, as M-BEIR defines it."""
    return 10 if name in ("fashion200k", "fashioniq") else 5


@dataclass(frozen=True)
class Run:
    """Documents that the queries of a set found in a pool, best first."""

    qids: tuple[str, ...]
    dids: ndarray
    """Ids, `[queries, depth]`; None beyond the end of a small pool."""
    scores: Float[ndarray, "queries depth"]

    def write(self, path: FilePath, tag: str = "puma_jax") -> int:
        """Write a run file in TREC format and return its number of lines.

        Here equal scores are in ascending order of ids. Tools that sort a run again may break ties
        differently: trec_eval sorts them by descending id.
        """
        return write_lines(
            path,
            (
                f"{qid} Q0 {did} {rank} {score:.9g} {tag}"
                for qid, dids, scores in zip(
                    self.qids, self.dids.tolist(), self.scores.tolist(), strict=True
                )
                for rank, (did, score) in enumerate(zip(dids, scores, strict=True), 1)
                if did is not None
            ),
        )


@dataclass(frozen=True)
class SetResult:
    """Hit rates of the queries of one dataset and task, between 0 and 1."""

    name: str
    task: int
    queries: int
    documents: int
    """Number of documents in the local pool."""
    k: int
    """The k of the headline hit rate."""
    hits: dict[Pool, dict[int, float]]
    """Hit rate at each k, in each pool."""
    interval: dict[Pool, tuple[float, float]]
    """95 % bootstrap interval of the headline number."""
    wrong_modality: dict[int, float]
    """Fraction of queries with a document of another modality than their task's among the first k
    of the global pool, at each k; k = 1 is always there."""
    runs: dict[Pool, Run] = field(default_factory=dict, repr=False, compare=False)

    @property
    def title(self) -> str:
        """The name of the set in tables.

        >>> SetResult("cirr", 7, 0, 0, 5, {}, {}, {}).title
        'cirr task 7  it → i'
        """
        query, document = (_LETTERS[modality] for modality in TASKS[self.task])
        return f"{self.name} task {self.task}  {query} → {document}"


@dataclass(frozen=True)
class Evaluation:
    """Hit rates of a model on a split of a benchmark."""

    split: str
    documents: int
    """Number of documents in the global pool."""
    sets: tuple[SetResult, ...]

    def mean(self, pool: Pool = "local", k: int | None = None) -> float:
        """Return the plain mean of the sets' hit rates.

        Args:
            pool: Pool that was searched.
            k: The k of the hit rate; None uses the headline k of each set.

        Raises:
            KeyError: The evaluation has no hit rate at this k.
        """
        rates = [found.hits[pool][found.k if k is None else k] for found in self.sets]
        return sum(rates) / len(rates)

    def interval(self, pool: Pool = "local") -> tuple[float, float]:
        """Return the 95 % bootstrap interval of the mean of the headline hit rates."""
        return bootstrap_interval(
            [found.hits[pool][found.k] for found in self.sets],
            [found.queries for found in self.sets],
        )

    def table(self) -> str:
        """Return a markdown table of the headline hit rates in percent.

        The number after ± is half the width of the 95 % interval. The last column is the
        percentage of queries whose first document in the global pool has another modality than the
        task's.
        """
        rows = [
            [
                found.title,
                f"{found.queries:,}",
                f"{found.documents:,}",
                str(found.k),
                *(_rate(found.hits[pool][found.k], found.interval[pool]) for pool in POOLS),
                f"{100 * found.wrong_modality[1]:.1f}",
            ]
            for found in self.sets
        ]
        wrong = sum(found.wrong_modality[1] for found in self.sets) / len(self.sets)
        rows.append(
            [
                f"mean of {len(self.sets)}",
                f"{sum(found.queries for found in self.sets):,}",
                f"{self.documents:,}",
                "",
                *(_rate(self.mean(pool), self.interval(pool)) for pool in POOLS),
                f"{100 * wrong:.1f}",
            ]
        )
        header = ["set", "queries", "pool", "k", "local @k", "global @k", "wrong modality"]
        return markdown(header, rows)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers, without the runs, as JSON values; `from_json` reads them."""
        return {
            "split": self.split,
            "documents": self.documents,
            "mean": {pool: self.mean(pool) for pool in POOLS},
            "interval": {pool: list(self.interval(pool)) for pool in POOLS},
            "sets": [_to_json(found) for found in self.sets],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation in the values of `to_json`, without runs.

        Raises:
            DataError: The values are not those of an evaluation.
        """
        try:
            sets = tuple(_from_json(found) for found in values["sets"])
            return cls(split=values["split"], documents=values["documents"], sets=sets)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"these are not results of an evaluation: {error!r}") from None

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Return the numbers in a results.json, as `python -m puma_jax.evaluate` writes it.

        Raises:
            DataError: The file cannot be read, or holds something else.
        """
        try:
            return cls.from_json(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, DataError) as error:
            raise DataError(f"{path} cannot be read as results.json: {error}") from None

    def write_runs(self, folder: FilePath, tag: str = "puma_jax") -> None:
        """Write a TREC run file for each set and pool; see `Run.write`."""
        for found in self.sets:
            for pool, run in found.runs.items():
                name = f"mbeir_{found.name}_task{found.task}_{self.split}_{pool}_run.txt"
                run.write(Path(folder) / name, tag)


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


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table, the first column aligned left and the others right.

    >>> print(markdown(["set", "hits"], [["cirr", "45.3"]]))
    | set  | hits |
    |------|-----:|
    | cirr | 45.3 |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    first, *others = widths
    rule = f"|{'|'.join(['-' * (first + 2), *('-' * (width + 1) + ':' for width in others)])}|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _rate(rate: float, interval: tuple[float, float]) -> str:
    """Return a rate in percent and half the width of its interval."""
    low, high = interval
    return f"{100 * rate:.1f} ± {50 * (high - low):.1f}"


def _to_json(result: SetResult) -> dict[str, Any]:
    """Return the numbers of a set as JSON values: keys are strings, tuples are lists."""
    values = {name: value for name, value in vars(result).items() if name != "runs"}
    values["hits"] = {
        pool: {str(k): rate for k, rate in rates.items()} for pool, rates in result.hits.items()
    }
    values["interval"] = {pool: list(ends) for pool, ends in result.interval.items()}
    values["wrong_modality"] = {str(k): rate for k, rate in result.wrong_modality.items()}
    return values


def _from_json(values: Mapping[str, Any]) -> SetResult:
    """Return the set in the values of `_to_json`."""
    return SetResult(
        **{name: values[name] for name in ("name", "task", "queries", "documents", "k")},
        hits={pool: {int(k): rate for k, rate in values["hits"][pool].items()} for pool in POOLS},
        interval={pool: tuple(values["interval"][pool]) for pool in POOLS},
        wrong_modality={int(k): rate for k, rate in values["wrong_modality"].items()},
    )
