"""Vectors on disk: an evaluation that was killed resumes, to the bit, with what was embedded."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from puma_jax.data import mbeir
from puma_jax.errors import ArtifactError
from puma_jax.evaluation import encoding
from puma_jax.evaluation.evaluation import evaluate
from puma_jax.evaluation.vector_folder import GatheredRows, VectorFolder, vector_folder
from tests.evaluation.small import document, encode, write_set
from tests.reference import random_image

DOCUMENTS, QUERIES = 20, 6

KILLED = """
import os, signal, sys
from pathlib import Path
from puma_jax.data import mbeir
from puma_jax.evaluation import encoding
from puma_jax.evaluation.evaluation import evaluate
from puma_jax.evaluation.vector_folder import vector_folder
from tests.evaluation.small import encode

encoding._ITEMS_AT_ONCE = 4
calls = []

def last(items):
    calls.append(items)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(items)

with vector_folder(Path(sys.argv[2]), "words") as vectors:
    evaluate(mbeir.discover(sys.argv[1]), last, vectors=vectors)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_ITEMS_AT_ONCE", 4)
    root = tmp_path / "benchmark"
    queries = {f"q:{n}": (f"word{n} other", [f"d:{n}"]) for n in range(QUERIES)}
    pool = [document(f"d:{n}", f"word{n} and word{n + 1}") for n in range(DOCUMENTS)]
    return write_set(root, "mine", 1, queries, pool)


class Counting:
    def __init__(self):
        self.items = 0

    def __call__(self, items):
        self.items += len(items)
        return encode(items)


def test_a_killed_evaluation_resumes_with_what_it_embedded(root, tmp_path):
    folder = tmp_path / "vectors"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, root, folder],
        cwd=os.getcwd(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    expected, model = evaluate(mbeir.discover(root), encode, progress=False), Counting()
    with vector_folder(folder, "words") as vectors:
        found = evaluate(mbeir.discover(root), model, vectors=vectors, progress=False)
        assert vectors.reused == 14  # the queries, in batches of 4 and 2, and 8 documents
    assert model.items == DOCUMENTS + QUERIES - 14
    assert found == expected
    for pool, run in found.sets[0].runs.items():
        np.testing.assert_array_equal(run.scores, expected.sets[0].runs[pool].scores)
    assert not list(folder.iterdir())


def interrupted(root, folder):
    """Leave the vectors of an evaluation that did not write its results."""
    with pytest.raises(KeyboardInterrupt), vector_folder(folder, "words") as vectors:  # noqa: PT012
        evaluate(mbeir.discover(root), encode, vectors=vectors, progress=False)
        raise KeyboardInterrupt


def embedded_again(root, folder):
    model = Counting()
    with vector_folder(folder, "words") as vectors:
        evaluate(mbeir.discover(root), model, vectors=vectors, progress=False)
    return model.items


def test_only_what_changed_is_embedded_again(root, tmp_path):
    interrupted(root, tmp_path / "vectors")
    path = root / "cand_pool/local/mbeir_mine_task1_cand_pool.jsonl"
    path.write_text(path.read_text().replace("word7 and", "word7 nor"))
    assert embedded_again(root, tmp_path / "vectors") == 4


def test_a_damaged_file_is_embedded_again(root, tmp_path):
    folder = tmp_path / "vectors"
    interrupted(root, folder)
    for number, path in enumerate(sorted(folder.glob("*/*.npy"))[:3]):
        content = bytearray(path.read_bytes())
        content[(3, 40, -9)[number]] ^= 4
        path.write_bytes(content if number else content[:60])
    assert embedded_again(root, folder) in (10, 12)  # one batch of queries holds 2


def test_another_model_has_vectors_of_its_own(root, tmp_path):
    folder, model = tmp_path / "vectors", Counting()
    interrupted(root, folder)
    with vector_folder(folder, "other words") as vectors:
        evaluate(mbeir.discover(root), model, vectors=vectors, progress=False)
    assert model.items == DOCUMENTS + QUERIES
    assert len(list(folder.iterdir())) == 1  # those of the interrupted one


def test_the_same_evaluation_twice_at_once_is_refused(tmp_path):
    with (
        vector_folder(tmp_path, "words"),
        pytest.raises(ArtifactError, match="another process writes"),
        vector_folder(tmp_path, "words"),
    ):
        pass


def test_files_of_others_in_the_folder_stay(tmp_path):
    with vector_folder(tmp_path, "words") as vectors:
        (vectors.folder / "mine.npy").write_text("kept")
    assert (vectors.folder / "mine.npy").read_text() == "kept"


def test_an_image_that_changes_makes_another_key(tmp_path):
    path = tmp_path / "a.png"
    random_image(28, 28, 0).save(path)
    item = {"image": path, "text": "a"}
    keys = {VectorFolder.key([item]), VectorFolder.key([{"image": path}])}
    os.utime(path, ns=(1, 1))
    keys.add(VectorFolder.key([item]))
    path.write_bytes(b"other")
    keys.add(VectorFolder.key([item]))
    path.unlink()
    keys.add(VectorFolder.key([item]))
    assert len(keys) == 5


def test_gathered_rows_are_those_of_one_array():
    chance = np.random.default_rng(0)
    whole = chance.random((50, 3), np.float32)
    order, rows = chance.permutation(50), GatheredRows(50, 3)
    for part in np.split(order, [20, 21, 40]):
        rows[part] = whole[part]
    some = chance.integers(0, 50, 70)
    np.testing.assert_array_equal(rows[some], whole[some])
