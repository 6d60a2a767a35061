"""Results of an evaluation: numbers, their table, and what they leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from puma_jax.data.lines import FilePath
from puma_jax.data.mbeir import TASKS
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation.metrics import bootstrap_interval
from puma_jax.evaluation.ranking import Run
from puma_jax.schema import Count, CountOrZero, Fraction, check, from_json, shown

Pool = Literal["local", "global"]
POOLS: tuple[Pool, ...] = get_args(Pool)
"""The pool of one set, and the pool of all sets."""

_LETTERS = {"text": "t", "image": "i", "image,text": "it"}


def headline_k(name: str) -> int:
    """Return the k of a set's headline hit rate, as M-BEIR defines it."""
    return 10 if name in ("fashion200k", "fashioniq") else 5


@dataclass(frozen=True)
class LeftOut:
    """Counts of what the numbers of a set leave out, or count as a miss."""

    unjudged_queries: CountOrZero = 0
    """Queries without a relevant judgment, which count as misses."""
    uninstructed_queries: CountOrZero = 0
    """Queries without an instruction, which are embedded without one."""
    missing_documents: CountOrZero = 0
    """Relevant judgments of documents that are in no pool."""
    unused_judgments: CountOrZero = 0
    """Relevant judgments of queries that the set does not have."""
    skipped_queries: CountOrZero = 0
    """Queries that cannot be read."""
    skipped_documents: CountOrZero = 0
    """Documents of the local pool that cannot be read."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check(self)


_LEFT_OUT = {
    "missing_documents": "relevant documents are in no pool",
    "unjudged_queries": "queries have no relevant document and count as misses",
    "uninstructed_queries": "queries have no instruction",
    "unused_judgments": "judgments are of queries that their set does not have",
    "skipped_queries": "queries cannot be read and are left out",
    "skipped_documents": "documents of local pools cannot be read and are left out",
}


@dataclass(frozen=True)
class SetResult:
    """Hit rates of the queries of one dataset and task, between 0 and 1."""

    name: str
    task: int
    queries: Count
    documents: Count
    """Number of documents in the local pool."""
    k: Count
    """The k of the headline hit rate."""
    hits: dict[Pool, dict[int, Fraction]]
    """Hit rate at each k, in each pool."""
    interval: dict[Pool, tuple[Fraction, Fraction]]
    """95 % bootstrap interval of the headline number."""
    wrong_modality: dict[int, Fraction]
    """Fraction of queries with a document of another modality than their task's among the first k
    of the global pool, at each k; k = 1 is always there."""
    left_out: LeftOut = LeftOut()
    runs: dict[Pool, Run] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: A number is out of range, or the number of a table is missing.
        """
        check(self)
        if self.task not in TASKS:
            raise ConfigError(f"task {self.task} is not one of {', '.join(map(str, TASKS))}")
        for name, of_pools in (("hits", self.hits), ("interval", self.interval)):
            if set(of_pools) != set(POOLS):
                raise ConfigError(f"{name} has pools {sorted(of_pools)}, expected local, global")
        for name, rates, k in (
            *((f"hits.{pool}", self.hits[pool], self.k) for pool in POOLS),
            ("wrong_modality", self.wrong_modality, 1),
        ):
            if k not in rates or min(rates) < 1:
                raise ConfigError(f"{name} has k {sorted(rates)}, expected {k} and others above 0")

    @property
    def title(self) -> str:
        """The name of the set in tables, such as "cirr task 7  it → i"."""
        query, document = (_LETTERS[modality] for modality in TASKS[self.task])
        return f"{self.name} task {self.task}  {query} → {document}"


@dataclass(frozen=True)
class Evaluation:
    """Hit rates of a model on a split of a benchmark."""

    split: str
    documents: Count
    """Number of documents in the global pool."""
    sets: tuple[SetResult, ...]
    skipped: CountOrZero = 0
    """Number of records that cannot be read and are left out, in all files."""
    skipped_messages: tuple[str, ...] = ()
    """Messages of the first of them."""
    unused_files: tuple[str, ...] = ()
    """Files of the split that are not used, because their names are not of the layout."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: A number is out of range, or there is no set.
        """
        check(self)
        if not self.sets:
            raise ConfigError("sets is empty, expected at least one")
        titles = [found.title for found in self.sets]
        if len(set(titles)) < len(titles):
            raise ConfigError(f"sets holds one set twice: {', '.join(titles)}")

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

    def notes(self) -> list[str]:
        """Return a line for each kind of thing that the numbers leave out."""
        lines = []
        for name, what in _LEFT_OUT.items():
            counts = {found.title: getattr(found.left_out, name) for found in self.sets}
            where = ", ".join(
                f"{' '.join(title.split()[:3])}: {count:,}"
                for title, count in counts.items()
                if count
            )
            if where:
                lines.append(f"{sum(counts.values()):,} {what} ({where})")
        if self.unused_files:
            lines.append(
                f"{len(self.unused_files):,} files are not used, their names are not of the "
                f"layout: {', '.join(self.unused_files)}"
            )
        if self.skipped:
            lines.append(f"{self.skipped:,} records are skipped, the first of them:")
            lines += [f"  {message}" for message in self.skipped_messages]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return all numbers, without the runs, as JSON values; `from_json` reads them."""
        values = {name: value for name, value in vars(self).items() if name != "sets"}
        return {
            "split": self.split,
            "documents": self.documents,
            "mean": {pool: self.mean(pool) for pool in POOLS},
            "interval": {pool: list(self.interval(pool)) for pool in POOLS},
            "sets": [_to_json(found) for found in self.sets],
            **{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()},
        }

    @classmethod
    def from_json(cls, values: Any) -> Evaluation:
        """Return the evaluation in the values of `to_json`, without runs.

        Raises:
            DataError: The values are not those of an evaluation.
        """
        if not isinstance(values, Mapping) or "sets" not in values:
            raise DataError(f"{shown(values)} is no evaluation: it has no sets")
        numbers = {name: value for name, value in values.items() if name not in _NOT_READ}
        try:
            found = from_json(cls, numbers)
        except ConfigError as error:
            raise DataError(f"this is no evaluation: {error}") from None
        mean = values.get("mean")
        if mean != (computed := {pool: found.mean(pool) for pool in POOLS}) and not (
            isinstance(mean, Mapping)
            and mean.keys() == computed.keys()
            and all(
                isinstance(mean[pool], int | float)
                and math.isclose(mean[pool], computed[pool], abs_tol=1e-9)
                for pool in POOLS
            )
        ):
            raise DataError(f"mean {shown(mean)} is not that of the sets: the file was changed")
        return found

    def write_runs(self, folder: FilePath, tag: str = "puma_jax") -> None:
        """Write a TREC run file for each set and pool; see `Run.write`.

        Raises:
            OSError: A file cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for found in self.sets:
            for pool, run in found.runs.items():
                name = f"mbeir_{found.name}_task{found.task}_{self.split}_{pool}_run.txt"
                run.write(Path(folder) / name, tag)


_NOT_READ = ("model", "benchmark", "reranker", "rerank_top", "mean", "interval")
"""Fields of files of results that say what was evaluated, or follow from the others."""


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
    values["left_out"] = asdict(result.left_out)
    return values
