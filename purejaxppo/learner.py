"""Combines the parts into one `Learner(init, update)`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from purejaxppo.config import HParams, UpdateConfig
from purejaxppo.metrics import count_episodes, env_steps, explained_variance
from purejaxppo.normalize import (
    first_statistics,
    normalize_obs,
    refresh_statistics,
    scale_reward,
)
from purejaxppo.types import (
    MUST_BE_FINITE,
    Actor,
    Advantage,
    Batch,
    Improve,
    Learner,
    LearnerState,
    Metrics,
    PyTree,
    Rollout,
    TrainState,
)

# `fold_in(key, i)` is row i of `split(key)`; this index is beyond any split.
FIRST_STATISTICS = 2**31


def make_learner(
    config: UpdateConfig,
    *,
    actor: Actor,
    advantage: Advantage,
    improve: Improve,
    init_learner: Callable[[Key[Array, ""], HParams], LearnerState],
    axis: str | None = None,
) -> Learner:
    """Make the learner whose update collects a rollout, estimates advantages and improves.

    An update whose loss is not finite leaves the state unchanged.

    Args:
        init_learner: `(key, hparams) -> LearnerState`.
        axis: a mesh axis over which the environments are spread, for use under `jax.shard_map`:
            each device steps `num_envs / devices` of them, and all learn the same parameters.
    """

    def init(key: Key[Array, ""], hparams: HParams, data: PyTree = ()) -> TrainState:
        params_key, learner_key, envs_key = jax.random.split(key, 3)
        learner = init_learner(params_key, hparams)._replace(key=learner_key)
        if jax.tree.leaves((learner.obs_stats, learner.reward_stats)):
            actors = actor.init(jax.random.fold_in(key, FIRST_STATISTICS), hparams, data)
            learner = first_statistics(learner, actors, actor, hparams, data=data, axis=axis)
        return TrainState(learner, actor.init(envs_key, hparams, data))

    def update(
        state: TrainState, hparams: HParams, data: PyTree = ()
    ) -> tuple[TrainState, Metrics]:
        learner, actors = state
        actors, raw = actor.collect(learner, actors, hparams, data)
        rollout = raw._replace(
            obs=normalize_obs(learner.obs_stats, raw.obs),
            reward=scale_reward(learner.reward_stats, raw.reward),
        )
        batch = make_batch(rollout, advantage(rollout, hparams))
        learner, metrics = improve(learner, batch, hparams, data)

        learner, actors = refresh_statistics(learner, actors, raw, hparams, axis)
        learner = learner._replace(updates=learner.updates + 1)
        done = (raw.terminated | raw.truncated) & (raw.mask > 0)
        actors, episodes = count_episodes(actors, raw.reward * raw.mask, done, axis)
        explained = explained_variance(rollout.value, batch.target, batch.weight, axis)
        steps = env_steps(config, learner.updates)
        metrics |= {"env_steps": steps, "explained_variance": explained}
        kept, metrics = keep_if_finite(metrics, TrainState(learner, actors), state)
        return kept, metrics | episodes

    return Learner(init, update)


def make_batch(rollout: Rollout, estimated: tuple[Array, ...]) -> Batch:
    """Make a batch of a rollout and the results of an `Advantage`; the mask multiplies weights."""
    advantage, target, *weight = estimated
    return Batch(rollout, advantage, target, rollout.mask * weight[0] if weight else rollout.mask)


def keep_if_finite(
    metrics: Metrics, new: TrainState, old: TrainState
) -> tuple[TrainState, Metrics]:
    """Return `new`, or `old` if the loss or anything in the learner is not finite; and the metrics.

    All later updates then repeat with the same result, so the state stays the last good one. If the
    loss is finite but something in the learner is not (for example, statistics after an infinite
    observation), `policy_loss` is reported as NaN.
    """
    numbers = [x for x in jax.tree.leaves(new.learner) if jnp.issubdtype(x.dtype, jnp.floating)]
    checked = [metrics[name] for name in MUST_BE_FINITE if name in metrics] + numbers
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in checked]))
    loss = jnp.where(finite, metrics.get("policy_loss", 0.0), jnp.nan)
    return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old), metrics | {
        "policy_loss": loss
    }
