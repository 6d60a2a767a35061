"""Mining: the documents that a brute-force search ranks there, none of them a known answer."""

import dataclasses

import faiss
import numpy as np
import pytest

from puma_jax.data import mbeir
from puma_jax.data.mbeir import Candidate, Qrel, Query
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation.mining import MiningConfig, mine
from puma_jax.evaluation.training_set import read_training_set
from puma_jax.evaluation.vector_folder import VectorFolder

QUERIES, DOCUMENTS, WIDTH = 300, 2000, 24
TRAIN = "query/train/mbeir_mine_train.jsonl"
POOL = "cand_pool/local/mbeir_mine_task1_cand_pool.jsonl"
LOOSE = MiningConfig(ranks=(1, 60), negatives=60, margin=1.0)


def units(seed: int, n: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


QUERY_VECTORS, DOCUMENT_VECTORS = units(0, QUERIES), units(1, DOCUMENTS)
# A document close to each query answers it.
DOCUMENT_VECTORS[:QUERIES] = QUERY_VECTORS + 0.6 * units(2, QUERIES)
DOCUMENT_VECTORS /= np.linalg.norm(DOCUMENT_VECTORS, axis=1, keepdims=True)


def encode(items):
    """The random vector of the number that ends a text."""
    vectors = {"query": QUERY_VECTORS, "document": DOCUMENT_VECTORS}
    words = [item["text"].replace('"', "").rstrip(".").split() for item in items]
    return np.array([vectors[kind.lower()][int(number)] for kind, number, *_ in words])


def write(root, queries, documents, judgments=()):
    mbeir.write_queries(root / TRAIN, queries)
    mbeir.write_candidates(root / POOL, documents)
    if judgments:
        mbeir.write_qrels(root / "qrels/train/mbeir_mine_train_qrels.txt", judgments)
    return root


def query(number: int, *positives: str) -> Query:
    return Query(f"q:{number}", f"query {number}", None, "text", positives, 1)


def document(number: int, did: str | None = None) -> Candidate:
    return Candidate(did or f"d:{number}", f"document {number}", None, "text")


def mined(root, config, **settings):
    """The ids of the negatives of each query, and the result."""
    data = read_training_set(mbeir.discover(root))
    found = mine(data, encode, config, progress=False, **settings)
    return [[data.dids[row] for row in rows[rows >= 0]] for rows in found.rows], found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    queries = [query(n, f"d:{n}", f"d:{(n + 7) % QUERIES}") for n in range(QUERIES)]
    documents = [document(n) for n in range(DOCUMENTS)]
    return write(tmp_path_factory.mktemp("mine"), queries, documents)


@pytest.mark.parametrize("margin", [0.95, 1.0, 0.0])
@pytest.mark.parametrize(("ranks", "count"), [((1, 5), 5), ((10, 100), 8), ((3, 40), 100)])
def test_negatives_are_those_of_a_brute_force_search(root, ranks, count, margin):
    index = faiss.IndexFlatIP(WIDTH)
    index.add(DOCUMENT_VECTORS)
    scores, ranked = index.search(QUERY_VECTORS, DOCUMENTS)
    found, result = mined(root, MiningConfig(ranks, count, margin))
    too_close = 0
    for n in range(QUERIES):
        answers = {n, (n + 7) % QUERIES}
        lowest = min(float(scores[n, ranked[n] == answer][0]) for answer in answers)
        others = [
            (row, score)
            for row, score in zip(ranked[n].tolist(), scores[n].tolist(), strict=True)
            if row not in answers
        ][ranks[0] - 1 : ranks[1]]
        limit = lowest - (1 - margin) * abs(lowest)
        expected = [f"d:{row}" for row, score in others if score <= limit]
        too_close += len(others) - len(expected)
        assert found[n] == expected[:count], n
    assert result.too_close == too_close


def test_what_is_known_to_answer_is_left_out_by_id_content_and_judgment(tmp_path):
    """Planted false negatives: copies of an answer, other queries of the id, qrels, the query."""
    copies = [document(0, f"copy:{n}") for n in range(3)]
    own = Candidate("self", '"query 0"', None, "text")
    documents = [*(document(n) for n in range(50)), *copies, own]
    queries = [query(0, "d:0"), query(0, "d:1"), query(2, "d:2")]
    # At a margin of 1, a copy may be taken, and what scores less than the first answer.
    assert scores_of(0)[0] > max(scores_of(0)[1:3])
    without = write(tmp_path / "without", [query(0, "d:0"), queries[2]], documents[:50])
    assert {"d:1", "d:2"} <= {*mined(without, LOOSE)[0][0]}
    root = write(tmp_path / "with", queries, documents, [Qrel("q:0", "d:2", 1, 1)])
    found, _ = mined(root, LOOSE)
    planted = {"d:0", "d:1", "d:2", "self", *(candidate.did for candidate in copies)}
    assert found[0] == found[1]
    assert found[0]
    assert not planted & {*found[0]}
    # For another query they are documents like others, each content once.
    assert len(set(found[2])) == len(found[2]) > 20
    assert not {candidate.did for candidate in copies} & {*found[2]}
    data = read_training_set(mbeir.discover(root))
    known = data.known.take(np.array([0, 2]))
    dids = [data.dids[row] for row in known.values]
    assert dids == ["d:0", "d:1", "d:2", "self", "d:2"]


def scores_of(number: int) -> list[float]:
    return (DOCUMENT_VECTORS @ QUERY_VECTORS[number]).tolist()


def test_shares_of_modalities_are_kept_and_fewer_are_taken_where_there_are_few(tmp_path):
    texts = [document(n) for n in range(60)]
    images = [Candidate(f"i:{n}", f"document {n}", f"{n}.png", "image,text") for n in range(60, 63)]
    (tmp_path / "images").mkdir()
    for candidate in images:
        (tmp_path / candidate.image).write_bytes(b"")
    root = write(tmp_path, [query(n, f"d:{n}") for n in range(20)], [*texts, *images])
    config = MiningConfig(ranks=(1, 100), negatives=8, margin=1.0, same_modality=0.75)
    for dids in mined(root, config)[0]:
        assert sum(did.startswith("d:") for did in dids) <= 6
        assert sum(did.startswith("i:") for did in dids) <= 2
    for share, kind in ((1.0, "d:"), (0.0, "i:")):
        found, _ = mined(root, dataclasses.replace(config, same_modality=share))
        assert all(did.startswith(kind) for dids in found for did in dids)
        assert any(found)


def test_queries_whose_answers_are_in_no_pool_have_none_and_are_counted(tmp_path):
    root = write(tmp_path, [query(0, "d:0"), query(1, "gone")], [document(n) for n in range(20)])
    found, result = mined(root, LOOSE)
    assert found[0]
    assert not found[1]
    assert result.unanswered == 1


def test_pools_without_an_answer_are_not_searched(tmp_path):
    root = write(tmp_path, [query(0, "d:0")], [document(n) for n in range(20)])
    other = root / "cand_pool/local/mbeir_other_task1_cand_pool.jsonl"
    mbeir.write_candidates(other, [document(n) for n in range(100, 900)])
    found, _ = mined(root, LOOSE)
    assert all(int(did.removeprefix("d:")) < 20 for did in found[0])
    assert read_training_set(mbeir.discover(root)).unused_pools == (other,)


def test_blocks_and_vectors_on_disk_change_nothing(root, tmp_path, monkeypatch):
    config = MiningConfig((2, 30), 10)
    expected = mined(root, config)[0]
    monkeypatch.setattr("puma_jax.evaluation.mining._QUERIES_AT_ONCE", 7)
    monkeypatch.setattr("puma_jax.evaluation.mining._TILE", 100)
    monkeypatch.setattr("puma_jax.evaluation.encoding._ITEMS_AT_ONCE", 64)
    assert mined(root, config, vectors=VectorFolder(tmp_path))[0] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": (5, 4)}, r"mining\.ranks \(5, 4\) must be a first and a last rank"),
        ({"ranks": (0, 4)}, r"ranks\[0\] 0 must be in"),
        ({"negatives": 0}, "negatives 0 must be in"),
        ({"margin": 1.5}, "margin 1.5 must be in"),
        ({"same_modality": -0.1}, "same_modality -0.1 must be"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MiningConfig(**settings)


def test_a_benchmark_without_training_queries_is_refused(tmp_path):
    mbeir.write_candidates(tmp_path / POOL, [document(0)])
    with pytest.raises(DataError, match="has no training queries"):
        read_training_set(mbeir.discover(tmp_path))
