import numpy as np
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_jax.evaluation.metrics import bootstrap_interval, first_relevant

KS = (1, 5, 10)


def success(ranked, relevant, scores):
    """pytrec_eval's success@k of each query, by k; it has seen the query if it has qrels."""
    run = {
        str(query): {
            f"{row:06}": float(score) for row, score in zip(rows, of_query, strict=True) if row >= 0
        }
        for query, (rows, of_query) in enumerate(zip(ranked.tolist(), scores, strict=True))
    }
    # A document judged irrelevant keeps a query without an answer among the queries.
    qrel = {
        str(query): {"never": 0} | {f"{row:06}": 1 for row in rows}
        for query, rows in enumerate(relevant)
    }
    found = pytrec_eval.RelevanceEvaluator(qrel, {"success.1,5,10"}).evaluate(run)
    return {k: np.array([found.get(q, {}).get(f"success_{k}", 0) for q in qrel], float) for k in KS}


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_hit_rates_are_trec_evals_success(seed, documents, queries):
    rng = np.random.default_rng(seed)
    # Few different scores: many ties. trec_eval breaks them by descending id, so the run does.
    table = rng.integers(0, 4, (queries, documents)).astype(float)
    order = np.array(
        [sorted(range(documents), key=lambda row: (of_one[row], row))[::-1] for of_one in table],
        int,
    ).reshape(queries, documents)
    empty = max(0, 12 - documents)
    ranked = np.pad(order, ((0, 0), (0, empty)), constant_values=-1)[:, :12]
    scores = np.take_along_axis(np.pad(table, ((0, 0), (0, 1))), ranked, axis=1)
    # Some relevant documents are in no pool, some queries have none at all.
    relevant = [
        rng.choice(documents + 5, rng.integers(0, 4), replace=False).tolist()
        for _ in range(queries)
    ]
    expected = success(ranked, relevant, scores)
    first = first_relevant(ranked, relevant)
    for k in KS:
        np.testing.assert_array_equal(first < k, expected[k])


def test_a_hit_is_any_relevant_document_and_not_their_share():
    ranked = np.array([[3, 1, 2]])
    assert first_relevant(ranked, [[2, 7, 8, 9]]).tolist() == [2]


def test_empty_places_match_nothing():
    ranked = np.full((3, 4), -1)
    assert first_relevant(ranked, [[0], [], [-1]]).tolist() == [4, 4, 4]
    assert first_relevant(np.zeros((2, 0), int), [[0], [1]]).tolist() == [0, 0]


def test_no_queries_have_no_ranks():
    assert first_relevant(np.zeros((0, 3), int), []).shape == (0,)


def test_the_interval_is_that_of_drawing_queries_anew():
    rng = np.random.default_rng(1)
    hits = [rng.random(80) < 0.3, rng.random(20) < 0.7]
    means = [
        np.mean([rng.choice(of_set, len(of_set)).mean() for of_set in hits]) for _ in range(4000)
    ]
    found = bootstrap_interval([float(of_set.mean()) for of_set in hits], [80, 20])
    np.testing.assert_allclose(found, np.quantile(means, [0.025, 0.975]), atol=0.012)


def test_intervals_do_not_change_from_call_to_call():
    assert bootstrap_interval([0.4], [50]) == bootstrap_interval([0.4], [50])


def test_a_rate_of_nothing_or_all_is_certain():
    assert bootstrap_interval([0.0], [50]) == (0.0, 0.0)
    assert bootstrap_interval([1.0], [50]) == (1.0, 1.0)
