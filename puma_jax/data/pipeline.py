"""Batches ready for the device, made ahead of it: read, decode, resize, patchify, pack.

grain maps a pure function over step numbers. Nothing of a batch depends on which worker makes it,
on how many there are, or on what was made before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from PIL import Image

from puma_jax.data.examples import Record
from puma_jax.data.images import patchify
from puma_jax.data.items import Body, Item
from puma_jax.data.mbeir.lines import OnBadRecord
from puma_jax.data.packing import fill
from puma_jax.data.plan import Plan
from puma_jax.data.store import Store
from puma_jax.errors import ConfigError, DataError, ImageError
from puma_jax.rows import Rows, RowShape
from puma_jax.typing import AnyArray, Bool, Int

T = TypeVar("T")
U = TypeVar("U")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step. Rows are those of one host, all else is the whole global batch's.

    The arrays are NumPy's on the host and jax's on devices.
    """

    rows: Rows
    """With a leading axis of chunks."""
    query_slot: Int[AnyArray, "pairs"]
    """Where each query's vector is found, in those of all slots of all chunks."""
    candidate_slot: Int[AnyArray, "pairs"]
    modality: Int[AnyArray, "pairs"]
    """Of the candidate: image 0, text 1, image with text 2."""
    query: Int[AnyArray, "pairs"]
    """Rows of the table of queries."""
    candidate: Int[AnyArray, "pairs"]
    """Rows of the table of candidates."""
    prompt: Int[AnyArray, "pairs"]
    """Which of the prompts of the query's key; -1 for none."""
    valid: Bool[AnyArray, "pairs"]
    """False where an image of this host's could not be decoded and was left blank."""


@dataclass(frozen=True)
class Counters:
    """How well the rows of a step are used, and whether the device had to wait for them."""

    useful_tokens: float
    """Fraction of token positions that hold a token."""
    useful_patches: float
    """Fraction of patch positions that hold a patch; 1 where there are none."""
    pairs_per_second: float
    seconds: float
    """Since the batch before."""
    seconds_waited: float
    """Of these, for this batch: the rest went into the step, checkpoints and evaluation."""
    blank_images: int


class Loader:
    """Makes the batch of a step: what worker processes run."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        shape: RowShape,
        chunks: int,
        *,
        host: int = 0,
        hosts: int = 1,
        on_bad_record: OnBadRecord = "error",
    ):
        """Choose what to read.

        Args:
            store: The built data.
            plan: Which pairs make up a step.
            shape: Of a chunk, for all hosts together.
            chunks: Into how many chunks a batch is cut; one that does not fit takes more.
            host: Number of this host, from 0.
            hosts: How many there are; groups are split evenly between them, in order.
            on_bad_record: Whether an image that cannot be decoded stops the run, or is left blank
                and its pair marked as not valid.

        Raises:
            ConfigError: The groups do not divide among the hosts.
        """
        if shape.groups % hosts:
            raise ConfigError(f"{shape.groups} groups do not divide among {hosts} hosts")
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
            DataError: An image cannot be decoded, or a record is not what was planned with.
            PackingError: See `Plan.step`.
        """
        shape = self.shape
        step = self.plan.step(number, shape, self.chunks)
        mine, placement, local = step.placement.part(shape, self.host, self.hosts)
        query, candidate, prompt = step.pairs.query, step.pairs.candidate, step.pairs.prompt
        pairs = len(query)
        valid = np.ones(pairs, bool)
        items = []
        for i in mine.tolist():
            number, size = i % pairs, (int(step.lengths[i]), int(step.patches[i]))
            if i < pairs:
                item, decoded = self.query(int(query[number]), int(prompt[number]), size)
            else:
                item, decoded = self.candidate(int(candidate[number]), size)
            items.append(item)
            valid[number] &= decoded
        slots = step.placement.chunk * shape.slots + step.placement.slot
        return Batch(
            rows=fill(items, placement, local, self.plan.template.config.vision),
            query_slot=slots[:pairs],
            candidate_slot=slots[pairs:],
            modality=np.asarray(self.plan.table.candidate_modality[candidate], np.int32),
            query=query,
            candidate=candidate,
            prompt=prompt,
            valid=valid,
        )

    def query(self, row: int, prompt: int, planned: tuple[int, int]) -> tuple[Item, bool]:
        """Return the item of a query, and whether its image could be decoded.

        Args:
            row: In the table of queries.
            prompt: Which of the prompts of its key; −1 for none.
            planned: Its tokens and patches.

        Raises:
            DataError: Its image cannot be decoded, or it is not of the planned size.
        """
        record = self.store.query(row)
        if prompt < 0:
            return self._item(record, tuple(record.plain_tokens.tolist()), planned)
        key = int(self.plan.table.query_key[row])
        instruction = self.store.instructions.prompts[key][prompt].tokens
        body = Body(tuple(record.tokens.tolist()), record.text_length)
        joined = self.plan.template.join(instruction, body, image=record.image is not None)
        return self._item(record, joined, planned)

    def candidate(self, row: int, planned: tuple[int, int]) -> tuple[Item, bool]:
        """Return the item of a candidate, and whether its image could be decoded; see `query`."""
        record = self.store.candidate(row)
        return self._item(record, tuple(record.tokens.tolist()), planned)

    def _item(
        self, record: Record, body: tuple[int, ...], planned: tuple[int, int]
    ) -> tuple[Item, bool]:
        """Return the item of a record, and whether its image could be decoded."""
        template = self.plan.template
        if record.image is None:
            item, decoded = template.assemble(body), True
        else:
            vision, limits = template.config.vision, template.config.images
            try:
                cut, grid = patchify(self.store.image(record), vision, limits)
                item, decoded = template.assemble(body, cut, grid), True
            except ImageError as error:
                if self.on_bad_record == "error":
                    raise DataError(str(error)) from error
                blank = Image.new("RGB", (record.width, record.height))
                item, decoded = template.assemble(body, *patchify(blank, vision, limits)), False
        found = len(item.tokens), len(item.patches)
        if found != planned:
            raise DataError(
                f"{record.id} has {found[0]} tokens and {found[1]} patches, planned were "
                f"{planned[0]} and {planned[1]}: build the data again"
            )
        return item, decoded


def batches(
    loader: Callable[[int], T], start: int, stop: int, *, workers: int = 0, ahead: int = 2
) -> Iterator[T]:
    """Yield the batches of the steps from `start` up to, without, `stop`, in order.

    Args:
        loader: Makes a batch from a step, as a `Loader` does.
        start: First step; resuming is to start later.
        stop: Step to stop before.
        workers: Processes that make batches; 0 makes them in threads of this one.
        ahead: How many batches each of them may be ahead.
    """
    import grain

    steps = grain.MapDataset.range(start, stop).map(loader)
    if not workers:
        threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)
        yield from steps.to_iter_dataset(threads)
        return
    _mark_flags_as_parsed()
    in_worker = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    yield from in_worker.mp_prefetch(options)


def on_device(
    batches: Iterator[T], put: Callable[[T], U], *, ahead: int = 1
) -> Iterator[tuple[T, U]]:
    """Yield every batch, and what `put` made of it, with transfers under way before their turn.

    Args:
        batches: From the host.
        put: Starts the transfer, such as `jax.device_put` with the shardings of a mesh; it must
            not wait for it.
        ahead: How many transfers run while the device works.
    """
    waiting: deque[tuple[T, U]] = deque()
    for batch in batches:
        waiting.append((batch, put(batch)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def counted(batches: Iterator[T], batch_of: Callable[[T], Batch]) -> Iterator[tuple[T, Counters]]:
    """Yield what comes, and how well it is filled and how long it was waited for."""
    last = time.perf_counter()
    while True:
        asked = time.perf_counter()
        try:
            item = next(batches)
        except StopIteration:
            return
        now = time.perf_counter()
        batch = batch_of(item)
        rows = batch.rows
        yield (
            item,
            Counters(
                useful_tokens=float(np.mean(rows.segments > 0)),
                useful_patches=float(np.mean(rows.patch_segments > 0))
                if rows.patch_segments.size
                else 1.0,
                pairs_per_second=len(batch.query) / max(now - last, 1e-9),
                seconds=now - last,
                seconds_waited=now - asked,
                blank_images=int((~batch.valid).sum()),
            ),
        )
        last = now


def _mark_flags_as_parsed() -> None:
    """Tell absl that flags are what they are: grain's workers ask, we have none of its flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
