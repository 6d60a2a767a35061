"""Distillation of scores against its formula in float64, its gradient against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.losses import score_distill_loss
from tests.losses import reference

N, M, D = 12, 5, 8
TAUS = {"temperature": 0.05, "teacher_temperature": 0.4}


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(N, D)), rng.normal(size=(N, M, D))
    teacher = rng.normal(size=(N, M)).astype(np.float32)
    teacher[rng.random((N, M)) > 0.8] = np.nan
    valid = rng.random((N, M)) > 0.1
    # A query without an answer, one without negatives, one without anything, one with everything.
    teacher[0, 0], teacher[1, 1:], valid[2], valid[3], teacher[3] = np.nan, np.nan, False, True, 1.0
    vectors = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, documents))
    return *(x.astype(np.float32) for x in vectors), teacher, valid


def test_loss_and_gradients_equal_the_formula(given):
    queries, documents, teacher, valid = given

    def loss(queries, documents):
        known = jnp.asarray(teacher), jnp.asarray(valid)
        return score_distill_loss(queries, documents, known[0], valid=known[1], **TAUS)

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*map(jnp.asarray, given[:2]))

    def formula(queries, documents):
        exact = teacher.astype(np.float64)
        return reference.score_distillation(queries, documents, exact, valid=valid, **TAUS)

    exact = queries.astype(np.float64), documents.astype(np.float64)
    np.testing.assert_allclose(value, formula(*exact), rtol=1e-6)
    rng = np.random.default_rng(1)
    for number in (0, 1):
        direction = rng.normal(size=exact[number].shape)

        def along(step, number=number, direction=direction):
            moved = list(exact)
            moved[number] = moved[number] + step * direction
            return formula(*moved)

        slope = (along(1e-6) - along(-1e-6)) / 2e-6
        np.testing.assert_allclose(np.sum(gradients[number] * direction), slope, rtol=1e-4)
        assert not np.asarray(gradients[number])[:3].any()  # these queries do not count


def test_without_a_query_that_counts_loss_and_gradient_are_zero(given):
    queries, documents, teacher, _ = map(jnp.asarray, given)
    nothing = jnp.full_like(teacher, jnp.nan)
    found = jax.value_and_grad(score_distill_loss, (0, 1))(queries, documents, nothing, **TAUS)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found))


def test_the_teachers_own_scores_are_the_minimum_which_is_their_entropy(given):
    queries, documents, _, _ = map(jnp.asarray, given)
    own = jnp.einsum("nd,nmd->nm", queries, documents)
    same = {"temperature": 0.1, "teacher_temperature": 0.1}
    value, gradient = jax.value_and_grad(score_distill_loss)(queries, documents, own, **same)
    shares = np.asarray(jax.nn.softmax(own / 0.1), np.float64)
    np.testing.assert_allclose(value, -np.sum(shares * np.log(shares)) / N, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
