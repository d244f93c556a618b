"""The adaptive KL penalty."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from purejaxppo.config import HParams

DEFAULT_TARGET_KL = 0.01
BETA_RANGE = (1e-8, 1e8)


def initial_beta(hparams: HParams) -> Array:
    """The initial weight of the penalty, `kl_beta`."""
    return jnp.asarray(hparams.kl_beta, jnp.float32)


def next_beta(beta: Any, kl: Array, hparams: HParams) -> Array:
    """`adapted_beta` for the target `target_kl` (None uses 0.01)."""
    target_kl = DEFAULT_TARGET_KL if hparams.target_kl is None else hparams.target_kl
    return adapted_beta(jnp.asarray(beta), kl, target_kl)


def adapted_beta(beta: Array, kl: Array, target_kl: Array | float) -> Array:
    """The penalty's next weight: halved if the KL divergence is below target / 1.5, doubled if it
    is above 1.5 target (Schulman et al. 2017, arXiv:1707.06347, section 4). Unlike in the paper, it
    is clipped to `BETA_RANGE`, since a weight that reaches 0 would stay 0."""
    factor = jnp.where(kl < target_kl / 1.5, 0.5, jnp.where(kl > 1.5 * target_kl, 2.0, 1.0))
    return jnp.clip(beta * factor, *BETA_RANGE)
