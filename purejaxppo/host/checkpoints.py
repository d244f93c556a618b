"""The checkpoints of a run: finds the newest and the best, and removes old ones."""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from purejaxppo.config import ConfigError
from purejaxppo.host.checkpoint import (
    UNFINISHED,
    Checkpoint,
    check_same_run,
    checkpoint_of,
    manifest_of,
    read,
    remove,
)
from purejaxppo.host.configfile import Settings
from purejaxppo.host.rundir import CHECKPOINTS, DamagedError


def prune(run_dir: Path, newest: int, keep: int) -> None:
    """Remove the checkpoints up to update `newest`, except the last `keep` and the best intact
    one."""
    folders = [p for p in _folders(run_dir) if int(p.name) <= newest]
    known = {c.path: c for c in _by_manifest(folders)}
    last = known.get(run_dir / CHECKPOINTS / f"{newest:09d}")
    own = [c for c in known.values() if last is None or _is_same_run(c, last.settings)]
    best = next((c for c in _by_return(own) if _is_intact(c)), None)
    kept = {*list(known)[-keep:], *([] if best is None else [best.path])}
    kept |= {folder for folder in folders if int(folder.name) == newest}
    for folder in folders:
        if folder not in kept:
            _remove_unless_pinned(folder)
    for part in unfinished(run_dir):
        remove(part)


def find(
    run_dir: Path,
    which: str | int = "newest",
    check: Callable[[Checkpoint], Any] | None = None,
) -> tuple[Checkpoint, list[str]]:
    """Find the newest complete checkpoint, the best by evaluation, or that of a given update.
    Checkpoints that a running process removes meanwhile are ignored.

    Args:
        check: raises `ConfigError` for a checkpoint that should be skipped.

    Returns:
        the checkpoint, and a message for each one that was skipped.

    Raises:
        ConfigError: if there is none. If `check` rejected all, its first error.
    """
    if which not in ("newest", "best") and (type(which) is not int or which < 0):
        raise ConfigError(f"checkpoint {which!r}: must be newest, best, or a number of updates")
    folders = _folders(run_dir)
    existing = ", ".join(str(int(p.name)) for p in folders) or "none"
    if which == "best":
        wanted = [c.path for c in _by_return(_by_manifest(folders))]
    else:
        wanted = [p for p in reversed(folders) if which in ("newest", int(p.name))]
    skipped, refused = [f"{p}: an unfinished save" for p in unfinished(run_dir)], None
    for folder in wanted:
        with pinned(folder) as exists:
            try:
                found = read(folder)
                if check is not None:
                    check(found)
                return found, skipped
            except DamagedError as error:
                skipped += [f"{folder}: {error}"] if exists else []
            except ConfigError as error:
                skipped.append(str(error))
                refused = refused or error
    if _folders(run_dir) != folders:
        return find(run_dir, which, check)
    if refused is not None:
        raise refused
    kind = "evaluated" if which == "best" else "complete"
    after = "" if which in ("newest", "best") else f" after {which} updates"
    named = "".join(f"\n  {line}" for line in skipped)
    raise ConfigError(
        f"no {kind} checkpoint{after} found in {str(run_dir)!r} (existing: {existing}){named}"
    )


@contextmanager
def pinned(folder: Path) -> Iterator[bool]:
    """Keep a running process from removing this checkpoint; yields False if it is already gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    except OSError:  # reading it reports the reason
        yield True
        return
    try:
        with suppress(OSError):  # network file systems lock files only
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield _is_still(folder, handle)
    finally:
        os.close(handle)


def _is_still(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except OSError:
        return False


def has_any(run_dir: Path) -> bool:
    """Whether the directory has any completed checkpoint, even if it is now damaged."""
    return bool(_folders(run_dir))


def ranked_by_return(run_dir: Path) -> list[Checkpoint]:
    """The evaluated checkpoints according to their manifests, best first; ties: later first."""
    return _by_return(_by_manifest(_folders(run_dir)))


def _is_same_run(checkpoint: Checkpoint, settings: Settings) -> bool:
    try:
        check_same_run(checkpoint, settings)
    except ConfigError:
        return False
    return True


def _is_intact(checkpoint: Checkpoint) -> bool:
    try:
        read(checkpoint.path)
    except DamagedError:
        return False
    return True


def unfinished(run_dir: Path) -> list[Path]:
    """Folders left behind by interrupted saves."""
    return [p for p in _entries(run_dir) if UNFINISHED in p.name]


def _folders(run_dir: Path) -> list[Path]:
    """Folders of completed checkpoints, oldest first, even if now damaged."""
    found = [p for p in _entries(run_dir) if p.name.isascii() and p.name.isdecimal()]
    return sorted(found, key=lambda p: int(p.name))


def _entries(run_dir: Path) -> list[Path]:
    try:
        return sorted((run_dir / CHECKPOINTS).absolute().iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"run directory {str(run_dir)!r}: its {CHECKPOINTS}/ cannot be read: {error.strerror}"
        ) from error


def _by_manifest(folders: list[Path]) -> list[Checkpoint]:
    """The checkpoints with an intact manifest. Their other files are not checked."""
    found = []
    for folder in folders:
        with suppress(DamagedError):
            found.append(checkpoint_of(folder, manifest_of(folder)))
    return found


def _by_return(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The evaluated checkpoints, best first; ties: later first."""
    evaluated = [c for c in checkpoints if c.eval_return is not None]
    return sorted(evaluated, key=lambda c: (c.eval_return, c.position.updates), reverse=True)


def _remove_unless_pinned(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        if _lock_unless_pinned(handle):
            remove(folder)
    finally:
        os.close(handle)


def _lock_unless_pinned(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # network file systems lock files only
        return True
    return True
