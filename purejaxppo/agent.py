"""A trained policy, for use in your own loop."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from purejaxppo.checks import is_traced
from purejaxppo.config import Config
from purejaxppo.distributions import draw_noise, make_policy
from purejaxppo.envs import make_environment
from purejaxppo.inputs import (
    as_key,
    check_carry,
    check_config,
    check_fits,
    check_obs,
    check_start,
    check_state,
    whole_number,
)
from purejaxppo.networks import make_network
from purejaxppo.normalize import normalize_obs, reward_scale
from purejaxppo.types import Environment, KeyLike, PyTree, TrainState


class Act(Protocol):
    """`Agent.act`."""

    def __call__(
        self,
        key: KeyLike,
        obs: ArrayLike,
        carry: PyTree,
        deterministic: bool | Bool[Array, ""] = False,
        start: ArrayLike | None = None,
    ) -> tuple[Array, PyTree]: ...


class Agent(NamedTuple):
    """A policy and its critic with the normaliser included; `n` is any number of rows from 1."""

    initial_carry: Any
    """`n -> carry`, at the start of an episode; `()` for a feed-forward network."""
    act: Act
    """`(key, obs[n, ...], carry, deterministic=False, start=None) -> (action[n, ...], carry)`.

    Actions are what the environment takes: clipped or squashed to its bounds. `deterministic` may
    be traced; the key is not read where it is True. Where `start[n]` is set, the row's carry is
    reset before its observation is read. Raises `ConfigError` if a shape does not fit."""
    value: Any
    """`(obs[n, ...], carry) -> value[n]`: the discounted return the critic expects from here, in
    units of the environment's reward. `carry` is the one `act` would be given with `obs`. Raises
    `ConfigError` if a shape does not fit."""


def make_agent(config: Config, state: TrainState, env: Any = None, env_params: Any = None) -> Agent:
    """Make the agent of a trained state of one seed.

    Of a state with a leading axis of seeds, take one: `jax.tree.map(lambda x: x[0], states)`.

    Args:
        env: the object passed to training in place of a name, if one was.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: if the environment does not exist, its spaces do not fit the config, or the
            state is of several seeds or of a config that makes other shapes.
    """
    check_config(config, "make_agent")
    return agent_in(make_environment(config, env, env_params), config, state)


def agent_in(
    environment: Environment, config: Config, state: TrainState, function: str = "make_agent"
) -> Agent:
    """`make_agent` for an environment that was made already; errors name `function`."""
    hint = "take one, jax.tree.map(lambda x: x[0], states), or use jax.vmap over them"
    check_state(state, function, hint)
    policy = make_policy(config, environment.action_space)
    network = make_network(config, environment.observation_space, policy)
    learner = state.learner
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    check_fits("state.learner.params", learner.params, shapes)
    one_row = jax.eval_shape(lambda: network.initial_carry(1))
    obs_shape = tuple(environment.observation_space.shape)

    def apply(obs: Array, carry: PyTree, start: Array) -> tuple[PyTree, Array, Array]:
        inputs = normalize_obs(learner.obs_stats, obs)
        carry, outputs, value = network.apply(learner.params, carry, inputs[None], start[None])
        return carry, outputs[0], value[0]

    def act(
        key: KeyLike,
        obs: ArrayLike,
        carry: PyTree,
        deterministic: bool | Bool[Array, ""] = False,
        start: ArrayLike | None = None,
    ) -> tuple[Array, PyTree]:
        rows = jnp.asarray(obs)
        check_obs(rows, obs_shape, "act")
        n = rows.shape[0]
        check_carry(carry, one_row, n, "act")
        starts = jnp.zeros(n, bool) if start is None else jnp.asarray(start, bool)
        check_start(starts, n, "act")
        carry, outputs, _ = apply(rows, carry, starts)

        def sample() -> Array:
            one_key = as_key(key, "act", "pass one for all rows of obs")
            return policy.sample(outputs, draw_noise(policy, jax.random.split(one_key, n)))

        if is_traced(deterministic):
            mode = policy.distribution(outputs).mode()
            action = jnp.where(deterministic, mode, sample())
        else:
            action = policy.distribution(outputs).mode() if deterministic else sample()
        return policy.to_env(action), carry

    def value(obs: ArrayLike, carry: PyTree) -> Float[Array, " n"]:
        rows = jnp.asarray(obs)
        check_obs(rows, obs_shape, "value")
        n = rows.shape[0]
        check_carry(carry, one_row, n, "value")
        scaled = apply(rows, carry, jnp.zeros(n, bool))[2]
        return scaled * reward_scale(learner.reward_stats)

    def initial_carry(n: int) -> PyTree:
        return network.initial_carry(whole_number("n", n, 1))

    return Agent(initial_carry, act, value)
