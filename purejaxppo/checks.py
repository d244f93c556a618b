"""Settings are checked against their types and ranges where they are made."""

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

_LONGEST_MESSAGE = 4000
_LONGEST_NAME = 100
FLOAT_MAX = float(np.finfo(np.float32).max)


class ConfigError(Exception):
    """A setting that cannot work: the message gives the value, the rule and the remedy.

    Not a `ValueError`, which libraries that construct settings catch and rephrase. A message too
    long to read is shortened.
    """

    def __init__(self, message: str):
        if len(message) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            left_out = len(message) - 2 * half
            message = f"{message[:half]}...({left_out:,} characters)...{message[-half:]}"
        super().__init__(message)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most similar to `name`, if any reaches the cutoff (0 to 1).

    A name of more than 100 characters has none: finding one takes time that grows with its square.
    """
    if len(name) > _LONGEST_NAME:
        return None
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def check_fields(instance: Any) -> None:
    """Check each field of a settings dataclass against its type and range, and that it has an
    effect: with `only_with` in its metadata, `{other: choices}`, it is left at its default unless
    the other setting is one of the choices.

    Integers are accepted for floats, lists for tuples. Arrays and tracers are accepted for
    scalars; concrete ones have each element checked.

    Raises:
        ConfigError: naming the field, its value, the rule and the remedy.
    """
    hints = typing.get_type_hints(type(instance))
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
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ConfigError(
                    f"{f.name} = {shown}: has no effect with {other} = {chosen}; leave it out, or "
                    f"choose {other} = {' or '.join(choices)}"
                )


def _plain(value: Any, hint: Any) -> Any:
    """A checked value in the type its field has: lists as tuples, NumPy's and whole numbers as
    Python's own of the right kind."""
    if isinstance(value, list):
        return tuple(value)
    if hint is int:
        return int(value)
    if isinstance(value, int) and hint not in (bool, str):
        return float(value) if abs(value) <= FLOAT_MAX else math.inf * (1 if value > 0 else -1)
    return value


def _check_type(name: str, value: Any, hint: Any, default: Any) -> None:
    if hint is float or (isinstance(hint, types.UnionType) and float in hint.__args__):
        fits = _is_number(value) or (value is None and isinstance(hint, types.UnionType))
        kind = "a number"
    elif typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        fits, kind = value in choices, f"one of {', '.join(choices)}"
        near = nearest(str(value), choices)
        kind += f" (did you mean {near}?)" if near and not fits else ""
    elif typing.get_origin(hint) is tuple:
        item_type = typing.get_args(hint)[0]
        fits = isinstance(value, tuple | list) and all(type(item) is item_type for item in value)
        kind = "a list of whole numbers" if item_type is int else "a list of texts"
    elif isinstance(hint, type) and issubclass(hint, Mapping):
        fits, kind = isinstance(value, hint), "a table"
    else:
        fits = type(value) is hint or (hint is int and isinstance(value, np.integer))
        kind = {int: "a whole number", bool: "true or false", str: "a text"}[hint]
    if not fits:
        raise ConfigError(f"{name} = {value!r}: must be {kind}; the default is {default!r}")


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
    """Whether JAX is tracing with this value in place of a number. Does not import JAX."""
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
