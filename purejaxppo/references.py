"""Python objects named `package.module:name` in config files and on the command line."""

import importlib
import sys
from pathlib import Path
from typing import Any

from purejaxppo.checks import ConfigError


def resolve(setting: str, reference: str) -> Any:
    """Import the object that a setting names. The current directory is searched too.

    Raises:
        ConfigError: if its module cannot be imported or has no such object.
    """
    module_name, _, path = reference.partition(":")
    if str(Path.cwd()) not in sys.path:  # not on the path of the console script
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module raises while it is imported
        raise ConfigError(
            f"{setting} = {reference!r}: module {module_name} cannot be imported: "
            f"{type(error).__name__}: {first_line(error)}; it is searched for in the "
            "current directory and PYTHONPATH"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigError(
                f"{setting} = {reference!r}: module {module_name} has no {path}; write "
                "package.module:name"
            )
        found = getattr(found, name)
    return found


def name_of(kind: type) -> str:
    """Return the name `package.module:name` of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def already_imported(setting: str, reference: str) -> Any:
    """Return the object that a saved setting names. Its module must already be imported, because
    reading a file must not import code.

    Raises:
        ConfigError: if the module is not imported or has no such object.
    """
    module_name, _, path = reference.partition(":")
    found: Any = sys.modules.get(module_name)
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None:
        raise ConfigError(
            f"{setting} = {reference!r}: is not defined; import module {module_name} first "
            "(reading a run imports no code)"
        )
    return found


def called(name: str, function: Any, *arguments: Any) -> Any:
    """Call a user's function. Raises `ConfigError` if the function raises."""
    if not callable(function):
        raise ConfigError(f"{name} is of type {type(function).__name__}: must be a function")
    try:
        return function(*arguments)
    except Exception as error:
        raise ConfigError(f"{name}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [""])[0]
