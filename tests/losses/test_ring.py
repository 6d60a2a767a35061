"""The ring: the loss and the gradients of the other layouts, in memory of one device's share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.axes import BATCH_AXES
from puma_jax.losses import (
    DENSE,
    Layout,
    Negatives,
    info_nce,
    learnable_temperature,
    mac_loss,
    mamcl_loss,
    matryoshka,
)
from puma_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from tests.losses import reference

# Seven pairs and three negatives a device: tiles of four divide neither them nor all ten keys.
N, D, H, TILE = 56, 16, 24, 4
MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 1)]
TAUS = np.array([0.05, 0.03], np.float32)
LOSSES = {
    "info_nce": lambda q, c, m, taus, **k: info_nce(q, c, temperature=taus[0], **k),
    "mac": lambda q, c, m, taus, **k: mac_loss(q, c, m, tau_norm=taus[0], tau_hard=taus[1], **k),
    "relative mac": lambda q, c, m, taus, **k: mac_loss(
        q, c, m, tau_norm=taus[0], tau_hard=taus[1], relative=True, **k
    ),
    "mamcl": lambda q, c, m, taus, **k: mamcl_loss(q, c, m, temperature=taus[0], **k),
}
PLAIN = ()
ALL = ("valid", "document", "negatives", "mask_margin")


def units(rng, n):
    x = rng.normal(size=(n, D))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    queries = units(rng, N)
    candidates = queries + 0.7 * units(rng, N)
    valid = rng.random(N) > 0.3
    # Not one pair of the first device counts, and all of the last one's do.
    valid[:7], valid[-7:] = False, True
    return {
        "vectors": (
            queries,
            candidates / jnp.linalg.norm(candidates, axis=1, keepdims=True),
            units(rng, H),
        ),
        "modality": rng.integers(0, 3, N),
        "valid": valid,
        "document": rng.integers(0, 30, N),
        "labels": (rng.integers(0, 3, H), rng.integers(0, 40, H), rng.random(H) > 0.3),
    }


def of(batch, loss, masks, layout, widths=()):
    """The loss as a function of queries, candidates, negatives and temperatures."""
    given = {name: jnp.asarray(batch[name]) for name in masks if name in ("valid", "document")}
    if "mask_margin" in masks:
        given["mask_margin"] = -0.55  # leaves out a few of all negatives here
    modality, document, valid = map(jnp.asarray, batch["labels"])

    def function(queries, candidates, negatives, taus):
        kinds = jnp.asarray(batch["modality"])

        def of_width(queries, candidates, negatives):
            further = None
            if "negatives" in masks:
                further = Negatives(negatives, modality, document, valid)
            return LOSSES[loss](
                queries, candidates, kinds, taus, negatives=further, layout=layout, **given
            )

        return matryoshka(of_width, (queries, candidates, negatives), widths)[0]

    return function


def layout(axes, cross_device="ring", chunk_size=TILE):
    devices = jax.devices()[: np.prod(axes)]
    return Layout(chunk_size, make_mesh(MeshConfig(*axes), devices), BATCH_AXES, cross_device)


def value_and_gradients(function, vectors, taus=TAUS):
    return jax.jit(jax.value_and_grad(function, (0, 1, 2, 3)))(*vectors, taus)


def assert_same(found, expected, message="", tolerance=3e-6):
    """Equal in value and in every gradient, to what float32 leaves of logits of 30 and more."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        atol = tolerance * float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=message)


@pytest.mark.parametrize(("masks", "widths"), [(ALL, ()), (PLAIN, ()), (ALL, (5, 8))])
@pytest.mark.parametrize("loss", LOSSES)
def test_ring_and_gather_and_dense_have_one_loss_and_one_gradient(batch, loss, masks, widths):
    def by(how):
        return value_and_gradients(of(batch, loss, masks, how, widths), batch["vectors"])

    dense = by(DENSE)
    assert_same(by(layout((4, 2, 1), "gather", 7)), dense)
    for axes in MESHES if masks == ALL and not widths else [(4, 2, 1)]:
        assert_same(by(layout(axes)), dense, str(axes))


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_of_the_temperature_are_those_of_the_formula(batch, loss):
    queries, candidates, negatives = (np.asarray(x, np.float64) for x in batch["vectors"])

    def formula(taus):
        norm, hard = taus
        return reference.contrastive(
            queries,
            candidates,
            modality=batch["modality"],
            tau_norm=norm,
            tau_hard=hard if "mac" in loss else norm,
            relative=loss == "relative mac",
            same_modality_only=loss == "mamcl",
            valid=batch["valid"],
            document=batch["document"],
            negatives=(negatives, *batch["labels"]),
        )

    masks = ("valid", "document", "negatives")
    value, gradients = value_and_gradients(
        of(batch, loss, masks, layout((4, 2, 1))), batch["vectors"]
    )
    taus = np.asarray(TAUS, np.float64)
    np.testing.assert_allclose(value, formula(taus), rtol=5e-6)
    steps = 1e-6 * np.diag(taus)
    slopes = [(formula(taus + h) - formula(taus - h)) / (2 * h.max()) for h in steps]
    np.testing.assert_allclose(gradients[3], slopes, rtol=0, atol=1e-5 * np.abs(slopes).max())


@pytest.mark.parametrize("axes", [None, (8, 1, 1)], ids=["dense", "ring"])
def test_a_loss_near_zero_keeps_its_digits(batch, axes):
    """Where log Σ exp(logit) − own logit is the difference of two numbers of 33."""
    queries = batch["vectors"][0]
    how = DENSE if axes is None else layout(axes)
    loss = info_nce(queries, queries, temperature=0.03, layout=how)
    exact = np.asarray(queries, np.float64)
    expected = reference.contrastive(
        exact, exact, modality=np.zeros(N), tau_norm=0.03, tau_hard=0.03
    )
    assert 0 < expected < 1e-3
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_scores_that_overflow_without_a_running_maximum_are_exact(batch):
    queries, _, negatives = batch["vectors"]
    # Every positive is the worst key there is, and the best one a hundred temperatures better.
    worst, taus = (queries, -queries, negatives), jnp.array([0.01, 0.01])
    dense = value_and_gradients(of(batch, "info_nce", PLAIN, DENSE), worst, taus)
    assert dense[0] > 100
    ring = value_and_gradients(of(batch, "info_nce", PLAIN, layout((8, 1, 1))), worst, taus)
    assert_same(ring, dense)


@pytest.mark.parametrize(
    ("loss", "change"),
    [("mamcl", {"modality": np.arange(N)}), ("info_nce", {"valid": np.zeros(N, bool)})],
)
def test_without_a_negative_or_a_valid_pair_loss_and_gradient_are_zero(batch, loss, change):
    function = of(batch | change, loss, ("valid",), layout((8, 1, 1)))
    for leaf in jax.tree.leaves(value_and_gradients(function, batch["vectors"])):
        assert not np.asarray(leaf).any()


def test_the_ring_is_a_part_of_a_larger_function(batch):
    """A layer and a trained temperature beneath the loss, something else beside it."""
    mesh = make_mesh(MeshConfig(4, 2, 1))

    def function(how):
        def whole(params, vectors):
            mapped = [x @ params["layer"] for x in vectors]
            mapped = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in mapped]
            taus = learnable_temperature(params["log_scale"]) * jnp.array([1.0, 0.6])
            loss = of(batch, "mac", ALL, how)(*mapped, taus)
            return 0.9 * loss + 0.1 * jnp.mean(mapped[0] ** 4), taus

        return jax.jit(jax.value_and_grad(whole, has_aux=True))

    layer = jnp.eye(D) + 0.1 * jax.random.normal(jax.random.key(0), (D, D))
    params = {"layer": layer, "log_scale": jnp.log(1 / 0.05)}
    expected = function(DENSE)(params, batch["vectors"])
    found = function(layout((4, 2, 1)))(
        params, jax.device_put(batch["vectors"], batch_sharding(mesh))
    )
    assert_same(found, expected)


def test_gradients_of_bfloat16_vectors_are_rounded_once(batch):
    rounded = [x.astype(jnp.bfloat16) for x in batch["vectors"]]
    exact = value_and_gradients(
        of(batch, "mac", ALL, DENSE), [x.astype(jnp.float32) for x in rounded]
    )
    found = value_and_gradients(of(batch, "mac", ALL, layout((8, 1, 1))), rounded)
    np.testing.assert_allclose(found[0], exact[0], rtol=3e-6)
    negatives, of_negatives = found[1][2], exact[1][2]
    assert negatives.dtype == jnp.bfloat16
    # Half of the last of eight bits. Queries and candidates have a second gradient, that of the
    # positives' scores, rounded by itself.
    np.testing.assert_allclose(
        negatives.astype(jnp.float32),
        of_negatives,
        rtol=2**-8,
        atol=3e-6 * float(jnp.abs(of_negatives).max()),
    )


def test_a_device_needs_no_more_than_10_mib_for_8192_pairs_of_width_256():
    """Where one copy of all candidates takes 8 MiB, and a device's share of the scores 32."""
    how = layout((4, 2, 1), chunk_size=256)
    share = batch_sharding(how.mesh)
    vectors = jax.ShapeDtypeStruct((8192, 256), jnp.float32, sharding=share)
    label = jax.ShapeDtypeStruct((8192,), jnp.int32, sharding=share)
    taus = jax.ShapeDtypeStruct((2,), jnp.float32)

    def loss(queries, candidates, taus, modality, document):
        return LOSSES["mac"](queries, candidates, modality, taus, document=document, layout=how)

    compiled = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        .lower(vectors, vectors, taus, label, label)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes <= 10 * 2**20
