"""Responses as text: the samples of a run, and responses that made a run fail."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.checks import ConfigError
from purejaxppo.rlhf.actor import TokenActor, TokenParts
from purejaxppo.rlhf.generation import generate
from purejaxppo.rlhf.kl import current, make_controller
from purejaxppo.rlhf.problem import Sample, texts_of
from purejaxppo.types import PyTree, TrainState

SHOWN = 8
"""Number of prompts whose responses a run shows."""
_MAX_TEXT = 400
"""Maximum length of a text in an error message."""


def finite(value: Any) -> float | None:
    """A number for JSON, which has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None


class Samples:
    """`state -> samples`: responses to the first held-out prompts, always with the same random key,
    as rows of a table."""

    def __init__(self, parts: TokenParts, data: PyTree):
        config, problem, network = parts
        self._problem, self._data = problem, data
        rows = jnp.arange(min(SHOWN, data["held_out"].lengths.shape[0]))

        def sample(params: PyTree, data: PyTree) -> Sample:
            prompts = data["held_out"].take(rows)
            responses = generate(
                network, params, jax.random.split(jax.random.key(0), len(rows)), prompts,
                max_tokens=config.response_length, stop_token=problem.stop_token,
            )  # fmt: skip
            extras = jax.tree.map(lambda x: x[rows], data["held_out_extras"])
            return Sample(prompts, responses, extras)

        self._sample = jax.jit(sample)

    def __call__(self, state: TrainState) -> list[dict[str, Any]]:
        sample = self._sample(state.learner.params, self._data)
        score = self._problem.scores(sample._replace(shared=self._data["shared"]), gold=True)
        texts, stopped = texts_of(self._problem, sample), np.asarray(sample.responses.stopped)
        rows = zip(*texts, score, stopped, strict=True)
        return [
            {"prompt": p, "response": r, "score": finite(s), "stopped": bool(end)}
            for p, r, s, end in rows
        ]


class Failures:
    """`(last good state of one seed, hparams) -> reason`: names the first response of the next
    update whose score is not finite; None if all are finite."""

    def __init__(self, parts: TokenParts, data: PyTree):
        config, self._problem, _ = parts
        self._data, actor = data, TokenActor(*parts)

        def sample(state: TrainState, hparams: Any, data: PyTree) -> Sample:
            hparams = current(config, make_controller(config), state.learner, hparams)
            return actor.respond(state.learner.params, state.actors, hparams, data)[1]

        self._sample = jax.jit(sample)

    def __call__(self, state: TrainState, hparams: Any) -> str | None:
        found = self._sample(state, hparams, self._data)
        try:
            score = self._problem.scores(found._replace(shared=self._data["shared"]))
        except ConfigError as error:
            return str(error)
        bad = np.flatnonzero(~np.isfinite(score))
        if not bad.size:
            return None
        texts = texts_of(self._problem, jax.tree.map(lambda x: x[bad[:1]], found))
        return (
            f"the score of task {self._problem.name} is not finite for {bad.size} of {len(score)} "
            f"responses, first for the prompt {texts.prompts[0][:_MAX_TEXT]!r} and the response "
            f"{texts.responses[0][:_MAX_TEXT]!r}"
        )
