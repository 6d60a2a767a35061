"""Metrics survive what kills a run, and a file that cannot be written is told in one line."""

import json

import pytest

from puma_jax.errors import ArtifactError
from puma_jax.training.config import LogConfig
from puma_jax.training.metric_writer import MetricWriter

CONFIG = LogConfig(tensorboard=False)


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for end in ('{"stage": "a", "st', ""):
        path.write_text('{"stage": "a", "step": 1}\n' + end)
        writer = MetricWriter(tmp_path, CONFIG, {})
        writer.write("a", 2, {"loss": 0.5})
        writer.close()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        MetricWriter(tmp_path, CONFIG, {})
