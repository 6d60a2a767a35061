"""What an evaluation leaves out is said and counted; what cannot be read is named by its id."""

import json

import numpy as np
import pytest

from puma_jax import Embedder
from puma_jax.data import mbeir
from puma_jax.errors import DataError
from puma_jax.evaluation.encoding import ItemEncoder
from puma_jax.evaluation.evaluation import evaluate
from puma_jax.evaluation.report import Evaluation, LeftOut
from puma_jax.evaluation.report_page import evaluation_sections
from puma_jax.evaluation.selection import count_queries, select
from tests.evaluation.small import document, encode, write_set
from tests.reference import random_image

QUERIES = {
    "7:1": ("one", ["d:1", "gone:1"]),
    "7:2": ("two", []),
    "8:3": ("three", ["gone:2"]),
}
QUERIES_FILE = "query/test/mbeir_mine_task1_test.jsonl"
POOL_FILE = "cand_pool/local/mbeir_mine_task1_cand_pool.jsonl"
QRELS_FILE = "qrels/test/mbeir_mine_task1_test_qrels.txt"


@pytest.fixture
def root(tmp_path):
    pool = [document(f"d:{n}", text) for n, text in enumerate(("zero", "one", "two"))]
    write_set(tmp_path, "mine", 1, QUERIES, pool)
    instruction = mbeir.Instruction("text", "text", "Mine", "7", ("Find it.",))
    mbeir.write_instructions(tmp_path / "instructions/query_instructions.tsv", [instruction])
    return tmp_path


def found(root, model=encode, **kwargs):
    return evaluate(mbeir.discover(root), model, progress=False, ks=(1,), **kwargs)


def test_what_is_left_out_is_counted_and_said_in_a_line_each(root):
    with open(root / QRELS_FILE, "a") as file:
        file.write("9:9 0 d:1 1 1\n")
    (root / "query/test/mbeir_other_test.jsonl").write_text("")
    (root / "query/val").mkdir()
    (root / "query/val/mbeir_other_val.jsonl").write_text("")  # not of this split
    results = found(root)
    assert results.sets[0].left_out == LeftOut(
        unjudged_queries=1, uninstructed_queries=1, missing_documents=2, unused_judgments=1
    )
    assert results.unused_files == ("query/test/mbeir_other_test.jsonl",)
    assert results.notes() == [
        "2 relevant documents are in no pool (mine task 1: 2)",
        "1 queries have no relevant document and count as misses (mine task 1: 1)",
        "1 queries have no instruction (mine task 1: 1)",
        "1 judgments are of queries that their set does not have (mine task 1: 1)",
        "1 files are not used, their names are not of the layout: "
        "query/test/mbeir_other_test.jsonl",
    ]
    assert Evaluation.from_json(json.loads(json.dumps(results.to_json()))) == results


def test_nothing_is_said_where_nothing_is_left_out(tmp_path):
    write_set(tmp_path, "mine", 1, {"7:1": ("one", ["d:1"])}, [document("d:1", "one")])
    instruction = mbeir.Instruction("text", "text", "Mine", "7", ("Find it.",))
    mbeir.write_instructions(tmp_path / "instructions/query_instructions.tsv", [instruction])
    assert found(tmp_path).notes() == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (POOL_FILE, json.dumps({"did": "d:9", "txt": '""', "modality": "text"}), "pool.jsonl:4: "),
        (POOL_FILE, '{"did": ', "cand_pool.jsonl:4: not JSON"),
        (QUERIES_FILE, json.dumps({"qid": "7:9", "query_txt": '""', "query_modality": "text",
                                   "pos_cand_list": [], "task_id": 1}), "task1_test.jsonl:4: "),
        (QRELS_FILE, "7:1 0", "qrels.txt:4: 2 columns"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_by_its_line_or_skipped_and_counted(root, file, line, message):
    expected = found(root)
    with open(root / file, "a") as lines:
        lines.write(line + "\n")
    with pytest.raises(DataError, match=message):
        found(root)
    results = found(root, on_bad_record="skip")
    assert results.skipped == 1
    assert message in results.skipped_messages[0]
    assert results.notes()[-2:] == [
        "1 records are skipped, the first of them:",
        f"  {results.skipped_messages[0]}",
    ]
    left_out = results.sets[0].left_out
    assert left_out.skipped_queries == (file == QUERIES_FILE)
    assert left_out.skipped_documents == (file == POOL_FILE)
    assert results.sets[0].hits == expected.sets[0].hits


@pytest.fixture(scope="module")
def model(tiny):
    return Embedder.load(tiny.folder, dtype="float32")


@pytest.fixture
def pictures(tmp_path):
    """Five queries that are the pictures of five documents, and as many texts."""
    (tmp_path / "images").mkdir()
    for n in range(5):
        random_image(56, 56, n).save(tmp_path / f"images/{n}.png")
    write_set(
        tmp_path,
        "mine",
        4,
        {f"q:{n}": (None, [f"d:{n}"]) for n in range(5)},
        [document(f"d:{n}", image=f"images/{n}.png") for n in range(5)],
        images={f"q:{n}": f"images/{n}.png" for n in range(5)},
    )
    return tmp_path


def broken(path):
    path.write_bytes(b"not a picture")


def elsewhere(path):
    path.rename(path.parents[2] / "elsewhere.png")
    path.symlink_to(path.parents[2] / "elsewhere.png")


def elongated(path):
    random_image(8, 2000, 0).save(path)


@pytest.mark.parametrize("spoil", [broken, elsewhere, elongated, lambda path: path.unlink()])
def test_a_picture_that_cannot_be_read_is_named_or_left_out(pictures, model, spoil):
    whole = found(pictures, model)
    assert whole.sets[0].hits["local"][1] == 1
    spoil(pictures / "images/2.png")
    with pytest.raises(DataError, match=r'mbeir_mine_task4_test.jsonl: query "q:2": .*image'):
        found(pictures, model)
    results = found(pictures, model, on_bad_record="skip")
    assert results.skipped == 2
    assert 'cand_pool.jsonl:3: document "d:2": ' in results.skipped_messages[1]
    (mine,) = results.sets
    assert (mine.queries, mine.documents, results.documents) == (4, 4, 4)
    assert mine.left_out == LeftOut(uninstructed_queries=4, skipped_queries=1, skipped_documents=1)
    assert mine.runs["local"].qids == ("q:0", "q:1", "q:3", "q:4")
    assert mine.hits["local"][1] == mine.hits["global"][1] == 1
    selection = select(mbeir.discover(pictures))
    shown = "".join(evaluation_sections(selection, results))
    assert shown.count("<img") == 3 + 2 * 3 * 4  # three queries, and four documents in both pools


def test_an_evaluation_of_nothing_that_can_be_read_is_refused(pictures, model):
    for n in range(5):
        broken(pictures / f"images/{n}.png")
    with pytest.raises(DataError, match="no queries of mine task 4 are left"):
        found(pictures, model, on_bad_record="skip")


def test_the_order_of_vectors_does_not_depend_on_what_is_skipped(pictures, model):
    items = [{"image": pictures / f"images/{n}.png"} for n in range(5)]
    expected = model.encode(items, progress=False)
    broken(pictures / "images/0.png")
    broken(pictures / "images/3.png")
    vectors = ItemEncoder(model)(items)
    assert np.isnan(vectors[[0, 3]]).all()
    np.testing.assert_allclose(vectors[[1, 2, 4]], expected[[1, 2, 4]], atol=1e-6)


def test_queries_of_a_split_are_counted(root):
    benchmark = mbeir.discover(root)
    assert (count_queries(benchmark, "test"), count_queries(benchmark, "val")) == (3, 0)
