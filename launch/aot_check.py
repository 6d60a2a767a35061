"""Check without a TPU whether a training stage fits a TPU slice: libtpu compiles for it here.

    pip install -e '.[tpu]'
    python launch/aot_check.py --config configs/puma.py --stage mac --topology v5e-16 \
        --mesh.data 1 --mesh.fsdp 16

No weight and no image is read; only shapes are compiled. The output is the memory of a chip, the
FLOPs of a step, the bytes that chips exchange, and the FLOPs for each byte of weights read. The
exit code is 1 if the step does not fit. Every field of the config is a flag, as for
`puma_jax.train`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from hlo import Program, read_program
from jax.experimental import topologies
from jax.sharding import Mesh

from puma_jax import cli
from puma_jax.axes import TENSOR_AXIS
from puma_jax.config import ModelConfig, VisionConfig
from puma_jax.data.pipeline import Batch, HardNegatives
from puma_jax.data.shapes import batch_shape
from puma_jax.data.table import TeacherScores
from puma_jax.errors import ConfigError
from puma_jax.model import encoder, hf, lora
from puma_jax.model.families import published
from puma_jax.model.tree import named_leaves
from puma_jax.parallel import rules
from puma_jax.parallel.mesh import batch_sharding, data_shards, make_mesh, replicated
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.train import load_config
from puma_jax.training.config import StageConfig, TrainConfig
from puma_jax.training.objective import PairStates
from puma_jax.training.stages import (
    build_step,
    build_student,
    kept_layers,
    param_dtype,
    with_inputs,
)
from puma_jax.training.step import (
    FrozenParams,
    TrainState,
    init_state,
)
from puma_jax.training.teacher import make_teacher

# The learning rate of a step depends on the number of steps, its program does not.
_STEPS = 1000
# Tokens that the prompt adds to an item, about.
_PROMPT_TOKENS = 40


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip (cloud.google.com/tpu/docs)."""

    memory: float
    """Bytes."""
    flops: float
    """FLOPs per second in bfloat16."""
    bandwidth: float
    """Memory bandwidth, bytes per second."""


CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9),
    "v5p": Chip(95e9, 459e12, 2765e9),
    "v6e": Chip(32e9, 918e12, 1640e9),
}
# Name of a slice in the cloud → its topology. Names of v5p slices count cores, two to a chip.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"}
SLICES = {
    **{f"{kind}-{size}": f"{kind}:{_FLAT[size]}" for kind in ("v5e", "v6e") for size in _FLAT},
    **{f"v5p-{size}": f"v5p:{_CUBES[size]}" for size in _CUBES},
}


@dataclass(frozen=True)
class Settings:
    """Compile a stage of training for a TPU slice and print what it needs."""

    config: Path
    """Python file with a function `get_config()` that returns a `TrainConfig`."""
    stage: str
    """Name of a stage in the config."""
    topology: str
    """TPU slice such as v5e-16 or v5p-8, or libtpu's name for it, such as v5e:4x4."""
    pairs: int | None = None
    """Pairs in a batch; the default is the batch size of the stage."""
    visual_tokens: int = 300
    """Visual tokens of every query and every candidate; 0 means text only."""
    text_tokens: int = 450
    """Text tokens of every query and every candidate, without about 40 tokens of the prompt."""


@dataclass(frozen=True)
class Lowered:
    """The shapes and the lowered program of a stage."""

    model: ModelConfig
    """Config of the student."""
    base: ModelConfig
    """Config of the model that the student is pruned from."""
    shape: PackedShape
    """Shape of one chunk."""
    structure: encoder.Encoder
    """The student with its adapters; leaves are `jax.ShapeDtypeStruct`."""
    program: jax.stages.Lowered


def main(arguments: list[str] | None = None) -> int:
    """Compile and report; return the exit code, 1 if the step does not fit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    settings, rest = tyro.cli(Settings, args=given, return_unknown_args=True)
    config, rest = tyro.cli(load_config(settings.config), args=rest, return_unknown_args=True)
    config = tyro.cli(Annotated[TrainConfig, tyro.conf.AvoidSubcommands], default=config, args=rest)
    kind, mesh = tpu_mesh(settings.topology, config)
    lowered = lower(settings, config, mesh)
    shape, stage = lowered.shape, config.stages[settings.stage]
    print(
        f"{settings.stage} on {settings.topology}: "
        + " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        + f", {stage.grad_cache_chunks} chunks of {shape.rows} rows × {shape.length} tokens"
        + f" and {shape.patch_rows} rows × {shape.patch_length} patches",
        flush=True,  # compiling takes minutes
    )
    began = time.perf_counter()
    try:
        compiled = lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("does not fit: " + str(error).splitlines()[0])
        return 1
    print(f"compiled in {time.perf_counter() - began:.0f} s")
    fits = report_memory(compiled, CHIPS[kind])
    report_work(settings, config, lowered, read_program(compiled.as_text()), mesh, CHIPS[kind])
    return 0 if fits else 1


def tpu_mesh(topology: str, config: TrainConfig) -> tuple[str, Mesh]:
    """Return the kind of chip and the mesh of a slice that need not be present.

    Raises:
        ConfigError: The slice is unknown, or the mesh does not fit it.
    """
    name = SLICES.get(topology, topology)
    kind = name.split(":")[0]
    if kind not in CHIPS or ":" not in name:
        raise ConfigError(f"--topology {topology} is not one of {', '.join(SLICES)}")
    # Do not look for a TPU, and let several of these checks run at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(name, "tpu").devices
    return kind, make_mesh(config.mesh, devices)


def base_model(config: TrainConfig, stage: str) -> ModelConfig:
    """Return the model that a stage starts from, before its own layers are chosen.

    Raises:
        ConfigError: The stage or the shapes of its model are unknown.
    """
    made: dict[str | None, ModelConfig | None] = {None: None}
    for name, of_stage in config.stages.items():
        model = made[config.stage_before(name)]
        if of_stage.model is not None:
            folder = Path(of_stage.model)
            shapes = published()
            if of_stage.model not in shapes and not folder.is_dir():
                known = ", ".join(shapes)
                raise ConfigError(f"{of_stage.model} is neither a folder nor one of {known}")
            model = shapes.get(of_stage.model) or hf.read_config(folder)[0]
        if model is None:
            raise ConfigError(f"stage {name} starts from scratch, whose shapes the data decide")
        if name == stage:
            return with_inputs(model, config)
        made[name] = model.with_layers(
            tuple(model.kept_layers[i] for i in kept_layers(of_stage, model.decoder.layers))
        )
    raise ConfigError(f"--stage {stage} is not one of {', '.join(config.stages)}")


def lower(settings: Settings, config: TrainConfig, mesh: Mesh) -> Lowered:
    """Return the step that `training.stages.build_stage` builds, lowered on shapes."""
    stage, base = config.stages[settings.stage], base_model(config, settings.stage)
    kept = kept_layers(stage, base.decoder.layers)
    model = base.with_layers(tuple(base.kept_layers[i] for i in kept))
    key = jax.random.key(0)
    computes_teacher = stage.distill.on and not stage.distill.cached

    def init() -> tuple[encoder.Encoder, TrainState, FrozenParams]:
        params = encoder.init(
            base if stage.distill.on else model, key, param_dtype(stage, config.compute)
        )
        student, trained, frozen_params = build_student(stage, config.compute, base, params, key)
        if not computes_teacher:
            frozen_params = dataclasses.replace(frozen_params, teacher=None)
        return student, init_state(stage, _STEPS, trained), frozen_params

    structure, state, frozen_params = jax.eval_shape(init)
    shardings = rules.shardings((state, frozen_params), mesh, model)
    state, frozen_params = jax.tree.map(_with_sharding, (state, frozen_params), shardings)
    teacher_fn = None
    if computes_teacher:
        teacher_fn = make_teacher(base, kept, config.compute, data_shards(mesh))
    pairs = settings.pairs or stage.plan.batch_size
    shape = row_shape(settings, pairs, stage, data_shards(mesh), model.patches_per_token)
    batch = abstract_batch(shape, stage, pairs, mesh, model)
    teacher_states = None
    if stage.distill.on and not computes_teacher:
        states = (batch.valid.shape[0], model.decoder.width)
        teacher_states = PairStates(*[_array(states, "float32", batch_sharding(mesh))] * 2)
    step = build_step(
        stage,
        _STEPS,
        structure,
        shardings[0],
        compute=config.compute,
        mesh=mesh,
        dropout_key=key,
        teacher_fn=teacher_fn,
    )
    program = step.lower(state, frozen_params, batch, teacher_states)
    return Lowered(model, base, shape, structure, program)


def _array(shape: tuple[int, ...], dtype: Any, place: jax.sharding.Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _with_sharding(leaf: Any, place: jax.sharding.Sharding) -> Any:
    return _array(leaf.shape, leaf.dtype, place)


def row_shape(
    settings: Settings, pairs: int, stage: StageConfig, parts: int, patches_per_token: int
) -> PackedShape:
    """Return the shape of chunk that a batch of such items needs, as `Plan.fitting_shape` does."""
    items = (2 + stage.plan.hard_negatives) * pairs
    lengths = np.full(items, settings.text_tokens + settings.visual_tokens + _PROMPT_TOKENS)
    patches = np.full(items, settings.visual_tokens * patches_per_token)
    largest = int(lengths[0]), int(patches[0])
    return batch_shape([(lengths, patches)], stage.grad_cache_chunks, parts, largest)


def abstract_batch(
    shape: PackedShape, stage: StageConfig, pairs: int, mesh: Mesh, model: ModelConfig
) -> Batch:
    """Return the shapes of a batch as `training.transfer.shard_batch` hands it to the step."""
    token = (stage.grad_cache_chunks, shape.rows, shape.length)
    patch = (stage.grad_cache_chunks, shape.patch_rows, shape.patch_length)
    by_rows, everywhere = batch_sharding(mesh, axis=1), replicated(mesh)
    rows = PackedBatch(
        tokens=_array(token, "int32", by_rows),
        segment_ids=_array(token, "int32", by_rows),
        positions=_array((*token, 3), "int32", by_rows),
        image_token_index=_array(token, "int32", by_rows),
        patches=_array((*patch, model.vision.patch_values), "uint8", by_rows),
        patch_segment_ids=_array(patch, "int32", by_rows),
        patch_positions=_array((*patch, 2), "int32", by_rows),
        pool_index=_array((stage.grad_cache_chunks, shape.slots), "int32", by_rows),
    )
    unit = data_shards(mesh) * (stage.loss.chunk_size or 1)
    column = _array((-(-pairs // unit) * unit,), "int32", everywhere)
    valid = _array(column.shape, "bool", everywhere)
    negatives, scores = None, None
    if stage.plan.hard_negatives:
        further = (*column.shape, stage.plan.hard_negatives)
        columns = [_array(further, "int32", everywhere)] * 3
        negatives = HardNegatives(*columns, valid=_array(further, "bool", everywhere))
        shapes = column.shape, further
        scores = TeacherScores(*(_array(shape, "float32", everywhere) for shape in shapes))
    return Batch(rows, *[column] * 7, valid=valid, negatives=negatives, scores=scores)


def report_memory(compiled: jax.stages.Compiled, chip: Chip) -> bool:
    """Print the memory that a chip needs; return whether it has that much."""
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        # The new state takes the place of the old one.
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    total = sum(parts.values())
    print("memory of a chip: " + ", ".join(f"{what} {n / 1e9:.2f} GB" for what, n in parts.items()))
    print(f"  {total / 1e9:.2f} of {chip.memory / 1e9:.0f} GB, {total / chip.memory:.0%}")
    return total <= chip.memory


def report_work(
    settings: Settings,
    config: TrainConfig,
    lowered: Lowered,
    program: Program,
    mesh: Mesh,
    chip: Chip,
) -> None:
    """Print FLOPs, bytes that chips exchange, and FLOPs for each byte of weights read."""
    stage = config.stages[settings.stage]
    useful = model_flops(settings, stage, lowered) / mesh.size
    read = weights_read(stage, config, lowered) / mesh.shape[TENSOR_AXIS]
    print(
        f"model FLOPs of a step: {useful * mesh.size:.3e}, {useful / chip.flops:.2f} s at peak\n"
        f"FLOPs of XLA's products: {program.flops * mesh.size:.3e}, rematerialization and "
        f"padding included; in addition {program.kernels:,.0f} runs of Pallas kernels on each chip"
    )
    for what, size in program.moved.most_common():
        print(f"{what} on each chip: {size / 1e9:.2f} GB in {program.collectives[what]:,} runs")
    print(
        f"weights read on each chip: {read / 1e9:.1f} GB, {read / chip.bandwidth:.2f} s; "
        f"{useful / read:.0f} model FLOPs a byte, the chip is in balance at "
        f"{chip.flops / chip.bandwidth:.0f}"
    )


def _parameters(model: ModelConfig) -> tuple[float, float]:
    """Return the matmul weights of a decoder layer, and of the tower for each patch.

    A weight of a merger counts for the patches that it reads at once, and a weight of the patch
    embedding once for all frames, which show the same.
    """
    vision = model.vision
    kernels = {
        name: leaf.size
        for name, leaf in named_leaves(encoder.abstract(model)).items()
        if name.endswith(".kernel")
    }

    def size(prefix: str) -> float:
        return sum(count for name, count in kernels.items() if name.startswith(prefix))

    tower = size("vision.blocks.") + size("vision.patch_embedding.") / vision.temporal_patch_size
    mergers = size("vision.merger.") + size("vision.deepstack.")
    return size("decoder.layers.") / model.decoder.layers, tower + mergers / vision.merged


def _patches_seen(vision: VisionConfig, patches: int) -> int:
    """Return how many patches of an image a patch attends to, in all blocks together."""
    if not vision.window_size:
        return vision.layers * patches
    whole = len(vision.full_attention_blocks)
    window = min(vision.window_size**2, patches)
    return whole * patches + (vision.layers - whole) * window


def model_flops(settings: Settings, stage: StageConfig, lowered: Lowered) -> float:
    """Return the model FLOPs of a step, over all chips, without rematerialization and padding.

    Each weight and token counts 2 in the forward pass, 2 for the gradient of the input, and 2 for
    the gradient of the weight if it is trained. Attention between the tokens of an item counts
    likewise, half of it where it is causal.
    """
    model, decoder, vision = lowered.model, lowered.model.decoder, lowered.model.vision
    items = (2 + stage.plan.hard_negatives) * (settings.pairs or stage.plan.batch_size)
    length = settings.visual_tokens + settings.text_tokens + _PROMPT_TOKENS
    patches = settings.visual_tokens * model.patches_per_token
    layer, tower = _parameters(model)
    attention = 2 * length * decoder.heads * decoder.head_dim
    adapters = 0
    if stage.trainable == "lora":
        leaves = named_leaves(lowered.structure).items()
        adapters = sum(leaf.size for name, leaf in leaves if lora.is_lora(name)) // decoder.layers
    passes = 3 if stage.trainable == "full" else 2
    token = decoder.layers * (2 * passes * layer + 6 * adapters + 3 * attention)
    if stage.distill.on and not stage.distill.cached:
        token += lowered.base.decoder.layers * (2 * layer + attention)
    patch = (3 if stage.train_vision else 1) * (
        2 * tower + 4 * _patches_seen(vision, patches) * vision.width
    )
    return items * (length * token + patches * patch)


def weights_read(stage: StageConfig, config: TrainConfig, lowered: Lowered) -> float:
    """Return the bytes of all weights read in a step, by a chip that reads whole weights."""
    layer, tower = _parameters(lowered.model)
    again = (stage.grad_cache_chunks > 1) + (config.compute.remat == "full")
    decoder = (2 + again) * lowered.model.decoder.layers * layer
    if stage.distill.on and not stage.distill.cached:
        decoder += lowered.base.decoder.layers * layer
    towers = (
        (2 + again if stage.train_vision else 1 + (stage.grad_cache_chunks > 1))
        if lowered.shape.patch_rows
        else 0
    )
    return (
        stage.grad_cache_chunks
        * (decoder + towers * tower)
        * np.dtype(jnp.dtype(config.compute.dtype)).itemsize
    )


if __name__ == "__main__":
    cli.exit_on_error(lambda: sys.exit(main()))
