"""Spaces and observations of adapters: short forms of gymnax's spaces, grids as one-hot."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from purejaxppo.envs.gymnax import import_gymnax
from purejaxppo.masks import ACTION_MASK


def box(shape: Any, low: Any = -jnp.inf, high: Any = jnp.inf, dtype: Any = jnp.float32) -> Any:
    return _spaces().Box(low, high, tuple(shape), dtype)


def discrete(n: Any) -> Any:
    return _spaces().Discrete(int(n))


def masked(observation: Any, num_flags: int) -> Any:
    """An observation, or a dictionary of them, with a mask of actions."""
    parts = observation if isinstance(observation, dict) else {"observation": observation}
    return _spaces().Dict({**parts, ACTION_MASK: box((num_flags,), 0, 1, jnp.bool_)})


def one_hot_grid(grid: Array, sizes: tuple[int, ...]) -> Array:
    """A grid of categories `[H, W, K]` as `[H, W, C]`, where `sizes` are the numbers of categories,
    and C is their sum."""
    parts = [jax.nn.one_hot(grid[..., i], n, dtype=jnp.float32) for i, n in enumerate(sizes)]
    return jnp.concatenate(parts, axis=-1)


def _spaces() -> Any:
    return import_gymnax().environments.spaces
