"""`python -m puma_jax.evaluate`: what can fail is tried before the work, results are never lost."""

import errno
import json
import os
import re

import pytest

from puma_jax import Embedder
from puma_jax import evaluate as entry_point
from puma_jax.errors import ArtifactError, ConfigError, DataError
from puma_jax.evaluation.report import Evaluation
from tests.evaluation.small import document, write_set
from tests.reference import save_adapter


@pytest.fixture
def root(tmp_path):
    queries = {f"q:{n}": (f"number {n}", [f"d:{n}"]) for n in range(4)}
    pool = [document(f"d:{n}", f"the number {n}") for n in range(8)]
    return write_set(tmp_path / "benchmark", "mine", 1, queries, pool)


def under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file/out"


def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def with_content(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("kept")
    return tmp_path / "full"


@pytest.mark.parametrize("place", [under_a_file, a_file, with_content])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_sought(root, tmp_path, place):
    with pytest.raises(ArtifactError) as error:
        entry_point.main("no model", root, place(tmp_path))
    assert "\n" not in str(error.value)


def test_vectors_inside_of_the_results_are_refused(root, tmp_path):
    for folder in ("out", "out/vectors"):
        with pytest.raises(ConfigError, match=r"lies in .*out: choose a folder outside"):
            entry_point.main("no model", root, tmp_path / "out", vectors_dir=tmp_path / folder)


def test_bad_data_are_refused_before_a_model_is_sought(root, tmp_path):
    (root / "qrels/test/mbeir_mine_task1_test_qrels.txt").write_text("one two\n")
    with pytest.raises(DataError, match=r"qrels\.txt:1: 2 columns"):
        entry_point.main("no model", root, tmp_path / "out")


def test_results_that_cannot_be_written_are_printed_and_their_vectors_kept(
    tiny, root, tmp_path, capsys, monkeypatch
):
    out, vectors = tmp_path / "out", tmp_path / "vectors"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "write_runs", full)
        with pytest.raises(ArtifactError) as error:
            entry_point.main(str(tiny.folder), root, out, vectors_dir=vectors)
    assert str(error.value) == f"{out} cannot be written: No space left on device"
    assert "| mine task 1  t → t |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    entry_point.main(str(tiny.folder), root, out, vectors_dir=vectors)
    captured = capsys.readouterr()
    assert "12 vectors are those of an interrupted run" in captured.out
    assert "4 queries have no instruction (mine task 1: 4)" in captured.out
    assert not list(vectors.iterdir())
    written = json.loads((out / "results.json").read_text())
    assert Evaluation.from_json(written).sets[0].left_out.uninstructed_queries == 4
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json", "runs"]


def test_an_empty_working_directory_is_filled(tiny, root, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    there = (tmp_path / "here").stat().st_ino
    entry_point.main(str(tiny.folder), root, entry_point.Path("."))
    assert sorted(os.listdir(".")) == ["report.html", "results.json", "runs"]
    assert (tmp_path / "here").stat().st_ino == there
    stages = {name: {"evaluation": json.loads((tmp_path / "here/results.json").read_text())}
              for name in ("first", "second")}  # fmt: skip
    run = tmp_path / "run/results.json"
    run.parent.mkdir()
    run.write_text(json.dumps({"stages": stages}))
    capsys.readouterr()
    entry_point.main(str(tiny.folder), root, tmp_path / "again", compare_with=(run,))
    header = next(line for line in capsys.readouterr().out.splitlines() if "second local" in line)
    assert f"{tmp_path / 'run/first'} local" in header
    assert f"{tmp_path / 'again'} local" in header


def test_smaller_vectors_are_printed_and_written(tiny, root, tmp_path, capsys):
    sizes = {"precision": ("float32", "int8", "ubinary"), "dimensions": (64, 16)}
    entry_point.main(str(tiny.folder), root, tmp_path / "out", **sizes)
    printed = capsys.readouterr().out
    assert "| float32                      |     64 |   256 |" in printed
    assert "| int8                         |     16 |    20 |" in printed
    assert "| ubinary, rescored by float32 |     16 |     2 |" in printed
    whole = json.loads((tmp_path / "out/results.json").read_text())
    written = json.loads((tmp_path / "out/sizes.json").read_text())
    assert len(written["sizes"]) == 10
    assert written["sizes"][0]["evaluation"]["mean"] == whole["mean"]
    with pytest.raises(ConfigError, match="rescore_multiplier is 0"):
        entry_point.main(str(tiny.folder), root, tmp_path / "other", rescore_multiplier=0)


def test_depths_are_those_of_pruned_models(tiny, root, tmp_path, capsys):
    model = str(tiny.folder)
    Embedder.load(tiny.folder).keep_layers(2).save(tmp_path / "two")
    entry_point.main(str(tmp_path / "two"), root, tmp_path / "pruned", dimensions=(64, 16))
    entry_point.main(
        model, root, tmp_path / "out", layers=(2, 1), dimensions=(64, 16),
        vectors_dir=tmp_path / "vectors",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"\| layers +\| +vectors +\| local @k", printed)
    assert re.search(r"\| 2 +\| float32, 16 values \|", printed)
    pruned = json.loads((tmp_path / "pruned/sizes.json").read_text())
    four, two, one = json.loads((tmp_path / "out/depths.json").read_text())["depths"]
    assert [of["layers"] for of in (four, two, one)] == [4, 2, 1]
    assert two["sizes"] == pruned["sizes"]
    assert two["evaluation"] == two["sizes"][0]["evaluation"]
    assert not list((tmp_path / "vectors").glob("*"))
    for count in (0, 4):
        with pytest.raises(ConfigError, match=rf"layers {count} must be in \[1, 3\]: the model"):
            entry_point.main(model, root, tmp_path / "other", layers=(count,))


def test_a_model_with_an_adapter_is_evaluated_as_the_merged_model(tiny, root, tmp_path):
    adapter, merged = save_adapter(tiny, tmp_path / "adapter"), tmp_path / "merged"
    Embedder.load(tiny.folder, dtype="float32", adapter=adapter).save(merged)
    folders = {"with": (str(tiny.folder), str(adapter)), "without": (str(merged), None)}
    for name, (model, of) in folders.items():
        entry_point.main(model, root, tmp_path / name, dtype="float32", adapter=of)
    run, expected = (
        [path.read_text() for path in sorted((tmp_path / name / "runs").rglob("*.*"))]
        for name in folders
    )
    assert run == expected != []
    written = json.loads((tmp_path / "with/results.json").read_text())
    assert written["model"] == f"{tiny.folder} with {adapter}"
