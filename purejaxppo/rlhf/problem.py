"""What a language model is tuned for: prompts, and a score of the responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from purejaxppo.checks import ConfigError
from purejaxppo.references import called, resolve
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.rlhf.generation import Prompts, Responses
from purejaxppo.rlhf.tokenizer import TokenIds, Tokenizer
from purejaxppo.types import PyTree


class Sample(NamedTuple):
    """What a score function receives, for N responses."""

    prompts: Prompts
    responses: Responses
    extras: PyTree
    """The rows of `Problem.extras` that belong to the prompts."""


@dataclass(frozen=True)
class Problem:
    """Prompts and a score."""

    name: str
    prompts: Prompts
    """Prompts to train on `[P, L]`."""
    score: Callable[[Sample], Float[Array, " N"]]
    """Score of each response; runs inside the compiled program."""
    vocab_size: int
    """Number of tokens (V)."""
    stop_token: int
    """The token that ends a response; -1 if responses always have the maximum length."""
    reference: Callable[[Architecture], PyTree]
    """Parameters of the frozen reference, with which the policy starts."""
    extras: PyTree = ()
    """Leaves `[P, ...]` that the score reads, such as the right answers."""
    held_out: Prompts | None = None
    """Prompts to evaluate on; None uses those of training."""
    held_out_extras: PyTree = ()
    exact_score: float | None = None
    """The score of an exact answer, if answers can be exact; `summary.json` then has their
    share."""
    longest_answer: int = 0
    """Number of tokens of the longest exact answer, stop token included; 0 if unknown."""
    tokenizer: Tokenizer | None = None
    """Text of prompts and responses; None writes token numbers."""
    extras_of: Callable[[Sequence[str]], PyTree] | None = None
    """Makes the extras of other prompts, so that responses to them can be scored."""

    @property
    def prompt_length(self) -> int:
        """Maximum number of tokens of a prompt (L)."""
        held_out = 0 if self.held_out is None else self.held_out.tokens.shape[1]
        return max(self.prompts.tokens.shape[1], held_out)

    @property
    def text(self) -> Tokenizer:
        """The tokenizer, or one that writes token numbers."""
        return TokenIds(self.vocab_size) if self.tokenizer is None else self.tokenizer


def pad_left(rows: Sequence[Sequence[int]], width: int = 0) -> Prompts:
    """Prompts `[N, L]` from lists of tokens; L is `width`, or the longest."""
    lengths = [len(row) for row in rows]
    tokens = np.zeros((len(rows), max(width, *lengths)), np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[row.size - len(values) :] = values
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))


def problem_of(config: RLHFConfig) -> Problem:
    """The problem that `config.task` names, with the arguments `config.task_params`.

    Raises:
        ConfigError: if there is no such task, or it does not take these arguments.
    """
    from purejaxppo.checks import is_reference, nearest
    from purejaxppo.rlhf.problems import PROBLEMS

    name, given = config.task, dict(config.task_params)
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
            f"task = {name!r}: gave a {type(made).__name__}; it must be an rlhf.Problem or a "
            "function that makes one"
        )
    return made
