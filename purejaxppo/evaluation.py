"""Returns of whole episodes under a trained policy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from purejaxppo.agent import agent_in
from purejaxppo.config import Config, ConfigError
from purejaxppo.envs import make_environment
from purejaxppo.types import Environment, PyTree, TrainState

MAX_STEPS_WITHOUT_LIMIT = 10_000
# Rows of a split and folded-in numbers are the same keys: these lie beyond any number of seeds.
FINAL_EVALUATION, LATER_EVALUATION, FRESH_EVALUATION = 2**31, 2**31 + 1, 2**31 + 2


def evaluation_keys(seed: int, num_seeds: int, purpose: int) -> Key[Array, " S"]:
    """Keys that share nothing with those of the trainings that `seed` began."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), purpose), num_seeds)


class _Episodes(NamedTuple):
    """Episodes under way side by side, E of them."""

    steps: Array
    key: Key[Array, ""]
    env_state: PyTree
    obs: Array
    carry: PyTree
    total: Float[Array, " E"]
    over: Bool[Array, " E"]


def evaluate(
    config: Config,
    state: TrainState,
    key: Key[Array, ""],
    num_episodes: int = 128,
    *,
    deterministic: bool = False,
    max_steps: int | None = None,
    env: Any = None,
    env_params: Any = None,
) -> Float[Array, " num_episodes"]:
    """Undiscounted returns of `num_episodes` fresh episodes, run side by side.

    The statistics of the normaliser are those of `state`, and stay as they are. A pure function:
    put it under `jax.jit` to compile once, under `jax.vmap` for many states.

    Args:
        state: of one seed.
        deterministic: take the mode of the policy instead of sampling from it.
        max_steps: an episode that lasts longer counts with its return so far; None takes the
            environment's own time limit, or 10,000 where it states none.
        env: the object passed to training in place of a name, if one was.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: as `make_agent`, or if a number is below 1.
    """
    _check_counts(num_episodes, max_steps)
    environment = make_environment(config, env, env_params)
    agent = agent_in(environment, config, state)
    limit = _step_limit(max_steps, environment)

    def step(now: _Episodes) -> _Episodes:
        key, act_key, env_key = jax.random.split(now.key, 3)
        action, carry = agent.act(act_key, now.obs, now.carry, deterministic)
        env_keys = jax.random.split(env_key, num_episodes)
        env_state, result = environment.step(env_keys, now.env_state, action)
        return _Episodes(
            steps=now.steps + 1,
            key=key,
            env_state=env_state,
            obs=result.obs,
            carry=carry,
            total=now.total + jnp.where(now.over, 0.0, result.reward),
            over=now.over | result.terminated | result.truncated,
        )

    reset_key, run_key = jax.random.split(key)
    env_state, obs = environment.reset(jax.random.split(reset_key, num_episodes))
    first = _Episodes(
        steps=jnp.zeros((), jnp.int32),
        key=run_key,
        env_state=env_state,
        obs=obs,
        carry=agent.initial_carry(num_episodes),
        total=jnp.zeros(num_episodes),
        over=jnp.zeros(num_episodes, bool),
    )
    last = jax.lax.while_loop(lambda now: (now.steps < limit) & ~jnp.all(now.over), step, first)
    return last.total


def _step_limit(max_steps: int | None, environment: Environment) -> int:
    limits = (max_steps, environment.max_episode_steps, MAX_STEPS_WITHOUT_LIMIT)
    return next(limit for limit in limits if limit is not None)


def _check_counts(num_episodes: int, max_steps: int | None) -> None:
    for name, value in (("num_episodes", num_episodes), ("max_steps", max_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
