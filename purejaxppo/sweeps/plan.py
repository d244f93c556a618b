"""How trials become waves: trainings that are compiled as one program and run side by side."""

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

SHARE_OF_MEMORY = 0.5
"""Of what is free: evaluations and checkpoints keep states of their own."""


class Wave(NamedTuple):
    """Trials that run side by side."""

    trials: list[Trial]
    settings: Settings
    """Whose `trials` are those above, and as many more as fill the program up."""


class Group(NamedTuple):
    """Trials that differ in numbers alone, so that one program serves them all."""

    settings: Settings
    """Without `trials`."""
    members: list[tuple[Trial, HParams]]

    def waves(self, size: int) -> list[Wave]:
        """Of `size` trials each; the last is filled up by repeating its last trial."""
        cut = [self.members[i : i + size] for i in range(0, len(self.members), size)]
        return [
            Wave(
                [trial for trial, _ in part],
                dataclasses.replace(
                    self.settings,
                    trials=tuple(h for _, h in part) + (part[-1][1],) * (size - len(part)),
                ),
            )
            for part in cut
        ]


def make_groups(settings: Settings, trials: Sequence[Trial]) -> list[Group]:
    """Trials by what has to be compiled for them.

    Raises:
        ConfigError: if a trial's values cannot work, with those values.
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
    """Compiles what waves need, once, and cuts waves to the memory there is."""

    def __init__(self, sweep: SweepSettings, task: Task):
        self._sweep, self._task = sweep, task
        self._max_bytes = int(sweep.memory_gb * 1e9)
        self._compiled: dict[tuple[Any, int, tuple[bool, ...]], Prepared] = {}

    def of(self, settings: Settings) -> Prepared:
        """For waves of as many trials as these."""
        absent = tuple(value is None for value in vars(settings.trials[0]).values())
        key = (settings.config, len(settings.trials), absent)
        if key not in self._compiled:
            population = population_of(settings, self._sweep)
            task = self._task.with_config(settings.config)
            self._compiled[key] = prepare(settings, task, population)
        return self._compiled[key]

    def cut(
        self, group: Group, waves: int = 1, share_of_memory: float = 1.0
    ) -> tuple[list[Wave], int]:
        """The group's waves, as few as fit but `waves` at least, where there are trials enough and
        they do not learn from each other; and the bytes that one takes on each device.

        Raises:
            ConfigError: if not even one trial fits.
        """
        most = self._max_bytes or int(share_of_memory * SHARE_OF_MEMORY * free_bytes())
        parts = 1 if self._sweep.strategy == "pbt" else waves
        size = filled(-(-len(group.members) // parts), group.settings)
        least = min(size, filled(1, group.settings))
        while True:
            cut = group.waves(size)
            needed = self.of(cut[0].settings).program.device_bytes
            if needed <= most:
                return cut, needed
            if self._sweep.strategy == "pbt":
                raise ConfigError(
                    f"a population of trials = {len(group.members)} takes {needed / 1e9:.2f} GB on "
                    f"each device, and there are {most / 1e9:.2f} GB to use; choose fewer trials"
                )
            if size == least:
                raise ConfigError(
                    f"trials = {least} of num_seeds = {group.settings.run.num_seeds} take "
                    f"{needed / 1e9:.2f} GB on each device, and there are {most / 1e9:.2f} GB to "
                    "use; choose fewer seeds, environments or steps, or another memory_gb"
                )
            fitting = min(size - least, int(size * most / needed))
            size = max(least, fitting // _even(group.settings) * _even(group.settings) or fitting)


def population_of(settings: Settings, sweep: SweepSettings) -> Population | None:
    """How the trials of a wave learn from each other, if the strategy is that they do."""
    if sweep.strategy != "pbt":
        return None
    ranges = tuple((name, x.low, x.high) for name, x in sweep.space.sample if isinstance(x, Range))
    return Population(
        sweep.trials, sweep.interval, ranges, settings.run.seed, settings.config.num_updates
    )


def _even(settings: Settings) -> int:
    """The fewest trials whose trainings can be dealt out to all devices."""
    devices = settings.run.devices or jax.device_count()
    return devices // math.gcd(devices, settings.run.num_seeds)


def filled(count: int, settings: Settings) -> int:
    """As many trials as keep all devices busy to the end, `count` or a few more; `count` where
    there are more devices than trainings, which then share them evenly or leave some idle."""
    wanted, seeds = settings.run.devices, settings.run.num_seeds
    devices = wanted or jax.device_count()
    if count * seeds < devices and (not wanted or devices % (count * seeds) == 0):
        return count
    return -(-count // _even(settings)) * _even(settings)
