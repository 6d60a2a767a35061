"""Documents of all pools, told apart by id and content, and what an id names to each set.

The same id with the same content is one document, whatever the number of pools that hold it. The
same id with another content is another document: sets may number theirs independently.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from pathlib import Path

from puma_jax.data.lines import BadRecords, OnBadRecord, RowIndex, located, reject
from puma_jax.data.mbeir import Candidate, modality_code, parse_candidate
from puma_jax.errors import DataError


class Documents:
    """Documents of all pools, numbered in the order in which they are first read."""

    def __init__(self, on_bad_record: OnBadRecord, skipped: BadRecords) -> None:
        """Start without documents.

        Args:
            on_bad_record: "error" stops at a bad record, "skip" leaves it out.
            skipped: Counts the records left out.
        """
        self.on_bad_record, self.skipped = on_bad_record, skipped
        self.files: list[RowIndex[Candidate]] = []
        self.dids: list[str] = []
        self.modalities, self.files_of, self.rows_of = array("B"), array("q"), array("q")
        self.contents = array("Q")
        """Hashes of text and image. Among ten million documents, the probability of a collision is
        1 in 400,000."""
        self.first: dict[str, int] = {}
        """The first document of each id."""
        self.further: dict[str, list[int]] = {}
        """Other documents of an id, whose contents differ from that of the first."""

    def add(
        self,
        path: Path,
        limit: int | None = None,
        always: Collection[str] = (),
        *,
        one_set: bool = True,
    ) -> list[int]:
        """Read a pool and return the numbers of its chosen documents.

        Args:
            path: File of the pool.
            limit: Number of documents to choose; None chooses all.
            always: Ids of documents that are chosen in addition.
            one_set: Whether the pool is that of one set, where an id names one content.

        Raises:
            DataError: A record is bad, an id of one set names two contents, or no record is left.
        """
        index = RowIndex(path, parse_candidate)
        dids: list[str] = []
        modalities, contents, rows = array("B"), array("Q"), array("q")
        seen: dict[str, int] = {}
        for row in range(len(index)):
            try:
                candidate = index[row]
                content = hash_of(f"{candidate.image or ''}\0{candidate.text or ''}")
                before = seen.setdefault(candidate.did, len(rows)) if one_set else len(rows)
                if before < len(rows) and contents[before] != content:
                    first, line = index.line_numbers[[rows[before], row]].tolist()
                    raise located(
                        DataError(f'did "{candidate.did}" names another document in line {first}'),
                        path,
                        line,
                    )
            except DataError as error:
                reject(error, self.on_bad_record, self.skipped)
                continue
            dids.append(candidate.did)
            modalities.append(modality_code(candidate.modality))
            contents.append(content)
            rows.append(row)
        if not dids:
            raise DataError(f"{path} holds no documents")
        chosen = None if limit is None else {*hash_sample(dids, limit), *always}
        numbers = []
        for did, modality, content, row in zip(dids, modalities, contents, rows, strict=True):
            if chosen is not None and did not in chosen:
                continue
            number = self._number(did, content)
            if number == len(self.dids):
                self.dids.append(did)
                self.modalities.append(modality)
                self.contents.append(content)
                self.files_of.append(len(self.files))
                self.rows_of.append(row)
            numbers.append(number)
        self.files.append(index)
        return numbers

    def of(self, did: str) -> list[int]:
        """Return all documents of an id."""
        return [self.first[did], *self.further.get(did, ())] if did in self.first else []

    def place(self, number: int) -> str:
        """Return the file and line of a document."""
        file, row = self.files[self.files_of[number]], self.rows_of[number]
        return f"{file.path}:{file.line_numbers[row]}"

    def _number(self, did: str, content: int) -> int:
        """Return the number of a document; that of the next one if it is new."""
        for number in self.of(did):
            if self.contents[number] == content:
                return number
        new = len(self.dids)
        if did in self.first:
            self.further.setdefault(did, []).append(new)
        else:
            self.first[did] = new
        return new


class Ids:
    """What an id names to each of several sets.

    It names the document of the set's own pool. If that has none, it names the one of another pool,
    as some positives of OVEN are documents of InfoSeek; but not of a pool in which an id of the set
    names something else, because the two sets number their documents independently.
    """

    def __init__(self, documents: Documents, pools: Sequence[Sequence[int]]) -> None:
        """Find the pools that number their documents independently.

        Args:
            documents: All documents.
            pools: Numbers of the documents of each set's own pool.
        """
        self.documents, self.pools = documents, pools
        self.own = [
            {
                documents.dids[number]: number
                for number in pool
                if documents.dids[number] in documents.further
            }
            for pool in (pools if documents.further else [()] * len(pools))
        ]
        """The ids that name several documents, and the one of each set's pool."""
        self._foreign: list[set[int]] = [set() for _ in pools]
        for (one, ids), (other, others) in combinations(enumerate(self.own), 2):
            if any(others.get(did, number) != number for did, number in ids.items()):
                self._foreign[one].update(pools[other])
                self._foreign[other].update(pools[one])
        for foreign, pool in zip(self._foreign, pools, strict=True):
            foreign.difference_update(pool)

    def resolve(self, number_of_set: int, dids: Iterable[str], source: Path) -> dict[str, int]:
        """Return the document that each id names to a set; ids that name none are left out.

        Args:
            number_of_set: Number of the set.
            dids: Ids.
            source: File that holds the ids, for messages.

        Raises:
            DataError: An id names none of the set's own documents, and several of others.
        """
        own, foreign = self.own[number_of_set], self._foreign[number_of_set]
        found = {}
        for did in dids:
            known = [own[did]] if did in own else self.documents.of(did)
            known = [number for number in known if number not in foreign]
            if len(known) > 1:
                one, other = map(self.documents.place, known[:2])
                raise DataError(
                    f'{source}: did "{did}" is not in the pool of its set and names different '
                    f"documents in others, {one} and {other}: rename one of them"
                )
            if known:
                found[did] = known[0]
        return found


def hash_sample(identifiers: Iterable[str], count: int) -> list[str]:
    """Return the `count` ids with the lowest hashes: a sample that does not depend on order."""
    return heapq.nsmallest(count, set(identifiers), key=lambda name: (hash_of(name), name))


def hash_of(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
