"""Metrics of an update."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from purejaxppo.collectives import all_sum, masked_mean
from purejaxppo.config import TaskConfig
from purejaxppo.types import ActorState, Metrics


def count_episodes(
    actors: ActorState,
    reward: Float[Array, "T N"],
    done: Bool[Array, "T N"],
    axis: str | None = None,
) -> tuple[ActorState, Metrics]:
    """Mean return and length of the episodes that ended in this rollout; NaN if none did.

    The steps up to an environment's last `done`, together with the sums carried over from earlier
    rollouts, belong to finished episodes. The steps after it are carried over to the next rollout.
    """
    count = partial(jnp.sum, dtype=jnp.int32)  # otherwise int64 in 64-bit mode
    unfinished = jnp.cumsum(done[::-1], axis=0)[::-1] == 0
    any_done = jnp.any(done, axis=0)
    finished_return = jnp.sum(reward * ~unfinished, axis=0) + any_done * actors.episode_return
    finished_length = count(~unfinished, axis=0) + any_done * actors.episode_length
    actors = actors._replace(
        episode_return=jnp.sum(reward * unfinished, axis=0) + ~any_done * actors.episode_return,
        episode_length=count(unfinished, axis=0) + ~any_done * actors.episode_length,
    )
    sums = (count(done), jnp.sum(finished_return), count(finished_length))
    episodes, returns, lengths = all_sum(sums, axis)
    return actors, {
        "episodes": episodes,
        "episode_return": returns / episodes,
        "episode_length": lengths.astype(jnp.float32) / episodes,
    }


def env_steps(config: TaskConfig, updates: Array) -> Array:
    """Samples after `updates`: an int32, or a float32 if the run would overflow it."""
    fits = config.num_updates * config.batch_size < 2**31
    return updates.astype(jnp.int32 if fits else jnp.float32) * config.batch_size


def explained_variance(
    value: Array, target: Array, mask: Array, axis: str | None = None
) -> Float[Array, ""]:
    """1 - Var(target - value) / Var(target): 1 for a perfect critic, 0 for a constant one; NaN
    if targets are equal up to rounding."""
    # The barrier prevents XLA from fusing this with the training step and changing its rounding.
    value, target, mask = jax.lax.optimization_barrier((value, target, mask))
    mean = masked_mean(target, mask, axis)

    def variance(x: Array) -> Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask, axis)), mask, axis)

    total = variance(target)
    constant = total <= jnp.square(1e-6 * mean)
    explained = 1.0 - variance(target - value) / jnp.where(constant, 1.0, total)
    return jnp.where(constant, jnp.nan, explained)
