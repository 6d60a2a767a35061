"""A workdir is one run's, and a finished stage is taken for nothing but what it is."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from puma_jax.artifacts import write_json
from puma_jax.errors import ArtifactError
from puma_jax.train import load_config
from puma_jax.training.workdir import (
    as_json,
    claim_run,
    claim_stage,
    data_folder,
    finish_stage,
    finished_model,
    model_digest,
    read_run,
    reuse_stage,
)
from tests.fuzz import Target, check_only_declared_errors

CONFIG = load_config(Path(__file__).with_name("tiny_run.py"))
JOB = {"number": 0, "settings": {"optimizer": {"learning_rate": 0.1}}, "base": "b", "data": "d"}


@pytest.fixture
def workdir(tmp_path):
    claim_run(tmp_path / "run", CONFIG())
    return tmp_path / "run"


def write_model(folder, weights=b"weights"):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)


def finished(workdir, job=JOB):
    write_model(workdir / "deep")
    claim_stage(workdir, "deep", job)
    finish_stage(workdir, "deep")


def test_the_same_run_may_go_on_elsewhere(workdir):
    assert read_run(workdir) == CONFIG()
    changed = as_json(CONFIG())
    changed["mesh"]["fsdp"] = 2
    write_json(workdir / "config.json", changed)
    claim_run(workdir, CONFIG())


def test_another_run_is_refused_and_told_how_to_reuse_this_one(workdir):
    (workdir / "stages").mkdir()
    with pytest.raises(
        ArtifactError,
        match=r"differs in stages\.cut\.steps \(8 there, 9 here\): .* with --reuse .*run,",
    ):
        claim_run(workdir, CONFIG(9))


def test_settings_of_a_run_without_a_stage_can_be_corrected(workdir, capsys):
    write_model(workdir / "base")
    claim_run(workdir, CONFIG(9))
    assert "no stage has begun" in capsys.readouterr().out
    assert read_run(workdir) == CONFIG(9)
    assert not (workdir / "base").exists()


def test_stages_in_another_order_are_another_run(workdir):
    (workdir / "stages").mkdir()
    config = CONFIG()
    stages = dict(reversed(config.stages.items()))
    with pytest.raises(ArtifactError, match="with stages deep, cut, this one has cut, deep"):
        claim_run(workdir, dataclasses.replace(config, stages=stages))


def test_a_run_of_another_version_is_refused_by_the_name_of_its_setting(workdir):
    config = json.loads((workdir / "config.json").read_text())
    config["stages"]["cut"]["chunks"] = config["stages"]["cut"].pop("grad_cache_chunks")
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"stages\.cut\.chunks is unknown.*another version"):
        claim_run(workdir, CONFIG())


def test_a_damaged_config_is_refused_in_one_line(workdir):
    (workdir / "stages").mkdir()
    check_only_declared_errors(
        Target(workdir / "config.json", lambda: claim_run(workdir, CONFIG()))
    )


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty"):
        claim_run(tmp_path, CONFIG())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_data_of_benchmarks_of_the_same_name_lie_apart(tmp_path):
    one, other = (
        data_folder(tmp_path, Path(root), {"tokenizer": "a"}) for root in ("/x/d", "/y/d")
    )
    assert one != other
    assert one == data_folder(tmp_path, Path("/x/d"), {"tokenizer": "a"})
    assert one != data_folder(tmp_path, Path("/x/d"), {"tokenizer": "b"})
    assert one.name.startswith("d-")


def test_unfinished_work_of_another_stage_is_refused(workdir):
    claim_stage(workdir, "deep", JOB)
    claim_stage(workdir, "deep", JOB)
    with pytest.raises(
        ArtifactError, match="work on stage deep of another job, which differs in data"
    ):
        claim_stage(workdir, "deep", {**JOB, "data": "another"})


def test_a_finished_stage_leaves_its_model_and_its_digest(workdir):
    for folder in ("checkpoints/deep", "teacher/deep"):
        (workdir / folder).mkdir(parents=True)
    finished(workdir)
    assert finished_model(workdir, "deep") == model_digest(workdir / "deep")
    assert not (workdir / "checkpoints/deep").exists()
    assert not (workdir / "teacher/deep").exists()


def test_a_stage_that_is_the_same_is_reused(workdir, tmp_path):
    finished(workdir)
    assert reuse_stage(workdir, tmp_path / "new", "deep", JOB) is None
    assert model_digest(tmp_path / "new/deep") == model_digest(workdir / "deep")


@pytest.mark.parametrize("what", ["settings", "base", "data", "weights", "unfinished"])
def test_a_stage_that_differs_is_not_reused(workdir, tmp_path, what):
    finished(workdir)
    job = {**JOB}
    if what == "settings":
        job["settings"] = {"optimizer": {"learning_rate": 0.2}}
        expected = r"it differs in settings.optimizer.learning_rate (0.1 there, 0.2 here)"
    elif what == "weights":
        (workdir / "deep/model.safetensors").write_bytes(b"weightz")
        expected = f"{workdir / 'deep'} is damaged, or was changed after training"
    elif what == "unfinished":
        shutil.rmtree(workdir / "stages/deep")
        expected = "it is not finished there"
    else:
        job[what] = "another"
        expected = f"it differs in {what}"
    assert reuse_stage(workdir, tmp_path / "new", "deep", job).startswith(expected)
    assert not (tmp_path / "new").exists()


def test_a_model_is_told_by_the_names_and_the_bytes_of_its_files(tmp_path):
    digests = set()
    for number, weights in enumerate((b"a", b"b")):
        write_model(tmp_path / str(number), weights)
        digests.add(model_digest(tmp_path / str(number)))
    (tmp_path / "0/README.md").write_text("a card")
    digests.add(model_digest(tmp_path / "0"))
    assert len(digests) == 2
    (tmp_path / "0/tokenizer.json").write_text("{}")
    digests.add(model_digest(tmp_path / "0"))
    assert len(digests) == 3
