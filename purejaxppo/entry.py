"""The public functions that take a config or a task."""

from typing import Any, Unpack

import jax
from jaxtyping import Array, Bool, Float

from purejaxppo.agent import Agent
from purejaxppo.config import ConfigError, HParams, TaskConfig
from purejaxppo.inputs import as_key, check_fits, check_hparams, check_state
from purejaxppo.task import PartsAndHParams, Task, as_task
from purejaxppo.train import Train, train_chunk
from purejaxppo.types import KeyLike, Learner, Metrics, PyTree, TrainState


def make_learner(
    config: TaskConfig | Task,
    env: Any = None,
    env_params: Any = None,
    *,
    axis: str | None = None,
    **parts: Unpack[PartsAndHParams],
) -> Learner:
    """Make the learner of a config or task. Its functions check their arguments.

    An update whose loss is not finite leaves the state unchanged.

    Args:
        env: an object with gymnax 1.x's interface, which replaces the one that
            `config.env_id` names.
        env_params: its parameters; None uses its defaults.
        axis: a mesh axis over which the environments are spread, for use under `jax.shard_map`:
            each device steps `num_envs / devices` of them, and all learn the same parameters.
        **parts: see `make_task`.

    Raises:
        ConfigError: as `make_task`. `init` and `update` raise it for a batch of keys or
            hyperparameters, or a state of several seeds or of a config with different shapes.
    """
    task = as_task(config, "make_learner", env=env, env_params=env_params, **parts)
    _check_compiled(task, "make_learner")
    return checked(task.learner(axis), task, spread=axis is not None)


def checked(learner: Learner, task: Task, spread: bool = False) -> Learner:
    """Wrap a learner so that its functions check their arguments.

    Args:
        spread: whether each device holds only its own rows of the state.
    """
    made: list[TrainState] = []
    """The shapes of this learner's states, once `init` has been traced."""

    def init(key: KeyLike, hparams: HParams, data: PyTree = task.data) -> TrainState:
        key = as_key(key, "init", "use jax.vmap(learner.init, (0, None))(keys, hparams)")
        hint = "use jax.vmap(learner.init, (None, ppo.vmap_axes(hparams)))(key, hparams)"
        check_hparams(hparams, "init", hint)
        state = learner.init(key, hparams, data)
        made[:] = [jax.tree.map(jax.typeof, state)]
        return state

    def update(
        state: TrainState, hparams: HParams, data: PyTree = task.data
    ) -> tuple[TrainState, Metrics]:
        check_state(state, "update", "use jax.vmap(learner.update, (0, None))(states, hparams)")
        hint = "use jax.vmap(learner.update, (0, ppo.vmap_axes(hparams)))(states, hparams)"
        check_hparams(hparams, "update", hint)
        if not spread:
            if not made:
                jax.eval_shape(lambda: init(jax.random.key(0), task.hparams, data))
            check_fits("state", state, made[0])
        return learner.update(state, hparams, data)

    return Learner(init, update)


def make_train(
    config: TaskConfig | Task,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartsAndHParams],
) -> Train:
    """Make a pure function `(key, hparams) -> (state, metrics)` that trains from start to end.

    It runs `config.num_updates` updates. Metrics are `[U]`. Put it under `jax.jit`, and under
    `jax.vmap` for several keys or hyperparameters (`vmap_axes`):

        state, metrics = jax.jit(train)(jax.random.key(0), ppo.HParams(learning_rate=1e-3))

    Args:
        env: an object with gymnax 1.x's interface, which replaces the one that
            `config.env_id` names.
        env_params: its parameters; None uses its defaults.
        **parts: see `make_task`.

    Raises:
        ConfigError: as `make_task`; when called, if it is not given one key and one number per
            hyperparameter.
    """
    task = as_task(config, "make_train", env=env, env_params=env_params, **parts)
    _check_compiled(task, "make_train")
    learner = checked(task.learner(None), task)

    def train(key: KeyLike, hparams: HParams) -> tuple[TrainState, Metrics]:
        key = as_key(key, "train", "use jax.vmap(train, (0, None))(keys, hparams)")
        hint = "use jax.vmap(train, (None, ppo.vmap_axes(hparams)))(key, hparams)"
        check_hparams(hparams, "train", hint)
        state = learner.init(key, hparams, task.data)
        return train_chunk(learner, state, hparams, task.config.num_updates)

    return train


def _check_compiled(task: Task, function: str) -> None:
    """Raise `ConfigError` if the environment is stepped in Python."""
    if task.update_call is not None and task.parts is not None:
        raise ConfigError(
            f"{function}: {task.config.label} is stepped in Python between compiled parts, so "
            "training is not a pure function; use ppo.run"
        )


def make_agent(
    config: TaskConfig | Task,
    state: TrainState,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartsAndHParams],
) -> Agent:
    """Make the agent of a trained state of one seed.

    If the state has a leading axis of seeds, select one: `jax.tree.map(lambda x: x[0], states)`.

    Args:
        env: the environment passed to training, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to training.

    Raises:
        ConfigError: as `make_task`, or if the state is of several seeds or of a config with
            different shapes.
    """
    task = as_task(config, "make_agent", env=env, env_params=env_params, **parts)
    return task.agent(state, "make_agent")


def evaluate(
    config: TaskConfig | Task,
    state: TrainState,
    key: KeyLike,
    num_episodes: int = 128,
    *,
    deterministic: bool | Bool[Array, ""] = False,
    max_steps: int | None = None,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartsAndHParams],
) -> Float[Array, " num_episodes"]:
    """Run `num_episodes` new episodes in parallel and return their undiscounted returns.

    The normaliser uses the statistics of `state` and does not change them. The function is pure:
    use `jax.jit` to compile it once, and `jax.vmap` for many states.

    Args:
        state: of one seed.
        deterministic: take the mode of the policy instead of sampling from it. May be traced, so
            that one compiled program does both.
        max_steps: stop after this many steps; an episode that has not ended counts with its return
            so far. None: an episode that does not end within the environment's own time limit
            (10,000 steps if it states none) has no known return and counts as NaN, as does any
            mean over it.
        env: the environment passed to training, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to training.

    Raises:
        ConfigError: as `make_agent`, or if `num_episodes` or `max_steps` is not an integer of at
            least 1, or `key` is not one key.
    """
    task = as_task(config, "evaluate", env=env, env_params=env_params, **parts)
    more: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
    more |= {"data": task.data} if jax.tree.leaves(task.data) else {}
    return task.evaluate(state, key, num_episodes, deterministic=deterministic, **more)
