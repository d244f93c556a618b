"""Read and write the files of a sweep's directory: the plan, the waves and the results."""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.loggers import in_order
from purejaxppo.host.rundir import (
    BINARY_METRICS,
    CONFIG,
    SUMMARY,
    SWEEP,
    WAVES,
    DamagedError,
    Held,
    StorageError,
    holds,
    locked,
    resume_command,
    sealed,
    unsealed,
    write_whole,
)
from purejaxppo.host.summary import METRICS_DIGEST
from purejaxppo.sweeps.settings import Definition, SweepSettings, dump_definition
from purejaxppo.sweeps.strategies import Batch, Trial

PLAN, RESULTS, CURVES = "plan.json", "results.csv", "curves.npz"
WINNER, WINNER_JSON = "winner.toml", "winner.json"
FINISHED = "finished.json"
"""Digests of the derived files, written last."""


class PlannedWave(NamedTuple):
    """A wave as recorded in the plan."""

    numbers: list[int]
    """Numbers of its trials."""
    size: int
    """Number of trials, padding included."""
    first: int
    """Updates done before this wave."""
    last: int
    """Updates done at its end."""


class PlannedBatch(NamedTuple):
    """A batch as recorded in the plan."""

    batch: Batch
    waves: list[PlannedWave]


@contextmanager
def new_sweep(directory: Path, definition: Definition) -> Iterator[Held]:
    """Create a sweep's directory, hold its lock, and write the definition to it.

    Raises:
        ConfigError: if it already holds a sweep or a run, another process is writing there, or
            it cannot be written.
    """
    with locked(directory, make=True) as held:
        names = (SWEEP, PLAN, WAVES, CONFIG, RESULTS, CURVES, WINNER, WINNER_JSON, FINISHED)
        existing = [name for name in names if (directory / name).exists()]
        if existing:
            raise ConfigError(
                f"run_dir = {str(directory)!r}: already holds a run ({', '.join(existing)}); "
                f"choose another directory, or resume it: {resume_command(directory)}"
            )
        write(directory / SWEEP, dump_definition(definition))
        try:
            yield held
        except ConfigError:
            if not (directory / PLAN).exists():
                held.check()
                # otherwise the corrected command would be refused
                (directory / SWEEP).unlink(missing_ok=True)
            raise


@contextmanager
def existing_sweep(directory: Path) -> Iterator[Held]:
    """Hold the lock of a directory that holds a sweep.

    Raises:
        ConfigError: if it holds none, another process is writing there, or it cannot be written.
    """
    if not holds(directory, SWEEP):
        raise ConfigError(f"run_dir = {str(directory)!r}: holds no {SWEEP}; check the path")
    with locked(directory) as held:
        yield held


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically. Raises `StorageError` if it cannot be written."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise StorageError(
            f"{str(path)!r}: cannot be written: {error.strerror}; free space, then: "
            f"{resume_command(path.parent)}"
        ) from error


def write_plan(directory: Path, definition: Definition, batches: Sequence[PlannedBatch]) -> None:
    table = [
        {
            "share": planned.batch.share,
            "trials": [trial._asdict() for trial in planned.batch.trials],
            "waves": [wave._asdict() for wave in planned.waves],
        }
        for planned in batches
    ]
    content = {"definition": _digest(_machine_independent(definition).encode()), "batches": table}
    write(directory / PLAN, sealed(content))


def read_plan(directory: Path, definition: Definition) -> list[PlannedBatch]:
    """The batches planned so far; empty if there is no plan yet.

    Raises:
        ConfigError: if the file was changed or removed, or `sweep.toml` was changed since.
    """
    path = directory / PLAN
    if not path.exists():
        if (directory / WAVES).exists():
            raise ConfigError(
                f"{str(path)!r}: is missing, although waves were trained; restore a copy, or start "
                "a new sweep"
            )
        return []
    try:
        plan = unsealed(path)
        if plan["definition"] != _digest(_machine_independent(definition).encode()):
            raise ConfigError(
                f"{str(directory / SWEEP)!r}: was changed since the sweep began; undo the change, "
                "or start a new sweep (only machine settings, such as memory_gb, may change)"
            )
        return [
            PlannedBatch(
                Batch([_trial(t, definition) for t in entry["trials"]], float(entry["share"])),
                [PlannedWave(**wave) for wave in entry["waves"]],
            )
            for entry in plan["batches"]
        ]
    except (DamagedError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{str(path)!r}: is not a sweep plan: {error}; restore a copy, or start a new sweep"
        ) from error


def _machine_independent(definition: Definition) -> str:
    """The definition without the settings that depend on the machine."""
    machine = ("memory_gb", "engine", "wave_cpus", "wave_gpus", "wave_tpus")
    defaults = {name: getattr(SweepSettings(), name) for name in machine}
    sweep = dataclasses.replace(definition.sweep, **defaults)
    return dump_definition(dataclasses.replace(definition, sweep=sweep))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _trial(entry: dict[str, Any], definition: Definition) -> Trial:
    """A trial from the plan, with its values in the order of the search space."""
    values = {name: entry["values"][name] for name in definition.sweep.space.names}
    return Trial(
        int(entry["number"]), {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )


def make_waves_folder(directory: Path) -> None:
    """Create the folder of the waves. Raises `StorageError` if that fails."""
    path = directory / WAVES
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{str(path)!r}: cannot be created: {error.strerror}; free space, then: "
            f"{resume_command(directory)}"
        ) from error


def wave_directory(directory: Path, index: int) -> Path:
    return directory / WAVES / f"{index:04d}"


def finished_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished wave with intact metrics; None otherwise, in which case the wave is
    finished again from its checkpoint."""
    try:
        summary = unsealed(directory / SUMMARY)
        metrics_content(directory, summary)
    except (DamagedError, ConfigError):
        return None
    return summary


def metrics_content(directory: Path, summary: Mapping[str, Any]) -> bytes:
    """The metrics file of a finished wave. Raises `ConfigError` if it was changed."""
    path, reason = directory / BINARY_METRICS, "has changed since it was written"
    try:
        content = path.read_bytes()
        if _digest(content) == summary[METRICS_DIGEST]:
            return content
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    raise damaged_wave(directory, f"{path.name} {reason}")


def damaged_wave(directory: Path, reason: str) -> ConfigError:
    """The error for a damaged wave, including how to repair it."""
    sweep = directory.parent.parent
    return ConfigError(
        f"{str(directory)!r}: {reason}; restore a copy, or remove this folder to train the wave "
        f"again: {resume_command(sweep)}"
    )


def remove(path: Path) -> None:
    """Remove a file if it exists. Raises `StorageError` if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{str(path)!r}: cannot be removed: {error.strerror}") from error


def write_finished(directory: Path, written: Mapping[str, bytes]) -> None:
    """Mark the sweep as finished, with digests of the written files by name.

    Raises `StorageError` if the mark cannot be written.
    """
    digests = {name: _digest(content) for name, content in written.items()}
    write(directory / FINISHED, sealed(digests))


def finished_content(directory: Path, name: str) -> bytes | None:
    """Read a derived file of a finished sweep; None if the sweep did not write it.

    Raises:
        ConfigError: as `check_finished`, or if the file was changed.
    """
    check_finished(directory)
    remedy = f"to rebuild it: {resume_command(directory)}"
    try:
        wanted = unsealed(directory / FINISHED).get(name)
        if wanted is None:
            return None
        content = (directory / name).read_bytes()
    except DamagedError as error:
        raise ConfigError(f"run_dir = {str(directory)!r}: {error}; {remedy}") from error
    except OSError as error:
        raise ConfigError(
            f"{str(directory / name)!r}: cannot be read: {error.strerror}; {remedy}"
        ) from error
    if _digest(content) != wanted:
        raise ConfigError(f"{str(directory / name)!r}: has changed since it was written; {remedy}")
    return content


def read_winner(directory: Path) -> dict[str, Any] | None:
    """Read `winner.json` of a finished sweep; None if every trial failed.

    Raises:
        ConfigError: as `finished_content`.
    """
    content = finished_content(directory, WINNER_JSON)
    try:
        return None if content is None else json.loads(content)
    except ValueError as error:
        raise ConfigError(
            f"{str(directory / WINNER_JSON)!r}: is not valid JSON; to rebuild it: "
            f"{resume_command(directory)}"
        ) from error


def check_finished(directory: Path) -> None:
    """Raise `ConfigError` if the directory holds no finished sweep."""
    if not holds(directory, SWEEP):
        raise ConfigError(
            f"run_dir = {str(directory)!r}: no {SWEEP} found; give the directory of a sweep"
        )
    if not holds(directory, FINISHED):
        raise ConfigError(
            f"run_dir = {str(directory)!r}: the sweep is not finished; to resume: "
            f"{resume_command(directory)}"
        )


def results_text(rows: Sequence[dict[str, Any]]) -> str:
    """The content of `results.csv`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def curves_content(parts: Sequence[dict[str, np.ndarray]]) -> bytes:
    """The content of `curves.npz`: columns `trial`, `seed`, `update` and every metric, with one row
    per update of each run.

    Metrics are NaN for updates that were discarded because their loss was not finite, except for
    the first such update if it ends the seed's run.
    """
    out, first = io.BytesIO(), ("trial", "seed", "update")
    names = (*first, *in_order(name for part in parts for name in part if name not in first))
    columns: dict[str, Any] = {
        name: np.concatenate([p.get(name, np.full(len(p["trial"]), np.nan)) for p in parts])
        for name in names
    }
    np.savez_compressed(out, **columns)
    return out.getvalue()
