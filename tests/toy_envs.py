"""Environments with known closed-form solutions and gymnax 1.x's interface."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams

import purejaxppo as ppo


@struct.dataclass
class Clock:
    time: jax.Array
    key: jax.Array


@struct.dataclass
class Params(EnvParams):
    max_steps_in_episode: int = 5


class ConstantChain(Environment):
    """Reward 1 forever; only a time limit ends an episode: V = 1 / (1 - gamma)."""

    @property
    def default_params(self) -> Params:
        return Params()

    def step_env(self, key: jax.Array, state: Clock, action: jax.Array, params: Params) -> Any:
        state = state.replace(time=state.time + 1)
        return self.get_obs(state), state, jnp.float32(1), jnp.bool_(False), {}

    def reset_env(self, key: jax.Array, params: Params) -> Any:
        state = Clock(time=jnp.int32(0), key=key)
        return self.get_obs(state), state

    def get_obs(self, state: Clock, params: Any = None, key: Any = None) -> jax.Array:
        return jnp.ones(2)

    def action_space(self, params: Params) -> Any:
        return spaces.Discrete(2)

    def observation_space(self, params: Params) -> Any:
        return spaces.Box(0, 1, (2,))


class Unending(ConstantChain):
    """States a limit of 5 steps but does not apply it."""

    def is_truncated(self, state: Clock, params: Params) -> jax.Array:
        return jnp.bool_(False)


class Countdown(ConstantChain):
    """`ConstantChain`, but episodes terminate after 5 steps, and the observation is the step."""

    def step_env(self, key: jax.Array, state: Clock, action: jax.Array, params: Params) -> Any:
        obs, state, reward, _, info = super().step_env(key, state, action, params)
        return obs, state, reward, state.time >= 5, info

    def is_truncated(self, state: Clock, params: Params) -> jax.Array:
        return jnp.bool_(False)

    def get_obs(self, state: Clock, params: Any = None, key: Any = None) -> jax.Array:
        return jax.nn.one_hot(state.time, 5)

    def observation_space(self, params: Params) -> Any:
        return spaces.Box(0, 1, (5,))


class Combination(ConstantChain):
    """A bandit over pairs of choices: reward 1 for (2, 1), else 0; episodes of one step."""

    def step_env(self, key: jax.Array, state: Clock, action: jax.Array, params: Params) -> Any:
        state = state.replace(time=state.time + 1)
        reward = jnp.all(action == jnp.array([2, 1])).astype(jnp.float32)
        return self.get_obs(state), state, reward, jnp.bool_(True), {}

    def action_space(self, params: Params) -> Any:
        return ppo.MultiDiscrete((3, 2))


class Target(ConstantChain):
    """A bandit over actions in [-2, 2]: reward -(a - 1)^2, whose best action is 1. An action
    out of bounds has a reward of -100."""

    def step_env(self, key: jax.Array, state: Clock, action: jax.Array, params: Params) -> Any:
        state = state.replace(time=state.time + 1)
        reward = jnp.where(jnp.abs(action[0]) <= 2.0, -jnp.square(action[0] - 1.0), -100.0)
        return self.get_obs(state), state, reward, jnp.bool_(True), {}

    def action_space(self, params: Params) -> Any:
        return spaces.Box(-2.0, 2.0, (1,))


class RandomWalk(ConstantChain):
    """Ends at random, by termination or the time limit or both at once. Rewards and observations
    differ between steps: for tests of bookkeeping."""

    def step_env(self, key: jax.Array, state: Clock, action: jax.Array, params: Params) -> Any:
        state = state.replace(time=state.time + 1)
        reward = jax.random.normal(key) + action
        return self.get_obs(state), state, reward, jax.random.bernoulli(key, 0.2), {}

    def reset_env(self, key: jax.Array, params: Params) -> Any:
        state = Clock(time=jnp.int32(0), key=jax.random.key_data(key))
        return self.get_obs(state), state

    def get_obs(self, state: Clock, params: Any = None, key: Any = None) -> jax.Array:
        return jnp.stack([state.time, (state.key[0] % 1000) / 100.0]).astype(jnp.float32)

    def observation_space(self, params: Params) -> Any:
        return spaces.Box(-jnp.inf, jnp.inf, (2,))


class Poisoned(RandomWalk):
    """Its reward is NaN from the third step of episodes whose key is odd."""

    def step_env(self, key: jax.Array, state: Clock, action: jax.Array, params: Params) -> Any:
        obs, state, reward, terminated, info = super().step_env(key, state, action, params)
        bad = (state.key[0] % 2 == 1) & (state.time > 2)
        return obs, state, jnp.where(bad, jnp.nan, reward), terminated, info


class Tabular(ConstantChain):
    """A random Markov decision process of 4 states and 3 actions, whose episodes terminate at
    random, or after `LIMIT` steps; the observation is the state."""

    STATES, ACTIONS, LIMIT = 4, 3, 6

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        # One more state: the end of the episode.
        shape = (self.STATES, self.ACTIONS, self.STATES + 1)
        self.transition = rng.dirichlet(np.full(shape[-1], 0.5), shape[:2])
        self.reward = rng.normal(0.5, 1.0, shape[:2])
        self.first = rng.dirichlet(np.ones(self.STATES))

    @property
    def default_params(self) -> Params:
        return Params(max_steps_in_episode=self.LIMIT)

    def step_env(self, key: jax.Array, state: Any, action: jax.Array, params: Params) -> Any:
        at = state.key
        following = jax.random.choice(
            key, self.STATES + 1, p=jnp.asarray(self.transition)[at, action]
        )
        reward = jnp.asarray(self.reward, jnp.float32)[at, action]
        state = Clock(time=state.time + 1, key=jnp.minimum(following, self.STATES - 1))
        ended = (following == self.STATES) | (state.time >= self.LIMIT)
        return self.get_obs(state), state, reward, ended, {}

    def reset_env(self, key: jax.Array, params: Params) -> Any:
        at = jax.random.choice(key, self.STATES, p=jnp.asarray(self.first))
        state = Clock(time=jnp.int32(0), key=at)
        return self.get_obs(state), state

    def is_truncated(self, state: Clock, params: Params) -> jax.Array:
        return jnp.bool_(False)

    def get_obs(self, state: Clock, params: Any = None, key: Any = None) -> jax.Array:
        return state.key

    def action_space(self, params: Params) -> Any:
        return spaces.Discrete(self.ACTIONS)

    def observation_space(self, params: Params) -> Any:
        return spaces.Discrete(self.STATES)
