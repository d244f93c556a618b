"""Adapter to gymnax 1.x, and to any object with its interface."""

import functools
import importlib
import sys
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Key

from purejaxppo.config import Config, ConfigError
from purejaxppo.envs.base import named_parts
from purejaxppo.envs.drawings import drawing_of
from purejaxppo.envs.params import fields_of, replaced
from purejaxppo.envs.single import ResetOne, Single, StepOne, like, number, vectorised
from purejaxppo.envs.wrappers import changes, wrapped
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


def from_gymnax(name: str, env: Any, params: Any, config: Config) -> Environment:
    """Make an `Environment` of N copies of a gymnax environment.

    An environment that does not override gymnax's `step` and `reset` is stepped through
    `step_env`, which avoids a reset in each step. Any other object (a wrapper, or a separate
    class) is stepped through its public `step`, which resets itself. It returns six values, or five
    as in gymnax 0.0.x.

    Args:
        params: None uses `env.default_params`.
        config: its settings of `wrappers.OPTIONS` change the environment.

    Raises:
        ConfigError: if `env` lacks a method of the interface, or resets itself and is to be
            changed.
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

    # Inside a trace, jnp would make the bounds tracers, from which no policy can be made.
    with jax.ensure_compile_time_eval():
        observation_space, action_space = env.observation_space(params), env.action_space(params)

    def with_values(values: Mapping[str, Any]) -> tuple[ResetOne, StepOne]:
        own = replaced(params, values)

        def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
            obs, state = env.reset(key, own)
            return state, named_parts(obs)

        return reset, _inner_step(env, own)

    single = Single(
        name, observation_space, action_space, _time_limit(params), *with_values({}),
        render=_renderer(env, params), parameters=fields_of(params), with_values=with_values,
    )  # fmt: skip
    if _steps_without_reset(env):
        return vectorised(wrapped(single, config))
    if changes(config):
        raise ConfigError(
            f"{', '.join(changes(config))}: env {name} resets itself in its step, so it cannot be "
            "changed; derive it from gymnax's Environment, or change it in your own code"
        )
    return vectorised(single)._replace(step=jax.vmap(_public_step(single, env, params)))


def _steps_without_reset(env: Any) -> bool:
    """Whether `step_env` does what `step` does, without the reset: `step` is that of a base class,
    gymnax's or a copy of it, in which `step_env` is abstract."""
    kinds = type(env).__mro__
    base = next((kind for kind in kinds if "step" in vars(kind)), object)
    own = next((kind for kind in kinds if "step_env" in vars(kind)), object)
    resets = next((kind for kind in kinds if "reset" in vars(kind)), object)
    return base is resets and base is not own and "step_env" in vars(base)


def _renderer(env: Any, params: Any) -> Any:
    """The environment's own `render(state, params)`, or our drawing of gymnax's."""
    own = getattr(env, "render", None)
    return drawing_of(env, params) if own is None else lambda state: own(state, params)


def _time_limit(params: Any) -> Any:
    limit = getattr(params, "max_steps_in_episode", None)
    return limit if limit is None or isinstance(limit, Tracer) else int(limit)


def _inner_step(env: Any, params: Any) -> StepOne:
    # In gymnax 0.0.x, `done` is set by time limits too.
    is_new = isinstance(env, import_gymnax().environments.environment.Environment)

    def step_one(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        obs, next_state, reward, over, info = env.step_env(key, state, action, params)
        if hasattr(env, "is_truncated"):
            truncated = env.is_truncated(next_state, params)
        else:
            truncated = jnp.bool_(info.get("truncated", False))
        terminated = over if is_new else over & ~truncated
        return next_state, named_parts(obs), reward, terminated, truncated

    return step_one


def _six_values(env: Any, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The six values of gymnax 1.x from the five of 0.0.x: obs, state, reward, done and info. Every
    end counts as a termination, after which the last observation is not needed, unless `info` has
    `truncated` and `final_observation`."""
    obs, state, reward, done, info = result
    truncated = jnp.bool_(info.get("truncated", False))
    if "truncated" in info and "final_observation" not in info:
        raise ConfigError(
            f"step of env = {env!r} returns info['truncated'] without "
            "info['final_observation'], the observation before auto-reset, whose value is needed"
        )
    final = {"final_observation": info.get("final_observation", obs)}
    return obs, state, reward, done & ~truncated, truncated, final


def _public_step(single: Single, env: Any, params: Any) -> Any:
    name = single.name
    obs_like = jax.eval_shape(lambda key: single.reset(key)[1], jax.random.key(0))

    def step_one(key: Key[Array, ""], state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        result = env.step(key, state, action, params)
        if len(result) == 5 and isinstance(result[4], Mapping):
            result = _six_values(env, result)
        if len(result) != 6 or "final_observation" not in result[5]:
            raise ConfigError(
                f"step of env = {env!r} returned {len(result)} values; gymnax 1.x returns obs, "
                "state, reward, terminated, truncated and info, with the observation before "
                "auto-reset in info['final_observation']"
            )
        obs, next_state, reward, terminated, truncated, info = result
        return like(name, "state", next_state, state), TimeStep(
            obs=like(name, "observation", named_parts(obs), obs_like),
            reward=number(reward, jnp.float32, "reward"),
            terminated=number(terminated, bool, "terminated"),
            truncated=number(truncated, bool, "truncated"),
            final_obs=like(name, "observation", named_parts(info["final_observation"]), obs_like),
        )

    return step_one
