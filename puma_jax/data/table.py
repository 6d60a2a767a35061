"""The length table: lengths, sizes, modalities and positives of all training items.

Plans are made from it. It has a few numbers for each query and candidate and is made once when the
data is built. Each column is a `.npy` file, which is checked once and then mapped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from puma_jax.data.lines import FilePath
from puma_jax.errors import DataError
from puma_jax.files import sha256
from puma_jax.typing import AnyArray, Bool, Float, Int, ndarray

_RANGES = {"query_key": (-1, None), "query_task": (0, 8), "candidate_modality": (0, 2)}
"""The lowest and the highest number in a column; in others, the lowest is 0."""
_SCORES = {"positive_score": "positive_row", "negative_score": "negative_row"}
"""Columns of scores, and the documents that they score."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherScores:
    """A teacher's scores of the documents of pairs for their queries; NaN where it has none.

    The arrays are NumPy's on the host and JAX's on devices.
    """

    positive: Float[AnyArray, "pairs"]
    negative: Float[AnyArray, "pairs negatives"]


@dataclass(frozen=True)
class LengthTable:
    """Columns over the rows of the tables of queries and candidates.

    The positives of query `i` are the candidates
    `positive_row[positive_start[i] : positive_start[i + 1]]`, its negatives likewise.
    """

    query_tokens: Int[ndarray, "queries"]
    """Tokens of text and prompt suffix after an instruction."""
    query_plain_tokens: Int[ndarray, "queries"]
    """Tokens of text and prompt suffix without an instruction."""
    query_text_length: Int[ndarray, "queries"]
    """How many of `query_tokens` are text; the rest are the prompt suffix."""
    query_height: Int[ndarray, "queries"]
    """Height of the image file, in pixels; 0 without image."""
    query_width: Int[ndarray, "queries"]
    """Width of the image file, in pixels; 0 without image."""
    query_key: Int[ndarray, "queries"]
    """Index in `Instructions.keys`; -1 for a query without instruction."""
    query_set: Int[ndarray, "queries"]
    """Index in `Instructions.sets`."""
    query_task: Int[ndarray, "queries"]
    """Task id of M-BEIR."""
    candidate_tokens: Int[ndarray, "candidates"]
    """Tokens of text and prompt suffix."""
    candidate_height: Int[ndarray, "candidates"]
    """Height of the image file, in pixels; 0 without image."""
    candidate_width: Int[ndarray, "candidates"]
    """Width of the image file, in pixels; 0 without image."""
    candidate_modality: Int[ndarray, "candidates"]
    """Image 0, text 1, image with text 2."""
    candidate_content: Int[ndarray, "candidates"]
    """Number of the content of each candidate: equal for candidates of equal text and image."""
    positive_start: Int[ndarray, "queries+1"]
    positive_row: Int[ndarray, "positives"]
    negative_start: Int[ndarray, "queries+1"]
    negative_row: Int[ndarray, "negatives"]
    positive_score: Float[ndarray, "positives"] | None = None
    """A teacher's score of each positive for its query; NaN where it has none. None if no document
    of any query has one."""
    negative_score: Float[ndarray, "negatives"] | None = None
    """The same for each negative."""

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the content of the file of each column."""
        for column in dataclasses.fields(self):
            values = getattr(self, column.name)
            if values is not None:
                content = io.BytesIO()
                np.save(content, values)
                yield f"{column.name}.npy", content.getvalue()

    def scores(
        self, positive: Int[ndarray, "n"], negative: Int[ndarray, "n negatives"]
    ) -> TeacherScores | None:
        """Return the scores of positives and negatives; None if no document has any.

        Args:
            positive: A place in `positive_row` for each query.
            negative: Places in `negative_row`; -1 for none.
        """
        if self.positive_score is None or self.negative_score is None:
            return None
        of_negatives = at_places(self.negative_score, negative, np.float32(np.nan))
        return TeacherScores(self.positive_score[positive], of_negatives)

    @classmethod
    def load(cls, folder: FilePath, digests: Mapping[str, str]) -> LengthTable:
        """Open the columns in a folder: mapped from a local folder, read from a bucket.

        Args:
            folder: The folder.
            digests: SHA-256 of each file, by its name.

        Raises:
            DataError: A column is missing or damaged, or columns contradict each other.
        """
        columns = {}
        for column in dataclasses.fields(cls):
            file = f"{column.name}.npy"
            if column.default is None and file not in digests:
                continue
            columns[column.name] = _open_column(epath.Path(folder) / file, digests.get(file))
        try:
            _check_columns(columns)
        except DataError as error:
            raise DataError(f"{folder}: {error}: build the data again") from None
        return cls(**columns)


@dataclass(frozen=True)
class Ragged:
    """Lists of numbers, stored one after the other in one array."""

    start: Int[ndarray, "lists_and_end"]
    """The index in `values` where each list starts; the last entry is where the last list ends."""
    values: Int[ndarray, "values"] | Float[ndarray, "values"]

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def lengths(self) -> Int[ndarray, "lists"]:
        """The number of values in each list."""
        return np.diff(self.start)

    def take(self, lists: Int[ndarray, "taken"]) -> Ragged:
        """Return these lists, in this order."""
        lengths = self.start[lists + 1] - self.start[lists]
        start = _starts(lengths)
        shift = np.repeat(self.start[lists] - start[:-1], lengths)
        return Ragged(start, self.values[shift + np.arange(len(shift))])

    def where(self, keep: Bool[ndarray, "values"]) -> Ragged:
        """Return the lists with only the values that `keep` marks."""
        kept_before = _starts(keep)
        return Ragged(kept_before[self.start], self.values[keep])


def at_places(values: ndarray, places: Int[ndarray, "*shape"], missing: Any) -> ndarray:
    """Return the values at some places; `missing` where the place is -1."""
    return np.where(places >= 0, values[np.maximum(places, 0)], missing)


def _starts(lengths: ndarray) -> Int[ndarray, "lists_and_end"]:
    """Return where lists of these lengths start, and where the last list ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _check_columns(columns: Mapping[str, ndarray]) -> None:
    """Check that columns hold whole numbers in range, and as many as belong together.

    Raises:
        DataError: They do not.
    """
    rows = {"query": len(columns["query_tokens"]), "candidate": len(columns["candidate_tokens"])}
    for name, column in columns.items():
        if name in _SCORES:
            continue
        kind = name.partition("_")[0]
        low, high = _RANGES.get(name, (0, None))
        if column.ndim != 1 or column.dtype.kind not in "iu":
            raise DataError(f"{name} is {column.dtype} {list(column.shape)}, expected integers")
        if kind in rows and len(column) != rows[kind]:
            raise DataError(f"{name} has {len(column)} rows, expected {rows[kind]}")
        if len(column) and (column.min() < low or (high is not None and column.max() > high)):
            raise DataError(
                f"{name} holds {column.min()} to {column.max()}, "
                f"expected {low} to {'any' if high is None else high}"
            )
    for kind in ("positive", "negative"):
        start, row = columns[f"{kind}_start"], columns[f"{kind}_row"]
        if len(start) != rows["query"] + 1 or start[0] != 0 or start[-1] != len(row):
            raise DataError(f"{kind}_start does not divide the {len(row)} of {kind}_row")
        if (start[1:] < start[:-1] + (kind == "positive")).any():
            raise DataError(f"{kind}_start leaves a query without its {kind}s")
        if len(row) and row.max() >= rows["candidate"]:
            raise DataError(f"{kind}_row names row {row.max()} of {rows['candidate']}")
    for name in _SCORES.keys() & columns.keys():
        _check_scores(name, columns[name], columns[_SCORES[name]])
    for kind in ("query", "candidate"):
        if ((columns[f"{kind}_height"] == 0) != (columns[f"{kind}_width"] == 0)).any():
            raise DataError(f"{kind}_height and {kind}_width disagree on what has an image")
    if (columns["query_text_length"] > columns["query_tokens"]).any():
        raise DataError("query_text_length is more than query_tokens")


def _check_scores(name: str, scores: ndarray, rows: ndarray) -> None:
    """Check that there is a score, or NaN, for each row of a list of documents."""
    if scores.dtype != np.float32 or scores.shape != rows.shape:
        raise DataError(
            f"{name} is {scores.dtype} {list(scores.shape)}, expected float32 {list(rows.shape)}"
        )
    if np.isinf(scores).any():
        raise DataError(f"{name} holds an infinite score, expected finite ones")


def _open_column(path: epath.Path, digest: str | None) -> ndarray:
    """Return a column; its file is read once, to be held against its digest."""
    try:
        content = path.read_bytes() if "://" in str(path) else None
        found = sha256(Path(path)) if content is None else hashlib.sha256(content).hexdigest()
        if found != digest:
            raise DataError(f"{path} is damaged, it is not what was built: build the data again")
        return np.load(path, mmap_mode="r") if content is None else np.load(io.BytesIO(content))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: build the data again") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
