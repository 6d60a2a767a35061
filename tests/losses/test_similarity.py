"""Distillation of similarities against its formula in float64, its gradient against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from puma_jax.losses import Layout, similarity_distill_loss
from tests.losses import reference

N, D, TAU = 48, 8, 0.05


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, N, D))
    vectors = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher)]
    return *(x.astype(np.float32) for x in vectors), rng.random(N) > 0.2


def ours(given, layout=None):
    _, teacher, valid = map(jnp.asarray, given)
    how = {} if layout is None else {"layout": layout}

    def loss(student):
        pairs = ((student[side], teacher[side]) for side in (0, 1))
        return similarity_distill_loss(*pairs, temperature=TAU, valid=valid, **how)

    return jax.jit(jax.value_and_grad(loss))(jnp.asarray(given[0]))


def test_loss_and_gradient_equal_the_formula(given):
    student, teacher, valid = given
    value, gradient = ours(given)

    def formula(student):
        pairs = ((student[side], teacher[side].astype(np.float64)) for side in (0, 1))
        return reference.similarity_distillation(*pairs, temperature=TAU, valid=valid)

    exact = student.astype(np.float64)
    np.testing.assert_allclose(value, formula(exact), rtol=1e-6)
    direction = np.random.default_rng(1).normal(size=exact.shape)
    slope = (formula(exact + 1e-6 * direction) - formula(exact - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-5)
    assert not np.asarray(gradient)[:, ~valid].any()


@pytest.mark.parametrize(("rows", "devices"), [(8, None), (None, (8, 1)), (3, (2, 4))])
def test_rows_and_devices_change_nothing(given, rows, devices):
    mesh = devices and Mesh(np.array(jax.devices()).reshape(devices), ("data", "fsdp"))
    value, gradient = ours(given)
    spread = ours(given, Layout(rows, mesh, ("data", "fsdp")))
    np.testing.assert_allclose(spread[0], value, rtol=1e-6)
    np.testing.assert_allclose(spread[1], gradient, rtol=0, atol=1e-6 * float(abs(gradient).max()))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(given):
    student, _, valid = given
    value, gradient = ours((student, student, valid))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_without_a_valid_pair_loss_and_gradient_are_zero(given):
    value, gradient = ours((*given[:2], np.zeros(N, bool)))
    assert value == 0
    assert not np.asarray(gradient).any()
