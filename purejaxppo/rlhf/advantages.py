"""Advantages of generated tokens.

Responses to one prompt are consecutive rows, so `[N]` reshapes to `[G, K]`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.advantages import gae
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.rlhf.table import TOKEN_OBJECTIVES
from purejaxppo.types import Rollout

_SMALLEST_STD = 1e-6
"""Standard deviation, relative to the mean, below which returns count as equal."""

Groups = Float[Array, "G K"]


def estimate(config: RLHFConfig, rollout: Rollout, hparams: Any) -> tuple[Array, Array, Array]:
    """Advantages, targets and weights `[T, N]` of generated tokens.

    With a critic: `gae`. Without: (x - baseline) * scale, where x is the return of the response or
    the reward-to-go of the token.
    """
    chosen, mask = TOKEN_OBJECTIVES[config.objective], rollout.mask
    lengths = jnp.maximum(jnp.sum(mask, axis=0), 1.0)
    weight = mask / lengths if config.averaging == "sequences" else mask
    if config.oversampling > 1:
        weight = weight * rollout.extras.kept
    if chosen.objective.has_critic:
        return *gae(rollout, hparams), weight
    reward = jnp.where(mask > 0, rollout.reward, 0.0)
    to_go = jax.lax.cumsum(reward, axis=0, reverse=True)
    returns = to_go[0]
    advantage = to_go if chosen.per_token else jnp.broadcast_to(returns, mask.shape)
    if chosen.baseline is not None:
        baseline, scale = chosen.baseline(returns.reshape(-1, config.group_size))
        advantage = (advantage - baseline.reshape(-1)) * scale.reshape(-1)
    return advantage, rollout.value, weight


def leave_one_out(returns: Groups) -> tuple[Groups, Groups]:
    """The baseline of a response is the mean return of the other responses in its group (Kool et
    al. 2019; Ahmadian et al. 2024, arXiv:2402.14740, eq. 5). It does not depend on the response, so
    the gradient stays unbiased."""
    mean = jnp.mean(returns, axis=1, keepdims=True)
    baseline = mean + (mean - returns) / (returns.shape[1] - 1)
    return baseline, jnp.ones_like(returns)


def standardized(returns: Groups) -> tuple[Groups, Groups]:
    """(R_i - mean) / std within the group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2), with
    K - 1 degrees of freedom; 0 if all returns are equal. Groups with a small spread have the same
    weight as others, which biases the gradient."""
    mean = jnp.mean(returns, axis=1, keepdims=True)
    std = jnp.std(returns, axis=1, ddof=1, keepdims=True)
    differ = std > _SMALLEST_STD * jnp.abs(mean)
    scale = jnp.where(differ, 1.0 / jnp.where(differ, std, 1.0), 0.0)
    shape = returns.shape
    return jnp.broadcast_to(mean, shape), jnp.broadcast_to(scale, shape)


def centred(returns: Groups) -> tuple[Groups, Groups]:
    """R_i minus the mean of the group (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). This is
    (K - 1) / K times the advantage of `leave_one_out`."""
    mean = jnp.mean(returns, axis=1, keepdims=True)
    return jnp.broadcast_to(mean, returns.shape), jnp.ones_like(returns)
