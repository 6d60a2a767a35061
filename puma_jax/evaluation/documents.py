"""Documents of all pools, each id once, in arrays that hold millions of them."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Collection, Iterable
from pathlib import Path

from puma_jax.data.lines import BadRecords, OnBadRecord, RowIndex, located, reject
from puma_jax.data.mbeir import Candidate, content_key, modality_code, parse_candidate
from puma_jax.data.mbeir.documents import Documents
from puma_jax.errors import DataError


class Pools:
    """Documents of all pools, numbered in the order in which they are first read.

    An id names one document, whatever the number of pools and lines that hold it.
    """

    def __init__(self, on_bad_record: OnBadRecord) -> None:
        """Start without documents.

        Args:
            on_bad_record: "error" stops at a bad record, "skip" leaves it out.
        """
        self.on_bad_record = on_bad_record
        self.skipped = BadRecords()
        """The records left out."""
        self.ids = Documents()
        self.files: list[RowIndex[Candidate]] = []
        self.modalities, self.files_of, self.rows_of = array("B"), array("q"), array("q")
        self.contents = array("Q")
        """The `content_key` of each document, its image told by its path."""

    def add(self, path: Path, limit: int | None = None, always: Collection[str] = ()) -> list[int]:
        """Read a pool and return the numbers of its chosen documents.

        Args:
            path: File of the pool.
            limit: Number of documents to choose; None chooses all.
            always: Ids of documents that are chosen in addition.

        Raises:
            DataError: A record is bad and `on_bad_record` is "error", no record is left, or an id
                names another document elsewhere: left out, it would be taken for that one.
        """
        index = RowIndex(path, parse_candidate)
        dids: dict[str, None] = {}
        for row, line in enumerate(index.line_numbers.tolist()):
            try:
                candidate = index[row]
            except DataError as error:
                reject(error, self.on_bad_record, self.skipped)
                continue
            try:
                is_new = self.ids.add(candidate, path, line)
            except DataError as error:
                raise located(error, path, line) from None
            if is_new:
                self.modalities.append(modality_code(candidate.modality))
                self.contents.append(content_key(candidate.text, candidate.image))
                self.files_of.append(len(self.files))
                self.rows_of.append(row)
            dids[candidate.did] = None
        if not dids:
            raise DataError(f"{path} holds no documents")
        self.files.append(index)
        chosen = None if limit is None else {*hash_sample(dids, limit), *always}
        return [self.ids.numbers[did] for did in dids if chosen is None or did in chosen]


def hash_sample(identifiers: Iterable[str], count: int) -> list[str]:
    """Return the `count` ids with the lowest hashes: a sample that does not depend on order."""
    return heapq.nsmallest(count, set(identifiers), key=lambda name: (hash_of(name), name))


def hash_of(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
