"""The teacher of distillation: the whole base model, frozen, without a copy of shared leaves.

The student keeps some decoder layers of the base model, and the teacher has all of them. Leaves
that the student does not train (with adapters, the whole base) exist once, and both read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.model.encoder import Encoder, VisualTokens, abstract, encode
from puma_jax.model.tree import assemble, named_leaves
from puma_jax.rows import PackedBatch
from puma_jax.training.optimizer import Leaves
from puma_jax.typing import Array, Float

_LAYERS = "decoder.layers."


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teacher:
    """Leaves that only the teacher has; the others are those that the student leaves frozen."""

    initial_params: Leaves
    """Leaves that the student trains, as they were before training."""
    removed: Leaves
    """Stacks of the removed decoder layers, by their names in the whole model."""


TeacherFn = Callable[
    [Teacher, Leaves, PackedBatch, VisualTokens | None], Float[Array, "slots width"]
]
"""Returns the teacher's states of all slots, from its own leaves and the student's frozen ones.

The last argument are the visual tokens of the rows, if a frozen tower computed them for both.
"""


def split_teacher(base: Encoder, kept: Sequence[int], trained: Leaves) -> Teacher:
    """Return the leaves that only the teacher has.

    Args:
        base: The whole base model.
        kept: Indices of the decoder layers that the student keeps.
        trained: Leaves that the student trains, by name.
    """
    leaves = named_leaves(base)
    depth = len(leaves[f"{_LAYERS}attention_norm.scale"])
    cut = [index for index in range(depth) if index not in kept]
    removed = {
        name: leaf[jax.numpy.array(cut, int)]
        for name, leaf in leaves.items()
        if name.startswith(_LAYERS)
    }
    initial_params = {}
    for name in trained:
        if name in leaves:  # adapters have no original
            leaf = leaves[name]
            # A copy, because every step donates the student's own leaf.
            initial_params[name] = (
                leaf[jax.numpy.array(kept)] if name.startswith(_LAYERS) else leaf.copy()
            )
    return Teacher(initial_params, removed if cut else {})


def make_teacher(
    config: ModelConfig, kept: Sequence[int], compute: ComputeConfig, data_shards: int
) -> TeacherFn:
    """Return the function that computes the teacher's states.

    Args:
        config: Config of the whole base model.
        kept: Indices of the decoder layers that the student keeps.
        compute: How to run.
        data_shards: Number of parts that rows divide into, one for each data-parallel device.
    """
    kept = tuple(kept)
    cut = [index for index in range(config.decoder.layers) if index not in kept]
    student = abstract(config.with_layers(tuple(config.kept_layers[i] for i in kept)))
    runs = _runs(config.decoder.layers, kept)

    def teacher_fn(
        teacher: Teacher, frozen: Leaves, rows: PackedBatch, visual: VisualTokens | None = None
    ) -> Array:
        params = assemble(student, {**frozen, **teacher.initial_params})
        stacks = {True: params.decoder.layers, False: None}
        if cut:
            stacks[False] = _stack(student, teacher.removed)
        in_order = [
            jax.tree.map(lambda leaf, run=run: _part(leaf, run), stacks[of_student])
            for of_student, run in runs
        ]
        states = encode(
            params, rows, compute, data_shards=data_shards, stacks=in_order, visual=visual
        )
        return jax.lax.stop_gradient(states)

    return teacher_fn


def _stack(student: Encoder, removed: Leaves) -> Any:
    """Return the removed layers as a module."""
    layers = {name.removeprefix(_LAYERS): leaf for name, leaf in removed.items()}
    return assemble(student.decoder.layers, layers)


def _runs(depth: int, kept: tuple[int, ...]) -> list[tuple[bool, range]]:
    """Return the layers of the whole stack as runs: whether the student's, and their indices.

    The indices count within the student's stack or the removed one. If the student keeps the first
    layers, there are two runs, and each is a whole stack.
    """
    order = [
        (True, kept.index(i)) if i in kept else (False, i - sum(k < i for k in kept))
        for i in range(depth)
    ]
    runs: list[tuple[bool, range]] = []
    for of_student, index in order:
        if runs and runs[-1][0] == of_student and runs[-1][1].stop == index:
            runs[-1] = (of_student, range(runs[-1][1].start, index + 1))
        else:
            runs.append((of_student, range(index, index + 1)))
    return runs


def _part(leaf: Array, run: range) -> Array:
    """Return some layers of a stack, without a copy if they are all of them."""
    return leaf if len(run) == len(leaf) else leaf[run.start : run.stop]
