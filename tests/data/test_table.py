import dataclasses
import hashlib

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
    """A table of numbers that tell most of its columns and rows apart."""
    starts = np.arange(queries + 1, dtype=np.int64)
    columns = {}
    for number, field in enumerate(dataclasses.fields(LengthTable)):
        rows = candidates if field.name.startswith("candidate") else queries
        columns[field.name] = 10 * (20 - number) + np.arange(rows, dtype=np.int32)
    small = {"query_task": np.arange(queries) % 3, "candidate_modality": np.arange(candidates) % 3}
    lists = {
        "positive_start": starts,
        "positive_row": np.arange(queries) % candidates,
        "negative_start": 0 * starts,
        "negative_row": np.zeros(0, np.int64),
        "positive_score": np.array([0.5, np.nan, -2.0], np.float32)[:queries],
        "negative_score": np.zeros(0, np.float32),
    }
    return LengthTable(**columns | small | lists)


def save(some_table, folder):
    """Write a table, and return the digests of its files."""
    folder.mkdir(exist_ok=True)
    digests = {}
    for name, content in some_table.files():
        (folder / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


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
    loaded = LengthTable.load(tmp_path, save(table(), tmp_path))
    for field in dataclasses.fields(LengthTable):
        column = getattr(loaded, field.name)
        assert isinstance(column, np.memmap)
        np.testing.assert_array_equal(column, getattr(table(), field.name))
        # Others read a column as what it is, a file of NumPy's.
        np.testing.assert_array_equal(np.load(tmp_path / f"{field.name}.npy"), column)


def test_a_table_without_scores_has_no_files_of_them(tmp_path):
    plain = dataclasses.replace(table(), positive_score=None, negative_score=None)
    digests = save(plain, tmp_path)
    assert not [name for name in digests if "score" in name]
    loaded = LengthTable.load(tmp_path, digests)
    assert loaded.positive_score is None
    assert loaded.scores(np.array([0]), np.array([[-1]])) is None


def test_a_column_that_is_missing_or_damaged_is_named(tmp_path):
    digests = save(table(), tmp_path)
    path = tmp_path / "query_task.npy"
    whole = path.read_bytes()
    for at in range(len(whole)):  # one bit of every byte
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"query_task.npy is damaged, it is not what was built"):
            LengthTable.load(tmp_path, digests)
    path.unlink()
    with pytest.raises(DataError, match=r"query_task.npy is missing: build the data again"):
        LengthTable.load(tmp_path, digests)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("query_width", [0, 1], r"query_width has 2 rows, expected 3"),
        ("query_width", [0, 1, 1], "query_height and query_width disagree on what has an image"),
        ("query_tokens", [4.0, 4.0, 4.0], r"query_tokens is float64 \[3\], expected integers"),
        ("query_tokens", [[1, 2, 3]] * 3, r"query_tokens is int64 \[3, 3\], expected integers"),
        ("query_tokens", [400, 2, 400], "query_text_length is more than query_tokens"),
        ("query_key", [-2, 0, 0], "query_key holds -2 to 0, expected -1 to any"),
        ("query_set", [-1, 0, 0], "query_set holds -1 to 0, expected 0 to any"),
        ("candidate_modality", [0, 3], "candidate_modality holds 0 to 3, expected 0 to 2"),
        ("candidate_content", [0], "candidate_content has 1 rows, expected 2"),
        ("positive_start", [0, 1, 1, 3], "positive_start leaves a query without its positives"),
        ("positive_start", [0, 1, 2], "positive_start does not divide the 3 of positive_row"),
        ("positive_row", [0, 1, 2], "positive_row names row 2 of 2"),
        ("negative_start", [0, 0, 0, 1], "negative_start does not divide the 0 of negative_row"),
        ("positive_score", [0.5], r"positive_score is float64 \[1\], expected float32 \[3\]"),
        (
            "positive_score",
            np.float32([0.5, np.inf, 0]),
            "positive_score holds an infinite score, expected finite ones",
        ),
        ("negative_row", [0], "negative_start does not divide the 1 of negative_row"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(tmp_path, column, values, message):
    digests = save(table(), tmp_path)
    path = tmp_path / f"{column}.npy"
    np.save(path, np.array(values))
    digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"{tmp_path}: {message}: build the data again"):
        LengthTable.load(tmp_path, digests)
