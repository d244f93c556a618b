"""Values of `Config.env_params` for an environment."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from purejaxppo.checks import FLOAT_MAX, nearest
from purejaxppo.config import ConfigError

LIMITS = ("max_steps_in_episode", "max_steps", "max_timesteps", "time_limit", "episode_length")
"""Parameters that are time limits."""


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
