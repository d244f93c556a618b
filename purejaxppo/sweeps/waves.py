"""Train the waves of a sweep in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from purejaxppo.config import ConfigError
from purejaxppo.host import checkpoints
from purejaxppo.host.checkpoint import Checkpoint
from purejaxppo.host.load import restore_states
from purejaxppo.host.population import Member, member_learner, without_members
from purejaxppo.host.run import Leg, run_wave
from purejaxppo.host.rundir import BINARY_METRICS, SUMMARY
from purejaxppo.sweeps.files import (
    PlannedWave,
    damaged_wave,
    finished_summary,
    make_waves_folder,
    wave_directory,
)
from purejaxppo.sweeps.plan import Group, Programs, Wave
from purejaxppo.sweeps.progress import SweepProgress
from purejaxppo.sweeps.settings import Definition
from purejaxppo.task import Task
from purejaxppo.types import TrainState


class Work(NamedTuple):
    """A sweep's definition, its task and the directory it writes to."""

    definition: Definition
    directory: Path | None
    task: Task


@dataclass(frozen=True)
class Job:
    """A wave to train."""

    index: int
    planned: PlannedWave
    wave: Wave
    before: dict[int, tuple[Wave, int]]
    """For each trial that was trained already, the wave that trained it last, and that wave's
    index."""


def wave_states(work: Work, index: int) -> tuple[Checkpoint, TrainState]:
    """The last checkpoint of a finished wave and its states `[trials * S, ...]`.

    The states of a population contain `Member`s.

    Raises:
        ConfigError: if the last checkpoint is damaged; an older one would give other results.
    """
    assert work.directory is not None
    wave = wave_directory(work.directory, index)
    summary = finished_summary(wave)
    if summary is None:
        raise damaged_wave(wave, f"{SUMMARY} or {BINARY_METRICS} is missing or was changed")

    def check(found: Checkpoint) -> None:
        trained = found.position.updates * found.settings.config.batch_size
        if trained != summary["env_steps"]:
            raise ConfigError(
                f"checkpoint {str(found.path)!r} is after {trained} environment steps, but the "
                f"wave ended after {summary['env_steps']}"
            )

    try:
        found, _ = checkpoints.find(wave, check=check)
    except ConfigError as error:
        raise damaged_wave(wave, str(error)) from error
    task = work.task.with_config(found.settings.config)
    learner = task.learner(None)
    if work.definition.sweep.strategy == "pbt":
        learner = member_learner(learner, task.rank)
    return found, restore_states(found, learner, task)


def trial_rows(states: TrainState, position: int, num_seeds: int) -> TrainState:
    """States `[S, ...]` of the trial at a position within a wave, without `Member`s."""
    rows = jax.tree.map(lambda x: x[position * num_seeds : (position + 1) * num_seeds], states)
    return without_members(rows) if isinstance(rows.learner, Member) else rows


class Workers(Protocol):
    """Trains waves, in this process or elsewhere."""

    def split(self, group: Group) -> tuple[list[Wave], int]:
        """Split a group into waves; also return the bytes that one needs on each device.

        Raises:
            ConfigError: if not even one trial fits.
        """
        ...

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Train jobs, and yield each with the summary of its run when it finishes, in any order.

        Jobs resume only from checkpoints in the sweep's directory.
        """
        ...


class Local:
    """Trains waves one after the other, in this process and on its devices."""

    def __init__(self, work: Work, progress: SweepProgress):
        self._work, self._progress = work, progress
        self._programs = Programs(work.definition.sweep, work.task)
        self._kept: dict[int, TrainState] = {}

    def split(
        self, group: Group, waves: int = 1, memory_fraction: float = 1.0
    ) -> tuple[list[Wave], int]:
        """Split a group into at least `waves` waves, each within a fraction of the memory."""
        with self._progress.compiling():
            return self._programs.split(group, waves, memory_fraction)

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        for job in jobs:
            yield job, self.train_one(job)

    def train_one(self, job: Job) -> dict[str, Any]:
        settings = job.wave.settings
        directory = self._work.directory
        where = None if directory is None else wave_directory(directory, job.index)
        with self._progress.compiling():
            prepared = self._programs.get(settings)
        leg = Leg(job.planned.first, job.planned.last, self._states_before(job))
        if directory is not None:
            make_waves_folder(directory)
        found = run_wave(
            settings, where, prepared, leg, self._progress.wave(job.index, job.planned, job.wave),
        )  # fmt: skip
        if where is None:
            self._kept[job.index] = found.states
        return found.summary

    def states_after(self, index: int) -> TrainState:
        """States `[trials * S, ...]` at the end of a wave, with `Member`s for a population."""
        if self._work.directory is None:
            return self._kept[index]
        return wave_states(self._work, index)[1]

    def _states_before(self, job: Job) -> Any:
        """A function that loads the states from earlier waves; None if the trials are new."""
        if job.planned.first == 0:
            return None
        seeds = self._work.definition.settings.run.num_seeds

        def states() -> TrainState:
            parts, cache = [], {}
            for trial in job.wave.trials:
                before, index = job.before[trial.number]
                if index not in cache:
                    cache[index] = self.states_after(index)
                at = [t.number for t in before.trials].index(trial.number) * seeds
                parts.append(jax.tree.map(lambda x, at=at: x[at : at + seeds], cache[index]))
            parts += [parts[-1]] * (len(job.wave.settings.trials) - len(parts))
            return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)

        return states
