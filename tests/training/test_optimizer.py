"""The optimizer is torch's AdamW, or Muon, under a cosine with a warm-up."""

import dataclasses

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


def orthogonalized(matrix):
    """Return what five steps of the quintic Newton–Schulz iteration make of a matrix, in float64.

    Coefficients: https://kellerjordan.github.io/posts/muon.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / np.linalg.norm(wide)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


def test_muon_orthogonalizes_the_kernel_of_each_layer_and_leaves_the_rest_to_adam():
    table, kernel, bias = "decoder.embedding.table", *NAMES
    rng = np.random.default_rng(0)
    steps = [
        {n: rng.normal(size=s) for n, s in ((kernel, (3, 8, 5)), (bias, (5,)), (table, (7, 4)))}
        for _ in range(4)
    ]
    config = OptimizerConfig(kind="muon", learning_rate=1e-2, max_grad_norm=1e9, momentum=0.9)
    updates = {}
    for kind in ("muon", "adamw"):
        optimizer = make_optimizer(dataclasses.replace(config, kind=kind), STEPS)
        leaves = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), steps[0])
        state = optimizer.init(leaves)
        for gradient in steps:
            moved = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradient)
            updates[kind], state = optimizer.update(moved, state, leaves)
    for name in (bias, table):
        np.testing.assert_array_equal(updates["muon"][name], updates["adamw"][name])

    # Nesterov's momentum, corrected for its start as in NAdam.
    mean, count = np.zeros((3, 8, 5)), len(steps)
    for gradient in steps:
        mean = 0.9 * mean + 0.1 * gradient[kernel]
    ahead = 0.9 * mean / (1 - 0.9 ** (count + 1)) + 0.1 * steps[-1][kernel] / (1 - 0.9**count)
    rate = float(learning_rate(config, STEPS)(count - 1))
    for layer in range(3):
        expected = -rate * 0.2 * np.sqrt(8) * orthogonalized(ahead[layer])
        np.testing.assert_allclose(updates["muon"][kernel][layer], expected, rtol=0, atol=1e-6)
        values = np.linalg.svd(expected, compute_uv=False) / (rate * 0.2 * np.sqrt(8))
        assert 0.6 < values.min() <= values.max() < 1.3


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
