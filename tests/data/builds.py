"""What tests read of built data."""

from __future__ import annotations

from pathlib import Path

from puma_jax.data.examples import Record
from puma_jax.data.store import Store


def queries_of(store: Store) -> list[Record]:
    return [store.query(row) for row in range(len(store.table.query_tokens))]


def candidates_of(store: Store) -> list[Record]:
    return [store.candidate(row) for row in range(len(store.table.candidate_tokens))]


def ids(records: list[Record]) -> list[str]:
    return [record.id for record in records]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def positives(store: Store, row: int) -> list[int]:
    table = store.table
    return table.positive_row[table.positive_start[row] : table.positive_start[row + 1]].tolist()


def negatives(store: Store, row: int) -> list[int]:
    table = store.table
    return table.negative_row[table.negative_start[row] : table.negative_start[row + 1]].tolist()
