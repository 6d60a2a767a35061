"""The training loop of one stage: prefetch, step, monitor, save, evaluate."""

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

from puma_jax.data.pipeline import Batch, Counters, batches, prefetch_to_device, with_counters
from puma_jax.errors import TrainingError
from puma_jax.parallel import multihost
from puma_jax.progress import Progress
from puma_jax.training.checkpoint import Checkpoints
from puma_jax.training.config import TrainConfig
from puma_jax.training.metric_writer import MetricWriter
from puma_jax.training.objective import Metrics, TeacherStates
from puma_jax.training.profiler import Profiler, peak_memory
from puma_jax.training.stages import Stage
from puma_jax.training.transfer import shard_batch, shard_teacher_states

_SHOWN_IDS = 32

Measure = Callable[[Stage], dict[str, float]]


class Preempted(Exception):  # noqa: N818 (not an error)
    """Raised when training was asked to stop and its state is saved."""


def run_stage(
    stage: Stage,
    config: TrainConfig,
    folder: Path,
    metric_writer: MetricWriter,
    measure: Measure,
) -> None:
    """Train a stage from its latest checkpoint, or from its start, to its last step.

    Args:
        stage: Stage to train; its state is updated in place.
        config: Config of the run.
        folder: Folder for the checkpoints of this stage.
        metric_writer: Writes the metrics of steps and evaluations.
        measure: Evaluates the stage as it is, every `evaluation.every_steps` steps.

    Raises:
        TrainingError: The loss or the gradient norm is not finite.
        Preempted: SIGTERM or Ctrl-C was received; the state is saved.
    """
    about = {**stage.job, "steps": stage.steps}
    checkpoints = Checkpoints(folder, max_to_keep=config.checkpoint.max_to_keep, about=about)
    if checkpoints.latest is not None:
        stage.state = checkpoints.restore(stage.state)
    start = int(stage.state.step)
    if start == stage.steps:
        checkpoints.close()
        return
    bar = Progress(
        total=stage.steps,
        initial=start,
        desc=stage.name,
        unit="step",
        disable=not multihost.is_process_zero(),
    )
    any_process = multihost.any_process(stage.mesh)
    profiler = Profiler(folder.parent.parent / "profile" / stage.name, config.log.profile)
    with bar, contextlib.closing(profiler), _stop_requests() as stop_requested:
        monitor = MetricsMonitor(stage, config, metric_writer, bar)
        train_steps = _TrainSteps(stage, bar)
        prefetched = prefetch(stage, config, start)
        for step, (batch, device_batch, counters) in enumerate(prefetched, start + 1):
            train_step = train_steps.compiled(step, *device_batch)
            profiler.before(step)
            with jax.transfer_guard("disallow"):
                stage.state, metrics = train_step(stage.state, stage.frozen_params, *device_batch)
            monitor.after(step, batch, metrics, counters)
            profiler.after(step, metrics)
            if any_process(stop_requested()) and step < stage.steps:
                monitor.flush()
                checkpoints.save(stage.state)
                checkpoints.close()
                raise Preempted
            if step % config.checkpoint.every_steps == 0 or step == stage.steps:
                monitor.flush()
                began = time.perf_counter()
                checkpoints.save(stage.state)
                monitor.seconds_saving += time.perf_counter() - began
            if config.evaluation.every_steps and step % config.evaluation.every_steps == 0:
                monitor.flush()
                metric_writer.write(stage.name, step, measure(stage))
        monitor.flush()
    checkpoints.close()


def prefetch(
    stage: Stage, config: TrainConfig, start: int
) -> Iterator[tuple[Batch, tuple[Batch, TeacherStates | None], Counters]]:
    """Yield each batch on the host, the same on the devices, and counters of its loading.

    The batch on the devices comes with the cached states of the teacher, or None.
    """

    def transfer(batch: Batch) -> tuple[Batch, TeacherStates | None]:
        teacher_states = None
        if stage.teacher_cache is not None:
            teacher_states = shard_teacher_states(
                stage.teacher_cache.of_pairs(batch), stage.config.loss, stage.mesh
            )
        return shard_batch(batch, stage.config.loss, stage.mesh), teacher_states

    loaded = batches(stage.loader, start, stage.steps)
    transferred = prefetch_to_device(loaded, transfer)
    for (batch, device_batch), counters in with_counters(transferred, lambda pair: pair[0]):
        yield batch, device_batch, counters


class _TrainSteps:
    """The train step of a stage, compiled ahead of time once for every number of chunks.

    Most batches have the chunks that the stage is set to; one that does not fit has more. A batch
    that differs from the first one in any other shape is an error, not a recompilation.
    """

    def __init__(self, stage: Stage, bar: Progress):
        self._stage = stage
        self._bar = bar
        self._compiled: dict[int, jax.stages.Compiled] = {}
        self._first: tuple[Batch, TeacherStates | None] | None = None
        """Shapes and shardings of the first batch and its teacher states."""

    def compiled(
        self, step: int, batch: Batch, teacher_states: TeacherStates | None
    ) -> jax.stages.Compiled:
        """Return the train step for the batch of a step, as it is on the devices."""
        chunks = batch.rows.tokens.shape[0]
        if chunks in self._compiled:
            return self._compiled[chunks]
        usual, name = self._stage.loader.chunks, self._stage.name
        if chunks != usual:
            self._bar.write(
                f"{name}, step {step}: its batch needs {chunks} chunks instead of {usual}; "
                f"compiling the step for {chunks} chunks"
            )
        self._bar.set_postfix_str("compiling")
        if self._first is None:
            self._first = jax.tree.map(_abstract, (batch, teacher_states))
        like, states_like = self._first
        rows = jax.tree.map(lambda leaf: _abstract(leaf, chunks), like.rows)
        like = dataclasses.replace(like, rows=rows)
        stage = self._stage
        lowered = stage.step.lower(stage.state, stage.frozen_params, like, states_like)
        self._compiled[chunks] = lowered.compile()
        return self._compiled[chunks]


def _abstract(leaf: Any, chunks: int | None = None) -> jax.ShapeDtypeStruct:
    """Return the shape and sharding of an array, its leading axis set to `chunks` if given."""
    shape = leaf.shape if chunks is None else (chunks, *leaf.shape[1:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


class MetricsMonitor:
    """Checks and reports the metrics of a step while the device works on the next one."""

    def __init__(
        self, stage: Stage, config: TrainConfig, metric_writer: MetricWriter, bar: Progress
    ):
        self.stage = stage
        self.config = config
        self.metric_writer = metric_writer
        self.bar = bar
        self.seconds_saving = 0.0
        """Seconds for which checkpoints stopped training since metrics were last written."""
        self.steps_with_more_chunks = 0
        """Steps since then whose batch did not fit into the chunks that the stage is set to."""
        self._pending: tuple[int, Batch, Metrics, Counters] | None = None

    def after(self, step: int, batch: Batch, metrics: Metrics, counters: Counters) -> None:
        """Report the step before this one, and keep the metrics of this one for the next call."""
        self.flush()
        self._pending = step, batch, metrics, counters

    def flush(self) -> None:
        """Report the last step now.

        Raises:
            TrainingError: Its loss or gradient norm is not finite.
        """
        if self._pending is None:
            return
        step, batch, metrics, counters = self._pending
        self._pending = None
        self.steps_with_more_chunks += len(batch.rows.tokens) > self.stage.loader.chunks
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        if bad:
            raise TrainingError(self._not_finite(step, batch, bad[0], values[bad[0]]))
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {counters.pairs_per_second:.0f} pairs/s, "
            f"{counters.useful_tokens:.0%} useful tokens",
            refresh=False,
        )
        if step % self.config.log.every_steps == 0 or step == self.stage.steps:
            costs = {
                "seconds_saving": self.seconds_saving,
                "steps_with_more_chunks": self.steps_with_more_chunks,
                "peak_memory": peak_memory(),
            }
            self.metric_writer.write(self.stage.name, step, {**values, **vars(counters), **costs})
            self.seconds_saving, self.steps_with_more_chunks = 0.0, 0

    def _not_finite(self, step: int, batch: Batch, name: str, value: float) -> str:
        store = self.stage.loader.store
        ids = [store.query(int(row)).id for row in batch.query[:_SHOWN_IDS]]
        return (
            f"stage {self.stage.name}, step {step}: the {name} is {value}, expected a finite "
            f"number. The last checkpoint is kept. Queries of this step: {', '.join(ids)}"
            + (f" and {len(batch.query) - len(ids)} more" if len(batch.query) > len(ids) else "")
            + "; lower optimizer.learning_rate, or check these queries"
        )


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or Ctrl-C was received.

    A second Ctrl-C stops the process at once.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
