"""Brax: continuous control. Names are those of Brax, or `backend/name` for another backend.

Brax's own wrappers start every episode of an environment in the same state and lose the last
observation; this adapter steps the bare environment and counts the steps itself.
"""

import contextlib
import io
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.envs.params import changed_values
from purejaxppo.envs.single import Single
from purejaxppo.envs.spaces import box
from purejaxppo.types import PyTree

BACKENDS = ("generalized", "spring", "positional", "mjx")
EPISODE_LENGTH = 1000
"""The time limit of Brax's own training."""


def names() -> list[str]:
    every = list(_brax()._envs)
    return [*every, *(f"{backend}/{name}" for backend in BACKENDS[1:] for name in every)]


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    defaults = {"episode_length": EPISODE_LENGTH}
    limit = (defaults | changed_values(f"brax/{name}", defaults, params))["episode_length"]
    backend, _, base = name.rpartition("/")
    env = _brax().get_environment(base, backend=backend or BACKENDS[0])
    return counted(env, limit, partial(_render, env))._replace(parameters=defaults)


def counted(env: Any, limit: int, render: Any) -> Single:
    """An environment with Brax's interface, and a time limit."""

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state = env.reset(key)
        return (state, jnp.zeros((), jnp.int32)), state.obs

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        before, steps = state
        now, steps = env.step(before, action), steps + 1
        terminated = now.done > 0
        return (now, steps), now.obs, now.reward, terminated, steps >= limit

    shapes = jax.eval_shape(lambda key: reset(key)[1], jax.random.key(0))
    return Single(
        name="", observation_space=jax.tree.map(lambda x: box(x.shape), shapes),
        action_space=box((env.action_size,), -1.0, 1.0), max_episode_steps=limit,
        reset=reset, step=step, render=render,
    )  # fmt: skip


def _brax() -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that warp is missing
        import brax.envs
    return brax.envs


def _render(env: Any, state: PyTree) -> np.ndarray:
    from brax.io import image

    return np.asarray(image.render_array(env.sys, state[0].pipeline_state, 240, 320))
