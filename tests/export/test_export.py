"""The entry point: a folder that is whole, with a card that says whose model it is."""

import json
from pathlib import Path

import pytest

from puma_jax import Embedder
from puma_jax.errors import CheckpointError, ConfigError, DataError
from puma_jax.evaluation.report import Evaluation, SetResult
from puma_jax.export import stablehlo
from puma_jax.export.__main__ import main
from puma_jax.export.card import Training
from puma_jax.train import load_config
from puma_jax.training.run import as_json

DEMO = Path(__file__).parents[2] / "configs/openmoji.py"


def evaluation(rate):
    rates = {"local": {5: rate}, "global": {5: rate / 2}}
    intervals = {"local": (0.1, 0.2), "global": (0.1, 0.2)}
    found = SetResult("cirr", 7, 20, 30, 5, rates, intervals, {1: 0.25})
    return Evaluation("test", 99, (found,))


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """What a run leaves, its model replaced by a small one."""
    workdir = tmp_path_factory.mktemp("run")
    Embedder.load(tiny.folder, dtype=None).keep_layers([0, 2]).save(workdir / "mac")
    config = as_json(load_config(DEMO)())
    (workdir / "config.json").write_text(json.dumps(config))
    results = {"stages": {"mac": {"evaluation": evaluation(0.5).to_json()}}}
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def test_a_folder_for_transformers_is_the_model_with_a_card(workdir, tmp_path):
    main("huggingface", str(workdir / "mac"), tmp_path / "out", license="Apache-2.0")
    original, loaded = (
        Embedder.load(folder, dtype="float32") for folder in (workdir / "mac", tmp_path / "out")
    )
    assert loaded.fingerprint == original.fingerprint
    card = (tmp_path / "out/README.md").read_text()
    assert "license: apache-2.0" in card
    assert "counted from 0: 0, 2." in card
    assert "From random weights, seed 0." in card
    stages = json.loads((workdir / "config.json").read_text())["stages"]
    for name, stage in stages.items():
        assert f"| {name}" in card
        assert f"| {stage['optimizer']['learning_rate']:g} |" in card.replace("  ", " ")
    assert "cirr task 7  it → i" in card
    assert "50.0 ± 5.0" in card


def test_a_card_tells_of_the_stages_that_made_the_model():
    config = as_json(load_config(DEMO)())
    first, second, third = config["stages"]
    assert list(Training(config, second, None).stages) == [first, second]
    assert Training(config, third, None).base is None
    config["stages"][second]["model"] = "some/base"
    assert list(Training(config, third, None).stages) == [second, third]
    assert Training(config, third, None).base == "some/base"


def test_a_run_of_an_older_version_is_refused_by_name(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    for stage in config["stages"].values():
        stage["train"] = stage.pop("trainable")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=r"config\.json is of an older version.*no field trainable"
    ):
        main("huggingface", str(tmp_path / "run/mac"), tmp_path / "out")


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
    with pytest.raises(DataError, match=r"card cannot be read as results.json"):
        main("huggingface", str(tiny.folder), tmp_path / "other", results=tmp_path / "card")


def test_a_model_that_is_cut_again_has_not_the_results_of_its_run(workdir, tmp_path):
    main("huggingface", str(workdir / "mac"), tmp_path / "out", keep_layers="1")
    assert "## Results" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("kind", ["stablehlo", "sentence-transformers"])
def test_other_kinds_have_their_files_and_a_card(workdir, tmp_path, kind):
    main(kind, str(workdir / "mac"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / {"stablehlo": "load.py"}.get(kind, "modules.json")).is_file()
    assert "## License" in (tmp_path / "out/README.md").read_text()
    weights = next((tmp_path / "out").glob("*.safetensors"))
    assert weights.stat().st_mode == (tmp_path / "out/README.md").stat().st_mode


def test_what_is_there_stays_and_what_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="mine exists: choose another folder, or remove it"):
        main("stablehlo", str(tiny.folder), tmp_path / "mine")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stablehlo, "write", full)
    with pytest.raises(CheckpointError, match="out cannot be written: No space left on device"):
        main("stablehlo", str(tiny.folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "kept"
