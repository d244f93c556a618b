"""The state of a run in one process."""

from pathlib import Path
from typing import NamedTuple

from purejaxppo.host.checkpoint import Checkpoint, Position
from purejaxppo.host.configfile import Settings
from purejaxppo.host.loggers import HostMetrics
from purejaxppo.host.progress import Progress
from purejaxppo.host.rundir import Held, StorageError, resume_command
from purejaxppo.task import Task
from purejaxppo.types import TrainState


class Start(NamedTuple):
    """Where training starts: at update 0, or at a checkpoint."""

    position: Position
    states: TrainState | None = None
    """The states to start from; None initialises new ones."""
    metrics: HostMetrics | None = None
    """Metrics `[U, S]` of the updates done."""
    checkpoint: Checkpoint | None = None
    resumed: bool = False
    """Whether an earlier process started this run."""


class Session(NamedTuple):
    """One process's part of a run."""

    settings: Settings
    task: Task
    held: Held | None
    """The locked run directory, in the process that writes to it."""
    directory: Path | None
    start: Start
    last: int
    """Update at which training ends."""
    progress: Progress
    data: dict[str, str]
    """SHA-256 of each entry of the task's data."""


def cannot_log(directory: Path | None, error: OSError) -> StorageError:
    """Make the error for metrics that cannot be written."""
    directory = directory or Path()
    return StorageError(
        f"{str(directory)!r}: metrics cannot be written: {error.strerror}; free space, then: "
        f"{resume_command(directory)}"
    )
