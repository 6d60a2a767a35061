"""Operations counted by formula are those that torch counts."""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from puma_jax.model.flops import forward_flops
from tests.reference import grid_thw, pixel_values, random_image


def counted(function, *inputs) -> int:
    """Return the operations that torch counts, with attention as plain products."""
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), kernel, FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def test_the_decoder_costs_what_torch_counts(tiny):
    config = tiny.config.decoder

    def ours(tokens: int) -> float:
        # torch computes both halves of the pairs; ours counts the causal one.
        half = 2 * config.heads * config.head_dim * config.layers * tokens**2
        return forward_flops(tiny.config, np.array([tokens]), np.array([0])).item() + half

    def theirs(tokens: int) -> int:
        ids = torch.arange(3, 3 + tokens)[None]
        return counted(lambda: tiny.torch.model.language_model(input_ids=ids))

    for tokens in (5, 40):
        assert theirs(tokens) == ours(tokens)


def test_the_tower_costs_what_torch_counts(tiny):
    item = tiny.item("", random_image(56, 84))
    patches = len(item.patches)
    inputs = pixel_values(item.patches, tiny.config.vision), grid_thw(item)
    with_image, without = (
        forward_flops(tiny.config, np.array([9]), np.array([n])).item() for n in (patches, 0)
    )
    assert counted(tiny.torch.model.visual, *inputs) == with_image - without
