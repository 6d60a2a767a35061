"""Training data in M-BEIR layout from a table of text pairs, such as that of stage 1 of PUMA.

`python -m puma_jax.data.text_pairs --table nli_for_simcse.csv --out nli` writes a folder in M-BEIR
layout (task 1, text to text), which is trained on like any other.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from puma_jax import cli
from puma_jax.data.lines import (
    MAX_LINE_BYTES,
    BadRecords,
    FilePath,
    OnBadRecord,
    decode_line,
    located,
    numbered_lines,
    reject,
)
from puma_jax.data.mbeir.files import write_candidates, write_queries
from puma_jax.data.mbeir.records import Candidate, Query
from puma_jax.errors import DataError
from puma_jax.schema import shown

_COLUMNS = ("sent0", "sent1")


def read_text_pairs(
    path: FilePath, *, on_bad_record: OnBadRecord = "error", skipped: BadRecords | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the columns sent0 and sent1 of a CSV file; other columns are ignored.

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
    for number, row in rows:
        pair = [row[place].strip() for place in places if place < len(row)]
        if len(row) != len(header):
            problem = f"{len(row)} columns, but the first row names {len(header)}"
        elif not all(pair):
            problem = f"{_COLUMNS[pair.index('')]} is empty"
        else:
            yield pair[0], pair[1]
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

    The first text of a pair is a query without instruction, the second its positive. The table is
    read twice, so that memory does not grow with it.

    Args:
        table: A CSV file; see `read_text_pairs`.
        out: Folder to write.
        name: Name of the set, and of the dataset in all ids.
        on_bad_record: "error" stops at a bad row, "skip" leaves it out.
        skipped: Counts the bad rows that were skipped.

    Raises:
        DataError: As for `read_text_pairs`, or a file cannot be written.
    """

    def numbered(skipped: BadRecords | None) -> Iterator[tuple[str, str, str]]:
        pairs = read_text_pairs(table, on_bad_record=on_bad_record, skipped=skipped)
        for number, (first, second) in enumerate(pairs, 1):
            yield f"{name}:{number}", first, second

    write_candidates(
        Path(out) / "cand_pool/global/mbeir_union_train_cand_pool.jsonl",
        (Candidate(did, second, None, "text") for did, _, second in numbered(None)),
    )
    return write_queries(
        Path(out) / f"query/train/mbeir_{name}_train.jsonl",
        (
            Query(qid, first, None, "text", positives=(qid,), task=1)
            for qid, first, _ in numbered(skipped)
        ),
    )


def main(table: Path, out: Path, name: str = "pairs", on_bad_record: OnBadRecord = "error") -> None:
    """Write training data in M-BEIR layout from a table of text pairs.

    Args:
        table: A CSV file whose first row names sent0 and sent1 among its columns.
        out: Folder to write.
        name: Name of the set, and of the dataset in all ids.
        on_bad_record: "error" stops at a bad row, "skip" leaves it out and counts it.
    """
    skipped = BadRecords()
    pairs = write_benchmark(table, out, name=name, on_bad_record=on_bad_record, skipped=skipped)
    for message in skipped.messages:
        print(f"skipped {message}")
    print(f"{pairs:,} pairs are in {out}, {skipped.count:,} bad rows were skipped")


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
