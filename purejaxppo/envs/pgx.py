"""Pgx: games of one player (2048 and MinAtar), and board games of two players who alternate.

In a game of two, each step is a move of the player whose turn it is, and the observation is that
player's view, so the policy plays both sides.
"""

import importlib
import importlib.util
import io
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.config import ConfigError
from purejaxppo.envs.drawings import channels
from purejaxppo.envs.params import changed_values
from purejaxppo.envs.single import Single
from purejaxppo.envs.spaces import box, discrete, masked
from purejaxppo.masks import ACTION_MASK
from purejaxppo.types import PyTree

BOARD_GAMES = (
    "animal_shogi", "chess", "connect_four", "gardner_chess", "go_9x9", "go_19x19", "hex",
    "othello", "shogi", "tic_tac_toe",
)  # fmt: skip
"""Games of two players who alternate, with perfect information."""


def names() -> list[str]:
    import pgx

    return [
        name
        for name in pgx.available_envs()
        if name == "2048" or "minatar" in name or name in BOARD_GAMES
    ]


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
        mover = state.current_player
        state = env.step(state, action, key)
        return state, observe(state), state.rewards[mover], state.terminated, state.truncated

    space = box(env.observation_shape, *_bounds(env))
    single = Single(
        name="", observation_space=masked(space, env.num_actions) if has_mask else space,
        action_space=discrete(env.num_actions), max_episode_steps=None, reset=reset, step=step,
        render=_render if has_mask else _render_grid,
    )  # fmt: skip
    if name not in BOARD_GAMES:
        return single
    return single._replace(alternating=True, evaluation=against_random(single, env, observe))


def against_random(single: Single, env: Any, observe: Any) -> Single:
    """The game against an opponent who plays random legal moves. Who begins is random; the reward
    is that of the policy's side."""

    def reply(state: Any, key: Key[Array, ""]) -> Any:
        draw, move = jax.random.split(key)
        logits = jnp.where(state.legal_action_mask, 0.0, -jnp.inf)
        return env.step(state, jax.random.categorical(draw, logits), move)

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        begin, first = jax.random.split(key)
        state = env.init(begin)
        other = state.current_player != 0
        replied = reply(state, first)
        state = jax.tree.map(lambda x, y: jnp.where(other, x, y), replied, state)
        return state, observe(state)

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        own, other = jax.random.split(key)
        moved = env.step(state, action, own)
        replied = reply(moved, other)  # after the end, a move changes nothing and earns nothing
        reward = moved.rewards[0] + jnp.where(moved.terminated, 0.0, replied.rewards[0])
        state = jax.tree.map(lambda x, y: jnp.where(moved.terminated, x, y), moved, replied)
        return state, observe(state), reward, state.terminated, state.truncated

    return single._replace(reset=reset, step=step)


def _render(state: Any) -> np.ndarray:
    """Pgx's own drawing, which is SVG."""
    if importlib.util.find_spec("resvg_py") is None:
        raise ConfigError("drawing Pgx's games needs resvg-py; pip install 'purejaxppo[pgx]'")
    from PIL import Image

    resvg: Any = importlib.import_module("resvg_py")
    png = resvg.svg_to_bytes(svg_string=state.to_svg(), background="white")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _render_grid(state: Any) -> np.ndarray:
    return channels(np.asarray(state.observation))


def _bounds(env: Any) -> tuple[float, float]:
    """All of these games have Boolean observations."""
    state = jax.eval_shape(env.init, jax.random.key(0))
    return (0.0, 1.0) if state.observation.dtype == bool else (-jnp.inf, jnp.inf)
