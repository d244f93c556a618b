"""Environments by name."""

import fnmatch
import functools
from collections.abc import Mapping
from typing import Any

from purejaxppo.checks import EnvParams, is_reference, nearest
from purejaxppo.config import Config, ConfigError
from purejaxppo.envs.gymnasium import make_python_environment, python_names
from purejaxppo.envs.gymnax import from_gymnax, import_gymnax
from purejaxppo.envs.params import changed_values, fields_of, replaced
from purejaxppo.envs.single import Single, vectorised
from purejaxppo.envs.suites import make_single, suite_names
from purejaxppo.envs.wrappers import changes, wrapped
from purejaxppo.references import called, resolve
from purejaxppo.suites import PYTHON, SUITES, is_python
from purejaxppo.types import Environment

_NEEDS_DOWNLOAD = "MNISTBandit-bsuite"


def available_environments(pattern: str = "") -> list[str]:
    """Names that `Config.env_id` accepts: gymnax's, including those registered with it at run time,
    those of the installed suites with their prefix, and Gymnasium's. EnvPool's, of which there
    are many, are returned for the prefix `envpool/`.

    Args:
        pattern: a part of a name in upper or lower case, or a pattern such as `*/*snake*`. With
            `gymnax/` or a suite's prefix, only that suite is imported.
    """
    pattern = pattern.lower()
    prefix, slash, rest = pattern.partition("/")
    if slash and prefix == "gymnax":
        names, pattern = _gymnax_names(), rest
    elif slash and prefix in PYTHON:
        names = python_names(prefix)
    elif slash and prefix in SUITES:
        names = suite_names(prefix)
    else:
        names = _gymnax_names() + [name for each in SUITES for name in suite_names(each)]
        names += python_names("gymnasium")
    wanted = pattern if "*" in pattern else f"*{pattern}*"
    return [name for name in names if fnmatch.fnmatchcase(name.lower(), wanted)]


def parameters_of(env_id: str) -> Mapping[str, Any]:
    """The parameters that `Config.env_params` can change, with their defaults.

    Raises:
        ConfigError: if there is no such environment.
    """
    if is_python(env_id):
        return {}
    if "/" in env_id:
        return make_single(env_id, EnvParams()).parameters
    return fields_of(_make_gymnax(env_id)[1])


def _gymnax_names() -> list[str]:
    return [name for name in import_gymnax().registered_envs if name != _NEEDS_DOWNLOAD]


def make_environment(config: Config, env: Any = None, env_params: Any = None) -> Environment:
    """Make the environment that `config.env_id` names, or use `env` if one is passed.

    Args:
        env: an object with gymnax's interface, or a `Single`.
        env_params: its parameters; None uses its defaults, changed by `config.env_params`.

    Raises:
        ConfigError: if no environment has that name (the message suggests the nearest), `env`
            lacks part of the interface, or the environment has no such parameters.
    """
    given = env
    if env is None and is_reference(config.env_id):
        env = resolve("env_id", config.env_id)
        env = called("env_id", env) if callable(env) else env
    if env is None and is_python(config.env_id):
        return _in_python(config, env_params)
    if isinstance(env, Single) or (env is None and "/" in config.env_id):
        return _of_single(config, env, env_params)
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
    return from_gymnax(_name(config, given), env, env_params, config)


def _name(config: Config, given: Any) -> str:
    """The name for messages: of an environment that is passed without an `env_id`, its class."""
    unnamed = given is not None and config.env_id == Config.env_id
    return type(given).__name__ if unnamed else config.env_id


def _in_python(config: Config, env_params: Any) -> Environment:
    if env_params is not None or changes(config):
        raise ConfigError(
            f"{', '.join([*changes(config), *(['env_params'] * (env_params is not None))])}: have "
            f"no effect on {config.env_id}, which is stepped in Python; register a changed "
            "environment with Gymnasium"
        )
    return make_python_environment(config.env_id, config.env_params)


def _of_single(config: Config, env: Single | None, env_params: Any) -> Environment:
    if env_params is not None or (env is not None and config.env_params):
        raise ConfigError(
            "env_params: only environments of gymnax take parameters from Python; make the "
            "environment with these values, and pass it as env"
        )
    single = make_single(config.env_id, config.env_params) if env is None else env
    if single.alternating and changes(config):
        raise ConfigError(
            f"{', '.join(changes(config))}: cannot change {single.name}, a game of two players"
        )
    return vectorised(wrapped(single, config))


def _changed(config: Config, params: Any) -> Any:
    """An environment's default parameters with the values of `config.env_params`."""
    if not config.env_params:
        return params
    return replaced(params, changed_values(config.env_id, fields_of(params), config.env_params))


@functools.lru_cache
def _make_gymnax(env_id: str) -> tuple[Any, Any]:
    """Cached, since each `gymnax.make` makes a new static object, for which jit would recompile."""
    names = _gymnax_names()
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
