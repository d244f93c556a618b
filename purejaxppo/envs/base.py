"""Spaces of observations and actions, and checks of environments."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from purejaxppo.config import ConfigError
from purejaxppo.types import Environment, Policy, PyTree


class MultiDiscrete:
    """A space of several independent discrete choices; actions are `[A]` integers.

    Gymnax has no such space; return this one from an environment of your own.
    """

    def __init__(self, num_categories: tuple[int, ...]):
        if not num_categories or any(n < 1 for n in num_categories):
            raise ValueError(
                f"num_categories = {num_categories}: must hold at least one number, each at least 1"
            )
        self.num_categories = tuple(int(n) for n in num_categories)
        self.shape = (len(self.num_categories),)
        self.dtype = jnp.int32

    def sample(self, key: Key[Array, ""]) -> Array:
        """A uniformly random `[A]` action."""
        return jax.random.randint(key, self.shape, 0, jnp.asarray(self.num_categories))

    def contains(self, x: Array) -> Array:
        """Whether `x[A]` lies in the space."""
        return jnp.all((x >= 0) & (x < jnp.asarray(self.num_categories)))

    def __repr__(self) -> str:
        return f"MultiDiscrete({self.num_categories})"


def is_discrete(space: Any) -> bool:
    """Whether `space` is one choice out of `space.n`, of whatever class."""
    return hasattr(space, "n") and getattr(space, "shape", None) == ()


def is_box(space: Any) -> bool:
    """Whether `space` holds arrays of one shape between two bounds, of whatever class."""
    return hasattr(space, "low") and hasattr(space, "high") and hasattr(space, "shape")


def parts_of(space: Any) -> Any:
    """A dictionary or tuple of spaces as a `dict`, with names as in `named_parts`; any other space
    as it is."""
    inner = getattr(space, "spaces", space)
    if isinstance(inner, Sequence) and inner and getattr(space, "shape", None) is None:
        return {str(i): x for i, x in enumerate(inner)}
    return dict(inner) if isinstance(inner, Mapping) else space


def named_parts(obs: PyTree) -> PyTree:
    """An observation with every dataclass, named tuple and mapping in it as a `dict` by name, and
    every other tuple as a `dict` with the names `0`, `1` and so on."""
    if isinstance(obs, Mapping):
        parts = dict(obs)
    elif dataclasses.is_dataclass(obs) and not isinstance(obs, type):
        parts = {f.name: getattr(obs, f.name) for f in dataclasses.fields(obs)}
    elif isinstance(obs, tuple):
        names = getattr(obs, "_fields", None) or map(str, range(len(obs)))
        parts = dict(zip(names, obs, strict=True))
    else:
        return obs
    return {name: named_parts(x) for name, x in parts.items()}


def obs_shapes(space: Any) -> Any:
    """The shapes of an observation's leaves.

    Raises:
        ConfigError: if a space in it has no shape.
    """
    parts = parts_of(space)
    if isinstance(parts, dict):
        return {name: obs_shapes(part) for name, part in parts.items()}
    if not hasattr(parts, "shape"):
        raise ConfigError(
            f"observation space of type {type(space).__name__}: not supported; use a Box, a "
            "Discrete, or a Dict or Tuple of them"
        )
    return tuple(parts.shape)


def split_each(keys: Key[Array, " N"]) -> tuple[Key[Array, " N"], Key[Array, " N"]]:
    """Split each key into two."""
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


def select_rows(condition: Bool[Array, " N"], chosen: PyTree, other: PyTree) -> PyTree:
    """Row n of each leaf `[N, ...]` from `chosen` where `condition[n]`, else from `other`."""

    def select(x: Array, y: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(select, chosen, other)


def check_contract(env: Environment, policy: Policy) -> None:
    """Trace one reset and one step, without running them, and check the results.

    Raises:
        ConfigError: if observations do not fit the observation space, or `step` changes the
            shapes of the state.
    """

    def both(key: Key[Array, ""]) -> Any:
        state, obs = env.reset(key[None])
        policy_outputs = jnp.zeros((1, policy.num_outputs + policy.num_free))
        action = policy.to_env(policy.sample(policy_outputs, policy.noise(key)[None]))
        next_state, result = env.step(key[None], state, action)
        return state, obs, next_state, result

    state, obs, next_state, result = jax.eval_shape(both, jax.random.key(0))
    space = obs_shapes(env.observation_space)
    for method, found in (("reset", obs), ("step", result.final_obs)):
        shape = jax.tree.map(lambda x: tuple(x.shape[1:]), found)
        if shape != space:
            raise ConfigError(
                f"env {env.name}: {method} returns an observation of shape {shape}, but its "
                f"observation space has the shape {space}; make them agree"
            )
    try:
        chex.assert_trees_all_equal_shapes(state, next_state)
    except AssertionError as error:
        raise ConfigError(
            f"env {env.name}: step returns a state with different shapes than reset; make "
            f"them agree: {error}"
        ) from error
