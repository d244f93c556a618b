"""Checkpoints in `checkpoints/<updates>/`: a `TrainState` written by orbax, and `manifest.json`.

A checkpoint is written under a temporary name and renamed once it is complete. The manifest holds
the host's position, the settings, the shape of each leaf and the SHA-256 digest of every file. A
folder that does not match its manifest is rejected. Nothing is ever unpickled.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.checks import reason_of
from purejaxppo.config import ConfigError
from purejaxppo.host.configfile import Settings, dump_settings, settings_from
from purejaxppo.host.processes import agree, is_first
from purejaxppo.host.rundir import (
    CHECKPOINTS,
    DamagedError,
    StorageError,
    sealed,
    sync,
    unsealed,
    write_whole,
)
from purejaxppo.types import TrainState

FORMAT = 1
_MANIFEST = "manifest.json"
UNFINISHED = ".saving"
_SETTLING_SECONDS = 0.5
"""Wait after a failed save, in which its other writes finish."""
_TRIES, _INTERRUPTED = 3, os.strerror(errno.EINTR)
"""A signal may interrupt a system call of orbax, which does not retry it."""


@dataclass(frozen=True)
class Position:
    """State of the host after `updates` updates."""

    updates: int
    metrics_bytes: int = 0
    """Length of `metrics.csv`."""
    metrics_digest: str = ""
    """SHA-256 of its first `metrics_bytes` bytes."""
    columns: tuple[str, ...] = ()
    """Names of the metrics, in column order."""
    run_seconds: float = 0.0
    failed: dict[int, int] = dataclasses.field(default_factory=dict)
    """Seeds whose loss became non-finite, and the update at which it did."""
    extended: tuple[tuple[int, int], ...] = ()
    """(updates done, new `total_timesteps`) for each resume that changed it."""
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each entry of the task's data."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of S seeds."""

    path: Path
    position: Position
    settings: Settings
    leaves: dict[str, str]
    """Type and shape of each leaf, by path."""
    eval_return: float | None
    """Mean return over the seeds that have not failed; None if not evaluated."""


def save(run_dir: Path, position: Position, settings: Settings, states: TrainState) -> Checkpoint:
    """Write a checkpoint of the states `[S, ...]` after `position.updates` updates, atomically.
    With several processes, all of them call this, each with its part of the states.

    Raises:
        StorageError: if it cannot be written; an earlier checkpoint of that update is kept.
    """
    path = (run_dir / CHECKPOINTS / f"{position.updates:09d}").absolute()
    unfinished = path.with_name(path.name + UNFINISHED)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "position": dataclasses.asdict(position),
        "settings": dump_settings(settings),
        "leaves": _leaves(states),
        "eval_return": None,
    }
    reason: str | None = None
    for _ in range(_TRIES):
        reason = _save_once(path, unfinished, manifest, states)
        if not agree(reason is not None and _INTERRUPTED in reason).any():
            break
    if reason is not None:
        for part in path.parent.glob(f"{unfinished.name}*") if is_first() else ():
            shutil.rmtree(part, ignore_errors=True)
        raise StorageError(f"checkpoint {str(path)!r}: cannot be written: {reason}")
    return checkpoint_of(path, manifest)


def _save_once(
    path: Path, unfinished: Path, manifest: dict[str, Any], states: TrainState
) -> str | None:
    """Return why the checkpoint could not be written; None if it was."""
    reason = None
    with _quiet():
        for step in (_make_room, _write_arrays, _complete):
            try:
                if reason is None:
                    step(path, unfinished, manifest, states)
            except Exception as error:  # orbax raises many exception types for a full disk
                reason = reason_of(error)
            if not agree(reason is None).all():  # in step with all other processes
                reason = reason or "another process could not write its part"
        if reason is not None:
            time.sleep(_SETTLING_SECONDS)
    return reason


def _make_room(path: Path, unfinished: Path, *_: Any) -> None:
    if is_first():
        path.parent.mkdir(exist_ok=True)
        remove(unfinished)


def _write_arrays(path: Path, unfinished: Path, manifest: Any, states: TrainState) -> None:
    from orbax.checkpoint import v1 as ocp  # slow to import

    # If a folder cannot be made in the background, orbax waits until a timeout.
    synchronous = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    with ocp.Context(async_options=synchronous):
        ocp.save(str(unfinished), _arrays(states))


def _complete(path: Path, unfinished: Path, manifest: dict[str, Any], states: TrainState) -> None:
    if not is_first():
        return
    manifest["files"] = _digests(unfinished)
    _write_manifest(unfinished, manifest)
    for part in (*unfinished.rglob("*"), unfinished):  # orbax syncs only some of them
        sync(part)
    if path.exists():  # a damaged one, or the same one saved again
        remove(path)
    unfinished.replace(path)
    sync(path.parent)
    sync(path.parent.parent)


def record_evaluation(checkpoint: Checkpoint, eval_return: float | None) -> None:
    """Write the mean return of an evaluation to the checkpoint's manifest."""
    manifest = json.loads((checkpoint.path / _MANIFEST).read_text(encoding="utf-8"))
    _write_manifest(checkpoint.path, manifest | {"eval_return": eval_return})


def read(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and verify every file against it.

    Raises:
        DamagedError: if a file is missing or changed, or the format is unknown.
    """
    manifest = manifest_of(path)
    checkpoint = checkpoint_of(path, manifest)
    try:
        found = _digests(path)
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror}") from error
    wanted = manifest.get("files")
    if not isinstance(wanted, dict):
        raise DamagedError(f"{_MANIFEST} is malformed")
    for name in sorted(wanted):
        if name not in found:
            raise DamagedError(f"the file {name} is missing")
        if wanted[name] != found[name]:
            raise DamagedError(f"the file {name} has changed since it was written")
    return checkpoint


def restore(checkpoint: Checkpoint, init: Any) -> TrainState:
    """Load the states `[S, ...]` onto the first device.

    Args:
        init: `() -> TrainState`, which gives their shapes.

    Raises:
        ConfigError: if the shapes differ from those of the checkpoint.
    """
    from orbax.checkpoint import v1 as ocp  # slow to import

    shapes = jax.eval_shape(init)
    _check_leaves(checkpoint, _leaves(shapes))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in _arrays(shapes).items()
    }
    try:
        with _quiet():
            arrays = ocp.load(str(checkpoint.path), template)
    except Exception as error:  # orbax raises many exception types for a foreign folder
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r}: cannot be read: {reason_of(error)}"
        ) from error
    leaves, structure = jax.tree.flatten(shapes)
    filled = [
        arrays[_name(i)] if x.size else jnp.zeros(x.shape, x.dtype) for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, filled)


def check_same_run(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raise `ConfigError` if a run with `settings` cannot resume from the checkpoint, naming each
    setting that differs. Length, evaluation and `HParams` may differ."""
    pairs = []
    held = checkpoint.settings.config
    if type(held) is not type(settings.config):
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r}: belongs to a different run: its config is a "
            f"{type(held).__name__}, not a {type(settings.config).__name__}"
        )
    for f in dataclasses.fields(settings.config):
        if f.name != "total_timesteps":
            pairs.append((f.name, held, settings.config))
    for name in ("seed", "num_seeds", "passed"):
        pairs.append((name, checkpoint.settings.run, settings.run))
    pairs.append(("trials", checkpoint.settings, settings))
    different = [
        f"{name} is {_brief(getattr(new, name))} and was {_brief(getattr(old, name))}"
        for name, old, new in pairs
        if getattr(old, name) != getattr(new, name)
    ]
    if different:
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r}: belongs to a different run: "
            f"{'; '.join(different)}; undo the change, or start a new run"
        )


def data_digests(data: Any) -> dict[str, str]:
    """SHA-256 of each entry of a task's data: shapes, types and values."""
    found = {}
    for name, tree in data.items() if isinstance(data, dict) else [("data", data)]:
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            values = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
            digest.update(values.tobytes())
        if jax.tree.leaves(tree):
            found[name] = digest.hexdigest()
    return found


def check_same_data(checkpoint: Checkpoint, data: dict[str, str]) -> None:
    """Raise `ConfigError` if the task's data differ from those that the checkpoint was trained
    with; checkpoints that do not state them fit all."""
    held = checkpoint.position.data
    different = sorted(name for name in held if held[name] != data.get(name))
    if different:
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r}: was trained with other data: "
            f"{', '.join(different)} changed since; restore them, or start a new run"
        )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({len(text)} characters)"


def _check_leaves(checkpoint: Checkpoint, wanted: dict[str, str]) -> None:
    held = checkpoint.leaves
    different = [
        f"{name} is {held.get(name, 'absent')} and should be {wanted.get(name, 'absent')}"
        for name in sorted(held.keys() | wanted.keys())
        if held.get(name) != wanted.get(name)
    ]
    if different:
        more = f", and {len(different) - 3} more" if len(different) > 3 else ""
        raise ConfigError(
            f"checkpoint {str(checkpoint.path)!r}: does not fit this environment and version: "
            f"{'; '.join(different[:3])}{more}"
        )


def _leaves(states: Any) -> dict[str, str]:
    paths = jax.tree_util.tree_flatten_with_path(states)[0]
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(np.shape(leaf))}" for path, leaf in paths
    }


def _arrays(states: Any) -> dict[str, Any]:
    """Number the leaves, since orbax confuses names that contain dots, and omit empty ones, which
    it does not store."""
    leaves = enumerate(jax.tree.leaves(states))
    return {_name(i): leaf for i, leaf in leaves if leaf.size}


def _name(index: int) -> str:
    return f"{index:05d}"


def _digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != _MANIFEST)
    found = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = digest
    return found


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / _MANIFEST, sealed(manifest))


def manifest_of(folder: Path) -> dict[str, Any]:
    """Read a manifest. Raises `DamagedError` if it is missing, changed, or in another format."""
    return unsealed(folder / _MANIFEST, version=FORMAT)


def checkpoint_of(path: Path, manifest: dict[str, Any]) -> Checkpoint:
    """Make a `Checkpoint` of a manifest. Raises `DamagedError` if it is malformed."""
    try:
        eval_return = manifest["eval_return"]
        return Checkpoint(
            path=path,
            position=_position(manifest["position"]),
            settings=settings_from(tomllib.loads(manifest["settings"])),
            leaves=dict(manifest["leaves"]),
            eval_return=None if eval_return is None else float(eval_return),
        )
    except (
        ConfigError, LookupError, TypeError, ValueError, AttributeError, OverflowError,
        RecursionError,
    ) as error:  # fmt: skip
        raise DamagedError(f"{_MANIFEST} is malformed: {error}") from error


def _position(table: dict[str, Any]) -> Position:
    position = Position(
        updates=int(table["updates"]),
        metrics_bytes=int(table["metrics_bytes"]),
        metrics_digest=str(table["metrics_digest"]),
        columns=tuple(map(str, table["columns"])),
        run_seconds=float(table["run_seconds"]),
        failed={int(seed): int(update) for seed, update in table["failed"].items()},
        extended=tuple((int(at), int(total)) for at, total in table["extended"]),
        data={str(name): str(digest) for name, digest in table.get("data", {}).items()},
    )
    if min(position.updates, position.metrics_bytes, position.run_seconds) < 0:
        raise ValueError("a negative position")
    return position


def remove(path: Path) -> None:
    """Rename, then remove, so that a partly removed folder is never taken for a checkpoint."""
    if not path.exists():
        return
    if not path.is_dir():
        path.unlink()
        return
    doomed = path.with_name(path.name.partition(UNFINISHED)[0] + UNFINISHED + ".old")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.replace(doomed)
    shutil.rmtree(doomed)


def remove_remains(run_dir: Path, update: int) -> None:
    """Remove what `save` made of a run directory that was removed while it wrote. Folders that hold
    anything else are left alone."""
    folder = run_dir / CHECKPOINTS
    for part in (folder / f"{update:09d}", *folder.glob(f"{update:09d}{UNFINISHED}*")):
        shutil.rmtree(part, ignore_errors=True)
    for made in (folder, run_dir):
        with suppress(OSError):
            made.rmdir()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax: it logs a traceback for each error that it raises, and after a failed write it
    closes the event loop that its other writes still need."""
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_closed_loops
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
