"""Whether a stage of training fits a TPU slice, found out without one: libtpu compiles for it here.

    pip install 'puma-jax[tpu]'
    python launch/aot_check.py --config configs/puma_qwen2vl_7b.py --stage mac --topology v5e-16 \
        --mesh.data 1 --mesh.fsdp 16

No weight and no image is read: shapes are all that is compiled. Printed: what a chip holds, the
FLOPs of a step, what chips exchange, and how often a weight is used once it is read. The exit code
is 1 if the step does not fit. Every field of the config is a flag, as in `puma_jax.train`.
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
from puma_jax.config import DecoderConfig, ModelConfig, VisionConfig
from puma_jax.data.pipeline import Batch
from puma_jax.data.shapes import batch_shape
from puma_jax.errors import ConfigError
from puma_jax.model import encoder, hf, lora
from puma_jax.model.encoder import keep_layers, layer_indices, parse_layers
from puma_jax.model.tree import named_leaves, partition
from puma_jax.parallel import rules
from puma_jax.parallel.mesh import batch_sharding, groups, make_mesh, replicated
from puma_jax.rows import Rows, RowShape
from puma_jax.train import load_config
from puma_jax.training.config import StageConfig, TrainConfig
from puma_jax.training.stages import is_trained
from puma_jax.training.step import Fixed, State, Targets, init_state, make_loss, make_step
from puma_jax.training.teacher import make_teacher, split_teacher

# The learning rate of a step depends on how many there are, its program does not.
_STEPS = 1000
# What the prompt puts around an item, about.
_PROMPT_TOKENS = 40


@dataclass(frozen=True)
class Chip:
    """What its maker says of one chip (cloud.google.com/tpu/docs)."""

    memory: float
    """Bytes."""
    flops: float
    """Per second, bfloat16."""
    bandwidth: float
    """Bytes per second from its memory."""


CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9),
    "v5p": Chip(95e9, 459e12, 2765e9),
    "v6e": Chip(32e9, 918e12, 1640e9),
}
# A slice's name in the cloud → its arrangement. That of v5p counts cores, two to a chip.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"}
SLICES = {
    **{f"{kind}-{size}": f"{kind}:{_FLAT[size]}" for kind in ("v5e", "v6e") for size in _FLAT},
    **{f"v5p-{size}": f"v5p:{_CUBES[size]}" for size in _CUBES},
}


def _qwen2_vl(width: int, kv_heads: int, mlp_width: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        family="qwen2_vl",
        vision=VisionConfig(layers=32, width=1280, heads=16, mlp_width=5120, out_width=width),
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            width=width,
            layers=28,
            heads=width // 128,
            kv_heads=kv_heads,
            head_dim=128,
            mlp_width=mlp_width,
        ),
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


# Shapes of what recipes start from, so that nothing has to be fetched.
MODELS = {
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(1536, 2, 8960, 151936),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(3584, 4, 18944, 152064),
}


@dataclass(frozen=True)
class Settings:
    """Compile a stage of training for a TPU slice and say what it takes."""

    config: Path
    """Python file with a function `get_config()` that returns a `TrainConfig`."""
    stage: str
    """Name of one of its stages."""
    topology: str
    """A slice such as v5e-16 or v5p-8, or libtpu's name of one, such as v5e:4x4."""
    pairs: int | None = None
    """In a batch; those of the stage's plan if not given."""
    visual_tokens: int = 300
    """Of every query and every candidate; 0 for texts alone."""
    text_tokens: int = 450
    """Likewise; about 40 of the prompt are added."""


@dataclass(frozen=True)
class Lowered:
    """A stage as far as it is known without data: its shapes, its program."""

    model: ModelConfig
    """Of the student."""
    base: ModelConfig
    """Of what the student is cut from."""
    shape: RowShape
    """Of a chunk."""
    structure: encoder.Encoder
    """The student, its adapters included; its leaves are shapes."""
    program: jax.stages.Lowered


def main(arguments: list[str] | None = None) -> int:
    """Compile and report; return 1 if the step does not fit."""
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
        + f", {stage.chunks} chunks of {shape.rows} rows × {shape.length} tokens"
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
    """Return the kind of chip and the mesh of a slice that need not exist.

    Raises:
        ConfigError: There is no such slice, or the mesh does not fit it.
    """
    name = SLICES.get(topology, topology)
    kind = name.split(":")[0]
    if kind not in CHIPS or ":" not in name:
        raise ConfigError(f"--topology {topology} is not one of {', '.join(SLICES)}")
    # Nobody shall look for a TPU, and several of these may run at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc(name, "tpu").devices
    return kind, make_mesh(config.mesh, devices)


def base_model(config: TrainConfig, stage: str) -> ModelConfig:
    """Return the model that a stage starts from, before its own layers are chosen.

    Raises:
        ConfigError: Its shapes are not known here.
    """
    model = None
    for name, of_stage in config.stages.items():
        if of_stage.model is not None:
            folder = Path(of_stage.model)
            if of_stage.model not in MODELS and not folder.is_dir():
                known = ", ".join(MODELS)
                raise ConfigError(f"{of_stage.model} is neither a folder nor one of {known}")
            model = MODELS.get(of_stage.model) or hf.read_config(folder)[0]
        if model is None:
            raise ConfigError(f"stage {name} starts from scratch, whose shapes the data decide")
        if name == stage:
            return dataclasses.replace(model, images=config.images, prompt=config.prompt)
        model = model.with_layers(
            tuple(model.kept_layers[i] for i in _kept(of_stage, model.decoder.layers))
        )
    raise ConfigError(f"--stage {stage} is not one of {', '.join(config.stages)}")


def _kept(stage: StageConfig, depth: int) -> tuple[int, ...]:
    return layer_indices(parse_layers(stage.keep_layers) if stage.keep_layers else depth, depth)


def lower(settings: Settings, config: TrainConfig, mesh: Mesh) -> Lowered:
    """Return the step that `training.stages.prepare` makes, of shapes in place of arrays."""
    stage, base = config.stages[settings.stage], base_model(config, settings.stage)
    kept = _kept(stage, base.decoder.layers)
    model = base.with_layers(tuple(base.kept_layers[i] for i in kept))
    key = jax.random.key(0)

    def start() -> tuple[encoder.Encoder, State, Fixed]:
        whole = "float32" if stage.train == "full" or stage.vision else config.compute.dtype
        params = encoder.init(base, key, whole)
        student = keep_layers(base, params, kept)[1]
        if stage.train == "lora":
            student = lora.add_lora(student, stage.lora, key)
        trained, frozen = partition(student, lambda leaf: is_trained(leaf, stage))
        frozen = {leaf: value.astype(config.compute.dtype) for leaf, value in frozen.items()}
        taught = stage.distill.on and not stage.distill.cached
        teacher = split_teacher(params, kept, trained) if taught else None
        return student, init_state(stage, _STEPS, trained), Fixed(frozen, teacher)

    structure, state, fixed = jax.eval_shape(start)
    where = rules.shardings((state, fixed), mesh, model)
    state, fixed = jax.tree.map(_spread, (state, fixed), where)
    teach = None
    if fixed.teacher is not None:
        teach = make_teacher(base, kept, config.compute, groups(mesh))
    pairs = settings.pairs or stage.plan.batch
    shape = row_shape(settings, pairs, stage.chunks, groups(mesh), model.vision.merged)
    batch = abstract_batch(shape, stage, pairs, mesh, model)
    targets = None
    if stage.distill.on and teach is None:
        states = (batch.valid.shape[0], model.decoder.width)
        targets = Targets(*[_array(states, "float32", batch_sharding(mesh))] * 2)
    loss = make_loss(stage, _STEPS, structure, config.compute, mesh, key, teach)
    step = jax.jit(
        make_step(stage, _STEPS, loss),
        donate_argnums=0,
        out_shardings=(where[0], replicated(mesh)),
    )
    return Lowered(model, base, shape, structure, step.lower(state, fixed, batch, targets))


def _array(shape: tuple[int, ...], dtype: Any, place: jax.sharding.Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _spread(leaf: Any, place: jax.sharding.Sharding) -> Any:
    return _array(leaf.shape, leaf.dtype, place)


def row_shape(settings: Settings, pairs: int, chunks: int, parts: int, merged: int) -> RowShape:
    """Return the rows that a batch of such items is packed into, as `Plan.fitting_shape` does."""
    lengths = np.full(2 * pairs, settings.text_tokens + settings.visual_tokens + _PROMPT_TOKENS)
    patches = np.full(2 * pairs, settings.visual_tokens * merged)
    return batch_shape([(lengths, patches)], chunks, parts, (int(lengths[0]), int(patches[0])))


def abstract_batch(
    shape: RowShape, stage: StageConfig, pairs: int, mesh: Mesh, model: ModelConfig
) -> Batch:
    """Return the shapes of a batch as `training.transfer.put` hands it to the step."""
    token = (stage.chunks, shape.rows, shape.length)
    patch = (stage.chunks, shape.patch_rows, shape.patch_length)
    by_rows, everywhere = batch_sharding(mesh, axis=1), replicated(mesh)
    rows = Rows(
        tokens=_array(token, "int32", by_rows),
        segments=_array(token, "int32", by_rows),
        positions=_array((*token, 3), "int32", by_rows),
        visual=_array(token, "int32", by_rows),
        patches=_array((*patch, model.vision.patch_values), "uint8", by_rows),
        patch_segments=_array(patch, "int32", by_rows),
        patch_positions=_array((*patch, 2), "int32", by_rows),
        ret=_array((stage.chunks, shape.slots), "int32", by_rows),
    )
    unit = groups(mesh) * (stage.loss.rows or 1)
    column = _array((-(-pairs // unit) * unit,), "int32", everywhere)
    valid = _array(column.shape, "bool", everywhere)
    return Batch(rows, *[column] * 6, valid=valid)


def report_memory(compiled: jax.stages.Compiled, chip: Chip) -> bool:
    """Print what a chip holds; return whether it has room for it."""
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
    """Print FLOPs, what chips exchange, and how the work compares with what is read for it."""
    stage = config.stages[settings.stage]
    useful = model_flops(settings, stage, lowered) / mesh.size
    read = weights_read(stage, config, lowered) / mesh.shape["tensor"]
    print(
        f"model FLOPs of a step: {useful * mesh.size:.3e}, {useful / chip.flops:.2f} s at peak\n"
        f"FLOPs of XLA's products: {program.flops * mesh.size:.3e}, computed again and padding "
        f"included; beside them {program.kernels:,.0f} runs of Pallas kernels on each chip"
    )
    for what, size in program.moved.most_common():
        print(f"{what} on each chip: {size / 1e9:.2f} GB in {program.collectives[what]:,} runs")
    print(
        f"weights read on each chip: {read / 1e9:.1f} GB, {read / chip.bandwidth:.2f} s; "
        f"{useful / read:.0f} model FLOPs a byte, the chip is in balance at "
        f"{chip.flops / chip.bandwidth:.0f}"
    )


def _parameters(model: ModelConfig) -> tuple[int, int]:
    """Return weights of the products of one decoder layer, and of the tower with its merger."""
    decoder, vision = model.decoder, model.vision
    inner, kv = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    layer = decoder.width * (2 * inner + 2 * kv + 3 * decoder.mlp_width)
    block = vision.width * (4 * vision.width + 2 * vision.mlp_width)
    joined = vision.width * vision.merged
    merger = joined * (joined + vision.out_width) // vision.merged
    return layer, vision.layers * block + merger + vision.patch_values * vision.width


def model_flops(settings: Settings, stage: StageConfig, lowered: Lowered) -> float:
    """Return the FLOPs that a step cannot do without, over all chips.

    2 for each weight and token in the forward pass, as many for the gradient of what came in, and
    as many for that of a weight if it is trained; attention between the tokens of an item likewise,
    half of it where it is causal. Nothing is counted twice that is computed again.
    """
    model, decoder, vision = lowered.model, lowered.model.decoder, lowered.model.vision
    items = 2 * (settings.pairs or stage.plan.batch)
    length = settings.visual_tokens + settings.text_tokens + _PROMPT_TOKENS
    patches = settings.visual_tokens * vision.merged
    layer, tower = _parameters(model)
    attention = 2 * length * decoder.heads * decoder.head_dim
    adapters = 0
    if stage.train == "lora":
        leaves = named_leaves(lowered.structure).items()
        adapters = sum(leaf.size for name, leaf in leaves if lora.is_lora(name)) // decoder.layers
    passes = 3 if stage.train == "full" else 2
    token = decoder.layers * (2 * passes * layer + 6 * adapters + 3 * attention)
    if stage.distill.on and not stage.distill.cached:
        token += lowered.base.decoder.layers * (2 * layer + attention)
    patch = (3 if stage.vision else 1) * (2 * tower + 4 * patches * vision.layers * vision.width)
    return items * (length * token + patches * patch)


def weights_read(stage: StageConfig, config: TrainConfig, lowered: Lowered) -> float:
    """Return the bytes of all weights that are read in a step, by chips that read whole ones."""
    layer, tower = _parameters(lowered.model)
    again = (stage.chunks > 1) + (config.compute.remat == "full")
    decoder = (2 + again) * lowered.model.decoder.layers * layer
    if stage.distill.on and not stage.distill.cached:
        decoder += lowered.base.decoder.layers * layer
    towers = (
        (2 + again if stage.vision else 1 + (stage.chunks > 1)) if lowered.shape.patch_rows else 0
    )
    return (
        stage.chunks
        * (decoder + towers * tower)
        * np.dtype(jnp.dtype(config.compute.dtype)).itemsize
    )


if __name__ == "__main__":
    cli.exit_on_error(lambda: sys.exit(main()))
