"""Learning curves are those of metrics.jsonl, resumes and cut lines included."""

import json
import re

from puma_jax.training.curves import curves


def test_a_step_counts_as_it_was_logged_last(tmp_path):
    lines = [
        {"stage": "cut", "step": 1, "loss": 9.0, "contrastive": 9.0},
        {"stage": "cut", "step": 2, "loss": 5.0, "contrastive": 5.0},
        {"stage": "cut", "step": 2, "loss": 3.0, "contrastive": 3.0},
        {"stage": "cut", "step": 2, "hit@k local": 0.25},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "cut", "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    shown = "".join(curves(tmp_path / "metrics.jsonl"))
    assert shown.count("<polyline") == 1  # the loss is the contrastive loss alone
    assert len(re.findall(r"[0-9.]+,[0-9.]+", re.search('points="([^"]+)"', shown)[1])) == 2
    assert shown.count("<circle") == 1
    assert "local pools" in shown
    assert "global pool" not in shown


def test_a_run_without_metrics_has_no_curves(tmp_path):
    assert not list(curves(tmp_path / "metrics.jsonl"))
