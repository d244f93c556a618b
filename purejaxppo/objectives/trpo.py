"""Trust region policy optimisation: a natural gradient step within a bound on the KL divergence.

Schulman et al. 2015 (arXiv:1502.05477), appendix C. The critic is fitted afterwards, in separate
minibatch epochs.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.config import Config, HParams
from purejaxppo.improve import (
    at_this_update,
    kl_from_rollout,
    make_descent,
    over_all,
    policy_terms,
)
from purejaxppo.losses import standardize, value_loss
from purejaxppo.objectives.base import Objective
from purejaxppo.optimizer import ADAM, Optimizer
from purejaxppo.types import Batch, Improve, LearnerState, Metrics, Network, Policy, PyTree

Vector = Float[Array, " params"]


class Search(NamedTuple):
    """State of a line search."""

    halvings: Int[Array, ""]
    accepted: Bool[Array, ""]
    flat: Vector
    metrics: Metrics


def make_trpo(
    config: Config,
    objective: Objective,
    network: Network,
    policy: Policy,
    *,
    optimizer: Optimizer = ADAM,
    axis: str | None = None,
) -> Improve:
    """Make the step: one natural gradient step of the policy, then `update_epochs` critic epochs.

        maximise E[r A] + ent_coef H  subject to  E[KL(pi_old, pi)] <= delta

    The direction is x = (F + damping I)^-1 g by conjugate gradient, with the Fisher matrix F, the
    second derivative of the KL divergence at pi_old; the full step is sqrt(2 delta / (x (F +
    damping I) x)) x. It is halved until the objective rises and the constraint holds. If that
    fails for `line_search_steps` trials, the policy is not changed, and `line_search_failed` is 1.
    """
    no_advantages = dataclasses.replace(config, advantage_normalization="none")
    loss_of_critic = partial(critic_loss, network)
    fit_critic = make_descent(
        no_advantages, network, loss_of_critic, optimizer, can_stop=False, axis=axis
    )

    def improve(
        learner: LearnerState, batch: Batch, hparams: HParams, data: PyTree = ()
    ) -> tuple[LearnerState, Metrics]:
        hparams, learning_rate = at_this_update(config, learner, hparams)
        if config.advantage_normalization != "none":
            batch = batch._replace(advantage=standardize(batch.advantage, batch.weight, axis))
        flat, unravel = ravel_pytree(learner.params)
        surface = _Surface(objective, network, policy, axis, batch, unravel, hparams)
        gradient = surface.gradient(flat)
        fisher = partial(surface.fisher, flat)
        step = natural_step(fisher, -gradient, hparams.trpo_delta, config.cg_iterations)
        found = search_along(config, surface.measure, flat, step, hparams)
        moved = learner._replace(params=unravel(found.flat))
        learner, critic = fit_critic(moved, batch, hparams, data)
        learner = learner._replace(params=critic_of(learner.params, moved.params))
        metrics = found.metrics | {
            "value_loss": critic["value_loss"],
            "grad_norm": jnp.linalg.norm(gradient),
            "learning_rate": learning_rate,
            "line_search_failed": (~found.accepted).astype(jnp.float32),
        }
        return learner, metrics

    return improve


class _Surface(NamedTuple):
    """The objective and the KL divergence on one batch, as functions of the flat parameters."""

    objective: Objective
    network: Network
    policy: Policy
    axis: str | None
    batch: Batch
    unravel: Callable[[Vector], PyTree]
    hparams: HParams

    def measure(self, flat: Vector) -> Metrics:
        """Means of the objective's terms."""
        return self._over_all(partial(self._terms, flat))

    def gradient(self, flat: Vector) -> Vector:
        """Gradient of the loss."""

        def loss(flat: Vector, part: Batch, count: Array) -> Array:
            return _loss(self._terms(flat, part, count), self.hparams)

        return self._over_all(lambda *part: jax.grad(loss)(flat, *part))

    def fisher(self, flat: Vector, vector: Vector) -> Vector:
        """Product of the damped Fisher matrix with a vector."""

        def of_part(part: Batch, count: Array) -> Vector:
            def kl(x: Vector) -> Array:
                return kl_from_rollout(self.network, self.policy, self.unravel(x), part, count)

            return second_derivative(kl, flat, vector)

        return self._over_all(of_part) + self.hparams.cg_damping * vector

    def _terms(self, flat: Vector, part: Batch, count: Array) -> Metrics:
        old = part.rollout
        _, policy_outputs, _ = self.network.apply(self.unravel(flat), old.carry, old.obs, old.start)
        values = policy_terms(self.objective, self.policy, policy_outputs, part, self.hparams)
        return {name: jnp.sum(x * part.weight) / count for name, x in values.items()}

    def _over_all(self, function: Callable[[Batch, Array], PyTree]) -> PyTree:
        return over_all(self.network, self.batch, self.axis, function)


def critic_of(fitted: PyTree, moved: PyTree) -> PyTree:
    """Take the critic's parameters (names that begin with `critic`) from `fitted`, and the policy's
    from `moved`."""
    return {name: (fitted if name.startswith("critic") else moved)[name] for name in moved}


def critic_loss(  # noqa: PLR0917 (a `Loss`)
    network: Network, params: PyTree, batch: Batch, hparams: HParams, count: Array, data: PyTree
) -> tuple[Float[Array, ""], Metrics]:
    """vf_coef * value loss, as a `Loss`."""
    old = batch.rollout
    _, _, value = network.apply(params, old.carry, old.obs, old.start)
    errors = value_loss(value, old.value, batch.target, hparams.vf_clip_eps)
    mean = jnp.sum(errors * batch.weight) / count
    return hparams.vf_coef * mean, {"value_loss": mean}


def second_derivative(function: Callable[[Vector], Array], at: Vector, vector: Vector) -> Vector:
    """Hessian-vector product, by forward-mode differentiation of the gradient. The Hessian of a
    mean KL(pi_old, pi) at pi_old is the Fisher matrix."""
    return jax.jvp(jax.grad(function), (at,), (vector,))[1]


def natural_step(
    fisher: Callable[[Vector], Vector], gradient: Vector, delta: Any, iterations: int
) -> Vector:
    """`sqrt(2 delta / (x F x)) x` with `F x = gradient`: its KL divergence is `delta` to
    second order. `fisher` returns the product of F with a vector."""
    direction, _ = jax.scipy.sparse.linalg.cg(fisher, gradient, tol=1e-10, maxiter=iterations)
    length = jnp.maximum(jnp.vdot(direction, fisher(direction)), jnp.finfo(gradient.dtype).tiny)
    return jnp.sqrt(2.0 * delta / length) * direction


def search_along(
    config: Config,
    measure: Callable[[Vector], Metrics],
    flat: Vector,
    step: Vector,
    hparams: HParams,
) -> Search:
    """Try the full step, half of it, a quarter, ... from `flat`. Returns the first point at which
    the objective is higher and the KL divergence is at most `trpo_delta`; `flat` if there is
    none."""
    start = measure(flat)

    def searching(search: Search) -> Array:
        return ~search.accepted & (search.halvings < config.line_search_steps)

    def halve(search: Search) -> Search:
        trial = flat + jnp.float32(0.5) ** search.halvings * step
        metrics = measure(trial)
        rises = _loss(metrics, hparams) < _loss(start, hparams)
        accepted = rises & (metrics["kl"] <= hparams.trpo_delta)
        new = (trial, metrics)
        kept = jax.tree.map(lambda x, y: jnp.where(accepted, x, y), new, (flat, start))
        return Search(search.halvings + 1, accepted, *kept)

    first = Search(jnp.zeros((), jnp.int32), jnp.zeros((), bool), flat, start)
    return jax.lax.while_loop(searching, halve, first)


def _loss(metrics: Metrics, hparams: HParams) -> Array:
    return metrics["policy_loss"] - hparams.ent_coef * metrics["entropy"]
