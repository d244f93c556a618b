"""Tokenizers: text to tokens and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from purejaxppo.checks import ConfigError


class Tokenizer(Protocol):
    """Converts prompts to tokens, and responses to text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises `ConfigError` if it cannot be encoded."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...


@dataclass(frozen=True)
class Characters:
    """Each character of the alphabet is a token, numbered from 0."""

    alphabet: str

    def __post_init__(self) -> None:
        twice = [x for x in self.alphabet if self.alphabet.count(x) > 1]
        if twice:
            raise ConfigError(f"alphabet = {self.alphabet!r}: has {twice[0]!r} twice")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises `ConfigError` for a character outside the alphabet."""
        for place, character in enumerate(text):
            if character not in self.alphabet:
                raise ConfigError(
                    f"prompt {text!r}: character {character!r} (number {place + 1}) is not in the "
                    f"alphabet {self.alphabet!r}"
                )
        return [self.alphabet.index(x) for x in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return "".join(self.alphabet[int(x)] for x in tokens)


@dataclass(frozen=True)
class TokenIds:
    """Texts are token numbers, separated by spaces."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises `ConfigError` if one is not a token number."""
        for word in text.split():
            if not word.isdecimal() or int(word) >= self.vocab_size:
                raise ConfigError(
                    f"prompt {text!r}: {word!r} is not a token; this task has no tokenizer, so "
                    f"write token numbers from 0 to {self.vocab_size - 1}, separated by spaces"
                )
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The numbers of tokens."""
        return " ".join(str(int(x)) for x in tokens)
