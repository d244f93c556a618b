"""Problems to train a language model on: prompts, and a score of the responses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from purejaxppo.checks import ConfigError, HostCallError
from purejaxppo.references import called, resolve
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import RLHFConfig, is_prompts_file
from purejaxppo.rlhf.generation import Prompts, Responses
from purejaxppo.rlhf.tokenizer import TokenIds, Tokenizer
from purejaxppo.types import PyTree


class Sample(NamedTuple):
    """The argument of a score function: N responses and their prompts."""

    prompts: Prompts
    responses: Responses
    extras: PyTree
    """The rows of `Problem.extras` for these prompts."""
    shared: PyTree = ()
    """`Problem.shared`."""


@dataclass(frozen=True)
class Problem:
    """Prompts, a score function and a reference, from which the policy starts."""

    name: str
    prompts: Prompts
    """Prompts to train on `[P, L]`."""
    score: Callable[[Sample], Float[Array, " N"]]
    """Scores the responses; runs inside the compiled program."""
    vocab_size: int
    """Number of tokens in the vocabulary (V)."""
    stop_token: int
    """The token that ends a response; -1 if responses always have the maximum length."""
    reference: Callable[[Architecture], PyTree]
    """Makes the parameters of the frozen reference; the policy starts with the same parameters."""
    extras: PyTree = ()
    """A pytree with leaves `[P, ...]` that the score reads, such as the correct answers."""
    shared: PyTree = ()
    """Arrays that the score reads for every response, such as the parameters of a reward model."""
    host_score: Callable[[Sample], Float[np.ndarray, " N"]] | None = None
    """Added to the score. Runs in Python between compiled calls, with NumPy arrays and without
    `shared`."""
    gold: Callable[[Sample], Float[Array, " N"]] | None = None
    """Scores the responses of evaluations, if that is not the score to train on."""
    held_out: Prompts | None = None
    """Prompts to evaluate on; None uses the training prompts."""
    held_out_extras: PyTree = ()
    exact_score: float | None = None
    """Score of an exact answer, if answers can be exact. `summary.json` then contains the share of
    exact answers."""
    longest_answer: int = 0
    """Number of tokens of the longest exact answer, stop token included; 0 if unknown."""
    tokenizer: Tokenizer | None = None
    """Converts prompts and responses to and from text; None uses token numbers."""
    extras_of: Callable[[Sequence[str]], PyTree] | None = None
    """Makes the extras of new prompts, so that responses to them can be scored."""

    columns: Sequence[Mapping[str, Any]] = ()
    """Further values of prompts for `host_score`, indexed by `extras["row"]`."""

    @property
    def judge(self) -> Callable[[Sample], Float[Array, " N"]]:
        """The compiled score of evaluations: `gold`, or `score`."""
        return self.gold or self.score

    @property
    def host_judge(self) -> Callable[[Sample], Float[np.ndarray, " N"]] | None:
        """What is added to `judge`: `host_score`, if there is no `gold`."""
        return None if self.gold is not None else self.host_score

    def scores(self, sample: Sample, *, gold: bool = False) -> Float[np.ndarray, " N"]:
        """Score responses outside of compiled programs.

        Args:
            gold: the score of evaluations.

        Raises:
            ConfigError: if the score fails.
        """
        compiled = self.judge if gold else self.score
        added = self.host_judge if gold else self.host_score
        name = f"score of {self.name}"
        found = np.asarray(called(name, jax.jit(compiled), sample), np.float32)
        if added is None:
            return found
        try:
            return found + added(jax.tree.map(np.asarray, sample._replace(shared=())))
        except HostCallError as error:
            raise ConfigError(str(error)) from error

    @property
    def prompt_length(self) -> int:
        """Maximum number of tokens of a prompt (L)."""
        held_out = 0 if self.held_out is None else self.held_out.tokens.shape[1]
        return max(self.prompts.tokens.shape[1], held_out)

    @property
    def text(self) -> Tokenizer:
        """The tokenizer, or one that writes token numbers."""
        return TokenIds(self.vocab_size) if self.tokenizer is None else self.tokenizer


class Texts(NamedTuple):
    """N prompts and responses as text."""

    prompts: list[str]
    responses: list[str]
    """Without the stop token."""


def texts_of(problem: Problem, sample: Sample) -> Texts:
    """The prompts and responses of a sample as text."""
    prompts, responses = jax.tree.map(np.asarray, (sample.prompts, sample.responses))
    told, said = [], []
    for row, stopped in enumerate(responses.stopped):
        told.append(problem.text.decode(prompts.tokens[row][-int(prompts.lengths[row]) :]))
        end = int(responses.lengths[row]) - int(stopped)
        said.append(problem.text.decode(responses.tokens[row][:end]))
    return Texts(told, said)


def pad_left(rows: Sequence[Sequence[int]], width: int = 0) -> Prompts:
    """Make prompts `[N, L]` from lists of tokens; L is `width`, or the longest length if larger."""
    lengths = [len(row) for row in rows]
    tokens = np.zeros((len(rows), max(width, *lengths)), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[row.size - len(values) :] = values
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))


def problem_of(config: RLHFConfig) -> Problem:
    """Make the problem that `config.task` names, with the arguments `config.task_params`.

    Raises:
        ConfigError: if there is no such task, or it does not take these arguments.
    """
    from purejaxppo.checks import is_reference, nearest
    from purejaxppo.rlhf.problems import PROBLEMS

    name, given = config.task, dict(config.task_params)
    if is_prompts_file(name):
        from purejaxppo.rlhf.prompts_file import problem_of_file

        return problem_of_file(config)
    if name in PROBLEMS:
        made: Any = called(f"task = {name}", lambda: PROBLEMS[name](**given))
    elif is_reference(name):
        found = resolve("task", name)
        make: Any = found
        if isinstance(found, Problem) and not given:
            return found
        made = called(f"task = {name}", lambda: make(**given))
    else:
        near = nearest(name, PROBLEMS)
        hint = f"did you mean {near}?" if near else f"use {', '.join(PROBLEMS)}"
        raise ConfigError(f"task = {name!r}: no such task; {hint}, or package.module:name")
    if not isinstance(made, Problem):
        raise ConfigError(
            f"task = {name!r}: returned a {type(made).__name__}; name an rlhf.Problem or a "
            "function that makes one"
        )
    return made
