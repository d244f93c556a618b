"""Adapter to gymnax 1.x, and to any object with its interface."""

import functools
import importlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Key

from purejaxppo.config import ConfigError
from purejaxppo.envs.base import reset_on_demand
from purejaxppo.types import Environment, PyTree, TimeStep


class _LazyModule(types.ModuleType):
    """A placeholder for the module of its name, which is imported on first attribute access."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


@functools.cache
def import_gymnax() -> Any:
    """Import gymnax on first use: it starts JAX's backends, after which the number of CPU devices
    is fixed. Its plotting libraries, which take a second to import, are imported when used."""
    delayed = {
        name: _LazyModule(name)
        for name in ("seaborn", "matplotlib.pyplot")
        if name not in sys.modules
    }
    sys.modules.update(delayed)
    try:
        return importlib.import_module("gymnax")
    finally:
        for name in delayed:
            del sys.modules[name]


def from_gymnax(name: str, env: Any, params: Any = None) -> Environment:
    """Make an `Environment` of N copies of a gymnax environment.

    An environment that does not override gymnax's `step` and `reset` is stepped through
    `step_env`, which avoids a reset in each step. Any other object (a wrapper, or a separate
    class) is stepped through its public `step`, which resets itself and returns six values.

    Args:
        params: None uses `env.default_params`.

    Raises:
        ConfigError: if `env` lacks a method of the interface.
    """
    needed = ("reset", "step", "observation_space", "action_space")
    missing = [attribute for attribute in needed if not hasattr(env, attribute)]
    if missing:
        raise ConfigError(
            f"env = {env!r} has no {', '.join(missing)}; an environment needs "
            f"{', '.join(needed)} as in gymnax 1.x"
        )
    if params is None:
        params = getattr(env, "default_params", None)

    obs_like = jax.eval_shape(lambda key: env.reset(key, params)[0], jax.random.key(0))

    def reset_one(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        obs, state = env.reset(key, params)
        return _strong(state), _like(name, "observation", obs, obs_like)

    base = import_gymnax().environments.environment.Environment
    plain = isinstance(env, base) and all(
        getattr(type(env), method) is getattr(base, method) for method in ("step", "reset")
    )
    if plain:
        step = reset_on_demand(reset_one, _inner_step(name, env, params, obs_like))
    else:
        step = jax.vmap(_public_step(name, env, params, obs_like))
    # Inside a trace, jnp would make the bounds tracers, from which no policy can be made.
    with jax.ensure_compile_time_eval():
        observation_space, action_space = env.observation_space(params), env.action_space(params)
    return Environment(
        name=name,
        observation_space=observation_space,
        action_space=action_space,
        max_episode_steps=_time_limit(params),
        reset=jax.vmap(reset_one),
        step=step,
    )


def _time_limit(params: Any) -> Any:
    limit = getattr(params, "max_steps_in_episode", None)
    return limit if limit is None or isinstance(limit, Tracer) else int(limit)


def _strong(tree: PyTree) -> PyTree:
    """Convert leaves to strongly typed arrays: a scan's carry must not change its types."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


def _like(name: str, what: str, new: PyTree, old: PyTree) -> PyTree:
    """Cast `new` to the types of `old`, since some environments' step returns other types than
    their reset (int32 instead of float32).

    Raises:
        ConfigError: if the cast could lose information (float32 to int32).
    """

    def cast(path: Any, x: Any, y: Any) -> Array:
        x = jnp.asarray(x)
        if _loses(x, y.dtype):
            leaf = jax.tree_util.keystr(path)
            raise ConfigError(
                f"env {name}: step returns {x.dtype} but reset returns {y.dtype} as its {what}"
                f"{f' {leaf}' if leaf else ''}, so values are lost; make reset return {x.dtype}"
            )
        return jnp.asarray(x, y.dtype)

    return jax.tree_util.tree_map_with_path(cast, new, old)


def _loses(x: Array, dtype: Any) -> bool:
    """Whether a cast to `dtype` may lose information: floats to integers, either to bools, or to
    fewer bits than 32 unless `x` is weakly typed (a Python number)."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    before, after = (
        next((i for i, kind in enumerate(kinds) if jnp.issubdtype(each, kind)), -1)
        for each in (x.dtype, dtype)
    )
    narrower = not x.weak_type and dtype.itemsize < min(x.dtype.itemsize, 4)
    return after < before or (after == before and narrower)


def _number(value: Any, dtype: Any, what: str) -> Array:
    if jnp.shape(value) != ():
        raise ConfigError(
            f"env: step returns a value of shape {jnp.shape(value)} as its {what}; return a single "
            "number, of shape ()"
        )
    return jnp.asarray(value, dtype)


def _inner_step(name: str, env: Any, params: Any, obs_like: PyTree) -> Any:
    def step_one(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        obs, next_state, reward, terminated, _ = env.step_env(key, state, action, params)
        truncated = env.is_truncated(next_state, params)
        return (
            _like(name, "state", next_state, state),
            _like(name, "observation", obs, obs_like),
            _number(reward, jnp.float32, "reward"),
            _number(terminated, bool, "terminated"),
            _number(truncated, bool, "truncated"),
        )

    return step_one


def _public_step(name: str, env: Any, params: Any, obs_like: PyTree) -> Any:
    def step_one(key: Key[Array, ""], state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        result = env.step(key, state, action, params)
        if len(result) != 6 or "final_observation" not in result[5]:
            raise ConfigError(
                f"step of env = {env!r} returned {len(result)} values; gymnax 1.x returns obs, "
                "state, reward, terminated, truncated and info, with the observation before "
                "auto-reset in info['final_observation']"
            )
        obs, next_state, reward, terminated, truncated, info = result
        return _like(name, "state", next_state, state), TimeStep(
            obs=_like(name, "observation", obs, obs_like),
            reward=_number(reward, jnp.float32, "reward"),
            terminated=_number(terminated, bool, "terminated"),
            truncated=_number(truncated, bool, "truncated"),
            final_obs=_like(name, "observation", info["final_observation"], obs_like),
        )

    return step_one
