import dataclasses
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from puma_jax.data import mbeir
from puma_jax.data.mbeir import Candidate, Instruction, Qrel, Query
from puma_jax.data.mbeir.__main__ import main
from puma_jax.data.mbeir.validation import validate
from puma_jax.errors import DataError

QUERIES = "query/test/mbeir_own_task3_test.jsonl"
POOL = "cand_pool/local/mbeir_own_task3_cand_pool.jsonl"
GLOBAL_POOL = "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
QRELS = "qrels/test/mbeir_own_task3_test_qrels.txt"
TRAIN = "query/union_train/mbeir_union_up_train.jsonl"
TRAIN_QRELS = "qrels/train/mbeir_own_train_qrels.txt"
INSTRUCTIONS = "instructions/query_instructions.tsv"


def image_bytes(image_format="JPEG"):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """A benchmark of two queries by image, without fault."""
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "images" / name).write_bytes(image_bytes())
    pool = [Candidate(f"1:{number}", f"text {number}", None, "text") for number in range(4)]
    queries = [
        Query("1:a", None, "images/a.jpg", "image", ("1:0", "1:1"), task=3),
        Query("1:b", None, "images/b.jpg", "image", ("1:2",), task=3),
    ]
    train = [Query("1:c", "Which?", "images/c.jpg", "image,text", ("1:3",), task=6)]
    mbeir.write_candidates(tmp_path / POOL, pool)
    mbeir.write_candidates(tmp_path / GLOBAL_POOL, [*pool, Candidate("1:9", "9", None, "text")])
    mbeir.write_queries(tmp_path / QUERIES, queries)
    mbeir.write_queries(tmp_path / TRAIN, train)
    mbeir.write_qrels(tmp_path / TRAIN_QRELS, [Qrel("1:c", "1:3", 1, 6)])
    mbeir.write_qrels(
        tmp_path / QRELS,
        [Qrel(query.qid, did, 1, 3) for query in queries for did in query.positives],
    )
    mbeir.write_instructions(
        tmp_path / INSTRUCTIONS,
        [
            Instruction("image", "text", "own", "1", ("Find a caption.",)),
            Instruction("image,text", "text", "own", "1", ("Answer.",)),
        ],
    )
    return tmp_path


def append(path, line):
    with path.open("a") as file:
        file.write(line + "\n")


def warnings(report):
    return {
        f"{file.path}: {warning}": count
        for file in report.files
        for warning, count in file.warnings.items()
    }


def test_a_benchmark_without_fault_is_sound(root):
    report = validate(root)
    assert report.sound
    assert {file.path: file.records for file in report.files} == {
        POOL: 4,
        GLOBAL_POOL: 5,
        QUERIES: 2,
        QRELS: 3,
        TRAIN: 1,
        TRAIN_QRELS: 1,
    }
    assert warnings(report) == {}
    assert report.notes == []


QUERY = (
    '{{"qid": "{qid}", "query_img_path": "images/a.jpg", "query_modality": "image", '
    '"pos_cand_list": {positives}, "task_id": {task}}}'
)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (QUERIES, QUERY.format(qid="1:a", positives='["1:0"]', task=3), 'qid "1:a" is given twice'),
        (
            QUERIES,
            QUERY.format(qid="x", positives='["1:0"]', task=4),
            "task_id 4 in a file of task 3",
        ),
        (
            TRAIN,
            QUERY.format(qid="x", positives='["1:0"]', task=8),
            'query_modality is "image", but queries of task 8 are "image,text"',
        ),
        (
            QUERIES,
            QUERY.format(qid="x", positives='["1:x", "1:y"]', task=3),
            'pos_cand_list: neither "1:x" nor what follows is in any pool',
        ),
        (
            TRAIN,
            QUERY.format(qid="x", positives="[]", task=3),
            "pos_cand_list is empty, but training needs a positive",
        ),
        (
            POOL,
            '{"did": "1:0", "txt": "again", "modality": "text"}',
            'did "1:0" is another document in mbeir_own_task3_cand_pool.jsonl:1: give every',
        ),
        (
            GLOBAL_POOL,
            '{"did": "1:3", "txt": "again", "modality": "text"}',
            'did "1:3" is another document in mbeir_own_task3_cand_pool.jsonl:4: give every',
        ),
        (
            POOL,
            '{"did": "1:x", "txt": "\\"\\"", "modality": "text"}',
            'txt is "\\"\\"", which leaves no text',
        ),
        (
            POOL,
            '{"did": "1:x", "img_path": "up/a.jpg", "modality": "image"}',
            'img_path "up/a.jpg" leads out of the root, ',
        ),
        (POOL, '{"did": "1:x", "modality": "text"}', 'txt is missing, but modality is "text"'),
        (POOL, '{"did": "x", "img_path": "images/no.jpg", "modality": "image"}', "img_path "),
        (QRELS, "1:a 0 1:0 1", "4 columns, expected 5: qid 0 did relevance task_id"),
    ],
)
def test_a_bad_record_is_counted_and_named(root, name, line, message):
    (root / "up").symlink_to(root.parent)
    append(root / name, line)
    number = len((root / name).read_text().splitlines())
    report = validate(root)
    assert not report.sound
    assert {file.path: file.bad for file in report.files if file.bad} == {name: 1}
    file_name = name.split("/")[-1]
    assert report.bad.messages[0].startswith(f"{file_name}:{number}: {message}")
    with pytest.raises(DataError, match=f"^{file_name}:{number}: "):
        validate(root, on_bad_record="error")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_an_image_that_is_cut_short_is_a_bad_record(root, image_format):
    path = root / "images" / "a.jpg"  # PIL looks at the content, not at the name
    path.write_bytes(image_bytes(image_format))
    assert validate(root).sound
    path.write_bytes(image_bytes(image_format)[:-300])
    (message,) = validate(root).bad.messages
    assert message.startswith(
        "mbeir_own_task3_test.jsonl:1: query_img_path images/a.jpg cannot be "
    )


def test_an_image_that_would_fill_the_memory_is_a_bad_record(root):
    content = image_bytes("GIF")
    width_and_height = b"\xff\xff\xff\xff"
    (root / "images" / "a.jpg").write_bytes(content[:6] + width_and_height + content[10:])
    (message,) = validate(root).bad.messages
    assert "decompression bomb" in message


def test_images_may_be_elsewhere_when_they_are_not_checked(root):
    shutil.rmtree(root / "images")
    assert validate(root).bad.count == 3
    assert validate(root, check_images=False).sound


def test_what_is_odd_but_not_wrong_is_a_warning(root):
    query = Query("2:d", None, "images/a.jpg", "image", ("1:0", "1:9", "1:x", "1:i"), task=3)
    append(root / POOL, '{"did": "1:i", "img_path": "images/a.jpg", "modality": "image"}')
    mbeir.write_queries(root / QUERIES, [*mbeir.read_queries(root / QUERIES), query])
    append(root / QRELS, "1:z 0 1:x 1 3")
    append(root / QRELS, "2:d 0 1:0 0 3")
    report = validate(root)
    assert report.sound
    assert warnings(report) == {
        f"{QUERIES}: positive is not in the local pool": 1,
        f"{QUERIES}: positive is in no pool": 1,
        f"{QUERIES}: positive has another modality than the task": 1,
        f'{QUERIES}: query without an instruction for dataset_id "2", image → text': 1,
        f"{QUERIES}: query without a relevant document in the qrels": 1,
        f"{QRELS}: judgment of an unknown query": 1,
        f"{QRELS}: judged document is not in the local pool": 1,
    }


def test_what_is_given_twice_is_one_thing_if_it_is_the_same(root):
    """M-BEIR's union of training queries holds those of small sets several times."""
    (query,) = mbeir.read_queries(root / TRAIN)
    other = dataclasses.replace(query, text="Who?", negatives=("1:1", "1:2"))
    mbeir.write_queries(root / TRAIN, [query, query, query, other])
    append(root / POOL, (root / POOL).read_text().splitlines()[2])
    report = validate(root)
    assert report.sound
    assert warnings(report) == {
        f"{POOL}: document given twice": 1,
        f"{TRAIN}: training query given twice (upsampled)": 2,
        f"{TRAIN}: qid of another query, too": 1,
    }
    assert report.notes == [
        "neg_cand_list of 1 training queries holds 2 ids: stages with "
        "plan.hard_negatives draw hard negatives from them"
    ]


def test_the_command_prints_the_report_and_says_by_its_exit_code_whether_it_is_sound(root, capsys):
    main("validate", root)
    assert capsys.readouterr().out == f"{validate(root)}\n"
    append(root / QUERIES, "{}")
    with pytest.raises(SystemExit) as end:
        main("validate", root)
    assert end.value.code == 1
    assert "qid is missing, expected an id" in capsys.readouterr().out


def test_a_part_of_a_benchmark_can_be_checked(root):
    for name in (POOL, GLOBAL_POOL, QRELS, INSTRUCTIONS):
        (root / name).unlink()
    (root / "query/test/own.jsonl").touch()
    report = validate(root)
    assert report.sound
    assert report.notes == [
        f"{POOL} is missing",
        f"{QRELS} is missing",
        f"{INSTRUCTIONS} is missing",
        "query/test/own.jsonl is not used: its name does not fit the layout",
    ]


def test_the_report_prints_as_a_short_table(root):
    append(root / QUERIES, "{}")
    append(root / QRELS, "1:z 0 1:0 1 3")
    (root / INSTRUCTIONS).unlink()
    assert str(validate(root)).splitlines() == [
        "file                                                  records      bad  warnings",
        "cand_pool/local/mbeir_own_task3_cand_pool.jsonl             4        0         0",
        "cand_pool/global/mbeir_union_train_cand_pool.jsonl          5        0         0",
        "query/test/mbeir_own_task3_test.jsonl                       2        1         0",
        "qrels/test/mbeir_own_task3_test_qrels.txt                   4        0         1",
        "query/union_train/mbeir_union_up_train.jsonl                1        0         0",
        "qrels/train/mbeir_own_train_qrels.txt                       1        0         0",
        "",
        "bad records: 1, the first of them:",
        "  mbeir_own_task3_test.jsonl:3: qid is missing, expected an id",
        "",
        "warnings:",
        "  1 × judgment of an unknown query (qrels/test/mbeir_own_task3_test_qrels.txt)",
        "",
        "notes:",
        "  instructions/query_instructions.tsv is missing",
    ]
