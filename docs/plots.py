"""Draw the plots of the documentation: `python docs/plots.py`.

The curves of losses are computed by the losses of puma_jax, the numbers of the demo are read from
docs/results. Each plot is one SVG that is readable on light and on dark pages: its colors are CSS
variables, which the fragments #only-light and #only-dark choose.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plot_style
from matplotlib import pyplot
from matplotlib.figure import Figure
from plot_experiments import (
    candidates,
    learning_of_losses,
    learning_of_pruning,
    losses,
    pretrained,
    pruning,
    recipe,
)
from plot_style import GREEN, ORANGE, SOFT, VIOLET, save

from puma_jax.losses import hard_temperature, mac_loss
from puma_jax.model.qwen2_vl import PUBLISHED

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGES = HERE / "img"

MODALITIES = {0: "t → i", 1: "t → t", 2: "t → it", 3: "i → t", 4: "i → i"}
MODALITIES |= {6: "it → t", 7: "it → i", 8: "it → it"}


def main() -> None:
    """Draw all plots into docs/img."""
    plot_style.use()
    plots = {
        "plot-results": results,
        "plot-size": size,
        "plot-stages": stages,
        "plot-learning": learning,
        "plot-gradients": gradients,
        "plot-temperature": temperature,
    }
    if (RESULTS / "pruning.json").exists():
        plots |= {"plot-pruning": pruning, "plot-pruning-learning": learning_of_pruning}
    if (RESULTS / "pretrained.json").exists():
        plots |= {"plot-pretrained": pretrained}
    if (RESULTS / "candidates.json").exists():
        plots |= {"plot-candidates": candidates}
    if (RESULTS / "recipe.json").exists():
        plots |= {"plot-recipe": recipe}
    if (RESULTS / "losses.json").exists():
        plots |= {"plot-losses": losses, "plot-losses-learning": learning_of_losses}
    for name, draw in plots.items():
        figure = draw()
        save(figure, IMAGES / f"{name}.svg")
        pyplot.close(figure)


def results() -> Figure:
    """Return the quick demo's hit@5 by task, of the whole and of the pruned model."""
    found = json.loads((RESULTS / "openmoji-quick/results.json").read_text("utf-8"))["stages"]
    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 3.5), sharey=True, layout="constrained")
    for panel, pool in zip(panels, ("local", "global"), strict=True):
        for shift, (stage, label, color) in enumerate(
            [("deep", "4 layers", VIOLET), ("pruned", "2 layers", GREEN)]
        ):
            sets = found[stage]["evaluation"]["sets"]
            rates = [100 * one["hits"][pool][str(one["k"])] for one in sets]
            panel.bar(np.arange(len(rates)) + 0.4 * shift - 0.2, rates, 0.36, color=color)
            mean = 100 * found[stage]["evaluation"]["mean"][pool]
            panel.axhline(mean, color=color, linewidth=1, linestyle=(0, (4, 3)))
            cost = found[stage]["flops_per_item"] / 1e6
            label = f"{label}, {cost:.0f} MFLOP an item: mean {mean:.1f} %"
            panel.plot([], [], color=color, linewidth=7, label=label)
        names = [MODALITIES[one["task"]] for one in sets]
        panel.set_xticks(range(len(names)), names)
        panel.grid(axis="x", visible=False)
        panel.set_ylim(0, 132)
        panel.set_yticks(range(0, 101, 20))
        panel.set_title(f"hit@5 in the {pool} pool, %")
        panel.legend(loc="upper left", ncols=1, fontsize=10, borderaxespad=0.1)
    return figure


def size() -> Figure:
    """Return the parameters of Qwen2-VL by the number of decoder layers kept."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 2.9), layout="constrained")
    for panel, (name, model) in zip(panels, PUBLISHED.items(), strict=True):
        decoder = model.decoder
        inner, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
        layer = decoder.width * (2 * inner + 2 * keys + 3 * decoder.mlp_width + 2)
        layer += inner + 2 * keys
        table = decoder.vocab_size * decoder.width
        kept = np.arange(1, decoder.layers + 1)
        panel.fill_between(kept, table / 1e9, color=ORANGE, alpha=0.5, linewidth=0)
        total = (table + kept * layer) / 1e9
        panel.fill_between(kept, table / 1e9, total, color=VIOLET, alpha=0.5, linewidth=0)
        panel.plot(kept, total, color=VIOLET)
        panel.plot([12], [total[11]], "o", color=GREEN, markersize=8)
        panel.annotate(
            f"12 layers: {total[11]:.2f} B of {total[-1]:.2f} B",
            (12, total[11]), (1.2, total[-1] * 0.93), color=GREEN,
        )  # fmt: skip
        panel.text(27.5, table / 2e9, "token table", ha="right", va="center", fontsize=10)
        panel.text(27.5, total[-1] * 0.42, "decoder layers", ha="right", va="center", fontsize=10)
        panel.set_xlim(1, decoder.layers)
        panel.set_ylim(0, total[-1] * 1.08)
        panel.set_xticks([1, 4, 8, 12, 16, 20, 24, 28])
        panel.set_xlabel("decoder layers kept")
        panel.set_title(
            f"{name.split('/')[1].removesuffix('-Instruct')}, 10⁹ parameters without the tower"
        )
    return figure


def stages() -> Figure:
    """Return the mean hit@5 of the quick demo's model after each of its stages."""
    of_run = json.loads((RESULTS / "openmoji-quick/results.json").read_text("utf-8"))["stages"]
    labels = {
        "deep": "4 layers",
        "cut": "2 layers",
        "distil": "2 layers, distilled",
        "pruned": "2 layers, trained further",
    }
    evaluations = {label: of_run[name]["evaluation"] for name, label in labels.items()}
    figure, panel = pyplot.subplots(figsize=(7.2, 2.6), layout="constrained")
    places = np.arange(len(evaluations))[::-1]
    for pool, shift, color in (("local", 0.2, GREEN), ("global", -0.2, ORANGE)):
        rates = [100 * evaluation["mean"][pool] for evaluation in evaluations.values()]
        panel.barh(places + shift, rates, 0.36, color=color, label=f"{pool} pool")
        for place, rate in zip(places, rates, strict=True):
            panel.text(rate + 0.5, place + shift, f"{rate:.1f}", va="center", fontsize=10)
    panel.set_yticks(places, list(evaluations))
    panel.grid(axis="y", visible=False)
    panel.set_title("mean hit@5 of eight tasks, %")
    panel.legend(loc="upper right")
    return figure


def learning() -> Figure:
    """Return the losses of the quick demo, stage after stage."""
    lines = (RESULTS / "openmoji-quick/metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    names = list(dict.fromkeys(record["stage"] for record in records))
    widths = [max(r["step"] for r in records if r["stage"] == name) for name in names]
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(9.4, 2.9), sharey=True, layout="constrained",
        width_ratios=[max(width, 60) for width in widths],
    )  # fmt: skip
    for panel, name in zip(panels, names, strict=True):
        of_stage = [record for record in records if record["stage"] == name]
        steps = [record["step"] for record in of_stage]
        contrastive = [record["contrastive"] for record in of_stage]
        panel.plot(steps, contrastive, color=GREEN, label="contrastive", marker="o", markersize=3)
        if "distillation" in of_stage[0]:
            distilled = [record["distillation"] for record in of_stage]
            panel.plot(
                steps, distilled, color=ORANGE, label="distillation", marker="o", markersize=3
            )
            panel.legend(fontsize=10, loc="center")
        panel.set_ylim(0)
        panel.set_xlabel("step")
        panel.set_title(f"stage {name}")
    panels[0].set_ylabel("loss")
    return figure


def gradients() -> Figure:
    """Return how strongly each loss pushes away a negative, by the negative's similarity.

    One query, its positive at a cosine of 0.6, and two negatives: one of the positive's modality
    whose cosine is 0.5, and one whose cosine varies.
    """
    cosines = jnp.linspace(0, 1, 101)

    def push(cosine: jax.Array, other: int, tau_hard: float, relative: bool) -> jax.Array:
        """Return the derivative of the loss by the cosine of the last negative."""

        def loss(cosine: jax.Array) -> jax.Array:
            # The query is the first axis, so a candidate's first value is its score.
            scores = jnp.array([0.6, 0.5]), cosine[None]
            candidates = jnp.concatenate(scores)[:, None] * jnp.array([[1.0, 0.0]])
            queries = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
            # The mean is over three queries; those of zeros have a constant loss.
            return 3 * mac_loss(
                queries, candidates, jnp.array([0, 0, other]),
                tau_norm=0.03, tau_hard=tau_hard, relative=relative,
            )  # fmt: skip

        return jax.grad(loss)(cosine)

    figure, panels = pyplot.subplots(1, 2, figsize=(9.4, 3.1), sharey=True, layout="constrained")
    for panel, other, title in zip(
        panels, (0, 1), ("of the target's modality", "of another modality"), strict=True
    ):
        for label, tau_hard, relative, color, style in (
            ("InfoNCE, τ 0.03", 0.03, False, VIOLET, "-"),
            ("MAC-Loss, τ 0.018 and 0.03", 0.018, False, GREEN, "-"),
            ("MAC-Loss, relative", 0.018, True, ORANGE, "--"),
        ):
            values = jax.vmap(lambda c, o=other, t=tau_hard, r=relative: push(c, o, t, r))(cosines)
            panel.plot(cosines, values, color=color, linestyle=style, label=label)
        panel.axvline(0.6, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
        panel.text(0.59, 57, "positive", ha="right", va="top", fontsize=10)
        panel.set_xlim(0.3, 1)
        panel.set_ylim(0, 58)
        panel.set_xlabel("cosine of query and negative")
        panel.set_title(f"Push on a negative {title}")
    panels[1].legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, 0.88))
    return figure


def temperature() -> Figure:
    """Return the two temperatures of MAC-Loss over training."""
    progress = np.linspace(0, 1, 101)
    figure, panel = pyplot.subplots(figsize=(6.4, 2.4), layout="constrained")
    hard = [float(hard_temperature(one, 0.03, 0.5)) for one in progress]
    panel.plot(100 * progress, np.full(101, 0.03), color=ORANGE)
    panel.plot(100 * progress, hard, color=GREEN)
    panel.text(99, 0.0304, "tau_norm: other modalities", ha="right", va="bottom", fontsize=10)
    panel.text(99, 0.0186, "tau_hard: the target's modality", ha="right", va="bottom", fontsize=10)
    panel.set_ylim(0.015, 0.034)
    panel.set_xlim(0, 100)
    panel.set_xlabel("training done, %")
    panel.set_title("Temperatures of MAC-Loss")
    return figure


if __name__ == "__main__":
    main()
