"""The input pipeline: batches are read, decoded, resized, patchified and packed ahead of use.

A pure function is mapped over step numbers, so a batch depends neither on earlier batches nor on
the threads and processes that make it. Its records are read as `Embedder.encode` reads its items:
see `data.preparing`.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from PIL import Image

from puma_jax.data.examples import Record
from puma_jax.data.images import patchify
from puma_jax.data.items import Item, TokenizedText
from puma_jax.data.lines import OnBadRecord
from puma_jax.data.packing import fill
from puma_jax.data.plan import Plan
from puma_jax.data.preparing import prepare, read_patches
from puma_jax.data.store import Store
from puma_jax.data.table import TeacherScores
from puma_jax.data.threads import ordered
from puma_jax.errors import ConfigError, DataError, ImageError
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.typing import AnyArray, Bool, Int

T = TypeVar("T")
U = TypeVar("U")

# One is read while another is placed and packed.
_BATCHES_AT_ONCE = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HardNegatives:
    """The hard negatives of a batch, a row for each pair."""

    slot: Int[AnyArray, "pairs negatives"]
    """Index of each among all slots of all chunks; -1 where a query has fewer negatives."""
    modality: Int[AnyArray, "pairs negatives"]
    """Image 0, text 1, image with text 2."""
    document: Int[AnyArray, "pairs negatives"]
    """Number of the content of each, as in `Batch`."""
    valid: Bool[AnyArray, "pairs negatives"]
    """False where there is none, and where this host could not decode its image."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The batch of one step: the rows of one host, and everything else of the whole global batch.

    The arrays are NumPy arrays on the host and jax arrays on devices.
    """

    rows: PackedBatch
    """The packed items, with a leading axis of chunks."""
    query_slot: Int[AnyArray, "pairs"]
    """Index of each query among all slots of all chunks."""
    candidate_slot: Int[AnyArray, "pairs"]
    """Index of each candidate among all slots of all chunks."""
    modality: Int[AnyArray, "pairs"]
    """Modality of the candidate: image 0, text 1, image with text 2."""
    query: Int[AnyArray, "pairs"]
    """Rows of the table of queries."""
    candidate: Int[AnyArray, "pairs"]
    """Rows of the table of candidates."""
    document: Int[AnyArray, "pairs"]
    """Number of the content of each candidate: equal for candidates of equal text and image."""
    prompt: Int[AnyArray, "pairs"]
    """Index among the prompts of the query's key; -1 for none."""
    valid: Bool[AnyArray, "pairs"]
    """False where this host could not decode an image and left it blank."""
    negatives: HardNegatives | None = None
    """None if no hard negatives are drawn."""
    scores: TeacherScores | None = None
    """None if the data have none, or if no hard negatives are drawn."""


@dataclass(frozen=True)
class Counters:
    """How full the rows of a step are, and how long the step waited for its batch."""

    useful_tokens: float
    """Fraction of token positions that hold a token."""
    useful_patches: float
    """Fraction of patch positions that hold a patch; 1 where there are none."""
    pairs_per_second: float
    """Pairs in the batch divided by `seconds`."""
    seconds: float
    """Seconds since the previous batch."""
    seconds_waited: float
    """Seconds spent waiting for this batch; the rest is the step, checkpoints and evaluation."""
    blank_images: int
    """Pairs and hard negatives with an image that could not be decoded."""
    missing_negatives: int
    """Hard negatives that were to be drawn and that queries do not have."""


class Loader:
    """Makes the batch of a step."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        shape: PackedShape,
        chunks: int,
        *,
        host: int = 0,
        hosts: int = 1,
        on_bad_record: OnBadRecord = "error",
    ):
        """Set what to read.

        Args:
            store: The built data.
            plan: The plan of every step.
            shape: The shape of a chunk, for all hosts together.
            chunks: Chunks in a batch; one that does not fit takes more.
            host: Index of this host, from 0.
            hosts: Number of hosts; each reads an equal run of data shards, in order.
            on_bad_record: "error" stops at an image that cannot be decoded; "skip" leaves it blank
                and marks its pair as not valid.

        Raises:
            ConfigError: The number of data shards is not a multiple of the number of hosts.
        """
        if shape.data_shards % hosts:
            raise ConfigError(
                f"{shape.data_shards} data shards do not divide among {hosts} hosts: "
                "mesh.data × mesh.fsdp must be a multiple of the number of hosts"
            )
        self.store = store
        self.plan = plan
        self.shape = shape
        self.chunks = chunks
        self.host = host
        self.hosts = hosts
        self.on_bad_record = on_bad_record

    def __call__(self, number: int) -> Batch:
        """Return the batch of a step.

        Raises:
            DataError: An image cannot be decoded, or a record differs from the plan.
            PackingError: See `Plan.step`.
        """
        shape = self.shape
        step = self.plan.step(number, shape, self.chunks)
        mine, packing, local = step.packing.host_slice(shape, self.host, self.hosts)
        query, candidate, prompt = step.pairs.query, step.pairs.candidate, step.pairs.prompt
        pairs, negative = len(query), step.pairs.negative
        drawn = negative >= 0
        documents = np.concatenate([candidate, negative[drawn]])

        async def read(i: int) -> tuple[Item, bool]:
            size = int(step.lengths[i]), int(step.patches[i])
            if i < pairs:
                return await self.query(int(query[i]), int(prompt[i]), size)
            return await self.candidate(int(documents[i - pairs]), size)

        items_and_decoded = list(prepare(read, mine.tolist(), waits=self.store.is_remote))
        items = [item for item, _ in items_and_decoded]
        decoded = np.ones(pairs + len(documents), bool)
        decoded[mine] = [well for _, well in items_and_decoded]
        slots = step.packing.chunk * shape.slots + step.packing.slot
        table, negatives = self.plan.table, None
        if negative.size:
            slot, valid = np.full(negative.shape, -1, slots.dtype), drawn.copy()
            slot[drawn], valid[drawn] = slots[2 * pairs :], decoded[2 * pairs :]
            negatives = HardNegatives(
                slot=slot,
                modality=np.asarray(table.candidate_modality[negative], np.int32),
                document=np.asarray(table.candidate_content[negative], np.int32),
                valid=valid,
            )
        return Batch(
            rows=fill(items, packing, local, self.plan.template.config.vision),
            query_slot=slots[:pairs],
            candidate_slot=slots[pairs : 2 * pairs],
            modality=np.asarray(table.candidate_modality[candidate], np.int32),
            query=query,
            candidate=candidate,
            document=np.asarray(table.candidate_content[candidate], np.int32),
            prompt=prompt,
            valid=decoded[:pairs] & decoded[pairs : 2 * pairs],
            negatives=negatives,
            scores=step.pairs.scores,
        )

    async def query(self, row: int, prompt: int, planned: tuple[int, int]) -> tuple[Item, bool]:
        """Return the item of a query, and whether its image could be decoded.

        Args:
            row: Row in the table of queries.
            prompt: Index among the prompts of its key; −1 for none.
            planned: Tokens and patches that the plan gives it.

        Raises:
            DataError: Its image cannot be decoded, or its size is not as planned.
        """
        record = self.store.query(row)
        if prompt < 0:
            return await self._item(record, tuple(record.plain_tokens.tolist()), planned)
        key = int(self.plan.table.query_key[row])
        instruction = self.store.instructions.prompts[key][prompt].tokens
        text = TokenizedText(tuple(record.tokens.tolist()), record.text_length)
        joined = self.plan.template.join(instruction, text, image=record.image is not None)
        return await self._item(record, joined, planned, len(instruction))

    async def candidate(self, row: int, planned: tuple[int, int]) -> tuple[Item, bool]:
        """Return the item of a candidate, and whether its image could be decoded; see `query`."""
        record = self.store.candidate(row)
        return await self._item(record, tuple(record.tokens.tolist()), planned)

    async def _item(
        self,
        record: Record,
        tokens: tuple[int, ...],
        planned: tuple[int, int],
        instruction: int = 0,
    ) -> tuple[Item, bool]:
        """Return the item of a record, and whether its image could be decoded."""
        template = self.plan.template
        assemble = functools.partial(template.assemble, tokens, instruction=instruction)
        if record.image is None:
            item, decoded = assemble(), True
        else:
            vision, limits = template.config.vision, template.config.images
            try:
                with self.store.image_source(record) as image:
                    cut = await read_patches([image], vision, limits)
                item, decoded = assemble(cut), True
            except ImageError as error:
                if self.on_bad_record == "error":
                    raise DataError(str(error)) from error
                blank = Image.new("RGB", (record.width, record.height))
                item, decoded = assemble([patchify(blank, vision, limits)]), False
        found = len(item.tokens), len(item.patches)
        if found != planned:
            raise DataError(
                f"{record.id} has {found[0]} tokens and {found[1]} patches, the plan has "
                f"{planned[0]} and {planned[1]}: build the data again"
            )
        return item, decoded


def batches(loader: Callable[[int], T], start: int, stop: int, *, ahead: int = 2) -> Iterator[T]:
    """Yield the batches of the steps from `start` to `stop - 1`, in order.

    Args:
        loader: Returns the batch of a step, such as a `Loader`.
        start: First step; a resumed run starts later.
        stop: Step to stop before.
        ahead: Batches that are made ahead of use.
    """
    threads = ThreadPoolExecutor(_BATCHES_AT_ONCE, "batches")
    try:
        yield from ordered(threads, loader, range(start, stop), ahead)
    finally:
        threads.shutdown(wait=False)


def prefetch_to_device(
    batches: Iterator[T], put: Callable[[T], U], *, ahead: int = 1
) -> Iterator[tuple[T, U]]:
    """Yield every batch with the result of `put`, whose transfer starts `ahead` batches early.

    Args:
        batches: Batches on the host.
        put: Starts the transfer without waiting for it, such as `jax.device_put` with shardings.
        ahead: Transfers that run while the device works.
    """
    waiting: deque[tuple[T, U]] = deque()
    for batch in batches:
        waiting.append((batch, put(batch)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def with_counters(
    batches: Iterator[T], batch_of: Callable[[T], Batch]
) -> Iterator[tuple[T, Counters]]:
    """Yield every item with the counters of its batch.

    Args:
        batches: Batches, or what else holds them.
        batch_of: Returns the batch of an item.
    """
    last = time.perf_counter()
    while True:
        asked = time.perf_counter()
        try:
            item = next(batches)
        except StopIteration:
            return
        now = time.perf_counter()
        batch = batch_of(item)
        rows, blank, missing = batch.rows, int((~batch.valid).sum()), 0
        if batch.negatives is not None:
            missing = int((batch.negatives.slot < 0).sum())
            blank += int((~batch.negatives.valid).sum()) - missing
        yield (
            item,
            Counters(
                useful_tokens=float(np.mean(rows.segment_ids > 0)),
                useful_patches=float(np.mean(rows.patch_segment_ids > 0))
                if rows.patch_segment_ids.size
                else 1.0,
                pairs_per_second=len(batch.query) / max(now - last, 1e-9),
                seconds=now - last,
                seconds_waited=now - asked,
                blank_images=blank,
                missing_negatives=missing,
            ),
        )
        last = now
