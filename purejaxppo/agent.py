"""A trained policy, for use in your own loop."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from purejaxppo.checks import is_traced
from purejaxppo.distributions import draw_noise
from purejaxppo.envs.base import named_parts, obs_shapes
from purejaxppo.inputs import (
    as_key,
    check_carry,
    check_fits,
    check_obs,
    check_start,
    check_state,
    whole_number,
)
from purejaxppo.normalize import normalize_obs, reward_scale
from purejaxppo.types import Environment, KeyLike, Network, Policy, PyTree, TrainState


class Act(Protocol):
    """Signature of `Agent.act`."""

    def __call__(
        self,
        key: KeyLike,
        obs: PyTree,
        carry: PyTree,
        deterministic: bool | Bool[Array, ""] = False,
        start: ArrayLike | None = None,
    ) -> tuple[Array, PyTree]: ...


class Agent(NamedTuple):
    """A policy and its critic, including the normaliser; `n` is any number of rows from 1."""

    initial_carry: Any
    """`n -> carry`, at the start of an episode; `()` for a feed-forward network."""
    act: Act
    """`(key, obs[n, ...], carry, deterministic=False, start=None) -> (action[n, ...], carry)`.

    Actions are clipped or squashed to the environment's bounds. `deterministic` may be traced; the
    key is not used if it is True. Where `start[n]` is set, the row's carry is reset before its
    observation is read. Raises `ConfigError` if a shape does not fit."""
    value: Any
    """`(obs[n, ...], carry) -> value[n]`: the critic's estimate of the discounted return, in units
    of the environment's reward. `carry` is the same as for `act` with `obs`. Raises `ConfigError`
    if a shape does not fit."""
    obs: PyTree
    """Shapes and types of one observation, leaves `[1, ...]`."""


def agent_of(
    env: Environment,
    policy: Policy,
    network: Network,
    state: TrainState,
    function: str = "make_agent",
) -> Agent:
    """Make the agent of a trained state of one seed; errors name `function`.

    Raises:
        ConfigError: if the state is of several seeds, or has different shapes.
    """
    hint = "select one with jax.tree.map(lambda x: x[0], states), or use jax.vmap"
    check_state(state, function, hint)
    learner = state.learner
    made = jax.eval_shape(network.init, jax.random.key(0))
    check_fits("state.learner.params", learner.params, made)
    one_row = jax.eval_shape(lambda: network.initial_carry(1))
    shapes = obs_shapes(env.observation_space)

    def apply(obs: PyTree, carry: PyTree, start: Array) -> tuple[PyTree, Array, Array]:
        inputs = jax.tree.map(lambda x: x[None], normalize_obs(learner.obs_stats, obs))
        carry, policy_outputs, value = network.apply(learner.params, carry, inputs, start[None])
        return carry, policy_outputs[0], value[0]

    def checked(obs: PyTree, carry: PyTree, function: str) -> tuple[PyTree, Any]:
        rows = jax.tree.map(jnp.asarray, named_parts(obs))
        n = check_obs(rows, shapes, function)
        check_carry(carry, one_row, n, function)
        return rows, n

    def act(
        key: KeyLike,
        obs: PyTree,
        carry: PyTree,
        deterministic: bool | Bool[Array, ""] = False,
        start: ArrayLike | None = None,
    ) -> tuple[Array, PyTree]:
        rows, n = checked(obs, carry, "act")
        starts = jnp.zeros(n, bool) if start is None else jnp.asarray(start, bool)
        check_start(starts, n, "act")
        carry, policy_outputs, _ = apply(rows, carry, starts)

        return policy.to_env(_choose(policy, policy_outputs, key, deterministic)), carry

    def value(obs: PyTree, carry: PyTree) -> Float[Array, " n"]:
        rows, n = checked(obs, carry, "value")
        scaled = apply(rows, carry, jnp.zeros(n, bool))[2]
        return scaled * reward_scale(learner.reward_stats)

    def initial_carry(n: int) -> PyTree:
        return network.initial_carry(whole_number("n", n, 1))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return Agent(initial_carry, act, value, jax.eval_shape(env.reset, keys)[1])


def _choose(
    policy: Policy, policy_outputs: Array, key: KeyLike, deterministic: bool | Array
) -> Array:
    """The mode of the policy if `deterministic`, else a sample; `key` is not read for the mode."""

    def sample() -> Array:
        one_key = as_key(key, "act", "pass one for all rows of obs")
        keys = jax.random.split(one_key, policy_outputs.shape[0])
        return policy.sample(policy_outputs, draw_noise(policy, keys))

    def mode() -> Array:
        return policy.distribution(policy_outputs).mode()

    if is_traced(deterministic):
        return jnp.where(deterministic, mode(), sample())
    return mode() if deterministic else sample()
