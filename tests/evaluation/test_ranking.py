"""Run files give other tools our numbers, ties included."""

import numpy as np
import pytest
import pytrec_eval

from puma_jax import Embedder
from puma_jax.data import mbeir
from puma_jax.evaluation.evaluation import evaluate
from puma_jax.evaluation.ranking import strictly_falling
from tests.evaluation.small import document, encode, write_set
from tests.reference import random_image


def trec_eval(folder, relevant, k):
    """The hit rate at k that trec_eval finds in each run file."""
    rates = []
    for path in sorted(folder.iterdir()):
        run = pytrec_eval.parse_run(path.read_text().splitlines())
        qrel = {qid: dict.fromkeys(dids, 1) for qid, dids in relevant.items()}
        measured = pytrec_eval.RelevanceEvaluator(qrel, {f"success.{k}"}).evaluate(run)
        rates.append(np.mean([of_query[f"success_{k}"] for of_query in measured.values()]))
    return rates


@pytest.mark.parametrize("answer", range(7))
def test_seven_equal_documents_rank_alike_for_trec_eval(tmp_path, answer):
    pool = [document(f"d:{n}", "the same words") for n in range(7)]
    queries = {"q:1": ("the same words", [f"d:{answer}"])}
    write_set(tmp_path, "mine", 1, queries, pool)
    found = evaluate(mbeir.discover(tmp_path), encode, progress=False)
    found.write_runs(tmp_path / "runs")
    for k in (1, 5):
        expected = float(answer < k)
        assert found.sets[0].hits["local"][k] == expected
        assert trec_eval(tmp_path / "runs", {"q:1": [f"d:{answer}"]}, k) == [expected] * 2


def test_equal_drawings_stored_twice_rank_alike_for_trec_eval(tiny, tmp_path):
    """Their vectors may differ in the last bit; the run file has the order of the number."""
    (tmp_path / "images").mkdir()
    pool = []
    for n in range(6):
        random_image(56, 56, n // 2).save(tmp_path / f"images/{n}.png")
        pool.append(document(f"d:{n}", image=f"images/{n}.png"))
    relevant = {f"q:{n}": [f"d:{n}"] for n in range(6)}
    queries = {qid: (None, dids) for qid, dids in relevant.items()}
    images = {f"q:{n}": f"images/{n}.png" for n in range(6)}
    write_set(tmp_path, "mine", 4, queries, pool, images=images)
    model = Embedder.load(tiny.folder, dtype="float32")
    found = evaluate(mbeir.discover(tmp_path), model, progress=False)
    found.write_runs(tmp_path / "runs")
    for k in (1, 5):
        rates = trec_eval(tmp_path / "runs", relevant, k)
        assert rates == [found.sets[0].hits[pool][k] for pool in ("global", "local")]
    assert found.sets[0].hits["local"][5] == 1


def test_scores_fall_and_stay_what_they_are_where_they_differ():
    scores = np.array(
        [[1, 1, 1, 0.5, 0, 0, 0, -0.25, -0.25, -np.inf], [0.75, 0.5, 0.25, *[-np.inf] * 7]],
        np.float32,
    )
    falling = strictly_falling(scores)
    for row in falling:
        kept = row[np.isfinite(row)]
        printed = [np.float32(f"{score:.9g}") for score in kept]
        assert (np.diff(printed) < 0).all()
    np.testing.assert_allclose(falling, scores, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(falling[1], scores[1])
    np.testing.assert_array_equal(falling[0, [0, 3, 4, 7]], scores[0, [0, 3, 4, 7]])
