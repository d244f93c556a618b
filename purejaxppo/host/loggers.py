"""Loggers of metrics: CSV always, TensorBoard and Weights & Biases on request."""

import hashlib
import importlib.util
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.checkpoint import Position
from purejaxppo.host.configfile import Settings
from purejaxppo.host.rundir import BINARY_METRICS, METRICS, append

_FIRST = (
    "env_steps", "episode_return", "episode_length", "episodes", "policy_loss", "value_loss",
    "entropy", "approx_kl", "clip_fraction", "explained_variance", "grad_norm", "learning_rate",
)  # fmt: skip
"""Metrics listed first, in this order, if an update returns them."""
SECONDS = "seconds"
"""Column of `metrics.csv`: seconds of training until the row was written, resumes included."""
_COUNTS = ("env_steps", "episodes", SECONDS)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort metric names into the columns of a table."""
    names = set(names)
    return tuple(n for n in _FIRST if n in names) + tuple(sorted(names - set(_FIRST)))


HostMetrics = dict[str, np.ndarray]
"""Arrays `[u, S]` for u updates of S seeds."""


class Logger(Protocol):
    """Interface of the objects passed as `loggers`. They raise `OSError` if a write fails."""

    def write(self, update: int, metrics: dict[str, np.ndarray]) -> None:
        """Log the metrics `[S]` of one update; called once per update, in order. NaN for failed
        seeds."""
        ...

    def close(self) -> None:
        """Close the logger; called after the last `write`."""
        ...


class RowLogger(Protocol):
    """Interface of a logger that takes each row of metrics once, in order."""

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        """Write updates `first_update`, `first_update + 1`, ... of the seeds in `alive[u, S]`."""
        ...

    def close(self) -> None:
        """Close the logger; called after the last `write`."""
        ...


class UserLogger:
    """Adapts a `Logger` to the `RowLogger` interface."""

    def __init__(self, logger: Logger):
        self._logger = logger

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        for row, seeds in enumerate(alive):
            values = {name: np.where(seeds, x[row], np.nan) for name, x in metrics.items()}
            self._logger.write(first_update + row, values)

    def close(self) -> None:
        self._logger.close()


def _rows(
    first_update: int, metrics: HostMetrics, alive: np.ndarray
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (seed, update, metrics) for each row."""
    for row, seeds in enumerate(alive):
        for seed in np.flatnonzero(seeds):
            yield int(seed), first_update + row, {k: x[row, seed] for k, x in metrics.items()}


class AppendedLogger:
    """An append-only file, whose length and digest are recorded in checkpoints.

    Args:
        keep_bytes: number of bytes of an existing file to keep; the rest is dropped.
    """

    def __init__(self, path: Path, keep_bytes: int, header: bytes):
        self._digest, self._size = hashlib.sha256(), 0
        if keep_bytes:
            os.truncate(path, keep_bytes)
            self._count(path.read_bytes())
        self._file = path.open("ab" if keep_bytes else "wb", buffering=0)
        if not keep_bytes:
            self.append(header)

    def sync(self) -> tuple[int, str]:
        """Sync the file to disk; return its length in bytes and its SHA-256 digest."""
        os.fsync(self._file.fileno())
        return self._size, self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()

    def append(self, content: bytes) -> None:
        append(self._file, content)
        self._count(content)

    def _count(self, content: bytes) -> None:
        self._digest.update(content)
        self._size += len(content)


def _header(columns: Sequence[str]) -> str:
    return ",".join(["seed", "update", *columns, SECONDS]) + "\n"


class CsvLogger(AppendedLogger):
    """Writes `metrics.csv`, a row per seed and update. Each float reads back as the same 32-bit
    number; a mean over no episodes is `nan`."""

    def __init__(self, run_dir: Path, columns: Sequence[str], keep_bytes: int = 0):
        self._columns = (*columns, SECONDS)
        super().__init__(run_dir / METRICS, keep_bytes, _header(columns).encode())

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        lines = [
            ",".join([str(seed), str(update), *(str(values[k]) for k in self._columns)]) + "\n"
            for seed, update, values in _rows(first_update, metrics, alive)
        ]
        self.append("".join(lines).encode())


class BinaryLogger(AppendedLogger):
    """Writes `metrics.f32`, little-endian 32-bit floats `[U, S, column]`. For hundreds of runs,
    writing text would take longer than training them. NaN after a run has failed."""

    def __init__(self, run_dir: Path, columns: Sequence[str], keep_bytes: int = 0):
        self._columns = columns
        super().__init__(run_dir / BINARY_METRICS, keep_bytes, b"")

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        columns = np.stack([metrics[name] for name in self._columns], axis=-1)
        self.append(np.where(alive[..., None], columns, np.nan).astype("<f4").tobytes())


def binary_metrics(content: bytes, columns: Sequence[str], num_runs: int) -> HostMetrics:
    """Read the metrics `[U, S]` of a `BinaryLogger`. Raises `ConfigError` for incomplete rows."""
    if not columns or len(content) % (4 * num_runs * len(columns)):
        raise ConfigError(
            f"{BINARY_METRICS}: {len(content)} bytes are not complete rows of metrics"
        )
    table = np.frombuffer(content, "<f4").reshape(-1, num_runs, len(columns))
    return {name: table[..., i] for i, name in enumerate(columns)}


def read_metrics(run_dir: Path, position: Position, settings: Settings) -> HostMetrics:
    """Read the metrics `[U, S]` logged up to a position, NaN where a seed has none.

    Raises:
        ConfigError: if the file has changed up to that position.
    """
    path, columns = run_dir / (BINARY_METRICS if settings.trials else METRICS), position.columns
    try:
        with path.open("rb") as file:
            content = file.read(position.metrics_bytes)
    except OSError as error:
        raise _unusable(path, position, error.strerror) from error
    if len(content) < position.metrics_bytes:
        raise _unusable(
            path, position, f"only {len(content)} of {position.metrics_bytes} bytes are left"
        )
    if hashlib.sha256(content).hexdigest() != position.metrics_digest:
        raise _unusable(path, position, "it has changed since")
    if settings.trials:
        return binary_metrics(content, columns, settings.num_runs)
    if content and not content.startswith(_header(columns).encode()):
        raise _unusable(path, position, "its columns are from another version")
    shape = (position.updates, settings.num_runs)
    metrics = {
        name: np.full(shape, np.nan, float if name in _COUNTS else np.float32)
        for name in (*columns, SECONDS)
    }
    for line in content.decode().splitlines()[1:]:
        seed, update, *values = line.split(",")
        for name, value in zip(metrics, values, strict=True):
            metrics[name][int(update) - 1, int(seed)] = float(value)
    return metrics


def _unusable(path: Path, position: Position, reason: Any) -> ConfigError:
    remedy = "restore the file to resume, or load the checkpoint with purejaxppo.load"
    if path.name == BINARY_METRICS:
        remedy = f"restore the file, or remove {str(path.parent)!r} to train the wave again"
    return ConfigError(
        f"{str(path)!r}: does not hold the metrics up to the checkpoint after {position.updates} "
        f"updates: {reason}; {remedy}"
    )


class TensorBoardLogger:
    """Writes event files under `tensorboard/seed_<n>/`, by environment steps.

    The calling thread writes them: once the disk is full, tensorboardX's own thread would stop, its
    queue fill up, and the caller wait forever.

    Args:
        hide_after: in a resumed run, the step after which events of an earlier process are hidden.
    """

    def __init__(self, run_dir: Path, num_seeds: int, hide_after: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        events: Any = event_pb2  # its names are created on import
        self._event, self._scalar = events.Event, scalar
        self._writers = []
        for n in range(num_seeds):
            folder = run_dir / "tensorboard" / f"seed_{n}"
            folder.mkdir(parents=True, exist_ok=True)
            self._writers.append(EventsWriter(str(folder / "events")))
            if hide_after is not None:
                log = events.SessionLog(status=events.SessionLog.START)
                self._write(n, step=hide_after + 1, session_log=log)

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        for seed, update, values in _rows(first_update, metrics, alive):
            step = int(values.get("env_steps", update))
            for name, value in _finite(values).items():
                self._write(seed, step, summary=self._scalar(name, value))
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()

    def _write(self, seed: int, step: int, **content: Any) -> None:
        self._writers[seed].write_event(self._event(wall_time=time.time(), step=step, **content))


class WandbLogger:
    """Logs all seeds to one Weights & Biases run, which a resume continues; metrics are named
    `seed_<n>/<name>`. Set WANDB_MODE to `offline` to log without a network."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._run = wandb.init(
            project="purejaxppo", dir=str(run_dir), config=settings,
            id=id_file.read_text(encoding="utf-8"), resume="allow",
        )  # fmt: skip

    def write(self, first_update: int, metrics: HostMetrics, alive: np.ndarray) -> None:
        by_update: dict[int, dict[str, float]] = {}
        for seed, update, values in _rows(first_update, metrics, alive):
            row = by_update.setdefault(update, {"env_steps": int(values.get("env_steps", update))})
            row |= {f"seed_{seed}/{name}": value for name, value in _finite(values).items()}
        for update, row in by_update.items():
            self._run.log(row, step=update)

    def close(self) -> None:
        self._run.finish()


def _finite(values: dict[str, Any]) -> dict[str, float]:
    """Omit env_steps, which is the axis, and means over no episodes."""
    return {
        name: float(value)
        for name, value in values.items()
        if name != "env_steps" and np.isfinite(value)
    }


def require(extra: str, package: str) -> None:
    """Raise `ConfigError` if the package of an extra is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{extra} needs the package {package}; pip install 'purejaxppo[{extra}]'")


def close_all(loggers: Sequence[RowLogger]) -> None:
    """Close the loggers. Flushing fails if the disk is full, which `write` has already reported."""
    for logger in loggers:
        with suppress(OSError):
            logger.close()
