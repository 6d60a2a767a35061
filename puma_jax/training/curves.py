"""Learning curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from puma_jax.evaluation.charts import line_chart

_HIT_RATES = {"hit@k local": "local pools", "hit@k global": "global pool"}


def curves(metrics: Path) -> Iterator[str]:
    """Yield the sections with the learning curves of all stages, for `report_page.page`.

    Args:
        metrics: metrics.jsonl of a run. A step that is there twice, after a resume, counts as it is
            there last; a last line that a kill cut short is left out.
    """
    stages = _read(metrics)
    if not stages:
        return
    yield "<h2>Learning curves</h2>\n"
    for stage, steps in stages.items():
        rates = {
            name: [(step, 100 * line[key]) for step, line in steps.items() if key in line]
            for key, name in _HIT_RATES.items()
        }
        losses = {
            name: [(step, line[name]) for step, line in steps.items() if name in line]
            for name in ("loss", "contrastive", "distillation")
        }
        if losses["loss"] == losses["contrastive"]:
            del losses["loss"]
        charts = [
            line_chart({name: points for name, points in lines.items() if points}, x="step", y=y)
            for lines, y in ((losses, "Loss"), (rates, "Hit rate on a subset, in percent"))
            if any(lines.values())
        ]
        if charts:
            yield f'<h3>{escape(stage)}</h3>\n<div class="charts">{"".join(charts)}</div>\n'


def _read(metrics: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the metrics of each stage by step."""
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    if not metrics.exists():
        return stages
    for text in metrics.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
            stages.setdefault(line["stage"], {}).setdefault(line["step"], {}).update(line)
        except (ValueError, KeyError, TypeError):
            continue
    return {stage: dict(sorted(steps.items())) for stage, steps in stages.items()}
