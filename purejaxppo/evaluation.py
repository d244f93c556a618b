"""Returns of whole episodes under a trained policy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from purejaxppo.agent import Agent
from purejaxppo.inputs import as_key, whole_number
from purejaxppo.types import Environment, KeyLike, PyTree

MAX_STEPS_WITHOUT_LIMIT = 10_000
# `fold_in(key, i)` is row i of `split(key)`; these indices are beyond any number of seeds.
FINAL_EVALUATION, LATER_EVALUATION, FRESH_EVALUATION = 2**31, 2**31 + 1, 2**31 + 2


def evaluation_keys(seed: int, num_seeds: int, purpose: int) -> Key[Array, " S"]:
    """Keys `[S]` for evaluations, independent of the training keys derived from `seed`."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), purpose), num_seeds)


class _Episodes(NamedTuple):
    """State of E episodes that run in parallel."""

    steps: Array
    key: Key[Array, ""]
    env_state: PyTree
    obs: PyTree
    carry: PyTree
    total: Float[Array, " E"]
    over: Bool[Array, " E"]


def episode_returns(
    environment: Environment,
    agent: Agent,
    key: KeyLike,
    num_episodes: int = 128,
    *,
    deterministic: bool | Bool[Array, ""] = False,
    max_steps: int | None = None,
    data: PyTree = (),
) -> Float[Array, " num_episodes"]:
    """Undiscounted returns of new episodes of an agent; see `evaluate`."""
    hint = "use jax.vmap(lambda key: ppo.evaluate(config, state, key))(keys)"
    key = as_key(key, "evaluate", hint)
    num_episodes = whole_number("num_episodes", num_episodes, 1)
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
        total=jnp.zeros(num_episodes, jnp.float32),
        over=jnp.zeros(num_episodes, bool),
    )
    last = jax.lax.while_loop(lambda now: (now.steps < limit) & ~jnp.all(now.over), step, first)
    return jnp.where(last.over, last.total, jnp.nan) if max_steps is None else last.total


def _step_limit(max_steps: int | None, environment: Environment) -> Any:
    if max_steps is not None:
        return whole_number("max_steps", max_steps, 1)
    if environment.max_episode_steps is None:
        return MAX_STEPS_WITHOUT_LIMIT
    # Some environments end episodes one step after their limit: time > limit, or a limit of 99.5.
    return environment.max_episode_steps + 1
