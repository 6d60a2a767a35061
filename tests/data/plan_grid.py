"""Plans of long runs, step by step: every item lies in one place, however its batch packs.

python -m tests.data.plan_grid                          made-up tables × seeds × batches × devices
python -m tests.data.plan_grid --config configs/openmoji.py --root runs/openmoji --seeds 10
                                                        all stages of a config, to their end

Each line says how many steps needed more chunks than the stage asks for, and how many at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puma_jax.config import DecoderConfig, ModelConfig, PlanConfig, VisionConfig
from puma_jax.data.items import TokenizedTemplate
from puma_jax.data.packing import Packing
from puma_jax.data.plan import Plan
from puma_jax.data.prompts import Processor
from puma_jax.data.store import Instructions, Prompt
from puma_jax.data.table import LengthTable
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.model import hf
from puma_jax.rows import PackedShape
from puma_jax.train import load_config
from puma_jax.training.scratch import write_base
from puma_jax.training.stages import open_store, with_inputs

MODEL = ModelConfig(
    family="qwen2_vl",
    vision=VisionConfig(layers=1, width=32, heads=2, mlp_width=64, out_width=32),
    decoder=DecoderConfig(400, 32, 1, 4, 2, 8, 48, mrope_section=(1, 1, 2)),
    image_token_id=1,
    vision_start_token_id=2,
    vision_end_token_id=3,
)


@dataclass(frozen=True)
class Lengths:
    """Sizes of a made-up table, and how its items are framed."""

    queries: int
    candidates: int
    images: float
    """Share of items with an image."""
    both: float
    """Share of these that have a text, too."""
    median_text: int
    spread: float
    """Standard deviation of the logarithms of the lengths of texts."""
    longest_text: int
    most_visual: int
    frame: int
    """Tokens around each item."""
    prompts: tuple[int, ...]
    """Tokens of the prompts of every query."""


TABLES = {
    "openmoji": Lengths(37225, 10048, 0.4, 0.4, 7, 0.5, 33, 4, 1, (7, 9, 6, 13)),
    "long-tailed": Lengths(200_000, 100_000, 0.67, 0.5, 45, 0.9, 450, 300, 30, (8, 9, 10, 12)),
    "464 pictures": Lengths(464, 464, 0.5, 0.0, 5, 0.4, 20, 4, 1, (7, 9, 6, 13)),
}


def table_of(lengths: Lengths) -> LengthTable:
    """Return a made-up table, two positives for every query."""
    rng = np.random.default_rng(0)
    side = {
        name: _side(rng, lengths, rows)
        for name, rows in (("query", lengths.queries), ("candidate", lengths.candidates))
    }
    columns = {
        f"{name}_{column}": value for name, of in side.items() for column, value in of.items()
    }
    zeros = np.zeros(lengths.queries, int)
    return LengthTable(
        **columns,
        query_text_length=columns["query_tokens"],
        query_plain_tokens=columns["query_tokens"],
        query_key=zeros,
        query_set=zeros,
        query_task=zeros,
        candidate_modality=np.zeros(lengths.candidates, int),
        candidate_content=np.arange(lengths.candidates),
        positive_start=2 * np.arange(lengths.queries + 1),
        positive_row=rng.integers(0, lengths.candidates, 2 * lengths.queries),
        negative_start=np.zeros(lengths.queries + 1, int),
        negative_row=np.zeros(0, int),
    )


def plan_of(lengths: Lengths, table: LengthTable, config: PlanConfig) -> Plan:
    """Return a plan of a made-up table."""
    prompts = tuple(Prompt("", tuple(range(length))) for length in lengths.prompts)
    instructions = Instructions((("0", "text", "image"),), (prompts,), ("made up",))
    template = TokenizedTemplate(MODEL, (), tuple(range(lengths.frame)), (), ())
    return Plan(table, instructions, template, config)


def _side(rng: np.random.Generator, lengths: Lengths, rows: int) -> dict[str, np.ndarray]:
    image = rng.random(rows) < lengths.images
    text = ~image | (rng.random(rows) < lengths.both)
    tokens = np.exp(rng.normal(np.log(lengths.median_text), lengths.spread, rows))
    visual = rng.integers(4, lengths.most_visual + 1, rows) * image
    return {
        "tokens": np.clip(tokens, 2, lengths.longest_text).astype(int) * text,
        "height": np.where(image, 56, 0),
        "width": visual // 2 * 28,
    }


def plan_all(
    plan: Plan, chunks: int, data_shards: int, steps: int, shape: PackedShape | None = None
) -> Iterator[int]:
    """Yield the number of chunks of each step, once all its items are found to lie well."""
    shape = shape or plan.fitting_shape(chunks, data_shards)
    for number in range(steps):
        step = plan.step(number, shape, chunks)
        assert len(step.pairs.query) == len(step.lengths) / 2 == plan.config.batch_size
        check_packing(step.lengths, step.patches, step.packing, shape)
        yield step.packing.chunks


def check_packing(
    lengths: np.ndarray, patches: np.ndarray, packing: Packing, shape: PackedShape
) -> None:
    """Assert that every item lies whole in one data shard and overlaps with no other.

    Raises:
        AssertionError: It does not.
    """
    rows, patch_rows, slots = (
        size // shape.data_shards for size in (shape.rows, shape.patch_rows, shape.slots)
    )
    assert packing.chunk.min() >= 0
    assert packing.chunk.max() < packing.chunks
    shard = packing.slot // slots
    assert shard.min() >= 0
    assert shard.max() < shape.data_shards
    at = packing.chunk * shape.slots + packing.slot
    assert len(np.unique(at)) == len(lengths)
    np.testing.assert_array_equal(packing.row // rows, shard)
    row = packing.chunk * shape.rows + packing.row
    _check_that_none_overlap(row, packing.column, lengths, shape.length)
    image = np.flatnonzero(patches)
    if len(image):
        np.testing.assert_array_equal(packing.patch_row[image] // patch_rows, shard[image])
        row = (packing.chunk * shape.patch_rows + packing.patch_row)[image]
        _check_that_none_overlap(
            row, packing.patch_column[image], patches[image], shape.patch_length
        )


def _check_that_none_overlap(
    row: np.ndarray, start: np.ndarray, sizes: np.ndarray, length: int
) -> None:
    order = np.lexsort((start, row))
    row, start, end = row[order], start[order], (start + sizes)[order]
    assert start.min() >= 0
    assert end.max() <= length
    assert (end[:-1] <= start[1:])[row[:-1] == row[1:]].all()


def _report(name: str, batch: int, devices: int, chunks: int, found: list[int]) -> None:
    more = sum(number > chunks for number in found)
    print(
        f"{name:16} batch {batch:4}  devices {devices}  chunks {chunks}  steps {len(found):7,}  "
        f"with more chunks {more:5} ({more / len(found):.3%})  at most {max(found)}",
        flush=True,
    )


def _made_up(names: Sequence[str], seeds: int, steps: int) -> None:
    for name in names:
        lengths = TABLES[name]
        table = table_of(lengths)
        for batch, chunks in ((256, 4 if name == "long-tailed" else 1), (16, 1)):
            for data_shards in (1, 8):
                found: list[int] = []
                for seed in range(seeds):
                    plan = plan_of(lengths, table, PlanConfig(batch_size=batch, seed=seed))
                    found += plan_all(plan, chunks, data_shards, steps)
                _report(name, batch, data_shards, chunks, found)


def _of_config(path: Path, root: Path, seeds: int) -> None:
    config = load_config(path)()
    assert config.scratch is not None
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))
    with tempfile.TemporaryDirectory() as folder:
        base, workdir = Path(folder) / "base", Path(folder) / "run"
        write_base(base, config.scratch, root, config.images, config.prompt, config.seed)
        checkpoint = hf.open_checkpoint(base)
        processor = Processor(load_tokenizer(base), with_inputs(checkpoint.config, config))
        store = open_store(config, root, processor, workdir)
        for seed in range(seeds):
            for name, stage in config.stages.items():
                settings = dataclasses.replace(
                    stage.plan,
                    seed=stage.plan.seed + seed,
                    batch_size=min(stage.plan.batch_size, len(store.table.query_set)),
                )
                plan = Plan(store.table, store.instructions, processor.template, settings)
                steps = stage.steps or max(1, round((stage.epochs or 0) * plan.steps_per_epoch))
                for data_shards in (1, 8):
                    found = list(plan_all(plan, stage.grad_cache_chunks, data_shards, steps))
                    _report(
                        f"seed {seed} {name}",
                        settings.batch_size,
                        data_shards,
                        stage.grad_cache_chunks,
                        found,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000, help="of each made-up plan")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--config", type=Path, help="plan the stages of a config that starts anew")
    parser.add_argument("--root", type=Path, default=Path("runs/openmoji"), help="its benchmark")
    arguments = parser.parse_args()
    if arguments.config is None:
        _made_up(arguments.tables, arguments.seeds, arguments.steps)
    else:
        _of_config(arguments.config, arguments.root, arguments.seeds)


if __name__ == "__main__":
    main()
