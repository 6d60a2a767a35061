"""Evaluation on all sixteen sets of M-BEIR, small, against JSON, float64 and plain loops."""

import dataclasses
import itertools
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from puma_jax import Embedder
from puma_jax import evaluate as entry_point
from puma_jax.data import mbeir
from puma_jax.data.texts import normalize_text
from puma_jax.errors import ArtifactError, ConfigError, DataError, EvaluationError
from puma_jax.evaluation import encoding, pool_search, published
from puma_jax.evaluation.evaluation import Evaluation, Subset, evaluate, evaluate_selection
from puma_jax.evaluation.results import compare
from puma_jax.evaluation.selection import select
from puma_jax.evaluation.vector_folder import vector_folder
from puma_jax.parallel.mesh import MeshConfig
from tests.data import fake_mbeir

QUERIES = "query/test/mbeir_{}_test.jsonl"
POOL = "cand_pool/local/mbeir_{}_cand_pool.jsonl"
QRELS = "qrels/test/mbeir_{}_test_qrels.txt"


def encode(items):
    """Counts of words, hashed: whole numbers, so that products are exact and often equal."""
    vectors = np.zeros((len(items), 12), np.float32)
    for vector, item in zip(vectors, items, strict=True):
        words = item.get("text", "").lower().replace(".", " ").split()
        if "image" in item:
            words += [item["image"].name] * 2
        for word in words:
            vector[zlib.crc32(word.encode()) % 12] += 1
    return vectors


def evaluated(root, encode=encode, **kwargs):
    return evaluate(mbeir.discover(root), encode, progress=False, **kwargs)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_mbeir.write_test_sets(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def results(root):
    return evaluated(root)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pool_path(root, stem):
    return root / POOL.format(f"{stem}_test" if "mscoco" in stem else stem)


def vectors_of_pool(root, paths):
    """Ids, ascending, with vectors in float64 and modalities."""
    rows = {row["did"]: row for path in paths for row in rows_of(path)}
    items = [
        {
            **({"text": rows[did]["txt"]} if rows[did]["txt"] else {}),
            **({"image": root / rows[did]["img_path"]} if rows[did]["img_path"] else {}),
        }
        for did in sorted(rows)
    ]
    modalities = [rows[did]["modality"] for did in sorted(rows)]
    return sorted(rows), encode(items).astype(np.float64), modalities


def relevant_of(root, stem):
    relevant = {}
    for line in (root / QRELS.format(stem)).read_text().splitlines():
        qid, _, did, relevance, _ = line.split()
        if int(relevance) > 0:
            relevant.setdefault(qid, set()).add(did)
    return relevant


def expected_rankings(root, query_set, paths):
    """Ids by descending score, then ascending id, and the modality of each."""
    dids, documents, modalities = vectors_of_pool(root, paths)
    for qid, item in zip(query_set.qids, query_set.items, strict=True):
        scores = documents @ encode([item])[0].astype(np.float64)
        order = sorted(range(len(dids)), key=lambda row: (-scores[row], dids[row]))
        yield qid, [dids[row] for row in order], [modalities[row] for row in order]


@pytest.mark.parametrize("global_pool", [True, False])
def test_all_sixteen_sets_have_the_numbers_of_plain_loops(tmp_path, global_pool):
    root = fake_mbeir.write_test_sets(tmp_path, global_pool=global_pool)
    benchmark = mbeir.discover(root)
    results = evaluate(benchmark, encode, progress=False)
    local_pools = [pool_path(root, f"{found.name}_task{found.task}") for found in results.sets]
    pool_of_all = benchmark.global_pools.get("test")
    assert len(results.sets) == 16
    assert (pool_of_all is not None) == global_pool
    for found, query_set, own_pool in zip(
        results.sets, select(benchmark).sets, local_pools, strict=True
    ):
        assert (found.name, found.task) == (query_set.name, query_set.task)
        relevant = relevant_of(root, f"{found.name}_task{found.task}")
        target = mbeir.TASKS[found.task][1]
        for pool, paths in (
            ("local", [own_pool]),
            ("global", [pool_of_all] if pool_of_all else local_pools),
        ):
            hits, wrong = Counter(), Counter()
            run = found.runs[pool]
            for n, (qid, dids, modalities) in enumerate(expected_rankings(root, query_set, paths)):
                assert [did for did in run.dids[n] if did] == dids[:50]
                for k in (1, 5, 10, 20, 50):
                    hits[k] += bool(relevant.get(qid, set()) & set(dids[:k]))
                    wrong[k] += any(modality != target for modality in modalities[:k])
            for k in (1, 5, 10, 20, 50):
                assert found.hits[pool][k] == hits[k] / found.queries, (found.title, pool, k)
                if pool == "global":
                    assert found.wrong_modality[k] == wrong[k] / found.queries
            low, high = found.interval[pool]
            assert low <= found.hits[pool][found.k] <= high


def test_run_files_give_trec_eval_the_same_numbers(root, results, tmp_path):
    results.write_runs(tmp_path)
    for found in results.sets:
        stem = f"{found.name}_task{found.task}"
        qrel = {qid: dict.fromkeys(dids, 1) for qid, dids in relevant_of(root, stem).items()}
        for pool in ("local", "global"):
            path = tmp_path / f"mbeir_{stem}_test_{pool}_run.txt"
            run = pytrec_eval.parse_run(path.read_text().splitlines())
            for qid, line in zip(found.runs[pool].qids, found.runs[pool].dids, strict=True):
                assert set(run[qid]) == set(filter(None, line))
            measured = pytrec_eval.RelevanceEvaluator(qrel, {"success.5,10"}).evaluate(run)
            for k in (5, 10):
                hits = sum(of_query[f"success_{k}"] for of_query in measured.values())
                assert found.hits[pool][k] == hits / found.queries


def test_documents_are_embedded_once_and_queries_once_for_each_set(root):
    counted = Counter()

    def watched(items):
        counted.update(str(sorted(item.items())) for item in items)
        return encode(items)

    evaluated(root, watched)
    selection = select(mbeir.discover(root))
    rows = rows_of(root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl")
    assert len(selection.dids) == len(rows)
    assert counted.total() == len({(row["txt"], row["img_path"]) for row in rows}) + 16 * 8


def test_equal_documents_stand_in_the_order_of_their_ids_however_rounding_falls(root):
    """An embedder's last bits depend on what else is in a row."""
    chance = np.random.default_rng(0)

    def noisy(items):
        return encode(items) * (1 + 1e-6 * chance.random((len(items), 1), np.float32))

    selection = select(mbeir.discover(root))
    same = [str(sorted(selection.document(row).items())) for row in range(len(selection.dids))]
    for found in evaluated(root, noisy).sets:
        for run in found.runs.values():
            for dids in run.dids:
                rows = [selection.dids.index(did) for did in dids if did is not None]
                for one, next_one in itertools.pairwise(rows):
                    assert same[one] != same[next_one] or one < next_one


def test_nothing_depends_on_the_order_of_lines_or_on_batches(root, results, tmp_path, monkeypatch):
    other = fake_mbeir.write_test_sets(tmp_path / "other", seed=1)
    assert (other / QUERIES.format("cirr_task7")).read_bytes() != (
        root / QUERIES.format("cirr_task7")
    ).read_bytes()
    monkeypatch.setattr(encoding, "_ITEMS_AT_ONCE", 7)
    monkeypatch.setattr(pool_search, "_TILE", 5)
    with vector_folder(tmp_path / "vectors", "counts of words") as vectors:
        again = evaluated(other, vectors=vectors)
    assert again == results
    for one, two in zip(again.sets, results.sets, strict=True):
        for pool, run in one.runs.items():
            expected = dict(zip(two.runs[pool].qids, two.runs[pool].dids.tolist(), strict=True))
            assert dict(zip(run.qids, run.dids.tolist(), strict=True)) == expected
    assert not list((tmp_path / "vectors").iterdir())


def test_queries_are_asked_with_an_instruction_that_their_id_chooses(root):
    used = Counter()
    for query_set in select(mbeir.discover(root)).sets:
        first = [normalize_text(item.get("instruction")) for item in query_set.items]
        if query_set.name == "nights":  # which has no instructions
            assert not any(first)
            continue
        named = f"Find {query_set.name} {query_set.task}."
        assert set(first) <= {named, "Look.", "Which?"}
        used.update("named" if line == named else line for line in first)
    # 15 sets of 8 queries, three instructions for each.
    assert sorted(used) == ["Look.", "Which?", "named"]
    assert min(used.values()) > 20


def test_a_benchmark_without_instructions_works(tmp_path):
    root = fake_mbeir.write_test_sets(tmp_path)
    (root / "instructions/query_instructions.tsv").unlink()
    (query_set,) = (found for found in select(mbeir.discover(root)).sets if found.name == "edis")
    queries = {row["qid"]: row for row in rows_of(root / QUERIES.format("edis_task2"))}
    for qid, item in zip(query_set.qids, query_set.items, strict=True):
        assert item["text"] == queries[qid]["query_txt"]
    assert len(evaluated(root).sets) == 16


def test_answers_may_lie_outside_of_the_local_pool(root, results):
    (found,) = (one for one in results.sets if (one.name, one.task) == ("oven", 8))
    relevant = relevant_of(root, "oven_task8")
    own = {row["did"] for row in rows_of(pool_path(root, "oven_task8"))}
    outside = [qid for qid, dids in relevant.items() if dids and not dids & own]
    hit = {
        pool: {
            qid
            for qid, dids in zip(found.runs[pool].qids, found.runs[pool].dids, strict=True)
            if relevant.get(qid, set()) & set(dids)
        }
        for pool in ("local", "global")
    }
    assert outside
    assert not hit["local"] & set(outside)
    assert hit["global"] & set(outside)


def test_headlines_are_at_10_for_the_fashion_sets_and_at_5_for_others(results):
    assert {found.name for found in results.sets if found.k == 10} == {"fashion200k", "fashioniq"}
    assert {found.k for found in results.sets} == {5, 10}
    for pool in ("local", "global"):
        mean = np.mean([found.hits[pool][found.k] for found in results.sets])
        assert results.mean(pool) == pytest.approx(mean)
        assert results.mean(pool, k=1) <= results.mean(pool, k=5) <= results.mean(pool, k=50)
        low, high = results.interval(pool)
        assert low < results.mean(pool) < high


def test_headlines_are_there_whatever_ks_are_asked_for(root, results):
    few = evaluated(root, ks=(1,))
    assert few.mean() == results.mean()
    with pytest.raises(ConfigError, match="k is 0, expected at least 1"):
        evaluated(root, ks=(0, 5))


def test_a_subset_is_chosen_by_ids_and_has_the_answers(root, tmp_path):
    limits = Subset(max_queries=3, max_candidates=4)
    chosen = select(mbeir.discover(root), limits=limits)
    whole = select(mbeir.discover(root))
    for some, every in zip(chosen.sets, whole.sets, strict=True):
        assert len(some.qids) == 3
        own = {chosen.dids[row] for row in some.pool}
        of_every = {whole.dids[row] for row in every.pool}
        relevant = relevant_of(root, f"{some.name}_task{some.task}")
        answers = {did for qid in some.qids for did in relevant.get(qid, ())}
        assert own <= of_every
        assert own >= answers & of_every
        assert 4 <= len(own) <= 4 + len(answers)
    assert len(chosen.pool) == len(chosen.dids)
    other = fake_mbeir.write_test_sets(tmp_path, seed=2)
    expected = evaluate_selection(chosen, encode, progress=False)
    assert evaluated(other, limits=limits) == expected
    # Used again, a selection gives the same numbers.
    assert evaluate_selection(chosen, encode, progress=False) == expected
    enough = Subset(max_queries=100, max_candidates=100)
    sets, local = evaluated(root, limits=enough).sets, evaluated(root).sets
    assert [found.hits["local"] for found in sets] == [found.hits["local"] for found in local]
    with pytest.raises(ConfigError, match="subset of 0 queries"):
        Subset(0, 5)


def test_tables_name_sets_readably_and_are_aligned(root, results):
    lines = results.table().splitlines()
    assert len(lines) == 2 + 16 + 1
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("| cirr task 7  it → i") for line in lines)
    assert f"{100 * results.mean():.1f} ±" in lines[-1]
    some = Evaluation(results.split, results.documents, results.sets[:2])
    lines = compare({"all": results, "some": some}).splitlines()
    assert len(lines) == 2 + 16 + 1
    assert lines[-2].count("–") == 2
    shared = [f"{100 * some.mean(pool):.1f}" for pool in ("local", "global")]
    assert [cell.strip() for cell in lines[-1].split("|")[2:-1]] == shared * 2


def test_published_numbers_stand_beside_ours(results):
    table = published.compare_with(results, "mine")
    lines = [re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines()]
    assert lines[0] == ["set, local @k", "mine", *published.LOCAL]
    # The means that the paper gives; one of them is not quite that of its own numbers.
    means = [float(cell) for cell in lines[-1][2:]]
    np.testing.assert_allclose(means, [50.6, 51.8, 54.4, 56.6], atol=0.11)
    assert lines[-1][1] == f"{100 * results.mean('local'):.1f}"
    cirr = next(line for line in lines if line[0].startswith("cirr"))
    assert cirr[2:] == ["44.6", "47.7", "49.9", "53.1"]
    own = dataclasses.replace(results, sets=(dataclasses.replace(results.sets[0], name="mine"),))
    assert published.compare_with(own, "mine") is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (QUERIES, None, 'no queries of split "test", the splits it has: none'),
        (QUERIES, "", "mbeir_cirr_task7_test.jsonl holds no queries"),
        (QUERIES, "twice", 'task7_test.jsonl has two queries of qid "8:700[0-7]", expected one'),
        (POOL, None, "mbeir_cirr_task7_cand_pool.jsonl is missing: cirr task 7 needs it"),
        (POOL, "\n", "mbeir_cirr_task7_cand_pool.jsonl holds no documents"),
        (QRELS, None, "mbeir_cirr_task7_test_qrels.txt is missing: cirr task 7 needs it"),
        (QRELS, "one two\n", "mbeir_cirr_task7_test_qrels.txt:1: 2 columns, expected 5"),
    ],
)
def test_files_that_are_missing_or_wrong_are_named(tmp_path, file, content, message):
    root = fake_mbeir.write_test_sets(tmp_path)
    for path in (root / "query/test").iterdir():
        if "cirr" not in path.name:
            path.unlink()
    path = root / file.format("cirr_task7")
    if content is None:
        path.unlink()
    else:
        path.write_text(path.read_text() * 2 if content == "twice" else content)
    with pytest.raises(DataError, match=message) as caught:
        evaluated(root)
    assert "\n" not in str(caught.value)


def test_vectors_that_cannot_be_compared_are_refused(root):
    with pytest.raises(EvaluationError, match=r"shape \(3, 12\) for 128 items, expected one"):
        evaluated(root, lambda items: encode(items)[:3])

    def broken(items):
        vectors = encode(items)
        vectors[-1] = np.nan
        return vectors

    with pytest.raises(EvaluationError, match=r'1 of 128 vectors .* query "[0-9]:[0-9]+"'):
        evaluated(root, broken)


def test_the_entry_point_writes_what_it_prints(tiny, root, results, tmp_path, capsys):
    other = tmp_path / "other/results.json"
    other.parent.mkdir()
    other.write_text(json.dumps(results.to_json()))
    out = tmp_path / "out"
    entry_point.main(
        str(tiny.folder), root, out, sets=("cirr", "nights"), subset=(3, 3), compare_with=(other,)
    )
    written = json.loads((out / "results.json").read_text())
    found = Evaluation.from_json(written)
    assert [one.title for one in found.sets] == ["nights task 4  i → i", "cirr task 7  it → i"]
    assert written["model"] == str(tiny.folder)
    assert len(list((out / "runs").iterdir())) == 4
    printed = capsys.readouterr().out
    assert found.table() in printed
    assert compare({str(other.parent): results, str(out): found}) in printed
    with pytest.raises(ArtifactError, match="out is not empty: choose another folder"):
        entry_point.main(str(tiny.folder), root, out)


def test_devices_and_the_size_of_chunks_change_no_result(tiny, root, tmp_path):
    numbers = {}
    for name, mesh, tokens in (("8", MeshConfig(), 700), ("2-2-2", MeshConfig(2, 2, 2), None)):
        out = tmp_path / name
        entry_point.main(str(tiny.folder), root, out, mesh=mesh, tokens_per_chunk=tokens)
        numbers[name] = (out / "results.json").read_bytes()
    one = evaluated(root, Embedder.load(tiny.folder, dtype=None).encode).to_json()
    results = {"model": str(tiny.folder), "benchmark": str(root), **one}
    assert set(numbers.values()) == {(json.dumps(results, indent=2) + "\n").encode()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sets": ("cir",)}, 'has no set "cir", only cirr, edis'),
        ({"compare_with": (Path("no/results.json"),)}, "^no/results.json is missing"),
        ({"compare_with": (Path(__file__),)}, "test_evaluation.py is not readable JSON"),
    ],
)
def test_wrong_flags_cost_no_evaluation(root, tmp_path, flags, message):
    with pytest.raises(DataError, match=message):
        entry_point.main("no model", root, tmp_path / "out", **flags)
