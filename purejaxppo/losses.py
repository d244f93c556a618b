"""Per-sample losses, and the standardising of advantages."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.collectives import masked_mean

Samples = Float[Array, "*batch"]


def standardize(values: Samples, mask: Samples, axis: str | None = None) -> Samples:
    """`values` shifted and scaled to mean 0 and standard deviation 1 over the masked samples, of
    all devices along `axis`."""
    mean = masked_mean(values, mask, axis)
    var = masked_mean(jnp.square(values - mean), mask, axis)
    return (values - mean) / (jnp.sqrt(var) + 1e-8)


def clipped_surrogate(log_ratio: Samples, advantage: Samples, clip_eps: Array | float) -> Samples:
    """PPO's clipped objective as a loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    -min(r A, clip(r, 1 - eps, 1 + eps) A) with r = pi(a|s) / pi_old(a|s) = exp(log_ratio)
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def value_loss(
    value: Samples, old_value: Samples, target: Samples, clip_eps: Array | float | None
) -> Samples:
    """Half the squared error of the value; with `clip_eps`, the larger of it and that of a value
    held within `clip_eps` of the rollout's.

        max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2

    The clipped form is OpenAI Baselines' (ppo2); it is not in the paper.
    """
    error = jnp.square(value - target)
    if clip_eps is not None:
        held = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
        error = jnp.maximum(error, jnp.square(held - target))
    return 0.5 * error


def approximate_kl(log_ratio: Samples) -> Samples:
    """Per-sample estimate of KL(pi_old, pi) from actions of pi_old: (r - 1) - log r.

    Unbiased, never negative, of low variance near r = 1 (Schulman 2020, "Approximating KL
    divergence", the estimator k3). `expm1` keeps it exact for small log ratios.
    """
    return jnp.expm1(log_ratio) - log_ratio
