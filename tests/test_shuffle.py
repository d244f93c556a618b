"""Random orders are permutations, and random."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.shuffle import ROUNDS, _feistel, _sides, random_order

DRAWS = 1000


def orders(n: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(jax.jit(jax.vmap(lambda key: random_order(key, n)))(keys))


@pytest.mark.parametrize("n", [1, 100, 256, 257, 652, 1000])
def test_orders_are_permutations_and_differ_between_keys(n: int):
    drawn = orders(n)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(n), (DRAWS, 1)))
    assert len(np.unique(drawn, axis=0)) >= min(n, DRAWS)


@pytest.mark.parametrize("n", [256, 257, 300, 1000])
def test_orders_are_uniformly_random(n: int):
    """Against uniformly random permutations, within about 4 standard deviations: positions
    (chi-squared), successors, fixed points, and correlation with the original order."""
    drawn = orders(n)
    for position in (0, 1, n // 2, n - 1):
        counts = np.histogram(drawn[:, position], bins=10, range=(0, n))[0]
        share = np.histogram(np.arange(n), bins=10, range=(0, n))[0] * DRAWS / n
        assert np.sum((counts - share) ** 2 / share) < 9 + 4 * np.sqrt(18)
    for step in (1, -1, 2):
        followers = np.mean(np.sum(np.diff(drawn, axis=1) == step, axis=1))
        assert followers == pytest.approx(1.0, abs=4 / np.sqrt(DRAWS) + 2 / n)
    fixed = np.mean(np.sum(drawn == np.arange(n), axis=1))
    assert fixed == pytest.approx(1.0, abs=4 / np.sqrt(DRAWS))
    kept = np.mean([np.corrcoef(order, np.arange(n))[0, 1] for order in drawn])
    assert kept == pytest.approx(0.0, abs=4 / np.sqrt(DRAWS * n))


@pytest.mark.parametrize("n", [257, 652])
def test_cycle_walking_equals_walking_each_number_on_its_own(n: int):
    """For 50 orders, which include every case."""
    sides = _sides(-(-n // 8) * 8)
    end = sides[0] * sides[1]
    assert n < end < n + 32
    key = jax.random.key(0)
    through = jax.jit(jax.vmap(lambda k: _feistel(jnp.arange(end, dtype=jnp.uint32), sides, k)))
    keys = jax.random.split(key, 50)
    networks = through(jax.vmap(lambda key: jax.random.bits(key, (ROUNDS,), jnp.uint32))(keys))
    found = jax.jit(jax.vmap(lambda key: random_order(key, n)))(keys)
    walked = 0
    for network, order in zip(np.asarray(networks), np.asarray(found), strict=True):
        np.testing.assert_array_equal(np.sort(network), np.arange(end))
        expected = network[:n]
        while (expected >= n).any():
            walked += np.sum(expected >= n)
            expected = np.where(expected >= n, network[np.minimum(expected, end - 1)], expected)
        np.testing.assert_array_equal(order, expected)
    assert walked > 50


@pytest.mark.parametrize("n", [1025, 131_073, 3 * 2**16, 2**20 + 7])
def test_work_is_little_more_than_n_at_every_size(n: int):
    """Few numbers lie at n or above, and loops run over those only."""
    hlo = jax.jit(lambda key: random_order(key, n)).lower(jax.random.key(0)).as_text()
    loops = [line for line in hlo.splitlines() if "stablehlo.while" in line]
    sizes = [int(size) for line in loops for size in re.findall(r"tensor<(\d+)xui32>", line)]
    assert all(size <= 32 for size in sizes), sizes


def test_a_minibatch_is_a_random_sample():
    """The number of samples of the batch's first half in the first of 4 minibatches has the
    variance of drawing without replacement, n/4 * 1/4 * (3n/4) / (n - 1)."""
    n = 512
    in_first = np.sum(orders(n)[:, : n // 4] < n // 2, axis=1)
    expected = n / 4 / 4 * (3 * n / 4) / (n - 1)
    assert np.mean(in_first) == pytest.approx(n / 8, abs=4 * np.sqrt(expected / DRAWS))
    assert np.var(in_first) == pytest.approx(expected, rel=4 * np.sqrt(2 / DRAWS))


def test_random_order_does_not_sort():
    hlo = jax.jit(lambda key: random_order(key, 512)).lower(jax.random.key(0)).as_text()
    assert "sort" not in hlo
    assert jnp.issubdtype(random_order(jax.random.key(0), 512).dtype, jnp.int32)
