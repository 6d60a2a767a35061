import csv

import pytest

from puma_jax.data.builder import Settings, build
from puma_jax.data.lines import BadRecords
from puma_jax.data.mbeir import validate
from puma_jax.data.store import Store
from puma_jax.data.text_pairs import read_text_pairs, write_benchmark
from puma_jax.errors import ArtifactError, ConfigError, DataError
from tests.data import fake_mbeir


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_pairs_come_back_as_the_csv_module_wrote_them(tmp_path):
    pairs = [
        ("A man plays.", "Someone plays."),
        ('He said "no",\nand left', "ü, 漢"),
        ("long " * 100_000, "b"),
    ]
    path = tmp_path / "nli.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent1", "hard_neg", "sent0"])
        writer.writerows([row, second, "no", first] for row, (first, second) in enumerate(pairs))
    expected = [(first.strip(), second, "no") for first, second in pairs]
    assert list(read_text_pairs(path)) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a", "1 columns, but the first row names 3"),
        ("a,b,c,d", "4 columns, but the first row names 3"),
        ("a, ,c", "sent1 is empty"),
        ('"""""",b,c', "sent0 is empty"),
        ('"a"b,c,d', "',' expected after '\"'"),
        ("a,b\0,c", "line holds a NUL byte"),
        ("a\rb,c,d", "new-line character seen in unquoted field"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, row, message):
    path = write(tmp_path / "nli.csv", f"sent0,sent1,hard_neg\na,b,c\n\n{row}\nd,e,\n")
    with pytest.raises(DataError, match=f"^nli.csv:4: {message}"):
        list(read_text_pairs(path))
    skipped = BadRecords()
    pairs = list(read_text_pairs(path, on_bad_record="skip", skipped=skipped))
    assert pairs == [("a", "b", "c"), ("d", "e", None)]
    assert skipped.count == 1


def test_a_quote_that_is_never_closed_is_named(tmp_path):
    path = write(tmp_path / "nli.csv", 'sent0,sent1\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match=r"^nli.csv:4: unexpected end of data"):
        list(read_text_pairs(path))


def test_a_column_that_is_missing_is_named(tmp_path):
    for text, names in (("sent0,text\na,b\n", '"sent0", "text"'), ("", "none")):
        path = write(tmp_path / "nli.csv", text)
        with pytest.raises(
            DataError, match=f"^nli.csv:1: no column sent[01]; columns are {names}$"
        ):
            list(read_text_pairs(path, on_bad_record="skip"))


def test_pairs_become_a_benchmark_that_is_built_like_any_other(tmp_path, tiny):
    path = write(tmp_path / "nli.csv", "sent0,sent1,hard_neg\na cat,a pet,x\n,,\na bus,a car,y\n")
    skipped = BadRecords()
    out = tmp_path / "nli"
    assert write_benchmark(path, out, on_bad_record="skip", skipped=skipped) == 2
    assert skipped.count == 1
    assert validate(out, check_images=False).sound
    build(Settings(root=out, out=tmp_path / "built", workers=1), tiny.processor)
    store = Store.open(tmp_path / "built")
    assert store.instructions.sets == ("pairs_task1",)
    for row, (first, second) in enumerate((("A cat.", "A pet."), ("A bus.", "A car."))):
        asked, found = store.query(row), store.candidate(store.table.positive_row[row])
        assert tuple(asked.plain_tokens) == tiny.processor.tokenize_text(first, image=False).tokens
        assert tuple(found.tokens) == tiny.processor.tokenize_text(second, image=False).tokens
    negatives = [store.candidate(row) for row in store.table.negative_row]
    texts = [tiny.processor.tokenize_text(text, image=False).tokens for text in ("X.", "Y.")]
    assert [tuple(found.tokens) for found in negatives] == texts


def test_documents_repeated_in_a_table_are_no_negatives_of_each_other(tmp_path, tiny):
    path = write(tmp_path / "nli.csv", "sent0,sent1\na cat,a pet\na dog,A pet.\na bus,a car\n")
    write_benchmark(path, tmp_path / "nli")
    build(Settings(root=tmp_path / "nli", out=tmp_path / "built", workers=1), tiny.processor)
    store = Store.open(tmp_path / "built")
    first, second, third = store.table.candidate_content[store.table.positive_row]
    assert first == second != third


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_overwritten_and_the_same_command_changes_nothing(tmp_path):
    path = write(tmp_path / "nli.csv", "sent0,sent1\na cat,a pet\n,\na bus,a car\n")
    out = tmp_path / "nli"
    assert write_benchmark(path, out, on_bad_record="skip") == 2
    before = files(out)
    skipped = BadRecords()
    assert write_benchmark(path, out, on_bad_record="skip", skipped=skipped) == 2
    assert (skipped.count, skipped.messages) == (1, ["nli.csv:3: sent0 is empty"])
    with pytest.raises(ArtifactError, match='differs in name \\("pairs" there, "other" here'):
        write_benchmark(path, out, name="other", on_bad_record="skip")
    write(path, "sent0,sent1\na cat,a pet\n")
    with pytest.raises(ArtifactError, match="holds text pairs of another job, which differs in"):
        write_benchmark(path, out, on_bad_record="skip")
    assert files(out) == before
    # A benchmark of others, as `validate` knows them.
    mine = fake_mbeir.write_union(tmp_path / "mine")
    before = files(mine)
    with pytest.raises(ArtifactError, match="mine is not empty: choose another folder"):
        write_benchmark(path, mine)
    assert files(mine) == before


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".", "a b", "a:b", "x" * 101, "\n"])
def test_a_name_that_is_no_part_of_a_file_name_is_refused(tmp_path, name):
    path = write(tmp_path / "nli.csv", "sent0,sent1\na cat,a pet\n")
    with pytest.raises(ConfigError, match=r"^name .* must be letters, digits"):
        write_benchmark(path, tmp_path / "out", name=name)
    assert [path.name for path in tmp_path.iterdir()] == ["nli.csv"]


def test_a_bad_row_leaves_nothing_behind(tmp_path):
    path = write(tmp_path / "nli.csv", "sent0,sent1\na cat,a pet\na,\n")
    with pytest.raises(DataError, match=r"nli.csv:3: sent1 is empty"):
        write_benchmark(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["nli.csv"]
