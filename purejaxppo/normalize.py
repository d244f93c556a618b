"""Running statistics, and normalisation of observations and rewards by them.

Statistics are initialised from one rollout with the initial parameters. They are frozen during each
rollout and its update, and refreshed afterwards, so the network sees the same inputs when it acts
and when it learns, and the first minibatch's probability ratio is exactly 1.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from purejaxppo.collectives import all_sum
from purejaxppo.config import HParams
from purejaxppo.envs.base import is_discrete, parts_of
from purejaxppo.masks import ACTION_MASK
from purejaxppo.types import Actor, ActorState, LearnerState, PyTree, Rollout, RunningStats

OBS_CLIP = 10.0
REWARD_CLIP = 10.0
_EPSILON = 1e-8


def init_stats(shape: tuple[int, ...]) -> RunningStats:
    """Statistics before the first sample: mean 0 and variance 1."""
    zeros, ones = (partial(make, dtype=jnp.float32) for make in (jnp.zeros, jnp.ones))
    return RunningStats(zeros(()), zeros(shape), ones(shape))


def update_stats(
    stats: RunningStats, samples: Array, mask: Array, axis: str | None = None
) -> RunningStats:
    """Add `samples[T, N, ...]` of all devices along `axis`, each weighted by `mask[T, N]`, to the
    moments.

    The parallel form of Welford's algorithm (Chan, Golub and LeVeque 1983, eq. 2.1), which stays
    precise if the mean is much larger than the standard deviation. Variances are population
    variances (divided by the count).
    """
    samples = samples.astype(jnp.float32)
    weight = mask.reshape(mask.shape + (1,) * (samples.ndim - mask.ndim))
    axes = tuple(range(mask.ndim))
    batch_count = all_sum(jnp.sum(mask), axis)
    denominator = jnp.maximum(batch_count, 1.0)
    batch_mean = all_sum(jnp.sum(samples * weight, axes), axis) / denominator
    squares = jnp.sum(jnp.square(samples - batch_mean) * weight, axes)
    batch_var = all_sum(squares, axis) / denominator

    total = stats.total + batch_count
    share = batch_count / jnp.maximum(total, 1.0)
    delta = batch_mean - stats.mean
    mean = stats.mean + delta * share
    var = stats.var * (1 - share) + batch_var * share + jnp.square(delta) * share * (1 - share)
    return RunningStats(total, mean, var)


def init_obs_stats(space: Any) -> PyTree:
    """Statistics of observations; of a dictionary, those of its entries. Discrete observations and
    action masks have none."""
    parts = parts_of(space)
    if isinstance(parts, dict):
        return {
            name: () if name == ACTION_MASK else init_obs_stats(part)
            for name, part in parts.items()
        }
    return () if is_discrete(parts) else init_stats(tuple(parts.shape))


def normalize_obs(stats: PyTree, obs: PyTree) -> PyTree:
    """Subtract the mean from `obs[..., *shape]`, divide by the standard deviation, clip to +-10.

    With empty statistics (normalisation disabled), return `obs` unchanged. The entries of a
    dictionary have their own statistics.
    """
    if isinstance(stats, dict):
        return {name: normalize_obs(stats[name], x) for name, x in obs.items()}
    if not isinstance(stats, RunningStats):
        return obs
    scaled = (obs.astype(jnp.float32) - stats.mean) * jax.lax.rsqrt(stats.var + _EPSILON)
    return jnp.clip(scaled, -OBS_CLIP, OBS_CLIP)


def reward_scale(stats: RunningStats | tuple[()]) -> Array:
    """Value of one unit of scaled reward in units of the environment's reward."""
    if not isinstance(stats, RunningStats):
        return jnp.ones((), jnp.float32)
    return jnp.sqrt(stats.var + _EPSILON)


def scale_reward(stats: RunningStats | tuple[()], reward: Float[Array, "T N"]) -> Array:
    """Divide rewards by the standard deviation of the discounted return, clipped to +-10. They are
    not shifted, which would change the task if episodes differ in length."""
    if not isinstance(stats, RunningStats):
        return reward
    return jnp.clip(reward / reward_scale(stats), -REWARD_CLIP, REWARD_CLIP)


def discounted_returns(
    running: Float[Array, " N"],
    reward: Float[Array, "T N"],
    done: Bool[Array, "T N"],
    gamma: Array | float,
) -> tuple[Float[Array, " N"], Float[Array, "T N"]]:
    """The running return `R_t = gamma R_{t-1} + r_t`, reset to 0 after (not before) a done step.

    Returns:
        the running return after the last step, and the returns of each step.
    """

    def step(running: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, done = inputs
        total = gamma * running + reward
        return jnp.where(done, 0.0, total), total

    return jax.lax.scan(step, running, (reward, done))


def refresh_statistics(
    learner: LearnerState,
    actors: ActorState,
    raw: Rollout,
    hparams: HParams,
    axis: str | None = None,
) -> tuple[LearnerState, ActorState]:
    """Add a rollout to the running statistics that the config enables. Its observations and rewards
    are those of the environment, not normalised."""
    learner = learner._replace(obs_stats=_refreshed(learner.obs_stats, raw.obs, raw.mask, axis))
    if isinstance(learner.reward_stats, RunningStats):
        done = raw.terminated | raw.truncated
        running, returns = discounted_returns(
            actors.discounted_return, raw.reward, done, hparams.gamma
        )
        actors = actors._replace(discounted_return=running)
        learner = learner._replace(
            reward_stats=update_stats(learner.reward_stats, returns, raw.mask, axis)
        )
    return learner, actors


def _refreshed(stats: PyTree, obs: PyTree, mask: Array, axis: str | None) -> PyTree:
    if isinstance(stats, dict):
        return {name: _refreshed(each, obs[name], mask, axis) for name, each in stats.items()}
    return update_stats(stats, obs, mask, axis) if isinstance(stats, RunningStats) else stats


def first_statistics(
    learner: LearnerState,
    actors: ActorState,
    actor: Actor,
    hparams: HParams,
    *,
    data: PyTree = (),
    axis: str | None = None,
) -> LearnerState:
    """Initial statistics, from one rollout with the initial parameters. Its N * T environment steps
    are not counted. Non-finite statistics are discarded."""
    _, raw = actor.collect(learner._replace(obs_stats=()), actors, hparams, data)
    measured, _ = refresh_statistics(learner, actors, raw, hparams, axis)
    new, old = ((each.obs_stats, each.reward_stats) for each in (measured, learner))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]))
    obs_stats, reward_stats = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
    return learner._replace(obs_stats=obs_stats, reward_stats=reward_stats)
