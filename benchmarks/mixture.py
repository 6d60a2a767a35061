"""Make a plan over synthetic lengths with a mixture like M-BEIR's.

Items are one third each of texts, images, and images with text. Texts have 8 to 450 tokens,
log-normal; images have 4 to 300 visual tokens. Queries carry one of four instructions.
"""

from __future__ import annotations

import numpy as np
import qwen2_vl_2b

from puma_jax.config import PlanConfig
from puma_jax.data.items import TokenizedTemplate
from puma_jax.data.plan import Plan
from puma_jax.data.store import Instructions, Prompt
from puma_jax.data.table import LengthTable

# Lengths with the published tokenizer: start and end of an item, and the one-word suffixes.
TEMPLATE = TokenizedTemplate(
    config=qwen2_vl_2b.config(),
    start=tuple(range(14)),
    end=tuple(range(6)),
    suffix_text=tuple(range(8)),
    suffix_both=tuple(range(10)),
)


def table(queries: int, candidates: int, seed: int = 0) -> LengthTable:
    """Return a length table with one positive for each query."""
    rng = np.random.default_rng(seed)
    sides = {}
    for side, n in (("query", queries), ("candidate", candidates)):
        kind = rng.integers(0, 3, n)  # image, text, both
        text = np.clip(np.exp(rng.normal(3.8, 0.9, n)), 8, 450).astype(int) * (kind != 0)
        visual = rng.integers(4, 301, n) * (kind != 1)
        sides |= {
            f"{side}_tokens": text + np.where(kind == 2, 10, 8),
            f"{side}_height": np.where(visual > 0, 56, 0),
            f"{side}_width": visual // 2 * 28,
        }
        if side == "query":
            sides["query_text_length"] = text
        else:
            sides["candidate_modality"] = kind
    zeros = np.zeros(queries, int)
    return LengthTable(
        **sides,
        query_plain_tokens=sides["query_tokens"],
        query_key=zeros,
        query_set=zeros,
        query_task=zeros,
        positive_start=np.arange(queries + 1),
        positive_row=rng.integers(0, candidates, queries),
        negative_start=np.zeros(queries + 1, int),
        negative_row=np.zeros(0, int),
    )


def plan(queries: int, candidates: int, batch_size: int = 600) -> Plan:
    """Return a plan over a table of `table`."""
    prompts = tuple(Prompt("", tuple(range(length))) for length in (8, 9, 10, 12))
    instructions = Instructions((("0", "image,text", "image,text"),), (prompts,), ("mixture",))
    return Plan(
        table(queries, candidates), instructions, TEMPLATE, PlanConfig(batch_size=batch_size)
    )
