"""Intervals of paired differences hold what they say, and hits are those of TREC's tools."""

import json

import numpy as np
import pytest
import pytrec_eval
from paired import NEVER, Interval, hits, mean_rate, of_pool, paired_interval, read_ranks
from scipy import stats


def constant(*values: float) -> list[list[np.ndarray]]:
    """Two sets by seed, in which all queries have one value."""
    return [[np.full(5, value), np.full(7, value)] for value in values]


def test_without_variance_of_queries_it_is_the_paired_t_interval():
    ours, theirs = (0.5, 0.75, 0.25, 0.625), (0.25, 0.625, 0.375, 0.125)
    found = paired_interval(constant(*ours), constant(*theirs))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.seeds == 4


def test_one_seed_gives_the_bootstrap_interval_of_the_queries():
    rng = np.random.default_rng(0)
    ours, theirs = ((rng.random(3000) < rate).astype(float) for rate in (0.6, 0.5))
    found = paired_interval([[ours]], [[theirs]])
    expected = stats.bootstrap(
        (ours - theirs,), np.mean, n_resamples=2000, method="percentile", rng=rng
    ).confidence_interval
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.004)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1])
def test_the_true_difference_lies_in_95_of_100_intervals(spread):
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        runs = []
        for better in (0.1, 0.0):
            # A query is as hard for all seeds; a seed moves both sets alike.
            rates = [0.45 + better + rng.normal(0, spread) for _ in range(3)]
            runs.append(
                [[(rng.random(n) < rate).astype(float) for n in (60, 40)] for rate in rates]
            )
        found = paired_interval(*runs)
        inside += found.low <= 0.1 <= found.high
    assert 0.93 <= inside / 400 <= 1


def test_arms_are_told_apart_by_more_than_chance_and_rounding():
    assert Interval(0.02, 0.01, 0.03, 3).tells_apart(noise=0.01)
    assert not Interval(0.02, -0.01, 0.05, 3).tells_apart(noise=0.01)
    assert not Interval(-0.02, -0.03, -0.01, 3).tells_apart(noise=0.02)


def test_hits_of_run_files_are_those_of_pytrec_eval(tmp_path):
    rng = np.random.default_rng(2)
    qrels: dict = {}
    for name in ("mbeir_one_task0_test", "mbeir_two_task3_test"):
        qrels = {f"q{q}": {f"d{d}": 1 for d in rng.choice(30, 2)} for q in range(40)}
        lines = [f"{qid} 0 {did} 1 0\n" for qid, of_one in qrels.items() for did in of_one]
        lines.append("q0 0 d-not-relevant 0 0\n")
        (tmp_path / f"{name}_qrels.txt").write_text("".join(lines))
        runs = {}
        for pool in ("local", "global"):
            runs[pool] = {
                qid: {f"d{d}": 50.0 - rank for rank, d in enumerate(rng.permutation(30)[:12])}
                for qid in qrels
            }
            (tmp_path / f"{name}_{pool}_run.txt").write_text(
                "".join(
                    f"{qid} Q0 {did} {rank} {score} x\n"
                    for qid, of_one in runs[pool].items()
                    for rank, (did, score) in enumerate(of_one.items(), 1)
                )
            )
    ranks = read_ranks(tmp_path, tmp_path, "test")
    assert len(of_pool(ranks, "local")) == len(of_pool(ranks, "global")) == 2
    judged = pytrec_eval.RelevanceEvaluator(qrels, {"success_5"})
    for pool in ("local", "global"):
        expected = json.loads(json.dumps(judged.evaluate(runs[pool])))
        ours = hits([ranks[f"mbeir_two_task3_test/{pool}"]], 5)
        assert ours[0].tolist() == [expected[qid]["success_5"] for qid in sorted(qrels)]
        assert mean_rate(ours) == pytest.approx(ours[0].mean())
    assert max(of_set.max() for of_set in ranks.values()) == NEVER
