import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puma_jax.data.table import LengthTable, Ragged
from puma_jax.errors import DataError


def ragged(lists):
    start = np.cumsum([0, *map(len, lists)])
    return Ragged(start, np.array([value for values in lists for value in values], np.int64))


def lists_of(given_ragged):
    return [
        given_ragged.values[start:end].tolist()
        for start, end in zip(given_ragged.start[:-1], given_ragged.start[1:], strict=True)
    ]


def table(queries=3, candidates=2):
    """A table of numbers that tell its columns and rows apart."""
    starts = np.arange(queries + 1, dtype=np.int64)
    columns = {}
    for number, field in enumerate(dataclasses.fields(LengthTable)):
        rows = candidates if field.name.startswith("candidate") else queries
        columns[field.name] = 10 * number + np.arange(rows, dtype=np.int32)
    nothing = {"negative_start": 0 * starts, "negative_row": np.zeros(0, np.int64)}
    return LengthTable(**columns | {"positive_start": starts} | nothing)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.randoms())
def test_lists_are_taken_and_thinned_out_as_lists_of_python_are(lists, random):
    chosen = [random.randrange(len(lists)) for _ in range(4)] if lists else []
    taken = ragged(lists).take(np.array(chosen, np.int64))
    assert lists_of(taken) == [lists[at] for at in chosen]
    assert taken.lengths.tolist() == [len(lists[at]) for at in chosen]
    assert len(taken) == len(chosen)
    even = ragged(lists).where(ragged(lists).values % 2 == 0)
    assert lists_of(even) == [[value for value in values if value % 2 == 0] for values in lists]


def test_a_table_comes_back_mapped_and_as_it_was(tmp_path):
    for rows in (3, 4):  # a second table takes the place of the first
        table(rows).save(tmp_path / "table")
        loaded = LengthTable.load(tmp_path / "table")
        for field in dataclasses.fields(LengthTable):
            column = getattr(loaded, field.name)
            assert isinstance(column, np.memmap)
            np.testing.assert_array_equal(column, getattr(table(rows), field.name))
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_a_column_that_is_missing_or_damaged_is_named(tmp_path):
    table().save(tmp_path)
    (tmp_path / "query_task.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"query_task.npy cannot be read"):
        LengthTable.load(tmp_path)
    (tmp_path / "query_task.npy").unlink()
    with pytest.raises(DataError, match=r"query_task.npy is missing: build the data again"):
        LengthTable.load(tmp_path)
