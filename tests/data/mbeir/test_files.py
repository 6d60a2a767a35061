import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_jax.data import mbeir
from puma_jax.data.mbeir import BadRecords, Candidate, Instruction, Qrel, Query
from puma_jax.data.texts import is_blank
from puma_jax.errors import DataError

# Rows as M-BEIR has them.
QUERY_ROW = (
    '{"qid": "9:6", "query_txt": null, "query_img_path": "mbeir_images/mscoco/1.jpg", '
    '"query_modality": "image", "query_src_content": null, "pos_cand_list": ["9:2", "9:3"], '
    '"neg_cand_list": [], "task_id": 3}'
)
QUERY = Query("9:6", None, "mbeir_images/mscoco/1.jpg", "image", ("9:2", "9:3"), task=3)
CANDIDATE_ROW = (
    '{"txt": null, "img_path": "mbeir_images/mscoco/2.jpg", "modality": "image", '
    '"did": "9:1", "src_content": null}'
)
CANDIDATE = Candidate("9:1", None, "mbeir_images/mscoco/2.jpg", "image")
INSTRUCTIONS = (
    "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\n"
    "image\ttext\tMSCOCO\t9\tFind a caption.\tWhat is to be seen?\t\n"
    "text,image\ttext\tOVEN\t5\tName it.\n"
)

texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: not is_blank(text))
ids = st.from_regex("[^\\s\0\ufeff\ud800-\udfff]{1,9}", fullmatch=True)
paths = st.from_regex("[a-z0-9 é漢.]{1,9}/[a-z]{1,9}\\.jpg", fullmatch=True).filter(
    lambda path: not path.startswith("../")
)


def contents(modality):
    """Fields of a query or candidate of one modality."""
    return st.fixed_dictionaries(
        {
            "text": texts if "text" in modality else st.none(),
            "image": paths if "image" in modality else st.none(),
            "modality": st.just(modality),
            "source": st.none() | st.text(st.characters(codec="utf-8")),
        }
    )


def query_fields(task):
    lists = st.lists(ids, max_size=3).map(tuple)
    own = {"qid": ids, "positives": lists, "negatives": lists, "task": st.just(task)}
    return contents(mbeir.TASKS[task][0]).flatmap(
        lambda content: st.fixed_dictionaries(own).map(lambda fields: fields | content)
    )


def read_query(tmp_path, **changes):
    """Return the row above as it is read, with some fields changed, or removed by `...`."""
    row = {k: v for k, v in (json.loads(QUERY_ROW) | changes).items() if v is not ...}
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (query,) = mbeir.read_queries(path)
    return query


def test_rows_of_mbeir_are_read_and_written_byte_for_byte(tmp_path):
    for row, record, read, write in (
        (QUERY_ROW, QUERY, mbeir.read_queries, mbeir.write_queries),
        (CANDIDATE_ROW, CANDIDATE, mbeir.read_candidates, mbeir.write_candidates),
    ):
        path = tmp_path / "rows.jsonl"
        assert write(path, [record]) == 1
        assert path.read_bytes() == row.encode() + b"\n"
        assert list(read(path)) == [record]


@given(st.lists(st.sampled_from(sorted(mbeir.TASKS)).flatmap(query_fields), max_size=3))
@settings(max_examples=50, deadline=None)
def test_queries_come_back_as_they_were_written(tmp_path_factory, fields):
    rows = [Query(**row) for row in fields]
    path = tmp_path_factory.mktemp("rows") / "queries.jsonl"
    assert mbeir.write_queries(path, rows) == len(rows)
    assert list(mbeir.read_queries(path)) == rows


@given(
    st.lists(st.tuples(ids, st.sampled_from(mbeir.MODALITIES).flatmap(contents)), max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_candidates_come_back_as_they_were_written(tmp_path_factory, fields):
    rows = [Candidate(did, **content) for did, content in fields]
    path = tmp_path_factory.mktemp("rows") / "pool.jsonl"
    assert mbeir.write_candidates(path, rows) == len(rows)
    assert list(mbeir.read_candidates(path)) == rows


@given(st.lists(st.tuples(ids, ids, st.integers(1, 9), st.sampled_from(sorted(mbeir.TASKS)))))
@settings(max_examples=50, deadline=None)
def test_qrels_come_back_as_they_were_written(tmp_path_factory, fields):
    rows = [Qrel(*row) for row in fields]
    path = tmp_path_factory.mktemp("rows") / "qrels.txt"
    assert mbeir.write_qrels(path, rows) == len(rows)
    assert list(mbeir.read_qrels(path)) == rows


def test_instructions_come_back_as_they_were_written(tmp_path):
    rows = [
        Instruction("image", "text", "MSCOCO", "9", ("Find a caption.", 'What "is" to be seen?')),
        Instruction("text", "image,text", "my own", "", ("找到它。",)),
    ]
    path = tmp_path / "new" / "folder" / "query_instructions.tsv"
    assert mbeir.write_instructions(path, rows) == 2
    assert list(mbeir.read_instructions(path).values()) == rows
    assert {line.count("\t") for line in path.read_text().splitlines()} == {5}


def test_instructions_of_mbeir_are_found_by_dataset_and_modalities(tmp_path):
    path = tmp_path / "query_instructions.tsv"
    path.write_text(INSTRUCTIONS)
    instructions = mbeir.read_instructions(path)
    assert instructions["9", "image", "text"].prompts == ("Find a caption.", "What is to be seen?")
    # A query of OVEN whose positive is a document of InfoSeek is still asked as OVEN asks.
    query = Query("5:1", "Which bird?", "a.jpg", "image,text", ("6:7",), task=6)
    assert instructions[mbeir.instruction_key(query)].prompts == ("Name it.",)


def test_both_spellings_of_image_with_text_are_read(tmp_path):
    for spelling in ("image,text", "text,image"):
        query = read_query(tmp_path, query_txt="a", query_modality=spelling, task_id=6)
        assert query.modality == "image,text"


def test_both_forms_of_candidate_lists_are_read(tmp_path):
    query = read_query(
        tmp_path, pos_cand_list=[{"did": "9:2"}, "9:3"], neg_cand_list=[{"did": "a"}]
    )
    assert (query.positives, query.negatives) == (("9:2", "9:3"), ("a",))


def test_scores_of_documents_are_read_and_written(tmp_path):
    query = read_query(tmp_path, cand_scores={"9:2": 1, "9:3": -0.25})
    assert query.scores == (("9:2", 1.0), ("9:3", -0.25))
    mbeir.write_queries(tmp_path / "again.jsonl", [query])
    assert list(mbeir.read_queries(tmp_path / "again.jsonl")) == [query]


def test_fields_without_content_may_be_null_empty_or_absent(tmp_path):
    for nothing in (None, "", " \n", ...):
        assert read_query(tmp_path, query_txt=nothing, query_src_content=...) == QUERY
    assert read_query(tmp_path, neg_cand_list=...) == read_query(tmp_path, neg_cand_list=None)


def test_ids_of_a_users_own_data_may_be_any_word(tmp_path):
    assert read_query(tmp_path, qid="größe/№1").qid == "größe/№1"
    assert [mbeir.dataset_id(qid) for qid in ("9:6", "a:b:c", ":1", "plain")] == ["9", "a", "", ""]


def test_modalities_have_the_codes_of_the_loss():
    assert [mbeir.modality_code(name) for name in ("image", "text", "image,text")] == [0, 1, 2]
    assert len(mbeir.TASKS) == 8
    assert 5 not in mbeir.TASKS


def test_only_judgments_above_zero_are_read(tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("9:6 0 9:2 1 3\n9:6 0 9:3 0 3\r\n\n9:7\t0\t9:9 2 3")
    assert list(mbeir.read_qrels(path)) == [Qrel("9:6", "9:2", 1, 3), Qrel("9:7", "9:9", 2, 3)]


ONE_OF = "one of image, text, image,text"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qid": ...}, "qid is missing, expected an id"),
        ({"qid": 6}, "qid 6 is not an id"),
        ({"qid": ""}, 'qid "" is not an id: one word, without white space'),
        ({"qid": "9: 6"}, 'qid "9: 6" is not an id: one word, without white space'),
        ({"qid": "\ud800"}, 'qid "\\ud800" is not an id: one word, without white space'),
        ({"query_modality": "img"}, f'query_modality "img" is not {ONE_OF}'),
        ({"query_modality": ["image"]}, f'query_modality ["image"] is not {ONE_OF}'),
        ({"query_modality": ...}, f"query_modality is missing, expected {ONE_OF}"),
        ({"query_txt": 1.5}, "query_txt 1.5 is not a text or null"),
        ({"query_txt": "bird"}, 'query_txt is "bird", but query_modality is "image"'),
        ({"query_img_path": None}, 'query_img_path is missing, but query_modality is "image"'),
        ({"query_modality": "text"}, 'query_txt is missing, but query_modality is "text"'),
        (
            {"query_txt": "a\udc80", "query_modality": "image,text"},
            'query_txt "a\\udc80" holds half of a surrogate pair',
        ),
        ({"query_img_path": ["a", "b"]}, 'query_img_path ["a", "b"] is a list, expected one path'),
        ({"query_img_path": "/a.jpg"}, 'query_img_path "/a.jpg" is not a path below the root'),
        (
            {"query_img_path": "a/../../b"},
            'query_img_path "a/../../b" is not a path below the root',
        ),
        ({"query_img_path": "a\0"}, 'query_img_path "a\\u0000" is not a path below the root'),
        ({"pos_cand_list": ...}, "pos_cand_list is missing, expected a list of ids"),
        ({"pos_cand_list": "9:2"}, 'pos_cand_list "9:2" is not a list of ids'),
        ({"pos_cand_list": [3]}, 'pos_cand_list holds 3, expected an id or {"did": id}'),
        ({"neg_cand_list": [{}]}, 'neg_cand_list holds {...}, expected an id or {"did": id}'),
        ({"cand_scores": []}, "cand_scores [] is not an object of scores by id"),
        ({"cand_scores": {"a": None}}, 'cand_scores gives "a" null, expected a number of at most'),
        ({"cand_scores": {"a": 10**400}}, 'cand_scores gives "a" 1000'),
        ({"cand_scores": {"a b": 1}}, 'cand_scores "a b" is not an id'),
        ({"task_id": "3"}, 'task_id "3" is not a whole number'),
        ({"task_id": True}, "task_id true is not a whole number"),
        ({"task_id": 5}, "task_id 5 is not one of 0, 1, 2, 3, 4, 6, 7, 8"),
        ({"query_src_content": {}}, "query_src_content {...} is not a text or null"),
        ({"qid": "x y" * 99}, f'qid "{("x y" * 99)[:60]}..." is not an id'),
    ],
)
def test_a_bad_field_is_named_with_its_place_its_value_and_what_was_expected(
    tmp_path, changes, message
):
    with pytest.raises(DataError) as error:
        read_query(tmp_path, **changes)
    assert str(error.value).startswith(f"queries.jsonl:1: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("9:6 0 9:2 1", "4 columns, expected 5: qid 0 did relevance task_id"),
        ("9:6 0 9:2 yes 3", 'relevance "yes" is not a whole number'),
        ("9:6 0 9:2 1_0 3", 'relevance "1_0" is not a whole number'),
        ("9:6 0 9:2 1 12", "task_id 12 is not one of 0, 1, 2, 3, 4, 6, 7, 8"),
    ],
)
def test_a_bad_judgment_is_named(tmp_path, line, message):
    path = tmp_path / "qrels.txt"
    path.write_text(f"9:6 0 9:2 1 3\n{line}\n")
    with pytest.raises(DataError, match=f"^qrels.txt:2: {message}"):
        list(mbeir.read_qrels(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("image\ttext\tMSCOCO\t9", "4 columns, expected tabs between query_modality"),
        ("image\ttext\tMSCOCO\t9\t \t", "prompt_1 is missing"),
        ("image\tvideo\tMSCOCO\t9\tFind.", f'cand_modality "video" is not {ONE_OF}'),
        ("image\ttext\tother\t9\tFind.", 'a second row for "9", "image", "text"'),
    ],
)
def test_a_bad_instruction_is_named(tmp_path, row, message):
    path = tmp_path / "query_instructions.tsv"
    path.write_text(INSTRUCTIONS + row + "\n")
    with pytest.raises(DataError, match=f"^query_instructions.tsv:4: {message}"):
        mbeir.read_instructions(path)


def test_what_could_not_be_read_back_cannot_be_made():
    for make in (
        lambda: Query("a b", "text", None, "text", (), task=0),
        lambda: Query("a", "text", None, "text", ("b c",), task=0),
        lambda: Query("a", "text", "a.jpg", "text", (), task=0),
        lambda: Candidate("a", " ", None, "text"),
        lambda: Candidate("a", "text", None, "text", source="\ud800"),
        lambda: Qrel("a", "b\n", 1, 0),
        lambda: Qrel("a", "b", 1, 5),
        lambda: Instruction("image", "text", "name", "1", ()),
        lambda: Instruction("image", "text", "name", "1", ("two\tcells",)),
        lambda: Instruction("image", "text", "name", "1", ("Find it.\n",)),
    ):
        with pytest.raises(DataError):
            make()


def test_bad_records_are_skipped_and_counted_when_asked(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join([QUERY_ROW, '{"qid": "1"}', "", QUERY_ROW, "{", QUERY_ROW[:-9]]))
    skipped = BadRecords(keep=2)
    assert list(mbeir.read_queries(path, on_bad_record="skip", skipped=skipped)) == [QUERY, QUERY]
    assert skipped.count == 3
    assert skipped.messages == [
        f"queries.jsonl:2: query_modality is missing, expected {ONE_OF}",
        "queries.jsonl:5: not JSON: Expecting property name enclosed in double quotes (column 2)",
    ]
