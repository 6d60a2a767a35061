"""Plots of the experiments, from the files that benchmarks/experiments/report.py writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import GREEN, ORANGE, SOFT, VIOLET

POOLS = ("local", "global")
_RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    """Return the results of an experiment."""
    return json.loads((_RESULTS / f"{name}.json").read_text("utf-8"))


def pruning() -> Figure:
    """Return hit@5 by depth, and by the cost of training and of embedding."""
    found = read("pruning")
    figure, panels = pyplot.subplots(2, 3, figsize=(9.4, 6), sharey="row", layout="constrained")
    costs = (
        ("layers", 1, "decoder layers"),
        ("embedding_flops", 1e6, "MFLOP to embed an item"),
        ("training_flops", 1e12, "TFLOP of training after pruning"),
    )
    for pool, row in zip(POOLS, panels, strict=True):
        for panel, (cost, unit, name) in zip(row, costs, strict=True):
            for arms, label, color, style in (
                (("keep-1", "keep-2", "keep-3", "full"), "pruned", VIOLET, "o-"),
                (("keep-1-distilled", "keep-2-distilled"), "pruned, distilled", GREEN, "s--"),
                (("keep-2-longer",), "pruned, trained longer", ORANGE, "D"),
                (("keep-2-random",), "random layers", SOFT, "x"),
            ):
                _line(panel, found, arms, pool, (cost, unit), label=label, color=color, style=style)
            panel.set_xlabel(name)
            panel.set_xlim(0)
        row[0].set_ylabel(f"hit@5 in {pool} pools, %")
    panels[0][0].legend(fontsize=9, loc="center right")
    return figure


def learning_of_pruning() -> Figure:
    """Return the learning curves of the pruned models."""
    return _learning(
        read("pruning"),
        {"full": VIOLET, "keep-2": GREEN, "keep-2-distilled": ORANGE, "keep-1": SOFT},
    )


def pretrained() -> Figure:
    """Return what a pretrained decoder finds by the cost of training and of embedding."""
    found = read("pretrained")
    training = ("training_flops", 1e12)
    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 3.6), sharey=True, layout="constrained")
    for arms, label, color, style in (
        (("full",), "30 layers", SOFT, "D"),
        (("keep-15", "keep-15-as-full"), "15 layers", GREEN, "o-"),
        (("keep-15-distilled",), "15 layers, distilled", GREEN, "s--"),
        (("keep-10", "keep-10-longer", "keep-10-as-full"), "10 layers", VIOLET, "o-"),
        (
            ("keep-10-distilled", "keep-10-distilled-as-full"),
            "10 layers, distilled",
            ORANGE,
            "s--",
        ),
    ):
        _line(panels[0], found, arms, "local", training, label=label, color=color, style=style)
    whole = found["start"]["embedding_flops"]
    equal = ("keep-10-as-full", "keep-15-as-full", "full")
    _line(
        panels[1], found, equal, "local", ("embedding_flops", whole / 100), label="",
        color=VIOLET, style="o-",
    )  # fmt: skip
    rates = [run["mean"]["local"] for run in found["arms"]["full"]["seeds"].values()]
    goal = 97 * np.mean(rates)
    panels[1].axhline(goal, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    panels[1].annotate(
        "97 % of full depth", (100, goal), (0, -4), textcoords="offset points",
        ha="right", va="top", color=SOFT, fontsize=9,
    )  # fmt: skip
    panels[0].set_xlabel("TFLOP of training after pruning")
    panels[1].set_xlabel("cost of embedding an item, % of full depth")
    panels[0].set_title("hit@5 in local pools, %")
    panels[1].set_title("the same, at equal cost of training")
    panels[0].set_xlim(0)
    panels[1].set_xlim(0, 104)
    panels[0].legend(fontsize=9, loc="upper left")
    return figure


def candidates() -> Figure:
    """Return what distilling the candidates alone does at equal cost, by seed, and the losses."""
    found = read("candidates")
    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 3.4), layout="constrained")
    first = str(found["seeds"][0])
    for depth, color in ((15, GREEN), (10, VIOLET)):
        plain, taught = (found["arms"][f"keep-{depth}{end}"] for end in ("", "-candidates"))
        for seed, run in plain["seeds"].items():
            rates = [100 * of["mean"]["local"] for of in (run, taught["seeds"][seed])]
            label = f"{depth} layers" if seed == first else None
            panels[0].plot((0, 1), rates, "o-", color=color, label=label)
        for arm, style in ((plain, "-"), (taught, "--")):
            curve = np.array(arm["seeds"][first]["loss"])
            panels[1].plot(*curve.T, style, color=color, label=arm["label"])
    panels[0].set_xticks((0, 1), ("more steps", "candidates distilled"))
    panels[0].set_xlim(-0.3, 1.3)
    panels[0].set_title("hit@5 in local pools, %, by seed")
    panels[1].set_title("contrastive loss, first seed")
    panels[1].set_xlabel("step")
    for panel in panels:
        panel.legend(fontsize=9)
    return figure


def recipe() -> Figure:
    """Return the difference that every part makes at equal steps or cost, with its interval."""
    answers = [
        answer
        for answer in read("recipe")["answers"]
        if answer["other"] == "plain" and not answer["arm"].endswith("noise")
    ]
    labels = {name: arm["label"] for name, arm in read("recipe")["arms"].items()}
    rows = np.arange(len(answers))[::-1]
    figure, panel = pyplot.subplots(figsize=(9.4, 4.6), layout="constrained")
    for pool, color, shift in (("local", VIOLET, 0.15), ("global", GREEN, -0.15)):
        means, low, high = (
            100 * np.array([answer[pool][part] for answer in answers])
            for part in ("mean", "low", "high")
        )
        panel.errorbar(
            means, rows + shift, xerr=(means - low, high - means), fmt="o", color=color,
            capsize=3, markersize=5, label=f"{pool} pools" if pool == "local" else "global pool",
        )  # fmt: skip
    panel.axvline(0, color=SOFT, linewidth=1)
    panel.set_yticks(rows, [labels[answer["arm"]] for answer in answers])
    panel.set_xlabel("points of hit@5 beside the plain arm of 2 layers, with 95 % intervals")
    panel.legend(fontsize=9, loc="lower left")
    return figure


def losses() -> Figure:
    """Return hit@5 of every loss by temperature, at the first seed."""
    found = read("losses")
    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 3.2), sharey=True, layout="constrained")
    first = str(found["seeds"][0])
    for pool, panel in zip(POOLS, panels, strict=True):
        for family, color, style in (
            ("info-nce", VIOLET, "o-"),
            ("mac", GREEN, "s-"),
            ("mac-relative", GREEN, "s--"),
            ("mamcl", ORANGE, "D-"),
            ("masked", SOFT, "x:"),
        ):
            points = sorted(
                (float(name.removeprefix(f"{family}-")), arm["label"], arm["seeds"][first])
                for name, arm in found["arms"].items()
                if name.rpartition("-")[0] == family and not name.endswith("noise")
            )
            taus = [tau for tau, _, _ in points]
            rates = [100 * run["mean"][pool] for _, _, run in points]
            label = points[0][1].partition(", τ")[0]
            panel.plot(taus, rates, style, color=color, label=label)
        panel.set_xlabel("temperature (MAC-Loss: tau_norm)")
        panel.set_title(f"hit@5 in the {pool} pool, %")
    panels[0].legend(fontsize=9)
    return figure


def learning_of_losses() -> Figure:
    """Return the learning curves of the losses at temperature 0.05."""
    return _learning(
        read("losses"),
        {
            "info-nce-0.05": VIOLET,
            "mac-0.05": GREEN,
            "mac-relative-0.05": SOFT,
            "mamcl-0.05": ORANGE,
        },
    )


def _line(
    panel: Axes,
    found: dict[str, Any],
    arms: tuple[str, ...],
    pool: str,
    cost: tuple[str, float],
    *,
    label: str,
    color: str,
    style: str,
) -> None:
    """Draw arms, each at the mean of its seeds, by a cost; their seeds are small dots."""
    known = [list(found["arms"][arm]["seeds"].values()) for arm in arms if arm in found["arms"]]
    if not known:
        return
    across = [runs[0][cost[0]] / cost[1] for runs in known]
    rates = [[100 * run["mean"][pool] for run in runs] for runs in known]
    panel.plot(across, [np.mean(of_arm) for of_arm in rates], style, color=color, label=label)
    for at, of_arm in zip(across, rates, strict=True):
        panel.plot([at] * len(of_arm), of_arm, ".", color=color, markersize=4)


def _learning(found: dict[str, Any], arms: dict[str, str]) -> Figure:
    """Return the contrastive loss and the validation hit rates of arms, by step, at one seed."""
    first = str(found["seeds"][0])
    figure, panels = pyplot.subplots(1, 3, figsize=(9.4, 3.4), layout="constrained")
    names = ("contrastive loss", *(f"hit@5 in {pool} pools, validation, %" for pool in POOLS))
    for name, color in arms.items():
        arm = found["arms"][name]
        run, label = arm["seeds"][first], arm["label"].removesuffix(", τ 0.05")
        steps, values = zip(*run["loss"], strict=True)
        panels[0].plot(steps, values, "o-", color=color, markersize=3, label=label)
        start = found["start"]["curve"][-1:]
        if run["layers"] < found["start"]["layers"]:
            start = []  # what the pruned model finds before training is not measured
        for place, panel in enumerate(panels[1:], 1):
            points = [(0, point[place]) for point in start]
            points += [(point[0], point[place]) for point in run["curve"]]
            steps, rates = zip(*points, strict=True)
            panel.plot(steps, 100 * np.array(rates), "o-", color=color, markersize=3)
    for panel, name in zip(panels, names, strict=True):
        panel.set_xlabel("step")
        panel.set_title(name, fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
