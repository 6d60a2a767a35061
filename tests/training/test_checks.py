"""A mistake anywhere in a run is told before its first step, and leaves the workdir free."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.errors import ArtifactError, ConfigError, DataError, LayerSelectionError, PumaError
from puma_jax.files import read_object
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.train import load_config
from puma_jax.training import run as training_run
from puma_jax.training.checks import base_configs, check_run
from puma_jax.training.config import EvaluationConfig, LogConfig, LossConfig, ScratchConfig
from puma_jax.training.results import StageResult, stage_result
from puma_jax.training.run import run
from puma_jax.training.stages import with_inputs
from puma_jax.training.workdir import finished_model
from tests.data.fake_mbeir import write_test_sets, write_union
from tests.fuzz import Target, check_only_declared_errors

CONFIG = load_config(Path(__file__).with_name("tiny_run.py"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_test_sets(write_union(tmp_path_factory.mktemp("benchmark")))


@pytest.fixture
def config(root):
    found = CONFIG()
    return dataclasses.replace(found, data=dataclasses.replace(found.data, root=root))


def changed(config, stage=None, **fields):
    if stage is None:
        return dataclasses.replace(config, **fields)
    stages = {**config.stages, stage: dataclasses.replace(config.stages[stage], **fields)}
    return dataclasses.replace(config, stages=stages)


def check(config, tmp_path, devices=1, **options):
    mesh = make_mesh(MeshConfig(tensor=devices), jax.devices()[:devices])
    check_run(config, tmp_path / "run", mesh, **options)


def test_a_sound_run_passes_and_nothing_is_written(config, tmp_path):
    check(config, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda config: changed(config, "cut", keep_layers="9"),
            LayerSelectionError,
            "stage cut: keep_layers 9 is out of range: the model has 3 layers",
        ),
        (
            lambda config: changed(
                changed(config, "deep", keep_layers="1"), "cut", keep_layers="2"
            ),
            LayerSelectionError,
            "stage cut: keep_layers 2 is out of range: the model has 1 layers",
        ),
        (
            lambda config: changed(config, "cut", data_root=Path("/nowhere")),
            DataError,
            "/nowhere is not a folder",
        ),
        (
            lambda config: changed(config, "cut", model="/nowhere"),
            PumaError,
            "/nowhere",
        ),
        (
            lambda config: changed(config, evaluation=EvaluationConfig(every_steps=4, split="val")),
            ConfigError,
            r"evaluation.every_steps 4 .* split val, .* has none \(its splits: test\)",
        ),
        (
            lambda config: changed(
                config, scratch=ScratchConfig(400, 2**19, 1000, 4, 2, 2**19, 32, 1, 2)
            ),
            ConfigError,
            "scratch describes a model of .* parameters, more than",
        ),
        (
            lambda config: changed(config, "cut", loss=LossConfig(exit_layers=(1, 2))),
            ConfigError,
            r"stage cut: loss.exit_layers \[1, 2\] must be below the 2 layers that it keeps",
        ),
        (
            lambda config: changed(config, "cut", loss=LossConfig(widths=(8, 32))),
            ConfigError,
            r"stage cut: loss.widths \[8, 32\] must be below the 32 values of a vector",
        ),
    ],
    ids=["layers", "layers of layers", "data", "model", "split", "size", "exits", "widths"],
)
def test_a_mistake_of_any_stage_is_told(config, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        check(change(config), tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_divide_a_model_is_told(config, tmp_path):
    with pytest.raises(ConfigError, match="stage deep: mesh axis tensor=8 does not divide the 4"):
        check(config, tmp_path, devices=8)


def test_a_workdir_or_a_run_to_reuse_that_is_none_is_refused(config, tmp_path):
    with pytest.raises(ArtifactError, match=r"--reuse .* is not the workdir of a run"):
        check(config, tmp_path, reuse=tmp_path)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ArtifactError, match="is a file"):
        check(config, tmp_path)


def test_a_run_that_is_refused_claims_nothing(config, tmp_path):
    with pytest.raises(LayerSelectionError):
        run(changed(config, "cut", keep_layers="9"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_run_does_not_set_comes_from_the_model(config, tiny):
    saved = dataclasses.replace(
        tiny.config, images=ImageConfig(784, 1568), prompt=PromptConfig(template="bare")
    )
    unset = changed(config, images=None, prompt=None)
    assert with_inputs(saved, unset) == saved
    found = with_inputs(saved, changed(config, images=None, prompt=PromptConfig()))
    assert (found.images, found.prompt) == (saved.images, PromptConfig())


def test_a_model_from_scratch_without_a_prompt_has_the_defaults(config, tmp_path):
    bases = base_configs(changed(config, images=None, prompt=None), tmp_path)
    assert [base.prompt for base in bases.values()] == [PromptConfig()] * 2
    assert [base.decoder.layers for base in bases.values()] == [3, 3]


def branched(config):
    """Two stages that continue the deep one: the whole model after the pruned one."""
    whole = dataclasses.replace(config.stages["deep"], init_from="deep")
    return changed(config, stages={**config.stages, "whole": whole})


def test_a_stage_starts_from_the_model_of_the_one_it_names(config, tmp_path, monkeypatch):
    config = branched(config)
    assert [config.stage_before(name) for name in config.stages] == [None, "deep", "deep"]
    layers = [base.decoder.layers for base in base_configs(config, tmp_path).values()]
    assert layers == [3, 3, 3]
    chained = changed(config, "whole", init_from=None)
    assert base_configs(chained, tmp_path)["whole"].decoder.layers == 2
    started = {}

    def run_stage(name, config, folder, *others):
        started[name] = folder

    monkeypatch.setattr(training_run, "_make_base", lambda folder, config: None)
    monkeypatch.setattr(training_run, "_open_data", lambda config, workdir, mesh: {})
    monkeypatch.setattr(training_run, "_run_stage", run_stage)
    monkeypatch.setattr(training_run, "finish_stage", lambda workdir, name, **_: None)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert training_run._run_stages(config, tmp_path, mesh, None) == tmp_path / "whole"
    folders = {name: folder.relative_to(tmp_path).name for name, folder in started.items()}
    assert folders == {"deep": "base", "cut": "deep", "whole": "deep"}


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("cut", {"init_from": "whole"}, "cut.init_from whole is not a stage before it: deep"),
        ("deep", {"init_from": "deep"}, "deep.init_from deep is not .* it: there is none"),
        ("whole", {"model": "DIR"}, "stage.init_from deep and stage.model DIR exclude each other"),
    ],
)
def test_a_stage_starts_from_one_earlier_model(config, stage, fields, message):
    with pytest.raises(ConfigError, match=message):
        changed(branched(config), stage, **fields)


def test_a_run_from_scratch_frames_images_with_the_tokens_of_its_tokenizer(config, tmp_path):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    training_run._make_base(tmp_path / "base", config)
    (loader, _), *_ = training_run._open_data(config, tmp_path, mesh).values()
    ids = load_tokenizer(tmp_path / "base").get_vocab()
    rows = loader(0).rows
    tokens = rows.tokens[0]
    assert (rows.image_token_index[0] >= 0).any()
    for name, at in (
        ("<|image_pad|>", rows.image_token_index[0] >= 0),
        ("<|vision_start|>", tokens == ids["<|vision_start|>"]),
    ):
        assert at.any()
        assert set(tokens[at].tolist()) == {ids[name]}


def test_a_damaged_result_is_refused_in_one_line(config, tmp_path):
    folder = tmp_path / "results/cut"
    folder.mkdir(parents=True)
    (tmp_path / "stages/cut").mkdir(parents=True)
    (tmp_path / "stages/cut/finished.json").write_text('{"model": "digest"}')
    result = StageResult("digest", "test", 1, 10, 5, 2e6, 3.5, None)
    (folder / "result.json").write_text(json.dumps(vars(result)))
    path = folder / "result.json"
    check_only_declared_errors(Target(path, lambda: read_object(path, StageResult)))
    finished = tmp_path / "stages/cut/finished.json"
    check_only_declared_errors(Target(finished, lambda: finished_model(tmp_path, "cut")))
    assert stage_result("cut", config, tmp_path) == vars(result)


def test_wandb_is_asked_for_before_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check(changed(config, log=LogConfig(wandb="mine")), tmp_path)
