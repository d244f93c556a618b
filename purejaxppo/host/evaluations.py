"""`eval.csv`: the returns of every evaluation of a run."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.checkpoint import Position
from purejaxppo.host.rundir import (
    EVALUATIONS,
    StorageError,
    append,
    resume_command,
    sync,
    write_whole,
)
from purejaxppo.host.stats import episode_mean

COLUMNS = (
    "seed", "update", "env_steps", "seconds", "actions", "return_mean", "return_std", "episodes"
)  # fmt: skip
SAMPLED, DETERMINISTIC = "sampled", "deterministic"


class EvalLog:
    """Appends to `eval.csv`: a row per seed, evaluation and kind of actions.

    Args:
        batch_size: environment steps per update.
        after: the update from which training continues; later rows are dropped.
        evaluated: whether the rows of update `after` itself are complete.

    Raises:
        ConfigError: if the file was changed.
        StorageError: if rows cannot be dropped.
    """

    def __init__(self, run_dir: Path, batch_size: int, after: int = 0, evaluated: bool = False):
        self._path, self._batch_size = run_dir / EVALUATIONS, batch_size
        self._last = after if evaluated else after - 1
        if self._path.exists():
            kept = [row for row in _rows(self._path) if int(row["update"]) <= self._last]
            try:
                write_whole(self._path, _text([row.values() for row in kept], header=True))
            except OSError as error:
                raise StorageError(
                    f"{str(self._path)!r}: cannot be written: {error.strerror}; free space, then: "
                    f"{resume_command(run_dir)}"
                ) from error

    def add(self, position: Position, returns: Mapping[str, np.ndarray]) -> None:
        """Append an evaluation; does nothing if the file already has rows of that update.

        Args:
            returns: `[S, E]` for each kind of actions, NaN for episodes that did not end.

        Raises:
            OSError: if it cannot be written; the file is left unchanged.
        """
        if position.updates <= self._last:
            return
        rows = [
            (seed, position.updates, position.updates * self._batch_size,
             round(position.run_seconds, 3), actions, *_moments(values[seed]))
            for actions, values in returns.items()
            for seed in range(len(values))
            if seed not in position.failed
        ]  # fmt: skip
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                append(file, _text(rows, header=size == 0).encode())
                os.fsync(file.fileno())
                if size == 0:
                    sync(self._path.parent)
            except OSError:
                file.truncate(size)
                raise
        self._last = position.updates


def _moments(returns: np.ndarray) -> tuple[float, float, int]:
    """Mean, standard deviation and number of the episodes that ended."""
    ended = returns[np.isfinite(returns)]
    return (float(ended.mean()), float(ended.std()), ended.size) if ended.size else (nan, nan, 0)


def evaluation_curve(run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read environment steps `[P]` and mean return over seeds `[P]` of the evaluations with sampled
    actions; empty if there are none."""
    path, points = run_dir / EVALUATIONS, {}
    for row in _rows(path) if path.exists() else ():
        if row["actions"] == SAMPLED:
            points.setdefault(int(row["env_steps"]), []).append(float(row["return_mean"]))
    steps = sorted(points)
    return np.asarray(steps), np.asarray([episode_mean(np.asarray(points[s])) for s in steps])


def _rows(path: Path) -> list[dict[str, str]]:
    """Read the complete rows, without a last one that a kill cut short.

    Raises:
        ConfigError: if the file was changed.
    """
    remedy = "restore a copy, or delete the file, which loses the evaluations so far"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        if _text([], header=True).startswith(text):  # or a part of the header
            return []
        header, *rows = csv.reader(io.StringIO(text))
        if tuple(header) != COLUMNS:
            raise ValueError("its header is wrong")
        if rows and len(rows[-1]) < len(COLUMNS):
            rows.pop()
        found: list[dict[str, str]] = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        for row in found:
            for name, kind in (("update", int), ("env_steps", int), ("return_mean", float)):
                kind(row[name])
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{str(path)!r}: was changed: {error}; {remedy}") from error
    return found


def _text(rows: Iterable[Iterable[Any]], header: bool) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(COLUMNS)
    writer.writerows(rows)
    return out.getvalue()
