"""Pgx: the games of one player (2048 and MinAtar), with masks of legal actions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.envs.drawings import channels, game_2048
from purejaxppo.envs.params import changed_values
from purejaxppo.envs.single import Single
from purejaxppo.envs.spaces import box, discrete, masked
from purejaxppo.masks import ACTION_MASK
from purejaxppo.types import PyTree


def names() -> list[str]:
    import pgx

    return [name for name in pgx.available_envs() if name == "2048" or "minatar" in name]


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    import pgx

    changed_values(f"pgx/{name}", {}, params)
    env: Any = pgx.make(name)  # pyright: ignore[reportArgumentType]
    has_mask = "minatar" not in name

    def observe(state: Any) -> PyTree:
        obs = state.observation.astype(jnp.float32)
        return {"observation": obs, ACTION_MASK: state.legal_action_mask} if has_mask else obs

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state = env.init(key)
        return state, observe(state)

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        state = env.step(state, action, key)
        return state, observe(state), state.rewards[0], state.terminated, state.truncated

    space = box(env.observation_shape, *_bounds(env))
    return Single(
        name="", observation_space=masked(space, env.num_actions) if has_mask else space,
        action_space=discrete(env.num_actions), max_episode_steps=None, reset=reset, step=step,
        render=_render_2048 if has_mask else _render_grid,
    )  # fmt: skip


def _render_2048(state: Any) -> np.ndarray:
    return game_2048(np.asarray(state._board).reshape(4, 4))


def _render_grid(state: Any) -> np.ndarray:
    return channels(np.asarray(state.observation))


def _bounds(env: Any) -> tuple[float, float]:
    """All of these games have Boolean observations."""
    state = jax.eval_shape(env.init, jax.random.key(0))
    return (0.0, 1.0) if state.observation.dtype == bool else (-jnp.inf, jnp.inf)
