"""The optimizer is torch's AdamW, under a cosine with a warm-up, slower in the first layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from puma_jax.training.config import OptimizerConfig
from puma_jax.training.optimizer import learning_rate, make_optimizer

STEPS = 50
NAMES = ("decoder.layers.mlp.up.kernel", "vision.merger.up.bias")


def gradients(step):
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=(3, 4, 5)).astype(np.float32) for name in NAMES}


def test_updates_are_those_of_torch():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    optimizer = make_optimizer(config, STEPS)
    start = gradients(99)
    ours = jax.tree.map(jnp.asarray, start)
    theirs = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in start.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[NAMES[0]]], "weight_decay": 0.1},
            {"params": [theirs[NAMES[1]]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        eps=1e-7,
    )
    state = optimizer.init(ours)
    for step in range(20):
        updates, state = optimizer.update(gradients(step), state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, leaf in gradients(step).items():
            theirs[name].grad = torch.tensor(leaf)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = float(learning_rate(config, STEPS)(step))
        reference.step()
    for name in NAMES:
        np.testing.assert_allclose(ours[name], theirs[name].detach(), rtol=0, atol=1e-6)


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_ratio=0.1), 100)
    rates = np.array([rate(step) for step in range(101)])
    assert rates.argmax() == 10
    assert rates[10] == 2.0
    assert 0 < rates[0] < 0.2
    assert rates[100] == 0
    middle = 2.0 * (1 + np.cos(np.pi * (55 - 10) / 90)) / 2
    np.testing.assert_allclose(rates[55], middle, rtol=1e-6)


def test_the_first_layer_of_the_decoder_has_a_rate_of_its_own():
    moved = {}
    for factor in (1.0, 0.5):
        optimizer = make_optimizer(OptimizerConfig(first_layer_lr_scale=factor), STEPS)
        leaves = jax.tree.map(jnp.zeros_like, gradients(0))
        moved[factor], _ = optimizer.update(gradients(0), optimizer.init(leaves), leaves)
    layers, other = NAMES
    np.testing.assert_allclose(moved[0.5][layers][0], moved[1.0][layers][0] / 2, rtol=1e-6)
    np.testing.assert_array_equal(moved[0.5][layers][1:], moved[1.0][layers][1:])
    np.testing.assert_array_equal(moved[0.5][other], moved[1.0][other])
