"""How a batch improves the policy: minibatch epochs of a loss under Adam."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key

from purejaxppo.config import Config, HParams
from purejaxppo.losses import (
    approximate_kl,
    clipped_surrogate,
    masked_mean,
    standardize,
    value_loss,
)
from purejaxppo.types import (
    Improve,
    LearnerState,
    Metrics,
    Network,
    Policy,
    PyTree,
    Rollout,
)


class Batch(NamedTuple):
    """Sequences for the loss: `[T, B, ...]` with a memory, else `[1, B, ...]`."""

    rollout: Rollout
    advantage: Float[Array, "T B"]
    target: Float[Array, "T B"]


def scheduled(schedule: str, updates: Int[Array, ""], num_updates: int) -> Float[Array, ""]:
    """A hyperparameter's factor: 1 at the first update, 0 after the last and from there on."""
    progress = jnp.minimum(updates / num_updates, 1.0)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + jnp.cos(math.pi * progress))
    return jnp.ones(())


def make_optimizer(hparams: HParams) -> optax.GradientTransformation:
    """Adam on one flat vector, after clipping by its norm; the step size is applied outside."""
    return optax.chain(
        optax.clip_by_global_norm(hparams.max_grad_norm),
        optax.scale_by_adam(eps=hparams.adam_eps),
    )


def init_optimizer(hparams: HParams, params: PyTree) -> PyTree:
    """The optimiser's state for `params`, as one flat vector."""
    return make_optimizer(hparams).init(ravel_pytree(params)[0])


def step_sizes(params: PyTree, hparams: HParams) -> Float[Array, "..."]:
    """The step size of each parameter in the flat vector: `critic_learning_rate` for those under
    names that begin with `critic`, `learning_rate` for all others. A scalar if they agree."""
    critic_rate = hparams.critic_learning_rate
    if critic_rate is None:
        return jnp.asarray(hparams.learning_rate, jnp.float32)

    def size(path: Any, leaf: Array) -> Array:
        critic = path[0].key.startswith("critic")
        return jnp.full_like(leaf, critic_rate if critic else hparams.learning_rate)

    return ravel_pytree(jax.tree_util.tree_map_with_path(size, params))[0]


def ppo_loss(
    network: Network,
    policy: Policy,
    params: PyTree,
    batch: Batch,
    hparams: HParams,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate + vf_coef * value loss - ent_coef * entropy, and what it is made of.

    Schulman et al. 2017 (arXiv:1707.06347), eq. 9, as a loss.
    """
    rollout, advantage = batch.rollout, batch.advantage
    _, outputs, value = network.apply(params, rollout.carry, rollout.obs, rollout.start)
    distribution = policy.distribution(outputs)
    log_ratio = distribution.log_prob(rollout.action) - rollout.log_prob

    surrogate = clipped_surrogate(log_ratio, advantage, hparams.clip_eps)
    errors = value_loss(value, rollout.value, batch.target, hparams.vf_clip_eps)
    clipped = jnp.abs(jnp.expm1(log_ratio)) > hparams.clip_eps
    metrics = {
        "policy_loss": masked_mean(surrogate, rollout.mask),
        "value_loss": masked_mean(errors, rollout.mask),
        "entropy": masked_mean(distribution.entropy(), rollout.mask),
        "approx_kl": masked_mean(approximate_kl(log_ratio), rollout.mask),
        "clip_fraction": masked_mean(clipped.astype(jnp.float32), rollout.mask),
    }
    loss = (
        metrics["policy_loss"]
        + hparams.vf_coef * metrics["value_loss"]
        - hparams.ent_coef * metrics["entropy"]
    )
    return loss, metrics


def make_improve(config: Config, network: Network, policy: Policy) -> Improve:
    """`update_epochs` passes of `num_minibatches` Adam steps each, in a new order each pass."""

    def improve(
        learner: LearnerState, rollout: Rollout, advantage: Array, target: Array, hparams: HParams
    ) -> tuple[LearnerState, Metrics]:
        hparams, learning_rate = _at_this_update(config, learner, hparams)
        if config.advantage_normalization == "batch":
            advantage = standardize(advantage, rollout.mask)
        sequences = _as_sequences(config, Batch(rollout, advantage, target))
        flat, unravel = ravel_pytree(learner.params)
        optimizer = make_optimizer(hparams)
        rates = step_sizes(learner.params, hparams)

        def loss(flat: Array, batch: Batch) -> tuple[Array, Metrics]:
            if config.advantage_normalization == "minibatch":
                advantage = standardize(batch.advantage, batch.rollout.mask)
                batch = batch._replace(advantage=advantage)
            return ppo_loss(network, policy, unravel(flat), batch, hparams)

        def minibatch(carry: Any, chosen: Int[Array, " B"]) -> tuple[Any, Metrics]:
            flat, opt_state = carry
            gradient, metrics = jax.grad(loss, has_aux=True)(flat, take(sequences, chosen))
            metrics["grad_norm"] = jnp.linalg.norm(gradient)
            direction, opt_state = optimizer.update(gradient, opt_state)
            flat = optax.apply_updates(flat, -rates * jnp.asarray(direction))
            return (flat, opt_state), metrics

        def epoch(carry: Any, key: Key[Array, ""]) -> tuple[Any, tuple[Metrics, Array]]:
            current, stopped = carry
            order = jax.random.permutation(key, sequences.target.shape[1])
            new, metrics = jax.lax.scan(
                minibatch, current, order.reshape(config.num_minibatches, -1)
            )
            metrics = jax.tree.map(jnp.mean, metrics)
            if hparams.target_kl is None:
                return (new, stopped), (metrics, ~stopped)
            kept = jax.tree.map(lambda x, y: jnp.where(stopped, x, y), current, new)
            return (kept, stopped | (metrics["approx_kl"] > hparams.target_kl)), (metrics, ~stopped)

        key, order_key = jax.random.split(learner.key)
        ((flat, opt_state), _), (metrics, ran) = jax.lax.scan(
            epoch,
            ((flat, learner.opt_state), jnp.zeros((), bool)),
            jax.random.split(order_key, config.update_epochs),
        )
        metrics = jax.tree.map(lambda x: jnp.mean(x, where=ran), metrics)
        metrics["learning_rate"] = learning_rate
        learner = learner._replace(key=key, params=unravel(flat), opt_state=opt_state)
        return learner, metrics

    return improve


def _at_this_update(
    config: Config, learner: LearnerState, hparams: HParams
) -> tuple[HParams, Float[Array, ""]]:
    """The hyperparameters with their schedules applied, and the actor's learning rate."""
    rate = scheduled(config.lr_schedule, learner.updates, config.num_updates)
    clip = scheduled(config.clip_schedule, learner.updates, config.num_updates)

    def scale(value: Any, factor: Array) -> Any:
        return None if value is None else value * factor

    now = dataclasses.replace(
        hparams,
        learning_rate=scale(hparams.learning_rate, rate),
        critic_learning_rate=scale(hparams.critic_learning_rate, rate),
        clip_eps=scale(hparams.clip_eps, clip),
        vf_clip_eps=scale(hparams.vf_clip_eps, clip),
    )
    return now, jnp.asarray(now.learning_rate, jnp.float32)


def _as_sequences(config: Config, batch: Batch) -> Batch:
    """Without a memory every step is a sequence of its own: `[T, N, ...]` to `[1, T * N, ...]`."""
    if config.memory != "none":
        return batch
    return jax.tree.map(lambda x: x.reshape((1, -1, *x.shape[2:])), batch)


def take(batch: Batch, chosen: Int[Array, " B"]) -> Batch:
    """The sequences `chosen`, which are axis 1 of all leaves but the carry's."""
    carry = jax.tree.map(lambda x: x[chosen], batch.rollout.carry)
    without = batch._replace(rollout=batch.rollout._replace(carry=()))
    taken = jax.tree.map(lambda x: jnp.take(x, chosen, axis=1), without)
    return taken._replace(rollout=taken.rollout._replace(carry=carry))
