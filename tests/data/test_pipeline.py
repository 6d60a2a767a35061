"""The pipeline: every batch byte for byte the same, whoever makes it, and just what was planned."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from puma_jax.config import ImageConfig, PlanConfig
from puma_jax.data import image_workers, mbeir
from puma_jax.data.builder import Settings, build
from puma_jax.data.images import open_image, patchify
from puma_jax.data.mbeir import Candidate, Instruction, Query
from puma_jax.data.pipeline import Loader, batches, prefetch_to_device, with_counters
from puma_jax.data.plan import Plan
from puma_jax.data.prompts import Processor, normalize_text, query_text
from puma_jax.data.store import Store
from puma_jax.errors import ConfigError, DataError
from puma_jax.model import encoder
from puma_jax.rows import PackedBatch
from tests.data.test_image_workers import started
from tests.reference import FLOAT32, byte_tokenizer, random_image

INSTRUCTION = Instruction("image,text", "text", "mine", "m", ("find the text", "Which text is it?"))
CHUNKS, GROUPS = 2, 4


def scores_of(query):
    """A teacher's scores of what a query names, but for one document that has none."""
    named = [did for did in (*query.positives, *query.negatives) if did != "c:1"]
    return {did: len(query.qid) / 8 - int(did[2:]) / 4 for did in named}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """60 queries of image and text for 40 texts, and 20 queries of text for 20 images.

    The former have one to five hard negatives, an image among them.
    """
    root = tmp_path_factory.mktemp("mbeir")
    (root / "images").mkdir()
    for number in range(20):
        random_image(40 + 5 * number, 90, number).save(root / f"images/{number}.png")
    image = [f"images/{number}.png" for number in range(20)]
    queries = [
        Query(
            f"m:{n}",
            f"text {n}",
            image[n % 20],
            "image,text",
            (f"c:{n % 40}", "c:1"),
            6,
            (*(f"c:{(n + 2 + k) % 40}" for k in range(n % 5)), f"i:{(n + 3) % 20}"),
        )
        for n in range(60)
    ] + [Query(f"t:{n}", "words " * n + "end", None, "text", (f"i:{n}",), 0) for n in range(20)]
    candidates = [Candidate(f"c:{n}", f"candidate {n}", None, "text") for n in range(40)]
    candidates += [Candidate(f"i:{n}", None, image[n], "image") for n in range(20)]
    queries = [
        dataclasses.replace(query, scores=tuple(scores_of(query).items())) for query in queries
    ]
    mbeir.write_queries(root / "query/union_train/mbeir_union_up_train.jsonl", queries)
    pool = "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
    mbeir.write_candidates(root / pool, candidates)
    mbeir.write_instructions(root / "instructions/query_instructions.tsv", [INSTRUCTION])
    return root


@pytest.fixture(scope="module")
def config(tiny):
    return dataclasses.replace(tiny.config, images=ImageConfig(4 * 28**2, 9 * 28**2))


@pytest.fixture(scope="module")
def processor(config):
    return Processor(byte_tokenizer(), config)


@pytest.fixture(scope="module")
def store(root, processor, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data"
    build(Settings(root=root, out=out, workers=1), processor)
    return Store.open(out)


@pytest.fixture(scope="module", params=[0, 3], ids=["no negatives", "3 negatives"])
def plan(request, store, processor):
    return Plan(
        store.table,
        store.instructions,
        processor.template,
        PlanConfig(batch_size=16, balance_window=4, hard_negatives=request.param),
    )


@pytest.fixture(scope="module")
def shape(plan):
    return plan.fitting_shape(CHUNKS, GROUPS)


@pytest.fixture(scope="module")
def loader(store, plan, shape):
    return Loader(store, plan, shape, CHUNKS)


@pytest.fixture(scope="module")
def expected(loader):
    """Six batches, made one by one."""
    return [loader(step) for step in range(6)]


def assert_same(first, second):
    ours, theirs = (jax.tree.leaves(batch) for batch in (first, second))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def processes():
    with contextlib.closing(started(2)) as pool:
        yield pool


def test_processes_that_read_images_change_nothing(loader, expected, processes, monkeypatch):
    begin, groups = processes.begin, []
    monkeypatch.setattr(
        processes, "begin", lambda *group: groups.append(begin(*group)) or groups[-1]
    )
    monkeypatch.setattr(image_workers, "_pool", processes)
    for made, alone in zip(batches(loader, 0, 2), expected[:2], strict=True):
        assert_same(made, alone)
    assert sum(len(group.members) for group in groups) > 10


def test_a_reader_that_stops_early_leaves_no_work_behind(loader):
    begun = []

    def slow(step):
        begun.append(step)
        return loader(step)

    made = batches(slow, 0, 1000, ahead=2)
    next(made)
    made.close()
    assert max(begun) <= 3  # the first, two ahead of it, and none after them


@pytest.mark.parametrize("start", [1, 3, 5])
def test_resuming_at_any_step_changes_nothing(loader, expected, start):
    for made, alone in zip(batches(loader, start, 6), expected[start:], strict=True):
        assert_same(made, alone)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_what_one_would(store, plan, shape, expected, hosts):
    for step in (0, 4):
        parts = [
            Loader(store, plan, shape, CHUNKS, host=host, hosts=hosts)(step)
            for host in range(hosts)
        ]
        whole = expected[step]
        rows = jax.tree.map(lambda *parts: np.concatenate(parts, 1), *[part.rows for part in parts])
        assert_same(rows, whole.rows)
        for part in parts:
            assert_same(dataclasses.replace(part, rows=whole.rows), whole)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_agree_on_the_chunks_of_a_batch_that_does_not_fit(store, plan, shape, hosts):
    one_item_a_device = dataclasses.replace(shape, slots=GROUPS)
    whole = Loader(store, plan, one_item_a_device, CHUNKS)(3)
    items = 2 * 16 + (plan.pairs(3).negative >= 0).sum()
    assert len(whole.rows.tokens) == -(-items // GROUPS) > CHUNKS
    parts = [
        Loader(store, plan, one_item_a_device, CHUNKS, host=host, hosts=hosts)(3)
        for host in range(hosts)
    ]
    rows = jax.tree.map(lambda *parts: np.concatenate(parts, 1), *[part.rows for part in parts])
    assert_same(dataclasses.replace(parts[0], rows=rows), whole)


def test_groups_that_do_not_divide_among_hosts_are_refused(store, plan, shape):
    with pytest.raises(ConfigError, match="4 data shards do not divide among 3 hosts"):
        Loader(store, plan, shape, CHUNKS, host=0, hosts=3)


def test_a_batch_holds_the_items_that_were_planned(
    root, loader, plan, shape, expected, processor, tiny, config
):
    """Read back through the model: each slot's vector is that of the item made from the files."""
    queries = list(mbeir.read_queries(root / "query/union_train/mbeir_union_up_train.jsonl"))
    pool = root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
    candidates = list(mbeir.read_candidates(pool))
    batch, pairs = expected[2], plan.pairs(2)
    run = jax.jit(encoder.encode, static_argnames=("compute", "data_shards"))
    states = np.concatenate(
        [
            run(
                tiny.params,
                jax.tree.map(lambda a, c=c: jax.numpy.asarray(a[c]), batch.rows),
                FLOAT32,
                data_shards=GROUPS,
            )
            for c in range(CHUNKS)
        ]
    )

    def alone(text, image):
        images = [open_image(root / image)] if image else []
        cut = [patchify(one, config.vision, config.images) for one in images]
        item = processor.item(text, cut)
        return tiny.expected(item)

    for number in (0, 5, 11, 15):
        query = queries[pairs.query[number]]
        candidate = candidates[pairs.candidate[number]]
        assert candidate.did in query.positives
        instruction = None if query.task == 0 else INSTRUCTION.prompts[pairs.prompt[number]]
        found = states[batch.query_slot[number]]
        theirs = alone(query_text(instruction, query.text), query.image)
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)
        found = states[batch.candidate_slot[number]]
        theirs = alone(normalize_text(candidate.text), candidate.image)
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)
        assert batch.modality[number] == mbeir.modality_code(candidate.modality)
        if batch.scores is not None:
            known = scores_of(query).get(candidate.did, np.nan)
            np.testing.assert_equal(batch.scores.positive[number], known)
        for place, row in enumerate(pairs.negative[number]):
            assert batch.negatives.valid[number, place] == (row >= 0)
            if row < 0:
                assert batch.negatives.slot[number, place] == -1
                assert np.isnan(batch.scores.negative[number, place])
                continue
            negative = candidates[row]
            assert negative.did in query.negatives
            known = scores_of(query).get(negative.did, np.nan)
            np.testing.assert_equal(batch.scores.negative[number, place], known)
            found = states[batch.negatives.slot[number, place]]
            theirs = alone(normalize_text(negative.text), negative.image)
            np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)
            kind = mbeir.modality_code(negative.modality)
            assert batch.negatives.modality[number, place] == kind
            assert batch.negatives.document[number, place] == plan.table.candidate_content[row]


def test_transfers_run_ahead_and_nothing_is_lost_or_reordered(expected):
    started = []

    def put(batch):
        started.append(len(started))
        return len(started)

    for number, (batch, token) in enumerate(prefetch_to_device(iter(expected), put, ahead=2)):
        assert batch is expected[number]
        assert token == number + 1
        assert len(started) == min(number + 3, 6)


def test_counters_say_how_full_the_rows_are(loader, plan, shape):
    pairs = list(with_counters(batches(loader, 0, 3), lambda batch: batch))
    assert len(pairs) == 3
    for step, (_, counters) in enumerate(pairs):
        made = plan.step(step, shape, CHUNKS)
        room = CHUNKS * shape.rows * shape.length
        assert counters.useful_tokens == pytest.approx(made.lengths.sum() / room)
        assert 0 < counters.useful_patches <= 1
        assert counters.pairs_per_second > 0
        assert counters.blank_images == 0
        assert counters.missing_negatives == (made.pairs.negative < 0).sum()


def test_an_image_that_cannot_be_decoded_stops_the_run_or_is_left_blank(
    root, processor, plan, shape, tmp_path
):
    import shutil

    copy = shutil.copytree(root, tmp_path / "mbeir")
    build(Settings(root=copy, out=tmp_path / "data", images="path", workers=1), processor)
    store = Store.open(tmp_path / "data")
    path = copy / "images/3.png"
    path.write_bytes(path.read_bytes()[:200])
    steps = range(plan.steps_per_epoch)
    loader = Loader(store, plan, shape, CHUNKS)
    with pytest.raises(DataError, match=r"\(images/3.png\): .*/3.png cannot be decoded"):
        list(map(loader, steps))
    skipping = Loader(store, plan, shape, CHUNKS, on_bad_record="skip")
    blank = [skipping(step) for step in steps]
    bad = sum(int((~batch.valid).sum()) for batch in blank)
    assert bad >= 1
    for batch in blank:
        queries = np.array([int(q) % 20 == 3 and q < 60 for q in batch.query])
        candidates = np.array([c == 43 for c in batch.candidate])
        np.testing.assert_array_equal(~batch.valid, queries | candidates)
    if blank[0].negatives is not None:
        rows = [plan.pairs(step).negative for step in steps]
        assert any((of_step == 43).any() for of_step in rows)
        for batch, of_step in zip(blank, rows, strict=True):
            there = (of_step >= 0) & (of_step != 43)
            np.testing.assert_array_equal(batch.negatives.valid, there)


def test_data_that_changed_since_it_was_built_is_found(root, processor, plan, shape, tmp_path):
    import shutil

    copy = shutil.copytree(root, tmp_path / "mbeir")
    build(Settings(root=copy, out=tmp_path / "data", images="path", workers=1), processor)
    random_image(300, 40).save(copy / "images/3.png")
    store = Store.open(tmp_path / "data")
    loader = Loader(store, plan, shape, CHUNKS)
    with pytest.raises(DataError, match=r"the plan has .* build the data again"):
        list(map(loader, range(plan.steps_per_epoch)))


def test_rows_of_a_batch_are_plain_numpy(expected):
    assert isinstance(expected[0].rows, PackedBatch)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(expected[0]))
