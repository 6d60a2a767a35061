"""The cache of a teacher's states: what the step would compute, once, and for no other teacher."""

import dataclasses
import json
import operator
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from puma_jax.config import ImageConfig, LoraConfig, PlanConfig, PromptConfig
from puma_jax.data.builder import Settings, build
from puma_jax.data.pipeline import Loader
from puma_jax.data.plan import Plan
from puma_jax.data.preparing import run
from puma_jax.data.prompts import Processor
from puma_jax.data.store import Store
from puma_jax.errors import ArtifactError, CheckpointError
from puma_jax.model import encoder
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import rules
from puma_jax.parallel.mesh import MeshConfig, data_shards, make_mesh
from puma_jax.training import cache
from puma_jax.training.config import (
    DataConfig,
    DistillConfig,
    LogConfig,
    LossConfig,
    StageConfig,
    TrainConfig,
)
from puma_jax.training.loop import run_stage
from puma_jax.training.metric_writer import MetricWriter
from puma_jax.training.step import FrozenParams
from puma_jax.training.teacher import make_teacher, split_teacher
from tests.data import fake_mbeir
from tests.fuzz import Target, check_only_declared_errors
from tests.reference import FLOAT32, byte_tokenizer
from tests.training.ready import ready_stage

KEPT, CHUNKS = (0, 1), 2
IMAGES = ImageConfig(4 * 28**2, 9 * 28**2)
PLAN = PlanConfig(batch_size=4, balance_window=3)
PLAIN = dataclasses.replace(PLAN, instructions=False)
TWO_SETS = dataclasses.replace(PLAN, mixture_weights=(("oven_task8", 1.0), ("mscoco_task0", 2.0)))


class Case:
    """All that a cache is built from."""

    def __init__(self, store, model, params, plan=PLAN, devices=1):
        self.model, self.mesh = model, make_mesh(MeshConfig(), jax.devices()[:devices])
        template = Processor(byte_tokenizer(), model).template
        self.plan = Plan(store.table, store.instructions, template, plan)
        shape = self.plan.fitting_shape(CHUNKS, devices)
        self.loader = Loader(store, self.plan, shape, CHUNKS)
        placed = jax.tree.map(jax.device_put, params, rules.shardings(params, self.mesh, model))
        _, student = encoder.keep_layers(model, placed, KEPT)
        self.frozen_params = FrozenParams(named_leaves(student), split_teacher(placed, KEPT, {}))
        self.teacher_fn = make_teacher(model, KEPT, FLOAT32, data_shards(self.mesh))

    def build(self, folder, teacher_fn=None, items="pairs"):
        return cache.build(
            folder,
            self.loader,
            teacher_fn or self.teacher_fn,
            self.frozen_params,
            items=items,
            model=self.model,
            compute=FLOAT32,
            mesh=self.mesh,
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """13 queries and 12 documents of all three modalities; one query has no instruction."""
    return fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def model(tiny):
    return dataclasses.replace(tiny.config, images=IMAGES)


@pytest.fixture(scope="module")
def store(root, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data"
    build(Settings(root=root, out=out, workers=1), Processor(byte_tokenizer(), model))
    return Store.open(out)


@pytest.fixture(scope="module")
def case(store, model, tiny):
    return Case(store, model, tiny.params)


@pytest.fixture(scope="module")
def finished(case, tmp_path_factory):
    """The folder of a cache that was built without a break."""
    folder = tmp_path_factory.mktemp("teacher") / "stage"
    case.build(folder)
    return folder


@pytest.mark.parametrize(
    ("plan", "devices", "drawn"),
    [(PLAN, 1, {-1, 0, 1}), (PLAN, 2, {-1, 0, 1}), (PLAIN, 1, {-1}), (TWO_SETS, 1, {0, 1})],
    ids=["instructions", "two devices", "plain", "two sets"],
)
def test_states_are_those_that_the_step_computes(
    store, model, tiny, tmp_path, plan, devices, drawn
):
    case = Case(store, model, tiny.params, plan, devices)
    kept, teacher_fn = case.build(tmp_path / "cache"), jax.jit(case.teacher_fn)
    modalities, prompts = set(), set()
    for number in range(3 * case.plan.steps_per_epoch):
        batch = case.loader(number)
        chunks = [jax.tree.map(operator.itemgetter(c), batch.rows) for c in range(CHUNKS)]
        states = [
            teacher_fn(case.frozen_params.teacher, case.frozen_params.student, rows)
            for rows in chunks
        ]
        states, found = np.concatenate(states), kept.of_pairs(batch)
        np.testing.assert_allclose(found.query, states[batch.query_slot], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.candidate, states[batch.candidate_slot], rtol=0, atol=1e-5)
        modalities |= set(batch.modality.tolist())
        prompts |= set(batch.prompt.tolist())
    assert modalities == ({0, 2} if plan is TWO_SETS else {0, 1, 2})
    assert prompts == drawn


def test_every_item_has_the_state_of_the_whole_model(case, finished, tiny):
    """Against transformers: all wordings of all queries, and every positive."""
    kept = case.build(finished)
    # Four queries with two prompts, the other nine with one or none; ten positives.
    assert kept.states.shape == (4 * 2 + 9 + len(np.unique(case.plan.table.positive_row)), 64)
    windows = cache._Windows(case.loader, kept.index)
    assert sorted(np.concatenate([*map(windows.items, range(windows.count))])) == list(
        range(len(kept.index))
    )
    for number, state in enumerate(kept.states):
        expected = tiny.expected(run(windows._preparing(number)))
        np.testing.assert_allclose(state, expected, rtol=0, atol=1e-4)


def test_candidates_alone_have_the_same_states(case, finished, tmp_path):
    whole, alone = case.build(finished), case.build(tmp_path / "stage", items="candidates")
    assert len(alone.states) == len(np.unique(case.plan.table.positive_row))
    for number in range(case.plan.steps_per_epoch):
        batch = case.loader(number)
        expected, found = whole.of_pairs(batch), alone.of_pairs(batch)
        assert found.query is None
        np.testing.assert_allclose(found.candidate, expected.candidate, rtol=0, atol=1e-5)
    with pytest.raises(ArtifactError, match=r"differs in .*items"):
        case.build(finished, items="candidates")


@pytest.mark.parametrize("windows_done", [0, 3])
def test_a_build_that_was_killed_goes_on(case, finished, tmp_path, monkeypatch, windows_done):
    noted, reports = cache._note, []

    def killed(digests, number, states):
        if number == windows_done:
            raise KeyboardInterrupt
        noted(digests, number, states)

    monkeypatch.setattr(cache, "_note", killed)
    with pytest.raises(KeyboardInterrupt):
        case.build(tmp_path / "stage")
    monkeypatch.setattr(cache, "_note", lambda *now: reports.append(now[1]) or noted(*now))
    found = case.build(tmp_path / "stage")
    assert reports == [*range(windows_done, reports[-1] + 1)]
    for name in ("states.npy", "digests.npy", "cache.json"):
        assert (tmp_path / "stage" / name).read_bytes() == (finished / name).read_bytes()
    np.testing.assert_array_equal(found.states, np.load(finished / "states.npy"))


def test_damaged_states_are_computed_again(case, finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "stage")
    whole, reports, noted = (folder / "states.npy").read_bytes(), [], cache._note
    damaged = bytearray(whole)
    damaged[-10] ^= 4
    (folder / "states.npy").write_bytes(damaged)
    monkeypatch.setattr(cache, "_note", lambda *now: reports.append(now[1]) or noted(*now))
    case.build(folder)
    assert len(reports) == 1
    assert "1 windows of states are damaged and computed again" in capsys.readouterr().out
    assert (folder / "states.npy").read_bytes() == whole


def test_a_finished_cache_is_not_computed_again(case, finished, monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(cache._Windows, "__call__", never)
    case.build(finished, teacher_fn=never)


@pytest.mark.parametrize("what", ["weights", "prompt", "items", "windows"])
def test_a_cache_of_something_else_is_refused(store, model, tiny, finished, what):
    params, plan = tiny.params, PLAN
    if what == "weights":
        params = jax.tree.map(lambda leaf: leaf * 1.001, params)
    if what == "prompt":
        model = dataclasses.replace(model, prompt=PromptConfig(positions="1d"))
    if what == "items":
        plan = PLAIN
    if what == "windows":
        plan = PlanConfig(batch_size=6)
    other = Case(store, model, params, plan)
    with pytest.raises(ArtifactError, match=f"differs in .*{what}.* there, .* here") as error:
        other.build(finished)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"), [("states.npy", b"{"), ("digests.npy", b""), ("states.npy", None)]
)
def test_a_file_that_is_not_of_the_cache_is_refused(case, finished, tmp_path, name, content):
    folder = shutil.copytree(finished, tmp_path / "stage")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-4] if content is None else content)
    with pytest.raises(CheckpointError, match=rf"{name} is not .*: delete"):
        case.build(folder)


def test_a_damaged_cache_is_refused_in_one_line(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "stage")
    about = json.loads((folder / "cache.json").read_text())

    def read():
        cache._allocate(folder, about, 64)
        cache._open(folder, about, 64, "r")

    for name in ("cache.json", "states.npy", "digests.npy"):
        check_only_declared_errors(Target(folder / name, read))


@pytest.mark.parametrize(
    ("trainable", "devices", "items"),
    [("lora", 1, "pairs"), ("full", 2, "pairs"), ("lora", 2, "candidates")],
)
def test_training_with_a_cache_is_training_without(
    root, store, tiny, tmp_path, trainable, devices, items
):
    losses = {}
    for cached in (False, True):
        config = TrainConfig(
            data=DataConfig(root, built=Path(store.path)),
            stages={
                "distil": StageConfig(
                    steps=3,
                    model=str(tiny.folder),
                    keep_layers="2",
                    plan=PlanConfig(batch_size=5, balance_window=2),
                    grad_cache_chunks=CHUNKS,
                    loss=LossConfig(chunk_size=2),
                    distill=DistillConfig(weight=(0.5, 0.9), scale=1.0, items=items, cached=cached),
                    trainable=trainable,
                    lora=LoraConfig(rank=4, alpha=8.0),
                )
            },
            images=IMAGES,
            compute=FLOAT32,
            log=LogConfig(every_steps=1, tensorboard=False),
        )
        workdir = tmp_path / str(cached)
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        stage = ready_stage("distil", config, workdir, mesh)
        # The layers that were cut are gone.
        assert (stage.frozen_params.teacher is None) == (stage.teacher_cache is not None) == cached
        metric_writer = MetricWriter(workdir, config.log, {})
        run_stage(stage, config, workdir / "checkpoints", metric_writer, lambda _: {})
        metric_writer.close()
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses[cached] = [
            [json.loads(line)[name] for name in ("loss", "distillation", "gradient_norm")]
            for line in lines
        ]
    assert len(losses[True]) == 3
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
