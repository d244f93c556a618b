"""XLand-MiniGrid. Observations are views of tiles and colours, one-hot."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from purejaxppo.envs.params import changed_values, fields_of, numbers_of
from purejaxppo.envs.single import Single
from purejaxppo.envs.spaces import box, discrete, one_hot_grid
from purejaxppo.types import PyTree


def names() -> list[str]:
    from xminigrid import registration

    return list(registration.registered_environments())


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    from xminigrid import registration
    from xminigrid.core.constants import NUM_COLORS, NUM_TILES

    made: Any = registration.make(name)
    env, full = made
    numbers = numbers_of(fields_of(full))
    full = full.replace(**changed_values(f"xminigrid/{name}", numbers, params))
    sizes = (NUM_TILES, NUM_COLORS)

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        now = env.reset(full, key)
        return now, one_hot_grid(now.observation, sizes)

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        now = env.step(full, state, action)
        terminated = now.last() & (now.discount == 0)
        obs = one_hot_grid(now.observation, sizes)
        return now, obs, now.reward, terminated, now.last() & ~terminated

    limit = full.max_steps
    return Single(
        name="",
        observation_space=box((*env.observation_shape(full)[:2], sum(sizes)), 0.0, 1.0),
        action_space=discrete(env.num_actions(full)),
        max_episode_steps=None if limit is None else int(limit),
        reset=reset, step=step, render=partial(_render, env, full), parameters=numbers,
    )  # fmt: skip


def _render(env: Any, params: Any, state: PyTree) -> np.ndarray:
    return np.asarray(env.render(params, state))
