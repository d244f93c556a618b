"""Collects rollouts from the environments."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from purejaxppo.collectives import own_rows
from purejaxppo.config import Config
from purejaxppo.distributions import draw_noise
from purejaxppo.envs.base import split_each
from purejaxppo.networks import parts_in_cache
from purejaxppo.normalize import normalize_obs
from purejaxppo.types import (
    Actor,
    ActorState,
    Environment,
    LearnerState,
    Network,
    Policy,
    PyTree,
    Rollout,
    TimeStep,
)


def first_steps(env: Environment, network: Network, keys: Key[Array, " N"]) -> ActorState:
    """Reset all environments, each with its own key."""
    keys, reset_keys = split_each(keys)
    env_state, obs = env.reset(reset_keys)
    zeros = jnp.zeros(keys.shape, jnp.float32)
    return ActorState(
        keys=keys,
        env_state=env_state,
        obs=obs,
        start=jnp.ones(keys.shape, bool),
        carry=network.initial_carry(keys.shape[0]),
        episode_return=zeros,
        episode_length=zeros.astype(jnp.int32),
        discounted_return=zeros,
    )


def make_actor(
    config: Config,
    env: Environment,
    network: Network,
    policy: Policy,
    *,
    keep_outputs: bool = False,
    axis: str | None = None,
) -> Actor:
    """Make the actor that steps N environments with the learner's policy.

    On several devices, each steps its own environments. The scan over time contains only what
    depends on the previous step: the policy's outputs and the environment. Log-probabilities and
    values are computed afterwards for all steps, by the same call as in the loss. Observations and
    rewards are returned as the environment gave them.

    Args:
        keep_outputs: store the policy's outputs in rollouts.
    """
    stepper = Stepper(config, env, network, policy, keep_outputs, axis)
    return Actor(stepper.init, stepper.collect)


class Stepper(NamedTuple):
    """N environments stepped by a policy."""

    config: Config
    env: Environment
    network: Network
    policy: Policy
    keep_outputs: bool
    axis: str | None

    def init(self, key: Key[Array, ""], hparams: Any, data: PyTree) -> ActorState:
        own = own_rows(jax.random.split(key, self.config.num_envs), self.axis)
        return first_steps(self.env, self.network, own)

    def collect(
        self, learner: LearnerState, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Rollout]:
        keys, *draws = draw(self.config, self.policy, actors.keys)
        return self.rollout(learner, actors._replace(keys=keys), tuple(draws))

    def rollout(
        self, learner: LearnerState, actors: ActorState, inputs: PyTree
    ) -> tuple[ActorState, Rollout]:
        """Scan `step` over inputs `[T, ...]`, and evaluate the policy and the critic on all steps
        at once."""
        step = partial(self.step, learner)
        moved, (raw_obs, action, cut_value, result) = jax.lax.scan(step, actors, inputs)
        obs = normalize_obs(learner.obs_stats, raw_obs)
        done = result.terminated | result.truncated
        start = jnp.concatenate([actors.start[None], done[:-1]])

        whole = self.network.sequential
        num_parts = 1 if whole else parts_in_cache(self.network, start.size, self.config.num_steps)
        replay = partial(self.replay, learner.params, actors.carry)
        log_prob, value, policy_outputs = in_parts(replay, (obs, start, action), num_parts)
        last_obs = _one_step(normalize_obs(learner.obs_stats, moved.obs))
        _, _, last_value = self.network.apply(
            learner.params, moved.carry, last_obs, moved.start[None]
        )
        following = jnp.concatenate([value[1:], last_value])
        rollout = Rollout(
            obs=raw_obs,
            start=start,
            action=action,
            log_prob=log_prob,
            value=value,
            next_value=jnp.where(done, cut_value, following),
            reward=result.reward,
            terminated=result.terminated,
            truncated=result.truncated,
            mask=jnp.ones_like(value),
            carry=actors.carry,
            policy_outputs=policy_outputs,
        )
        return moved, rollout

    def step(
        self, learner: LearnerState, actors: ActorState, draws: tuple[Array, Array]
    ) -> tuple[ActorState, Any]:
        """One step of all environments."""
        step_keys, noise = draws
        obs = _one_step(normalize_obs(learner.obs_stats, actors.obs))
        carry, policy_outputs, _ = self.network.apply(
            learner.params, actors.carry, obs, actors.start[None]
        )
        action = self.policy.sample(policy_outputs[0], noise)
        env_state, result = self.env.step(step_keys, actors.env_state, self.policy.to_env(action))
        if not self.config.bootstrap_time_limits:
            result = result._replace(terminated=result.terminated | result.truncated)
        cut_value = truncation_value(self.network, learner, carry, result)
        done = result.terminated | result.truncated
        moved = actors._replace(env_state=env_state, obs=result.obs, start=done, carry=carry)
        return moved, (actors.obs, action, cut_value, result)

    def replay(self, params: PyTree, carry: PyTree, steps: Any) -> tuple[Array, Array, Any]:
        """Log-probabilities, values and policy outputs of steps `(obs, start, action)`."""
        obs, start, action = steps
        _, policy_outputs, value = self.network.apply(params, carry, obs, start)
        log_prob = jnp.asarray(self.policy.distribution(policy_outputs).log_prob(action))
        return log_prob, value, policy_outputs if self.keep_outputs else ()


def _one_step(obs: PyTree) -> PyTree:
    """Observations `[N, ...]` as sequences of one step `[1, N, ...]`."""
    return jax.tree.map(lambda x: x[None], obs)


def draw(config: Config, policy: Policy, keys: Key[Array, " N"]) -> tuple[Array, Array, Array]:
    """Draw all random numbers of a rollout, from one key per environment.

    Returns:
        the keys of the next rollout `[N]`, keys for the environment `[T, N]`, noise `[T, N, ...]`.
    """
    split = jax.vmap(lambda key: jax.random.split(key, 1 + 2 * config.num_steps), out_axes=1)(keys)
    next_keys, rest = split[0], split[1:]
    step_keys, noise_keys = rest[: config.num_steps], rest[config.num_steps :]
    return next_keys, step_keys, draw_noise(policy, noise_keys)


def in_parts(
    function: Callable[[Any], Any], steps: tuple[Any, ...], num_parts: int, axis: int = 0
) -> Any:
    """Apply `function`, which maps `[T, N, ...]` to `[T, N, ...]`, to `steps`; on CPU, in equal
    parts along time, or along the rows if `axis` is 1."""
    if num_parts == 1:
        return function(steps)

    def divide(x: Array) -> Array:
        each = (*x.shape[:axis], num_parts, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(each), axis, 0)

    def join(x: Array) -> Array:
        moved = jnp.moveaxis(x, 0, axis)
        return moved.reshape((*moved.shape[:axis], -1, *moved.shape[axis + 2 :]))

    def mapped(steps: Any) -> Any:
        return jax.tree.map(join, jax.lax.map(function, jax.tree.map(divide, steps)))

    return jax.lax.platform_dependent(steps, cpu=mapped, default=function)


def truncation_value(
    network: Network, learner: LearnerState, carry: Any, result: TimeStep
) -> Array:
    """Values `[N]` of `final_obs`, computed only in steps in which an episode is truncated."""
    cut: Bool[Array, " N"] = result.truncated & ~result.terminated

    def value() -> Array:
        obs = _one_step(normalize_obs(learner.obs_stats, result.final_obs))
        return network.apply(learner.params, carry, obs, jnp.zeros_like(cut)[None])[2][0]

    return jax.lax.cond(jnp.any(cut), value, lambda: jnp.zeros_like(result.reward))
