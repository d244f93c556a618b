"""The whole training as one pure function, and the same in chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.inputs import as_key, check_config, check_hparams, check_state, whole_number
from purejaxppo.learner import make_learner
from purejaxppo.types import KeyLike, Learner, Metrics, TrainState

Train = Callable[[KeyLike, HParams], tuple[TrainState, Metrics]]


def make_train(config: Config, env: Any = None, env_params: Any = None) -> Train:
    """The training that a config describes, as a pure `(key, hparams) -> (state, metrics)`.

    It runs `config.num_updates` updates. Metrics are `[U]`. Put it under `jax.jit`, and under
    `jax.vmap` for several keys or hyperparameters (`vmap_axes`):

        state, metrics = jax.jit(train)(jax.random.key(0), ppo.HParams(learning_rate=1e-3))

    Args:
        env: an object that keeps gymnax 1.x's contract, in place of the one that
            `config.env_id` names.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: if the environment does not exist, or its spaces do not fit the config; when
            called, if it is not given one key and one number per hyperparameter.
    """
    check_config(config, "make_train")
    learner = make_learner(config, env, env_params)

    def train(key: KeyLike, hparams: HParams) -> tuple[TrainState, Metrics]:
        key = as_key(key, "train", "use jax.vmap(train, (0, None))(keys, hparams)")
        hint = "use jax.vmap(train, (None, ppo.vmap_axes(hparams)))(key, hparams)"
        check_hparams(hparams, "train", hint)
        return train_chunk(learner, learner.init(key, hparams), hparams, config.num_updates)

    return train


def train_chunk(
    learner: Learner, state: TrainState, hparams: HParams, num_updates: int
) -> tuple[TrainState, Metrics]:
    """Do `num_updates` updates, compiled once per `learner` and number.

    Several chunks in a row equal one long chunk, bit for bit.

    Returns:
        the state, and metrics `[num_updates]`.

    Raises:
        ConfigError: if an argument has the wrong type, or the state is of several seeds, or of a
            config that makes other shapes.
    """
    if not isinstance(learner, Learner):
        raise ConfigError(
            f"learner is of type {type(learner).__name__}: train_chunk takes the Learner that "
            "ppo.make_learner(config) returns"
        )
    call = "lambda state, hparams: ppo.train_chunk(learner, state, hparams, num_updates)"
    check_state(state, "train_chunk", f"use jax.vmap({call}, (0, None))(states, hparams)")
    hint = f"use jax.vmap({call}, (0, ppo.vmap_axes(hparams)))(states, hparams)"
    check_hparams(hparams, "train_chunk", hint)
    return _train_chunk(learner, state, hparams, whole_number("num_updates", num_updates, 0))


@partial(jax.jit, static_argnums=(0, 3))
def _train_chunk(
    learner: Learner, state: TrainState, hparams: HParams, num_updates: int
) -> tuple[TrainState, Metrics]:
    return jax.lax.scan(lambda state, _: learner.update(state, hparams), state, length=num_updates)
