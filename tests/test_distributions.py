"""Each policy's samples, log-probabilities and entropies against enumeration, numerical
integration and distrax's own samplers."""

from itertools import pairwise

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from gymnax.environments import spaces

import purejaxppo as ppo
from purejaxppo.distributions import draw_noise, make_policy

LOW, HIGH = -2.0, 6.0


def policy_for(space: object, **settings: object):
    return make_policy(ppo.Config(**settings), space)


def box(n: int) -> spaces.Box:
    return spaces.Box(LOW, HIGH, (n,))


def test_categorical_samples_match_its_probabilities():
    policy = policy_for(spaces.Discrete(4))
    logits = jnp.array([0.0, 1.0, -1.0, 2.0])
    noise = draw_noise(policy, jax.random.split(jax.random.key(0), 40_000))
    counts = np.bincount(policy.sample(logits, noise), minlength=4)
    expected = np.asarray(distrax.Categorical(logits=logits).probs)
    error = np.sqrt(expected * (1 - expected) / 40_000)
    np.testing.assert_array_less(np.abs(counts / 40_000 - expected), 4 * error)


def test_multi_categorical_is_the_sum_of_its_parts():
    policy = policy_for(ppo.MultiDiscrete((3, 2)))
    outputs = jnp.array([0.5, -1.0, 0.0, 1.0, -1.0])
    distribution = policy.distribution(outputs)
    first, second = (np.asarray(jax.nn.softmax(part)) for part in (outputs[:3], outputs[3:]))
    table = np.outer(first, second)
    actions = jnp.array([[i, j] for i in range(3) for j in range(2)])
    log_probs = policy.distribution(jnp.tile(outputs, (6, 1))).log_prob(actions)
    np.testing.assert_allclose(np.exp(log_probs), table.ravel(), rtol=1e-5)
    assert distribution.entropy() == pytest.approx(-(table * np.log(table)).sum(), rel=1e-5)
    np.testing.assert_array_equal(distribution.mode(), [0, 0])
    noise = draw_noise(policy, jax.random.split(jax.random.key(1), 20_000))
    sampled = np.asarray(policy.sample(outputs, noise))
    share = np.mean((sampled == [2, 1]).all(axis=1))
    assert abs(share - table[2, 1]) < 4 * np.sqrt(table[2, 1] / 20_000)


def test_out_of_range_actions_are_clipped_for_the_environment_only():
    policy = policy_for(box(2))
    outputs = jnp.array([5.5, 0.0, 0.0, np.log(3.0)])
    action = policy.sample(outputs, jnp.array([2.0, -1.0]))
    np.testing.assert_allclose(action, [7.5, -3.0])
    np.testing.assert_allclose(policy.to_env(action), [6.0, -2.0])
    x, mean, std = np.array([7.5, -3.0]), np.array([5.5, 0.0]), np.array([1.0, 3.0])
    expected = np.sum(-0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi)))
    assert policy.distribution(outputs).log_prob(action) == pytest.approx(expected, rel=1e-6)


def test_tanh_normal_is_a_density_over_the_action_space():
    """Over the actions it integrates to 1, and its mean negative logarithm is the entropy."""
    policy = policy_for(box(1), action_distribution="tanh_normal")
    for mean, std in [(0.0, 0.5), (0.7, 0.3), (-0.5, 1.0)]:
        outputs = jnp.array([mean, np.log(std)])
        edges = np.linspace(LOW, HIGH, 200_001)
        actions = (edges[1:] + edges[:-1]) / 2
        inner = np.arctanh((actions - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2))[:, None]
        distribution = policy.distribution(jnp.tile(outputs, (len(actions), 1)))
        log_prob = np.asarray(distribution.log_prob(jnp.asarray(inner, jnp.float32)), np.float64)
        width = (HIGH - LOW) / 200_000
        assert np.sum(np.exp(log_prob)) * width == pytest.approx(1.0, abs=1e-4)
        entropy = -np.sum(np.exp(log_prob) * log_prob) * width
        assert policy.distribution(outputs).entropy() == pytest.approx(entropy, abs=1e-3)


def entropy_by_integration(mean: float, log_std: float) -> float:
    """Entropy of 4 tanh(u): H(u) + log 4 + E[log(1 - tanh(u)^2)], split at the kink of |u|."""
    std = np.exp(log_std)

    def integrand(u: float) -> float:
        density = np.exp(-(((u - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
        return 2 * (np.log(2) - np.logaddexp(u, -u)) * density

    edges = sorted({mean + std * z for z in np.linspace(-9, 9, 19)} | {0.0, -3.0, 3.0})
    slope = sum(scipy.integrate.quad(integrand, a, b, epsabs=1e-12)[0] for a, b in pairwise(edges))
    return 0.5 * np.log(2 * np.pi * np.e) + log_std + np.log(4.0) + slope


def test_entropy_of_tanh_normal_and_its_gradient_at_every_scale():
    """Against integration, differentiated by central differences."""
    policy, step = policy_for(box(1), action_distribution="tanh_normal"), 1e-4
    entropy = jax.jit(jax.value_and_grad(lambda x: policy.distribution(x).entropy()))
    for log_std in (3.0, 2.0, 1.0, 0.0, -0.5, -2.0, -5.0, 4.0):
        for mean in (0.0, 0.3, -1.0, 5.0):
            found, gradient = entropy(jnp.array([mean, log_std]))
            assert found == pytest.approx(entropy_by_integration(mean, log_std), abs=1e-5)
            for at, (dm, ds) in zip(gradient, [(step, 0), (0, step)], strict=True):
                above = entropy_by_integration(mean + dm, log_std + ds)
                below = entropy_by_integration(mean - dm, log_std - ds)
                assert at == pytest.approx((above - below) / (2 * step), abs=1e-4)


def test_tanh_normal_stays_finite_at_the_bounds():
    policy = policy_for(box(1), action_distribution="tanh_normal")
    outputs, action = jnp.array([0.0, 0.0]), jnp.array([30.0])
    assert policy.to_env(action)[0] == HIGH
    gradient = jax.grad(lambda o: policy.distribution(o).log_prob(action))(outputs)
    assert np.isfinite(policy.distribution(outputs).log_prob(action))
    assert np.isfinite(gradient).all()


def test_actions_have_the_shape_of_the_space():
    space = spaces.Box(-1.0, 1.0, (2, 3))
    for kind in ("normal", "tanh_normal"):
        policy = policy_for(space, action_distribution=kind)
        assert policy.to_env(jnp.zeros((5, 6))).shape == (5, 2, 3)


@pytest.mark.parametrize(
    ("space", "kind", "words"),
    [
        (spaces.Discrete(3), "tanh_normal", "use auto"),
        (spaces.Box(-np.inf, np.inf, (1,)), "tanh_normal", "finite bounds"),
        (spaces.Box(-3.4e38, 3.4e38, (1,)), "tanh_normal", "finite bounds"),
        (spaces.Box(0, 5, (1,), jnp.int32), "auto", "not supported"),
        (spaces.Tuple([spaces.Discrete(2)]), "auto", "not supported"),
    ],
)
def test_unsupported_spaces_are_refused(space: object, kind: str, words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        policy_for(space, action_distribution=kind)
