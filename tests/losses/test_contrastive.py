"""Every loss against the formula in float64, its gradient against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from puma_jax.errors import ConfigError
from puma_jax.losses import (
    Layout,
    Negatives,
    distill_loss,
    hard_temperature,
    info_nce,
    learnable_temperature,
    mac_loss,
    mamcl_loss,
    matryoshka,
)
from tests.losses import reference

N, D, H = 48, 16, 24


def units(rng, n):
    x = rng.normal(size=(n, D))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    queries = units(rng, N)
    candidates = queries + 0.7 * units(rng, N)
    return {
        "queries": queries,
        "candidates": candidates / np.linalg.norm(candidates, axis=1, keepdims=True),
        "modality": rng.integers(0, 3, N),
        "valid": rng.random(N) > 0.2,
        "document": rng.integers(0, 30, N),
        "mask_margin": -0.55,  # leaves out a few of all negatives here
        "negatives": (
            units(rng, H),
            rng.integers(0, 3, H),
            rng.integers(0, 40, H),
            rng.random(H) > 0.3,
        ),
    }


LOSSES = {
    "info_nce": (
        lambda q, c, m, **k: info_nce(q, c, temperature=0.05, **k),
        {"tau_norm": 0.05, "tau_hard": 0.05},
    ),
    "mac": (
        lambda q, c, m, **k: mac_loss(q, c, m, tau_norm=0.03, tau_hard=0.018, **k),
        {"tau_norm": 0.03, "tau_hard": 0.018},
    ),
    "relative mac": (
        lambda q, c, m, **k: mac_loss(q, c, m, tau_norm=0.03, tau_hard=0.018, relative=True, **k),
        {"tau_norm": 0.03, "tau_hard": 0.018, "relative": True},
    ),
    "mamcl": (
        lambda q, c, m, **k: mamcl_loss(q, c, m, temperature=0.03, **k),
        {"tau_norm": 0.03, "tau_hard": 0.03, "same_modality_only": True},
    ),
}  # fmt: skip
WIDTHS = (4, 9)
MASKS = [
    (),
    ("valid",),
    ("document",),
    ("negatives",),
    ("mask_margin",),
    ("valid", "document", "negatives", "mask_margin"),
]


def ours(pairs, loss, masks, layout=None, widths=()):
    """The loss as a function of queries and candidates."""
    given = {name: jnp.asarray(pairs[name]) for name in masks if name in ("valid", "document")}
    if "mask_margin" in masks:
        given["mask_margin"] = pairs["mask_margin"]
    further = []
    if "negatives" in masks:
        negatives, modality, document, valid = pairs["negatives"]
        further.append(jnp.asarray(negatives, jnp.float32))
        metadata = (
            jnp.asarray(modality),
            jnp.asarray(document) if "document" in masks else None,
            jnp.asarray(valid),
        )
    if layout is not None:
        given["layout"] = layout
    kinds = jnp.asarray(pairs["modality"])

    def of_width(q, c, *further):
        negatives = {"negatives": Negatives(*further, *metadata)} if further else {}
        return LOSSES[loss][0](q, c, kinds, **given, **negatives)

    return lambda q, c: matryoshka(of_width, (q, c, *further), widths)[0]


def theirs(pairs, loss, masks, widths=()):
    given = {name: pairs[name] for name in masks}

    def of_width(q, c, width):
        if "negatives" in masks:
            negatives, *metadata = pairs["negatives"]
            given["negatives"] = (first(negatives, width), *metadata)
        return reference.contrastive(
            first(q, width), first(c, width), modality=pairs["modality"], **LOSSES[loss][1], **given
        )

    return lambda q, c: sum(of_width(q, c, width) for width in (D, *widths))


def first(x, width):
    """The whole vectors as they are, or their first values, scaled to length 1."""
    if width == D:
        return x
    return x[:, :width] / np.linalg.norm(x[:, :width], axis=1, keepdims=True)


def vectors(pairs):
    return (jnp.asarray(pairs[name], jnp.float32) for name in ("queries", "candidates"))


@pytest.mark.parametrize(
    ("masks", "widths"), [*((masks, ()) for masks in MASKS), ((), WIDTHS), (MASKS[-1], WIDTHS)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_equal_the_formula(pairs, loss, masks, widths):
    # What the float32 loss sees, in float64: the formula is compared, not the rounding of inputs.
    q, c = (np.asarray(x, np.float64) for x in vectors(pairs))
    formula = theirs(pairs, loss, masks, widths)
    function = ours(pairs, loss, masks, widths=widths)
    value, gradients = jax.value_and_grad(function, (0, 1))(*vectors(pairs))
    np.testing.assert_allclose(value, formula(q, c), rtol=0, atol=1e-6 * max(1, abs(formula(q, c))))
    rng = np.random.default_rng(1)
    for _ in range(3):
        dq, dc = rng.normal(size=q.shape), rng.normal(size=c.shape)
        h = 1e-6
        slope = (formula(q + h * dq, c + h * dc) - formula(q - h * dq, c - h * dc)) / (2 * h)
        along = sum(
            (np.asarray(g, np.float64) * d).sum() for g, d in zip(gradients, (dq, dc), strict=True)
        )
        np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative", [True, False])
def test_equal_temperatures_are_info_nce_to_the_last_bit(pairs, relative):
    q, c = vectors(pairs)
    mac = mac_loss(q, c, jnp.asarray(pairs["modality"]), tau_norm=0.05, tau_hard=0.05)
    assert float(mac) == float(info_nce(q, c, temperature=0.05))
    if relative:
        again = mac_loss(
            q, c, jnp.asarray(pairs["modality"]), tau_norm=0.05, tau_hard=0.05, relative=True
        )
        np.testing.assert_allclose(again, mac, rtol=0, atol=1e-6)


def test_one_modality_is_info_nce_at_the_hard_temperature(pairs):
    q, c = vectors(pairs)
    mac = mac_loss(q, c, jnp.full(N, 2), tau_norm=0.03, tau_hard=0.018)
    assert float(mac) == float(info_nce(q, c, temperature=0.018))


def test_an_equally_similar_negative_of_another_modality_weighs_only_in_the_relative_form():
    q = jnp.eye(2, 4)
    c = jnp.array([[0.8, 0.6, 0, 0], [0.8, 0.6, 0, 0]])
    modality = jnp.array([0, 1])

    def pull(relative):
        def loss(c):
            return mac_loss(q, c, modality, tau_norm=0.03, tau_hard=0.018, relative=relative)

        return abs(float(jax.grad(loss)(c)[1, 0]))

    assert pull(True) > 100 * pull(False)


def value_and_gradient(pairs, loss, masks, widths, layout=None):
    return jax.jit(jax.value_and_grad(ours(pairs, loss, masks, layout, widths), (0, 1)))(
        *vectors(pairs)
    )


@pytest.fixture(scope="module")
def dense(pairs):
    """Losses and gradients of whole batches, each computed once."""
    return functools.cache(functools.partial(value_and_gradient, pairs))


@pytest.mark.parametrize(("masks", "widths"), [((), ()), (MASKS[-1], ()), (MASKS[-1], WIDTHS)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("rows", "devices"), [(8, None), (None, (8, 1)), (3, (4, 2)), (6, (2, 4))])
def test_rows_and_devices_change_nothing(pairs, dense, loss, masks, widths, rows, devices):
    mesh = None
    if devices:
        mesh = Mesh(np.array(jax.devices()).reshape(devices), ("data", "fsdp"))
    layout = Layout(rows, mesh, ("data", "fsdp"))
    spread = value_and_gradient(pairs, loss, masks, widths, layout)
    whole = dense(loss, masks, widths)
    np.testing.assert_allclose(spread[0], whole[0], rtol=1e-6 * bool(widths), atol=1e-6)
    for a, b in zip(spread[1], whole[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()) + 1e-7)


def test_chunks_of_rows_hold_one_chunk_of_scores():
    def memory(layout):
        x = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
        loss = jax.jit(jax.grad(lambda q, c: info_nce(q, c, temperature=0.05, layout=layout)))
        return loss.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert memory(Layout(chunk_size=256)) < memory(Layout()) / 5


def test_rows_that_do_not_divide_are_refused(pairs):
    q, c = vectors(pairs)
    with pytest.raises(ConfigError, match="48 queries of a device do not divide into chunks of 5"):
        info_nce(q, c, temperature=0.05, layout=Layout(chunk_size=5))


def test_the_sum_over_widths_says_what_each_is_and_survives_a_zero_prefix(pairs):
    def loss(q, c):
        return info_nce(q, c, temperature=0.05)

    q, c = vectors(pairs)
    total, narrow = matryoshka(loss, (q, c), WIDTHS)
    assert narrow.keys() == {*WIDTHS}
    np.testing.assert_allclose(total, loss(q, c) + sum(narrow.values()), rtol=1e-6)
    assert matryoshka(loss, (q, c), ())[0] == loss(q, c)
    zero = q.at[3, :4].set(0)
    gradient = jax.grad(lambda q: matryoshka(loss, (q, c), WIDTHS)[0])(zero)
    assert np.isfinite(gradient).all()


def test_without_a_valid_pair_loss_and_gradient_are_zero(pairs):
    q, c = vectors(pairs)
    value, gradient = jax.value_and_grad(
        lambda q: info_nce(q, c, temperature=0.05, valid=jnp.zeros(N, bool))
    )(q)
    assert float(value) == 0
    assert float(jnp.abs(gradient).max()) == 0


def test_the_hard_temperature_falls_until_half_time():
    falling = [float(hard_temperature(t, 0.03, 0.5)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    expected = [0.03 * np.exp(-0.5 * 2 * min(0.5, t)) for t in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(falling, expected, rtol=1e-6)
    assert round(falling[-1], 3) == 0.018


def test_a_learnable_temperature_has_a_gradient_and_a_floor(pairs):
    q, c = vectors(pairs)
    slope = jax.grad(lambda s: info_nce(q, c, temperature=learnable_temperature(s)))(
        jnp.log(1 / 0.07)
    )
    assert abs(float(slope)) > 1e-3
    np.testing.assert_allclose(learnable_temperature(jnp.log(1 / 0.07)), 0.07, rtol=1e-6)
    assert float(learnable_temperature(jnp.array(9.0))) == pytest.approx(0.01)


def test_distillation_is_the_mean_square_of_differences_and_leaves_the_teacher_alone():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 5)).astype(np.float32)
    valid = np.array([1, 1, 0, 1, 0, 1], bool)
    squared = (student.astype(np.float64) - teacher) ** 2
    np.testing.assert_allclose(
        distill_loss(jnp.array(student), jnp.array(teacher)), squared.mean(), rtol=1e-6
    )
    masked = distill_loss(jnp.array(student), jnp.array(teacher), valid=jnp.array(valid))
    np.testing.assert_allclose(masked, squared[valid].mean(), rtol=1e-6)
    gradients = jax.grad(distill_loss, (0, 1))(jnp.array(student), jnp.array(teacher))
    np.testing.assert_allclose(gradients[0], 2 * (student - teacher) / 30, rtol=1e-5, atol=1e-8)
    assert not np.asarray(gradients[1]).any()


@pytest.mark.parametrize("loss", ["mac", "mamcl"])
def test_negatives_without_a_modality_are_refused(pairs, loss):
    queries, candidates = vectors(pairs)
    negatives = Negatives(jnp.asarray(pairs["negatives"][0], jnp.float32))
    with pytest.raises(ConfigError, match="negatives have no modality"):
        LOSSES[loss][0](queries, candidates, jnp.asarray(pairs["modality"]), negatives=negatives)
