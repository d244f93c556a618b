"""Updates and evaluations whose scores are computed in Python between two compiled parts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.between import HostCall
from purejaxppo.rlhf.actor import TokenActor, TokenParts
from purejaxppo.rlhf.generation import generate
from purejaxppo.rlhf.kl import current, make_controller
from purejaxppo.rlhf.problem import Sample
from purejaxppo.types import PyTree, TrainState


def host_calls(parts: TokenParts) -> tuple[HostCall | None, HostCall | None]:
    """The calls of Python code that updates and evaluations need."""
    problem = parts.problem
    update = evaluation = None
    if problem.host_score is not None:
        ask = partial(_respond, parts)
        update = HostCall(ask, partial(_score, problem.host_score, _second), _of_second, _tell)
    if problem.host_judge is not None:
        ask = partial(held_out_sample, parts)
        evaluation = HostCall(ask, partial(_score, problem.host_judge, _itself), _shape, _tell)
    return update, evaluation


def _respond(parts: TokenParts, state: TrainState, hparams: Any, data: PyTree) -> Any:
    """The actors' states and responses of the next update."""
    hparams = current(parts.config, make_controller(parts.config), state.learner, hparams)
    return TokenActor(*parts).respond(state.learner.params, state.actors, hparams, data)


def held_out_sample(
    parts: TokenParts,
    state: TrainState,
    key: Key[Array, ""],
    num_episodes: int,
    *more: Any,
) -> Sample:
    """Responses to the held-out prompts, used in turn, at temperature 1; without `shared`.

    Args:
        more: whether to take the most likely tokens, and the task's data.
    """
    config, problem, network = parts
    deterministic, data = more
    rows = jnp.arange(num_episodes) % data["held_out"].lengths.shape[0]
    prompts = data["held_out"].take(rows)
    responses = generate(
        network, state.learner.params, jax.random.split(key, num_episodes), prompts,
        max_tokens=config.response_length, stop_token=problem.stop_token,
        deterministic=deterministic,
    )  # fmt: skip
    return Sample(prompts, responses, jax.tree.map(lambda x: x[rows], data["held_out_extras"]))


def _score(
    function: Callable[[Sample], Any], sample_of: Callable[[Any], Sample], question: Any
) -> np.ndarray:
    sample = jax.tree.map(np.asarray, sample_of(question))
    return np.asarray(function(sample), np.float32)


def _second(question: Any) -> Sample:
    return question[1]


def _itself(question: Sample) -> Sample:
    return question


def _shape(question: Sample) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(question.prompts.lengths.shape, jnp.float32)


def _of_second(question: Any) -> jax.ShapeDtypeStruct:
    return _shape(question[1])


def _tell(data: PyTree, question: PyTree, answer: PyTree) -> PyTree:
    return data | {"told": (question, answer)}
