"""Where metrics go: CSV always, TensorBoard and Weights & Biases by choice."""

import csv
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from purejaxppo.config import ConfigError

COLUMNS = (
    "env_steps",
    "episode_return",
    "episode_length",
    "episodes",
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "explained_variance",
    "grad_norm",
    "learning_rate",
)

HostMetrics = dict[str, np.ndarray]
"""`[u, S]` for u updates of S seeds."""


class Logger(Protocol):
    """Takes each row of metrics once, in order."""

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        """Updates `first_update`, `first_update + 1`, ... where `alive[u, S]`."""
        ...

    def close(self) -> None:
        """Nothing is written after."""
        ...


def _rows(
    first_update: int, metrics: HostMetrics, alive: np.ndarray
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(seed, update, metrics) of each row."""
    for row, seeds in enumerate(alive):
        for seed in np.flatnonzero(seeds):
            yield int(seed), first_update + row, {k: metrics[k][row, seed] for k in COLUMNS}


class CsvLogger:
    """`metrics.csv`: a row per seed and update. Each float is written so that it reads back as
    the same 32-bit number; a mean over no episode is `nan`."""

    def __init__(self, run_dir: Path):
        self._file = (run_dir / "metrics.csv").open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(["seed", "update", *COLUMNS])

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        for seed, update, values in _rows(first_update, metrics, alive):
            self._writer.writerow([seed, update, *(str(values[name]) for name in COLUMNS)])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger:
    """Event files under `tensorboard/seed_<n>/`, by environment steps."""

    def __init__(self, run_dir: Path, num_seeds: int):
        from tensorboardX import SummaryWriter

        folder = run_dir / "tensorboard"
        self._writers = [SummaryWriter(str(folder / f"seed_{n}")) for n in range(num_seeds)]

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        for seed, _, values in _rows(first_update, metrics, alive):
            for name, value in _finite(values).items():
                self._writers[seed].add_scalar(name, value, int(values["env_steps"]))

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class WandbLogger:
    """One Weights & Biases run for all seeds, metrics as `seed_<n>/<name>`; set WANDB_MODE to
    `offline` to log without a network."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(project="purejaxppo", dir=str(run_dir), config=settings)

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        by_update: dict[int, dict[str, float]] = {}
        for seed, update, values in _rows(first_update, metrics, alive):
            row = by_update.setdefault(update, {"env_steps": int(values["env_steps"])})
            row |= {f"seed_{seed}/{name}": value for name, value in _finite(values).items()}
        for update, row in by_update.items():
            self._run.log(row, step=update)

    def close(self) -> None:
        self._run.finish()


def _finite(values: dict[str, Any]) -> dict[str, float]:
    """Without env_steps, the axis, and without means over no episode."""
    return {
        name: float(value)
        for name, value in values.items()
        if name != "env_steps" and np.isfinite(value)
    }


def require(extra: str, package: str) -> None:
    """Raise `ConfigError` if the package of an optional logger is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{extra} needs the package {package}; pip install 'purejaxppo[{extra}]'")


def close_all(loggers: Sequence[Logger]) -> None:
    for logger in loggers:
        logger.close()
