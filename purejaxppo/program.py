"""What a run compiles: the initial states, a chunk of updates of any length, an evaluation."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from purejaxppo.config import HParams
from purejaxppo.configfile import Settings
from purejaxppo.evaluate import FINAL_EVALUATION, evaluate, evaluation_keys
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
    """Compiled for the S seeds of a run."""

    begin: Callable[[], TrainState]
    """The states `[S, ...]` to start from."""
    chunk: Callable[[TrainState, int], tuple[TrainState, Metrics]]
    """`(states, count) -> (states, metrics[capacity, S])`, of which `count` rows are filled."""


def compile_program(learner: Learner, settings: Settings, states: TrainState | None) -> Program:
    """Compile a chunk, and what makes the first states unless `states` are given."""
    hparams, num_seeds = settings.hparams, settings.run.num_seeds
    root = jax.random.key(settings.run.seed)

    def init(key: jax.Array, hparams: HParams) -> TrainState:
        return _over_seeds(learner.init, jax.random.split(key, num_seeds), hparams)

    traced = jax.jit(init).trace(root, hparams)
    begin = traced.lower().compile() if states is None else lambda *_: states
    capacity = min(settings.config.num_updates, CHUNK_CAPACITY)
    chunk = jax.jit(
        lambda states, hparams, count: _chunk(learner, states, hparams, count, capacity)
    )
    compiled = chunk.lower(traced.out_info, hparams, jnp.int32(1)).compile()
    return Program(
        lambda: begin(root, hparams),
        lambda states, count: compiled(states, hparams, jnp.int32(count)),
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


def _over_seeds(function: Callable[..., Any], states: Any, hparams: HParams) -> Any:
    """`vmap`, but for a single seed, whose conditionals then stay conditionals."""
    if jax.tree.leaves(states)[0].shape[0] > 1:
        return jax.vmap(function, (0, None))(states, hparams)
    single = function(jax.tree.map(lambda x: x[0], states), hparams)
    return jax.tree.map(lambda x: x[None], single)


def _chunk(
    learner: Learner, states: TrainState, hparams: HParams, count: jax.Array, capacity: int
) -> tuple[TrainState, Metrics]:
    """`count` updates, at most `capacity`; one program for every count.

    Returns:
        states, and metrics `[capacity, S]` of which the first `count` rows are filled.
    """
    shapes = jax.eval_shape(lambda s: _over_seeds(learner.update, s, hparams)[1], states)
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        states, rows = carry
        states, metrics = _over_seeds(learner.update, states, hparams)
        return states, jax.tree.map(lambda all_, row: all_.at[i].set(row), rows, metrics)

    return jax.lax.fori_loop(0, count, body, (states, rows))
