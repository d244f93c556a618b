"""REINFORCE: rollouts of whole episodes, their returns, and the baselines."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from purejaxppo.collect import first_steps
from purejaxppo.collectives import all_sum
from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.envs.base import is_discrete
from purejaxppo.objectives.base import Objective
from purejaxppo.types import (
    Actor,
    ActorState,
    Advantage,
    Environment,
    LearnerState,
    Network,
    Policy,
    PyTree,
    Rollout,
)

Steps = Float[Array, "T N"]


def whole_episode_actor(
    config: Config, objective: Objective, env: Environment, network: Network, actor: Actor
) -> Actor:
    """Wrap `actor`: rollouts start with new episodes, and the mask is 1 for complete ones.

    Raises:
        ConfigError: if the time limit is longer than a rollout, or the baseline cannot be computed
            for these observations.
    """
    limit = env.max_episode_steps
    if limit is not None and not isinstance(limit, Tracer) and config.num_steps < limit:
        raise ConfigError(
            f"num_steps = {config.num_steps}: objective = {objective.name} learns from whole "
            f"episodes, and {config.env_id} has a time limit of {limit} steps; use at least that "
            "many, or objective = a2c, which bootstraps from its critic"
        )
    if objective.needs_policy_outputs and not is_discrete(env.observation_space):
        raise ConfigError(
            f"baseline = optimal: needs discrete observations, but those of {config.env_id} are "
            f"{env.observation_space}, not Discrete; choose value or mean"
        )

    def collect(
        learner: LearnerState, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Rollout]:
        actors = first_steps(env, network, actors.keys)
        actors, rollout = actor.collect(learner, actors, hparams, data)
        return actors, rollout._replace(mask=whole_episodes(rollout, limit))

    return Actor(actor.init, collect)


def steps_into_episode(rollout: Rollout) -> Int[Array, "T N"]:
    """Steps since the start of the episode, in a rollout that starts with new episodes."""
    t = jnp.arange(rollout.start.shape[0])[:, None]
    return t - jax.lax.cummax(jnp.where(rollout.start, t, 0), axis=0)


def whole_episodes(rollout: Rollout, limit: Any) -> Float[Array, "T N"]:
    """Mask of the steps to learn from: 1 in complete episodes that were certain to end in time.

    The rollout must start with new episodes. Counting every episode that happens to end within it
    would favour short ones. Episodes that begin at least `limit` steps (the time limit) before the
    rollout's end always end within it. Their number is a stopping time, so the expectation of a sum
    over them is that of one episode times that of their number (Wald's equation). Without a limit,
    all episodes that end are counted.
    """
    done = rollout.terminated | rollout.truncated
    ends = jnp.cumsum(done[::-1], axis=0)[::-1] > 0
    if limit is None:
        return ends.astype(jnp.float32)
    num_steps = done.shape[0]
    began = jnp.arange(num_steps)[:, None] - steps_into_episode(rollout)
    return (ends & (began <= num_steps - limit)).astype(jnp.float32)


def reward_to_go(rollout: Rollout, gamma: Any) -> Steps:
    """G_t = r_t + gamma G_{t+1}, up to the end of the episode."""
    continues = 1.0 - (rollout.terminated | rollout.truncated)

    def step(following: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, continues = inputs
        total = reward + gamma * continues * following
        return total, total

    return jax.lax.scan(
        step, jnp.zeros_like(rollout.reward[0]), (rollout.reward, continues), reverse=True
    )[1]


def make_episode_advantage(
    config: Config,
    objective: Objective,
    policy: Policy,
    observation_space: Any,
    axis: str | None = None,
) -> Advantage:
    """Make the estimator of the REINFORCE objectives: returns minus a baseline.

    The gradient of E[sum_t gamma^t r_t] is E[sum_t gamma^t grad log pi(a_t|s_t) (G_t - b(s_t))]
    with the reward-to-go G_t (Williams 1992; Sutton et al. 1999), for any b that does not depend on
    a_t. Without `causality`, G_0 replaces gamma^t G_t, which only adds variance. Without
    `discount_weight`, the factor gamma^t is left out.
    """
    kind = config.baseline if "baseline" in objective.reads else "none"
    baseline = _make_baseline(kind, policy, observation_space, axis)

    def advantage(rollout: Rollout, hparams: HParams) -> tuple[Steps, Steps]:
        to_go, elapsed = reward_to_go(rollout, hparams.gamma), steps_into_episode(rollout)
        total = to_go
        if not config.causality:
            began = jnp.arange(to_go.shape[0])[:, None] - elapsed
            total = jnp.take_along_axis(to_go, began, axis=0)
        weight = jnp.ones_like(to_go)
        if config.discount_weight:
            weight = jnp.asarray(hparams.gamma, jnp.float32) ** elapsed
        return weight * (total - baseline(rollout, total, weight)), to_go

    return advantage


Baseline = Callable[[Rollout, Steps, Steps], Array | float]
"""`(rollout, returns, weight of each step) -> baseline`."""


def _make_baseline(kind: str, policy: Policy, observation_space: Any, axis: str | None) -> Baseline:
    def mean(rollout: Rollout, total: Steps, weight: Steps) -> Array:
        """Mean over the other environments: an episode's own return depends on its actions."""
        sums = jnp.sum(total * rollout.mask, axis=0), jnp.sum(rollout.mask, axis=0)
        returns, steps = (sum_of_others(x, axis) for x in sums)
        return returns / jnp.maximum(steps, 1.0)

    def optimal(rollout: Rollout, total: Steps, weight: Steps) -> Array:
        fallback, count = mean(rollout, total, weight), observation_space.n
        return optimal_baseline(policy, count, rollout, total, weight, fallback=fallback, axis=axis)

    baselines: dict[str, Baseline] = {
        "none": lambda rollout, total, weight: 0.0,
        "mean": mean,
        "value": lambda rollout, total, weight: rollout.value,
        "optimal": optimal,
    }
    return baselines[kind]


def sum_of_others(values: Float[Array, "*batch N"], axis: str | None) -> Float[Array, "*batch N"]:
    """For each environment, the sum over all other environments, on all devices. It is not computed
    as the total minus the own value, since that loses precision if the own value dominates."""
    zeros = jnp.zeros_like(values[..., :1])
    before = jnp.concatenate([zeros, jnp.cumsum(values, axis=-1)[..., :-1]], axis=-1)
    back = jnp.cumsum(values[..., ::-1], axis=-1)[..., ::-1]
    after = jnp.concatenate([back[..., 1:], zeros], axis=-1)
    own = jnp.sum(values, axis=-1)
    elsewhere = jnp.zeros_like(own) if axis is None else all_sum(own, axis) - own
    return before + after + elsewhere[..., None]


def optimal_baseline(
    policy: Policy,
    num_observations: int,
    rollout: Rollout,
    total: Steps,
    weight: Steps,
    *,
    fallback: Float[Array, " N"],
    axis: str | None = None,
) -> Steps:
    """b(s) = E[|w g|^2 G | s] / E[|w g|^2 | s], estimated from the other environments' visits to s.

    g is the gradient of log pi(a|s) with respect to the policy's outputs, w the step's `weight`.
    Where the other environments did not visit s, the baseline is `fallback`. If the outputs are a
    table of parameters, this b(s) minimises the variance of each step's term; covariances between
    steps are ignored (Greensmith et al. 2004, "Variance reduction techniques for gradient
    estimates", theorem 8).
    """

    def log_prob(policy_outputs: Array) -> Array:
        return jnp.sum(jnp.asarray(policy.distribution(policy_outputs).log_prob(rollout.action)))

    squares = jnp.sum(jnp.square(jax.grad(log_prob)(rollout.policy_outputs)), axis=-1)
    squares = squares * jnp.square(weight) * rollout.mask
    num_envs = total.shape[1]
    cells = rollout.obs * num_envs + jnp.arange(num_envs)

    def by_state(values: Steps) -> Array:
        """For each observation, sums `[observations, N]` over the other environments' visits."""
        own = jax.ops.segment_sum(
            values.reshape(-1), cells.reshape(-1), num_observations * num_envs
        )
        return sum_of_others(own.reshape((num_observations, num_envs)), axis)

    sums, returns = by_state(squares), by_state(squares * total)
    found = jnp.where(sums > 1e-8, returns / jnp.maximum(sums, 1e-8), fallback)
    return jnp.take_along_axis(found, rollout.obs, axis=0)
