"""Build training data: a folder in M-BEIR layout becomes tables of tokens and images, read by row.

`python -m puma_jax.data.builder --data.root M-BEIR --model Qwen2-VL-2B-Instruct --out data`

TFDS reads the tables too, `tfds.builder_from_directory("data/queries").as_data_source("train")`,
without TensorFlow. Rerun the same command to resume a build that was stopped, or after files were
edited: it writes the shards of other lines or images again, and no others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax import artifacts
from puma_jax.data.builder.output import Output, claim
from puma_jax.data.builder.settings import Settings
from puma_jax.data.builder.shards import ShardColumns, ShardWriter, shard_writing
from puma_jax.data.builder.sources import (
    Queries,
    Reading,
    drop_unanswerable,
    find_candidates,
    find_queries,
    pool_files,
    query_files,
)
from puma_jax.data.lines import BadRecords
from puma_jax.data.mbeir import read_instructions
from puma_jax.data.mbeir.documents import Documents
from puma_jax.data.mbeir.layout import discover
from puma_jax.data.mbeir.records import Instruction, InstructionKey, negatives_note
from puma_jax.data.prompts import Processor, prompt_fingerprint
from puma_jax.data.store import (
    BUILD_VERSION,
    Instructions,
    Prompt,
)
from puma_jax.data.table import LengthTable
from puma_jax.typing import Int, UInt64, ndarray


@dataclass(frozen=True)
class Summary:
    """The result of a build."""

    queries: int
    candidates: int
    sets: tuple[str, ...]
    skipped: BadRecords
    """The bad records that were skipped."""
    longest: int
    """Texts with `max_text_tokens` tokens; most of them were longer and are truncated."""
    limit: int
    """`max_text_tokens`."""
    with_negatives: int
    """Queries with hard negatives."""
    negatives: int
    """Hard negatives of all queries."""
    unknown_negatives: int
    """Ids of hard negatives that are left out, because no candidate has them."""
    written: int
    """Shards that were written; 0 if all were there already."""
    shards: int

    def notes(self) -> list[str]:
        """Return what was left out, replaced or is not used, in a line each."""
        notes = []
        if self.skipped.count:
            notes.append(f"{self.skipped.count:,} bad records were skipped, the first of them:")
            notes += [f"  {message}" for message in self.skipped.messages]
        if self.longest:
            notes.append(
                f"{self.longest:,} texts fill the limit of {self.limit} tokens at which text is "
                "truncated"
            )
        if self.negatives:
            notes.append(negatives_note(self.with_negatives, self.negatives))
        if self.unknown_negatives:
            notes.append(
                f"{self.unknown_negatives:,} ids of neg_cand_list are of no candidate and are left "
                "out"
            )
        return notes


def build(settings: Settings, processor: Processor) -> Summary:
    """Build the tables of queries and candidates, or their missing parts, and return a summary.

    Args:
        settings: The data to build, and the folder to write.
        processor: The processor of the model to train.

    Raises:
        ArtifactError: The folder to write holds something else, cannot be written, or another
            process writes it.
        DataError: The benchmark has no training data, a file cannot be read, or a record is bad
            and `on_bad_record` is "error".
    """
    benchmark = discover(settings.root)
    files, pools = query_files(benchmark), pool_files(benchmark)
    rows = read_instructions(benchmark.instructions) if benchmark.instructions else {}
    inputs = [*files, *pools, *filter(None, [benchmark.instructions])]
    job = _job(settings, processor)
    # Before the long work, so that a place that cannot be written is refused at once.
    claim(settings.out, job)
    with artifacts.lock(settings.out):
        output = Output(settings, job)
        output.prepare()
        return _build(output, processor, files, pools, rows, inputs)


def _build(
    output: Output,
    processor: Processor,
    files: Mapping[Path, str],
    pools: Sequence[Path],
    rows: Mapping[InstructionKey, Instruction],
    inputs: Sequence[Path],
) -> Summary:
    """Write what is missing in a folder that no other process writes; see `build`."""
    settings = output.settings
    # Digests come first: a file that is edited while it is read has another one afterwards.
    digests = output.digests(inputs)
    source = Reading(settings.root, settings.on_bad_record, BadRecords())
    named = Documents()
    queries = find_queries(files, rows, settings.sets, named, source)
    documents, document_of_id = find_candidates(
        pools, named, source, only_named=bool(settings.sets)
    )
    writer = ShardWriter(
        processor, settings.root, settings.images == "inline", settings.on_bad_record
    )
    with shard_writing(writer, settings.workers) as write:
        candidates = output.write_table("candidates", documents, write, source)
        row_of_document = np.where(candidates.kept, np.cumsum(candidates.kept) - 1, -1)
        # Documents in no pool have index -1, which selects the -1 appended here.
        row_of_id = np.append(row_of_document, -1)[document_of_id]
        listed = len(queries.negatives.values)
        queries = queries.renumbered(row_of_id)
        unknown = listed - len(queries.negatives.values)
        queries = drop_unanswerable(queries, source)
        records = output.write_table("queries", queries.lines, write, source)
    queries = queries.take(np.flatnonzero(records.kept))

    table = _length_table(queries, records, candidates)
    instructions = _tokenized(rows, queries.sets, processor)
    output.finish(table, instructions, digests)
    limit = processor.config.prompt.max_text_tokens
    texts = np.concatenate([part.column("text_length") for part in (records, candidates)])
    return Summary(
        queries=len(records.columns),
        candidates=len(candidates.columns),
        sets=queries.sets,
        skipped=source.skipped,
        longest=int((texts == limit).sum()),
        limit=limit,
        with_negatives=int((queries.negatives.lengths > 0).sum()),
        negatives=len(queries.negatives.values),
        unknown_negatives=unknown,
        written=output.written,
        shards=sum(map(len, output.lengths.values())),
    )


def _job(settings: Settings, processor: Processor) -> dict[str, Any]:
    """Return the settings that decide the bytes of a build, as JSON values."""
    return {
        "version": BUILD_VERSION,
        "root": os.fspath(settings.root.resolve()),
        "sets": sorted(settings.sets),
        "images": settings.images,
        "shard_items": settings.shard_items,
        "prompt": prompt_fingerprint(processor),
    }


def _length_table(queries: Queries, records: ShardColumns, candidates: ShardColumns) -> LengthTable:
    """Return the length table; all arguments are in row order."""
    scores = {
        "positive_score": queries.positive_scores.values,
        "negative_score": queries.negative_scores.values,
    }
    if all(np.isnan(of).all() for of in scores.values()):
        scores = {}
    return LengthTable(
        query_tokens=records.column("tokens"),
        query_plain_tokens=records.column("plain_tokens"),
        query_text_length=records.column("text_length"),
        query_height=records.column("height"),
        query_width=records.column("width"),
        query_key=queries.key,
        query_set=queries.set,
        query_task=queries.task,
        candidate_tokens=candidates.column("tokens"),
        candidate_height=candidates.column("height"),
        candidate_width=candidates.column("width"),
        candidate_modality=candidates.column("modality").astype(np.int8),
        candidate_content=_numbered(candidates.content),
        positive_start=queries.positives.start,
        positive_row=queries.positives.values,
        negative_start=queries.negatives.start,
        negative_row=queries.negatives.values,
        **scores,
    )


def _numbered(keys: UInt64[ndarray, "rows"]) -> Int[ndarray, "rows"]:
    """Return a small number for each key, the same for equal keys."""
    return np.unique(keys, return_inverse=True)[1].astype(np.int32)


def _tokenized(
    rows: Mapping[InstructionKey, Instruction], sets: tuple[str, ...], processor: Processor
) -> Instructions:
    """Return the instructions with the tokens of every prompt."""
    return Instructions(
        keys=tuple(rows),
        prompts=tuple(
            tuple(Prompt(prompt, processor.tokenize_instruction(prompt)) for prompt in row.prompts)
            for row in rows.values()
        ),
        sets=sets,
    )
