"""Read the results of a finished sweep."""

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.rundir import SWEEP, resume_command
from purejaxppo.sweeps import files
from purejaxppo.sweeps.files import wave_directory
from purejaxppo.sweeps.settings import Definition, load_definition
from purejaxppo.sweeps.space import parse_values


@dataclass(frozen=True)
class Results:
    """A finished sweep of K trials and S seeds, the best trial first."""

    definition: Definition
    numbers: list[int]
    """`[K]` trial numbers."""
    values: dict[str, list[Any]]
    """`[K]` values of each swept setting."""
    returns: np.ndarray
    """`[K, S]` selection returns, NaN for a seed that failed."""
    steps: np.ndarray
    """`[K]` environment steps per run."""
    curves: dict[str, np.ndarray]
    winner: dict[str, Any] | None
    """Content of `winner.json`; None if every trial failed."""
    curve: str
    """Name of the metric shown in the learning curves."""
    versions: dict[str, str]
    """Package versions with which the first wave was trained."""

    @property
    def scores(self) -> np.ndarray:
        """`[K]` selection returns: means over seeds."""
        return self.returns.mean(axis=1)

    @property
    def env_id(self) -> str:
        return self.definition.settings.config.label

    @property
    def num_seeds(self) -> int:
        return self.returns.shape[1]


def read_results(directory: Path) -> Results:
    """Read the results that `write_report` shows.

    Raises:
        ConfigError: if the directory holds no finished sweep, or its results were changed.
    """
    try:
        return _read(directory)
    except (ValueError, LookupError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"run_dir = {str(directory)!r}: the results cannot be read ({error}); to rebuild "
            f"them: {resume_command(directory)}"
        ) from error


def _read(directory: Path) -> Results:
    files.check_finished(directory)
    definition = load_definition(directory / SWEEP)
    names, seeds = definition.sweep.space.names, definition.settings.run.num_seeds
    table, columns = (files.finished_content(directory, n) for n in (files.RESULTS, files.CURVES))
    assert table is not None
    assert columns is not None
    rows = list(csv.DictReader(io.StringIO(table.decode())))
    returns = np.array([float(r["eval_return"] or "nan") for r in rows]).reshape(-1, seeds)
    steps = np.array([int(r["env_steps"]) for r in rows]).reshape(-1, seeds)[:, 0]
    score = np.where(np.isfinite(returns.mean(axis=1)), returns.mean(axis=1), -np.inf)
    order = np.lexsort((-score, -steps))
    firsts = [rows[i * seeds] for i in order]
    first = files.finished_summary(wave_directory(directory, 0)) or {}
    with np.load(io.BytesIO(columns), allow_pickle=False) as curves:
        return Results(
            definition=definition,
            numbers=[int(row["trial"]) for row in firsts],
            values={name: [parse_values(name, row[name])[0] for row in firsts] for name in names},
            returns=returns[order],
            steps=steps[order],
            curves=dict(curves),
            winner=files.read_winner(directory),
            curve=first.get("curve", "episode_return"),
            versions=first.get("versions", {}),
        )
