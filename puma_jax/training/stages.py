"""One stage before its first step: its data, its student, its teacher, and its step.

`build_stage` does all of it. `launch/aot_check.py` calls the same `build_student` and `build_step`
on shapes instead of arrays.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from puma_jax.config import ComputeConfig, DType, ModelConfig
from puma_jax.data.builder.build import Settings, build
from puma_jax.data.pipeline import Loader
from puma_jax.data.plan import Plan
from puma_jax.data.prompts import Processor, prompt_fingerprint
from puma_jax.data.store import Store
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.embedder import Embedder
from puma_jax.model import hf, lora
from puma_jax.model.encoder import Encoder, keep_layers, layer_indices, parse_layers
from puma_jax.model.families import family_of
from puma_jax.model.peft import Adapter
from puma_jax.model.tree import assemble, named_leaves, partition
from puma_jax.parallel import multihost, rules
from puma_jax.parallel.mesh import data_shards, replicated
from puma_jax.training import cache
from puma_jax.training.config import StageConfig, TrainConfig
from puma_jax.training.data_notes import notes
from puma_jax.training.optimizer import Leaves
from puma_jax.training.step import FrozenParams, TrainState, init_state, make_loss, make_step
from puma_jax.training.teacher import TeacherFn, make_teacher, split_teacher
from puma_jax.training.workdir import data_folder
from puma_jax.typing import PRNGKeyArray


@dataclass
class Stage:
    """A stage that is ready to run, and its state while it runs."""

    name: str
    config: StageConfig
    steps: int
    job: dict[str, Any]
    """All that decides the model of the stage, from `workdir.stage_job`."""
    model: ModelConfig
    """Config of the student."""
    processor: Processor
    source: hf.HubConfigs
    """Configs that came with the model the stage starts from."""
    structure: Encoder
    """The student with its adapters, its leaves replaced by their shapes."""
    compute: ComputeConfig
    mesh: jax.sharding.Mesh
    loader: Loader
    teacher_cache: cache.TeacherCache | None
    """The teacher's states; None if every step computes them, or if there is no teacher."""
    frozen_params: FrozenParams
    state: TrainState
    step: jax.stages.Wrapped
    """`step.make_step` under `jax.jit`; it donates the state."""

    def adapters(self) -> Leaves:
        """Return the adapters if they are all that makes the model, in a family of transformers."""
        if self.config.train_vision or family_of(self.model.family).backbone_architecture is None:
            return {}
        return {name: leaf for name, leaf in self.state.trained.items() if lora.is_lora(name)}

    def embedder(self) -> Embedder:
        """Return an embedder of the student as it is now, adapters merged."""
        leaves = {**self.frozen_params.student, **self.state.trained}
        params = lora.merge(assemble(self.structure, leaves))
        return Embedder(
            self.model,
            params,
            self.processor.tokenizer,
            compute=self.compute,
            mesh=self.mesh,
            source=self.source,
        )


def build_stage(
    name: str,
    config: TrainConfig,
    checkpoint: hf.Checkpoint,
    data: tuple[Loader, int],
    job: dict[str, Any],
    workdir: Path,
    mesh: jax.sharding.Mesh,
    adapter: Adapter | None = None,
) -> Stage:
    """Return a stage before its first step.

    Args:
        name: Name of the stage in the config.
        config: Config of the run.
        checkpoint: The model to start from.
        data: Loader of the stage's batches and number of its steps, from `open_data`.
        job: All that decides the model of the stage, from `workdir.stage_job`.
        workdir: Folder of the run.
        mesh: Devices to train on.
        adapter: Adapter on the model; it is trained further if the stage trains adapters.
    """
    stage = config.stages[name]
    if adapter is not None and stage.trainable == "lora":
        stage = dataclasses.replace(stage, lora=adapter.lora_config(stage.lora.dropout))
    base_config = with_inputs(checkpoint.config, config)
    processor = Processor(load_tokenizer(checkpoint.folder), base_config)
    loader, steps = data
    number = list(config.stages).index(name)
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    student_key, dropout_key = jax.random.split(key)

    kept = kept_layers(stage, base_config.decoder.layers)
    model = student_config(stage, base_config)
    # Without a teacher, removed layers are never read.
    layers = tuple(range(base_config.decoder.layers)) if stage.distill.on else kept
    shardings = rules.sharding_fn(mesh, base_config)
    base = dataclasses.replace(checkpoint, config=base_config).read(
        layers, dtype=param_dtype(stage, config.compute), shardings=shardings
    )
    if adapter is not None:
        if stage.trainable == "lora":
            base = adapter.add_to(base, layers, shardings=shardings, dropout=stage.lora.dropout)
        else:
            base = adapter.merge_into(base, layers, shardings=shardings)
    student, trained, frozen_params = build_student(
        stage, config.compute, base_config, base, student_key
    )
    structure = jax.eval_shape(lambda: student)
    # Only the leaves of `trained` and `frozen_params` take memory from here on.
    del base, student
    teacher_fn, teacher_cache, frozen_params = build_teacher(
        name, config, base_config, loader, frozen_params, workdir, mesh
    )

    def init(trained: Leaves) -> TrainState:
        return init_state(stage, steps, trained)

    of_state = rules.shardings(jax.eval_shape(init, trained), mesh, model)
    return Stage(
        name=name,
        config=stage,
        steps=steps,
        job=job,
        model=model,
        processor=processor,
        source=checkpoint.source,
        structure=structure,
        compute=config.compute,
        mesh=mesh,
        loader=loader,
        teacher_cache=teacher_cache,
        frozen_params=frozen_params,
        state=jax.jit(init, out_shardings=of_state)(trained),
        step=build_step(
            stage,
            steps,
            structure,
            of_state,
            compute=config.compute,
            mesh=mesh,
            dropout_key=dropout_key,
            teacher_fn=teacher_fn,
        ),
    )


def open_data(
    name: str,
    config: TrainConfig,
    processor: Processor,
    store: Store,
    mesh: jax.sharding.Mesh,
) -> tuple[Loader, int]:
    """Return the loader of a stage's batches, and the number of its steps.

    Raises:
        DataError: There is nothing to train on.
        CheckpointError: The data belong to another tokenizer.
    """
    stage = config.stages[name]
    store.check(prompt_fingerprint(processor))
    pairs = len(store.table.query_set)
    if pairs < stage.plan.batch_size:
        print(
            f"{name}: the data has {pairs} pairs, fewer than plan.batch_size "
            f"{stage.plan.batch_size}: every batch holds all of them"
        )
    plan_config = dataclasses.replace(
        stage.plan, seed=stage.plan.seed + config.seed, batch_size=min(stage.plan.batch_size, pairs)
    )
    plan = Plan(store.table, store.instructions, processor.template, plan_config)
    for note in notes(name, stage, plan):
        print(f"{name}: {note}")
    host, hosts = multihost.process_slice(mesh)
    loader = Loader(
        store,
        plan,
        plan.fitting_shape(stage.grad_cache_chunks, data_shards(mesh)),
        stage.grad_cache_chunks,
        host=host,
        hosts=hosts,
        on_bad_record=config.data.on_bad_record,
    )
    return loader, stage.steps or max(1, round((stage.epochs or 0) * plan.steps_per_epoch))


def open_store(config: TrainConfig, root: Path, processor: Processor, workdir: Path) -> Store:
    """Return the training data of a benchmark; build them first if they are not built.

    Raises:
        DataError: There is nothing to train on, or a record is bad.
    """
    if config.data.built is not None and root == config.data.root:
        store = Store.open(config.data.built)
    else:
        out = data_folder(workdir, root, prompt_fingerprint(processor))
        settings = Settings(root=root, out=out, on_bad_record=config.data.on_bad_record)
        multihost.on_process_zero(lambda: _build(settings, processor))
        store = Store.open(out)
    return store


def _build(settings: Settings, processor: Processor) -> None:
    """Build the training data, and say what is left out of them."""
    for note in build(settings, processor).notes():
        print(f"{settings.root}: {note}", flush=True)


def build_student(
    config: StageConfig,
    compute: ComputeConfig,
    base_config: ModelConfig,
    base: Encoder,
    key: PRNGKeyArray,
) -> tuple[Encoder, Leaves, FrozenParams]:
    """Return the student of a stage, its trained leaves, and all frozen leaves.

    Args:
        config: Config of the stage.
        compute: How to run; frozen leaves of the student are cast to its dtype.
        base_config: Config of the whole base model.
        base: The whole base model if the stage distills; otherwise only the layers it keeps, with
            the adapters on them that are trained further.
        key: Key from which new adapters are drawn, if there are none.
    """
    kept = kept_layers(config, base_config.decoder.layers)
    student = keep_layers(base_config, base, kept)[1] if config.distill.on else base
    if config.trainable == "lora" and not any(map(lora.is_lora, named_leaves(base))):
        student = lora.add_lora(student, config.lora, key)
    trained, frozen = partition(student, lambda leaf: is_trained(leaf, config))
    frozen = {leaf: value.astype(compute.dtype) for leaf, value in frozen.items()}
    teacher = split_teacher(base, kept, trained) if config.distill.on else None
    return student, trained, FrozenParams(frozen, teacher)


def build_teacher(
    name: str,
    config: TrainConfig,
    base_config: ModelConfig,
    loader: Loader,
    frozen_params: FrozenParams,
    workdir: Path,
    mesh: jax.sharding.Mesh,
) -> tuple[TeacherFn | None, cache.TeacherCache | None, FrozenParams]:
    """Return the teacher of a stage: a function or a cache, and the leaves that steps still need.

    With a cache, the teacher's own leaves are dropped. Without a teacher, both are None.

    Raises:
        CheckpointError: See `cache.build`.
    """
    stage = config.stages[name]
    if not stage.distill.on:
        return None, None, frozen_params
    kept = kept_layers(stage, base_config.decoder.layers)
    teacher_fn = make_teacher(base_config, kept, config.compute, data_shards(mesh))
    if not stage.distill.cached:
        return teacher_fn, None, frozen_params
    teacher_cache = cache.build(
        workdir / "teacher" / name,
        loader,
        teacher_fn,
        frozen_params,
        items=stage.distill.items,
        model=base_config,
        compute=config.compute,
        mesh=mesh,
    )
    return None, teacher_cache, dataclasses.replace(frozen_params, teacher=None)


def build_step(
    config: StageConfig,
    steps: int,
    structure: Encoder,
    shardings: TrainState,
    *,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    dropout_key: PRNGKeyArray,
    teacher_fn: TeacherFn | None,
) -> jax.stages.Wrapped:
    """Return the jitted step of a stage, which donates its state; see `step.make_step`.

    Args:
        config: Config of the stage.
        steps: Number of steps of the stage.
        structure: The student, its leaves replaced by their shapes.
        shardings: Sharding of every leaf of the state.
        compute: How to run.
        mesh: Devices to train on.
        dropout_key: Key from which dropout masks are drawn, by step.
        teacher_fn: Computes the teacher's states in every step; None with a cache or no teacher.
    """
    loss = make_loss(config, steps, structure, compute, mesh, dropout_key, teacher_fn)
    return jax.jit(
        make_step(config, steps, loss),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )


def with_inputs(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    """Return the config of a model with the limits, prompt and attention that a run sets."""
    decoder = model.decoder
    if config.causal is not None:
        decoder = dataclasses.replace(decoder, causal=config.causal)
    return dataclasses.replace(
        model,
        images=config.images or model.images,
        prompt=config.prompt or model.prompt,
        decoder=decoder,
    )


def student_config(config: StageConfig, base_config: ModelConfig) -> ModelConfig:
    """Return the config of the model that a stage leaves."""
    kept = kept_layers(config, base_config.decoder.layers)
    model = base_config.with_layers(tuple(base_config.kept_layers[index] for index in kept))
    if not config.trains:
        return model
    return dataclasses.replace(
        model, widths=config.loss.widths, exit_layers=config.loss.exit_layers
    )


def is_trained(name: str, config: StageConfig) -> bool:
    """Return whether a stage trains the leaf of this name."""
    if name.startswith("vision."):
        return config.train_vision
    return config.trainable == "full" or lora.is_lora(name)


def param_dtype(config: StageConfig, compute: ComputeConfig) -> DType:
    """Return the dtype in which a stage reads its base: float32 if it trains any leaf of it."""
    if config.trainable == "full" or config.train_vision:
        return "float32"
    return compute.dtype


def kept_layers(config: StageConfig, depth: int) -> tuple[int, ...]:
    """Return the indices of the decoder layers that a stage keeps, of `depth` layers.

    Raises:
        LayerSelectionError: `keep_layers` names a layer that the base lacks.
    """
    return layer_indices(parse_layers(config.keep_layers) if config.keep_layers else depth, depth)
