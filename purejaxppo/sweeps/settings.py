"""Settings of a sweep, and `sweep.toml`, which records them."""

import math
from dataclasses import dataclass, field, fields
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

MIN_POPULATION = 5


def _count(default: int, low: int, high: int = 2**20, **only_with: str) -> Any:
    """A whole number that has an effect only if another setting has a given value."""
    choices = {name: (value,) for name, value in only_with.items()}
    return field(
        default=default,
        metadata={"low": low, "high": high, "open_low": False, "only_with": choices},
    )


@dataclass(frozen=True)
class SweepSettings:
    """Search space and strategy of a sweep.

    Raises `ConfigError` on construction if a value is out of range.
    """

    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE: try each value of a setting, in every combination of such settings."""
    sample: tuple[str, ...] = ()
    """NAME=uniform:LOW,HIGH or loguniform:LOW,HIGH or choice:VALUE,VALUE: draw a setting for each
    trial."""
    strategy: Literal["random", "sobol", "optuna", "halving", "pbt"] = "random"
    """Search strategy. random draws samples independently, sobol spreads them evenly, optuna draws
    where returns were high (and treats grid values as choices). halving draws like random and
    repeatedly continues only the best 1 / eta of the trials. pbt trains one population and
    periodically replaces the worst fifth with perturbed copies of the best."""
    trials: int = _count(16, 1)
    """Number of samples, each tried at every point of the grid; with optuna, number of trials."""
    batch: int = _count(16, 1, strategy="optuna")
    """With optuna: trials to ask for at a time, which run in parallel."""
    eta: int = _count(3, 2, strategy="halving")
    """With halving: continue the best 1 / eta of the trials, for eta times as many updates."""
    rungs: int = _count(3, 1, 64, strategy="halving")
    """With halving: maximum number of selections; all trials start with 1 / eta^rungs of their
    updates."""
    interval: int = _count(10, 1, strategy="pbt")
    """With pbt: updates between replacements."""
    memory_gb: float = field(default=0.0, metadata={"low": 0, "high": math.inf, "open_low": False})
    """Memory to use on each device, in GB; trials that do not fit run in several waves, one after
    the other. 0 uses half of the free memory."""
    engine: Literal["local", "ray"] = "local"
    """Where waves run: local, one after the other in this process; ray, several at a time on a Ray
    cluster (at RAY_ADDRESS, running on this machine, or started for this sweep). With ray, the run
    directory must be on a disk that all machines share."""
    wave_cpus: int = _count(1, 1, engine="ray")
    """With ray: CPU cores per wave; they are its devices if it has no GPUs or TPUs."""
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
            f"strategy = pbt changes numbers during training, but {fixed[0]} has a list of values; "
            "give it a range, as in --sample gamma=uniform:0.9,0.999"
        )
    if trials < MIN_POPULATION:
        raise ConfigError(
            f"trials = {trials}: a population has at least {MIN_POPULATION} members, since "
            "the best fifth replaces the worst fifth; use more trials"
        )


RUN_ONLY = ("tensorboard", "wandb", "loggers", "eval_every", "eval_unit", "checkpoint_unit")
"""Settings that runs have and sweeps do not."""


@dataclass(frozen=True)
class Definition:
    """Everything that determines a sweep.

    Raises `ConfigError` for settings that only runs have, and for more devices than a wave has.
    """

    settings: Settings
    """Settings shared by all trials; `settings.run.num_seeds` is the number of seeds of each."""
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
                f"devices = {devices}: with engine = ray a wave has {own} (from wave_cpus, "
                "wave_gpus or wave_tpus); raise those, or set devices = 0 to use all of them"
            )


def dump_definition(definition: Definition) -> str:
    """A definition as TOML text; `load_definition` reads back an equal one."""
    return "\n".join([dump_settings(definition.settings), "[sweep]", *dump(definition.sweep), ""])


def load_definition(path: Path) -> Definition:
    """Read `sweep.toml`. Raises `ConfigError` as `load_settings` does."""
    return from_file(path, lambda table: definition_from(table, resolve))


def definition_from(table: dict[str, Any], find: Find = already_imported) -> Definition:
    """A definition from a `tomllib` table. Raises `ConfigError` as `load_settings` does."""
    sweep = table.pop("sweep", {})
    if not isinstance(sweep, dict):
        raise ConfigError(f"sweep = {sweep!r}: must be a table, written as [sweep]")
    known = {f.name: f"sweep.{f.name}" for f in fields(SweepSettings)}
    return Definition(settings_from(table, find), build(SweepSettings, sweep, "sweep.", known))
