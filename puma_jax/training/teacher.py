"""The teacher of distillation: the whole model, frozen, without a second copy of what is shared.

The student keeps some layers of a stack, and the teacher is the stack they were cut from. Leaves
that the student does not train (with adapters, all of the base) exist once and both read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.model.encoder import Encoder, abstract, encode
from puma_jax.model.tree import assemble, named_leaves
from puma_jax.rows import Rows
from puma_jax.training.optimizer import Leaves
from puma_jax.typing import Array, Float

_LAYERS = "decoder.layers."


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teacher:
    """What the teacher has beside the leaves that the student leaves frozen."""

    originals: Leaves
    """As they were before training, those leaves of the student that it trains."""
    removed: Leaves
    """Stacks of the layers that were cut, by the names they have in a whole model."""


Teach = Callable[[Teacher, Leaves, Rows], Float[Array, "slots width"]]
"""The teacher's states for rows, from what it has and from what the student leaves frozen."""


def split_teacher(base: Encoder, kept: Sequence[int], trained: Leaves) -> Teacher:
    """Return what the teacher needs for itself.

    Args:
        base: The whole model.
        kept: Indices of the layers that the student keeps.
        trained: The leaves that the student trains.
    """
    leaves = named_leaves(base)
    depth = len(leaves[f"{_LAYERS}attention_norm.scale"])
    cut = [index for index in range(depth) if index not in kept]
    removed = {
        name: leaf[jax.numpy.array(cut, int)]
        for name, leaf in leaves.items()
        if name.startswith(_LAYERS)
    }
    originals = {}
    for name in trained:
        if name in leaves:  # adapters have no original
            leaf = leaves[name]
            # A copy: the student's own leaf is given away with every step.
            originals[name] = (
                leaf[jax.numpy.array(kept)] if name.startswith(_LAYERS) else leaf.copy()
            )
    return Teacher(originals, removed if cut else {})


def make_teacher(
    config: ModelConfig, kept: Sequence[int], compute: ComputeConfig, groups: int
) -> Teach:
    """Return the function that computes a teacher's states.

    Args:
        config: Of the whole model.
        kept: Indices of the layers that the student keeps.
        compute: How to run.
        groups: Into how many parts rows divide.
    """
    kept = tuple(kept)
    cut = [index for index in range(config.decoder.layers) if index not in kept]
    student = abstract(config.with_layers(tuple(config.kept_layers[i] for i in kept)))
    runs = _runs(config.decoder.layers, kept)

    def teach(teacher: Teacher, frozen: Leaves, rows: Rows) -> Array:
        params = assemble(student, {**frozen, **teacher.originals})
        stacks = {True: params.decoder.layers, False: None}
        if cut:
            stacks[False] = _stack(student, teacher.removed)
        in_order = [
            jax.tree.map(lambda leaf, run=run: _part(leaf, run), stacks[of_student])
            for of_student, run in runs
        ]
        return jax.lax.stop_gradient(encode(params, rows, compute, groups=groups, stacks=in_order))

    return teach


def _stack(student: Encoder, removed: Leaves) -> Any:
    """Return the layers that were cut, as a module."""
    layers = {name.removeprefix(_LAYERS): leaf for name, leaf in removed.items()}
    return assemble(student.decoder.layers, layers)


def _runs(depth: int, kept: tuple[int, ...]) -> list[tuple[bool, range]]:
    """Return the runs of neighbours in the whole stack: of the student's or not, and which there.

    Where the first layers are kept these are two, and each is a whole stack.
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
    """Return some layers of a stack, and a whole stack as it is."""
    return leaf if len(run) == len(leaf) else leaf[run.start : run.stop]
