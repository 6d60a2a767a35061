"""Reranking orders what queries found, in both pools, and changes nothing else."""

import json
import zlib

import numpy as np
import pytest

from puma_jax import Reranker
from puma_jax import evaluate as entry_point
from puma_jax.data import mbeir
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.evaluation.evaluation import evaluate_selection
from puma_jax.evaluation.report import Evaluation
from puma_jax.evaluation.reranking import rerank
from puma_jax.evaluation.results import read_evaluation
from puma_jax.evaluation.selection import select
from tests import reference
from tests.evaluation.small import document, encode, write_set
from tests.reference import random_image


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "benchmark"
    queries = {f"q:{n}": (f"number {n} of many", [f"d:{n}"]) for n in range(6)}
    pool = [document(f"d:{n}", f"the number {n}") for n in range(9)]
    write_set(root, "mine", 1, queries, [*pool, document("d:x", "the number 3")])
    (root / "images").mkdir()
    random_image(60, 60).save(root / "images/one.png")
    pool = [document("e:0", image="images/one.png"), document("e:1", "another one")]
    return write_set(root, "other", 0, {"q:0": ("one", ["e:0"])}, pool)


class ByHash:
    """Scores that no order of documents has anything to do with."""

    def __init__(self):
        self.pairs = []

    def __call__(self, pairs):
        pairs = [(query["text"], str(document.get("text", "image"))) for query, document in pairs]
        self.pairs += pairs
        return np.array([self.score(*pair) for pair in pairs], np.float32)

    @staticmethod
    def score(query, found):
        return zlib.crc32(f"{query} {found}".encode()) % 7 / 7


def test_the_first_documents_are_ordered_by_their_scores_and_the_others_stay(root):
    selection = select(mbeir.discover(root))
    before = evaluate_selection(selection, encode, progress=False)
    reranker = ByHash()
    after = rerank(selection, before, reranker, top=4, progress=False)
    assert len(reranker.pairs) == len({*reranker.pairs})  # equal documents are scored once
    texts = {
        did: selection.document(row).get("text", "image") for row, did in enumerate(selection.dids)
    }
    for query_set, old, new in zip(selection.sets, before.sets, after.sets, strict=True):
        for pool in ("local", "global"):
            ranks = []
            for query, qid in enumerate(query_set.qids):
                found = [did for did in old.runs[pool].dids[query] if did is not None]
                scores = {
                    did: ByHash.score(query_set.items[query]["text"], texts[did]) for did in found
                }
                expected = sorted(found[:4], key=lambda did: -scores[did])
                expected += found[4:]
                run = new.runs[pool]
                assert [did for did in run.dids[query] if did is not None] == expected
                assert [selection.dids[row] for row in run.rows[query] if row >= 0] == expected
                relevant = {selection.dids[row] for row in query_set.relevant[query]}
                ranks.append(min((expected.index(did) for did in relevant), default=99))
                assert run.qids[query] == qid
            hits = {k: np.mean([rank < k for rank in ranks]) for k in new.hits[pool]}
            assert new.hits[pool] == pytest.approx(hits)
        assert (old.queries, old.documents, old.left_out) == (
            new.queries,
            new.documents,
            new.left_out,
        )
    assert [found.hits for found in before.sets] != [found.hits for found in after.sets]


@pytest.mark.parametrize("top", [0, 51])
def test_a_depth_that_the_runs_lack_is_refused(root, top):
    selection = select(mbeir.discover(root))
    evaluation = evaluate_selection(selection, encode, progress=False)
    with pytest.raises(ConfigError, match=rf"^rerank_top is {top}, expected 1 to 50"):
        rerank(selection, evaluation, ByHash(), top=top, progress=False)


def test_evaluate_reports_both(tiny, root, tmp_path, capsys):
    folder = tmp_path / "Qwen3-VL-Reranker-tiny"
    reference.save_reranker(folder)
    out = tmp_path / "out"
    entry_point.main(
        str(tiny.folder), root, out, reranker=str(folder), rerank_top=3, dtype="float32"
    )
    printed = capsys.readouterr().out
    assert f"First 3 documents reranked by {folder}:" in printed
    assert f"{tiny.folder} + {folder} local" in printed
    before, after = (read_evaluation(out / f"{name}.json") for name in ("results", "reranked"))
    assert isinstance(after, Evaluation)
    assert {3, 5} <= set(after.sets[0].hits["local"])
    for k in (5, 10):  # only the first three change places
        assert after.sets[0].hits["local"][k] == before.sets[0].hits["local"][k]
    said = json.loads((out / "reranked.json").read_text())
    assert (said["reranker"], said["rerank_top"]) == (str(folder), 3)
    assert "Hit rates after reranking" in (out / "report.html").read_text()
    name = "mbeir_mine_task1_test_local_run.txt"
    files = [(out / kind / name).read_text() for kind in ("runs", "reranked-runs")]
    runs = [
        [line.split() for line in file.splitlines() if line.startswith("q:2 ")] for file in files
    ]
    first = [[line[2] for line in run[:3]] for run in runs]
    texts = {f"d:{n}": f"the number {n}" for n in range(9)} | {"d:x": "the number 3"}
    scores = Reranker.load(folder, dtype="float32").score(
        "number 2 of many", [texts[did] for did in first[0]]
    )
    assert first[1] == [first[0][place] for place in np.argsort(-scores, kind="stable")]
    assert [line[2] for line in runs[0][3:]] == [line[2] for line in runs[1][3:]]


def test_a_reranker_that_is_none_is_refused_before_the_work(tiny, root, tmp_path):
    with pytest.raises(CheckpointError, match="expected one with published rerankers"):
        entry_point.main(str(tiny.folder), root, tmp_path / "out", reranker=str(tiny.folder))
    with pytest.raises(ConfigError, match="rerank_top is 0, expected at least 1"):
        entry_point.main("no model", root, tmp_path / "out", rerank_top=0)
