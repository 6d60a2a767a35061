"""Training data in M-BEIR layout from a table of text pairs, such as that of stage 1 of PUMA.

`python -m puma_jax.data.text_pairs --table nli_for_simcse.csv --out nli` writes a folder in M-BEIR
layout (task 1, text to text), which is trained on like any other.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from puma_jax import artifacts, cli
from puma_jax.data.lines import (
    MAX_LINE_BYTES,
    BadRecords,
    FilePath,
    OnBadRecord,
    decode_line,
    located,
    numbered_lines,
    reading,
    reject,
)
from puma_jax.data.mbeir.files import write_candidates, write_queries
from puma_jax.data.mbeir.records import Candidate, Query
from puma_jax.data.texts import is_blank
from puma_jax.errors import ConfigError, DataError
from puma_jax.files import Digest, read_object
from puma_jax.schema import CountOrZero, shown

_COLUMNS = ("sent0", "sent1")
_NEGATIVE = "hard_neg"
_MANIFEST = "text_pairs.json"
"""Says that a folder was written from a table of pairs, and which."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class _Manifest:
    name: str
    table: str
    """SHA-256 of the table."""
    on_bad_record: OnBadRecord
    pairs: CountOrZero
    skipped: CountOrZero
    messages: list[str]
    negatives: CountOrZero
    """Pairs with a hard negative."""


class TextPair(NamedTuple):
    """A query, its answer, and a text that is none although it looks like one."""

    query: str
    positive: str
    negative: str | None


def read_text_pairs(
    path: FilePath, *, on_bad_record: OnBadRecord = "error", skipped: BadRecords | None = None
) -> Iterator[TextPair]:
    """Yield the columns sent0, sent1 and, where it has one, hard_neg of a CSV file.

    Other columns are ignored. A hard negative may be empty.

    Args:
        path: The file. Its first row names the columns.
        on_bad_record: "error" stops at a bad row, "skip" leaves it out.
        skipped: Counts the bad rows that were skipped.

    Raises:
        DataError: The file cannot be read, a column is missing from its first row, or a row is
            bad and `on_bad_record` is "error".
    """
    rows = _numbered_rows(path, on_bad_record, skipped)
    number, header = next(rows, (1, []))
    for column in _COLUMNS:
        if column not in header:
            names = ", ".join(map(shown, header)) or "none"
            raise located(DataError(f"no column {column}; columns are {names}"), path, number)
    places = [header.index(column) for column in _COLUMNS]
    place_of_negative = header.index(_NEGATIVE) if _NEGATIVE in header else None
    for number, row in rows:
        pair = [row[place].strip() for place in places if place < len(row)]
        if len(row) != len(header):
            problem = f"{len(row)} columns, but the first row names {len(header)}"
        elif any(map(is_blank, pair)):
            problem = f"{_COLUMNS[[*map(is_blank, pair)].index(True)]} is empty"
        else:
            negative = None if place_of_negative is None else row[place_of_negative].strip()
            kept = None if negative is None or is_blank(negative) else negative
            yield TextPair(pair[0], pair[1], kept)
            continue
        reject(located(DataError(problem), path, number), on_bad_record, skipped)


def write_benchmark(
    table: FilePath,
    out: FilePath,
    *,
    name: str = "pairs",
    on_bad_record: OnBadRecord = "error",
    skipped: BadRecords | None = None,
) -> int:
    """Write the pairs of a table as training data in M-BEIR layout; return their number.

    The first text of a pair is a query without instruction, the second its positive, and a hard
    negative its negative. The table is read twice, so that memory does not grow with it. A folder
    that was written from the same table is left as it is.

    Args:
        table: A CSV file; see `read_text_pairs`.
        out: Folder to write: empty, missing, or written by this function with the same arguments.
        name: Name of the set, and of the dataset in all ids.
        on_bad_record: "error" stops at a bad row, "skip" leaves it out.
        skipped: Counts the bad rows that were skipped.

    Raises:
        ConfigError: The name cannot be part of a file name and of an id.
        ArtifactError: The folder holds something else, or cannot be written.
        DataError: As for `read_text_pairs`.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {shown(name)} must be letters, digits, _, . and -, at most 100, "
            "the first of them a letter or digit"
        )
    skipped = skipped if skipped is not None else BadRecords()
    out, table = Path(out), Path(table)
    with reading(table):
        digest = Digest.of(table)
    job = {"name": name, "table": digest.sha256, "on_bad_record": on_bad_record}
    if (out / _MANIFEST).exists():
        results = ("pairs", "skipped", "messages", "negatives")
        artifacts.claim(out, _MANIFEST, job, what="text pairs", may_differ=results)
        found = read_object(out / _MANIFEST, _Manifest)
        skipped.count, skipped.messages = found.skipped, found.messages
        return found.pairs

    def numbered(skipped: BadRecords | None) -> Iterator[tuple[str, str, TextPair]]:
        """Yield the pairs, each with its id and that of its negative."""
        pairs = read_text_pairs(table, on_bad_record=on_bad_record, skipped=skipped)
        for number, pair in enumerate(pairs, 1):
            yield f"{name}:{number}", f"{name}:{number}-negative", pair

    def documents() -> Iterator[Candidate]:
        for did, negative, pair in numbered(None):
            yield Candidate(did, pair.positive, None, "text")
            if pair.negative is not None:
                yield Candidate(negative, pair.negative, None, "text")

    def queries(count: Counter[str]) -> Iterator[Query]:
        for qid, negative, pair in numbered(skipped):
            negatives = () if pair.negative is None else (negative,)
            count["negatives"] += len(negatives)
            yield Query(
                qid, pair.query, None, "text", positives=(qid,), task=1, negatives=negatives
            )

    count: Counter[str] = Counter(negatives=0)
    with artifacts.atomic_folder(out) as partial:
        write_candidates(
            partial / "cand_pool/global/mbeir_union_train_cand_pool.jsonl",
            documents(),
        )
        pairs = write_queries(
            partial / f"query/train/mbeir_{name}_train.jsonl",
            queries(count),
        )
        with reading(table):
            if Digest.of(table, digest) != digest:
                raise DataError(f"{table} changed while it was read: run the same command again")
        result = {"pairs": pairs, "skipped": skipped.count, "messages": skipped.messages, **count}
        artifacts.write_json(partial / _MANIFEST, {**job, **result})
    return pairs


def main(table: Path, out: Path, name: str = "pairs", on_bad_record: OnBadRecord = "error") -> None:
    """Write training data in M-BEIR layout from a table of text pairs.

    Args:
        table: A CSV file whose first row names sent0 and sent1 among its columns, and hard_neg if
            pairs have hard negatives.
        out: Folder to write: empty, missing, or written from the same table before.
        name: Name of the set, and of the dataset in all ids.
        on_bad_record: "error" stops at a bad row, "skip" leaves it out and counts it.
    """
    skipped = BadRecords()
    pairs = write_benchmark(table, out, name=name, on_bad_record=on_bad_record, skipped=skipped)
    for message in skipped.messages:
        print(f"skipped {message}")
    negatives = read_object(out / _MANIFEST, _Manifest).negatives
    print(
        f"{pairs:,} pairs are in {out}, {negatives:,} of them with a hard negative; "
        f"{skipped.count:,} bad rows were skipped"
    )


def _numbered_rows(
    path: FilePath, on_bad_record: OnBadRecord, skipped: BadRecords | None
) -> Iterator[tuple[int, list[str]]]:
    """Yield all rows but blank ones, each with the number of its last line."""
    # The limit is that of the whole process, 128 KiB by default.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    rows = csv.reader(_text_lines(path, on_bad_record, skipped), strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            reject(located(error, path, rows.line_num), on_bad_record, skipped)
            continue
        if row is None:
            return
        if row:
            yield rows.line_num, row


def _text_lines(
    path: FilePath, on_bad_record: OnBadRecord, skipped: BadRecords | None
) -> Iterator[str]:
    """Yield every line as text; a skipped bad line is a blank one, so that numbers stay right."""
    for line in numbered_lines(path):
        try:
            text = decode_line(line.content)
        except DataError as error:
            reject(located(error, path, line.number), on_bad_record, skipped)
            text = "\n"
        yield text


if __name__ == "__main__":
    cli.run(main)
