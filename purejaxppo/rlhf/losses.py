"""Policy losses of responses, and the KL penalty in the loss.

The tokens of a response lie along axis 0 of the terms, so a loss can combine them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from purejaxppo.improve import make_loss
from purejaxppo.losses import PolicyLoss, Terms, clipped_surrogate
from purejaxppo.objectives.base import Objective
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.types import Batch, Loss, Metrics, Network, Policy, PyTree


def sequence_surrogate(terms: Terms, hparams: Any) -> Array:
    """GSPO's clipped objective as a loss (Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7).

    The ratio of a response is the geometric mean of its tokens' ratios,

        s = exp(mean_t log(pi(y_t) / pi_old(y_t)))

    and is the same for all its tokens.
    """
    mean = jnp.broadcast_to(_over_response(terms, terms.log_ratio), jnp.shape(terms.log_ratio))
    return clipped_surrogate(terms._replace(log_ratio=mean), hparams)


def token_sequence_surrogate(terms: Terms, hparams: Any) -> Array:
    """GSPO-token: the ratio of `sequence_surrogate`, with the gradient of each token's own
    log-probability, so that advantages may differ within a response (Zheng et al. 2025,
    arXiv:2507.18071, eq. 13 and 14):

        s_t = stop_gradient(s) pi(y_t) / stop_gradient(pi(y_t))
    """
    mean = jax.lax.stop_gradient(_over_response(terms, terms.log_ratio))
    own = terms.log_ratio - jax.lax.stop_gradient(terms.log_ratio)
    return clipped_surrogate(terms._replace(log_ratio=mean + own), hparams)


def _over_response(terms: Terms, values: Array) -> Array:
    """Mean over the unmasked tokens of each response, `[1, B]`."""
    mask = jnp.broadcast_to(terms.mask, jnp.shape(values))
    total = jnp.sum(jnp.where(mask > 0, values, 0.0), axis=0, keepdims=True)
    return total / jnp.maximum(jnp.sum(mask, axis=0, keepdims=True), 1.0)


def kl_estimate(kind: str, log_ratio: Array) -> Array:
    """Estimate KL(pi, pi_ref) from tokens sampled from pi, where `log_ratio` is log pi - log pi_ref
    (Schulman 2020, "Approximating KL divergence").

        k1 = log_ratio    k2 = log_ratio^2 / 2    k3 = exp(-log_ratio) - 1 + log_ratio
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    return jnp.expm1(-log_ratio) + log_ratio


def with_kl(kind: str, loss: PolicyLoss) -> PolicyLoss:
    """Add `kl_coef` times an estimate of KL(pi, pi_ref) to a policy loss.

    k2 and k3 are computed for each token. The expected gradient of k2 is that of the token's
    KL(pi, pi_ref), without the effect of the token on later ones; that of k3 is the gradient of
    KL(pi_ref, pi). `k2_sequence` is half the square of the response's summed log ratio. Its
    expected gradient is that of the KL divergence of whole responses.
    """

    def penalized(terms: Terms, hparams: Any) -> Array:
        mask = jnp.broadcast_to(terms.mask, jnp.shape(terms.log_prob))
        log_ratio = jnp.where(mask > 0, terms.log_prob - terms.extras.reference, 0.0)
        if kind == "k2_sequence":
            total, length = jnp.sum(log_ratio, axis=0), jnp.sum(mask, axis=0)
            penalty = 0.5 * jnp.square(total) / jnp.maximum(length, 1.0)
        else:
            penalty = kl_estimate(kind, log_ratio)
        return loss(terms, hparams) + hparams.kl_coef * penalty

    return penalized


def make_token_loss(config: RLHFConfig, network: Network, policy: Policy) -> tuple[Objective, Loss]:
    """The objective, with the KL penalty if `kl_in` is loss, and the loss of a minibatch."""
    objective = config.token_objective.objective
    if config.kl_in == "loss":
        own = with_kl(config.kl_estimator, objective.loss)
        objective = dataclasses.replace(objective, loss=own)
    loss = make_loss(objective, network, policy)
    return objective, by_a_constant(config, loss) if config.averaging == "constant" else loss


def by_a_constant(config: RLHFConfig, loss: Loss) -> Loss:
    """Divide the summed loss of a minibatch by the maximum number of tokens instead of the actual
    number (Liu et al. 2025, arXiv:2503.20783). Metrics are still means over tokens."""
    constant = config.num_sequences * config.response_length / config.num_minibatches

    def scaled(
        params: PyTree, batch: Batch, hparams: Any, count: Array, data: PyTree = ()
    ) -> tuple[Array, Metrics]:
        value, metrics = loss(params, batch, hparams, count, data)
        return value * (count / constant), metrics

    return scaled
