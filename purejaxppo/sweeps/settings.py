"""What a sweep is told, and `sweep.toml`, which holds all of it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from purejaxppo.config import ConfigError, check_fields
from purejaxppo.host.configfile import (
    Find,
    RunSettings,
    Settings,
    build,
    dump,
    dump_settings,
    from_file,
    settings_from,
    toml,
)
from purejaxppo.references import already_imported, resolve
from purejaxppo.sweeps.space import Range, Space, parse_space

LEAST_POPULATION = 5


def _count(default: int, low: int, high: int = 2**20, **only_with: str) -> Any:
    """A whole number that has an effect only where another setting has a certain value."""
    choices = {name: (value,) for name, value in only_with.items()}
    return field(
        default=default,
        metadata={"low": low, "high": high, "open_low": False, "only_with": choices},
    )


@dataclass(frozen=True)
class SweepSettings:
    """What is searched, and how.

    Raises `ConfigError` on construction if a value is out of range.
    """

    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE: try each value of a setting, in every combination of such settings."""
    sample: tuple[str, ...] = ()
    """NAME=uniform:LOW,HIGH or loguniform:LOW,HIGH or choice:VALUE,VALUE: draw a setting for each
    trial."""
    strategy: Literal["random", "sobol", "optuna", "halving", "pbt"] = "random"
    """How samples are drawn: independently (random), evenly spread (sobol), or where returns were
    high (optuna, which treats grid values as choices). halving draws like random and repeatedly
    continues only the best 1 / eta of the trials. pbt is one population: it periodically replaces
    the worst fifth with perturbed copies of the best."""
    trials: int = _count(16, 1)
    """Number of samples, each tried at every point of the grid; with optuna, of all trials."""
    batch: int = _count(16, 1, strategy="optuna")
    """With optuna: trials to ask for at a time, which run in parallel."""
    eta: int = _count(3, 2, strategy="halving")
    """With halving: continue the best 1 / eta of the trials, for eta times as many updates."""
    rungs: int = _count(3, 1, 64, strategy="halving")
    """With halving: maximum number of selections; all trials begin with 1 / eta^rungs of their
    updates."""
    interval: int = _count(10, 1, strategy="pbt")
    """With pbt: updates between replacements."""
    memory_gb: float = field(default=0.0, metadata={"low": 0, "high": math.inf, "open_low": False})
    """Memory to use on each device, in GB; what does not fit runs in waves, one after the other. 0
    uses half of the free memory."""
    engine: Literal["local", "ray"] = "local"
    """Where waves run: local, in this process; ray, on the machines of a Ray cluster, several at a
    time: that of RAY_ADDRESS, one running on this machine, or one started for this sweep. The run
    directory must be on a disk that all machines share."""
    wave_cpus: int = _count(1, 1, engine="ray")
    """With ray: CPU cores per wave; its devices if it has no GPUs or TPUs."""
    wave_gpus: int = _count(0, 0, engine="ray")
    """With ray: GPUs per wave."""
    wave_tpus: int = _count(0, 0, engine="ray")
    """With ray: TPU chips per wave."""

    def __post_init__(self) -> None:
        check_fields(self)
        space = self.space
        if self.strategy == "pbt":
            _check_population(space, self.trials)

    @property
    def space(self) -> Space:
        return parse_space(self.grid, self.sample)


def _check_population(space: Space, trials: int) -> None:
    fixed = [name for name, _ in space.grid]
    fixed += [name for name, wanted in space.sample if not isinstance(wanted, Range)]
    if fixed:
        raise ConfigError(
            f"strategy = pbt changes numbers while training, and {fixed[0]} has a list of values; "
            "give it a range, as in --sample gamma=uniform:0.9,0.999"
        )
    if trials < LEAST_POPULATION:
        raise ConfigError(
            f"trials = {trials}: a population has at least {LEAST_POPULATION} members, of which "
            "the best fifth take the place of the worst"
        )


RUN_ONLY = ("tensorboard", "wandb", "loggers", "eval_every", "eval_unit", "checkpoint_unit")
"""Settings of runs that a sweep does not have."""


@dataclass(frozen=True)
class Definition:
    """All that determines a sweep. Raises `ConfigError` for settings that only runs have, and for
    more devices than a wave has."""

    settings: Settings
    """What trials have in common; `settings.run` says with how many seeds each is trained."""
    sweep: SweepSettings

    def __post_init__(self) -> None:
        for name in RUN_ONLY:
            value = getattr(self.settings.run, name)
            if value != getattr(RunSettings(), name):
                raise ConfigError(
                    f"run.{name} = {toml(value)}: a sweep writes results.csv and curves.npz, "
                    "saves every checkpoint_every seconds and evaluates at the end; leave it out"
                )
        sweep, devices = self.sweep, self.settings.run.devices
        own = sweep.wave_gpus or sweep.wave_tpus or sweep.wave_cpus
        if sweep.engine == "ray" and devices > own:
            raise ConfigError(
                f"devices = {devices}: with engine = ray a wave has {own}, by wave_cpus, wave_gpus "
                "and wave_tpus; ask for more of those, or for devices = 0, which takes them all"
            )


def dump_definition(definition: Definition) -> str:
    """The TOML text that `load_definition` reads back to an equal one."""
    return "\n".join([dump_settings(definition.settings), "[sweep]", *dump(definition.sweep), ""])


def load_definition(path: Path) -> Definition:
    """Raises `ConfigError` as `load_settings` does."""
    return from_file(path, lambda table: definition_from(table, resolve))


def definition_from(table: dict[str, Any], find: Find = already_imported) -> Definition:
    """From a table as `tomllib` reads it. Raises `ConfigError` as `load_settings` does."""
    sweep = table.pop("sweep", {})
    if not isinstance(sweep, dict):
        raise ConfigError(f"sweep = {sweep!r}: must be a table, written as [sweep]")
    return Definition(settings_from(table, find), build(SweepSettings, sweep, "sweep."))
