"""Short forms of gymnax's spaces, for adapters."""

from typing import Any

import jax.numpy as jnp

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


def _spaces() -> Any:
    return import_gymnax().environments.spaces
