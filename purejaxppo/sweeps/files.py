"""A sweep's directory: what was planned, what came of it."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.loggers import COLUMNS
from purejaxppo.host.rundir import (
    BINARY_METRICS,
    CONFIG,
    SUMMARY,
    SWEEP,
    WAVES,
    StorageError,
    holds,
    locked,
    resume_command,
    write_whole,
)
from purejaxppo.sweeps.settings import Definition, dump_definition
from purejaxppo.sweeps.strategies import Batch, Trial

PLAN, RESULTS, CURVES = "plan.json", "results.csv", "curves.npz"
WINNER, WINNER_JSON = "winner.toml", "winner.json"


class PlannedWave(NamedTuple):
    """A wave as the plan has it."""

    numbers: list[int]
    """Of its trials."""
    size: int
    """Trials it is filled up to."""
    first: int
    """Updates done before."""
    last: int


class PlannedBatch(NamedTuple):
    batch: Batch
    waves: list[PlannedWave]


@contextmanager
def new_sweep(directory: Path, definition: Definition) -> Iterator[Path]:
    """Make a sweep's directory, hold its lock, and write the definition there.

    Raises:
        ConfigError: if it already holds a sweep or a run, another process writes there, or it
            cannot be written.
    """
    with locked(directory, make=True):
        held = [n for n in (SWEEP, PLAN, WAVES, CONFIG) if (directory / n).exists()]
        if held:
            raise ConfigError(
                f"run_dir = {str(directory)!r}: already holds a run ({', '.join(held)}); go on "
                "with it by `purejaxppo resume`, or choose another directory"
            )
        write(directory / SWEEP, dump_definition(definition))
        try:
            yield directory
        except ConfigError:
            if not (directory / PLAN).exists():
                (directory / SWEEP).unlink()  # or the corrected command would be refused
            raise


@contextmanager
def old_sweep(directory: Path) -> Iterator[Path]:
    """Hold the lock of a directory that holds a sweep.

    Raises:
        ConfigError: if it holds none, another process writes there, or it cannot be written.
    """
    if not holds(directory, SWEEP):
        raise ConfigError(f"run_dir = {str(directory)!r}: holds no {SWEEP}; check the path")
    with locked(directory):
        yield directory


def write(path: Path, content: str | bytes) -> None:
    """Raises `StorageError` if it cannot be written."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise StorageError(
            f"{str(path)!r}: cannot be written: {error.strerror}; free space, then: "
            f"{resume_command(path.parent)}"
        ) from error


def write_plan(directory: Path, batches: Sequence[PlannedBatch]) -> None:
    table = [
        {
            "share": planned.batch.share,
            "trials": [trial._asdict() for trial in planned.batch.trials],
            "waves": [wave._asdict() for wave in planned.waves],
        }
        for planned in batches
    ]
    write(directory / PLAN, json.dumps(table, indent=1) + "\n")


def read_plan(directory: Path) -> list[PlannedBatch]:
    """What was planned so far; nothing if the sweep had not come to that.

    Raises:
        ConfigError: if the file is not what `write_plan` writes.
    """
    path = directory / PLAN
    if not path.exists():
        return []
    try:
        return [
            PlannedBatch(
                Batch([_trial(t) for t in entry["trials"]], float(entry["share"])),
                [PlannedWave(**wave) for wave in entry["waves"]],
            )
            for entry in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"{str(path)!r}: is no plan of a sweep: {error}") from error


def _trial(entry: dict[str, Any]) -> Trial:
    values = entry["values"]
    return Trial(
        int(entry["number"]), {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )


def wave_directory(directory: Path, index: int) -> Path:
    return directory / WAVES / f"{index:04d}"


def wave_outcome(directory: Path) -> dict[str, Any] | None:
    """The summary of a wave that is finished."""
    path = directory / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_winner(directory: Path) -> dict[str, Any] | None:
    """`winner.json` of a finished sweep; None if every trial failed."""
    path = directory / WINNER_JSON
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_finished(directory: Path) -> None:
    """Raise `ConfigError` if the directory holds no sweep, or one that is not finished."""
    if not holds(directory, SWEEP):
        raise ConfigError(
            f"run_dir = {str(directory)!r}: no {SWEEP} found; give a sweep's directory"
        )
    if not holds(directory, CURVES):
        raise ConfigError(
            f"run_dir = {str(directory)!r}: the sweep is not finished; to resume: "
            f"{resume_command(directory)}"
        )


def binary_content(directory: Path) -> bytes:
    return (directory / BINARY_METRICS).read_bytes()


def results_text(rows: Sequence[dict[str, Any]]) -> str:
    """`results.csv`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_curves(path: Path, parts: Sequence[dict[str, np.ndarray]]) -> None:
    """`curves.npz`: a column each of `trial`, `seed`, `update` and every metric, a row for each
    update of each training.

    Raises:
        StorageError: if it cannot be written.
    """
    out = io.BytesIO()
    names = ("trial", "seed", "update", *COLUMNS)
    columns: dict[str, Any] = {name: np.concatenate([p[name] for p in parts]) for name in names}
    np.savez_compressed(out, **columns)
    write(path, out.getvalue())
