"""The programs that a run compiles: initial states, a chunk of updates, an evaluation."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jax.sharding import PartitionSpec

from purejaxppo.config import ConfigError, HParams
from purejaxppo.evaluation import FINAL_EVALUATION, evaluation_keys
from purejaxppo.host.configfile import Settings
from purejaxppo.host.hostcalls import Returns, compile_host_chunk
from purejaxppo.host.loggers import in_order
from purejaxppo.host.parallel import Spread, choose_spread, each_seed
from purejaxppo.host.population import (
    Population,
    member_learner,
    train_population,
    without_members,
)
from purejaxppo.task import Task
from purejaxppo.types import Learner, Metrics, PyTree, TrainState

CHUNK_CAPACITY = 1024
"""Maximum number of updates in one call."""


def enable_compilation_cache() -> None:
    """Cache all programs that this process compiles on disk, so that later processes can load them.

    They go to `$XDG_CACHE_HOME/purejaxppo`, or `~/.cache/purejaxppo`. If JAX already has a cache
    folder (`JAX_COMPILATION_CACHE_DIR`, or an earlier call), nothing changes. Call it before the
    first `jax.jit`; `run`, `sweep` and the command line do so themselves:

        ppo.enable_compilation_cache()
        state, metrics = jax.jit(ppo.make_train(config))(key, hparams)
    """
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "purejaxppo"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # If anything was compiled before, JAX has recorded that there is no cache.
    jax_cache.reset_cache()


class Program(NamedTuple):
    """Programs compiled for S parallel runs and the devices over which they are spread."""

    begin: Callable[[HParams], TrainState]
    """`hparams[S] -> states[S, ...]`: the initial states."""
    chunk: Callable[[TrainState, HParams, int], tuple[TrainState, Metrics]]
    """`(states, hparams[S], count) -> (states, metrics[capacity, S])`, of which `count` rows are
    filled. Raises `InterruptedChunkError` if Python code between updates fails."""
    gather: Callable[[TrainState], TrainState]
    """Moves states to a single device."""
    device_bytes: int
    """Memory of a chunk on each device by XLA's analysis: arguments, results and temporaries."""
    spread: Spread
    """How the run is spread over the devices."""
    columns: tuple[str, ...]
    """Names of the metrics, in the order of a table's columns."""


class Evaluation:
    """Returns of the states `[S, ...]` of S runs over `settings.run.eval_episodes` episodes each.

    One program is used for sampled and deterministic actions and for every set of episodes. It is
    compiled by `compile`, or at the first call. The episodes depend only on the seed and `purpose`.
    """

    def __init__(self, settings: Settings, task: Task):
        self._settings, self._data = settings, task.data
        self._returns = Returns(task, settings.run.eval_episodes)
        self._compiled: Any = None
        self._split = task.evaluation_call is not None

    def compile(self, shapes: TrainState) -> None:
        """Compile for states of these shapes on this process's first device, unless Python code
        runs between two parts."""
        if self._split:
            return
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        rows = self._rows(False, FINAL_EVALUATION)
        self._compiled = self._returns.jitted.lower(placed, *rows, self._data).compile()

    def __call__(
        self, states: TrainState, *, deterministic: bool = False, purpose: int = FINAL_EVALUATION
    ) -> np.ndarray:
        """`states[S, ...] -> returns[S, E]`; NaN for an episode that did not end."""
        rows = self._rows(deterministic, purpose)
        if self._compiled is None:
            return self._returns(states, *rows)
        return np.asarray(self._compiled(states, *rows, self._data))

    def _rows(self, deterministic: bool, purpose: int) -> tuple[jax.Array, jax.Array]:
        num_seeds, total = self._settings.run.num_seeds, self._settings.num_runs
        keys = evaluation_keys(self._settings.run.seed, num_seeds, purpose)
        return jnp.tile(keys, total // num_seeds), jnp.full(total, deterministic)


class Prepared(NamedTuple):
    """The task of a run and its compiled programs."""

    task: Task
    learner: Learner
    """The learner that is not spread over devices; checkpoints hold its states."""
    program: Program
    evaluation: Any
    """`Evaluation`, or `states[S, ...] -> returns[S, E]` of a population."""
    compile_seconds: float = 0.0
    population: bool = False
    """Whether the runs form a population, in which a failed run may be replaced."""


def prepare(settings: Settings, task: Task, population: Population | None = None) -> Prepared:
    """Compile for waves with the number of trials in `settings`. Raises `ConfigError` as
    `compile_program` does."""
    learner = task.learner(None)
    program = compile_program(settings, task, population=population)
    evaluation = Evaluation(settings, task)
    if population is None:
        return Prepared(task, learner, program, evaluation)
    return Prepared(
        task, member_learner(learner, task.rank), program,
        lambda x: evaluation(without_members(x)), population=True,
    )  # fmt: skip


def stacked_hparams(settings: Settings) -> HParams:
    """The hyperparameters of all runs, as leaves `[S]`."""
    trials = settings.trials or (settings.hparams,)

    def stack(*values: Any) -> Any:
        return np.repeat(np.asarray(values, np.float32), settings.run.num_seeds)

    return jax.tree.map(stack, *trials)


def compile_program(
    settings: Settings,
    task: Task,
    *,
    fresh: bool = True,
    population: Population | None = None,
    evaluation: Evaluation | None = None,
) -> Program:
    """Compile a chunk of updates for the shapes that the settings give.

    Args:
        fresh: compile the initial states too; False if they come from a checkpoint.
        population: settings of population-based training, if used. Each run's state then holds its
            hyperparameters, and each run has its own random numbers.
        evaluation: compiled too, if given.

    Raises:
        ConfigError: as `choose_spread` does.
    """
    spread, hparams, data = choose_spread(settings, task), stacked_hparams(settings), task.data
    learner = task.learner(spread.axis)
    if population is not None:
        learner = member_learner(learner, task.rank)
    capacity = min(settings.config.num_updates, CHUNK_CAPACITY)
    root = np.asarray(jax.random.key_data(jax.random.key(settings.run.seed)))
    init = _make_init(settings, learner, spread, independent=population is not None)

    def chunk(states: TrainState, hparams: HParams, count: jax.Array, data: PyTree) -> Any:
        if population is not None:
            return train_population(
                learner, population, states, hparams, count, capacity=capacity, data=data
            )
        return _chunk(learner, states, hparams, count, capacity=capacity, data=data)

    if task.update_call is not None and population is not None:
        raise ConfigError(
            "strategy = pbt: its exchanges are part of the compiled program, but this run calls a "
            "Python function in each update; use another strategy"
        )
    traced = jax.jit(init).trace(root, hparams, data)
    inputs = (spread.states, spread.seeds, PartitionSpec(), PartitionSpec())
    over = spread.over(chunk, inputs, (spread.states, spread.rows))

    def chunks(states: TrainState, hparams: HParams, count: jax.Array, data: PyTree) -> Any:
        states, rows = over(states, hparams, count, data)
        return states, spread.to_all(rows)

    shapes = spread.shapes(traced.out_info)
    if task.update_call is not None:
        run_chunk, compiled, rows = compile_host_chunk(
            task.update_call, learner, spread, shapes=shapes, hparams=hparams, data=data
        )
    else:
        traced_chunks = jax.jit(chunks).trace(shapes, hparams, np.int32(1), data)
        compiled, rows = traced_chunks.lower().compile(), traced_chunks.out_info[1]
        # Scatter again, since XLA marks an empty array as replicated despite its sharding.
        run_chunk = lambda states, hparams, count: compiled(  # noqa: E731
            spread.scatter(states), hparams, np.int32(count), data
        )
    compiled_init: Any = traced.lower().compile() if fresh else None
    if evaluation is not None:
        evaluation.compile(traced.out_info)
    return Program(
        lambda hparams: compiled_init(root, hparams, data),
        run_chunk,
        spread.gather,
        _bytes(compiled),
        spread,
        in_order(rows),
    )


def _make_init(
    settings: Settings, learner: Learner, spread: Spread, independent: bool
) -> Callable[[jax.Array, HParams, PyTree], TrainState]:
    """`(root key's data, hparams[S], data) -> states[S, ...]`.

    Args:
        independent: give each run its own random numbers; otherwise all trials share seeds.
    """
    num_keys = settings.num_runs if independent else settings.run.num_seeds

    def init(root: jax.Array, hparams: HParams, data: PyTree) -> TrainState:
        keys = jax.random.split(jax.random.wrap_key_data(root), num_keys)
        keys = jnp.tile(keys, settings.num_runs // num_keys)
        begin = spread.over(
            lambda keys, hparams, data: each_seed(
                lambda row: learner.init(row[0], row[1], data), (keys, hparams)
            ),
            (spread.seeds, spread.seeds, PartitionSpec()),
            spread.states,
        )
        return begin(keys, hparams, data)

    return init


def _bytes(compiled: Any) -> int:
    stats = compiled.memory_analysis()
    used = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return used - stats.alias_size_in_bytes


def _chunk(
    learner: Learner,
    states: TrainState,
    hparams: HParams,
    count: jax.Array,
    *,
    capacity: int,
    data: PyTree,
) -> tuple[TrainState, Metrics]:
    """Do `count` updates, at most `capacity`, of states and hyperparameters `[S, ...]`. One program
    is used for every count.

    Returns:
        states, and metrics `[capacity, S]`, of which the first `count` rows are filled.
    """
    update = jax.jit(learner.update)  # traced once for both uses below

    def train(row: tuple[TrainState, HParams]) -> tuple[TrainState, Metrics]:
        state, hparams = row
        shapes = jax.eval_shape(update, state, hparams, data)[1]
        rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

        def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, rows = carry
            state, metrics = update(state, hparams, data)
            return state, jax.tree.map(lambda all_, row: all_.at[i].set(row), rows, metrics)

        return jax.lax.fori_loop(0, count, body, (state, rows))

    states, rows = each_seed(train, (states, hparams))
    return states, jax.tree.map(lambda x: x.swapaxes(0, 1), rows)
