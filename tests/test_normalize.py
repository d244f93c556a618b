"""Running statistics against NumPy over all samples at once, and normalisation by them."""

import jax.numpy as jnp
import numpy as np

from purejaxppo.normalize import (
    discounted_returns,
    init_stats,
    normalize_obs,
    reward_scale,
    scale_reward,
    update_stats,
)


def test_moments_over_batches_equal_those_of_all_samples():
    rng = np.random.default_rng(0)
    batches = [rng.normal(1000, [1, 2, 3], (n, 4, 3)).astype(np.float32) for n in (1, 5, 30)]
    masks = [(rng.random(b.shape[:2]) < 0.7).astype(np.float32) for b in batches]
    stats = init_stats((3,))
    for batch, mask in zip(batches, masks, strict=True):
        stats = update_stats(stats, jnp.asarray(batch), jnp.asarray(mask))
    kept = np.concatenate([b[m > 0] for b, m in zip(batches, masks, strict=True)])
    assert stats.total == len(kept)
    np.testing.assert_allclose(stats.mean, kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, kept.var(0, dtype=np.float64), rtol=1e-3)


def test_a_fully_masked_batch_changes_nothing():
    stats = update_stats(init_stats((2,)), jnp.ones((3, 2, 2)) * 7, jnp.zeros((3, 2)))
    np.testing.assert_array_equal(stats.mean, [0, 0])
    np.testing.assert_array_equal(stats.var, [1, 1])


def test_initial_statistics_only_clip_and_empty_ones_change_nothing():
    obs = jnp.array([[0.5, -3.0], [99.0, -99.0]])
    np.testing.assert_allclose(normalize_obs(init_stats((2,)), obs), [[0.5, -3.0], [10, -10]])
    np.testing.assert_array_equal(normalize_obs((), obs), obs)


def test_the_running_return_is_reset_after_a_done_step():
    """By hand, gamma = 1/2. The reward of the last step belongs to the episode that ends."""
    reward = jnp.array([[1.0], [2.0], [4.0], [8.0]])
    done = jnp.array([[False], [True], [False], [False]])
    running, returns = discounted_returns(jnp.array([6.0]), reward, done, 0.5)
    np.testing.assert_allclose(returns[:, 0], [4.0, 4.0, 4.0, 10.0])
    np.testing.assert_allclose(running, [10.0])


def test_rewards_are_scaled_by_the_standard_deviation_and_not_shifted():
    stats = init_stats(())._replace(total=jnp.float32(9), mean=jnp.float32(50), var=jnp.float32(4))
    reward = jnp.array([[0.0, 2.0, -1000.0]])
    np.testing.assert_allclose(scale_reward(stats, reward), [[0.0, 1.0, -10.0]], rtol=1e-6)
    np.testing.assert_allclose(reward_scale(stats), 2.0)
    np.testing.assert_array_equal(scale_reward((), reward), reward)
