import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from puma_jax.data import lines
from puma_jax.data.lines import RowIndex, json_object, read_records, resolve_inside, write_lines
from puma_jax.errors import ArtifactError, DataError


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture
def numbers(tmp_path):
    """A file of rows of many lengths, with blank lines among them and no newline at its end."""
    rows = [json.dumps({"row": row, "text": "ü" * (row * 7 % 50)}) for row in range(200)]
    content = "\ufeff\n" + "\n".join(row + "\r\n \n" * (row.count("1") % 2) for row in rows)
    return write(tmp_path / "numbers.jsonl", content.encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "not JSON: Expecting value (column 1)"),
        (b'{"a": "b', "not JSON: Unterminated string starting at (column 7)"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data (column 10)"),
        (b'{"a": NaN}', "not JSON: NaN is no JSON number"),
        (b'{"a": 1, "a": 2}', 'not JSON: key "a" is given twice'),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[1, 2]", "[1, 2] is not an object {...}"),
        (b"12", "12 is not an object {...}"),
        (b'{"a": "\0"}', "line holds a NUL byte"),
        (b'{"a": "\xff"}', "byte 8 of the line, 0xff, is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "line holds a NUL byte"),
        (b'{"a": "\xed\xa0\x80"}', "byte 8 of the line, 0xed, is not UTF-8"),
        (b"{" + b" " * 200 + b"}", "line is longer than 120 bytes"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path, monkeypatch, content, message):
    if "longer" in message:
        monkeypatch.setattr(lines, "MAX_LINE_BYTES", 120)
    path = write(tmp_path / "rows.jsonl", b'{"good": 1}\n\n' + content + b"\n" + b'{"good": 2}\n')
    with pytest.raises(DataError) as error:
        list(read_records(path, json_object))
    assert str(error.value).startswith(f"rows.jsonl:3: {message}")
    assert list(read_records(path, json_object, on_bad_record="skip")) == [{"good": 1}, {"good": 2}]


def test_a_byte_order_mark_and_windows_newlines_are_no_content(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert list(read_records(path, json_object)) == [{"a": 1}, {"a": 2}]


def test_files_that_cannot_be_read_are_named(tmp_path):
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, "cannot be read")):
        for read in (lambda path: list(read_records(path, json_object)), make_index):
            with pytest.raises(DataError, match=f"{path} {message}"):
                read(path)


def make_index(path):
    return RowIndex(path, json_object)


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    path = write(tmp_path / "rows.txt", b"old\n")

    def rows():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(path, rows())
    assert os.listdir(tmp_path) == ["rows.txt"]
    assert path.read_bytes() == b"old\n"
    assert write_lines(path, ["new", "rows"]) == 2
    assert os.listdir(tmp_path) == ["rows.txt"]
    assert path.read_bytes() == b"new\nrows\n"


def test_files_that_cannot_be_written_are_named(tmp_path):
    file = write(tmp_path / "file", b"")
    with pytest.raises(ArtifactError, match=f"{file}/rows.txt cannot be written: "):
        write_lines(file / "rows.txt", ["a"])


def test_any_row_is_found_without_reading_the_others(numbers):
    rows = make_index(numbers)
    assert rows.starts.dtype == np.int64
    assert len(rows) == 200
    for row in (*np.random.default_rng(0).permutation(200), -1):
        assert rows[row]["row"] == row % 200
    with pytest.raises(IndexError):
        rows[200]
    assert [row["row"] for row in rows] == list(range(200))


def test_an_empty_file_has_no_rows(tmp_path):
    assert len(make_index(write(tmp_path / "rows.jsonl", b" \n\n"))) == 0


def test_a_bad_row_is_named_by_its_line(tmp_path):
    rows = make_index(write(tmp_path / "rows.jsonl", b'\n{"a": 1}\n\n\n{"a"\n{"a": 2}\n'))
    assert [rows[0], rows[2]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match=r"^rows.jsonl:5: not JSON: Expecting ':' delimiter"):
        rows[1]


def test_rows_are_read_by_threads_and_pickled_copies(numbers):
    rows = make_index(numbers)
    expected = list(range(200))
    with ThreadPoolExecutor(8) as pool:
        assert [row["row"] for row in pool.map(rows.__getitem__, range(200))] == expected
    assert [row["row"] for row in pickle.loads(pickle.dumps(rows))] == expected


def test_a_path_leads_to_a_file_below_its_root_whatever_links_it_takes(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "root-of-others"
    (root / "images").mkdir(parents=True)
    elsewhere.mkdir()
    write(root / "images/a.png", b"")
    write(elsewhere / "secret.png", b"")
    (root / "inside").symlink_to("images")
    (root / "outside").symlink_to(elsewhere)
    (root / "file.png").symlink_to(elsewhere / "secret.png")
    (tmp_path / "link").symlink_to(root)
    for path in ("images/a.png", "inside/a.png", "images/../inside/a.png"):
        assert resolve_inside(root, path) == root / "images/a.png"
        assert resolve_inside(tmp_path / "link", path) == root / "images/a.png"
    for path in (
        "outside/secret.png",
        "file.png",
        "../root-of-others/secret.png",
        str(root / "images/a.png"),
        ".",
        "",
    ):
        with pytest.raises(DataError, match=r"is not a path of a file in .*, links followed"):
            resolve_inside(root, path)
