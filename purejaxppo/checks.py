"""Checks of settings against their types and ranges, on construction."""

import dataclasses
import difflib
import functools
import math
import operator
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

_LONGEST_MESSAGE = 4000
_LONGEST_NAME = 100
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
FLOAT_MAX = float(np.finfo(np.float32).max)


class ConfigError(Exception):
    """An invalid setting; the message gives the value, the rule and the fix.

    Not a `ValueError`, because libraries that construct settings catch and rephrase that. Very long
    messages are shortened.
    """

    def __init__(self, message: str):
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            left_out = len(message) - 2 * half
            message = f"{message[:half]}...({left_out:,} characters)...{message[-half:]}"
        super().__init__(message)


class RunWarning(RuntimeWarning):
    """A problem that does not stop a run."""


class HostCallError(Exception):
    """A Python function that runs between compiled calls failed; the state before it is intact."""


class EnvParams(Mapping[str, float | int | bool]):
    """An immutable, hashable mapping from names to numbers or booleans.

    Raises `ConfigError` if `values` is not such a mapping.
    """

    def __init__(self, values: Mapping[str, float | int | bool] = MappingProxyType({})):
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"env_params = {values!r}: must be a table of names and numbers, such as "
                "{'max_steps_in_episode': 200}"
            )
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, bool | int | float):
                raise ConfigError(
                    f"env_params.{name} = {value!r}: must be a number, true or false; pass other "
                    "parameters from Python as env_params=..."
                )
        self._values = {name: values[name] for name in sorted(values)}

    def __getitem__(self, name: str) -> float | int | bool:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to `name`, if any reaches the cutoff (0 to 1).

    None for a name of more than 100 characters, because the search takes quadratic time.
    """
    if len(name) > _LONGEST_NAME:
        return None
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_fields(instance: Any) -> None:
    """Check the type, range and effect of each field of a settings dataclass.

    A field with `only_with` in its metadata, `{other: choices}`, must keep its default unless the
    other setting is one of the choices. Integers are accepted for floats, lists for tuples. Arrays
    and tracers are accepted for scalars; each element of a concrete array is checked.

    Raises:
        ConfigError: naming the field, its value, the rule and the fix.
    """
    hints = _hints(type(instance))
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        _check_type(f.name, value, hints[f.name], f.default)
        value = _plain(value, hints[f.name])
        object.__setattr__(instance, f.name, value)
        if "low" in f.metadata and value is not None:
            _check_range(f.name, value, f.metadata)
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        for other, choices in f.metadata.get("only_with", {}).items():
            chosen = getattr(instance, other, choices[0])
            if chosen not in choices and value != f.default:
                text = str(value).lower() if isinstance(value, bool) else value
                raise ConfigError(
                    f"{f.name} = {text}: has no effect with {other} = {chosen}; leave it out, or "
                    f"choose {other} = {' or '.join(choices)}"
                )


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _plain(value: Any, hint: Any) -> Any:
    """Convert a checked value to the type of its field: lists to tuples, NumPy integers to int,
    integers to float."""
    if isinstance(value, list):
        return tuple(value)
    if hint is int:
        return int(value) if isinstance(value, np.integer) else value
    if isinstance(value, int) and hint not in (bool, str):
        return float(value) if abs(value) <= FLOAT_MAX else math.inf * (1 if value > 0 else -1)
    return value


def _check_type(name: str, value: Any, hint: Any, default: Any) -> None:
    if typing.get_origin(hint) is typing.Union:
        hint = functools.reduce(operator.or_, typing.get_args(hint))
    if hint not in (bool, str, int, float) and not choices_of(hint) and not typing.get_args(hint):
        hint = hint if isinstance(hint, type) and issubclass(hint, Mapping) else Any
    if hint is Any:  # a hyperparameter of a user's own class, or a traced value
        hint = float
    if hint is float or (isinstance(hint, types.UnionType) and float in hint.__args__):
        fits = _is_number(value) or (value is None and isinstance(hint, types.UnionType))
        kind = "a number"
    elif choices := choices_of(hint):
        fits, kind = fits_choice(value, hint), f"one of {in_words(hint)}"
        near = nearest(str(value), choices)
        kind += f" (did you mean {near}?)" if near and not fits else ""
    elif typing.get_origin(hint) is tuple:
        item_type = typing.get_args(hint)[0]
        fits = isinstance(value, tuple | list) and all(type(item) is item_type for item in value)
        kind = "a list of whole numbers" if item_type is int else "a list of strings"
    elif isinstance(hint, type) and issubclass(hint, Mapping):
        fits, kind = isinstance(value, hint), "a table"
    else:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        fits = whole or _is_array(value) if hint is int else type(value) is hint
        kind = {int: "a whole number", bool: "true or false", str: "a string"}[hint]
        kind += " or auto" if default == "auto" else ""
    if not fits:
        raise ConfigError(f"{name} = {value!r}: must be {kind}; the default is {default!r}")


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the choices of a `Literal`, alone or in a union."""
    parts = (hint,) if typing.get_origin(hint) is Literal else typing.get_args(hint)
    return tuple(x for p in parts if typing.get_origin(p) is Literal for x in typing.get_args(p))


def fits_choice(value: Any, hint: Any) -> bool:
    """Whether a value is one of the choices, or a reference if references are allowed."""
    is_open = str in typing.get_args(hint)
    return value in choices_of(hint) or (is_open and isinstance(value, str) and is_reference(value))


def in_words(hint: Any) -> str:
    """Return the choices as text for an error message."""
    more = ["package.module:name"] if str in typing.get_args(hint) else []
    return ", ".join([*choices_of(hint), *more])


def is_reference(text: str) -> bool:
    """Whether a setting names a Python object, as `package.module:name`."""
    return _REFERENCE.fullmatch(text) is not None


def _is_array(value: Any) -> bool:
    return is_traced(value) or (hasattr(value, "dtype") and hasattr(value, "shape"))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float) or is_traced(value):
        return True
    if isinstance(value, np.ndarray | np.generic):
        return np.issubdtype(value.dtype, np.number)
    jax = sys.modules.get("jax")
    return (
        jax is not None
        and isinstance(value, jax.Array)
        and (jax.numpy.issubdtype(value.dtype, np.number))
    )


def is_traced(value: Any) -> bool:
    """Whether a value is a JAX tracer. Does not import JAX."""
    core = sys.modules.get("jax.core")
    return core is not None and isinstance(value, core.Tracer)


def _check_range(name: str, value: Any, rule: Any) -> None:
    if is_traced(value):
        return
    numbers = np.asarray(value)
    low, high = rule["low"], rule["high"]
    above = numbers > low if rule["open_low"] else numbers >= low
    good = above & (numbers <= high)
    if np.all(good):
        return
    worst = numbers[~good].flat[0] if numbers.ndim else value
    wanted = f"greater than {low}" if rule["open_low"] else f"at least {low}"
    wanted += "" if math.isinf(high) else f" and at most {high}"
    raise ConfigError(f"{name} = {worst}: must be {wanted}")
