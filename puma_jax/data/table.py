"""The length table: lengths, sizes, modalities and positives of all training items.

Plans are made from it. It has a few numbers for each query and candidate and is made once when the
data is built. Each column is a `.npy` file that is mapped, not read, so millions of rows open
instantly.
"""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from puma_jax.data.lines import FilePath
from puma_jax.errors import DataError
from puma_jax.typing import Bool, Int, ndarray


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
    positive_start: Int[ndarray, "queries+1"]
    positive_row: Int[ndarray, "positives"]
    negative_start: Int[ndarray, "queries+1"]
    negative_row: Int[ndarray, "negatives"]

    def save(self, folder: FilePath) -> None:
        """Write the columns to a local folder, which appears complete and replaces an older one."""
        folder = Path(folder)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for column in dataclasses.fields(self):
            np.save(partial / f"{column.name}.npy", getattr(self, column.name))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    @classmethod
    def load(cls, folder: FilePath) -> LengthTable:
        """Open the columns in a folder: mapped from a local folder, read from a bucket.

        Raises:
            DataError: A column is missing or damaged.
        """
        return cls(
            **{
                column.name: _open_column(epath.Path(folder) / f"{column.name}.npy")
                for column in dataclasses.fields(cls)
            }
        )


@dataclass(frozen=True)
class Ragged:
    """Lists of integers, stored one after the other in one array."""

    start: Int[ndarray, "lists_and_end"]
    """The index in `values` where each list starts; the last entry is where the last list ends."""
    values: Int[ndarray, "values"]

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def lengths(self) -> Int[ndarray, "lists"]:
        """The number of values in each list."""
        return np.diff(self.start)

    def take(self, lists: Int[ndarray, "taken"]) -> Ragged:
        """Return these lists, in this order."""
        lengths = self.lengths[lists]
        start = _starts(lengths)
        shift = np.repeat(self.start[lists] - start[:-1], lengths)
        return Ragged(start, self.values[shift + np.arange(len(shift))])

    def where(self, keep: Bool[ndarray, "values"]) -> Ragged:
        """Return the lists with only the values that `keep` marks."""
        kept_before = _starts(keep)
        return Ragged(kept_before[self.start], self.values[keep])


def _starts(lengths: ndarray) -> Int[ndarray, "lists_and_end"]:
    """Return where lists of these lengths start, and where the last list ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _open_column(path: epath.Path) -> ndarray:
    try:
        if "://" in str(path):
            return np.load(io.BytesIO(path.read_bytes()))
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: build the data again") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
