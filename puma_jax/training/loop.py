"""The loop over the steps of one stage: feed, step, watch, save."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from tqdm import tqdm

from puma_jax.data.pipeline import Batch, Counters, batches, counted, on_device
from puma_jax.errors import TrainingError
from puma_jax.parallel import multihost
from puma_jax.training.checkpoint import Checkpoints
from puma_jax.training.config import TrainConfig
from puma_jax.training.journal import Journal
from puma_jax.training.observe import Trace, most_memory
from puma_jax.training.stages import Stage
from puma_jax.training.step import Metrics, Targets
from puma_jax.training.transfer import put, put_targets

_SHOWN_IDS = 32

Measure = Callable[[Stage], dict[str, float]]


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Training was asked to stop, and its state is saved."""


def run_stage(
    stage: Stage,
    config: TrainConfig,
    folder: Path,
    journal: Journal,
    measure: Measure,
) -> None:
    """Take a stage from its latest checkpoint, or from its start, to its end.

    Args:
        stage: Changed: its state is that after the last step.
        config: Of the run.
        folder: For checkpoints of this stage.
        journal: Where metrics go.
        measure: Evaluates a stage as it is, every so often.

    Raises:
        TrainingError: The loss is not finite.
        Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    about = {
        "stage": stage.name,
        "steps": stage.steps,
        "seed": config.seed,
        "kept_layers": list(stage.model.kept_layers),
    }
    checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, about=about)
    if checkpoints.latest is not None:
        stage.state = checkpoints.restore(stage.state)
    start = int(stage.state.step)
    if start == stage.steps:
        checkpoints.close()
        return
    bar = tqdm(
        total=stage.steps,
        initial=start,
        desc=stage.name,
        unit="step",
        smoothing=0.05,
        disable=not multihost.is_first(),
    )
    agreed = multihost.agreement(stage.mesh)
    trace = Trace(folder.parent.parent / "profile" / stage.name, config.log.profile)
    with bar, contextlib.closing(trace), _stop_requests() as stop_requested:
        compiled_steps = _CompiledSteps(stage, bar)
        watched: _Watch = _Watch(stage, config, journal, bar, start)
        for (batch, on_devices), counters in _fed(stage, config, start):
            compiled = compiled_steps.get(watched.step + 1, *on_devices)
            trace.before(watched.step + 1)
            stage.state, metrics = compiled(stage.state, stage.fixed, *on_devices)
            watched.after(batch, metrics, counters)
            done = watched.step
            trace.after(done, metrics)
            if agreed(stop_requested()) and done < stage.steps:
                watched.settle()
                checkpoints.save(stage.state)
                checkpoints.close()
                raise Stopped
            if done % config.checkpoint.every == 0 or done == stage.steps:
                watched.settle()
                began = time.perf_counter()
                checkpoints.save(stage.state)
                watched.seconds_saving += time.perf_counter() - began
            if config.evaluation.every and done % config.evaluation.every == 0:
                watched.settle()
                journal.write(stage.name, done, measure(stage))
        watched.settle()
    checkpoints.close()


def _fed(
    stage: Stage, config: TrainConfig, start: int
) -> Iterator[tuple[tuple[Batch, tuple[Batch, Targets | None]], Counters]]:
    """Yield every batch, as it is on the host and on the devices with its targets; how it came."""

    def transfer(batch: Batch) -> tuple[Batch, Targets | None]:
        targets = None
        if stage.taught is not None:
            targets = put_targets(stage.taught.targets(batch), stage.config.loss, stage.mesh)
        return put(batch, stage.config.loss, stage.mesh), targets

    made = batches(stage.loader, start, stage.steps, workers=config.data.workers)
    return counted(on_device(made, transfer), lambda both: both[0])


class _CompiledSteps:
    """The step of a stage, compiled ahead of time once for every number of chunks.

    Most batches have the chunks that the stage asks for; one that does not fit has more. Whatever
    else is not of the first batch's shapes is an error, and compiles nothing anew.
    """

    def __init__(self, stage: Stage, bar: tqdm):
        self._stage = stage
        self._bar = bar
        self._compiled: dict[int, jax.stages.Compiled] = {}
        self._first: tuple[Batch, Targets | None] | None = None
        """Shapes and shardings of the first batch and its targets."""

    def get(self, number: int, batch: Batch, targets: Targets | None) -> jax.stages.Compiled:
        """Return the compiled step for a batch on the devices, that of step `number`."""
        chunks = batch.rows.tokens.shape[0]
        if chunks in self._compiled:
            return self._compiled[chunks]
        wanted, name = self._stage.loader.chunks, self._stage.name
        if chunks != wanted:
            self._bar.write(
                f"{name}, step {number}: its batch needs {chunks} chunks instead of {wanted}; "
                f"compiling the step for {chunks} chunks"
            )
        self._bar.set_postfix_str("compiling")
        if self._first is None:
            self._first = jax.tree.map(_abstract, (batch, targets))
        like, like_targets = self._first
        rows = jax.tree.map(lambda leaf: _abstract(leaf, chunks), like.rows)
        like = dataclasses.replace(like, rows=rows)
        lowered = self._stage.step.lower(self._stage.state, self._stage.fixed, like, like_targets)
        self._compiled[chunks] = lowered.compile()
        return self._compiled[chunks]


def _abstract(leaf: Any, chunks: int | None = None) -> jax.ShapeDtypeStruct:
    """Return the shape and sharding of an array; with a leading axis of so many chunks if given."""
    shape = leaf.shape if chunks is None else (chunks, *leaf.shape[1:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


class _Watch:
    """Looks at the metrics of a step while the device works on the next one."""

    def __init__(self, stage: Stage, config: TrainConfig, journal: Journal, bar: tqdm, start: int):
        self.stage = stage
        self.config = config
        self.journal = journal
        self.bar = bar
        self.step = start
        self.seconds_saving = 0.0
        """Since the last line of metrics, in which training stood still for a checkpoint."""
        self.steps_with_more_chunks = 0
        """Since the last line of metrics, whose batch did not fit into the chunks asked for."""
        self._waiting: tuple[int, Batch, Metrics, Counters] | None = None

    def after(self, batch: Batch, metrics: Metrics, counters: Counters) -> None:
        """Look at the step before this one."""
        self.settle()
        self.step += 1
        self._waiting = self.step, batch, metrics, counters

    def settle(self) -> None:
        """Look at the last step now.

        Raises:
            TrainingError: Its loss is not finite.
        """
        if self._waiting is None:
            return
        step, batch, metrics, counters = self._waiting
        self._waiting = None
        self.steps_with_more_chunks += len(batch.rows.tokens) > self.stage.loader.chunks
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        if bad:
            raise TrainingError(self._what_happened(step, batch, bad[0], values[bad[0]]))
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {counters.pairs_per_second:.0f} pairs/s, "
            f"{counters.useful_tokens:.0%} useful tokens",
            refresh=False,
        )
        if step % self.config.log.every == 0 or step == self.stage.steps:
            costs = {
                "seconds_saving": self.seconds_saving,
                "steps_with_more_chunks": self.steps_with_more_chunks,
                "most_memory": most_memory(),
            }
            self.journal.write(self.stage.name, step, {**values, **vars(counters), **costs})
            self.seconds_saving, self.steps_with_more_chunks = 0.0, 0

    def _what_happened(self, step: int, batch: Batch, name: str, value: float) -> str:
        store = self.stage.loader.store
        ids = [store.query(int(row)).id for row in batch.query[:_SHOWN_IDS]]
        return (
            f"stage {self.stage.name}, step {step}: the {name} is {value}. The last checkpoint "
            f"before is kept. Queries of this step: {', '.join(ids)}"
            + (f" and {len(batch.query) - len(ids)} more" if len(batch.query) > len(ids) else "")
            + "; lower optimizer.learning_rate, or look at these"
        )


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and Ctrl-C into a question that the loop asks after each step.

    A second Ctrl-C stops at once.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
