"""A trained policy, for anyone's loop."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from purejaxppo.config import Config, ConfigError
from purejaxppo.distributions import draw_noise, make_policy
from purejaxppo.envs import make_environment
from purejaxppo.networks import make_network
from purejaxppo.normalize import normalize_obs, reward_scale
from purejaxppo.types import Environment, PyTree, TrainState


class Act(Protocol):
    """`Agent.act`."""

    def __call__(
        self,
        key: Key[Array, ""],
        obs: Array,
        carry: PyTree,
        deterministic: bool = False,
        start: Bool[Array, " n"] | None = None,
    ) -> tuple[Array, PyTree]: ...


class Agent(NamedTuple):
    """A policy and its critic with the normaliser included; `n` is any number of rows."""

    initial_carry: Any
    """`n -> carry`, at the start of an episode; `()` for a feed-forward network."""
    act: Act
    """`(key, obs[n, ...], carry, deterministic=False, start=None) -> (action[n, ...], carry)`.

    Actions are what the environment takes: clipped or squashed to its bounds. Where `start[n]`
    is set, the row's carry is reset before its observation is read."""
    value: Any
    """`(obs[n, ...], carry) -> value[n]`: the discounted return the critic expects from here, in
    units of the environment's reward. `carry` is the one `act` would be given with `obs`."""


def make_agent(config: Config, state: TrainState, env: Any = None, env_params: Any = None) -> Agent:
    """The agent of a training's state, of one seed.

    Of a state with a leading axis of seeds, take one: `jax.tree.map(lambda x: x[0], states)`.

    Args:
        env: the object passed to training in place of a name, if one was.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: if the environment does not exist, or its spaces do not fit the config.
    """
    return agent_in(make_environment(config, env, env_params), config, state)


def agent_in(environment: Environment, config: Config, state: TrainState) -> Agent:
    """`make_agent` for an environment at hand."""
    if state.learner.updates.ndim:
        raise ConfigError(
            f"state: its leaves have a leading axis of {len(state.learner.updates)} seeds; take "
            "one, jax.tree.map(lambda x: x[0], states), or vmap over them"
        )
    policy = make_policy(config, environment.action_space)
    network = make_network(config, environment.observation_space, policy)
    learner = state.learner

    def apply(obs: Array, carry: PyTree, start: Array) -> tuple[PyTree, Array, Array]:
        inputs = normalize_obs(learner.obs_stats, obs)
        carry, outputs, value = network.apply(learner.params, carry, inputs[None], start[None])
        return carry, outputs[0], value[0]

    def act(
        key: Key[Array, ""],
        obs: Array,
        carry: PyTree,
        deterministic: bool = False,
        start: Bool[Array, " n"] | None = None,
    ) -> tuple[Array, PyTree]:
        obs = jnp.asarray(obs)
        n = obs.shape[0]
        start = jnp.zeros(n, bool) if start is None else start
        carry, outputs, _ = apply(obs, carry, start)
        if deterministic:
            action = policy.distribution(outputs).mode()
        else:
            action = policy.sample(outputs, draw_noise(policy, jax.random.split(key, n)))
        return policy.to_env(action), carry

    def value(obs: Array, carry: PyTree) -> Float[Array, " n"]:
        obs = jnp.asarray(obs)
        scaled = apply(obs, carry, jnp.zeros(obs.shape[0], bool))[2]
        return scaled * reward_scale(learner.reward_stats)

    return Agent(network.initial_carry, act, value)
