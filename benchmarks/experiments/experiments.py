"""All experiments, by name."""

from __future__ import annotations

from arms import COMPARED, PRUNING, RECIPE
from pretrained import PRETRAINED

EXPERIMENTS = {
    "pruning": PRUNING,
    "losses": COMPARED,
    "recipe": RECIPE,
    "pretrained": PRETRAINED,
}
