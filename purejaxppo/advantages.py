"""Advantage estimators: `(rollout, hparams) -> (advantage[T, N], target[T, N])`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.config import HParams
from purejaxppo.types import Rollout


def gae(rollout: Rollout, hparams: HParams) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}

    `s'_t` is the true successor, so a truncated episode bootstraps from the value of its last
    observation: only `terminated` cuts the bootstrap, while the sum ends where either flag is
    set. The paper has no truncation.

    Returns:
        `advantage[T, N]`, and `target[T, N] = advantage + value`, the lambda-return.
    """
    continues = 1.0 - rollout.terminated
    delta = rollout.reward + hparams.gamma * continues * rollout.next_value - rollout.value
    done = rollout.terminated | rollout.truncated
    decay = hparams.gamma * hparams.gae_lambda * (1.0 - done)

    def step(following: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, decay = inputs
        advantage = delta + decay * following
        return advantage, advantage

    _, advantage = jax.lax.scan(step, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantage, advantage + rollout.value
