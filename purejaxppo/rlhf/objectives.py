"""Objectives for responses, and their advantages.

Each is a value: a policy loss of the core, an estimator `(rollout, hparams) -> (advantage[T, N],
target[T, N], weight[T, N])`, and whether there is a critic. Responses to one prompt are
consecutive rows, so `[N]` reshapes to `[N / K, K]`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.advantages import gae
from purejaxppo.losses import Terms, clipped_surrogate
from purejaxppo.objectives.base import Objective
from purejaxppo.objectives.table import OBJECTIVES
from purejaxppo.types import Advantage, Rollout

_SMALLEST_STD = 1e-6
"""Standard deviation, relative to the mean, below which returns count as equal."""


@dataclass(frozen=True)
class TokenObjective:
    """An objective for sequences of tokens."""

    objective: Objective
    relative: Callable[[Float[Array, "G K"]], Float[Array, "G K"]] | None
    """Returns of the responses to G prompts to their advantages; None uses a critic and GAE."""
    average: str
    """What is averaged: all tokens of a batch alike (`tokens`), or first within each response
    (`sequences`)."""

    def advantage(self, group_size: int) -> Advantage:
        """`(rollout, hparams) -> (advantage, target, weight)`."""
        return partial(estimate, self, group_size)


def estimate(
    token_objective: TokenObjective, group_size: int, rollout: Rollout, hparams: Any
) -> tuple[Array, Array, Array]:
    """Advantages, targets and weights `[T, N]` of generated tokens.

    Rewards of a response are summed; with a critic, `gae` is used instead.
    """
    mask, lengths = rollout.mask, jnp.sum(rollout.mask, axis=0)
    weight = mask / lengths if token_objective.average == "sequences" else mask
    if token_objective.relative is None:
        return *gae(rollout, hparams), weight
    returns = jnp.sum(rollout.reward * mask, axis=0).reshape(-1, group_size)
    advantage = token_objective.relative(returns).reshape(-1)
    return jnp.broadcast_to(advantage, mask.shape), rollout.value, weight


def leave_one_out(returns: Float[Array, "G K"]) -> Float[Array, "G K"]:
    """R_i minus the mean of the others (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740,
    eq. 5). The baseline does not depend on the response, so the gradient stays unbiased."""
    size = returns.shape[1]
    return (returns - jnp.mean(returns, axis=1, keepdims=True)) * size / (size - 1)


def standardized(returns: Float[Array, "G K"]) -> Float[Array, "G K"]:
    """(R_i - mean) / std within the group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2), with
    the standard deviation of K - 1 degrees of freedom; 0 if all are equal. Groups with a small
    spread weigh as much as others, which biases the gradient."""
    mean = jnp.mean(returns, axis=1, keepdims=True)
    std = jnp.std(returns, axis=1, ddof=1, keepdims=True)
    differ = std > _SMALLEST_STD * jnp.abs(mean)
    return jnp.where(differ, (returns - mean) / jnp.where(differ, std, 1.0), 0.0)


def centred(returns: Float[Array, "G K"]) -> Float[Array, "G K"]:
    """R_i minus the mean of the group (Liu et al. 2025, arXiv:2503.20783, Dr. GRPO)."""
    return returns - jnp.mean(returns, axis=1, keepdims=True)


def sequence_surrogate(terms: Terms, hparams: Any) -> Array:
    """GSPO's clipped objective as a loss (Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7).

    The ratio of a response is the geometric mean of its tokens' ratios,

        s = exp(mean_t log(pi(y_t) / pi_old(y_t)))

    and is the same for all its tokens, which are axis 0 of the terms.
    """
    mask = jnp.broadcast_to(terms.mask, jnp.shape(terms.log_ratio))
    total = jnp.sum(jnp.where(mask > 0, terms.log_ratio, 0.0), axis=0)
    mean = total / jnp.maximum(jnp.sum(mask, axis=0), 1.0)
    return clipped_surrogate(
        terms._replace(log_ratio=jnp.broadcast_to(mean, jnp.shape(terms.log_ratio))), hparams
    )


_CLIP = OBJECTIVES["ppo_clip"]
_NO_CRITIC = dataclasses.replace(_CLIP, has_critic=False)
_GSPO = dataclasses.replace(_NO_CRITIC, name="gspo", loss=sequence_surrogate)


def _named(name: str) -> Objective:
    return dataclasses.replace(_NO_CRITIC, name=name)


_ALL = (
    TokenObjective(_CLIP, None, "tokens"),
    TokenObjective(_named("rloo"), leave_one_out, "tokens"),
    TokenObjective(_named("grpo"), standardized, "sequences"),
    TokenObjective(_named("dr_grpo"), centred, "tokens"),
    TokenObjective(_GSPO, standardized, "sequences"),
)
TOKEN_OBJECTIVES: Mapping[str, TokenObjective] = MappingProxyType(
    {x.objective.name: x for x in _ALL}
)
"""The objectives for tokens by name (`RLHFConfig.objective`)."""
