"""Advantage estimators: `(rollout, hparams) -> (advantage[T, N], target[T, N])`.

All use the value of the true successor, so a truncated episode bootstraps from the value of its
last observation. Only `terminated` removes the bootstrap; sums end where either flag is set, or at
the end of the rollout. The papers do not consider truncation.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.config import Config, HParams
from purejaxppo.types import Advantage, Rollout

Steps = Float[Array, "T N"]


def gae(rollout: Rollout, hparams: HParams) -> tuple[Steps, Steps]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}

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


def td0(rollout: Rollout, hparams: HParams) -> tuple[Steps, Steps]:
    """One-step temporal difference: A_t = r_t + gamma V(s'_t) - V(s_t)."""
    return gae(rollout, dataclasses.replace(hparams, gae_lambda=0.0))


def monte_carlo(rollout: Rollout, hparams: HParams) -> tuple[Steps, Steps]:
    """Monte Carlo: A_t = G_t - V(s_t). G_t sums the rewards to the end of the episode or rollout
    and bootstraps from the value only if either was cut off."""
    return gae(rollout, dataclasses.replace(hparams, gae_lambda=1.0))


def n_step(rollout: Rollout, hparams: HParams, steps: int) -> tuple[Steps, Steps]:
    """Sum of `steps` rewards, fewer if the episode ends earlier, and the value after them.

    A_t = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V(s_{t+n}) - V(s_t)
    (Mnih et al. 2016, arXiv:1602.01783, section 4).
    """
    continues = 1.0 - rollout.terminated
    one = rollout.reward + hparams.gamma * continues * rollout.next_value
    done = rollout.terminated | rollout.truncated
    ends = done.at[-1].set(True)

    def add_reward(_: Any, target: Array) -> Array:
        following = jnp.concatenate([target[1:], target[-1:]])
        return jnp.where(ends, one, rollout.reward + hparams.gamma * following)

    target = jax.lax.fori_loop(1, min(steps, len(done)), add_reward, one)
    return target - rollout.value, target


def lambda_return(rollout: Rollout, hparams: HParams) -> tuple[Steps, Steps]:
    """One reward and the lambda-return after it: A_t = r_t + gamma G_{t+1} - V(s_t).

    `gae` is G_t - V(s_t). This estimator also replaces the next value by the lambda-return, as
    V-trace does (Espeholt et al. 2018, arXiv:1802.01561, section 4.2): at lambda 0 it uses two
    rewards instead of one, at lambda 1 both equal `monte_carlo`.
    """
    _, target = gae(rollout, hparams)
    done = rollout.terminated | rollout.truncated
    ends = done.at[-1].set(True)
    following = jnp.where(ends, rollout.next_value, jnp.roll(target, -1, axis=0))
    continues = 1.0 - rollout.terminated
    advantage = rollout.reward + hparams.gamma * continues * following - rollout.value
    return advantage, target


def make_advantage(config: Config) -> Advantage:
    """Make the estimator that `config.advantage` names, for rollouts with values."""
    estimators: dict[str, Advantage] = {
        "monte_carlo": monte_carlo,
        "td0": td0,
        "n_step": partial(n_step, steps=config.bootstrap_steps),
        "gae": gae,
        "lambda_return": lambda_return,
    }
    return estimators[config.advantage]


def clip_rewards(advantage: Advantage, bound: float) -> Advantage:
    """The estimator with rewards clipped to +-`bound`."""

    def clipped(rollout: Rollout, hparams: Any) -> tuple[Array, ...]:
        reward = jnp.clip(rollout.reward, -bound, bound)
        return advantage(rollout._replace(reward=reward), hparams)

    return clipped


def alternating(advantage: Advantage) -> Advantage:
    """The estimator for two players with opposite rewards who take turns: the value of the next
    state is the negative of its value for the player who then moves. With GAE:

        delta_t = r_t - gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t - gamma lambda (1 - done_t) A_{t+1}

    Signs that alternate over time turn this into the estimator for one player.
    """

    def estimate(rollout: Rollout, hparams: Any) -> tuple[Array, ...]:
        sign = 1.0 - 2.0 * (jnp.arange(rollout.reward.shape[0]) % 2)[:, None]
        one_player = rollout._replace(
            reward=sign * rollout.reward,
            value=sign * rollout.value,
            next_value=-sign * rollout.next_value,
        )
        found, target, *weight = advantage(one_player, hparams)
        return sign * found, sign * target, *weight

    return estimate
