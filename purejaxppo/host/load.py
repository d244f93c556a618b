"""Loads trained states from a run directory."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import jax

from purejaxppo.checks import RunWarning, is_reference
from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.host import checkpoint, checkpoints
from purejaxppo.host.checkpoint import Checkpoint
from purejaxppo.host.configfile import Settings, load_settings
from purejaxppo.host.program import stacked_hparams
from purejaxppo.host.rundir import CONFIG, SUMMARY
from purejaxppo.inputs import whole_number
from purejaxppo.task import PartArguments, Task, own_class, task_of_config
from purejaxppo.types import Learner, TrainState


class Loaded(NamedTuple):
    """Settings and state of a run, as returned by `load`."""

    config: Config
    hparams: HParams
    state: TrainState


def load(
    run_dir: str | Path,
    task: Task | None = None,
    *,
    seed: int | None = 0,
    which: Literal["newest", "best"] | int = "newest",
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> Loaded:
    """Load settings and state of a run, finished or not, from a checkpoint.

    Damaged checkpoints are skipped with a warning. Modules that `config.toml` names (your own
    parts) are imported; nothing else in the directory can run code.

    Args:
        task: the task passed to `run`, if one was.
        seed: index of the seed, from 0 (in a wave of a sweep: of the run, ordered by trial); None
            returns all seeds, leaves `[S, ...]`.
        which: the newest checkpoint, the best by evaluation, or the one after this number of
            updates.
        env: the environment passed to `run`, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to `run`.

    Raises:
        ConfigError: if there is no such checkpoint or seed, or it belongs to a different task.
    """
    given = {"env": env, "env_params": env_params, **parts}
    found, states = find_states(Path(run_dir), which, lambda x: task_of(x, task, given))
    settings = found.settings
    if seed is not None:
        check_seed(seed, settings)
    state = states if seed is None else jax.tree.map(lambda x: x[seed], states)
    hparams = settings.hparams
    if settings.trials and seed is not None:
        hparams = settings.trials[seed // settings.run.num_seeds]
    return Loaded(settings.config, hparams, state)


def check_seed(seed: int, settings: Settings) -> None:
    """Raise `ConfigError` if a run has no seed of this index."""
    if whole_number("seed", seed, 0) >= settings.num_runs:
        raise ConfigError(
            f"seed = {seed}: the run has seeds 0 to {settings.num_runs - 1}, counted from 0 "
            "whatever its `seed` setting"
        )


def find_states(
    run_dir: Path, which: str | int, task: Callable[[Settings], Task]
) -> tuple[Checkpoint, TrainState]:
    """Find a checkpoint and load its states `[S, ...]`, also while the run removes old checkpoints.

    Checkpoints that belong to a different run than `config.toml` are skipped if there are others.

    Args:
        task: makes the task for a checkpoint's settings.

    Raises:
        ConfigError: as `load`.
    """
    while True:
        found = _of_this_run(run_dir, which)
        with checkpoints.pinned(found.path) as exists:
            if exists:
                _check_references(run_dir, found)
                made = task(found.settings)
                return found, restore_states(found, made.learner(None), made)


def _check_references(run_dir: Path, found: Checkpoint) -> None:
    """Raise `ConfigError` if the checkpoint names a module that `config.toml` does not: only that
    file, which people read and write, may name modules to import."""
    named = {k: v for k, v in vars(found.settings.config).items() if _is_reference(v)}
    own = vars(load_settings(run_dir / CONFIG).config) if named else {}
    for name, reference in named.items():
        if own.get(name) != reference:
            raise ConfigError(
                f"checkpoint {str(found.path)!r}: has {name} = {reference!r}, but {CONFIG} has "
                f"{own.get(name)!r}; change {CONFIG} if you trust that module"
            )


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and is_reference(value)


def _of_this_run(run_dir: Path, which: str | int) -> Checkpoint:
    try:
        settings = load_settings(run_dir / CONFIG)
        return find_with_warnings(run_dir, which, lambda x: checkpoint.check_same_run(x, settings))
    except ConfigError:
        return find_with_warnings(run_dir, which)


def find_with_warnings(
    run_dir: Path,
    which: str | int = "newest",
    check: Callable[[Checkpoint], Any] | None = None,
) -> Checkpoint:
    """Call `checkpoints.find`, and warn of each checkpoint that was skipped."""
    try:
        exists = run_dir.is_dir()
    except OSError as error:
        raise ConfigError(f"run directory {str(run_dir)!r}: {error.strerror}") from error
    if not exists:
        raise ConfigError(f"run directory {str(run_dir)!r}: does not exist; check the path")
    found, skipped = checkpoints.find(run_dir, which, check)
    _warn(skipped)
    return found


def newest_or_none(run_dir: Path, check: Callable[[Checkpoint], Any]) -> Checkpoint | None:
    """Find the newest complete checkpoint; None if the run was killed before its first.

    Args:
        check: raises `ConfigError` for a checkpoint that should be skipped.

    Raises:
        ConfigError: if there are checkpoints but all are skipped, or the run was finished.
    """
    if checkpoints.has_any(run_dir):
        return find_with_warnings(run_dir, check=check)
    if (run_dir / SUMMARY).exists():
        raise ConfigError(
            f"run directory {str(run_dir)!r}: the run is finished, but its checkpoints are "
            "missing; restore them, or start a new run"
        )
    _warn([f"{p}: an unfinished save" for p in checkpoints.unfinished(run_dir)])
    return None


def restore_states(found: Checkpoint, learner: Learner, task: Task) -> TrainState:
    """Load the states `[S, ...]` of a checkpoint.

    Raises:
        ConfigError: if the learner's states have other shapes.
    """
    settings = found.settings

    def init() -> TrainState:
        keys = jax.random.split(jax.random.key(0), settings.num_runs)
        start = jax.vmap(learner.init, in_axes=(0, 0, None))
        return start(keys, stacked_hparams(settings), task.data)

    return checkpoint.restore(found, init)


def task_of(settings: Settings, task: Task | None, given: dict[str, Any]) -> Task:
    """Make the task of a saved run.

    Args:
        task: a task passed from Python, or None.
        given: parts passed from Python, by name; None for parts that were not.

    Raises:
        ConfigError: if the parts are not those passed to the run, or as `make_task`.
    """
    given = {name: part for name, part in given.items() if part is not None}
    if task is not None and given:
        raise ConfigError(
            f"{', '.join(given)}: cannot be combined with task, whose parts are fixed"
        )
    passed = set(given if task is None else task.passed)
    for name in sorted(set(settings.run.passed) - passed):
        raise ConfigError(
            f"{name}: was passed from Python to the run, so it must be passed again: "
            f"purejaxppo.resume and purejaxppo.load take {name}=..."
        )
    for name in sorted(passed - set(settings.run.passed)):
        raise ConfigError(
            f"{name}: was not passed to the original run of {settings.config.label}; leave it out"
        )
    if task is not None:
        return task.with_config(settings.config)
    return task_of_config(settings.config, hparams=own_class(settings.hparams), **given)


def _warn(skipped: list[str]) -> None:
    for line in skipped:
        warnings.warn(f"skipped {line}", RunWarning, stacklevel=4)
