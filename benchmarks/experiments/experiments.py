"""All experiments, by name."""

from __future__ import annotations

from losses import COMPARED
from pretrained import PRETRAINED
from pruning import PRUNING
from recipe import RECIPE

EXPERIMENTS = {
    "pruning": PRUNING,
    "losses": COMPARED,
    "recipe": RECIPE,
    "pretrained": PRETRAINED,
}
