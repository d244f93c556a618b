"""Responses of policies to the prompts of an evaluation, and their scores."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from purejaxppo.checks import ConfigError
from purejaxppo.references import called
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import RLHFConfig, is_prompts_file
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.generation import Prompts, Responses, generate
from purejaxppo.rlhf.prepare import scores_of
from purejaxppo.rlhf.problem import Problem, Sample, pad_left, texts_of
from purejaxppo.rlhf.records import Prompt, read_prompts, split
from purejaxppo.rlhf.reward import Combine, load_reward
from purejaxppo.rlhf.starts import alphabet_of
from purejaxppo.rlhf.text import LoadedPolicy, encode_prompt, log_probs_of, no_score
from purejaxppo.rlhf.text_config import TextConfig
from purejaxppo.rlhf.texts import read_items
from purejaxppo.rlhf.tokenizer import Vocabulary
from purejaxppo.rlhf.tokenizer import vocabulary_of as vocabulary_of_name
from purejaxppo.types import PyTree

_MAX_NUMBERS, _MAX_ROWS = 2**26, 2048
"""Limits of a batch: numbers in the widest layer's outputs, and responses."""
_MAX_TEXT = 200
"""Maximum length of a text in an error message."""


class Decoder(NamedTuple):
    """A policy, without its critic."""

    architecture: Architecture
    params: PyTree


def without_critic(architecture: Architecture, params: PyTree) -> Decoder:
    """The policy of a decoder."""
    own = {name: x for name, x in params.items() if name.startswith("actor")}
    return Decoder(dataclasses.replace(architecture, critic="none"), own)


def vocabulary_of(problem: Problem) -> Vocabulary:
    """The tokenizer of a problem, its size and the stop token."""
    return Vocabulary(problem.text, problem.vocab_size, problem.stop_token)


# Prompts


class Asked(NamedTuple):
    """The prompts of an evaluation."""

    problem: Problem
    """The problem, with these prompts as its held-out prompts."""
    prompts: Prompts
    extras: PyTree
    length: int
    """Maximum number of tokens of a response (R)."""


def prompts_of(
    found: LoadedPolicy, file: str | Path | None, count: int | None, max_tokens: int | None
) -> Asked:
    """The prompts of a file, or the held-out prompts of the run's task or data.

    Args:
        count: use the first prompts only; None uses all.
        max_tokens: maximum length of a response of a run on texts.

    Raises:
        ConfigError: if the file cannot be read, or a prompt cannot be encoded or scored.
    """
    config, problem = found.settings.config, found.problem
    if max_tokens is not None and not isinstance(config, TextConfig):
        raise ConfigError(
            f"max_tokens = {max_tokens}: the score is of responses of at most response_length = "
            f"{found.config.response_length} tokens; leave it out"
        )
    if file is not None or isinstance(config, TextConfig):
        given = _held_out_of_data(config) if file is None else read_prompts(file)
        problem, length = _with_texts(found, given[:count], file, max_tokens)
    else:
        length = found.config.response_length
    own = problem.held_out is None
    prompts, extras = problem.prompts, problem.extras
    if problem.held_out is not None:
        prompts, extras = problem.held_out, problem.held_out_extras
    rows = jnp.arange(min(prompts.lengths.shape[0], count or prompts.lengths.shape[0]))
    prompts, extras = prompts.take(rows), jax.tree.map(lambda x: jnp.asarray(x)[rows], extras)
    prompts = prompts._replace(tokens=prompts.tokens[:, -int(prompts.lengths.max()) :])
    if not own:
        problem = dataclasses.replace(problem, held_out=prompts, held_out_extras=extras)
    return Asked(problem, prompts, extras, length)


def _held_out_of_data(config: TextConfig) -> list[Prompt]:
    """The held-out prompts of a run on texts, each once."""
    try:
        every = read_items(config, vocabulary_of_name(config.tokenizer))
        held_out = split(every, config.held_out)[1]
    except ConfigError as error:
        raise ConfigError(f"{error}; or give prompts, a JSON Lines file") from error
    return [Prompt(text) for text in dict.fromkeys(x.prompt for x in held_out)]


def _with_texts(
    found: LoadedPolicy, given: Sequence[Prompt], file: str | Path | None, max_tokens: int | None
) -> tuple[Problem, int]:
    """The problem with these held-out prompts, and the maximum length of a response."""
    config, problem, context = found.settings.config, found.problem, found.config.context
    where = f"data = {config.data}" if file is None else f"prompts {str(file)!r}"
    texts, length = [x.prompt for x in given], max_tokens or found.config.response_length
    if not isinstance(config, TextConfig):
        context = context or problem.prompt_length + length
    elif max_tokens is None:
        longest = max(len(problem.text.encode(text)) for text in texts)
        length = max(1, min(length, context - longest))
    try:
        encoded = pad_left([encode_prompt(problem, text, length, context) for text in texts])
        if is_prompts_file(found.config.task):
            columns, rows = tuple(x.columns for x in given), jnp.arange(len(given))
            problem, extras = dataclasses.replace(problem, columns=columns), {"row": rows}
        else:
            extras = _extras_of(problem, texts)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return dataclasses.replace(problem, held_out=encoded, held_out_extras=extras), length


def _extras_of(problem: Problem, texts: Sequence[str]) -> PyTree:
    """What the task's score reads for new prompts."""
    if not jax.tree.leaves(problem.extras):
        return problem.extras
    if problem.extras_of is None:
        raise ConfigError(
            f"the score of task {problem.name} reads extras, but the problem has no extras_of to "
            "make them for new prompts; define it, or leave out prompts"
        )
    try:
        extras = called(f"extras_of of {problem.name}", problem.extras_of, list(texts))
    except ConfigError as error:
        raise ConfigError(f"{error}; write prompts like those of the task") from error
    if any(np.shape(x)[:1] != (len(texts),) for x in jax.tree.leaves(extras)):
        raise ConfigError(
            f"extras_of of {problem.name}: must return arrays with one row per prompt, "
            f"{len(texts)} rows"
        )
    return extras


# Scores

_Score = Callable[[Sample], Float[np.ndarray, " N"]]


class Judge(NamedTuple):
    """The scores of an evaluation."""

    problem: Problem
    score: _Score
    """The score to report."""
    name: str
    select: _Score
    """The score by which best-of-n selects."""
    selected_by: str
    exact: _Score | None
    """The task's own score, if answers can be exact."""


def make_judge(
    found: LoadedPolicy, asked: Asked, problem: Problem, reward: str | Path | None, combine: Combine
) -> Judge:
    """The reward model's scores, or else the task's own. Best-of-n selects by the score that a run
    of a policy was trained on, or else by the reported one.

    Args:
        problem: the problem, prepared.

    Raises:
        ConfigError: if there is no score, or the reward model cannot score these responses.
    """
    trains_on_score = isinstance(found.settings.config, RLHFConfig)

    def gold(sample: Sample) -> np.ndarray:
        return problem.scores(sample._replace(shared=problem.shared), gold=True)

    def training(sample: Sample) -> np.ndarray:
        return problem.scores(sample._replace(shared=problem.shared))

    trained_on = " + ".join(found.config.reward) or f"task {problem.name}"
    score, name = gold, f"task {problem.name}" if problem.gold is not None else trained_on
    if reward is not None:
        score, name = _model_score(str(reward), combine, asked), str(reward)
    elif problem.score is no_score:
        raise ConfigError(
            f"{found.settings.config.label}: the responses of this run have no score; give reward, "
            "the directory of a reward model"
        )
    exact = None if problem.exact_score is None else gold
    if trains_on_score and (reward is not None or problem.gold is not None):
        return Judge(problem, score, name, training, trained_on, exact)
    return Judge(problem, score, name, score, name, exact)


def _model_score(run_dir: str, combine: Combine, asked: Asked) -> _Score:
    model = load_reward(run_dir, combine)
    if alphabet_of(model.vocabulary) != alphabet_of(vocabulary_of(asked.problem)):
        raise ConfigError(
            f"reward = {run_dir}: was trained with another tokenizer than {asked.problem.name!r}, "
            "so its tokens have other meanings; use a reward model with the same tokenizer"
        )
    needed = asked.prompts.tokens.shape[1] + asked.length
    if model.architecture.context < needed:
        raise ConfigError(
            f"reward = {run_dir}: scores at most {model.architecture.context} tokens, but "
            f"prompt and response have up to {needed}; train it with row_length = {needed} or more"
        )
    compiled = jax.jit(partial(scores_of, model))

    def score(sample: Sample) -> np.ndarray:
        return np.asarray(compiled(model.params, sample._replace(shared=())))

    return score


# Responses


class Scored(NamedTuple):
    """Responses to P prompts, n to each."""

    score: Float[np.ndarray, "P n"]
    select: Float[np.ndarray, "P n"]
    exact: Float[np.ndarray, "P n"] | None
    """1 if the answer is exact."""
    log_ratio: Float[np.ndarray, "P n"] | None
    """log pi - log pi_ref, if there is a reference."""


class Sampler:
    """Generates and scores responses: `(policy, key, responses per prompt, reference) -> Scored`.

    Args:
        num_responses: the smallest number of responses per prompt, which limits the batches, so
            that all policies use the same compiled programs.
    """

    def __init__(self, judge: Judge, asked: Asked, num_responses: int, temperature: float):
        self._judge, self._asked, self._temperature = judge, asked, temperature
        self._smallest = num_responses * asked.prompts.lengths.shape[0]

    def __call__(
        self, policy: Decoder, key: Key[Array, ""], each: int, reference: Decoder | None = None
    ) -> Scored:
        count = self._asked.prompts.lengths.shape[0]
        total, rows = count * each, self._rows(policy.architecture)
        keys, parts = jax.random.split(key, total), []
        for first in range(0, total, rows):
            chosen = np.minimum(np.arange(first, first + rows), total - 1)
            parts.append(self._part(policy, keys[chosen], chosen // each, reference))
        return jax.tree.map(lambda *x: np.concatenate(x)[:total].reshape(count, each), *parts)

    def _rows(self, architecture: Architecture) -> int:
        """Number of responses in a batch."""
        tokens = self._asked.prompts.tokens.shape[1] + self._asked.length
        widest = max(architecture.vocab_size, architecture.mlp_width or 4 * architecture.width)
        return min(self._smallest, max(1, min(_MAX_ROWS, _MAX_NUMBERS // (tokens * widest))))

    def _part(
        self, policy: Decoder, keys: Key[Array, " N"], rows: np.ndarray, reference: Decoder | None
    ) -> Scored:
        asked, judge, temperature = self._asked, self._judge, self._temperature
        prompts = asked.prompts.take(jnp.asarray(rows))
        responses = _respond(
            policy.params, keys, prompts, temperature, architecture=policy.architecture,
            length=asked.length, stop_token=judge.problem.stop_token,
        )  # fmt: skip
        sample = Sample(prompts, responses, jax.tree.map(lambda x: x[rows], asked.extras))
        found = {f: f(sample) for f in {judge.score, judge.select, judge.exact} if f is not None}
        for function, name in ((judge.score, judge.name), (judge.select, judge.selected_by)):
            self._check(name, found[function], sample)
        exact = log_ratio = None
        if judge.exact is not None:
            assert judge.problem.exact_score is not None
            exact = (found[judge.exact] >= judge.problem.exact_score - 1e-6).astype(np.float32)
        if reference is not None:
            log_ratio = np.subtract(*(
                log_probs_of(
                    x.params, prompts, responses.tokens, responses.lengths, temperature,
                    architecture=x.architecture,
                )
                for x in (policy, reference)
            ))  # fmt: skip
        return Scored(found[judge.score], found[judge.select], exact, log_ratio)

    def _check(self, name: str, scores: np.ndarray, sample: Sample) -> None:
        """Raise `ConfigError` if a score is not finite."""
        bad = np.flatnonzero(~np.isfinite(scores))
        if bad.size:
            texts = texts_of(self._judge.problem, jax.tree.map(lambda x: x[bad[:1]], sample))
            raise ConfigError(
                f"the score of {name} is not finite for the prompt "
                f"{texts.prompts[0][:_MAX_TEXT]!r} and the response "
                f"{texts.responses[0][:_MAX_TEXT]!r}"
            )


@partial(jax.jit, static_argnames=("architecture", "length", "stop_token"))
def _respond(
    params: PyTree,
    keys: Key[Array, " N"],
    prompts: Prompts,
    temperature: Any,
    *,
    architecture: Architecture,
    length: int,
    stop_token: int,
) -> Responses:
    return generate(
        make_decoder(architecture), params, keys, prompts, max_tokens=length,
        stop_token=stop_token, temperature=temperature,
    )  # fmt: skip
