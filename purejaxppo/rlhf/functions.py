"""Reward functions of decoded texts, which run in Python between compiled calls."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from purejaxppo.checks import ConfigError, HostCallError
from purejaxppo.rlhf.problem import Problem, Sample, Texts, texts_of

_MAX_TEXT = 200
"""Maximum length of a text in an error message."""
TextFunction = Callable[..., Any]
"""`(prompts, completions, **columns) -> scores`, lists of N."""


class Weighted(NamedTuple):
    """A reward function and its weight in the sum."""

    weight: float
    name: str
    function: TextFunction


@dataclass(frozen=True)
class TextRewards:
    """The weighted sum of reward functions: `sample of NumPy arrays -> scores[N]`.

    A function receives lists of prompts and completions (without the stop token), and the columns
    of the prompts that it has arguments for. It may be called from several threads, one at a time.

    Raises:
        HostCallError: if a function raises or does not return one number per completion.
    """

    problem: Problem
    functions: tuple[Weighted, ...]
    _lock: Any

    def __call__(self, sample: Sample) -> Float[np.ndarray, " N"]:
        texts, columns = texts_of(self.problem, sample), self._columns(sample)
        total = np.zeros(len(texts.responses))
        with self._lock:
            for weight, name, function in self.functions:
                total += weight * _called(name, function, texts, columns)
        return total.astype(np.float32)

    def _columns(self, sample: Sample) -> dict[str, list[Any]]:
        """The columns of the prompts; None where a line of the file has no such key."""
        if not self.problem.columns:
            return {}
        rows = [self.problem.columns[int(row)] for row in np.asarray(sample.extras["row"])]
        names = {name for row in self.problem.columns for name in row}
        return {name: [row.get(name) for row in rows] for name in sorted(names)}


def text_rewards(problem: Problem, functions: Sequence[Weighted]) -> TextRewards:
    """Combine reward functions. Raises `ConfigError` if one cannot be called with lists of prompts
    and completions."""
    for _, name, function in functions:
        if not callable(function):
            raise ConfigError(
                f"reward = {name}: is of type {type(function).__name__}; must be a function "
                "(prompts, completions, **columns) -> list of numbers"
            )
        try:
            inspect.signature(function).bind_partial([], [])
        except TypeError as error:
            raise ConfigError(
                f"reward = {name}: cannot be called with prompts and completions: {error}; write "
                "def reward(prompts, completions, **columns)"
            ) from error
        except ValueError:  # a builtin without a signature
            pass
    return TextRewards(problem, tuple(functions), Lock())


def _called(
    name: str, function: TextFunction, texts: Texts, columns: Mapping[str, list[Any]]
) -> Float[np.ndarray, " N"]:
    prompts, completions = texts
    try:
        found = function(prompts, completions, **_taken(function, columns))
    except (ConfigError, HostCallError) as error:
        raise HostCallError(f"reward = {name}: {error}") from error
    except Exception as error:  # whatever the function raises
        raise HostCallError(
            f"reward = {name}: raised {type(error).__name__}: {error} for {len(prompts)} "
            f"completions, the first {completions[0][:_MAX_TEXT]!r} to {prompts[0][:_MAX_TEXT]!r}"
        ) from error
    try:
        scores = np.asarray(found, np.float64)
    except (TypeError, ValueError) as error:
        raise HostCallError(
            f"reward = {name}: returned a {type(found).__name__} that is not a list of numbers: "
            f"{error}"
        ) from error
    if scores.shape != (len(prompts),):
        raise HostCallError(
            f"reward = {name}: returned shape {list(scores.shape)} for {len(prompts)} completions; "
            "must return one number per completion"
        )
    return scores


def _taken(function: TextFunction, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that the function has arguments for."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return {}
    if any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        return dict(columns)
    return {name: values for name, values in columns.items() if name in parameters}
