"""Generates text with a trained policy."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from purejaxppo.checks import ConfigError
from purejaxppo.host.configfile import Settings
from purejaxppo.host.load import find_states, task_of
from purejaxppo.host.rundir import SWEEP, holds
from purejaxppo.inputs import whole_number
from purejaxppo.references import called
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import DecoderConfig, RLHFConfig
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.generation import Prompts, generate, response_log_probs
from purejaxppo.rlhf.prepare import prepared
from purejaxppo.rlhf.problem import Problem, Sample, pad_left, problem_of, texts_of
from purejaxppo.rlhf.problems import PROBLEMS, random_reference
from purejaxppo.rlhf.samples import finite
from purejaxppo.rlhf.starts import decoder_of, task_to_load
from purejaxppo.rlhf.task import architecture_of, make_rlhf_task
from purejaxppo.rlhf.text_config import DPOConfig, RewardConfig, SFTConfig, TextConfig
from purejaxppo.types import PyTree


class Completion(NamedTuple):
    """A response to a prompt."""

    text: str
    """Without the stop token."""
    stopped: bool
    """Whether it ended with the stop token, not at the maximum length."""
    score: float | None
    """The task's score; None if the task cannot score responses to this prompt."""
    log_prob: float
    """Log-probability of the whole response under the policy, at the sampling temperature."""


class Generator:
    """Generates text with the parameters of a policy.

    Args:
        params: parameters of one seed, as in `state.learner.params`.
    """

    def __init__(self, config: RLHFConfig, problem: Problem, params: PyTree):
        self._config, self._problem, self._params = config, problem, params
        self._architecture = architecture_of(config, problem)
        self._network = make_decoder(self._architecture)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        num_responses: int = 1,
        greedy: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        best_of: int = 1,
        seed: int = 0,
    ) -> list[list[Completion]]:
        """Generate responses to each prompt.

        Args:
            num_responses: responses per prompt.
            greedy: take the most likely token instead of sampling.
            temperature: sampling temperature, which divides the logits.
            top_k: sample only from the `top_k` most likely tokens; 0 samples from all.
            top_p: sample only from the most likely tokens with this total probability.
            max_tokens: maximum length of a response; None uses the config's `response_length`.
            best_of: generate this many times as many responses, and keep those with the highest
                scores.
            seed: base random seed.

        Returns:
            the responses to each prompt; with `best_of`, in descending order of score.

        Raises:
            ConfigError: if a prompt is empty, too long or has unknown characters, an argument is
                out of range, or `best_of` is given and the task cannot score the responses.
        """
        length = self._length(max_tokens)
        _check_sampling(greedy, temperature, top_k, top_p)
        count = whole_number("num_responses", num_responses, 1)
        tries = count * whole_number("best_of", best_of, 1)
        if greedy and tries > 1:
            raise ConfigError(
                "greedy: all responses to a prompt are the same; use num_responses = best_of = 1"
            )
        if whole_number("seed", seed, 0) >= 2**32:
            raise ConfigError(f"seed = {seed}: must be below 2^32")
        if not prompts:
            raise ConfigError("prompts: is empty; give at least one")
        rows = pad_left([self._encode(text, length) for text in prompts for _ in range(tries)])
        respond = partial(
            generate, self._network, prompts=rows, max_tokens=length, temperature=temperature,
            stop_token=self._problem.stop_token, deterministic=greedy, top_k=top_k, top_p=top_p,
        )  # fmt: skip
        keys = jax.random.split(jax.random.key(seed), len(prompts) * tries)
        responses = jax.jit(respond)(self._params, keys)
        extras = self._extras(prompts, tries, best_of > 1)
        sample = Sample(rows, responses, extras, self._problem.shared)
        scores = self._scores(sample, length, best_of > 1)
        found = self._completions(Sample(rows, responses, ()), scores)
        groups = [found[i : i + tries] for i in range(0, len(found), tries)]
        if best_of > 1:
            groups = [sorted(group, key=lambda x: -(x.score or 0.0))[:count] for group in groups]
        return groups

    def log_probs(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        temperature: float = 1.0,
        stop: bool = True,
    ) -> Float[np.ndarray, " N"]:
        """Log-probabilities of given completions, in nats.

            generator.log_probs(["3121="], ["1123"])

        Args:
            prompts: N prompts, one for each completion.
            completions: an empty one is only the stop token.
            temperature: divides the logits.
            stop: include the stop token after the completion; without it, the result is the
                log-probability that a response begins with the completion.

        Raises:
            ConfigError: if a text has unknown characters or is too long, a prompt is empty, or
                there is nothing to predict.
        """
        _check_sampling(False, temperature, 0, 1.0)
        if len(prompts) != len(completions) or not prompts:
            raise ConfigError(
                f"{len(prompts)} prompts and {len(completions)} completions: give one prompt for "
                "each completion, and at least one"
            )
        ends = [self._problem.stop_token] * stop
        tokens = [[*self._problem.text.encode(x), *ends] for x in completions]
        if not all(tokens):
            raise ConfigError("a completion is empty: without the stop token, nothing is predicted")
        rows = [self._encode(x, len(y)) for x, y in zip(prompts, tokens, strict=True)]
        width, longest = max(map(len, rows)), max(map(len, tokens))
        batch, found = min(_LOG_PROB_ROWS, len(rows)), []
        for first in range(0, len(rows), batch):
            chosen = [min(i, len(rows) - 1) for i in range(first, first + batch)]
            given = pad_left([rows[i] for i in chosen], width)
            after = np.zeros((batch, longest), np.int32)
            for row, i in zip(after, chosen, strict=True):
                row[: len(tokens[i])] = tokens[i]
            lengths = jnp.array([len(tokens[i]) for i in chosen])
            found.append(log_probs_of(
                self._params, given, jnp.asarray(after), lengths, temperature,
                architecture=self._architecture,
            ))  # fmt: skip
        return np.concatenate(found)[: len(rows)]

    def _completions(self, sample: Sample, scores: Any) -> list[Completion]:
        responses = jax.tree.map(np.asarray, sample.responses)
        used = np.arange(responses.tokens.shape[1]) < responses.lengths[:, None]
        log_probs = np.sum(responses.log_prob * used, axis=1)
        return [
            Completion(
                text, bool(responses.stopped[i]), None if scores is None else finite(scores[i]),
                float(log_probs[i]),
            )
            for i, text in enumerate(texts_of(self._problem, sample).responses)
        ]  # fmt: skip

    def _scores(self, sample: Sample, length: int, needed: bool) -> Any:
        """The task's scores; None if it cannot score these responses."""
        if sample.extras is None:
            return None
        if length == self._config.response_length:
            return self._problem.scores(sample)
        if needed:
            raise ConfigError(
                f"best_of with max_tokens = {length}: the score is of responses of at most "
                f"{self._config.response_length} tokens; leave max_tokens out"
            )
        return None

    def _length(self, max_tokens: int | None) -> int:
        if max_tokens is None:
            return self._config.response_length
        return whole_number("max_tokens", max_tokens, 1)

    def _encode(self, text: str, length: int) -> list[int]:
        return encode_prompt(self._problem, text, length, self._architecture.context)

    def _extras(self, prompts: Sequence[str], tries: int, needed: bool) -> Any:
        """The extras of the score for these prompts; None if they cannot be made."""
        problem = self._problem
        if not jax.tree.leaves(problem.extras):
            return problem.extras
        if problem.extras_of is None:
            if needed:
                raise ConfigError(
                    f"best_of: the score of task {problem.name} reads extras, but the problem has "
                    "no extras_of to make them for new prompts; define it, or leave out best_of"
                )
            return None
        try:
            extras = called(f"extras of {problem.name}", problem.extras_of, list(prompts))
        except ConfigError:
            if needed:
                raise
            return None
        return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), tries, axis=0), extras)


_LOG_PROB_ROWS = 2048


@partial(jax.jit, static_argnames="architecture")
def log_probs_of(
    params: PyTree, prompts: Prompts, tokens: Any, lengths: Any, temperature: Any, *,
    architecture: Architecture,
) -> Array:  # fmt: skip
    """Log-probabilities of responses; see `response_log_probs`."""
    network = make_decoder(architecture)
    return response_log_probs(network, params, prompts, tokens, lengths, temperature=temperature)


def encode_prompt(problem: Problem, text: str, length: int, context: int) -> list[int]:
    """The tokens of a prompt. Raises `ConfigError` if there are none, or the context of a decoder
    has no room for them and a response of `length` tokens."""
    tokens = problem.text.encode(text)
    if not tokens:
        raise ConfigError(f"prompt {text!r}: is empty; each needs at least one token")
    if len(tokens) + length > context:
        raise ConfigError(
            f"prompt {text[:80]!r}: has {len(tokens)} tokens, and with max_tokens = {length} "
            f"needs a context of {len(tokens) + length}, but this decoder has {context}; "
            "shorten it, or train with a larger context"
        )
    return tokens


def _check_sampling(greedy: bool, temperature: float, top_k: int, top_p: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0; for the most likely "
                          "tokens, use greedy")  # fmt: skip
    if top_k < 0:
        raise ConfigError(f"top_k = {top_k}: must be at least 0")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p}: must be above 0 and at most 1")
    if greedy and (temperature != 1.0 or top_k or top_p != 1.0):
        raise ConfigError(
            "greedy: takes the most likely token, so temperature, top_k and top_p have no effect; "
            "leave them out"
        )


class LoadedPolicy(NamedTuple):
    """The policy of a run."""

    settings: Settings
    config: RLHFConfig
    """The run's config; of runs on texts, one with the same decoder."""
    problem: Problem
    """Without the reference and the scores that the config takes from other runs."""
    params: PyTree


def load_generator(
    run_dir: str | Path,
    problem: Problem | None = None,
    *,
    seed: int = 0,
    which: Literal["newest", "best"] | int = "newest",
) -> Generator:
    """Load the policy of a run to generate text.

        generator = rlhf.load_generator("runs/sort")
        generator(["3121="], num_responses=4)

    Args:
        problem: the problem passed to `make_rlhf_task`, if one was.
        seed: index of the seed, from 0.
        which: the newest checkpoint, the best by evaluation, or the one after this number of
            updates.

    Raises:
        ConfigError: if the checkpoint or seed does not exist, or is not of a language model.
    """
    found = load_policy(run_dir, problem, seed=seed, which=which)
    return Generator(found.config, prepared(found.config, found.problem), found.params)


def load_policy(
    run_dir: str | Path,
    problem: Problem | None = None,
    *,
    seed: int = 0,
    which: Literal["newest", "best"] | int = "newest",
) -> LoadedPolicy:
    """Load the policy of a run; see `load_generator`."""
    if holds(Path(run_dir), SWEEP):
        raise ConfigError(
            f"{str(run_dir)!r}: is a sweep; make a run of its best trial with `purejaxppo resume "
            f"{run_dir} --trial best`"
        )

    def task(settings: Any) -> Any:
        if not isinstance(settings.config, RLHFConfig | SFTConfig | DPOConfig):
            what = f"a run of {settings.config.label}"
            if isinstance(settings.config, RewardConfig):
                what = "a reward model"
            raise ConfigError(
                f"{str(run_dir)!r}: is {what}, not a policy for text; give the directory of a run "
                "of rlhf, rlhf sft or rlhf dpo"
            )
        if problem is None or not isinstance(settings.config, RLHFConfig):
            return task_to_load(str(run_dir), settings)
        return task_of(settings, make_rlhf_task(settings.config, problem), {})

    found, states = find_states(Path(run_dir), which, task)
    if whole_number("seed", seed, 0) >= found.settings.num_runs:
        raise ConfigError(f"seed = {seed}: the run has seeds 0 to {found.settings.num_runs - 1}")
    params = jax.tree.map(lambda x: x[seed], states.learner.params)
    config = found.settings.config
    if isinstance(config, TextConfig):
        config, problem = _as_policy(found.settings, str(run_dir))
    return LoadedPolicy(found.settings, config, problem or problem_of(config), params)


def _as_policy(settings: Settings, run_dir: str) -> tuple[RLHFConfig, Problem]:
    """A config and a problem with which a `Generator` can use the decoder of a run on texts. The
    problem is the task that the run's tokenizer names, or has no score."""
    architecture, vocabulary = decoder_of(settings, run_dir)
    name = settings.config.tokenizer
    if name in PROBLEMS:
        problem = PROBLEMS[name]()
    else:
        problem = Problem(
            name, pad_left([[0]]), no_score, vocabulary.size, vocabulary.stop_token,
            random_reference, extras=None, tokenizer=vocabulary.tokenizer,
        )  # fmt: skip
    shape = {name: x for name, x in vars(architecture).items() if name in _SHAPE}
    room = max(1, architecture.context - problem.prompt_length)
    return RLHFConfig("rloo", name, response_length=min(64, room), **shape), problem


_SHAPE = {f.name for f in dataclasses.fields(DecoderConfig)} | {"context"}


def no_score(sample: Sample) -> Any:
    """The score of a run on texts whose tokenizer is not that of a task."""
    raise ConfigError("the responses of this run have no score")
