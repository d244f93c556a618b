"""Environments of suites by name, with the suite's prefix.

Each suite has an adapter module in this package with two functions, `names()` and
`make(name, params) -> Single`. A suite is imported when it is first used.
"""

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType

from purejaxppo.checks import nearest, reason_of
from purejaxppo.config import ConfigError
from purejaxppo.envs.single import Single
from purejaxppo.suites import SUITES


def is_installed(prefix: str) -> bool:
    return importlib.util.find_spec(SUITES[prefix].package) is not None


def suite_names(prefix: str) -> list[str]:
    """Names of a suite's environments, with the prefix; none if it is not installed."""
    if not is_installed(prefix):
        return []
    left_out = SUITES[prefix].unavailable
    return [f"{prefix}/{name}" for name in _adapter(prefix).names() if name not in left_out]


@functools.lru_cache
def make_single(env_id: str, params: Mapping[str, float | int | bool]) -> Single:
    """Make an environment of a suite by its name with the prefix.

    Cached, since each call makes new functions, for which jit would compile again.

    Raises:
        ConfigError: if the suite is not installed or does not exist, has no such environment, or
            the environment has no such parameters or cannot be made.
    """
    prefix, _, name = env_id.partition("/")
    if prefix not in SUITES:
        near = nearest(prefix, SUITES, 0.4)
        raise ConfigError(
            f"env_id = {env_id!r}: no suite {prefix!r}; "
            f"{f'did you mean {near}? ' if near else ''}The suites are {', '.join(SUITES)}"
        )
    suite = SUITES[prefix]
    if not is_installed(prefix):
        raise ConfigError(
            f"env_id = {env_id!r}: {suite.package} is not installed; "
            f"pip install 'purejaxppo[{suite.extra}]'"
        )
    reason = suite.unavailable.get(name)
    if reason is not None:
        raise ConfigError(f"env_id = {env_id!r}: {reason}; make it yourself and pass it as env")
    adapter = _adapter(prefix)
    if name not in adapter.names():
        known = [full for each in SUITES for full in suite_names(each)]
        near = nearest(env_id, known, 0.4)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(
            f"env_id = {env_id!r}: no such environment; {hint}`purejaxppo envs {prefix}/` "
            "lists them"
        )
    try:
        return adapter.make(name, params)._replace(name=env_id)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"env_id = {env_id!r}: cannot be made: {reason_of(error)}") from error


def _adapter(prefix: str) -> ModuleType:
    return importlib.import_module(f"purejaxppo.envs.{prefix}")
