"""Settings as TOML: fields of `Config` at the top level, of `HParams` under `[hparams]`, of
`RunSettings` under `[run]`."""

import dataclasses
import importlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from purejaxppo.checks import is_reference, nearest
from purejaxppo.config import Config, ConfigError, HParams, TaskConfig, check_fields
from purejaxppo.references import already_imported, name_of, resolve

_T = TypeVar("_T")

_TEXT = "purejaxppo.rlhf.text_config"
KINDS = {
    "rlhf": ("purejaxppo.rlhf.config:RLHFConfig", "purejaxppo.rlhf.config:RLHFHParams"),
    "sft": (f"{_TEXT}:SFTConfig", f"{_TEXT}:TextHParams"),
    "reward": (f"{_TEXT}:RewardConfig", f"{_TEXT}:TextHParams"),
    "dpo": (f"{_TEXT}:DPOConfig", f"{_TEXT}:TextHParams"),
}
"""The classes of the config and the hyperparameters of each `kind` of file; without one, `Config`
and `HParams`."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Seeds, devices, evaluation, checkpoints and loggers of a run.

    Raises `ConfigError` on construction if a value is out of range.
    """

    seed: int = field(default=0, metadata={"low": 0, "high": 2**32 - 1, "open_low": False})
    """Base random seed; each run's seed is derived from it."""
    num_seeds: int = field(default=1, metadata={"low": 1, "high": 2**20, "open_low": False})
    """Number of seeds to train in parallel (S)."""
    devices: int = field(default=0, metadata={"low": 0, "high": 2**20, "open_low": False})
    """Number of devices (on CPU: cores). Seeds are spread over them, and the environments of each
    seed if there are more devices than seeds. 0 chooses automatically: a divisor of the number of
    seeds, or for a single seed the CPU cores that make it faster."""
    eval_episodes: int = field(default=128, metadata={"low": 1, "high": 2**20, "open_low": False})
    """Episodes of each evaluation, per seed."""
    eval_every: float = field(
        default=math.inf, metadata={"low": 0, "high": math.inf, "open_low": True}
    )
    """Evaluation interval, in eval_unit: writes eval.csv and keeps the best checkpoint. inf
    evaluates each checkpoint instead. The end of the run is always evaluated."""
    eval_unit: Literal["updates", "seconds"] = "updates"
    """Unit of eval_every."""
    checkpoint_every: float = field(
        default=300.0, metadata={"low": 0, "high": math.inf, "open_low": True}
    )
    """Checkpoint interval, in checkpoint_unit; inf saves only at evaluations by eval_every and when
    the run ends or is stopped."""
    checkpoint_unit: Literal["seconds", "updates"] = "seconds"
    """Unit of checkpoint_every."""
    keep: int = field(default=3, metadata={"low": 1, "high": 2**20, "open_low": False})
    """Number of newest checkpoints to keep, in addition to the best by evaluation."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases; WANDB_MODE=offline needs no network."""
    loggers: tuple[str, ...] = ()
    """Your own loggers, as package.module:name: an object with write(update, metrics) and close(),
    or a function that makes one from the run directory."""
    passed: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Parts that were passed from Python, which a resume cannot find by name."""

    def __post_init__(self) -> None:
        check_fields(self)
        for logger in self.loggers:
            if not is_reference(logger):
                raise ConfigError(f"loggers = {logger!r}: must be package.module:name")
        for name, every, unit in (
            ("checkpoint", self.checkpoint_every, self.checkpoint_unit),
            ("eval", self.eval_every, self.eval_unit),
        ):
            if unit == "updates" and math.isfinite(every) and every % 1:
                raise ConfigError(
                    f"{name}_every = {every}: must be a whole number, since {name}_unit = updates"
                )


@dataclass(frozen=True)
class Settings:
    """All settings of a config file."""

    config: Any = field(default_factory=Config)
    """A `Config`, or the `TaskConfig` of another task."""
    hparams: HParams = field(default_factory=HParams)
    run: RunSettings = field(default_factory=RunSettings)
    trials: tuple[HParams, ...] = ()
    """K sets of hyperparameters that replace `hparams`, trained in parallel, each with every seed;
    all are None in the same fields. Only waves of a sweep have trials."""

    @property
    def num_runs(self) -> int:
        """Number of parallel runs (S): `run.num_seeds`, or that many for each trial, ordered by
        trial."""
        return max(1, len(self.trials)) * self.run.num_seeds


MAX_BYTES = 16 * 2**20
"""Size limit of a config file; a sweep's wave has a line for each hyperparameter of each trial."""


def load_settings(path: str | Path) -> Settings:
    """Read a config file; missing settings take their defaults. Your own classes that it names
    under `[types]` are imported.

    Raises:
        ConfigError: if the file cannot be read, is not TOML, or has an unknown key (the message
            suggests the nearest one) or an invalid value.
    """
    return from_file(path, lambda table: settings_from(table, resolve))


def from_file(path: str | Path, make: Callable[[dict[str, Any]], _T]) -> _T:
    """Read a TOML file and return `make(table)`.

    Raises:
        ConfigError: if the file cannot be read or is not TOML, or if `make` raises it.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"config file {str(path)!r}: has {size:,} bytes, more than the limit of "
                f"{MAX_BYTES:,}; check the path"
            )
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ConfigError(f"config file {str(path)!r}: is not UTF-8 text: {error}") from error
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {str(path)!r}: is not TOML: {error}") from error
    try:
        return make(table)
    except ConfigError as error:
        raise ConfigError(f"config file {str(path)!r}: {error}") from error
    except ValueError as error:  # Python does not print numbers of more than 4300 digits
        raise ConfigError(f"config file {str(path)!r}: a number is too long: {error}") from error


Find = Callable[[str, str], Any]
"""`(setting, reference) -> object`."""


def settings_from(table: dict[str, Any], find: Find = already_imported) -> Settings:
    """Build settings from a table that `tomllib` has read.

    Args:
        find: finds the classes that the table names.

    Raises:
        ConfigError: as `load_settings`.
    """
    config_type, hparams_type = _types(table.pop("types", {}), table.pop("kind", None), find)
    parts = {}
    for name in ("hparams", "run"):
        parts[name] = table.pop(name, {})
        if not isinstance(parts[name], dict):
            raise ConfigError(f"{name} = {parts[name]!r}: must be a table, written as [{name}]")
    trials = table.pop("trials", [])
    if not isinstance(trials, list) or not all(isinstance(x, dict) for x in trials):
        raise ConfigError(f"trials = {trials!r}: must be tables, each written as [[trials]]")
    known = _known(config_type, hparams_type)
    return Settings(
        config=build(config_type, table, "", known),
        hparams=build(hparams_type, parts["hparams"], "hparams.", known),
        run=build(RunSettings, parts["run"], "run.", known),
        trials=tuple(build(hparams_type, trial, "trials.", known) for trial in trials),
    )


def settings_of_kind(kind: str | None) -> tuple[Any, Any]:
    """The classes of the config and of the hyperparameters of a kind of file."""
    if kind is None:
        return Config, HParams
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"kind = {kind!r}: must be {' or '.join(KINDS)}; leave it out for "
                          "reinforcement learning")  # fmt: skip
    modules = (importlib.import_module(x.partition(":")[0]) for x in KINDS[kind])
    names = (x.partition(":")[2] for x in KINDS[kind])
    config, hparams = map(getattr, modules, names)
    return config, hparams


def kind_of(config: Any) -> str | None:
    """The kind of file that describes a config; None for `Config` and for users' own classes."""
    names = {config: kind for kind, (config, _) in KINDS.items()}
    return names.get(name_of(type(config)))


def train_command(config: Any) -> str:
    """The command that trains config files of the kind of `config`."""
    kind = kind_of(config)
    return f"purejaxppo {'train' if kind is None else 'rlhf' if kind == 'rlhf' else f'rlhf {kind}'}"


def _types(table: Any, kind: Any, find: Find) -> tuple[Any, Any]:
    """Find the classes of the config and of the hyperparameters."""
    usual = dict(zip(("config", "hparams"), settings_of_kind(kind), strict=True))
    found: list[Any] = []
    if not isinstance(table, dict) or not set(table) <= set(usual):
        raise ConfigError(f"types = {table!r}: must be a table with config or hparams")
    for name, own in usual.items():
        reference = table.get(name)
        if reference is not None and not (isinstance(reference, str) and is_reference(reference)):
            raise ConfigError(f"types.{name} = {reference!r}: must be package.module:name")
        found.append(own if reference is None else find(f"types.{name}", reference))
        wanted = TaskConfig if name == "config" else HParams
        if not (isinstance(found[-1], type) and issubclass(found[-1], wanted)):
            raise ConfigError(
                f"types.{name} = {reference!r}: must be a subclass of {wanted.__name__}"
            )
    return found[0], found[1]


def _class_reference(name: str, value: Any) -> str:
    """Return the name of the value's class. Raises `ConfigError` if it cannot be imported."""
    reference = name_of(type(value))
    if not is_reference(reference):
        raise ConfigError(
            f"{name}: the class {reference} is defined inside a function, so a saved run could not "
            "find it; define it at the top level of a module"
        )
    return reference


def _dump_types(settings: Settings) -> list[str]:
    usual = settings_of_kind(kind_of(settings.config))
    pairs = zip(("config", "hparams"), (settings.config, settings.hparams), usual, strict=True)
    own = [
        f"{name} = {toml(_class_reference(name, x))}"
        for name, x, kind in pairs
        if type(x) is not kind
    ]
    return ["", "[types]", *own] if own else []


def _known(config_type: Any, hparams_type: Any) -> dict[str, str]:
    """Where each setting belongs, by its name, since it may be in the wrong table."""
    known = {f.name: f.name for f in dataclasses.fields(config_type)}
    known |= {f.name: f"hparams.{f.name}" for f in dataclasses.fields(hparams_type)}
    known |= {f.name: f"run.{f.name}" for f in dataclasses.fields(RunSettings)}
    return known | {name: f"[{name}]" for name in ("hparams", "run", *_tables(config_type))}


def _tables(config_type: Any) -> list[str]:
    """The fields of a config that are tables."""
    return [f.name for f in dataclasses.fields(config_type) if isinstance(f.default, Mapping)]


_ONLY_TO_GENERATE = ("top_k", "top_p")


def build(kind: Any, table: dict[str, Any], prefix: str, known: Mapping[str, str]) -> Any:
    """Make `kind(**table)`. Raises `ConfigError` for unknown keys.

    Args:
        known: where each setting belongs, by its name.
    """
    names = [f.name for f in dataclasses.fields(kind)]
    for key in table:
        if key not in names:
            raise ConfigError(f"{prefix}{key}: no such setting; {_hint(key, prefix, known)}")
    return kind(**table)


def _hint(key: str, prefix: str, known: Mapping[str, str]) -> str:
    if key in _ONLY_TO_GENERATE:
        return (
            "learning from a truncated distribution would make the probability ratios wrong; use "
            "`purejaxppo generate`"
        )
    near = nearest(key, known, 0.5)
    if near:
        return f"did you mean {known[near]}?"
    table = prefix.rstrip(".") or "the top level"
    return f"`purejaxppo train --help` lists the settings of {table}"


def dump_settings(settings: Settings) -> str:
    """Return TOML text that `load_settings` reads back as equal settings."""
    config, kind = settings.config, kind_of(settings.config)
    lines = [] if kind is None else [f"kind = {toml(kind)}"]
    lines += dump(config)
    for table in _tables(type(config)):
        if getattr(config, table):
            values = getattr(config, table).items()
            lines += ["", f"[{table}]", *(f"{_key(name)} = {toml(x)}" for name, x in values)]
    lines += ["", "[hparams]", *dump(settings.hparams)]
    lines += _dump_types(settings)
    lines += ["", "[run]", *dump(settings.run)]
    for trial in settings.trials:
        lines += ["", "[[trials]]", *dump(trial)]
    return "\n".join(lines) + "\n"


def dump(instance: Any) -> list[str]:
    """Return a line of TOML for each field that is neither None nor a table."""
    values = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
    plain = {k: v for k, v in values.items() if v is not None and not isinstance(v, Mapping)}
    return [f"{name} = {toml(value)}" for name, value in plain.items()]


def _key(name: str) -> str:
    """Format a name as a TOML key."""
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else toml(name)


def toml(value: Any) -> str:
    """Format a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON and TOML have the same escapes, except that TOML must escape DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value) if isinstance(value, int) else repr(float(value))
