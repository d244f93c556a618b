"""What a language model is tuned for: prompts, and a score of the responses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float

from purejaxppo.rlhf.decoder import Architecture
from purejaxppo.rlhf.generate import Prompts, Responses
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

    @property
    def prompt_length(self) -> int:
        """Maximum number of tokens of a prompt (L)."""
        held_out = 0 if self.held_out is None else self.held_out.tokens.shape[1]
        return max(self.prompts.tokens.shape[1], held_out)
