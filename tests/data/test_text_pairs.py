import csv
import json

import pytest

from puma_jax.config import PlanConfig
from puma_jax.data import text_pairs
from puma_jax.data.builder import Settings, build
from puma_jax.data.lines import BadRecords
from puma_jax.data.mbeir import read_candidates, read_queries, validate
from puma_jax.data.pair_rows import PairColumns, PairTable
from puma_jax.data.pipeline import Loader, batches
from puma_jax.data.plan import Plan
from puma_jax.data.store import Store
from puma_jax.data.text_pairs import write_benchmark
from puma_jax.errors import ArtifactError, ConfigError, DataError
from tests.data import fake_mbeir
from tests.reference import random_image


def read_text_pairs(path, columns=PairColumns(), images=None, **options):  # noqa: B008
    """Texts of the pairs of a table."""
    for pair in PairTable(path, columns, images).pairs(**options):
        negatives = [part.text for part in pair.negatives] or [None]
        yield pair.query.text, pair.document.text, *negatives


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
        ('"a"b,c,d', "not CSV: ',' expected after '\"'"),
        ("a,b\0,c", "line holds a NUL byte"),
        ("a\rb,c,d", "1 columns, but the first row names 3"),
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
    with pytest.raises(DataError, match=r"^nli.csv:3: not CSV: unexpected end of data"):
        list(read_text_pairs(path))


def test_a_column_that_is_missing_is_named(tmp_path):
    path = write(tmp_path / "nli.csv", "sent0,text\na,b\n")
    message = 'nli.csv: no column "sent1"; columns are "sent0", "text": name those of the pairs'
    with pytest.raises(DataError, match=message):
        list(read_text_pairs(path, on_bad_record="skip"))
    with pytest.raises(DataError, match=r"nli.csv:1: the first row must give each column a name"):
        list(read_text_pairs(write(tmp_path / "nli.csv", "")))
    path = write(tmp_path / "nli.csv", "sent0,text\na,b\n")
    with pytest.raises(ConfigError, match="no column holds the document: name one with --document"):
        list(read_text_pairs(path, PairColumns(query="sent0")))


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


COLUMNS = PairColumns(
    query="ask",
    query_image="seen",
    document="title",
    document_image="photo",
    negatives=("wrong", "wrong too"),
)
ROWS = [
    {"ask": "the same in blue", "seen": "a.png", "title": None, "photo": "sub/b.png",
     "wrong": ["a shoe", "a hat"], "wrong too": "a tie"},
    {"ask": "a red bicycle", "seen": None, "title": "Bicycle.", "photo": "a.png",
     "wrong": [], "wrong too": None},
    {"ask": None, "seen": "a.png", "title": "Bicycle.", "photo": "a.png",
     "wrong": None, "wrong too": None},
    {"ask": "a cup", "seen": None, "title": "Cup.", "photo": "none.png",
     "wrong": None, "wrong too": None},
]  # fmt: skip
MODALITIES = [("image,text", "image", 7), ("text", "image,text", 2)]


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos/sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "sub/b.png")):
        random_image(40, 30, seed=number).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def as_lines(path, rows):
    return write(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path, rows):
    pq = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pq.write_table(table, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_dataset(path, rows):
    """With images that are stored in the rows, as datasets do."""
    datasets = pytest.importorskip("datasets")
    stored = {name: {"bytes": (path.parent / name).read_bytes(), "path": None}
              for name in ("a.png", "sub/b.png")}  # fmt: skip
    broken = {"bytes": None, "path": "none.png"}
    rows = [
        {key: stored.get(value, broken) if key in ("seen", "photo") and value else value
         for key, value in row.items()}
        for row in rows
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).save_to_disk(path / "dataset")
    return path / "dataset"


@pytest.mark.parametrize("save", [as_lines, as_parquet, as_dataset])
def test_any_table_becomes_a_benchmark_with_images_and_negatives(tmp_path, photos, save):
    table, skipped = save(photos / "rows", ROWS), BadRecords()
    count = write_benchmark(
        table, tmp_path / "out", columns=COLUMNS, on_bad_record="skip", skipped=skipped
    )
    assert (count, skipped.count) == (2, 2)
    assert "a query of image and a document of image,text make no task" in skipped.messages[0]
    assert 'photo "none.png" is not a file in' in skipped.messages[1]
    assert all(
        str(place) in message for place, message in zip((3, 4), skipped.messages, strict=True)
    )
    assert validate(tmp_path / "out").sound
    queries = list(read_queries(tmp_path / "out/query/train/mbeir_pairs_train.jsonl"))
    pool = tmp_path / "out/cand_pool/global/mbeir_union_train_cand_pool.jsonl"
    documents = {found.did: found for found in read_candidates(pool)}
    assert [
        (query.modality, documents[query.positives[0]].modality, query.task) for query in queries
    ] == MODALITIES
    texts = [documents[did].text for did in queries[0].negatives]
    assert texts == ["a shoe", "a hat", "a tie"]
    assert queries[1].negatives == ()
    stored = [queries[0].image, *(documents[query.positives[0]].image for query in queries)]
    for path, name in zip(stored, ("a.png", "sub/b.png", "a.png"), strict=True):
        assert (tmp_path / "out" / path).read_bytes() == (photos / name).read_bytes()


def test_negatives_of_a_table_arrive_in_the_batch(tmp_path, photos, tiny):
    write_benchmark(as_lines(photos / "rows", ROWS[:2]), tmp_path / "out", columns=COLUMNS)
    build(Settings(root=tmp_path / "out", out=tmp_path / "built", workers=1), tiny.processor)
    store = Store.open(tmp_path / "built")
    config = PlanConfig(batch_size=2, hard_negatives=2)
    plan = Plan(store.table, store.instructions, tiny.processor.template, config)
    loader = Loader(store, plan, plan.fitting_shape(1, 1), 1)
    (batch,) = batches(loader, 0, 1)
    assert batch.negatives is not None
    drawn = store.table.candidate_content[store.table.negative_row]
    assert len(drawn) == 3


def test_images_beside_texts_of_negatives_are_one_document(tmp_path, photos):
    columns = PairColumns("ask", None, "title", None, ("wrong",), ("looks",))
    row = {"ask": "a", "title": "b", "wrong": ["c", "d"], "looks": ["a.png", "sub/b.png"]}
    table = PairTable(as_lines(photos / "rows", [row, row | {"looks": "a.png"}]), columns)
    skipped = BadRecords()
    (pair,) = table.pairs("skip", skipped)
    assert pair.negatives == (("c", photos / "a.png"), ("d", photos / "sub/b.png"))
    assert "rows.jsonl:2: 2 texts and 1 images of negatives" in skipped.messages[0]


def test_images_outside_of_the_folder_are_refused(tmp_path, photos):
    random_image(9, 9).save(tmp_path / "mine.png")
    for image in ("../mine.png", str(tmp_path / "mine.png")):
        table = as_lines(photos / "rows", [{"ask": "a", "photo": image}])
        with pytest.raises(DataError, match=r"rows.jsonl:1: .*leads out of the root"):
            list(PairTable(table, PairColumns("ask", document_image="photo")).pairs())


def test_what_is_not_used_is_said(tmp_path, capsys):
    table = write(tmp_path / "nli.csv", "q,d,hard_neg,source\na cat,a pet,a bus,x\n")
    columns = PairColumns(query="q", document="d")
    text_pairs.main(table, tmp_path / "out", columns)
    said = capsys.readouterr().out
    assert "Columns that are not used: hard_neg, source\n" in said
    assert "hard_neg seems to hold hard negatives: name it with --negatives to use them" in said
    text_pairs.main(table, tmp_path / "other", PairColumns("q", None, "d", None, ("hard_neg",)))
    said = capsys.readouterr().out
    assert "with 1 hard negatives" in said
    assert "Stages draw hard negatives with plan.hard_negatives above 0" in said
