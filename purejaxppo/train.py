"""The whole training as one pure function, and the same in chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Key

from purejaxppo.config import Config, HParams
from purejaxppo.learner import make_learner
from purejaxppo.types import Learner, Metrics, TrainState

Train = Callable[[Key[Array, ""], HParams], tuple[TrainState, Metrics]]


def make_train(config: Config, env: Any = None, env_params: Any = None) -> Train:
    """The training that a config describes, as a pure `(key, hparams) -> (state, metrics)`.

    It runs `config.num_updates` updates. Metrics are `[U]`. Put it under `jax.jit` and
    `jax.vmap` as you like.

    Args:
        env: an object that keeps gymnax 1.x's contract, in place of the one that
            `config.env_id` names.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: if the environment does not exist, or its spaces do not fit the config.
    """
    learner = make_learner(config, env, env_params)

    def train(key: Key[Array, ""], hparams: HParams) -> tuple[TrainState, Metrics]:
        return train_chunk(learner, learner.init(key, hparams), hparams, config.num_updates)

    return train


@partial(jax.jit, static_argnums=(0, 3), static_argnames=("learner", "num_updates"))
def train_chunk(
    learner: Learner, state: TrainState, hparams: HParams, num_updates: int
) -> tuple[TrainState, Metrics]:
    """`num_updates` updates. Chunks one after the other equal one long chunk, bit for bit.

    Returns:
        the state, and metrics `[num_updates]`.
    """
    return jax.lax.scan(lambda state, _: learner.update(state, hparams), state, length=num_updates)
