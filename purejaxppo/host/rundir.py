"""The run directory: who may write there, and files that are whole or not there at all."""

import fcntl
import io
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from purejaxppo.config import ConfigError
from purejaxppo.host.configfile import Settings, dump_settings

CONFIG, METRICS, SUMMARY, CURVE = "config.toml", "metrics.csv", "summary.json", "learning_curve.png"
CHECKPOINTS, EVALUATIONS = "checkpoints", "eval.csv"
BINARY_METRICS = "metrics.f32"
SWEEP, WAVES = "sweep.toml", "waves"
LOCK = ".lock"
_RUN_FILES = (
    CONFIG, METRICS, BINARY_METRICS, EVALUATIONS, SUMMARY, CURVE, CHECKPOINTS, "tensorboard"
)  # fmt: skip


class RunWarning(RuntimeWarning):
    """Something went wrong that a run survives."""


class StorageError(Exception):
    """Something could not be written: the message says what, why, and how to go on."""


class LostError(Exception):
    """Machines were lost too often: the message says which, and how to go on."""


class BusyError(ConfigError):
    """Another process writes there."""


@contextmanager
def new_run(directory: Path, settings: Settings) -> Iterator[Path]:
    """Make a run directory, hold its lock, and write the settings there.

    Raises:
        ConfigError: if it already holds a run, another process writes there, or it cannot be
            written.
    """
    with locked(directory, make=True):
        held = [name for name in _RUN_FILES if (directory / name).exists()]
        if held:
            raise ConfigError(
                f"run_dir = {str(directory)!r}: already holds a run ({', '.join(held)}); go on "
                "with it by `purejaxppo resume`, or choose another directory"
            )
        write_settings(directory, settings)
        yield directory


@contextmanager
def old_run(directory: Path) -> Iterator[Path]:
    """Hold the lock of a directory that holds a run.

    Raises:
        ConfigError: if it holds none, another process writes there, or it cannot be written.
    """
    try:
        there = (directory / CONFIG).is_file()
    except OSError as error:
        raise _cannot_write(directory, error) from error
    if not there:
        raise ConfigError(
            f"run_dir = {str(directory)!r}: holds no {CONFIG}, so no run to go on with; check the "
            "path, or begin one by `purejaxppo train`"
        )
    with locked(directory):
        yield directory


def write_settings(directory: Path, settings: Settings) -> None:
    """Raises `ConfigError` if the directory cannot be written."""
    try:
        write_whole(directory / CONFIG, dump_settings(settings))
    except OSError as error:
        raise _cannot_write(directory, error) from error


def write_whole(path: Path, content: str | bytes | bytearray) -> None:
    """Write a file such that a reader, or a crash, finds the old one or the new, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def append(file: io.FileIO, content: bytes) -> None:
    """Write all of `content`: a disk that is nearly full may take only a part at a time."""
    left = content
    while left:
        left = left[file.write(left) :]


def holds(directory: Path, name: str) -> bool:
    """Whether a directory has a file of that name; also where there is no such directory, or none
    could be called that."""
    try:
        return (directory / name).is_file()
    except OSError:
        return False


def resume_command(directory: Path) -> str:
    """What a person types to go on with a run, or with the sweep that it is a wave of."""
    if directory.parent.name == WAVES and (directory.parent.parent / SWEEP).is_file():
        directory = directory.parent.parent
    return f"purejaxppo resume {shlex.quote(str(directory))}"


@contextmanager
def locked(directory: Path, *, make: bool = False) -> Iterator[None]:
    """Held until the block, or the process, ends; the file stays, and means nothing by itself.

    Raises:
        BusyError: if another process holds it.
        ConfigError: if the directory cannot be written.
    """
    try:
        if make:
            directory.mkdir(parents=True, exist_ok=True)
        str(directory.absolute()).encode()
        file = (directory / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise _cannot_write(directory, error) from error
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"run_dir = {str(directory)!r}: is not written in UTF-8; choose another name"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            raise BusyError(
                f"run_dir = {str(directory)!r}: {owner} is writing there; wait for it, stop it, or "
                "choose another directory"
            ) from error
        except OSError as error:
            raise _cannot_write(directory, error) from error
        yield


def _cannot_write(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run_dir = {str(directory)!r}: cannot be written: {error.strerror}; choose another, or "
        "see to its permissions and free space"
    )
