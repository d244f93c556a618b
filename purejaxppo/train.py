"""Several updates as one pure function, compiled once."""

from collections.abc import Callable
from functools import partial

import jax

from purejaxppo.config import ConfigError, HParams
from purejaxppo.inputs import check_hparams, check_state, whole_number
from purejaxppo.types import KeyLike, Learner, Metrics, PyTree, TrainState

Train = Callable[[KeyLike, HParams], tuple[TrainState, Metrics]]
"""`(key, hparams) -> (state, metrics[U])`."""


def train_chunk(
    learner: Learner, state: TrainState, hparams: HParams, num_updates: int, *data: PyTree
) -> tuple[TrainState, Metrics]:
    """Run `num_updates` updates; compiled once per `learner` and number.

    Several chunks in a row equal one long chunk, bit for bit.

    Args:
        data: the learner's `data`, which replaces the task's.

    Returns:
        the state, and metrics `[num_updates]`.

    Raises:
        ConfigError: if an argument has the wrong type, or the state is of several seeds or of a
            config with different shapes.
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
    count = whole_number("num_updates", num_updates, 0)
    return _train_chunk(learner, state, hparams, count, *data)


@partial(jax.jit, static_argnums=(0, 3))
def _train_chunk(
    learner: Learner, state: TrainState, hparams: HParams, num_updates: int, *data: PyTree
) -> tuple[TrainState, Metrics]:
    return jax.lax.scan(
        lambda state, _: learner.update(state, hparams, *data), state, length=num_updates
    )
