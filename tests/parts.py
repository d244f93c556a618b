"""Custom parts, as a user writes them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import purejaxppo as ppo


class TwoHeads(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, obs: Any) -> Any:
        x = nn.tanh(nn.Dense(8)(obs))
        return nn.Dense(self.num_outputs)(x), nn.Dense(1)(x)[..., 0]


class Recurrent(nn.Module):
    num_outputs: int
    size: int = 8

    def initial_carry(self, n: int) -> Any:
        return jnp.zeros((n, self.size))

    @nn.compact
    def __call__(self, carry: Any, obs: Any) -> Any:
        carry, x = nn.GRUCell(self.size)(carry, obs)
        return carry, (nn.Dense(self.num_outputs)(x), nn.Dense(1)(x)[..., 0])


def adamw(hparams: ppo.HParams) -> optax.GradientTransformation:
    return optax.adamw(hparams.learning_rate, weight_decay=0.1)


def clipped(terms: Any, hparams: ppo.HParams) -> jax.Array:
    """A reimplementation of ppo_clip's loss."""
    ratio = jnp.exp(terms.log_ratio)
    near = jnp.clip(ratio, 1 - hparams.clip_eps, 1 + hparams.clip_eps)
    return -jnp.minimum(ratio * terms.advantage, near * terms.advantage)


def one_step(rollout: ppo.Rollout, hparams: ppo.HParams) -> tuple[jax.Array, jax.Array]:
    """A reimplementation of td0."""
    bootstrap = hparams.gamma * (1 - rollout.terminated) * rollout.next_value
    target = rollout.reward + bootstrap
    return target - rollout.value, target


class Written:
    """A logger that keeps everything."""

    def __init__(self, run_dir: Any = None):
        self.run_dir, self.rows, self.closed = run_dir, [], False

    def write(self, update: int, metrics: Any) -> None:
        self.rows.append((update, metrics))

    def close(self) -> None:
        self.closed = True


actor_critic = dataclasses.replace(ppo.OBJECTIVES["a2c"], name="actor_critic")


@dataclasses.dataclass(frozen=True)
class Decay(ppo.HParams):
    weight_decay: float = 0.0


def decayed(hparams: Any) -> optax.GradientTransformation:
    return optax.adamw(hparams.learning_rate, weight_decay=hparams.weight_decay)
