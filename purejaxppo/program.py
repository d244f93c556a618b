"""What a run compiles: the initial states, a chunk of updates of any length, an evaluation."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jax.sharding import PartitionSpec

from purejaxppo.config import HParams
from purejaxppo.configfile import Settings
from purejaxppo.evaluate import FINAL_EVALUATION, evaluate, evaluation_keys
from purejaxppo.learner import make_learner
from purejaxppo.parallel import choose_spread, each_seed
from purejaxppo.types import Learner, Metrics, TrainState

CHUNK_CAPACITY = 1024
"""Updates that one call can do at most."""


def enable_compilation_cache() -> None:
    """Keep compiled programs in `$XDG_CACHE_HOME/purejaxppo` (`~/.cache/purejaxppo`), unless JAX
    already has a folder for them."""
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "purejaxppo"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # What was compiled before left the cache initialised as absent.
    jax_cache.reset_cache()


class Program(NamedTuple):
    """Compiled for the S seeds of a run and the devices it is spread over."""

    begin: Callable[[], TrainState]
    """The states `[S, ...]` to start from."""
    chunk: Callable[[TrainState, int], tuple[TrainState, Metrics]]
    """`(states, count) -> (states, metrics[capacity, S])`, of which `count` rows are filled."""
    gather: Callable[[TrainState], TrainState]
    """States to a single device."""


def compile_program(
    settings: Settings, states: TrainState | None = None, env: Any = None, env_params: Any = None
) -> Program:
    """Compile a chunk, and what makes the first states unless `states` are given.

    Raises:
        ConfigError: as `choose_spread` does.
    """
    spread, hparams = choose_spread(settings), settings.hparams
    learner = make_learner(settings.config, env, env_params, axis=spread.axis)
    capacity = min(settings.config.num_updates, CHUNK_CAPACITY)
    root = jax.random.key(settings.run.seed)
    everywhere = PartitionSpec()

    def begin(keys: jax.Array, hparams: HParams) -> TrainState:
        return each_seed(lambda key: learner.init(key, hparams), keys)

    def init(root: jax.Array, hparams: HParams) -> TrainState:
        keys = jax.random.split(root, settings.run.num_seeds)
        return spread.over(begin, (spread.keys, everywhere), spread.states)(keys, hparams)

    def chunk(states: TrainState, hparams: HParams, count: jax.Array) -> Any:
        return _chunk(learner, states, hparams, count, capacity)

    traced = jax.jit(init).trace(root, hparams)
    compiled_init: Any = traced.lower().compile() if states is None else None
    inputs = (spread.states, everywhere, everywhere)
    chunks = spread.over(chunk, inputs, (spread.states, spread.rows))
    compiled = (
        jax.jit(chunks).lower(spread.shapes(traced.out_info), hparams, jnp.int32(1)).compile()
    )

    def start() -> TrainState:
        return compiled_init(root, hparams) if states is None else spread.scatter(states)

    return Program(
        start,
        # Scattered again: XLA calls an empty array replicated, whatever it was told.
        lambda states, count: compiled(spread.scatter(states), hparams, jnp.int32(count)),
        spread.gather,
    )


def make_evaluation(
    settings: Settings, env: Any, env_params: Any
) -> Callable[[TrainState], np.ndarray]:
    """`states[S, ...] -> returns[S, E]` of the same episodes each time; compiled when called."""
    keys = evaluation_keys(settings.run.seed, settings.run.num_seeds, FINAL_EVALUATION)
    episodes = settings.run.eval_episodes

    def returns(state: TrainState, key: jax.Array) -> jax.Array:
        return evaluate(settings.config, state, key, episodes, env=env, env_params=env_params)

    compiled = jax.jit(jax.vmap(returns))
    return lambda states: np.asarray(compiled(states, keys))


def _chunk(
    learner: Learner, states: TrainState, hparams: HParams, count: jax.Array, capacity: int
) -> tuple[TrainState, Metrics]:
    """`count` updates, at most `capacity`; one program for every count.

    Returns:
        states, and metrics `[capacity, S]` of which the first `count` rows are filled.
    """
    update = jax.jit(learner.update)  # so that both uses below are one trace

    def train(state: TrainState) -> tuple[TrainState, Metrics]:
        shapes = jax.eval_shape(update, state, hparams)[1]
        rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

        def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, rows = carry
            state, metrics = update(state, hparams)
            return state, jax.tree.map(lambda all_, row: all_.at[i].set(row), rows, metrics)

        return jax.lax.fori_loop(0, count, body, (state, rows))

    states, rows = each_seed(train, states)
    return states, jax.tree.map(lambda x: x.swapaxes(0, 1), rows)
