"""Random orders: that they are orders, and random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.shuffle import random_order

DRAWS = 1000


def orders(n: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(jax.jit(jax.vmap(lambda key: random_order(key, n)))(keys))


@pytest.mark.parametrize("n", [1, 100, 256, 257, 1000])
def test_each_is_a_permutation_and_keys_give_different_ones(n: int):
    drawn = orders(n)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(n), (DRAWS, 1)))
    assert len(np.unique(drawn, axis=0)) >= min(n, DRAWS)


@pytest.mark.parametrize("n", [256, 300, 1000])
def test_they_are_as_uniform_as_chance_allows(n: int):
    """Against what uniformly random permutations give, each within about 4 deviations: where a
    number lands (chi-squared), what follows it, how many stay, how far the order is kept."""
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


def test_a_minibatch_is_a_random_sample():
    """How many of the first half of the batch land in the first of 4 minibatches is spread as
    drawing without replacement spreads it, with variance n/4 * 1/4 * (3n/4) / (n - 1)."""
    n = 512
    in_first = np.sum(orders(n)[:, : n // 4] < n // 2, axis=1)
    expected = n / 4 / 4 * (3 * n / 4) / (n - 1)
    assert np.mean(in_first) == pytest.approx(n / 8, abs=4 * np.sqrt(expected / DRAWS))
    assert np.var(in_first) == pytest.approx(expected, rel=4 * np.sqrt(2 / DRAWS))


def test_it_has_no_sort():
    hlo = jax.jit(lambda key: random_order(key, 512)).lower(jax.random.key(0)).as_text()
    assert "sort" not in hlo
    assert jnp.issubdtype(random_order(jax.random.key(0), 512).dtype, jnp.int32)
