"""What a run is in one process."""

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
    """Where training begins: at the beginning, or where a checkpoint was made."""

    position: Position
    states: TrainState | None = None
    """None starts from new ones."""
    metrics: HostMetrics | None = None
    """`[U, S]` of the updates done."""
    checkpoint: Checkpoint | None = None
    again: bool = False
    """Whether an earlier process has begun this run."""


class Session(NamedTuple):
    """One process's part of a run."""

    settings: Settings
    task: Task
    held: Held | None
    """The run directory, in the process that writes there."""
    directory: Path | None
    start: Start
    last: int
    """Updates to train up to."""
    progress: Progress


def cannot_log(directory: Path | None, error: OSError) -> StorageError:
    directory = directory or Path()
    return StorageError(
        f"{str(directory)!r}: metrics cannot be written: {error.strerror}; free space, then: "
        f"{resume_command(directory)}"
    )
