"""Changes of any environment that does not reset itself: `Single -> Single`.

The environments reset themselves after these changes, so that the last observation and the state of
a new episode are those of the changed environment.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from purejaxppo.config import Config, ConfigError
from purejaxppo.draws import Draw, parse_draws
from purejaxppo.envs.base import is_box, is_discrete, parts_of
from purejaxppo.envs.params import LIMITS
from purejaxppo.envs.single import Single
from purejaxppo.masks import ACTION_MASK
from purejaxppo.types import PyTree

OPTIONS = ("randomize", "sticky_actions", "action_repeat", "time_limit", "obs_clip", "frame_stack")
"""The settings that change an environment, in the order in which they are applied."""


def changes(config: Config) -> list[str]:
    """The settings of `config` that change the environment."""
    return [name for name in OPTIONS if getattr(config, name) != getattr(Config, name)]


def wrapped(single: Single, config: Config) -> Single:
    """The environment with the changes that the config asks for.

    Raises:
        ConfigError: if the environment cannot be changed so.
    """
    makers: dict[str, Callable[[Single, Any], Single]] = {
        "randomize": randomize, "sticky_actions": sticky_actions, "action_repeat": action_repeat,
        "time_limit": time_limit, "obs_clip": obs_clip, "frame_stack": frame_stack,
    }  # fmt: skip
    for name in changes(config):
        single = makers[name](single, getattr(config, name))
    return single


def randomize(single: Single, texts: tuple[str, ...]) -> Single:
    """Draw parameters at the start of each episode (domain randomisation, Tobin et al. 2017,
    arXiv:1703.06907).

    Raises:
        ConfigError: if the environment has no such parameters, or they cannot change.
    """
    draws = parse_draws(texts)
    make = single.with_values
    for draw in draws:
        default = single.parameters.get(draw.name)
        if make is None or draw.name in LIMITS or not isinstance(default, int | float):
            able = [] if make is None else [
                name for name, x in single.parameters.items()
                if isinstance(x, int | float) and name not in LIMITS
            ]  # fmt: skip
            raise ConfigError(
                f"randomize: {single.name} has no parameter {draw.name!r} that can differ between "
                f"episodes; it has: {', '.join(able) or 'none'}"
            )
    assert make is not None

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        own, inner = jax.random.split(key)
        keys = jax.random.split(own, len(draws))
        values = {
            draw.name: jnp.asarray(_drawn(draw, k), jnp.asarray(single.parameters[draw.name]).dtype)
            for draw, k in zip(draws, keys, strict=True)
        }
        state, obs = make(values)[0](inner)
        return (state, values), obs

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        inner, values = state
        inner, *rest = make(values)[1](key, inner, action)
        return (inner, values), *rest

    return _outer(single, reset, step)


def _drawn(draw: Draw, key: Key[Array, ""]) -> Array:
    values = jnp.asarray(draw.values)
    if draw.kind == "choice":
        return jax.random.choice(key, values)
    if draw.kind == "loguniform":
        low, high = jnp.log(values)
        return jnp.exp(jax.random.uniform(key, minval=low, maxval=high))
    return jax.random.uniform(key, minval=values[0], maxval=values[1])


def sticky_actions(single: Single, chance: float) -> Single:
    """With this probability, repeat the action that was carried out last, which is 0 at the start
    of an episode (Machado et al. 2018, arXiv:1709.06009, section 5.2)."""
    space = single.action_space
    first = jnp.zeros(space.shape, jnp.float32 if is_box(space) else jnp.int32)

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state, obs = single.reset(key)
        return (state, first), obs

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        own, inner = jax.random.split(key)
        before, last = state
        stuck = jax.random.bernoulli(own, chance)
        action = jnp.where(stuck, last, jnp.asarray(action, first.dtype))
        state, *rest = single.step(inner, before, action)
        return (state, action), *rest

    return _outer(single, reset, step)


def action_repeat(single: Single, times: int) -> Single:
    """Carry out each action this many times, or until the episode ends; rewards are added up. The
    time limit is then in repeated actions."""

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        def once(now: Any, key: Key[Array, ""]) -> Any:
            state, _, total, terminated, truncated = now
            over = terminated | truncated
            moved, obs, reward, ended, cut = single.step(key, state, action)
            new = (moved, obs, total + reward, jnp.bool_(ended), jnp.bool_(cut))
            return jax.tree.map(lambda x, y: jnp.where(over, x, y), now, new), None

        keys = jax.random.split(key, times)
        first = single.step(keys[0], state, action)
        first = (*first[:2], *(jnp.asarray(x, t) for x, t in zip(
            first[2:], (jnp.float32, bool, bool), strict=True
        )))  # fmt: skip
        return jax.lax.scan(once, first, keys[1:])[0]

    limit = single.max_episode_steps
    shorter = None if limit is None else -(-limit // times)
    return single._replace(step=step, max_episode_steps=shorter)


def time_limit(single: Single, limit: int) -> Single:
    """Truncate episodes after this many steps, if they have not ended before."""

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state, obs = single.reset(key)
        return (state, jnp.zeros((), jnp.int32)), obs

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        inner, steps = state
        inner, obs, reward, terminated, truncated = single.step(key, inner, action)
        return (inner, steps + 1), obs, reward, terminated, truncated | (steps + 1 >= limit)

    own = single.max_episode_steps
    shorter = min(own, limit) if isinstance(own, int) else limit
    return _outer(single, reset, step)._replace(max_episode_steps=shorter)


def obs_clip(single: Single, bound: float) -> Single:
    """Clip the numbers of observations to +-`bound`."""
    space = single.observation_space

    def clipped(obs: PyTree) -> PyTree:
        return _map_boxes(lambda x: jnp.clip(x, -bound, bound), space, obs)

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state, obs = single.reset(key)
        return state, clipped(obs)

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        state, obs, *rest = single.step(key, state, action)
        return state, clipped(obs), *rest

    return single._replace(reset=reset, step=step)


def frame_stack(single: Single, count: int) -> Single:
    """Join the last `count` observations along their last axis, the newest last. At the start of an
    episode, all of them are the first observation.

    Raises:
        ConfigError: if no part of the observation is a box.
    """
    space = single.observation_space
    if not _has_box(space):
        raise ConfigError(
            f"frame_stack = {count}: {single.name} has discrete observations, which cannot be "
            "stacked; leave it out, or use a memory"
        )

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state, obs = single.reset(key)
        frames = jax.tree.map(lambda x: jnp.stack([x] * count), obs)
        return (state, frames), _stacked(space, frames)

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        inner, frames = state
        inner, obs, *rest = single.step(key, inner, action)
        frames = jax.tree.map(
            lambda old, x: jnp.concatenate([old[1:], jnp.asarray(x, old.dtype)[None]]), frames, obs
        )
        return (inner, frames), _stacked(space, frames), *rest

    made = _outer(single, reset, step)
    return made._replace(observation_space=_stacked_space(space, count))


def _outer(single: Single, reset: Any, step: Any) -> Single:
    """The environment with a state `(inner state, ...)`."""
    draw = single.render
    render = None if draw is None else lambda state: draw(state[0])
    return single._replace(reset=reset, step=step, render=render)


def _map_boxes(function: Callable[[Array], Any], space: Any, obs: PyTree) -> PyTree:
    """Apply a function to the parts of an observation that are boxes, but not to action masks."""
    parts = parts_of(space)
    if isinstance(parts, dict):
        return {
            name: x if name == ACTION_MASK else _map_boxes(function, parts[name], x)
            for name, x in obs.items()
        }
    return function(obs) if is_box(parts) else obs


def _has_box(space: Any) -> bool:
    parts = parts_of(space)
    if isinstance(parts, dict):
        return any(_has_box(x) for name, x in parts.items() if name != ACTION_MASK)
    return not is_discrete(parts)


def _stacked(space: Any, frames: PyTree) -> PyTree:
    """Frames `[K, ..., C]` as `[..., K * C]`; of action masks and choices, the last."""
    parts = parts_of(space)
    if isinstance(parts, dict):
        return {
            name: x[-1] if name == ACTION_MASK else _stacked(parts[name], x)
            for name, x in frames.items()
        }
    if is_discrete(parts):
        return frames[-1]
    each = frames[..., None] if frames.ndim == 1 else frames
    return jnp.concatenate(list(each), axis=-1)


def _stacked_space(space: Any, count: int) -> Any:
    from purejaxppo.envs.spaces import box

    parts = parts_of(space)
    if isinstance(parts, dict):
        return {
            name: x if name == ACTION_MASK else _stacked_space(x, count)
            for name, x in parts.items()
        }
    if is_discrete(parts):
        return parts
    shape = parts.shape or (1,)
    low, high = (
        jnp.concatenate([jnp.broadcast_to(jnp.asarray(x), shape)] * count, axis=-1)
        for x in (parts.low, parts.high)
    )
    return box((*shape[:-1], shape[-1] * count), low, high, parts.dtype)
