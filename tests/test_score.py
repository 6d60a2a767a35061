"""`python -m puma_jax.score`: what a teacher says of each document, kept through a kill."""

import json

import numpy as np
import pytest

from puma_jax import Embedder, Reranker, score
from puma_jax.data import mbeir
from puma_jax.data.builder.build import Settings, build
from puma_jax.data.store import Store
from puma_jax.errors import ConfigError, DataError, ImageError
from puma_jax.evaluation import scoring
from puma_jax.evaluation.selection import query_item
from puma_jax.search.corpus import raw_item
from tests import reference
from tests.data import fake_mbeir

QUERIES = fake_mbeir.UNION_QUERIES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reranker") / "Qwen3-VL-Reranker-tiny"
    reference.save_reranker(folder, tie=True)
    return folder


@pytest.fixture(scope="module")
def scored(tiny, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "out"
    score.main(root, out, model=str(tiny.folder), dtype="float32")
    return out


def items(root, query):
    """The item of a query, and those of the documents it names that there are."""
    benchmark = mbeir.discover(root)
    instructions = mbeir.read_instructions(benchmark.instructions)
    pool = {row.did: row for row in fake_mbeir.candidates()}
    named = [did for did in (*query.positives, *query.negatives) if did in pool]
    documents = {did: raw_item(root, pool[did].text, pool[did].image) for did in named}
    return query_item(root, query, instructions), documents


def test_an_embedders_scores_are_the_cosines_of_its_vectors(tiny, root, scored):
    assert mbeir.validate(scored).sound
    embedder = Embedder.load(tiny.folder, dtype="float32")
    for query in list(mbeir.read_queries(scored / QUERIES))[::4]:
        asked, documents = items(root, query)
        vectors = embedder.encode([asked, *documents.values()])
        assert list(dict(query.scores)) == list(documents)
        expected = vectors[1:] @ vectors[0]
        np.testing.assert_allclose([s for _, s in query.scores], expected, rtol=0, atol=1e-5)
    assert json.loads((scored / score.MANIFEST).read_text())["fingerprint"] == embedder.fingerprint


def test_training_data_have_the_scores_of_what_queries_name(tiny, scored, tmp_path):
    build(Settings(scored, tmp_path / "built", workers=1), tiny.processor)
    store = Store.open(tmp_path / "built")
    table, queries = store.table, {q.qid: q for q in mbeir.read_queries(scored / QUERIES)}
    for row in range(len(table.query_tokens)):
        scores = dict(queries[store.query(row).id].scores)
        for kind in ("positive", "negative"):
            own = slice(*getattr(table, f"{kind}_start")[row : row + 2])
            dids = [store.candidate(r).id for r in getattr(table, f"{kind}_row")[own]]
            found = getattr(table, f"{kind}_score")[own]
            np.testing.assert_array_equal(found, np.float32([scores[did] for did in dids]))


def test_a_rerankers_scores_are_logits_and_a_rerun_resumes(
    root, reranker, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(scoring, "_PAIRS_AT_ONCE", 8)
    out, work = tmp_path / "out", tmp_path / "work"
    whole, parts = Reranker.logits, []

    def stopped(self, pairs, **given):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(None)
        return whole(self, pairs, **given)

    given = {"reranker": str(reranker), "dtype": "float32", "vectors_dir": work}
    monkeypatch.setattr(Reranker, "logits", stopped)
    with pytest.raises(KeyboardInterrupt):
        score.main(root, out, **given)
    assert not out.exists()
    monkeypatch.setattr(Reranker, "logits", whole)
    score.main(root, out, **given)
    said = capsys.readouterr().out
    assert "16 results are those of an interrupted run" in said
    assert "ids of positives and negatives are of no document" in said
    assert not list(work.rglob("*.npy"))
    teacher = Reranker.load(reranker, dtype="float32")
    for query in list(mbeir.read_queries(out / QUERIES))[::6]:
        asked, documents = items(root, query)
        probabilities = teacher.score(asked, documents.values())
        found = np.array([value for _, value in query.scores])
        np.testing.assert_allclose(1 / (1 + np.exp(-found)), probabilities, rtol=0, atol=1e-5)


def test_a_picture_that_cannot_be_read_is_an_error_or_has_no_score(
    root, reranker, tmp_path, monkeypatch, capsys
):
    async def broken(self, pair, instruction=None):
        if "image" in pair[1]:
            raise ImageError("damaged")
        return await preparing(self, pair, instruction)

    preparing = Reranker.preparing
    monkeypatch.setattr(Reranker, "preparing", broken)
    given = {"reranker": str(reranker), "dtype": "float32"}
    with pytest.raises(DataError, match=r'jsonl:\d+: query ".*": document ".*": damaged'):
        score.main(root, tmp_path / "error", **given)
    score.main(root, tmp_path / "out", on_bad_record="skip", **given)
    assert "documents have none, because they or their query" in capsys.readouterr().out
    kinds = {row.did: row.modality for row in fake_mbeir.candidates()}
    for query in mbeir.read_queries(tmp_path / "out" / QUERIES):
        assert {kinds[did] for did, _ in query.scores} <= {"text"}


def test_exactly_one_teacher_is_asked_for(tmp_path):
    for both in ({}, {"model": "a", "reranker": "b"}):
        with pytest.raises(ConfigError, match="give --model or --reranker"):
            score.main(tmp_path, tmp_path / "out", **both)
