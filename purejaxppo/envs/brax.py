"""Brax: continuous control. Names are those of Brax, or `backend/name` for another backend.

Brax's own wrappers start every episode of an environment in the same state and lose the last
observation; this adapter steps the bare environment and counts the steps itself.
"""

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping
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
ONE_BACKEND = ("fast", "swimmer")
"""Environments that run only on the default backend."""
EPISODE_LENGTH = 1000
"""The time limit of Brax's own training."""


def names() -> list[str]:
    every = list(_brax()._envs)
    others = [name for name in every if name not in ONE_BACKEND]
    return [*every, *(f"{backend}/{name}" for backend in BACKENDS[1:] for name in others)]


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    defaults = {"episode_length": EPISODE_LENGTH}
    limit = (defaults | changed_values(f"brax/{name}", defaults, params))["episode_length"]
    backend, _, base = name.rpartition("/")
    env = _brax().get_environment(base, backend=backend or BACKENDS[0])
    return counted(env, limit, _renderer(env))._replace(slow_reset=True, parameters=defaults)


def counted(env: Any, limit: int, render: Any) -> Single:
    """An environment with Brax's interface, and a time limit."""

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state = env.reset(key)
        return (state, jnp.zeros((), jnp.int32)), state.obs

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        before, steps = state
        # Brax writes into the state's dictionaries.
        copied = before.replace(metrics=dict(before.metrics), info=dict(before.info))
        now, steps = env.step(copied, action), steps + 1
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


def _renderer(env: Any) -> Callable[[PyTree], np.ndarray]:
    """As Brax's `image.render_array`, but with one renderer for all images, and a camera that
    follows the robot if the model has one."""
    made: list[Any] = []

    def render(state: PyTree) -> np.ndarray:
        mujoco: Any = importlib.import_module("mujoco")
        model = env.sys.mj_model
        if not made:
            made.append(mujoco.Renderer(model, 240, 320))
        now, data = state[0].pipeline_state, mujoco.MjData(model)
        data.qpos, data.qvel = np.asarray(now.q), np.asarray(now.qd)
        if hasattr(now, "mocap_pos"):
            data.mocap_pos, data.mocap_quat = np.asarray(now.mocap_pos), np.asarray(now.mocap_quat)
        mujoco.mj_forward(model, data)
        following = np.flatnonzero(model.cam_mode != mujoco.mjtCamLight.mjCAMLIGHT_FIXED)
        made[0].update_scene(data, camera=int(following[0]) if following.size else -1)
        return made[0].render()

    return render
