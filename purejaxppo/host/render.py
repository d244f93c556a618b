"""Episodes of a trained policy as images: one environment, drawn on the host."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import jax
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.checks import reason_of
from purejaxppo.config import ConfigError, TaskConfig
from purejaxppo.evaluation import LATER_EVALUATION, evaluation_keys
from purejaxppo.host.configfile import Settings
from purejaxppo.host.load import check_seed, find_states, task_of
from purejaxppo.inputs import as_key, whole_number
from purejaxppo.recorded import typed
from purejaxppo.task import PartArguments, PartsAndHParams, Task, as_task
from purejaxppo.types import Environment, KeyLike, PyTree, TimeStep, TrainState

CHUNK = 128
"""Steps per call of the compiled program."""
STEPS_WITHOUT_LIMIT = 1000
_MUJOCO_CONTEXT = "mujoco.rendering.classic.gl_context"


def render(
    run_dir: str | Path,
    task: Task | None = None,
    *,
    episodes: int = 1,
    max_steps: int | None = None,
    deterministic: bool = False,
    rollout_seed: int = 0,
    seed: int = 0,
    which: Literal["newest", "best"] | int = "newest",
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> np.ndarray:
    """Draw new episodes of a run's policy: images `[T, H, W, 3]`, 8-bit.

        frames = ppo.render("runs/first", episodes=3)

    There is one image per step, of the state before the step. Episodes follow one another. In a
    game of two players, the policy plays both sides, and the final position is drawn too.

    Args:
        task: the task passed to `run`, if one was.
        episodes: number of episodes.
        max_steps: maximum number of steps of an episode. None uses the environment's time limit, or
            1,000 steps if it has none.
        deterministic: take the mode of the policy instead of sampling from it.
        rollout_seed: random seed of the episodes.
        seed: index of the run's seed, from 0.
        which: the newest checkpoint, the best by evaluation, or the one after this number of
            updates.
        env: the environment passed to `run`, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to `run`.

    Raises:
        ConfigError: as `load`, or if the environment has no renderer.
    """
    use_offscreen_gl()
    given = {"env": env, "env_params": env_params, **parts}
    made: list[Task] = []

    def drawable(settings: Settings) -> Task:
        made.append(task_of(settings, task, given))
        environment_of(made[-1], "render")
        return made[-1]

    found, states = find_states(Path(run_dir), which, drawable)
    check_seed(seed, found.settings)
    state = jax.tree.map(lambda x: x[seed], states)
    key = rollout_key(rollout_seed, seed)
    frames = frames_of(
        made[-1], state, key, episodes, max_steps=max_steps, deterministic=deterministic
    )
    return np.stack(list(frames))


def render_policy(
    config: TaskConfig | Task,
    state: TrainState,
    key: KeyLike,
    episodes: int = 1,
    *,
    max_steps: int | None = None,
    deterministic: bool = False,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartsAndHParams],
) -> np.ndarray:
    """Draw new episodes of a trained state's policy; see `render`.

    Args:
        state: of one seed.
        key: random key of the episodes.
        episodes: number of episodes.
        max_steps: maximum number of steps of an episode. None uses the environment's time limit, or
            1,000 steps if it has none.
        deterministic: take the mode of the policy instead of sampling from it.
        env: the environment passed to training, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to training.

    Raises:
        ConfigError: as `make_agent`, or if the environment has no renderer.
    """
    use_offscreen_gl()
    task = as_task(config, "render_policy", env=env, env_params=env_params, **parts)
    frames = frames_of(
        task, state, key, episodes, max_steps=max_steps, deterministic=deterministic,
        function="render_policy",
    )  # fmt: skip
    return np.stack(list(frames))


def rollout_key(rollout_seed: int, seed: int) -> Key[Array, ""]:
    """The key of the episodes of a run's seed, independent of those it was trained with."""
    rollout_seed = whole_number("rollout_seed", rollout_seed, 0)
    return evaluation_keys(rollout_seed, seed + 1, LATER_EVALUATION)[seed]


def frames_of(
    task: Task,
    state: TrainState,
    key: KeyLike,
    episodes: int,
    *,
    max_steps: int | None,
    deterministic: bool,
    function: str = "render",
) -> Iterator[np.ndarray]:
    """Draw episodes, image by image. Arguments are checked at once, and errors name `function`."""
    episodes = whole_number("episodes", episodes, 1)
    env = environment_of(task, function)
    if max_steps is not None:
        limit = whole_number("max_steps", max_steps, 1)
    elif env.max_episode_steps is None:
        limit = STEPS_WITHOUT_LIMIT
    else:
        limit = int(env.max_episode_steps) + 1  # some end one step after their limit
    keys = jax.random.split(as_key(key, function, "pass one key"), episodes)
    task.agent(state, function)
    if env.in_python is not None:
        return _frames_in_python(env, *_agent_in_python(task, state, deterministic), keys, limit)
    return _frames(env, *_programs(task, env, state, deterministic), keys, limit)


def environment_of(task: Task, function: str) -> Environment:
    """The environment of a task.

    Raises:
        ConfigError: if it cannot be drawn.
    """
    if task.parts is None:
        raise ConfigError(f"{function}: {task.config.label} has no environment to draw")
    env = task.parts(None).env
    if env.render is None and env.in_python is None:
        raise ConfigError(
            f"env {env.name} has no renderer; pass an environment whose method "
            "`render(state, params)` returns an image [H, W, 3] of type uint8"
        )
    return env


class _Now(NamedTuple):
    """An episode in progress; leaves `[1, ...]`, except for the key."""

    key: Key[Array, ""]
    env_state: PyTree
    obs: PyTree
    carry: PyTree


def _programs(
    task: Task, env: Environment, state: TrainState, deterministic: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`key -> _Now`, and `_Now -> (_Now, (states[CHUNK, ...], over[CHUNK]))`."""
    env_reset, env_step = (env.reset, env.step) if env.game is None else _played(env.game)

    def start(key: Key[Array, ""]) -> _Now:
        reset_key, key = jax.random.split(key)
        env_state, obs = env_reset(reset_key[None])
        return _Now(key, env_state, obs, task.agent(state).initial_carry(1))

    def steps(state: TrainState, now: _Now) -> Any:
        agent = task.agent(state)

        def step(now: _Now, _: None) -> Any:
            key, act_key, env_key = jax.random.split(now.key, 3)
            action, carry = agent.act(act_key, now.obs, now.carry, deterministic)
            env_state, result = env_step(env_key[None], now.env_state, action)
            drawn = jax.tree.map(lambda x: x[0], now.env_state)
            over = (result.terminated | result.truncated)[0]
            return _Now(key, env_state, result.obs, carry), (drawn, over)

        return jax.lax.scan(step, now, None, CHUNK)

    compiled = jax.jit(steps)
    return jax.jit(start), lambda now: compiled(state, now)


def _played(game: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`reset` and `step` of games whose final position stays. A move after the end changes
    nothing."""

    def step(keys: Key[Array, " N"], state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        state, obs, reward, terminated, truncated = jax.vmap(game.step)(keys, state, action)
        return state, TimeStep(obs, reward, terminated, truncated, obs)

    return jax.vmap(game.reset), step


def _frames(
    env: Environment,
    start: Callable[..., Any],
    steps: Callable[..., Any],
    keys: Key[Array, " E"],
    limit: int,
) -> Iterator[np.ndarray]:
    row = jax.jit(lambda states, t: jax.tree.map(lambda x: x[t], states))
    shape = None
    for key in keys:
        now, left, ended = start(key), limit, False
        while left and not ended:
            now, (states, over) = steps(now)
            over = np.asarray(over)[:left]
            ended = bool(over.any())
            drawn = int(over.argmax()) + 1 if ended else len(over)
            left -= drawn
            for t in range(drawn):
                image = _drawn(env, row(states, t), shape)
                shape = image.shape
                yield image
        if ended and env.game is not None:
            yield _drawn(env, row(now.env_state, 0), shape)


def _agent_in_python(
    task: Task, state: TrainState, deterministic: bool
) -> tuple[Callable[..., Any], PyTree]:
    """`(key, obs, carry) -> (action, carry)`, and the first carry."""

    def act(state: TrainState, key: Key[Array, ""], obs: PyTree, carry: PyTree) -> Any:
        return task.agent(state).act(key, obs, carry, deterministic)

    return partial(jax.jit(act), state), task.agent(state).initial_carry(1)


def _frames_in_python(
    env: Environment, act: Callable[..., Any], first: PyTree, keys: Key[Array, " E"], limit: int
) -> Iterator[np.ndarray]:
    """Episodes of an environment that Python steps, with its own images."""
    assert env.in_python is not None
    envs = env.in_python(1, render_mode="rgb_array")
    shape = None
    try:
        for key in keys:
            obs, _ = envs.reset(seed=int(jax.random.randint(key, (), 0, 2**31 - 1)))
            carry = first
            for t in range(limit):
                image = _image_in_python(env, envs, shape)
                shape = image.shape
                yield image
                action, carry = act(jax.random.fold_in(key, t), typed(obs), carry)
                obs, _, terminated, truncated, _ = envs.step(np.asarray(action))
                if terminated[0] or truncated[0]:
                    break
    finally:
        envs.close()


def _image_in_python(env: Environment, envs: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    try:
        image = envs.render()[0]
    except Exception as error:  # a package for drawing is missing
        raise ConfigError(f"env {env.name}: cannot be drawn: {reason_of(error)}") from error
    if image is None:
        raise ConfigError(f"env {env.name}: cannot be drawn: it has no render mode rgb_array")
    return _checked(env, np.array(image), shape)


def _drawn(env: Environment, state: PyTree, shape: tuple[int, ...] | None) -> np.ndarray:
    """The image of a state, which must have the shape of those before it."""
    assert env.render is not None
    return _checked(env, np.asarray(env.render(state)), shape)


def _checked(env: Environment, image: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ConfigError(
            f"env {env.name}: render returns {image.dtype}{list(image.shape)}; return an image "
            "[H, W, 3] of type uint8"
        )
    if shape not in (None, image.shape):
        raise ConfigError(
            f"env {env.name}: render returns images of shape {shape} and {image.shape}; return "
            "images of one shape"
        )
    return image


def use_offscreen_gl() -> None:
    """Let MuJoCo render without a display on Linux, unless MUJOCO_GL says how it should."""
    displays = {"DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"} & os.environ.keys()
    if sys.platform != "linux" or displays:
        return
    os.environ["MUJOCO_GL"] = "egl"
    imported = sys.modules.get(_MUJOCO_CONTEXT)
    if imported is not None:  # the variable is read at import
        importlib.reload(imported)
