"""What the first layers of a model find alone, in one table with the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from puma_jax.config import require
from puma_jax.evaluation.evaluation import Evaluation
from puma_jax.evaluation.report import POOLS, markdown
from puma_jax.evaluation.sizes import Size, rates_and_kept, sizes_json


@dataclass(frozen=True)
class Depth:
    """The hit rates of a number of decoder layers, and those of smaller vectors, if measured."""

    layers: int
    evaluation: Evaluation
    sizes: dict[Size, Evaluation] = field(default_factory=dict)


def check_depths(layers: Sequence[int], of_model: int) -> None:
    """Check numbers of layers to evaluate beside the whole model.

    Raises:
        ConfigError: A number is below 1, or not below the layers of the model.
    """
    for count in layers:
        require(
            1 <= count < of_model,
            f"layers {count} must be in [1, {of_model - 1}]: the model has {of_model} layers, and "
            "is evaluated with all of them anyway",
        )


def depths_table(depths: Sequence[Depth]) -> str:
    """Return a markdown table: layers, sizes of vectors, and mean hit rates in percent.

    The last columns are percentages of what the first depth, the whole model, finds with float32
    vectors of all values.
    """
    whole = depths[0].evaluation
    header = ["layers", "vectors", *(f"{pool} @k" for pool in POOLS)]
    header += [f"{pool} kept" for pool in POOLS]
    rows = []
    for depth in depths:
        of_sizes = {
            f"{size.title}, {size.dimensions:,} values": of for size, of in depth.sizes.items()
        }
        for vectors, evaluation in (of_sizes or {"float32": depth.evaluation}).items():
            rows.append([str(depth.layers), vectors, *rates_and_kept(evaluation, whole)])
    return markdown(header, rows)


def depths_json(depths: Sequence[Depth], multiplier: int) -> dict[str, Any]:
    """Return all numbers as JSON values."""
    return {
        "depths": [
            {
                "layers": depth.layers,
                "evaluation": depth.evaluation.to_json(),
                **(sizes_json(depth.sizes, multiplier) if depth.sizes else {}),
            }
            for depth in depths
        ]
    }
