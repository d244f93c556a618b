"""Losses against hand-worked numbers and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.collectives import masked_mean
from purejaxppo.losses import (
    Terms,
    approximate_kl,
    clipped_surrogate,
    standardize,
    value_loss,
)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.0),  # inside the range: -r A
        (1.5, 2.0, -2.4, 0.0),  # above, A > 0: clipped to 1.2 A, no gradient
        (0.5, 2.0, -1.0, -2.0),  # below, A > 0: not clipped
        (1.5, -2.0, 3.0, 2.0),  # above, A < 0: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below, A < 0: clipped to 0.8 A, no gradient
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, loss: float, slope: float):
    def of_ratio(r: jax.Array) -> jax.Array:
        terms = Terms(jnp.log(r) - 1.0, jnp.log(r), jnp.float32(advantage))
        return clipped_surrogate(terms, ppo.HParams(clip_eps=0.2))

    value, gradient = jax.value_and_grad(of_ratio)(jnp.float32(ratio))
    assert value == pytest.approx(loss, abs=1e-6)
    assert gradient == pytest.approx(slope, abs=1e-5)


def test_value_loss_clipped_and_not():
    value, old, target = jnp.array([3.0, 3.0, 0.1]), jnp.zeros(3), jnp.array([2.0, 4.0, 1.0])
    np.testing.assert_allclose(value_loss(value, old, target, None), [0.5, 0.5, 0.405])
    # Clipped to 0.5, 0.5 and 0.1: the larger error counts.
    np.testing.assert_allclose(value_loss(value, old, target, 0.5), [1.125, 6.125, 0.405])
    slope = jax.grad(lambda v: value_loss(v, old, target, 0.5).sum())(value)
    np.testing.assert_allclose(slope, [0.0, 0.0, -0.9], atol=1e-6)


def test_approximate_kl_is_never_negative_and_estimates_the_kl():
    log_ratio = jnp.array([-3.0, -1e-4, 0.0, 1e-4, 3.0])
    expected = np.expm1(np.float64(log_ratio)) - np.float64(log_ratio)
    np.testing.assert_allclose(approximate_kl(log_ratio), expected, rtol=1e-2, atol=1e-10)
    assert approximate_kl(log_ratio)[2] == 0.0
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.4, 0.4, 0.2])
    estimate = np.sum(p * np.asarray(approximate_kl(jnp.log(q / p))))
    assert estimate == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-5)


def test_masked_steps_are_ignored():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(3, 5, (7, 9)).astype(np.float32), rng.random((7, 9)) < 0.6
    weights = jnp.asarray(mask, jnp.float32)
    assert masked_mean(jnp.asarray(values), weights) == pytest.approx(values[mask].mean(), rel=1e-5)
    spoiled = jnp.where(mask, values, 1e6)
    standard = np.asarray(standardize(spoiled, weights))[mask]
    expected = (values[mask] - values[mask].mean()) / values[mask].std()
    np.testing.assert_allclose(standard, expected, atol=1e-4)


@pytest.mark.parametrize("value", [99.343, 0.1, -3.0, 0.0])
def test_equal_advantages_standardise_to_0_despite_rounding(value: float):
    values = jnp.full((1000,), value, jnp.float32)
    np.testing.assert_array_equal(standardize(values, jnp.ones(1000)), 0.0)
