import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from puma_jax.data import mbeir
from puma_jax.data.builder import Settings, build
from puma_jax.data.builder.__main__ import main
from puma_jax.data.mbeir import Candidate, Query
from puma_jax.data.mbeir.records import modality_code
from puma_jax.data.prompts import normalize_text, query_text
from puma_jax.data.store import Store
from puma_jax.errors import ArtifactError, ConfigError, DataError
from tests.data import fake_mbeir
from tests.data.builds import candidates_of, files, ids, negatives, positives, queries_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny.processor


@pytest.fixture
def built(root, processor, tmp_path):
    """A function that builds with small shards and opens what it has built."""

    def run(root=root, out=tmp_path / "out", **settings) -> Store:
        build(Settings(root, out, **{"shard_items": 5, "workers": 1} | settings), processor)
        return Store.open(out)

    return run


def image_fields(root: Path, item: Query | Candidate) -> tuple[bytes | None, int, int]:
    if item.image is None:
        return None, 0, 0
    return (root / item.image).read_bytes(), 28 + 7 * int(Path(item.image).stem), 60


def test_candidates_come_back_in_the_order_of_the_pool(built, root, processor):
    stored = candidates_of(built())
    assert len(stored) == 12
    for record, candidate in zip(stored, fake_mbeir.candidates(), strict=True):
        body = processor.tokenize_text(
            normalize_text(candidate.text), image=candidate.image is not None
        )
        image, height, width = image_fields(root, candidate)
        assert (record.image, record.height, record.width) == (image, height, width)
        assert (record.id, record.modality) == (candidate.did, modality_code(candidate.modality))
        assert (tuple(record.tokens), record.text_length) == (body.tokens, body.text_length)
        assert len(record.plain_tokens) == 0


def test_queries_come_back_with_and_without_room_for_an_instruction(built, root, processor):
    stored = queries_of(built())
    assert len(stored) == 13
    for record, query in zip(stored, fake_mbeir.queries(), strict=True):
        assert (record.id, record.modality) == (query.qid, modality_code(query.modality))
        assert (record.image, record.height, record.width) == image_fields(root, query)
        with_image = query.image is not None
        instructed = processor.tokenize_text(query_text("find it", query.text), image=with_image)
        together = (*processor.tokenize_instruction("find it"), *record.tokens)
        assert together == instructed.tokens
        plain = processor.tokenize_text(query_text(None, query.text), image=with_image)
        assert tuple(record.plain_tokens) == plain.tokens


def test_the_table_holds_what_the_records_hold(built):
    store = built()
    table = store.table
    for row, record in enumerate(queries_of(store)):
        assert table.query_tokens[row] == len(record.tokens)
        assert table.query_plain_tokens[row] == len(record.plain_tokens)
        assert table.query_text_length[row] == record.text_length
        assert (table.query_height[row], table.query_width[row]) == (record.height, record.width)
    for row, record in enumerate(candidates_of(store)):
        assert table.candidate_tokens[row] == len(record.tokens)
        assert table.candidate_modality[row] == record.modality
        size = (table.candidate_height[row], table.candidate_width[row])
        assert size == (record.height, record.width)
    assert table.query_task.tolist() == [0] * 4 + [3] * 4 + [8] * 4 + [4]


def test_positives_and_negatives_are_rows_of_candidates(built):
    store = built()
    rows = {did: row for row, did in enumerate(ids(candidates_of(store)))}
    for row, query in enumerate(fake_mbeir.queries()):
        assert positives(store, row) == [rows[did] for did in query.positives if did in rows]
        assert negatives(store, row) == [rows[did] for did in query.negatives]
    assert "9:999" not in rows


def test_instructions_are_tokenized_and_queries_know_theirs(built, processor):
    store = built()
    instructions = store.instructions
    assert instructions.keys == tuple(row.key for row in fake_mbeir.INSTRUCTIONS)
    for prompts, row in zip(instructions.prompts, fake_mbeir.INSTRUCTIONS, strict=True):
        assert tuple(prompt.text for prompt in prompts) == row.prompts
        assert [prompt.tokens for prompt in prompts] == [
            *map(processor.tokenize_instruction, row.prompts)
        ]
    assert instructions.sets == ("mscoco_task0", "mscoco_task3", "oven_task8", "mine_task4")
    assert store.table.query_key.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1]
    assert store.table.query_set.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3]


def test_sets_and_pools_in_files_of_their_own_are_joined(built, tmp_path):
    store = built(fake_mbeir.write_sets(tmp_path / "sets"))
    # Files in the order of their names; a pool that nobody asks for is not built, and a document
    # that is in two pools is built once.
    assert store.instructions.sets == ("coco_task0", "coco_task3", "mine_task4", "oven_task8")
    stored = ids(candidates_of(store))
    assert stored[:4] == ["9:0", "9:3", "9:6", "9:9"]
    assert sorted(stored) == sorted(row.did for row in fake_mbeir.candidates())
    for row, record in enumerate(queries_of(store)):
        (query,) = (query for query in fake_mbeir.queries() if query.qid == record.id)
        named = [did for did in query.positives if did != "9:999"]
        assert [stored[positive] for positive in positives(store, row)] == named


@pytest.mark.parametrize("write", [fake_mbeir.write_union, fake_mbeir.write_sets])
def test_chosen_sets_are_built_alone_with_what_they_name(built, tmp_path, write):
    store = built(write(tmp_path / "mbeir"), sets=("mine", "oven_task8"))
    assert {record.id.partition(":")[0] for record in queries_of(store)} == {"mine", "5"}
    assert sorted(ids(candidates_of(store))) == ["5:2", "5:5", "9:3", "9:4"]
    assert set(store.instructions.sets) == {"mine_task4", "oven_task8"}


def test_a_set_that_is_not_there_is_an_error(built):
    message = (
        r'sets: no training query is of "nights"; there are '
        r"mine_task4, mscoco_task0, mscoco_task3, oven_task8"
    )
    with pytest.raises(DataError, match=message):
        built(sets=("mine", "nights"))


def test_images_can_stay_where_they_are(built, root):
    store = built(images="path")
    record = store.candidate(0)
    assert record.image == fake_mbeir.image_path(0)
    inline = built(out=Path(store.path).with_name("inline"))
    for here, there in zip(candidates_of(store), candidates_of(inline), strict=True):
        if here.image is not None:
            np.testing.assert_array_equal(store.image(here), inline.image(there))
    # The benchmark may have moved since.
    moved = Store.open(store.path, root=root)
    np.testing.assert_array_equal(moved.image(record), store.image(record))


READ_WITH_TFDS = """
import sys, warnings
warnings.simplefilter("error")
import puma_jax.data.store
heavy = {"tensorflow_datasets", "array_record", "tensorflow", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)

import tensorflow_datasets as tfds
for table in ("queries", "candidates"):
    source = tfds.builder_from_directory(f"{sys.argv[1]}/{table}").as_data_source("train")
    for row in range(len(source)):
        record = source[row]
        tokens = record["tokens"].tolist() + record.get("plain_tokens", record["tokens"]).tolist()
        print(record["id"].decode(), len(record["image"]), record["width"], sum(tokens))
assert not {"tensorflow", "torch"} & set(sys.modules)
"""


def test_tfds_reads_both_tables_without_tensorflow(built):
    store = built()
    command = [sys.executable, "-c", READ_WITH_TFDS, store.path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = []
    for record in queries_of(store) + candidates_of(store):
        others = record.plain_tokens if len(record.plain_tokens) else record.tokens
        tokens = sum(record.tokens) + sum(others)
        expected.append(f"{record.id} {len(record.image or b'')} {record.width} {tokens}")
    assert result.stdout.splitlines() == expected


def test_a_build_goes_on_where_it_was_stopped(built):
    store = built()
    whole = files(Path(store.path))
    lost = [
        "candidates/candidates-train.array_record-00001-of-00003",
        "parts/queries-00002-of-00003.npz",
        "table/query_key.npy",
        "instructions.json",
    ]
    for name in lost:
        (Path(store.path) / name).unlink()
    half = ".queries-train.array_record-0.0123456789abcdef.partial"
    (Path(store.path) / "queries" / half).write_bytes(b"half")
    kept = Path(store.path) / "candidates/candidates-train.array_record-00000-of-00003"
    before = kept.stat().st_mtime_ns
    built()
    assert files(Path(store.path)) == whole
    assert kept.stat().st_mtime_ns == before


KILLED = """
import os, signal, sys
from pathlib import Path
from puma_jax.data.builder import Settings, shards
from puma_jax.data.builder.__main__ import main

written, to_example = [], shards.to_example
def kill_at_the_eighth(record):
    written.append(record)
    if len(written) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return to_example(record)
shards.to_example = kill_at_the_eighth

root, out, model = map(Path, sys.argv[1:])
main(model, Settings(root, out, shard_items=5, workers=1))
"""


def test_a_killed_build_ends_with_the_same_bytes(built, root, tiny, tmp_path):
    expected = built(out=tmp_path / "expected")
    arguments = [str(path) for path in (root, tmp_path / "out", tiny.folder)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out/candidates").glob("candidates-*"))) == 1
    with pytest.raises(DataError, match="holds no finished build: run python"):
        Store.open(tmp_path / "out")
    assert files(Path(built().path)) == files(Path(expected.path))


def test_the_number_of_workers_changes_no_byte(built, tmp_path):
    one, two = built(), built(out=tmp_path / "two", workers=2)
    assert files(Path(one.path)) == files(Path(two.path))


def with_bad_records(root: Path) -> Path:
    """Write a benchmark with one bad record of each kind."""
    fake_mbeir.write_union(root)
    (root / fake_mbeir.image_path(0)).write_bytes(b"GIF8 no, not really")
    (root / fake_mbeir.image_path(3)).unlink()
    pool = root / fake_mbeir.UNION_POOL
    quotes = {"did": "9:50", "modality": "text", "txt": '""'}
    again = {"did": "9:1", "modality": "text", "txt": "a caption again"}
    with open(pool, "a", encoding="utf-8") as file:
        file.write(f"{json.dumps(quotes)}\n{json.dumps(again)}\nno json\n")
    rows = fake_mbeir.queries()
    lonely = [
        Query("9:60", "for nothing", None, "text", (), 0),
        Query("9:61", "for what nobody has", None, "text", ("9:999",), 0),
        Query("9:62", "for what is bad", None, "text", ("9:50", "9:0"), 0),
        Query("9:63", "QUOTES", None, "text", ("9:1",), 0),
    ]
    file_of_queries = root / fake_mbeir.UNION_QUERIES
    mbeir.write_queries(file_of_queries, [*lonely, *rows])
    file_of_queries.write_text(file_of_queries.read_text().replace('"QUOTES"', r'"\"\""'))
    return root


def test_bad_records_are_skipped_and_counted(built, processor, tmp_path):
    root = with_bad_records(tmp_path / "bad")
    settings = Settings(root, tmp_path / "out", shard_items=5, workers=1, on_bad_record="skip")
    summary = build(settings, processor)
    store = Store.open(settings.out)
    bad = {0, 3, 4, 7, 8, 11} - {4, 7}  # of the images 0 and 3; 4 and 7 are texts
    expected = [row.did for n, row in enumerate(fake_mbeir.candidates()) if n not in bad]
    assert ids(candidates_of(store)) == expected
    for row, record in enumerate(queries_of(store)):
        (query,) = (query for query in fake_mbeir.queries() if query.qid == record.id)
        named = [did for did in query.positives if did in expected]
        assert named
        assert [expected[positive] for positive in positives(store, row)] == named
    messages = "\n".join(summary.skipped.messages)
    assert "train.jsonl:1: pos_cand_list is empty, but training needs a positive" in messages
    twice = 'did "9:1" is another document in mbeir_union_train_cand_pool.jsonl:2: give every'
    assert f"cand_pool.jsonl:14: {twice}" in messages
    assert "cand_pool.jsonl:15: not JSON" in messages
    assert f"cand_pool.jsonl:1: img_path {fake_mbeir.image_path(0)} cannot be decoded" in messages
    assert f"img_path {fake_mbeir.image_path(3)} does not exist" in messages
    assert 'cand_pool.jsonl:13: txt is "\\"\\"", which leaves no text' in messages
    again = build(settings, processor)
    assert (again.skipped.count, again.skipped.messages) == (
        summary.skipped.count,
        summary.skipped.messages,
    )
    lost = len(fake_mbeir.queries()) + 4 - summary.queries + 15 - summary.candidates
    assert summary.skipped.count == lost
    # What was skipped once is not forgotten by a run that would not have skipped it.
    with pytest.raises(DataError, match=r"train.jsonl:1: pos_cand_list is empty"):
        build(dataclasses.replace(settings, on_bad_record="error"), processor)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_stops_the_build_and_is_named(built, tmp_path, workers):
    root = fake_mbeir.write_union(tmp_path / "bad")
    (root / fake_mbeir.image_path(2)).unlink()
    with pytest.raises(DataError, match=r"cand_pool.jsonl:3: img_path mbeir_images/2.png does not"):
        built(root, workers=workers)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_an_image_too_elongated_or_too_large_is_a_bad_record(built, tmp_path):
    from PIL import Image

    root = fake_mbeir.write_union(tmp_path / "bad")
    Image.new("1", (2, 900)).save(root / fake_mbeir.image_path(0))
    with pytest.raises(DataError, match=r"jsonl:1: img_path .*image of 2 × 900 pixels is too elon"):
        built(root)
    Image.new("1", (10_000, 10_000)).save(root / fake_mbeir.image_path(0))
    with pytest.raises(DataError, match=r"cand_pool.jsonl:1: img_path .* exceeds limit"):
        built(root)


def test_sizes_are_those_of_upright_images(built, tmp_path):
    from PIL import Image

    root = fake_mbeir.write_union(tmp_path / "turned")
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (60, 90))
    image.save(root / fake_mbeir.image_path(0), "PNG", exif=exif)
    store = built(root)
    record = store.candidate(0)
    assert (record.height, record.width) == (60, 90)
    assert store.image(record).size == (90, 60)


def test_a_benchmark_without_a_way_to_train_is_refused(built, tmp_path):
    root = fake_mbeir.write_union(tmp_path / "pool")
    (root / fake_mbeir.UNION_QUERIES).unlink()
    (root / "cand_pool/local").mkdir()
    mbeir.write_candidates(root / "cand_pool/local/mbeir_own_task1_cand_pool.jsonl", [])
    with pytest.raises(DataError, match="has no training queries: there is neither query/union"):
        built(root)
    mbeir.write_queries(root / fake_mbeir.UNION_QUERIES, [])
    with pytest.raises(DataError, match=r"up_train.jsonl: there is no training query"):
        built(root)
    (root / fake_mbeir.UNION_POOL).unlink()
    (root / "cand_pool/local/mbeir_own_task1_cand_pool.jsonl").unlink()
    with pytest.raises(DataError, match="has no pool of documents"):
        built(root)


def test_queries_none_of_which_can_be_answered_are_no_data(built, tmp_path):
    root = fake_mbeir.write_union(tmp_path / "pool")
    mbeir.write_candidates(root / fake_mbeir.UNION_POOL, [Candidate("7:1", "else", None, "text")])
    with pytest.raises(DataError, match="no queries are left to train on"):
        built(root, on_bad_record="skip")


def test_another_build_is_not_overwritten(built, tmp_path):
    store = built()
    with pytest.raises(ArtifactError, match='differs in images \\("inline" there, "path" here'):
        built(images="path")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="own is not empty and holds no training data: choose"):
        built(out=tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["thesis.txt"]
    (Path(store.path) / "build.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"holds training data of another job, which differs"):
        built()


def test_settings_that_cannot_be_built_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="shard_items 0 must be "):
        Settings(tmp_path, tmp_path, shard_items=0)
    with pytest.raises(ConfigError, match="out gs:/bucket/data is not a local folder"):
        Settings(tmp_path, Path("gs://bucket/data"))


def test_the_command_says_what_it_has_built_and_where(root, tiny, tmp_path, capsys):
    long = tmp_path / "long"
    fake_mbeir.write_union(long)
    rows = [Candidate("9:0", "x" * 600, None, "text"), *fake_mbeir.candidates()[1:]]
    mbeir.write_candidates(long / fake_mbeir.UNION_POOL, rows)
    *queries, query, last = fake_mbeir.queries()
    query = dataclasses.replace(query, negatives=("5:5", "9:none"))
    mbeir.write_queries(long / fake_mbeir.UNION_QUERIES, [*queries, query, last])
    with open(long / fake_mbeir.UNION_POOL, "a", encoding="utf-8") as file:
        file.write("{}\n")
    main(tiny.folder, Settings(long, tmp_path / "out", on_bad_record="skip"))
    assert capsys.readouterr().out == (
        "1 bad records were skipped, the first of them:\n"
        "  mbeir_union_train_cand_pool.jsonl:13: did is missing, expected an id\n"
        "1 texts fill the limit of 450 tokens at which text is truncated\n"
        "neg_cand_list of 4 training queries holds 7 ids: stages with "
        "plan.hard_negatives draw hard negatives from them\n"
        "1 ids of neg_cand_list are of no candidate and are left out\n"
        "13 queries of mscoco_task0, mscoco_task3, oven_task8, mine_task4\n"
        f"and 12 candidates are in {tmp_path / 'out'}\n"
    )
    main(tiny.folder, Settings(long, tmp_path / "out", on_bad_record="skip"))
    assert "\nNothing to do: it is already built.\n13 queries of " in capsys.readouterr().out


KILLED_WITH_WORKERS = """
import multiprocessing, os, signal, sys
from pathlib import Path
from puma_jax.data.builder import Settings, build
from puma_jax.data.builder.__main__ import main
from puma_jax.progress import Progress

def kill_when_working(*_):
    if workers := multiprocessing.active_children():
        Path(sys.argv[4]).write_text(" ".join(str(worker.pid) for worker in workers))
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    Progress.update = kill_when_working
    root, out, model = map(Path, sys.argv[1:4])
    main(model, Settings(root, out, shard_items=2, workers=2))
"""


def test_a_worker_does_not_outlive_a_killed_build(root, tiny, tmp_path):
    script = tmp_path / "build.py"
    script.write_text(KILLED_WITH_WORKERS)
    pids = tmp_path / "pids"
    # No pipes: a worker that lives on would keep them open, and the test waiting.
    killed = subprocess.run(
        [sys.executable, script, root, tmp_path / "out", tiny.folder, pids],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in pids.read_text().split()]
    assert workers
    for _ in range(100):
        workers = [pid for pid in workers if runs(pid)]
        time.sleep(0.1 if workers else 0)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert not workers


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait to be collected, and does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
