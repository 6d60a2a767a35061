"""All experiments, by name."""

from __future__ import annotations

from losses import COMPARED
from pretrained import DISTILLED_CANDIDATES, PRETRAINED, PRETRAINED_SHORT
from pruning import DEPTH, PRUNING
from recipe import RECIPE

EXPERIMENTS = {
    "pruning": PRUNING,
    "depth": DEPTH,
    "losses": COMPARED,
    "recipe": RECIPE,
    "pretrained": PRETRAINED,
    "pretrained-short": PRETRAINED_SHORT,
    "candidates": DISTILLED_CANDIDATES,
}
