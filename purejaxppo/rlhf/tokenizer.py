"""Tokenizers: text to tokens and back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from purejaxppo.checks import ConfigError, nearest

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")
"""Texts of the stop token in a `tokenizer.json`; the first that the vocabulary has is used."""


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


@dataclass(frozen=True)
class Bytes:
    """Each byte of the UTF-8 text is a token, from 0 to 255; 256 is the stop token."""

    size: ClassVar[int] = 257
    stop_token: ClassVar[int] = 256

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises `ConfigError` for half of a surrogate pair."""
        return list(_utf8(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the stop token; invalid UTF-8 becomes U+FFFD."""
        values = [int(x) for x in tokens]
        return bytes(x for x in values if x != self.stop_token).decode(errors="replace")


@dataclass(frozen=True)
class FromFile:
    """The tokenizer in a `tokenizer.json` of the `tokenizers` library, which must be installed.

    Special tokens that are written in a text are encoded as such, but none are added, and texts are
    neither truncated nor padded.

    Raises:
        ConfigError: if the library is missing, or the file cannot be read.
    """

    path: str | Path
    size: int = field(init=False)
    """Number of tokens: the largest token plus 1."""
    stop_token: int | None = field(init=False)
    """The first of `STOP_TOKENS` that the vocabulary has; None if it has none."""
    _library: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        library = _load(self.path)
        stops = [library.token_to_id(x) for x in STOP_TOKENS]
        size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "stop_token", next((x for x in stops if x is not None), None))
        object.__setattr__(self, "_library", library)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises `ConfigError` if the tokenizer refuses it."""
        _utf8(text)
        try:
            return self._library.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library has no exception class of its own
            raise ConfigError(f"prompt {text[:80]!r}: cannot be encoded: {error}") from error

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the stop token but with other special tokens."""
        values = [int(x) for x in tokens]
        shown = [x for x in values if x != self.stop_token]
        return self._library.decode(shown, skip_special_tokens=False)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"prompt {text[:80]!r}: character {text[error.start]!r} (number {error.start + 1}) is "
            "half of a surrogate pair; write the whole character"
        ) from error


def _load(path: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a file."""
    name = f"tokenizer {str(path)!r}"
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"{name}: needs the package tokenizers; pip install tokenizers"
        ) from error
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ConfigError(
            f"{name}: is not UTF-8 text; give the path of a tokenizer.json"
        ) from error
    try:
        found = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library has no exception class of its own
        raise ConfigError(
            f"{name}: is not a tokenizer of the tokenizers library: {error}; save one with "
            "Tokenizer.save"
        ) from error
    found.no_padding()
    found.no_truncation()
    return found


class Vocabulary(NamedTuple):
    """A tokenizer and what a model needs to know about it."""

    tokenizer: Tokenizer
    size: int
    """Number of tokens (V)."""
    stop_token: int
    """The token that ends a response."""


def vocabulary_of(name: str) -> Vocabulary:
    """Make the vocabulary of a name.

    Args:
        name: "bytes", the name of a shipped task, such as "sort", or the path of a
            `tokenizer.json`, which must end with `.json`.

    Raises:
        ConfigError: if there is no such vocabulary, the file cannot be read, or it has no stop
            token.
    """
    from purejaxppo.rlhf.config import TASKS

    if name == "bytes":
        return Vocabulary(Bytes(), Bytes.size, Bytes.stop_token)
    if name in TASKS:
        from purejaxppo.rlhf.problems import PROBLEMS

        problem = PROBLEMS[name]()
        return Vocabulary(problem.text, problem.vocab_size, problem.stop_token)
    if not name.endswith(".json"):
        known = ("bytes", *TASKS)
        near = nearest(name, known)
        use = f"use {', '.join(known)} or the path of a tokenizer.json"
        hint = f"did you mean {near}?" if near else use
        raise ConfigError(f"tokenizer {name!r}: no such tokenizer; {hint}")
    found = FromFile(name)
    if found.stop_token is None:
        raise ConfigError(
            f"tokenizer {name!r}: has no stop token; add one of {', '.join(STOP_TOKENS)}"
        )
    return Vocabulary(found, found.size, found.stop_token)
