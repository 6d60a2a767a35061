"""The entry point: a folder that is whole, with a card that says whose model it is."""

import json
import resource
from pathlib import Path

import jax
import pytest

from puma_jax import Embedder, prune
from puma_jax.config import LoraConfig
from puma_jax.errors import ArtifactError, ConfigError, DataError, LayerSelectionError
from puma_jax.evaluation.report import Evaluation, SetResult
from puma_jax.export import stablehlo
from puma_jax.export.__main__ import main
from puma_jax.export.card import Run, Training, training_of
from puma_jax.files import as_json as json_text
from puma_jax.model.lora import add_lora, is_lora
from puma_jax.model.tree import partition
from puma_jax.schema import from_json
from puma_jax.train import load_config
from puma_jax.training.adapter import write_adapter
from puma_jax.training.config import StageConfig
from puma_jax.training.run import as_json
from tests.fuzz import Target, check_only_declared_errors

DEMO = Path(__file__).parents[2] / "configs/openmoji.py"


def evaluation(rate):
    rates = {"local": {5: rate}, "global": {5: rate / 2}}
    intervals = {"local": (0.1, 0.2), "global": (0.1, 0.2)}
    found = SetResult("cirr", 7, 20, 30, 5, rates, intervals, {1: 0.25})
    return Evaluation("test", 99, (found,))


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """The folder of a finished run, its model replaced by a small one."""
    workdir = tmp_path_factory.mktemp("run")
    Embedder.load(tiny.folder, dtype=None).keep_layers([0, 2]).save(workdir / "pruned")
    config = as_json(load_config(DEMO)())
    (workdir / "config.json").write_text(json.dumps(config))
    results = {"stages": {"pruned": {"evaluation": evaluation(0.5).to_json()}}}
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def test_a_folder_for_transformers_is_the_model_with_a_card(workdir, tmp_path):
    main("huggingface", str(workdir / "pruned"), tmp_path / "out", license="Apache-2.0")
    original, loaded = (
        Embedder.load(folder, dtype="float32") for folder in (workdir / "pruned", tmp_path / "out")
    )
    assert loaded.fingerprint == original.fingerprint
    card = (tmp_path / "out/README.md").read_text()
    assert "license: apache-2.0" in card
    assert "counted from 0: 0, 2." in card
    assert "**Images.** The EXIF orientation is applied" in card
    assert "From random weights, seed 0." in card
    stages = json.loads((workdir / "config.json").read_text())["stages"]
    del stages["cut"]
    assert "| cut" not in card  # its model is not one that the exported one continues
    for name, stage in stages.items():
        assert f"| {name}" in card
        assert f"| {stage['optimizer']['learning_rate']:g} |" in card.replace("  ", " ")
    assert "cirr task 7  it → i" in card
    assert "50.0 ± 5.0" in card


def test_an_adapter_is_merged_into_what_is_exported_and_pruned(tiny, tmp_path):
    params = add_lora(tiny.params, LoraConfig(rank=2), jax.random.key(0))
    leaves = {name: leaf + 0.05 for name, leaf in partition(params, is_lora)[0].items()}
    stage = StageConfig(steps=1, lora=LoraConfig(rank=2))
    write_adapter(tmp_path / "adapter", tiny.config, leaves, stage, "base")
    model, adapter = str(tiny.folder), str(tmp_path / "adapter")
    main("huggingface", model, tmp_path / "whole", adapter=adapter)
    prune.main(model, "2", tmp_path / "pruned", adapter=adapter)
    expected = Embedder.load(model, dtype=None, adapter=adapter)
    plain = Embedder.load(model, dtype=None)
    assert Embedder.load(tmp_path / "whole", dtype=None).fingerprint == expected.fingerprint
    pruned = Embedder.load(tmp_path / "pruned", dtype=None)
    assert pruned.fingerprint == expected.keep_layers(2).fingerprint
    assert pruned.fingerprint != plain.keep_layers(2).fingerprint


def test_a_card_tells_of_the_stages_that_made_the_model():
    config = as_json(load_config(DEMO)())
    first, second, third = names = ("deep", "distil", "pruned")
    config["stages"] = {name: config["stages"][name] | {"init_from": None} for name in names}
    run = from_json(Run, config, unknown="ignore")
    assert list(Training(run, second, None).stages) == [first, second]
    assert Training(run, third, None).base is None
    config["stages"][third]["init_from"] = first
    run = from_json(Run, config, unknown="ignore")
    assert list(Training(run, third, None).stages) == [first, third]
    config["stages"][third]["init_from"] = None
    config["stages"][second]["model"] = "some/base"
    run = from_json(Run, config, unknown="ignore")
    assert list(Training(run, third, None).stages) == [second, third]
    assert Training(run, third, None).base == "some/base"


def test_a_run_of_an_older_version_is_refused_by_name(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    for stage in config["stages"].values():
        stage["train"] = stage.pop("trainable")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError,
        match=r"config\.json: stages\.\w+\.trainable is missing: .* version .* copy .*pruned",
    ):
        main("huggingface", str(tmp_path / "run/pruned"), tmp_path / "out")


def test_results_given_stand_in_the_card(tiny, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(evaluation(0.75).to_json()))
    main(
        "huggingface", str(tiny.folder), tmp_path / "out", keep_layers="1", results=results
    )  # fmt: skip
    card = (tmp_path / "out/README.md").read_text()
    assert "75.0 ± 5.0" in card
    assert "counted from 0: 0." in card
    assert "## Training" not in card
    assert "its license holds for them" in card
    with pytest.raises(DataError, match=r"card is missing"):
        main("huggingface", str(tiny.folder), tmp_path / "other", results=tmp_path / "card")


def test_a_model_that_is_cut_again_has_not_the_results_of_its_run(workdir, tmp_path):
    main("huggingface", str(workdir / "pruned"), tmp_path / "out", keep_layers="1")
    assert "## Results" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("kind", ["stablehlo", "sentence-transformers"])
def test_other_kinds_have_their_files_and_a_card(workdir, tmp_path, kind):
    main(kind, str(workdir / "pruned"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / {"stablehlo": "load.py"}.get(kind, "modules.json")).is_file()
    assert "## License" in (tmp_path / "out/README.md").read_text()
    weights = next((tmp_path / "out").glob("*.safetensors"))
    assert weights.stat().st_mode == (tmp_path / "out/README.md").stat().st_mode


def test_the_record_of_a_run_is_read_or_refused_in_one_line(workdir, tmp_path):
    for name in ("config.json", "results.json"):
        path = tmp_path / name
        path.write_bytes((workdir / name).read_bytes())
        target = Target(path, lambda: training_of(tmp_path / "pruned"))
        outcome = check_only_declared_errors(target)
        assert min(outcome.declared, outcome.accepted) > 20
    # A model in the folder of another is of no run.
    (tmp_path / "config.json").write_text(json_text({"model_type": "qwen2_vl"}))
    assert training_of(tmp_path / "pruned") is None


def test_what_is_there_stays_and_what_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    for name in ("mine", "out.unfinished", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("kept")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    refused = {"file": "is a file", "file/x": "written: .* is a file", "mine": "is not empty"}
    monkeypatch.setattr(Embedder, "load", None)  # not before the place is checked
    for name, message in refused.items():
        with pytest.raises(ArtifactError, match=message):
            main("stablehlo", str(tiny.folder), tmp_path / name)
    with pytest.raises(LayerSelectionError):
        main("stablehlo", str(tiny.folder), tmp_path / "out", keep_layers="x")
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stablehlo, "write", full)
    with pytest.raises(ArtifactError, match="out cannot be written: No space left on device"):
        main("stablehlo", str(tiny.folder), tmp_path / "out")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_the_working_directory_can_be_written_if_it_is_empty(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main("huggingface", str(tiny.folder), Path())
    assert f"# {tmp_path.name}\n" in (tmp_path / "README.md").read_text()
    assert Embedder.load(tmp_path, dtype="float32").embedding_dim == tiny.config.decoder.width
    assert not [path for path in tmp_path.parent.iterdir() if "partial" in path.name]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("kind", ["huggingface", "stablehlo", "sentence-transformers"])
def test_a_full_disk_is_a_line_whichever_library_writes(tiny, tmp_path, kind):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 5_000, 100_000):  # of the largest file
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(ArtifactError, match=r"/out\S* cannot be written: File too large"):
                main(kind, str(tiny.folder), tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.iterdir())
