"""Prompts, demonstrations and preference pairs, read from and written to JSON Lines files."""

import codecs
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np

from purejaxppo.checks import FLOAT_MAX, ConfigError, RunWarning, nearest
from purejaxppo.host.rundir import StorageError, write_whole

_MAX_LINE = 16 * 2**20
"""Size limit of a line, in bytes."""
_MAX_KEYS = 100
"""Number of keys of a line that are searched for one similar to a missing key."""


class Prompt(NamedTuple):
    """A prompt to generate responses to."""

    prompt: str
    columns: Mapping[str, Any] = {}
    """The other keys of the line, such as the correct answer."""


class Demonstration(NamedTuple):
    """A prompt with a completion to imitate."""

    prompt: str
    completion: str


class Preference(NamedTuple):
    """A prompt with two completions, of which a labeller preferred one."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0
    """By how much `chosen` is better; 0 if unknown."""
    columns: Mapping[str, Any] = {}
    """The other keys of the line, such as `probability`: the probability that the labeller prefers
    `chosen`."""


class Pair(NamedTuple):
    """A prompt with two completions that nobody has compared yet."""

    prompt: str
    first: str
    second: str


class _HasPrompt(Protocol):
    @property
    def prompt(self) -> str: ...


_Record = TypeVar("_Record", bound=_HasPrompt)
_Item = TypeVar("_Item")
_Encoded = TypeVar("_Encoded")
_Make = Callable[[dict[str, Any]], _Item]


class _BadLineError(Exception):
    """The message says what is wrong with the line, the rule and the fix."""


# Reading


def read_prompts(path: str | Path, *, bad_lines: str = "error") -> list[Prompt]:
    """Read prompts from a JSON Lines file, with one object such as `{"prompt": "12+31="}` per line.

    Args:
        bad_lines: "error" raises `ConfigError` at the first bad line; "skip" leaves bad lines out
            and gives one `RunWarning` with their number. Blank lines are always ignored.

    Raises:
        ConfigError: if the file cannot be read, has no prompt, or has a bad line: not a JSON
            object in UTF-8 of at most 16 MiB, or `prompt` is missing, empty or not a string.
    """
    return _read(path, *_KINDS[Prompt], bad_lines)


def read_demonstrations(path: str | Path, *, bad_lines: str = "error") -> list[Demonstration]:
    """Read demonstrations from a JSON Lines file, with one object such as
    `{"prompt": "12+31=", "completion": "43"}` per line. Other keys are ignored.

    Args:
        bad_lines: see `read_prompts`.

    Raises:
        ConfigError: if the file cannot be read, has no demonstration, or has a bad line: see
            `read_prompts`; `completion` must be a string too, and not empty.
    """
    return _read(path, *_KINDS[Demonstration], bad_lines)


def read_preferences(path: str | Path, *, bad_lines: str = "error") -> list[Preference]:
    """Read preference pairs from a JSON Lines file, with one object such as
    `{"prompt": "12+31=", "chosen": "43", "rejected": "34", "margin": 0.5}` per line; the margin is
    optional.

    Args:
        bad_lines: see `read_prompts`.

    Raises:
        ConfigError: if the file cannot be read, has no pair, or has a bad line: see
            `read_prompts`; `chosen` and `rejected` must be strings too, different and not empty,
            `margin` a finite number, and `probability` a number from 0 to 1.
    """
    return _read(path, *_KINDS[Preference], bad_lines)


def read_encoded(
    path: str | Path, kind: type[_Record], encode: Callable[[_Record], _Encoded], bad_lines: str
) -> list[tuple[_Record, _Encoded]]:
    """Read records of a kind, and encode each. A line is also bad if encoding its record raises
    `ConfigError`.

    Raises:
        ConfigError: see `read_prompts`.
    """
    make, noun = _KINDS[kind]

    def both(found: dict[str, Any]) -> tuple[_Record, _Encoded]:
        record = make(found)
        try:
            return record, encode(record)
        except ConfigError as error:
            raise _BadLineError(str(error)) from error

    return _read(path, both, noun, bad_lines)


def _read(path: str | Path, make: _Make[_Item], noun: str, bad_lines: str) -> list[_Item]:
    if bad_lines not in ("error", "skip"):
        raise ConfigError(f"bad_lines = {bad_lines!r}: must be error or skip")
    records, skipped, first = [], 0, ""
    for number, line in _lines(path):
        found = _parse(line, make)
        if not isinstance(found, str):
            records.append(found)
            continue
        if bad_lines == "error":
            raise ConfigError(f"{path} line {number}: {found}")
        skipped, first = skipped + 1, first or f"line {number}: {found}"
    if not records and skipped:
        raise ConfigError(f"{path}: has no {noun}: all {skipped} lines are bad; first, {first}")
    if not records:
        raise ConfigError(f"{path}: has no {noun}; write one JSON object per line")
    if skipped:
        warnings.warn(
            f"{path}: skipped {skipped} of {skipped + len(records)} lines; first, {first}",
            RunWarning,
            stacklevel=3,
        )
    return records


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, and their numbers from 1."""
    try:
        with Path(path).open("rb") as file:
            yield from _numbered(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; check the path") from error
    except ValueError as error:  # a path with a null character
        raise ConfigError(f"{str(path)!r}: {error}; check the path") from error


def _numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, and their numbers from 1. Only the first
    `_MAX_LINE + 1` bytes of a line are kept."""
    for number in itertools.count(1):
        line = rest = file.readline(_MAX_LINE + 1)
        if not line:
            return
        while len(rest) > _MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(_MAX_LINE + 1)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip() or len(line) > _MAX_LINE:
            yield number, line


def _parse(line: bytes, make: _Make[_Item]) -> _Item | str:
    """The record of a line, or what is wrong with the line."""
    try:
        return make(_object(line))
    except _BadLineError as error:
        return str(error)


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > _MAX_LINE:
        raise _BadLineError(f"has more than {_MAX_LINE:,} bytes; remove it, or split the text")
    try:
        text = line.decode().rstrip("\r\n")  # or an error at its end has another column
    except UnicodeDecodeError as error:
        raise _BadLineError(
            f"is not UTF-8 text (byte {error.start + 1} of the line); convert the file to UTF-8"
        ) from error
    fix = "write one JSON object per line"
    try:
        found = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise _BadLineError(f"is not JSON: {error.msg} at column {error.colno}; {fix}") from error
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"is not JSON that can be read: {error}; {fix}") from error
    if not isinstance(found, dict):
        raise _BadLineError(f"is {_kind_of(found)}: must be a JSON object; {fix}")
    if "\\u" in text and not _can_be_encoded(found):
        raise _BadLineError(
            "has half of a surrogate pair, such as \\ud83d; write the pair, or the character itself"
        )
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _can_be_encoded(found: dict[str, Any]) -> bool:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _prompt(found: dict[str, Any]) -> Prompt:
    return Prompt(_text(found, "prompt"), _columns(found, Prompt._fields))


def _demonstration(found: dict[str, Any]) -> Demonstration:
    return Demonstration(_text(found, "prompt"), _text(found, "completion"))


def _preference(found: dict[str, Any]) -> Preference:
    prompt, chosen, rejected = (_text(found, x) for x in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise _BadLineError("chosen and rejected are equal: must differ; remove the line")
    chance = found.get("probability", 0.5)
    if not _is_number(chance) or not 0 <= chance <= 1:
        given = f"= {chance}" if _is_number(chance) else f"is {_kind_of(chance)}"
        raise _BadLineError(f"probability {given}: must be a number from 0 to 1, or left out")
    return Preference(prompt, chosen, rejected, _margin(found), _columns(found, Preference._fields))


def _pair(found: dict[str, Any]) -> Pair:
    return Pair(*(_text(found, name) for name in Pair._fields))


def _columns(found: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    known = set(fields) - {"columns"}
    return {name: value for name, value in found.items() if name not in known}


def _text(found: dict[str, Any], name: str) -> str:
    if name not in found:
        near = nearest(name, itertools.islice(found, _MAX_KEYS))
        raise _BadLineError(f"has no {name}; {f'rename {near!r}' if near else 'add the key'}")
    text = found[name]
    if not isinstance(text, str):
        fix = "; apply the chat template first" if isinstance(text, list) else ""
        raise _BadLineError(f"{name} is {_kind_of(text)}: must be a string{fix}")
    if not text:
        raise _BadLineError(f"{name} is empty: needs at least one character; remove the line")
    return text


def _margin(found: dict[str, Any]) -> float:
    value = found.get("margin", 0.0)
    if not _is_number(value) or not abs(value) <= FLOAT_MAX:
        given = f"= {value:g}" if isinstance(value, float) else f"is {_kind_of(value)}"
        raise _BadLineError(f"margin {given}: must be a finite float32 number, or left out")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    words = {
        dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
        float: "a number",
    }  # fmt: skip
    return words.get(type(value), "null")


_KINDS: dict[type, tuple[_Make[Any], str]] = {
    Prompt: (_prompt, "prompt"),
    Demonstration: (_demonstration, "demonstration"),
    Preference: (_preference, "pair"),
    Pair: (_pair, "pair"),
}
"""How each kind of record is made, and its name."""


# Writing


def write_records(
    path: str | Path, records: Iterable[Prompt | Demonstration | Preference | Pair]
) -> None:
    """Write records of one kind as JSON Lines in UTF-8. The columns become keys of the line, and
    default values are left out. The file is replaced atomically.

        write_records("pairs.jsonl", [Preference("12+31=", "43", "34")])

    Raises:
        ConfigError: if there are no records, they are of different kinds, or one could not be read
            back equal, for example because a text is empty or a column is not JSON.
        StorageError: if the file cannot be written.
    """
    rows = list(records)
    if not rows:
        raise ConfigError(f"records for {path}: is empty; give at least one")
    lines = [_line(number, row, type(rows[0])) for number, row in enumerate(rows, 1)]
    try:
        write_whole(Path(path), b"".join(lines))
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    except ValueError as error:  # no file name, or a null character
        raise ConfigError(f"{str(path)!r}: {error}; give the path of a file") from error


def _line(number: int, record: Any, kind: type) -> bytes:
    """The line of a record, which is checked to be read back equal."""
    if kind not in _KINDS:
        raise ConfigError(
            f"record {number} is a {kind.__name__}: must be a Prompt, Demonstration, Preference or "
            "Pair"
        )
    if type(record) is not kind:
        raise ConfigError(
            f"record {number} is a {type(record).__name__}, but the first is a {kind.__name__}; "
            "write each kind to its own file"
        )
    fields = record._asdict()
    columns = dict(fields.pop("columns", {}))
    default = record._field_defaults.get("margin")
    content = {x: value for x, value in fields.items() if x != "margin" or value != default}
    try:
        text = json.dumps(
            {**content, **columns}, ensure_ascii=False, allow_nan=False, default=_plain
        )
        line = text.encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"record {number}: cannot be written as JSON: {error}") from error
    found = _parse(line, _KINDS[kind][0])
    if isinstance(found, str):
        raise ConfigError(f"record {number}: {found}")
    if found != record:
        raise ConfigError(
            f"record {number}: would not be read back equal; in columns, use string keys that are "
            "not fields of the record, and lists instead of tuples"
        )
    return line


def _plain(value: Any) -> Any:
    """The Python number of a NumPy number."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a value is of type {type(value).__name__}; use JSON types")


# Splitting


def split(
    records: Iterable[_Record], share: float, seed: int = 0
) -> tuple[list[_Record], list[_Record]]:
    """Split records into training and held-out records by prompt: all records with the same prompt
    are on the same side. Both lists keep the order of the records.

    The side of a prompt depends on a hash of its text and the seed, so records that are added later
    leave the other prompts where they are. The exception is a side that would be empty: it gets one
    prompt.

    Args:
        share: expected share of the distinct prompts that is held out, above 0 and below 1.
        seed: a whole number from 0 to 2^64 - 1.

    Returns:
        the training records and the held-out records, at least one of each.

    Raises:
        ConfigError: if there are fewer than 2 distinct prompts, or an argument is out of range.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise ConfigError(f"share = {share!r}: must be a number above 0 and below 1")
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed!r}: must be a whole number from 0 to 2^64 - 1")
    rows = list(records)
    places = {x.prompt: _place(x.prompt, int(seed)) for x in rows}
    if len(places) < 2:
        raise ConfigError(
            f"records: have {len(places)} distinct prompts, but a split by prompt needs at least 2"
        )
    ordered = sorted(places, key=lambda x: (places[x], x))
    held_out = {x for x in ordered[1:-1] if places[x] < share} | {ordered[0]}
    train = [x for x in rows if x.prompt not in held_out]
    return train, [x for x in rows if x.prompt in held_out]


def _place(prompt: str, seed: int) -> float:
    """A number from 0 to 1 that depends on the text and the seed only."""
    text, key = prompt.encode("utf-8", "surrogatepass"), seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=key).digest(), "little") / 2**64
