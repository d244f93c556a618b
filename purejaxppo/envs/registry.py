"""Environments by name."""

import dataclasses
import functools
from typing import Any

import numpy as np

from purejaxppo.checks import FLOAT_MAX, is_reference, nearest
from purejaxppo.config import Config, ConfigError
from purejaxppo.envs.gymnax import from_gymnax, import_gymnax
from purejaxppo.references import called, resolve
from purejaxppo.types import Environment

_NEEDS_DOWNLOAD = "MNISTBandit-bsuite"


def available_environments() -> list[str]:
    """Names that `Config.env_id` accepts, including those registered with gymnax at run time."""
    return [name for name in import_gymnax().registered_envs if name != _NEEDS_DOWNLOAD]


def make_environment(config: Config, env: Any = None, env_params: Any = None) -> Environment:
    """Make the environment that `config.env_id` names, or use `env` if one is passed.

    Args:
        env: an object with gymnax 1.x's interface.
        env_params: its parameters; None uses its defaults, changed by `config.env_params`.

    Raises:
        ConfigError: if no environment has that name (the message suggests the nearest), `env`
            lacks part of the interface, or the environment has no such parameters.
    """
    if env is None and is_reference(config.env_id):
        env = resolve("env_id", config.env_id)
        env = called("env_id", env) if callable(env) else env
    if env is None:
        env, default_params = _make_gymnax(config.env_id)
    else:
        default_params = getattr(env, "default_params", None)
    if env_params is None:
        env_params = _changed(config, default_params)
    elif config.env_params:
        raise ConfigError(
            f"env_params = {config.env_params} in Config, and env_params is passed as an argument "
            "too; remove one of the two"
        )
    return from_gymnax(config.env_id, env, env_params)


def _changed(config: Config, params: Any) -> Any:
    """An environment's default parameters with the values of `config.env_params`."""
    if not config.env_params:
        return params
    known = [f.name for f in dataclasses.fields(params)] if dataclasses.is_dataclass(params) else []
    changed = {}
    for name, value in config.env_params.items():
        if name not in known:
            near = nearest(name, known, 0.4)
            hint = f"did you mean {near}? " if near else ""
            listed = ", ".join(known) or "none"
            raise ConfigError(
                f"env_params.{name}: {config.env_id} has no such parameter; {hint}It has: {listed}"
            )
        changed[name] = _of_type(name, value, getattr(params, name))
    replaced: Any = params
    return dataclasses.replace(replaced, **changed)


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
    elif name == "max_steps_in_episode" and value < 1:
        rule = "must be at least 1"
    else:
        return value if truth else int(value) if whole else float(value)
    raise ConfigError(f"env_params.{name} = {value}: {rule}")


@functools.lru_cache
def _make_gymnax(env_id: str) -> tuple[Any, Any]:
    """Cached, since each `gymnax.make` makes a new static object, for which jit would recompile."""
    names = available_environments()
    if env_id == _NEEDS_DOWNLOAD:
        raise ConfigError(
            f"env_id = {env_id!r} downloads a data set when it is made; make it yourself and "
            "pass it as env"
        )
    if env_id not in names:
        near = nearest(env_id, names, 0.4)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(
            f"env_id = {env_id!r}: no such environment; {hint}`purejaxppo envs` lists them"
        )
    return import_gymnax().make(env_id)
