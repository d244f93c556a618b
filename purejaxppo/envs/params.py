"""Values of `Config.env_params` for an environment."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from purejaxppo.checks import FLOAT_MAX, nearest
from purejaxppo.config import ConfigError

LIMITS = ("max_steps_in_episode", "max_steps", "max_timesteps", "time_limit", "episode_length")
"""Parameters that are time limits."""


_DERIVED: dict[str, tuple[tuple[str, str], Callable[[Any, Any], Any]]] = {
    "total_mass": (("masscart", "masspole"), lambda cart, pole: cart + pole),
    "polemass_length": (("masspole", "length"), lambda mass, length: mass * length),
}
"""Parameters of gymnax's CartPole that follow from others, but are stored beside them."""


def fields_of(params: Any) -> dict[str, Any]:
    """The parameters of a dataclass and their values."""
    fields = dataclasses.fields(params) if dataclasses.is_dataclass(params) else ()
    return {f.name: getattr(params, f.name) for f in fields}


def numbers_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are single numbers or truth values."""
    return {name: x for name, x in values.items() if isinstance(x, bool | int | float)}


def replaced(params: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass with other values. Parameters that follow from these are computed again, unless
    they are given too."""
    if not values:
        return params
    params = dataclasses.replace(params, **values)
    for name, (sources, rule) in _DERIVED.items():
        if hasattr(params, name) and name not in values and not values.keys().isdisjoint(sources):
            derived = rule(*(getattr(params, x) for x in sources))
            params = dataclasses.replace(params, **{name: derived})
    return params


def changed_values(
    env_id: str, defaults: Mapping[str, Any], given: Mapping[str, float | int | bool]
) -> dict[str, Any]:
    """The given values, converted to the types of the defaults.

    Raises:
        ConfigError: if the environment has no parameter of a name (the message lists those that it
            has), or a value has another type than the default.
    """
    changed = {}
    for name, value in given.items():
        if name not in defaults:
            near = nearest(name, defaults, 0.4)
            hint = f"did you mean {near}? " if near else ""
            listed = ", ".join(defaults) or "none"
            raise ConfigError(
                f"env_params.{name}: {env_id} has no such parameter; {hint}It has: {listed}"
            )
        changed[name] = _of_type(name, value, defaults[name])
    return changed


def _of_type(name: str, value: float | int | bool, default: Any) -> Any:
    """Convert `value` to the type of the parameter's default."""
    kind = np.asarray(default)
    whole, truth = kind.dtype.kind in "iu", kind.dtype.kind == "b"
    if kind.shape != () or kind.dtype.kind not in "iufb":
        rule = f"its default is {default!r}, not a single number; pass env_params from Python"
    elif isinstance(value, bool) != truth:
        rule = f"must be {'true or false' if truth else 'a number'}; the default is {default!r}"
    elif not -FLOAT_MAX <= value <= FLOAT_MAX:
        rule = f"must be finite; the default is {default!r}"
    elif whole and (value != int(value) or abs(value) >= 2**31):
        rule = f"must be a whole number below 2^31; the default is {default!r}"
    elif name in LIMITS and value < 1:
        rule = "must be at least 1"
    else:
        return value if truth else int(value) if whole else float(value)
    raise ConfigError(f"env_params.{name} = {value}: {rule}")
