"""Search space of a sweep: a grid of values, and ranges to sample."""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from purejaxppo.checks import nearest
from purejaxppo.config import ConfigError, HParams, TaskConfig
from purejaxppo.host.configfile import toml

_NOT_SWEPT = ("env_id", "env_params", "task", "task_params")


def _fields_of(kind: type) -> dict[str, Any]:
    """Names and types of the fields of a settings class and of all its subclasses."""
    found = {}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        found |= {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for sub in kind.__subclasses__():
        found |= _fields_of(sub)
    return {name: hint for name, hint in found.items() if name not in _NOT_SWEPT}


def _static() -> dict[str, Any]:
    """Settings of any task that are compiled into a program."""
    return _fields_of(TaskConfig)


def _traced() -> dict[str, Any]:
    """Traced hyperparameters of any task."""
    return _fields_of(HParams)


Values = dict[str, Any]
"""Values of one trial, by setting name."""


@dataclass(frozen=True)
class Range:
    """A range of numbers that are drawn uniformly, or whose logarithms are (`loguniform`)."""

    kind: Literal["uniform", "loguniform"]
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(f"{self}: is empty; the first bound must be below the second")
        if self.kind == "loguniform" and self.low <= 0:
            raise ConfigError(f"{self}: the first bound has no logarithm; give one above 0")

    def __str__(self) -> str:
        return f"{self.kind}:{self.low!r},{self.high!r}"

    def at(self, u: float) -> float:
        """The number at the fraction `u` in [0, 1] of the range."""
        if self.kind == "uniform":
            return self.low + u * (self.high - self.low)
        return min(max(self.low * (self.high / self.low) ** u, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """One of several values, with equal probability."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError(f"{self}: is empty; give at least one value")

    def __str__(self) -> str:
        return f"choice:{_format_values(self.values)}"

    def at(self, u: float) -> Any:
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]


def uniform(low: float, high: float) -> Range:
    """Draw numbers uniformly between `low` and `high`.

    Raises `ConfigError` if the range is empty.
    """
    return Range("uniform", float(low), float(high))


def loguniform(low: float, high: float) -> Range:
    """Draw numbers between `low` and `high` with uniformly distributed logarithms.

    Raises `ConfigError` if the range is empty, or `low` is not above 0.
    """
    return Range("loguniform", float(low), float(high))


def choice(values: Sequence[Any]) -> Choice:
    """Draw one of `values`, each with equal probability. Raises `ConfigError` if it is empty."""
    return Choice(tuple(values))


@dataclass(frozen=True)
class Space:
    """Search space: every combination of the values in `grid` is tried; `sample` is drawn."""

    grid: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    sample: tuple[tuple[str, Range | Choice], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in (*self.grid, *self.sample))


def space_texts(given: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Convert a search space from Python to texts for `parse_space`.

    Lists of values become part of the grid; ranges and `choice` become samples.

    Raises:
        ConfigError: if a value is none of these, or a list is empty.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"space = {given!r}: must be a dict, as in {{'learning_rate': [1e-3, 1e-4]}}"
        )
    grid, sample = [], []
    for name, wanted in given.items():
        if isinstance(wanted, Range | Choice):
            sample.append(f"{name}={wanted}")
        elif isinstance(wanted, Sequence | np.ndarray) and not isinstance(wanted, str):
            grid.append(f"{name}={_format_values(wanted)}")
        else:
            raise ConfigError(
                f"{name} = {wanted!r}: must be a list of values, or made by uniform, loguniform or "
                "choice"
            )
    return tuple(grid), tuple(sample)


def parse_space(grid: Sequence[str], sample: Sequence[str]) -> Space:
    """Parse a search space from texts `NAME=VALUE,VALUE` and `NAME=KIND:...`.

    Raises:
        ConfigError: if a text has another form, a setting does not exist or is given twice, there
            are no values, or a compiled-in setting is given a range.
    """
    grids, samples = [], []
    for text in grid:
        name, values = _split_name(text, "NAME=VALUE,VALUE")
        grids.append((name, parse_values(name, values)))
    for text in sample:
        name, wanted = _split_name(text, "NAME=uniform:LOW,HIGH, loguniform:LOW,HIGH or choice:V,V")
        kind, _, rest = wanted.partition(":")
        if kind == "choice":
            samples.append((name, Choice(parse_values(name, rest))))
            continue
        if kind not in ("uniform", "loguniform"):
            raise ConfigError(f"{text}: write {name}=uniform:LOW,HIGH, loguniform or choice:V,V")
        bounds = parse_values(name, rest)
        if len(bounds) != 2 or not all(isinstance(b, int | float) for b in bounds):
            raise ConfigError(f"{text}: {kind} takes two numbers, as in {name}={kind}:0.1,1")
        wanted = Range(kind, float(bounds[0]), float(bounds[1]))
        _check_traced(name, wanted)
        samples.append((name, wanted))
    return _check_unique(Space(tuple(grids), tuple(samples)))


def parse_values(name: str, text: str) -> tuple[Any, ...]:
    """Parse comma-separated TOML values.

    Words need no quotes; `none` is `None` for settings that may be None.

    Raises:
        ConfigError: if there are no values.
    """
    if not text.strip():
        raise ConfigError(f"{name}: has no values; give at least one, as in {name}=1,2")
    try:
        return tuple(_tuples(x) for x in tomllib.loads(f"x = [{text}]")["x"])
    except tomllib.TOMLDecodeError:
        return tuple(_parse_word(name, part.strip()) for part in text.split(","))


def apply(values: Values, config: Any, hparams: HParams) -> tuple[Any, HParams]:
    """The config and hyperparameters of a trial. Raises `ConfigError` if a value is invalid."""
    own = (
        {f.name for f in dataclasses.fields(config)},
        {f.name for f in dataclasses.fields(hparams)},
    )
    for name in values:
        if name not in own[0] | own[1]:
            raise ConfigError(
                f"{name}: no such setting of {type(config).__name__} or {type(hparams).__name__}"
            )
    static = {name: value for name, value in values.items() if name in own[0]}
    traced = {name: value for name, value in values.items() if name in own[1]}
    config, hparams = (
        dataclasses.replace(config, **static), dataclasses.replace(hparams, **traced)
    )  # fmt: skip
    config.check_hparams(hparams)
    return config, hparams


def short(value: Any) -> str:
    """Format a value for display, floats with 4 significant digits."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(short, value))}]"
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _parse_word(name: str, text: str) -> Any:
    try:
        return _tuples(tomllib.loads(f"x = {text}")["x"])
    except tomllib.TOMLDecodeError:
        optional = type(None) in typing.get_args(_traced().get(name))
        if name in _static() and text.lower() in ("true", "false"):
            return text.lower() == "true"
        return None if text.lower() == "none" and optional else text


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list | tuple) else value


def _format_values(values: Any) -> str:
    """Format values as text that `parse_values` reads back."""
    return ",".join("none" if x is None else toml(_plain(x)) for x in values)


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python numbers, and lists to tuples."""
    return _tuples(value.tolist() if isinstance(value, np.generic) else value)


def swept_setting(text: str) -> str:
    """The setting that `NAME=...` sweeps. Raises `ConfigError` if it does not exist."""
    return _split_name(text, "NAME=VALUE,VALUE")[0]


def _split_name(text: str, form: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r}: write {form}")
    return _canonical(name.strip()), rest


def _canonical(name: str) -> str:
    """The field for a name such as `learning_rate`, `learning-rate` or `hparams.learning_rate`."""
    table, _, field = name.rpartition(".")
    field = field.replace("-", "_")
    known = {"": _static() | _traced(), "hparams": _traced()}.get(table, {})
    if field in known:
        return field
    if field in ("env_id", "task"):
        raise ConfigError(
            f"{field}: returns of different environments or tasks do not compare; run one sweep "
            "for each"
        )
    near = nearest(field, [*_static(), *_traced()], 0.5)
    hint = f"did you mean {near}?" if near else "`purejaxppo train --help` lists them"
    raise ConfigError(f"{name}: no such setting to sweep; {hint}")


def _check_traced(name: str, wanted: Range | Choice) -> None:
    if name in _static() and isinstance(wanted, Range):
        raise ConfigError(
            f"{name} = {wanted}: each value of {name} needs its own compilation, so give a list of "
            "values (in the grid or with choice), not a range"
        )


def _check_unique(space: Space) -> Space:
    for name in space.names:
        if space.names.count(name) > 1:
            raise ConfigError(f"{name}: is swept twice; give it once")
    return space
