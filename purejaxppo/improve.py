"""How a batch improves the policy: minibatch epochs of a loss under Adam."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key

from purejaxppo.collectives import all_sum, own_key
from purejaxppo.config import Config, HParams
from purejaxppo.losses import (
    POLICY_LOSSES,
    Terms,
    adapted_beta,
    approximate_kl,
    standardize,
    value_loss,
)
from purejaxppo.networks import parts_in_cache
from purejaxppo.shuffle import random_order
from purejaxppo.types import (
    Improve,
    LearnerState,
    Metrics,
    Network,
    Policy,
    PyTree,
    Rollout,
)

DEFAULT_TARGET_KL = 0.01
"""Of ppo_kl_adaptive."""


class Batch(NamedTuple):
    """What the loss reads: sequences `[T, B, ...]` with a memory, else steps `[1, B, ...]`."""

    obs: Array
    start: Bool[Array, "T B"]
    action: Array
    log_prob: Float[Array, "T B"]
    value: Float[Array, "T B"]
    advantage: Float[Array, "T B"]
    target: Float[Array, "T B"]
    mask: Float[Array, "T B"]
    carry: PyTree
    """`[B, ...]` the network's memory before the first step."""
    outputs: PyTree = ()
    """`[T, B, P]` of the rollout's policy, where the objective needs them."""


def scheduled(schedule: str, updates: Int[Array, ""], num_updates: int) -> Float[Array, ""]:
    """A hyperparameter's factor: 1 at the first update, 0 after the last and from there on."""
    progress = jnp.minimum(updates.astype(jnp.float32) / num_updates, 1.0)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + jnp.cos(math.pi * progress))
    return jnp.ones((), jnp.float32)


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


Loss = Callable[[PyTree, Batch, HParams, Array], tuple[Array, Metrics]]
"""`(params, batch, hparams, count) -> (loss, metrics)`: means over `count` samples, so that those
of a minibatch's parts, and their gradients, add up to the whole's."""


def make_loss(config: Config, network: Network, policy: Policy) -> Loss:
    """The objective's policy loss + vf_coef * value loss - ent_coef * entropy, and what it is made
    of.

    Schulman et al. 2017 (arXiv:1707.06347), eq. 9, as a loss. Without a critic the value loss is
    left out.
    """

    def loss(
        params: PyTree, batch: Batch, hparams: HParams, count: Array
    ) -> tuple[Float[Array, ""], Metrics]:
        _, outputs, value = network.apply(params, batch.carry, batch.obs, batch.start)
        metrics = policy_terms(config, policy, outputs, batch, hparams)
        metrics["value_loss"] = value_loss(value, batch.value, batch.target, hparams.vf_clip_eps)
        metrics = {name: jnp.sum(x * batch.mask) / count for name, x in metrics.items()}
        loss = metrics["policy_loss"] - hparams.ent_coef * metrics["entropy"]
        if config.has_critic:
            loss += hparams.vf_coef * metrics["value_loss"]
        return loss, metrics

    return loss


def policy_terms(
    config: Config,
    policy: Policy,
    outputs: Float[Array, "T B P"],
    batch: Batch,
    hparams: HParams,
) -> dict[str, Float[Array, "T B"]]:
    """What the objective makes of a policy's `outputs`, sample by sample."""
    distribution = policy.distribution(outputs)
    log_prob = jnp.asarray(distribution.log_prob(batch.action))
    terms = Terms(log_prob, log_prob - batch.log_prob, batch.advantage)
    has_outputs = not isinstance(batch.outputs, tuple)
    if has_outputs:
        old = policy.distribution(batch.outputs)
        terms = terms._replace(kl=jnp.asarray(old.kl_divergence(distribution)))
    higher = hparams.clip_eps if hparams.clip_higher is None else hparams.clip_higher
    change = jnp.expm1(terms.log_ratio)
    return {
        "policy_loss": POLICY_LOSSES[config.objective](terms, hparams),
        "entropy": jnp.asarray(distribution.entropy()),
        "approx_kl": approximate_kl(terms.log_ratio),
        "clip_fraction": ((change > higher) | (change < -hparams.clip_eps)).astype(jnp.float32),
    } | ({"kl": jnp.asarray(terms.kl)} if has_outputs else {})


def kl_from_rollout(
    network: Network, policy: Policy, params: PyTree, batch: Batch, count: Array
) -> Float[Array, ""]:
    """Mean of KL(pi_old, pi) over `count` samples."""
    _, outputs, _ = network.apply(params, batch.carry, batch.obs, batch.start)
    kl = policy.distribution(batch.outputs).kl_divergence(policy.distribution(outputs))
    return jnp.sum(jnp.asarray(kl) * batch.mask) / count


def make_improve(
    config: Config, network: Network, policy: Policy, axis: str | None = None
) -> Improve:
    """`update_epochs` passes of `num_minibatches` Adam steps each, in a new order each pass."""
    descend = make_descent(config, network, make_loss(config, network, policy), axis)
    penalized = config.objective in ("ppo_kl", "ppo_kl_adaptive")

    def improve(
        learner: LearnerState, rollout: Rollout, advantage: Array, target: Array, hparams: HParams
    ) -> tuple[LearnerState, Metrics]:
        hparams, learning_rate = at_this_update(config, learner, hparams)
        if config.advantage_normalization == "batch":
            advantage = standardize(advantage, rollout.mask, axis)
        batch = make_batch(rollout, advantage, target)
        if not penalized:
            batch = batch._replace(outputs=())
        learner, metrics = descend(learner, batch, hparams)
        if penalized:
            after = partial(kl_from_rollout, network, policy, learner.params)
            metrics["kl"] = over_all(config, network, batch, axis, after)
            metrics["kl_beta"] = jnp.asarray(hparams.kl_beta, jnp.float32)
            learner = _steer(config, learner, hparams, metrics["kl"])
        return learner, metrics | {"learning_rate": learning_rate}

    return improve


def _steer(
    config: Config, learner: LearnerState, hparams: HParams, kl: Float[Array, ""]
) -> LearnerState:
    if config.objective != "ppo_kl_adaptive":
        return learner
    target_kl = DEFAULT_TARGET_KL if hparams.target_kl is None else hparams.target_kl
    return learner._replace(
        objective_state=adapted_beta(jnp.asarray(learner.objective_state), kl, target_kl)
    )


def make_descent(
    config: Config, network: Network, loss: Loss, axis: str | None = None
) -> Callable[[LearnerState, Batch, HParams], tuple[LearnerState, Metrics]]:
    """Minibatch epochs of any loss, on a batch `[T, N, ...]`."""
    can_stop = config.objective not in ("ppo_kl_adaptive", "trpo")

    def descend(
        learner: LearnerState, batch: Batch, hparams: HParams
    ) -> tuple[LearnerState, Metrics]:
        rows = as_rows(config, batch)
        flat, unravel = ravel_pytree(learner.params)
        optimizer = make_optimizer(hparams)
        rates = step_sizes(learner.params, hparams)

        def minibatch(carry: Any, inputs: tuple[Batch, Array]) -> tuple[Any, tuple[Metrics, Array]]:
            (flat, opt_state), (rows, count) = carry, inputs

            def of_part(flat: Array, part: Batch) -> tuple[Array, Metrics]:
                return loss(unravel(flat), as_sequences(config, part), hparams, count)

            gradient = jax.grad(of_part, has_aux=True)
            gradient, metrics = over_parts(config, network, rows, partial(gradient, flat))
            gradient = all_sum(gradient, axis)
            direction, opt_state = optimizer.update(gradient, opt_state)
            flat = optax.apply_updates(flat, -rates * jnp.asarray(direction))
            return (flat, opt_state), (metrics, jnp.linalg.norm(gradient))

        def epoch(carry: Any, key: Key[Array, ""]) -> tuple[Any, tuple[Metrics, Array]]:
            current, stopped = carry
            minibatches = _shuffle(rows, own_key(key, axis), config.num_minibatches)
            if config.advantage_normalization == "minibatch":
                one = partial(standardize, axis=axis)
                advantage = jax.vmap(one)(minibatches.advantage, minibatches.mask)
                minibatches = minibatches._replace(advantage=advantage)
            counts = all_sum(jax.vmap(jnp.sum)(minibatches.mask), axis)
            inputs = (minibatches, jnp.maximum(counts, 1.0))
            new, (metrics, norm) = jax.lax.scan(minibatch, current, inputs)
            metrics = all_sum(jax.tree.map(jnp.mean, metrics), axis)
            metrics["grad_norm"] = jnp.mean(norm)
            if hparams.target_kl is None or not can_stop:
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
        learner = learner._replace(key=key, params=unravel(flat), opt_state=opt_state)
        return learner, metrics

    return descend


def over_all(
    config: Config,
    network: Network,
    batch: Batch,
    axis: str | None,
    function: Callable[[Batch, Array], PyTree],
) -> PyTree:
    """The sum of `function(part, count)` over the parts of a batch `[T, N, ...]` of `count`
    samples, and over the devices that share it."""
    count = jnp.maximum(all_sum(jnp.sum(batch.mask), axis), 1.0)

    def of_part(rows: Batch) -> PyTree:
        return function(as_sequences(config, rows), count)

    return all_sum(over_parts(config, network, as_rows(config, batch), of_part), axis)


def at_this_update(
    config: Config, learner: LearnerState, hparams: HParams
) -> tuple[HParams, Float[Array, ""]]:
    """The hyperparameters with their schedules applied, and the actor's learning rate."""
    rate = scheduled(config.lr_schedule, learner.updates, config.num_updates)
    clip = scheduled(config.clip_schedule, learner.updates, config.num_updates)
    adaptive = config.objective == "ppo_kl_adaptive"

    def scale(value: Any, factor: Array) -> Any:
        return None if value is None else value * factor

    now = dataclasses.replace(
        hparams,
        learning_rate=scale(hparams.learning_rate, rate),
        critic_learning_rate=scale(hparams.critic_learning_rate, rate),
        clip_eps=scale(hparams.clip_eps, clip),
        clip_higher=scale(hparams.clip_higher, clip),
        vf_clip_eps=scale(hparams.vf_clip_eps, clip),
        kl_beta=learner.objective_state if adaptive else hparams.kl_beta,
    )
    return now, jnp.asarray(now.learning_rate, jnp.float32)


def make_batch(rollout: Rollout, advantage: Array, target: Array) -> Batch:
    """What the loss reads of a rollout `[T, N]`, as sequences `[T, N]`."""
    return Batch(
        obs=rollout.obs,
        start=rollout.start,
        action=rollout.action,
        log_prob=rollout.log_prob,
        value=rollout.value,
        advantage=advantage,
        target=target,
        mask=rollout.mask,
        carry=rollout.carry,
        outputs=rollout.outputs,
    )


def as_rows(config: Config, batch: Batch) -> Batch:
    """What is shuffled: steps `[T * N, ...]`, or with a memory whole sequences `[N, T, ...]`."""

    def rows(x: Array) -> Array:
        return x.reshape((-1, *x.shape[2:])) if config.memory == "none" else x.swapaxes(0, 1)

    return jax.tree.map(rows, batch._replace(carry=()))._replace(carry=batch.carry)


def as_sequences(config: Config, rows: Batch) -> Batch:
    """Rows back to what the network reads: `[1, B, ...]`, or with a memory `[T, B, ...]`."""

    def sequences(x: Array) -> Array:
        return x[None] if config.memory == "none" else x.swapaxes(0, 1)

    return jax.tree.map(sequences, rows._replace(carry=()))._replace(carry=rows.carry)


def _shuffle(rows: Batch, key: Key[Array, ""], num_minibatches: int) -> Batch:
    """`[R, ...]` in a random order, as `[num_minibatches, R / num_minibatches, ...]`."""
    order = random_order(key, rows.target.shape[0])

    def take(x: Array) -> Array:
        return x[order].reshape((num_minibatches, -1, *x.shape[1:]))

    return jax.tree.map(take, rows)


def over_parts(
    config: Config, network: Network, rows: Batch, function: Callable[[Batch], PyTree]
) -> PyTree:
    """`function` of rows `[R, ...]`; in a program for CPU the sum of it over equal parts of them
    that fit into a core's cache. Whole sequences are left in one part."""
    num_rows = rows.target.shape[0]
    num_parts = parts_in_cache(network, num_rows, num_rows) if config.memory == "none" else 1
    if num_parts == 1:
        return function(rows)

    def in_parts(rows: Batch) -> PyTree:
        parts = jax.tree.map(lambda x: x.reshape((num_parts, -1, *x.shape[1:])), rows)
        shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total: PyTree, part: Batch) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, function(part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    return jax.lax.platform_dependent(rows, cpu=in_parts, default=function)
