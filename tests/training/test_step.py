"""The step: the same gradients however a batch is cut, spread and packed, in constant memory."""

import dataclasses

import jax
import jax.extend
import numpy as np
import pytest

from puma_jax.config import LoraConfig, PlanConfig
from puma_jax.data.builder import Settings, build
from puma_jax.data.pipeline import Loader
from puma_jax.data.plan import Plan
from puma_jax.data.store import Store
from puma_jax.data.text_pairs import write_benchmark
from puma_jax.model import encoder, lora
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.tree import assemble, named_leaves, partition
from puma_jax.parallel import rules
from puma_jax.parallel.mesh import MeshConfig, data_shards, make_mesh
from puma_jax.training.config import (
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    ScoreDistillConfig,
    StageConfig,
)
from puma_jax.training.objective import TeacherStates
from puma_jax.training.stages import is_trained
from puma_jax.training.step import FrozenParams, init_state, make_loss, make_step
from puma_jax.training.teacher import make_teacher, split_teacher
from puma_jax.training.transfer import shard_batch
from tests.losses import reference
from tests.reference import FLOAT32, assert_full_precision
from tests.training.batches import batch_of

PAIRS = 24
STEPS = 10
# Everything at once: adapters with dropout, distillation, MAC-Loss, a trained temperature, hard
# negatives, three widths at three depths, and scores of another teacher.
ALL = StageConfig(
    steps=STEPS,
    keep_layers="3",
    plan=PlanConfig(hard_negatives=2),
    loss=LossConfig(
        kind="mac",
        temperature=0.5,
        learn_temperature=True,
        mask_same_document=True,
        widths=(8, 24),
        width_weights=(0.5, 2.0),
        exit_layers=(1, 2),
        exit_weights=(0.5, 0.25),
    ),
    distill=DistillConfig(weight=(0.1, 0.5), scale=1.0),
    score_distill=ScoreDistillConfig(weight=0.7, temperature=0.2, teacher_temperature=0.5),
    trainable="lora",
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3, first_layer_lr_scale=0.5),
)
FULL = dataclasses.replace(
    ALL,
    trainable="full",
    train_vision=True,
    plan=PlanConfig(),
    score_distill=ScoreDistillConfig(),
)
KEPT = (0, 1, 2)
RING = dataclasses.replace(
    ALL, loss=dataclasses.replace(ALL.loss, cross_device="ring", chunk_size=2)
)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def prepared(pair, config, mesh):
    """The parts of a stage that start from a pair's model, on a mesh."""
    placed = jax.tree.map(
        jax.device_put, pair.params, rules.shardings(pair.params, mesh, pair.config)
    )
    model, student = encoder.keep_layers(pair.config, placed, KEPT)
    if config.trainable == "lora":
        student = lora.add_lora(student, config.lora, jax.random.key(1))
        leaves = named_leaves(student)
        noise = {
            name: leaf + 0.02 if name.endswith("lora_b") else leaf for name, leaf in leaves.items()
        }
        student = assemble(student, noise)
    trained, frozen = partition(student, lambda name: is_trained(name, config))
    frozen_params = FrozenParams(frozen, split_teacher(placed, KEPT, trained))
    structure = jax.eval_shape(lambda: student)
    teacher_fn = make_teacher(pair.config, KEPT, FLOAT32, data_shards(mesh))
    loss = make_loss(config, STEPS, structure, FLOAT32, mesh, jax.random.key(2), teacher_fn)
    shardings = rules.shardings(
        jax.eval_shape(lambda trained: init_state(config, STEPS, trained), trained), mesh, model
    )
    state = jax.jit(lambda trained: init_state(config, STEPS, trained), out_shardings=shardings)(
        trained
    )
    return state, frozen_params, loss


def sharded_batch(pair, config, mesh, chunks):
    made = batch_of(pair, PAIRS, chunks, data_shards(mesh), config.plan.hard_negatives)
    return shard_batch(made, config.loss, mesh)


def gradients(pair, config, mesh, chunks):
    """Metrics and gradients at a step in the middle."""
    state, frozen_params, loss = prepared(pair, config, mesh)
    batch = sharded_batch(pair, config, mesh, chunks)
    compute = jax.jit(jax.grad(loss, has_aux=True))
    found, metrics = compute(state.trained, np.int32(3), frozen_params, batch, None)
    return jax.device_get(found), jax.device_get(metrics)


def assert_same(found, expected, tolerance):
    """Equal as a whole to the tolerance, and no leaf far off by itself."""
    assert set(found) == set(expected)
    error = {name: np.linalg.norm(found[name] - leaf) for name, leaf in expected.items()}
    size = {name: np.linalg.norm(leaf) for name, leaf in expected.items()}
    assert np.linalg.norm([*error.values()]) <= tolerance * np.linalg.norm([*size.values()])
    for name in expected:
        assert error[name] <= 100 * tolerance * size[name], name


def test_gradients_do_not_depend_on_the_number_of_chunks(tiny):
    """Nor does it matter to them that visual tokens are pooled."""
    pooled = with_pooled_tokens(tiny)
    expected, metrics = gradients(pooled, ALL, one_device(), 1)
    assert metrics["distillation"] > 0.01
    assert metrics["score_distillation"] > 0.01
    assert all(np.linalg.norm(leaf) > 0 for leaf in expected.values())
    for chunks in (2, 8):
        assert_same(gradients(pooled, ALL, one_device(), chunks)[0], expected, 1e-6)


def with_pooled_tokens(pair):
    """The same model, of whose visual tokens four become one."""
    images = dataclasses.replace(pair.config.images, spatial_pool_stride=2)
    config = dataclasses.replace(pair.config, images=images)
    checkpoint = dataclasses.replace(open_checkpoint(pair.folder), config=config)
    return dataclasses.replace(pair, config=config, params=checkpoint.read(dtype="float32"))


@pytest.mark.parametrize(("config", "axes"), [(ALL, (1, 1, 1)), (RING, (8, 1, 1))])
def test_float32_keeps_its_bits_in_every_product_of_a_step(tiny, config, axes):
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: axes[0]])
    state, frozen_params, loss = prepared(tiny, config, mesh)
    batch = sharded_batch(tiny, config, mesh, 2)
    compute = jax.jit(jax.grad(loss, has_aux=True))
    arguments = state.trained, np.int32(3), frozen_params, batch, None
    assert_full_precision(compute.lower(*arguments).as_text())


@pytest.fixture(scope="module")
def of_one_device(tiny):
    """Three steps of one device, for adapters and for full training."""
    return {config.trainable: three_steps(tiny, config, one_device()) for config in (ALL, FULL)}


@pytest.mark.parametrize(
    ("config", "axes"),
    [(RING, (8, 1, 1)), (ALL, (2, 2, 2)), (FULL, (1, 4, 2))],
    ids=lambda value: value.trainable if isinstance(value, StageConfig) else None,
)
def test_eight_devices_take_the_steps_of_one(tiny, of_one_device, config, axes):
    expected = of_one_device[config.trainable]
    found = three_steps(tiny, config, make_mesh(MeshConfig(*axes)))
    for (loss, norm, trained), (loss_one, norm_one, trained_one) in zip(
        found, expected, strict=True
    ):
        np.testing.assert_allclose([loss, norm], [loss_one, norm_one], rtol=1e-5)
        error = {name: np.linalg.norm(trained[name] - leaf) for name, leaf in trained_one.items()}
        size = [np.linalg.norm(leaf) for leaf in trained_one.values()]
        assert np.linalg.norm([*error.values()]) <= 1e-5 * np.linalg.norm(size)
        for name, leaf in trained_one.items():
            # Where a gradient is little more than rounding, as of the bias of keys, AdamW scales
            # it up; a wrong one moves a weight by the learning rate, 1e-3 in each step.
            np.testing.assert_allclose(trained[name], leaf, rtol=0, atol=1e-4, err_msg=name)


def three_steps(pair, config, mesh):
    """Loss, gradient norm and weights after each of three steps."""
    state, frozen_params, loss = prepared(pair, config, mesh)
    step = jax.jit(make_step(config, STEPS, loss))
    batch = sharded_batch(pair, config, mesh, 2)
    history = []
    for _ in range(3):
        state, metrics = step(state, frozen_params, batch, None)
        history.append((metrics["loss"], metrics["gradient_norm"], jax.device_get(state.trained)))
    return history


def test_a_step_has_the_loss_of_the_formula_over_its_pairs_and_hard_negatives(tiny):
    """Vectors, modalities, documents and which of them count: each comes to its place."""
    for kind, mask in (("info_nce", False), ("mac", True), ("mamcl", True)):
        loss_config = LossConfig(kind=kind, temperature=0.5, mask_same_document=mask)
        if mask:
            loss_config = dataclasses.replace(
                loss_config,
                widths=(8,),
                width_weights=(0.5,),
                exit_layers=(2,),
                exit_weights=(0.25,),
            )
        config = dataclasses.replace(
            ALL, loss=loss_config, lora=LoraConfig(rank=4, alpha=8.0), distill=DistillConfig()
        )
        if not mask:
            config = dataclasses.replace(config, score_distill=ScoreDistillConfig())
        state, frozen_params, loss = prepared(tiny, config, one_device())
        batch = sharded_batch(tiny, config, one_device(), 1)
        _, metrics = jax.jit(loss)(state.trained, np.int32(STEPS), frozen_params, batch, None)
        states = states_of(tiny, config, state, frozen_params, batch)
        narrow = [formula(states[:, :width], config, batch) for width in config.loss.widths]
        expected = formula(states, config, batch) + 0.5 * sum(narrow)
        np.testing.assert_allclose(metrics["contrastive"], expected, rtol=1e-5)
        for width, value in zip(config.loss.widths, narrow, strict=True):
            np.testing.assert_allclose(metrics[f"contrastive_{width}"], value, rtol=1e-5)
        if mask:
            scores = distilled(states, config, batch) + 0.5 * distilled(
                states[:, :8], config, batch
            )
            np.testing.assert_allclose(metrics["score_distillation"], scores, rtol=1e-5)
        for layers in config.loss.exit_layers:
            states = states_of(tiny, config, state, frozen_params, batch, layers)
            shallow = sum(
                weight * (formula(of, config, batch) + 0.7 * distilled(of, config, batch))
                for weight, of in ((1.0, states), (0.5, states[:, :8]))
            )
            np.testing.assert_allclose(metrics[f"loss_{layers}_layers"], shallow, rtol=1e-5)
            whole = expected + 0.7 * scores
            np.testing.assert_allclose(metrics["loss"], whole + 0.25 * shallow, rtol=1e-5)


@pytest.mark.parametrize("items", ["pairs", "candidates"])
def test_states_are_distilled_by_their_squared_errors(tiny, items):
    """Those of queries and candidates, or of candidates alone, where a pair counts."""
    config = StageConfig(
        steps=STEPS,
        distill=DistillConfig(weight=(0.1, 0.5), scale=0.3, items=items),
        trainable="lora",
        lora=LoraConfig(rank=4, alpha=8.0),
    )
    state, frozen_params, loss = prepared(tiny, config, one_device())
    batch = sharded_batch(tiny, config, one_device(), 1)
    states = states_of(tiny, config, state, frozen_params, batch)
    expected = 0.0
    teacher = {"query": None}
    for seed, name in enumerate(("query", "candidate")):
        if name == "query" and items == "candidates":
            continue
        random = np.random.default_rng(seed).normal(size=(PAIRS, states.shape[1]))
        teacher[name] = random.astype(np.float32)
        errors = states[getattr(batch, f"{name}_slot")] - teacher[name]
        expected += 0.3 * np.mean(errors[np.asarray(batch.valid)] ** 2)
    given = state.trained, np.int32(STEPS // 2), frozen_params, batch, TeacherStates(**teacher)
    _, metrics = jax.jit(loss)(*given)
    np.testing.assert_allclose(metrics["distillation"], expected, rtol=1e-5)
    # Half-way, 0.3 of the loss.
    whole = 0.7 * metrics["contrastive"] + 0.3 * expected
    np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-5)


def distilled(states, config, batch):
    """The loss of a teacher's scores."""
    vectors = states / np.linalg.norm(states, axis=1, keepdims=True)
    slots = np.column_stack([batch.candidate_slot, batch.negatives.slot])
    valid = np.column_stack([np.ones(len(slots), bool), batch.negatives.valid])
    return reference.score_distillation(
        vectors[batch.query_slot],
        vectors[np.minimum(slots, len(vectors) - 1)],
        np.column_stack([batch.scores.positive, batch.scores.negative]).astype(np.float64),
        temperature=config.score_distill.temperature,
        teacher_temperature=config.score_distill.teacher_temperature,
        valid=valid & np.asarray(batch.valid)[:, None],
    )


def states_of(pair, config, state, frozen_params, batch, layers=None):
    """The states of all slots, of the student with only its first layers."""
    model, structure = encoder.keep_layers(pair.config, pair.params, KEPT)
    structure = lora.add_lora(structure, config.lora, jax.random.key(1))
    params = assemble(structure, {**frozen_params.student, **state.trained})
    params = encoder.keep_layers(model, params, layers or len(KEPT))[1]
    states = encoder.encode(params, jax.tree.map(lambda leaf: leaf[0], batch.rows), FLOAT32)
    return np.asarray(states, np.float64)


def formula(states, config, batch):
    """The loss at the end of training."""
    vectors = states / np.linalg.norm(states, axis=1, keepdims=True)
    there = np.asarray(batch.negatives.valid)
    slot, modality, document = (
        np.asarray(column)[there]
        for column in (batch.negatives.slot, batch.negatives.modality, batch.negatives.document)
    )
    tau = config.loss.temperature
    return reference.contrastive(
        vectors[batch.query_slot],
        vectors[batch.candidate_slot],
        modality=np.asarray(batch.modality),
        tau_norm=tau,
        tau_hard=tau * np.exp(-config.loss.decay) if config.loss.kind == "mac" else tau,
        same_modality_only=config.loss.kind == "mamcl",
        valid=np.asarray(batch.valid),
        document=np.asarray(batch.document) if config.loss.mask_same_document else None,
        negatives=(vectors[slot], modality, document, np.ones(len(slot), bool)),
    )


@pytest.mark.parametrize(("config", "runs"), [(ALL, 1), (FULL, 3)], ids=["frozen", "trained"])
def test_a_frozen_tower_runs_once_for_student_teacher_and_backward_pass(tiny, config, runs):
    """A trained one runs for the student, for its backward pass again, and for the teacher."""
    mesh = one_device()
    state, frozen_params, loss = prepared(tiny, config, mesh)
    batch = sharded_batch(tiny, config, mesh, 2)
    given = state.trained, np.int32(3), frozen_params, batch, None
    traced = jax.make_jaxpr(jax.grad(loss, has_aux=True))(*given)
    vision = tiny.config.vision
    kernel = (vision.patch_values, vision.width)
    assert sum(shapes[1] == kernel for shapes in products(traced.jaxpr)) == runs


def products(jaxpr):
    """The shapes of both factors of every matrix product in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(of.aval.shape for of in equation.invars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


def test_memory_does_not_grow_with_the_batch(tiny):
    loss = LossConfig(kind="mac", chunk_size=64, widths=(8, 24), exit_layers=(1, 2))
    config = dataclasses.replace(ALL, loss=loss)
    peak = {pairs: temporary_bytes(tiny, config, pairs, pairs // 64) for pairs in (128, 2048)}
    assert peak[2048] <= 1.15 * peak[128]


def temporary_bytes(pair, config, pairs, chunks):
    """The memory that the compiled step needs beside its arguments and results."""
    mesh = one_device()
    state, frozen_params, loss = prepared(pair, config, mesh)
    few = batch_of(pair, 64, 1, negatives=config.plan.hard_negatives)
    # As many chunks of the same shape: only shapes are compiled.
    batch = jax.eval_shape(lambda: put_shapes(few, pairs, chunks))
    compiled = (
        jax.jit(make_step(config, STEPS, loss), donate_argnums=0)
        .lower(state, frozen_params, batch, None)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def put_shapes(few, pairs, chunks):
    rows = jax.tree.map(lambda leaf: jax.numpy.repeat(leaf, chunks, axis=0), few.rows)

    def column(leaf):
        dtype = {"b": "bool", "f": "float32"}.get(leaf.dtype.kind, "int32")
        return jax.numpy.zeros((pairs, *leaf.shape[1:]), dtype)

    columns = {
        field.name: jax.tree.map(column, getattr(few, field.name))
        for field in dataclasses.fields(few)
        if field.name != "rows"
    }
    return dataclasses.replace(few, rows=rows, **columns)


def test_pairs_that_fill_up_a_batch_change_nothing(tiny):
    """24 pairs become 25 to divide into rows of 5; what is added is no negative."""
    config = dataclasses.replace(ALL, loss=LossConfig(chunk_size=5))
    expected, _ = gradients(tiny, dataclasses.replace(ALL, loss=LossConfig()), one_device(), 1)
    found, _ = gradients(tiny, config, one_device(), 1)
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize(("mask", "expected"), [(True, 0.0), (False, np.log(2))])
def test_a_document_under_two_ids_is_no_negative_of_its_own_query(tiny, tmp_path, mask, expected):
    """Two queries of one text, which the table of pairs holds twice and spells in two ways."""
    (tmp_path / "pairs.csv").write_text("sent0,sent1\na cat,a pet\na dog,A pet.\n")
    write_benchmark(tmp_path / "pairs.csv", tmp_path / "pairs")
    build(Settings(tmp_path / "pairs", tmp_path / "built", workers=1), tiny.processor)
    store = Store.open(tmp_path / "built")
    template = tiny.processor.template
    plan = Plan(store.table, store.instructions, template, PlanConfig(batch_size=2))
    batch = Loader(store, plan, plan.fitting_shape(1, 1), 1)(0)
    assert len(set(batch.candidate.tolist())) == 2
    mesh, loss_config = one_device(), LossConfig(kind="info_nce", mask_same_document=mask)
    # Dropout would draw masks of their own for equal documents.
    config = dataclasses.replace(
        ALL,
        loss=loss_config,
        lora=LoraConfig(rank=4, alpha=8.0),
        score_distill=ScoreDistillConfig(),
    )
    state, frozen_params, loss = prepared(tiny, config, mesh)
    batch = shard_batch(batch, loss_config, mesh)
    _, metrics = jax.jit(loss)(state.trained, np.int32(0), frozen_params, batch, None)
    np.testing.assert_allclose(metrics["contrastive"], expected, atol=1e-5)
