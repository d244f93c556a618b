"""Craftax and Craftax-Classic, with symbols or pixels."""

import contextlib
import functools
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.envs.params import changed_values, fields_of, numbers_of
from purejaxppo.envs.single import ResetOne, Single, StepOne
from purejaxppo.envs.spaces import box, discrete
from purejaxppo.types import PyTree

_NO_LIMIT = 2**30


def names() -> list[str]:
    return [
        f"Craftax-{kind}v1"
        for kind in ("Symbolic-", "Pixels-", "Classic-Symbolic-", "Classic-Pixels-")
    ]


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    from craftax.craftax_env import make_craftax_env_from_name

    with contextlib.redirect_stdout(sys.stderr):  # it prints that it loads textures
        env: Any = make_craftax_env_from_name(name, auto_reset=False)
    numbers = numbers_of(fields_of(env.default_params))
    changed = changed_values(f"craftax/{name}", numbers, params)
    full = env.default_params.replace(**changed)
    unlimited = full.replace(max_timesteps=_NO_LIMIT)

    def with_values(values: Mapping[str, Any]) -> tuple[ResetOne, StepOne]:
        own, endless = full.replace(**values), unlimited.replace(**values)

        def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
            obs, state = env.reset_env(key, own)
            return state, obs

        def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
            # `done` would be set by deaths and by the time limit.
            obs, state, reward, _, _ = env.step_env(key, state, action, own)
            terminated = env.is_terminal(state, endless)
            return state, obs, reward, terminated, state.timestep >= full.max_timesteps

        return reset, step

    reset, step = with_values({})
    return Single(
        name="", observation_space=box(env.observation_space(full).shape, 0.0, 1.0),
        action_space=discrete(env.action_space(full).n), max_episode_steps=full.max_timesteps,
        reset=reset, step=step, render=partial(_render, "Classic" in name), slow_reset=True,
        parameters=numbers, with_values=with_values,
    )  # fmt: skip


def _render(classic: bool, state: PyTree) -> np.ndarray:
    return np.asarray(_pixels(classic)(state)).astype(np.uint8)


@functools.cache
def _pixels(classic: bool) -> Any:
    """`state -> image`, compiled: it would take a second per image otherwise."""
    if classic:
        from craftax.craftax_classic.renderer import make_craftax_pixel_renderer
    else:
        from craftax.craftax.renderer import make_craftax_pixel_renderer
    return jax.jit(make_craftax_pixel_renderer(16))
