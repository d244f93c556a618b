"""Improves the policy from a batch: minibatch epochs of gradient steps on a loss."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from purejaxppo.collectives import all_sum, own_key
from purejaxppo.config import HParams, UpdateConfig
from purejaxppo.losses import Terms, approximate_kl, standardize, value_loss
from purejaxppo.networks import parts_in_cache
from purejaxppo.objectives.base import Objective
from purejaxppo.optimizer import ADAM, Optimizer
from purejaxppo.shuffle import random_order
from purejaxppo.types import Batch, Improve, LearnerState, Loss, Metrics, Network, Policy, PyTree


def scheduled(schedule: str, updates: Int[Array, ""], num_updates: int) -> Float[Array, ""]:
    """Factor of a scheduled hyperparameter: 1 at the first update, decaying to 0 after the last.

    Always 1 for the schedule `constant`.
    """
    progress = jnp.minimum(updates.astype(jnp.float32) / num_updates, 1.0)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + jnp.cos(math.pi * progress))
    return jnp.ones((), jnp.float32)


def make_loss(objective: Objective, network: Network, policy: Policy) -> Loss:
    """Policy loss - ent_coef * entropy + vf_coef * value loss + extra losses of the objective.

    Samples are weighted by `Batch.weight`. An objective without a critic has no value loss.
    """

    def loss(
        params: PyTree, batch: Batch, hparams: HParams, count: Array, data: PyTree = ()
    ) -> tuple[Float[Array, ""], Metrics]:
        old = batch.rollout
        _, policy_outputs, value = network.apply(params, old.carry, old.obs, old.start)
        metrics = policy_terms(objective, policy, policy_outputs, batch, hparams)
        metrics["value_loss"] = value_loss(value, old.value, batch.target, hparams.vf_clip_eps)
        for name, extra in objective.extra_losses.items():
            metrics[name] = extra(params, network, batch, hparams)
        metrics = {name: jnp.sum(x * batch.weight) / count for name, x in metrics.items()}
        loss = metrics["policy_loss"] - hparams.ent_coef * metrics["entropy"]
        if objective.has_critic:
            loss += hparams.vf_coef * metrics["value_loss"]
        for name in objective.extra_losses:
            loss += metrics[name]
        return loss, metrics

    return loss


def policy_terms(
    objective: Objective,
    policy: Policy,
    policy_outputs: Float[Array, "T B P"],
    batch: Batch,
    hparams: HParams,
) -> dict[str, Float[Array, "T B"]]:
    """The terms of the loss and the diagnostics for `policy_outputs`, per sample."""
    old = batch.rollout
    distribution = policy.distribution(policy_outputs)
    log_prob = jnp.asarray(distribution.log_prob(old.action))
    # A step that does not count must not overflow: its weight 0 times infinity is NaN.
    log_ratio = jnp.where(old.mask > 0, log_prob - old.log_prob, 0.0)
    terms = Terms(log_prob, log_ratio, batch.advantage, mask=old.mask, extras=old.extras)
    has_outputs = not isinstance(old.policy_outputs, tuple)
    if has_outputs:
        before = policy.distribution(old.policy_outputs)
        terms = terms._replace(kl=jnp.asarray(before.kl_divergence(distribution)))
    higher = hparams.clip_eps if hparams.clip_higher is None else hparams.clip_higher
    change = jnp.expm1(terms.log_ratio)
    return {
        "policy_loss": objective.loss(terms, hparams),
        "entropy": jnp.asarray(distribution.entropy()),
        "approx_kl": approximate_kl(terms.log_ratio),
        "clip_fraction": ((change > higher) | (change < -hparams.clip_eps)).astype(jnp.float32),
    } | ({"kl": jnp.asarray(terms.kl)} if has_outputs else {})


def kl_from_rollout(
    network: Network, policy: Policy, params: PyTree, batch: Batch, count: Array
) -> Float[Array, ""]:
    """Sum of KL(pi_old, pi) over the batch, divided by `count`."""
    old = batch.rollout
    _, policy_outputs, _ = network.apply(params, old.carry, old.obs, old.start)
    before = policy.distribution(old.policy_outputs)
    kl = before.kl_divergence(policy.distribution(policy_outputs))
    return jnp.sum(jnp.asarray(kl) * batch.weight) / count


def make_improve(
    config: UpdateConfig,
    objective: Objective,
    network: Network,
    policy: Policy,
    *,
    optimizer: Optimizer = ADAM,
    loss: Loss | None = None,
    axis: str | None = None,
) -> Improve:
    """Make the step of `update_epochs` epochs, each of `num_minibatches` gradient steps in a new
    random order.

    Args:
        loss: replaces `make_loss(objective, network, policy)`.
    """
    loss = make_loss(objective, network, policy) if loss is None else loss
    descend = make_descent(
        config, network, loss, optimizer, can_stop=objective.stops_at_kl, axis=axis
    )

    def improve(
        learner: LearnerState, batch: Batch, hparams: HParams, data: PyTree = ()
    ) -> tuple[LearnerState, Metrics]:
        hparams, learning_rate = at_this_update(config, learner, hparams)
        if objective.kl is not None:
            beta = objective.kl.value(learner.objective_state, hparams)
            hparams = dataclasses.replace(hparams, kl_beta=beta)
        if config.advantage_normalization == "batch":
            batch = batch._replace(advantage=standardize(batch.advantage, batch.weight, axis))
        if not objective.needs_kl:  # the loss does not read them; drop them
            batch = batch._replace(rollout=batch.rollout._replace(policy_outputs=()))
        learner, metrics = descend(learner, batch, hparams, data)
        if objective.kl is not None:
            after = partial(kl_from_rollout, network, policy, learner.params)
            metrics["kl"] = over_all(network, batch, axis, after)
            metrics["kl_beta"] = jnp.asarray(hparams.kl_beta, jnp.float32)
            state = objective.kl.update(learner.objective_state, metrics["kl"], hparams)
            learner = learner._replace(objective_state=state)
        return learner, metrics | {"learning_rate": learning_rate}

    return improve


def make_descent(
    config: UpdateConfig,
    network: Network,
    loss: Loss,
    optimizer: Optimizer = ADAM,
    *,
    can_stop: bool = True,
    axis: str | None = None,
) -> Callable[[LearnerState, Batch, HParams, PyTree], tuple[LearnerState, Metrics]]:
    """Make minibatch epochs of any loss, on a batch `[T, N, ...]`.

    Args:
        can_stop: whether `target_kl` ends them early.
    """

    def descend(
        learner: LearnerState, batch: Batch, hparams: HParams, data: PyTree = ()
    ) -> tuple[LearnerState, Metrics]:
        packed, unpack = optimizer.pack(learner.params)
        transform = optimizer.transform(hparams, learner.params)
        rows, stops = as_rows(network, batch), can_stop and hparams.target_kl is not None
        epochs = _Epochs(config, network, loss, axis, stops, transform, unpack, rows, hparams, data)
        key, order_key = jax.random.split(learner.key)
        ((packed, opt_state), _), (metrics, ran) = jax.lax.scan(
            epochs.epoch,
            ((packed, learner.opt_state), jnp.zeros((), bool)),
            jax.random.split(order_key, config.update_epochs),
        )
        metrics = jax.tree.map(lambda x: jnp.mean(x, where=ran), metrics)
        learner = learner._replace(key=key, params=unpack(packed), opt_state=opt_state)
        return learner, metrics

    return descend


class _Epochs(NamedTuple):
    """Minibatch epochs on one batch."""

    config: UpdateConfig
    network: Network
    loss: Loss
    axis: str | None
    stops: bool
    """Whether `target_kl` can end the epochs early."""
    transform: optax.GradientTransformation
    unpack: Callable[[PyTree], PyTree]
    rows: Batch
    """Leaves `[R, ...]`, to be shuffled."""
    hparams: HParams
    data: PyTree

    def epoch(self, carry: Any, key: Key[Array, ""]) -> tuple[Any, tuple[Metrics, Array]]:
        """One epoch. Carries `((parameters, optimiser state), whether target_kl stopped it)`."""
        current, stopped = carry
        minibatches = _shuffle(self.rows, own_key(key, self.axis), self.config.num_minibatches)
        if self.config.advantage_normalization == "minibatch":
            one = partial(standardize, axis=self.axis)
            advantage = jax.vmap(one)(minibatches.advantage, minibatches.weight)
            minibatches = minibatches._replace(advantage=advantage)
        counts = all_sum(jax.vmap(jnp.sum)(minibatches.weight), self.axis)
        inputs = (minibatches, jnp.where(counts > 0, counts, 1.0))
        new, (metrics, norm) = jax.lax.scan(self.minibatch, current, inputs)
        metrics = all_sum(jax.tree.map(jnp.mean, metrics), self.axis)
        metrics["grad_norm"] = jnp.mean(norm)
        if not self.stops:
            return (new, stopped), (metrics, ~stopped)
        kept = jax.tree.map(lambda x, y: jnp.where(stopped, x, y), current, new)
        exceeded = metrics["approx_kl"] > jnp.asarray(self.hparams.target_kl)
        return (kept, stopped | exceeded), (metrics, ~stopped)

    def minibatch(
        self, carry: tuple[PyTree, PyTree], inputs: tuple[Batch, Array]
    ) -> tuple[tuple[PyTree, PyTree], tuple[Metrics, Array]]:
        """One gradient step on `count` samples."""
        (packed, opt_state), (rows, count) = carry, inputs

        def of_part(packed: PyTree, part: Batch) -> tuple[Array, Metrics]:
            sequences = as_sequences(self.network, part)
            return self.loss(self.unpack(packed), sequences, self.hparams, count, self.data)

        gradient = partial(jax.grad(of_part, has_aux=True), packed)
        gradient, metrics = over_parts(self.network, rows, gradient)
        gradient = all_sum(gradient, self.axis)
        changes, opt_state = self.transform.update(gradient, opt_state, packed)
        packed = optax.apply_updates(packed, changes)
        return (packed, opt_state), (metrics, optax.tree.norm(gradient))


def over_all(
    network: Network,
    batch: Batch,
    axis: str | None,
    function: Callable[[Batch, Array], PyTree],
) -> PyTree:
    """Sum `function(part, count)` over the parts of a batch `[T, N, ...]` and over the devices that
    share it; `count` is the sum of the samples' weights."""
    total = all_sum(jnp.sum(batch.weight), axis)
    count = jnp.where(total > 0, total, 1.0)

    def of_part(rows: Batch) -> PyTree:
        return function(as_sequences(network, rows), count)

    return all_sum(over_parts(network, as_rows(network, batch), of_part), axis)


def at_this_update(
    config: UpdateConfig, learner: LearnerState, hparams: HParams
) -> tuple[HParams, Float[Array, ""]]:
    """The hyperparameters after schedules are applied, and the policy's learning rate."""
    rate = scheduled(config.lr_schedule, learner.updates, config.num_updates)
    clip = scheduled(config.clip_schedule, learner.updates, config.num_updates)

    def scale(value: Any, factor: Array) -> Any:
        return None if value is None else value * factor

    now = dataclasses.replace(
        hparams,
        learning_rate=scale(hparams.learning_rate, rate),
        critic_learning_rate=scale(hparams.critic_learning_rate, rate),
        clip_eps=scale(hparams.clip_eps, clip),
        clip_higher=scale(hparams.clip_higher, clip),
        vf_clip_eps=scale(hparams.vf_clip_eps, clip),
    )
    return now, jnp.asarray(now.learning_rate, jnp.float32)


def as_rows(network: Network, batch: Batch) -> Batch:
    """The rows to shuffle: steps `[T * N, ...]`, or whole sequences `[N, T, ...]` for a sequential
    network."""

    def rows(x: Array) -> Array:
        return x.swapaxes(0, 1) if network.sequential else x.reshape((-1, *x.shape[2:]))

    return _except_carry(rows, batch)


def as_sequences(network: Network, rows: Batch) -> Batch:
    """Rows as the network reads them: `[1, B, ...]`, or `[T, B, ...]` for a sequential one."""

    def sequences(x: Array) -> Array:
        return x.swapaxes(0, 1) if network.sequential else x[None]

    return _except_carry(sequences, rows)


def _except_carry(function: Callable[[Array], Array], batch: Batch) -> Batch:
    """Apply `function` to all leaves except the carry, which has no time axis."""
    carry = batch.rollout.carry
    changed = jax.tree.map(function, batch._replace(rollout=batch.rollout._replace(carry=())))
    return changed._replace(rollout=changed.rollout._replace(carry=carry))


def _shuffle(rows: Batch, key: Key[Array, ""], num_minibatches: int) -> Batch:
    """Shuffle `[R, ...]` into minibatches `[num_minibatches, R / num_minibatches, ...]`."""
    order = random_order(key, rows.target.shape[0])

    def take(x: Array) -> Array:
        return x[order].reshape((num_minibatches, -1, *x.shape[1:]))

    return jax.tree.map(take, rows)


def over_parts(network: Network, rows: Batch, function: Callable[[Batch], PyTree]) -> PyTree:
    """Apply `function` to rows `[R, ...]`; on CPU, sum it over equal parts that fit into a core's
    cache. Sequences that are read step by step are not divided."""
    num_rows = rows.target.shape[0]
    whole = network.sequential and not network.steps_at_once
    num_parts = 1 if whole else parts_in_cache(network, rows.target.size, num_rows)
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
