"""Split trials into waves: runs that are compiled as one program and run in parallel."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from purejaxppo.config import ConfigError, HParams
from purejaxppo.host.configfile import Settings
from purejaxppo.host.memory import free_bytes
from purejaxppo.host.population import Population
from purejaxppo.host.program import Prepared, prepare
from purejaxppo.sweeps.settings import SweepSettings
from purejaxppo.sweeps.space import Range, apply
from purejaxppo.sweeps.strategies import Trial, describe
from purejaxppo.task import Task

MEMORY_FRACTION = 0.5
"""Fraction of the free memory to use; evaluations and checkpoints need copies of the states."""


class Wave(NamedTuple):
    """Trials that run in parallel."""

    trials: list[Trial]
    settings: Settings
    """Settings with the hyperparameters of these trials, padded to the size of the program."""


class Group(NamedTuple):
    """Trials that differ only in traced hyperparameters, so that they share one program."""

    settings: Settings
    """Settings without `trials`."""
    members: list[tuple[Trial, HParams]]

    def waves(self, size: int) -> list[Wave]:
        """Split into waves of `size` trials; pad the last one with copies of its last trial."""
        parts = [self.members[i : i + size] for i in range(0, len(self.members), size)]
        return [
            Wave(
                [trial for trial, _ in part],
                dataclasses.replace(
                    self.settings,
                    trials=tuple(h for _, h in part) + (part[-1][1],) * (size - len(part)),
                ),
            )
            for part in parts
        ]


def make_groups(settings: Settings, trials: Sequence[Trial]) -> list[Group]:
    """Group trials by the program that they need.

    Raises:
        ConfigError: if a trial's values are invalid; the message names them.
    """
    groups: dict[Any, Group] = {}
    for trial in trials:
        try:
            config, hparams = apply(trial.values, settings.config, settings.hparams)
        except ConfigError as error:
            raise ConfigError(f"trial {trial.number} ({describe(trial)}): {error}") from error
        absent = tuple(value is None for value in vars(hparams).values())
        base = dataclasses.replace(settings, config=config)
        group = groups.setdefault((config, absent), Group(base, []))
        group.members.append((trial, hparams))
    return list(groups.values())


class Programs:
    """Compiles each program of a sweep once, and sizes waves to fit the memory."""

    def __init__(self, sweep: SweepSettings, task: Task):
        self._sweep, self._task = sweep, task
        self._max_bytes = int(sweep.memory_gb * 1e9)
        self._compiled: dict[tuple[Any, int, tuple[bool, ...]], Prepared] = {}

    def get(self, settings: Settings) -> Prepared:
        """The program for waves with this config and number of trials."""
        absent = tuple(value is None for value in vars(settings.trials[0]).values())
        key = (settings.config, len(settings.trials), absent)
        if key not in self._compiled:
            population = population_of(settings, self._sweep)
            task = self._task.with_config(settings.config)
            self._compiled[key] = prepare(settings, task, population)
        return self._compiled[key]

    def split(
        self, group: Group, waves: int = 1, memory_fraction: float = 1.0
    ) -> tuple[list[Wave], int]:
        """Split a group into waves that fit in memory.

        Args:
            waves: minimum number of waves, if there are enough trials and they are independent.
            memory_fraction: fraction of the memory that one wave may use.

        Returns:
            the waves, as few as fit, and the bytes that one needs on each device.

        Raises:
            ConfigError: if not even one trial fits.
        """
        most = self._max_bytes or int(memory_fraction * MEMORY_FRACTION * free_bytes())
        parts = 1 if self._sweep.strategy == "pbt" else waves
        size = padded_count(-(-len(group.members) // parts), group.settings)
        least = min(size, padded_count(1, group.settings))
        while True:
            found = group.waves(size)
            needed = self.get(found[0].settings).program.device_bytes
            if needed <= most:
                return found, needed
            if self._sweep.strategy == "pbt":
                raise ConfigError(
                    f"a population of trials = {len(group.members)} takes {needed / 1e9:.2f} GB on "
                    f"each device, but only {most / 1e9:.2f} GB may be used; use fewer trials"
                )
            if size == least:
                raise ConfigError(
                    f"trials = {least} of num_seeds = {group.settings.run.num_seeds} take "
                    f"{needed / 1e9:.2f} GB on each device, but only {most / 1e9:.2f} GB may be "
                    "used; use fewer seeds, environments or steps, or a larger memory_gb"
                )
            fitting = min(size - least, int(size * most / needed))
            multiple = _trial_multiple(group.settings)
            size = max(least, fitting // multiple * multiple or fitting)


def population_of(settings: Settings, sweep: SweepSettings) -> Population | None:
    """The population-based training of a wave; None for other strategies."""
    if sweep.strategy != "pbt":
        return None
    ranges = tuple((name, x.low, x.high) for name, x in sweep.space.sample if isinstance(x, Range))
    return Population(
        sweep.trials, sweep.interval, ranges, settings.run.seed, settings.config.num_updates
    )


def _trial_multiple(settings: Settings) -> int:
    """The smallest number of trials whose runs can be divided evenly among all devices."""
    devices = settings.run.devices or jax.device_count()
    return devices // math.gcd(devices, settings.run.num_seeds)


def padded_count(count: int, settings: Settings) -> int:
    """`count` rounded up so that its runs divide evenly among all devices.

    `count` itself if there are more devices than runs: each run then uses several devices, or some
    devices stay idle.
    """
    wanted, seeds = settings.run.devices, settings.run.num_seeds
    devices = wanted or jax.device_count()
    if count * seeds < devices and (not wanted or devices % (count * seeds) == 0):
        return count
    return -(-count // _trial_multiple(settings)) * _trial_multiple(settings)
