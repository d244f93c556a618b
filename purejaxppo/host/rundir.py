"""The run directory: locking it, and writing files atomically."""

import fcntl
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from purejaxppo.config import ConfigError
from purejaxppo.host.configfile import Settings, dump_settings

CONFIG, METRICS, SUMMARY, CURVE = "config.toml", "metrics.csv", "summary.json", "learning_curve.png"
CHECKPOINTS, EVALUATIONS = "checkpoints", "eval.csv"
SAMPLES, REPORT = "samples.jsonl", "report.html"
BINARY_METRICS = "metrics.f32"
REFRESH = "refresh.json"
SWEEP, WAVES = "sweep.toml", "waves"
LOCK = ".lock"
_RUN_FILES = (
    CONFIG, METRICS, BINARY_METRICS, EVALUATIONS, SUMMARY, CURVE, CHECKPOINTS, SAMPLES, REPORT,
    "tensorboard",
)  # fmt: skip


_DIGEST = "digest"
MAX_BYTES = 64 * 2**20
"""Size limit of a file that is read into memory."""


class DamagedError(Exception):
    """A file has changed since it was written; the message says how."""


class StorageError(Exception):
    """Something could not be written; the message says what, why, and how to continue."""


class GoneError(StorageError):
    """The run directory was removed or renamed, so nothing more is written."""


class LostError(Exception):
    """Machines were lost too often; the message says which, and how to continue."""


class BusyError(ConfigError):
    """Another process writes to the directory."""


class Held(NamedTuple):
    """A directory locked by this process."""

    directory: Path
    handle: int
    """File descriptor of the directory, valid even if it is renamed."""

    def check(self) -> None:
        """Raise `GoneError` if the directory was removed or renamed."""
        with suppress(OSError):
            if os.path.samestat(self.directory.stat(), os.fstat(self.handle)):
                return
        raise GoneError(
            f"run_dir = {str(self.directory)!r}: was removed or renamed while the run was writing "
            "to it, so the run stops; if it was renamed, resume it under its new name: "
            "purejaxppo resume NEW_NAME"
        )


@contextmanager
def new_run(directory: Path, settings: Settings) -> Iterator[Held]:
    """Make a run directory, lock it, and write the settings there. If the block raises
    `ConfigError` before the first update, the files are removed, so that the corrected command can
    use the directory.

    Raises:
        ConfigError: if it already holds a run, is locked by another process, or cannot be
            written.
    """
    with locked(directory, make=True) as held:
        existing = [name for name in _RUN_FILES if (directory / name).exists()]
        if existing:
            raise ConfigError(
                f"run_dir = {str(directory)!r}: already holds a run ({', '.join(existing)}); "
                f"choose another directory, or resume it: {resume_command(directory)}"
            )
        write_settings(held, settings)
        with suppress(OSError):
            sync(held.directory.parent)
        try:
            yield held
        except ConfigError:
            if not (directory / CHECKPOINTS).exists() and not _has_updates(directory):
                held.check()
                _remove_run(directory)
            raise


def _has_updates(directory: Path) -> bool:
    with suppress(OSError):
        return (directory / METRICS).read_bytes().count(b"\n") > 1
    return holds(directory, BINARY_METRICS) and (directory / BINARY_METRICS).stat().st_size > 0


def _remove_run(directory: Path) -> None:
    for name in _RUN_FILES:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def old_run(directory: Path) -> Iterator[Held]:
    """Lock the directory of an existing run.

    Raises:
        ConfigError: if it holds no run, is locked by another process, or cannot be written.
    """
    try:
        exists = (directory / CONFIG).is_file()
    except OSError as error:
        raise _cannot_write(directory, error) from error
    if not exists:
        raise ConfigError(
            f"run_dir = {str(directory)!r}: no {CONFIG} found, so there is no run to resume; check "
            "the path, or start a run with `purejaxppo train`"
        )
    with locked(directory) as held:
        yield held


def write_settings(held: Held, settings: Settings) -> None:
    """Write `config.toml`.

    Raises:
        ConfigError: if the directory cannot be written.
        GoneError: if it was removed or renamed.
    """
    held.check()
    try:
        write_whole(held.directory / CONFIG, dump_settings(settings))
    except OSError as error:
        raise _cannot_write(held.directory, error) from error


def write_whole(path: Path, content: str | bytes | bytearray) -> None:
    """Write a file atomically, so that after a crash it has either its old or its new content."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_output(path: Path, content: str | bytes | bytearray) -> None:
    """Write a file that the user named; see `write_whole`.

    Raises:
        StorageError: if it cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise StorageError(f"file {str(path)!r}: cannot be written: {error.strerror}") from error


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk, so that it survives a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sealed(content: Mapping[str, Any]) -> str:
    """Format JSON with its own SHA-256 digest; equal content gives equal text."""
    table = {key: value for key, value in content.items() if key != _DIGEST}
    table = json.loads(json.dumps(table))  # string keys, since "10" sorts before "2"
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    return json.dumps(table | {_DIGEST: digest}, indent=1, sort_keys=True)


def unsealed(path: Path, version: int | None = None) -> dict[str, Any]:
    """Read a file written by `sealed`, and verify and remove its digest.

    Args:
        version: the required `format` of the content; None accepts any.

    Raises:
        DamagedError: if the file cannot be read, has changed, or has another format.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DamagedError(f"{path.name} has more than {MAX_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        same = isinstance(content, dict) and text == sealed(content)
        if version is not None and isinstance(content, dict) and content.get("format") != version:
            raise DamagedError(
                f"has format {content.get('format')!r}, but this version of purejaxppo reads "
                f"format {version}"
            )
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path.name} is not JSON") from error
    if not same:
        raise DamagedError(f"{path.name} has changed since it was written")
    content.pop(_DIGEST)
    return content


def append(file: io.FileIO, content: bytes) -> None:
    """Write all of `content`, since a nearly full disk may take only part of it per call."""
    left = content
    while left:
        left = left[file.write(left) :]


def holds(directory: Path, name: str) -> bool:
    """Whether a directory has a file of that name; False also if there is no such directory, or
    its name is invalid."""
    try:
        return (directory / name).is_file()
    except OSError:
        return False


def resume_command(directory: Path) -> str:
    """The command that resumes a run, or the sweep that it is a wave of."""
    if directory.parent.name == WAVES and (directory.parent.parent / SWEEP).is_file():
        directory = directory.parent.parent
    return f"purejaxppo resume {shlex.quote(str(directory))}"


@contextmanager
def locked(directory: Path, *, make: bool = False) -> Iterator[Held]:
    """Lock a directory until the block, or the process, ends.

    Both the directory and its `.lock` are locked, so deleting `.lock` does not release it.

    Raises:
        BusyError: if another process has locked it.
        ConfigError: if the directory cannot be written.
        GoneError: if it was removed or renamed meanwhile.
    """
    directory = directory.absolute()
    with ExitStack() as stack:
        try:
            str(directory).encode()
            if make:
                directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((directory / LOCK).open("a+b", buffering=0))
            handle = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, handle)
        except OSError as error:
            raise _cannot_write(directory, error) from error
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"run_dir = {str(directory)!r}: the name is not valid UTF-8; choose another"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock_directory(handle)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            raise BusyError(
                f"run_dir = {str(directory)!r}: is in use by {owner}; wait for it, stop it, or "
                "choose another directory"
            ) from error
        except OSError as error:
            raise _cannot_write(directory, error) from error
        held = Held(directory, handle)
        held.check()
        yield held


def _lock_directory(handle: int) -> None:
    """Lock a directory; does nothing on network file systems, which lock only files. Raises
    `BlockingIOError` if another process has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return


def _cannot_write(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run_dir = {str(directory)!r}: cannot be written: {error.strerror}; choose another, or "
        "check its permissions and free space"
    )
