"""Updates and evaluations with Python code between two compiled calls."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from purejaxppo.between import HostCall
from purejaxppo.checks import ConfigError, HostCallError
from purejaxppo.host.parallel import Spread, each_seed
from purejaxppo.task import Task
from purejaxppo.types import Learner, Metrics, PyTree, TrainState


class InterruptedChunkError(Exception):
    """The Python code failed between the updates of a chunk.

    Args:
        states: after the last update.
        metrics: `[count, S]`; empty if `count` is 0.
        count: updates done in this chunk.
    """

    def __init__(
        self, states: TrainState, metrics: Metrics, count: int, reason: HostCallError
    ) -> None:
        super().__init__(str(reason))
        self.states, self.metrics, self.count, self.reason = states, metrics, count, reason


def answers(call: HostCall, question: PyTree) -> PyTree:
    """The answers `[S, ...]` to the questions `[S, ...]` of S runs."""
    count = jax.tree.leaves(question)[0].shape[0]
    each = [call.answer(jax.tree.map(lambda x, s=s: x[s], question)) for s in range(count)]
    return jax.tree.map(lambda *rows: np.stack(rows), *each)


def compile_host_chunk(
    call: HostCall,
    learner: Learner,
    spread: Spread,
    *,
    shapes: TrainState,
    hparams: Any,
    data: PyTree,
) -> tuple[Callable[..., tuple[TrainState, Metrics]], Any, Metrics]:
    """Compile an update in two parts.

    Returns:
        `(states, hparams, count) -> (states, metrics[count, S])`, which raises
        `InterruptedChunkError`; the larger compiled program; and the shapes of its metrics.

    Raises:
        ConfigError: if there are several processes.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"num_processes = {jax.process_count()}: a run that calls a Python function in each "
            "update works in one process only"
        )
    seeds, everywhere = spread.seeds, PartitionSpec()

    def ask(states: TrainState, hparams: Any, data: PyTree) -> PyTree:
        return each_seed(lambda row: call.ask(*row, data), (states, hparams))

    def update(states: TrainState, hparams: Any, question: Any, answer: Any, data: PyTree) -> Any:
        def one(row: Any) -> Any:
            state, hparams, question, answer = row
            return learner.update(state, hparams, call.tell(data, question, answer))

        return each_seed(one, (states, hparams, question, answer))

    asking = jax.jit(spread.over(ask, (spread.states, seeds, everywhere), seeds))
    traced_ask = asking.trace(shapes, hparams, data)
    question: Any = traced_ask.out_info
    inputs = (spread.states, seeds, seeds, seeds, everywhere)
    updating = jax.jit(spread.over(update, inputs, (spread.states, seeds)))
    answer = _stacked_shapes(call, question)
    traced = updating.trace(shapes, hparams, question, answer, data)
    compiled_ask: Any = traced_ask.lower().compile()
    compiled: Any = traced.lower().compile()

    def chunk(states: TrainState, hparams: Any, count: int) -> tuple[TrainState, Metrics]:
        rows: list[Metrics] = []
        for _ in range(count):
            states = spread.scatter(states)
            question = compiled_ask(states, hparams, data)
            try:
                told = answers(call, question)
            except HostCallError as error:
                done = _rows(rows) if rows else {}
                raise InterruptedChunkError(states, done, len(rows), error) from error
            states, metrics = compiled(states, hparams, question, told, data)
            rows.append(jax.device_get(metrics))
        return states, _rows(rows)

    return chunk, compiled, traced.out_info[1]


def _rows(each: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *rows: np.stack(rows), *each)


def _stacked_shapes(call: HostCall, question: PyTree) -> PyTree:
    """Shapes of the answers `[S, ...]` to questions of these shapes `[S, ...]`."""
    count = jax.tree.leaves(question)[0].shape[0]
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), question)
    shapes = call.answer_shape(one)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), shapes)


class Returns:
    """`(states[S, ...], keys[S], deterministic[S]) -> returns[S, E]` of evaluation episodes, NaN
    for an episode that did not end. Compiled at the first call."""

    def __init__(self, task: Task, episodes: int):
        self._task, self._episodes = task, episodes
        self.jitted = jax.jit(self._each)
        """`(states, keys, deterministic, data) -> returns`, without Python code between."""
        self._ask = jax.jit(self._questions)

    def __call__(self, states: TrainState, keys: jax.Array, deterministic: Any) -> np.ndarray:
        call, data = self._task.evaluation_call, self._task.data
        if call is None:
            return np.asarray(self.jitted(states, keys, deterministic, data))
        question = self._ask(states, keys, deterministic, data)
        return np.asarray(
            self.jitted(states, keys, deterministic, data, question, answers(call, question))
        )

    def _questions(self, states: TrainState, keys: Any, deterministic: Any, data: PyTree) -> Any:
        call = self._task.evaluation_call
        assert call is not None

        def one(row: Any) -> Any:
            state, key, deterministic = row
            return call.ask(state, key, self._episodes, deterministic, data)

        return each_seed(one, (states, keys, deterministic))

    def _each(
        self, states: TrainState, keys: Any, deterministic: Any, data: PyTree, *told: PyTree
    ) -> jax.Array:
        call = self._task.evaluation_call

        def one(row: Any) -> jax.Array:
            state, key, deterministic, *told = row
            own = call.tell(data, *told) if call is not None else data
            more = {"data": own} if jax.tree.leaves(own) else {}
            return self._task.evaluate(
                state, key, self._episodes, deterministic=deterministic, **more
            )

        return each_seed(one, (states, keys, deterministic, *told))
