"""One stage made ready: the model cut and adapted, the data planned, the step compiled."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax

from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.data.builder.build import Settings, build
from puma_jax.data.pipeline import Loader
from puma_jax.data.plan import Plan
from puma_jax.data.prompts import Prompter, load_tokenizer
from puma_jax.data.store import Store
from puma_jax.embedder import Embedder
from puma_jax.model import hf, lora
from puma_jax.model.encoder import Encoder, keep_layers, layer_indices, parse_layers
from puma_jax.model.tree import assemble, partition
from puma_jax.parallel import multihost, rules
from puma_jax.parallel.mesh import groups, replicated
from puma_jax.training import cache
from puma_jax.training.config import StageConfig, TrainConfig
from puma_jax.training.optimizer import Leaves
from puma_jax.training.step import Fixed, State, init_state, make_loss, make_step
from puma_jax.training.teacher import make_teacher, split_teacher


@dataclass
class Stage:
    """A stage that is ready to run, and its state as it runs."""

    name: str
    config: StageConfig
    steps: int
    model: ModelConfig
    """Of the student."""
    prompter: Prompter
    source: hf.HubConfigs
    """What came with the model that the stage starts from."""
    structure: Encoder
    """The student, with adapters if it trains any; its leaves are shapes."""
    compute: ComputeConfig
    mesh: jax.sharding.Mesh
    loader: Loader
    taught: cache.TeacherCache | None
    """The teacher's states, where they are not computed in every step."""
    fixed: Fixed
    state: State
    step: jax.stages.Wrapped
    """`step.make_step`, under `jax.jit`, the state given away."""

    def embedder(self) -> Embedder:
        """Return an embedder of the student as it is now, adapters merged."""
        leaves = {**self.fixed.frozen, **self.state.trained}
        params = lora.merge(assemble(self.structure, leaves))
        return Embedder(
            self.model,
            params,
            self.prompter.tokenizer,
            compute=self.compute,
            mesh=self.mesh,
            source=self.source,
        )


def open_store(config: TrainConfig, root: Path, prompter: Prompter, workdir: Path) -> Store:
    """Return the training data of a benchmark, built if they are not.

    Raises:
        DataError: There is nothing to train on, or a record is bad.
        CheckpointError: They were built for another tokenizer.
    """
    if config.data.built is not None and root == config.data.root:
        store = Store.open(config.data.built)
    else:
        out = workdir / "data" / root.resolve().name
        settings = Settings(root=root, out=out, on_bad_record=config.data.on_bad_record)
        multihost.once(lambda: build(settings, prompter))
        store = Store.open(out)
    store.check(prompter)
    return store


def prepare(
    name: str,
    config: TrainConfig,
    folder: str | Path,
    workdir: Path,
    mesh: jax.sharding.Mesh,
) -> Stage:
    """Return a stage before its first step.

    Args:
        name: Of the stage.
        config: Of the run.
        folder: Model to start from, or its hub id.
        workdir: Of the run.
        mesh: Devices.
    """
    stage = config.stages[name]
    checkpoint = hf.open_checkpoint(folder)
    base_config = dataclasses.replace(checkpoint.config, images=config.images, prompt=config.prompt)
    prompter = Prompter(load_tokenizer(checkpoint.folder), base_config)
    store = open_store(config, stage.root or config.data.root, prompter, workdir)
    pairs = len(store.table.query_set)
    if pairs < stage.plan.batch:
        print(f"{name}: the data has {pairs} pairs, all of them make a batch")
    plan_config = dataclasses.replace(
        stage.plan, seed=stage.plan.seed + config.seed, batch=min(stage.plan.batch, pairs)
    )
    plan = Plan(store.table, store.instructions, prompter.template, plan_config)
    steps = stage.steps or max(1, round(stage.epochs * plan.steps_per_epoch))
    host, hosts = multihost.share_of_rows(mesh)
    loader = Loader(
        store,
        plan,
        plan.fitting_shape(stage.chunks, groups(mesh)),
        stage.chunks,
        host=host,
        hosts=hosts,
        on_bad_record=config.data.on_bad_record,
    )
    number = list(config.stages).index(name)
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    student_key, dropout_key = jax.random.split(key)

    kept = _kept_layers(stage, base_config.decoder.layers)
    model = base_config.with_layers(tuple(base_config.kept_layers[index] for index in kept))
    distils = stage.distill.on
    base = checkpoint.read(
        # Without a teacher, layers that are cut are never read.
        None if distils else kept,
        dtype="float32" if stage.train == "full" or stage.vision else config.compute.dtype,
        placement=rules.placement(mesh, base_config),
    )
    student = keep_layers(base_config, base, kept)[1] if distils else base
    if stage.train == "lora":
        student = lora.add_lora(student, stage.lora, student_key)
    trained, frozen = partition(student, lambda leaf: is_trained(leaf, stage))
    frozen = {leaf: value.astype(config.compute.dtype) for leaf, value in frozen.items()}
    structure = jax.eval_shape(lambda: student)
    fixed = Fixed(frozen, split_teacher(base, kept, trained) if distils else None)
    # From here on, what is not of `trained` or `fixed` shall take no memory.
    del base, student
    teach = make_teacher(base_config, kept, config.compute, groups(mesh)) if distils else None
    taught = None
    if teach is not None and stage.distill.cached:
        taught = cache.build(
            workdir / "teacher" / name,
            loader,
            teach,
            fixed,
            model=base_config,
            compute=config.compute,
            mesh=mesh,
            workers=config.data.workers,
        )
        teach, fixed = None, dataclasses.replace(fixed, teacher=None)

    def init(trained: Leaves) -> State:
        return init_state(stage, steps, trained)

    where = rules.shardings(jax.eval_shape(init, trained), mesh, model)
    loss = make_loss(stage, steps, structure, config.compute, mesh, dropout_key, teach)
    return Stage(
        name=name,
        config=stage,
        steps=steps,
        model=model,
        prompter=prompter,
        source=checkpoint.source,
        structure=structure,
        compute=config.compute,
        mesh=mesh,
        loader=loader,
        taught=taught,
        fixed=fixed,
        state=jax.jit(init, out_shardings=where)(trained),
        step=jax.jit(
            make_step(stage, steps, loss),
            donate_argnums=0,
            out_shardings=(where, replicated(mesh)),
        ),
    )


def is_trained(name: str, config: StageConfig) -> bool:
    """Whether a stage trains the leaf of this name."""
    if name.startswith("vision."):
        return config.vision
    return config.train == "full" or lora.is_lora(name)


def _kept_layers(config: StageConfig, depth: int) -> tuple[int, ...]:
    return layer_indices(parse_layers(config.keep_layers) if config.keep_layers else depth, depth)
