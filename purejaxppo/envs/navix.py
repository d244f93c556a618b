"""Navix: MiniGrid in JAX. Observations are grids of symbols, one-hot."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from purejaxppo.envs.params import changed_values
from purejaxppo.envs.single import Single
from purejaxppo.envs.spaces import box, discrete, one_hot_grid
from purejaxppo.types import PyTree

_SIZES = (11, 6, 4)
"""Numbers of objects, colours and states."""
_TERMINATED = 2
MAX_STEPS = 100
"""The default of `navix.make`."""


def names() -> list[str]:
    import navix

    return list(navix.registry())


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    import navix

    defaults = {"max_steps": MAX_STEPS}
    env = navix.make(name, **(defaults | changed_values(f"navix/{name}", defaults, params)))

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        now = env.reset(key)
        return now, one_hot_grid(now.observation, _SIZES)

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        # The public `step` would reset one step late, and ignore an action for it.
        now = env._step(state, action)
        terminated = now.step_type == _TERMINATED
        obs = one_hot_grid(now.observation, _SIZES)
        return now, obs, now.reward, terminated, now.t >= env.max_steps

    shape = (*env.observation_space.shape[:2], sum(_SIZES))
    return Single(
        name="", observation_space=box(shape, 0.0, 1.0),
        action_space=discrete(int(env.action_space.maximum) + 1),
        max_episode_steps=env.max_steps, reset=reset, step=step, render=_render, slow_reset=True,
        parameters=defaults,
    )  # fmt: skip


def _render(state: PyTree) -> np.ndarray:
    import navix

    image = np.asarray(navix.observations.rgb(state.state))  # 8 pixels per cell
    return image.repeat(3, 0).repeat(3, 1)
