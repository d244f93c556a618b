"""Environments by name."""

import difflib
import functools
from typing import Any

from purejaxppo.config import Config, ConfigError
from purejaxppo.envs.gymnax import from_gymnax, import_gymnax
from purejaxppo.types import Environment

_NEEDS_DOWNLOAD = "MNISTBandit-bsuite"


def available_environments() -> list[str]:
    """Names that `Config.env_id` takes, those registered with gymnax at run time included."""
    return [name for name in import_gymnax().registered_envs if name != _NEEDS_DOWNLOAD]


def make_environment(config: Config, env: Any = None, env_params: Any = None) -> Environment:
    """The environment that `config.env_id` names, or `env` where one is passed.

    Args:
        env: an object that keeps gymnax 1.x's contract.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: if no environment has that name (the nearest is named), or an environment
            is missing part of the contract.
    """
    if env is None:
        env, default_params = _make_gymnax(config.env_id)
        env_params = default_params if env_params is None else env_params
    return from_gymnax(config.env_id, env, env_params)


@functools.lru_cache
def _make_gymnax(env_id: str) -> tuple[Any, Any]:
    """Cached: each `gymnax.make` is a new static object to jit, and would compile anew."""
    names = available_environments()
    if env_id == _NEEDS_DOWNLOAD:
        raise ConfigError(
            f"env_id = {env_id!r} downloads a data set when it is made; make it yourself and "
            "pass it as env"
        )
    if env_id not in names:
        near = difflib.get_close_matches(env_id, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"env_id = {env_id!r}: no such environment; {hint}`purejaxppo envs` lists them"
        )
    return import_gymnax().make(env_id)
