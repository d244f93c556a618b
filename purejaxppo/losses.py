"""Per-sample losses, and standardisation of advantages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.collectives import masked_mean
from purejaxppo.config import HParams

Samples = Float[Array, "*batch"]


def standardize(values: Samples, mask: Samples, axis: str | None = None) -> Samples:
    """Shift and scale `values` to mean 0 and standard deviation 1 over the masked samples of all
    devices along `axis`; 0 if they are equal up to rounding."""
    mean = masked_mean(values, mask, axis)
    std = jnp.sqrt(masked_mean(jnp.square(values - mean), mask, axis))
    scaled = (values - mean) / (std + 1e-8)
    return jnp.where(std > 1e-6 * jnp.abs(mean), scaled, 0.0)


class Terms(NamedTuple):
    """Inputs of a policy loss, per sample."""

    log_prob: Samples
    """log pi(a|s)"""
    log_ratio: Samples
    """log pi(a|s) - log pi_old(a|s)"""
    advantage: Samples
    kl: Samples | float = 0.0
    """KL(pi_old, pi) at s, if the objective needs it."""
    mask: Samples | float = 1.0
    """1 for steps that count. With sequences, a loss may combine the steps of each (axis 0)."""
    extras: Any = ()
    """`Rollout.extras` of the samples."""


PolicyLoss = Callable[[Terms, HParams], Samples]


def policy_gradient(terms: Terms, hparams: HParams) -> Samples:
    """-log pi(a|s) A, whose gradient is the policy gradient (Williams 1992; Sutton et al. 1999)."""
    return -terms.log_prob * terms.advantage


def surrogate(terms: Terms, hparams: HParams) -> Samples:
    """-r A with r = pi(a|s) / pi_old(a|s): importance sampling of pi from actions of pi_old
    (Schulman et al. 2015, arXiv:1502.05477, eq. 14)."""
    return -jnp.exp(terms.log_ratio) * terms.advantage


def penalized_surrogate(terms: Terms, hparams: HParams) -> Samples:
    """-r A + beta KL(pi_old, pi) (Schulman et al. 2017, arXiv:1707.06347, eq. 8)."""
    return surrogate(terms, hparams) + hparams.kl_beta * terms.kl


def clipped_surrogate(terms: Terms, hparams: HParams) -> Samples:
    """PPO's clipped objective as a loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

        -min(r A, clip(r, 1 - eps, 1 + eps) A)

    `clip_higher` replaces eps at the upper end (Yu et al. 2025, arXiv:2503.14476). With `dual_clip`
    c, the objective is at least c A where A < 0 (Ye et al. 2020, arXiv:1912.09729, eq. 5).
    """
    ratio, advantage = jnp.exp(terms.log_ratio), terms.advantage
    higher = hparams.clip_eps if hparams.clip_higher is None else hparams.clip_higher
    clipped = jnp.clip(ratio, 1.0 - hparams.clip_eps, 1.0 + higher)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    if hparams.dual_clip is not None:
        bounded = jnp.maximum(objective, hparams.dual_clip * advantage)
        objective = jnp.where(advantage < 0, bounded, objective)
    return -objective


def value_loss(
    value: Samples, old_value: Samples, target: Samples, clip_eps: Array | float | None
) -> Samples:
    """Half the squared error of the value; with `clip_eps`, the larger of it and the error of the
    value clipped to within `clip_eps` of the rollout's.

        max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2

    The clipped form is OpenAI Baselines' (ppo2); it is not in the paper.
    """
    error = jnp.square(value - target)
    if clip_eps is not None:
        clipped = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
        error = jnp.maximum(error, jnp.square(clipped - target))
    return 0.5 * error


def approximate_kl(log_ratio: Samples) -> Samples:
    """Per-sample estimate of KL(pi_old, pi) from actions of pi_old: (r - 1) - log r.

    Unbiased, never negative, of low variance near r = 1 (Schulman 2020, "Approximating KL
    divergence", the estimator k3). `expm1` keeps it exact for small log ratios.
    """
    return jnp.expm1(log_ratio) - log_ratio
