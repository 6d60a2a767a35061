"""Documents are told by their content: no set is measured against the documents of another."""

import pytest

from puma_jax.data import mbeir
from puma_jax.errors import DataError
from puma_jax.evaluate import only
from puma_jax.evaluation.evaluation import evaluate
from tests.evaluation.small import document, encode, write_set

NUMBERS = [str(number) for number in range(10)]


def numbered(root, name, task, text):
    """A set whose ids are "0" to "9"; each query is the text of its document."""
    return write_set(
        root,
        name,
        task,
        {f"{name}:{n}": (f"{text} {n}", [n]) for n in NUMBERS},
        [document(n, f"{text} {n}") for n in NUMBERS],
    )


def found(root, names):
    return evaluate(only(mbeir.discover(root), names), encode, progress=False, ks=(1,))


def test_ids_that_two_sets_give_to_other_documents_are_refused_with_both_files(tmp_path):
    numbered(tmp_path, "first", 1, "bird number")
    numbered(tmp_path, "second", 1, "ship called")
    for name in ("first", "second"):
        assert found(tmp_path, (name,)).sets[0].hits["local"][1] == 1
    with pytest.raises(DataError) as error:
        found(tmp_path, ("first", "second"))
    assert "mbeir_second_task1_cand_pool.jsonl:1: did" in str(error.value)
    assert "mbeir_first_task1_cand_pool.jsonl:1" in str(error.value)
    # Skipped, its positives would be the other set's documents.
    with pytest.raises(DataError, match="second_task1_cand_pool"):
        evaluate(mbeir.discover(tmp_path), encode, on_bad_record="skip", progress=False)


def test_a_document_of_two_pools_is_one(tmp_path):
    numbered(tmp_path, "first", 1, "bird number")
    numbered(tmp_path, "second", 1, "bird number")
    both = found(tmp_path, ("first", "second"))
    assert both.documents == 10
    assert [one.hits["global"][1] for one in both.sets] == [1, 1]


def test_an_id_that_one_pool_gives_twice_is_refused_with_both_lines(tmp_path):
    pool = [document("a", "one"), document("b", "two"), document("a", "three")]
    write_set(tmp_path, "mine", 1, {"q:1": ("one", ["a"])}, pool)
    with pytest.raises(DataError, match=r"cand_pool.jsonl:3: did.*cand_pool.jsonl:1"):
        found(tmp_path, ("mine",))
