"""A batch that does not fit its rows takes more chunks: the log says so, the run is the same."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from puma_jax.config import ImageConfig, LoraConfig, PlanConfig
from puma_jax.data.builder import Settings, build
from puma_jax.data.pipeline import Loader
from puma_jax.data.prompts import Processor
from puma_jax.data.store import Store
from puma_jax.parallel.mesh import MeshConfig, data_shards, make_mesh
from puma_jax.rows import PackedShape
from puma_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    StageConfig,
    TrainConfig,
)
from puma_jax.training.loop import Preempted, run_stage
from puma_jax.training.metric_writer import MetricWriter
from tests.data import fake_mbeir
from tests.reference import FLOAT32, byte_tokenizer
from tests.training.ready import ready_stage

STEPS, CHUNKS = 6, 2
IMAGES = ImageConfig(4 * 28**2, 9 * 28**2)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """A stage of adapters with dropout, on a benchmark of 13 queries."""
    root = fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))
    out = tmp_path_factory.mktemp("built") / "data"
    model = dataclasses.replace(tiny.config, images=IMAGES)
    build(Settings(root=root, out=out, workers=1), Processor(byte_tokenizer(), model))
    return TrainConfig(
        data=DataConfig(root, built=Path(Store.open(out).path)),
        stages={
            "adapt": StageConfig(
                steps=STEPS,
                model=str(tiny.folder),
                keep_layers="1",
                plan=PlanConfig(batch_size=12, balance_window=1),
                grad_cache_chunks=CHUNKS,
                lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1),
                optimizer=OptimizerConfig(learning_rate=1e-3),
            )
        },
        images=IMAGES,
        compute=FLOAT32,
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(every_steps=1, tensorboard=False),
    )


def stage_of(config, workdir, *, devices=1, tight):
    """A stage, and how many chunks its steps take: with tight rows, some or all of them more."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    stage = ready_stage("adapt", config, workdir, mesh)
    plan, shape = stage.loader.plan, stage.loader.shape
    if tight:
        # The few items that each of eight devices has leave no shape that only some steps fit.
        wanted = {CHUNKS, CHUNKS + 1} if devices == 1 else {CHUNKS + 1}
        shape = next(s for s in shorter(plan, shape) if set(chunks_of(plan, s)) == wanted)
        stage.loader = Loader(stage.loader.store, plan, shape, CHUNKS)
    assert shape.data_shards == data_shards(mesh) == devices
    return stage, chunks_of(plan, shape)


def shorter(plan, shape: PackedShape):
    """Shapes with fewer and shorter rows, in which the largest item has its place."""
    longest = -(-plan.largest_item()[0] // 4) * 4
    for rows in range(shape.data_shards, 3 * shape.rows, shape.data_shards):
        for length in range(longest, 4 * longest, 4):
            yield dataclasses.replace(shape, rows=rows, length=length)


def chunks_of(plan, shape):
    return [plan.step(step, shape, CHUNKS).packing.chunks for step in range(STEPS)]


def run(stage, config, workdir, metric_writer=MetricWriter):
    """Run a stage; return its metrics and its trained leaves."""
    writer = metric_writer(workdir, config.log, {})
    try:
        run_stage(stage, config, workdir / "checkpoints", writer, lambda _: {})
    finally:
        writer.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return lines, jax.device_get(stage.state.trained)


@pytest.fixture(scope="module")
def overflowing(config, tmp_path_factory):
    """A run some of whose batches do not fit: chunks of its steps, metrics, leaves."""
    workdir = tmp_path_factory.mktemp("runs") / "tight"
    stage, chunks = stage_of(config, workdir, tight=True)
    return chunks, *run(stage, config, workdir)


def test_a_batch_that_does_not_fit_gives_what_it_gives_where_it_fits(config, overflowing, tmp_path):
    chunks, lines, trained = overflowing
    assert [line["steps_with_more_chunks"] for line in lines] == [n > CHUNKS for n in chunks]
    stage, roomy = stage_of(config, tmp_path / "roomy", tight=False)
    assert set(roomy) == {CHUNKS}
    expected_lines, expected = run(stage, config, tmp_path / "roomy")
    assert_close(lines, trained, expected_lines, expected)


def test_eight_devices_need_other_chunks_and_take_the_steps_of_one(config, overflowing, tmp_path):
    _, expected_lines, expected = overflowing
    stage, chunks = stage_of(config, tmp_path, devices=8, tight=True)
    assert set(chunks) == {CHUNKS + 1}
    lines, trained = run(stage, config, tmp_path)
    assert_close(lines, trained, expected_lines, expected)


def assert_close(lines, trained, expected_lines, expected):
    for name in ("loss", "gradient_norm"):
        found, wanted = ([line[name] for line in each] for each in (lines, expected_lines))
        assert len(found) == STEPS
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
    for name, leaf in expected.items():
        np.testing.assert_allclose(trained[name], leaf, rtol=0, atol=1e-5, err_msg=name)


def test_a_run_resumed_at_such_a_batch_ends_with_the_same_bits(
    config, overflowing, tmp_path, capsys
):
    """The log names the step, once for each number of chunks that is compiled."""
    chunks, _, expected = overflowing
    at = chunks.index(CHUNKS + 1)
    assert at > 1

    class Stopping(MetricWriter):
        def write(self, stage, step, values):
            super().write(stage, step, values)
            if step == at - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    # Preempted once `at` steps are done: the next one, of index `at`, does not fit.
    stage, _ = stage_of(config, tmp_path, tight=True)
    with pytest.raises(Preempted):
        run(stage, config, tmp_path, Stopping)
    assert int(stage.state.step) == at
    stage, _ = stage_of(config, tmp_path, tight=True)
    capsys.readouterr()
    _, trained = run(stage, config, tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "chunks" in line]
    assert said == [
        f"adapt, step {at + 1}: its batch needs 3 chunks instead of 2; compiling the step for "
        "3 chunks"
    ]
    for name, leaf in expected.items():
        np.testing.assert_array_equal(trained[name], leaf, err_msg=name)
