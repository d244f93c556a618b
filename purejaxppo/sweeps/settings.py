"""What a sweep is told, and `sweep.toml`, which holds all of it."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from purejaxppo.config import ConfigError, check_fields
from purejaxppo.host.configfile import (
    Settings,
    build,
    dump,
    dump_settings,
    from_file,
    settings_from,
)
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
    """NAME=VALUE,VALUE: a setting of which each value is tried, in every combination."""
    sample: tuple[str, ...] = ()
    """NAME=uniform:LOW,HIGH or loguniform:LOW,HIGH or choice:VALUE,VALUE: a setting that is
    drawn anew for each trial."""
    strategy: Literal["random", "sobol", "optuna", "halving", "pbt"] = "random"
    """How samples are drawn: independently, evenly spread (sobol), or where returns were high
    (optuna, which takes the grid's values as choices). halving draws like random, and trains the
    best 1 / eta of the trials on, again and again. pbt is one population, in which now and then
    the best fifth take the place of the worst, with numbers somewhat changed."""
    trials: int = _count(16, 1)
    """Samples drawn, each of which is tried at every point of the grid; with optuna all trials."""
    batch: int = _count(16, 1, strategy="optuna")
    """Trials that optuna is asked for at a time, which run side by side."""
    eta: int = _count(3, 2, strategy="halving")
    """With halving: the part of the trials that goes on, and how many times longer."""
    rungs: int = _count(3, 1, 64, strategy="halving")
    """With halving: how often trials are picked, at most; all begin with 1 / eta^rungs of their
    updates."""
    interval: int = _count(10, 1, strategy="pbt")
    """With pbt: updates from one exchange to the next."""
    memory_gb: float = field(default=0.0, metadata={"low": 0, "high": math.inf, "open_low": False})
    """Memory that trainings may take on each device; what does not fit runs in waves, one after
    the other. 0 takes half of what is free."""
    engine: Literal["local", "ray"] = "local"
    """Where waves run: here, or on the machines of a Ray cluster, several at a time. That is the
    one RAY_ADDRESS names, or that of this machine, or one begun here; the run directory must lie
    on a disk that all of them share."""
    wave_cpus: int = _count(1, 1, engine="ray")
    """With ray: the CPU cores that a wave takes, which are its devices if it has no others."""
    wave_gpus: int = _count(0, 0, engine="ray")
    """With ray: the GPUs that a wave takes."""
    wave_tpus: int = _count(0, 0, engine="ray")
    """With ray: the TPU chips that a wave takes."""

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


@dataclass(frozen=True)
class Definition:
    """All that determines a sweep. Raises `ConfigError` for loggers that only runs have, and for
    more devices than a wave has."""

    settings: Settings
    """What trials have in common; `settings.run` says with how many seeds each is trained."""
    sweep: SweepSettings

    def __post_init__(self) -> None:
        for name in ("tensorboard", "wandb"):
            if getattr(self.settings.run, name):
                raise ConfigError(
                    f"run.{name} = true: a sweep writes results.csv and curves.npz alone; leave it "
                    "out, and log the winner's training"
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
    return from_file(path, definition_from)


def definition_from(table: dict[str, Any]) -> Definition:
    """From a table as `tomllib` reads it. Raises `ConfigError` as `load_settings` does."""
    sweep = table.pop("sweep", {})
    if not isinstance(sweep, dict):
        raise ConfigError(f"sweep = {sweep!r}: must be a table, written as [sweep]")
    return Definition(settings_from(table), build(SweepSettings, sweep, "sweep."))
